"""Phantoms: reproducible, well-formed, and physically what they claim to be."""

import cv2
import numpy as np
import pytest

from kdsweep.core.errors import InputError
from kdsweep.data.phantom import Phantom, _scatter, cohort, phantom


@pytest.fixture(scope="module")
def hundred() -> list[Phantom]:
    return list(cohort(count=100, seed=0))


def _step_behind(item: Phantom) -> float:
    """Mean gray behind the lesion less that next to it at the same depth; NaN where there is no room to measure."""
    rows, columns = (np.nonzero(item.mask.any(axis=axis))[0] for axis in (1, 0))
    top, left, right = rows[-1] + 6, columns[0], columns[-1]
    strip = item.image[top : top + 60].astype(float)
    span = right - left
    middle = strip[:, left + span // 4 : right - span // 4 + 1]
    next_to = np.hstack(
        [strip[:, max(left - span, 0) : max(left - span // 8, 0)], strip[:, right + span // 8 :][:, :span]]
    )
    if strip.shape[0] < 15 or next_to.shape[1] < 10:
        return float("nan")
    return float(middle.mean() - next_to.mean())


def test_same_arguments_give_the_same_bits() -> None:
    first, second = (phantom(seed=3, index=5, label="malignant") for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.mask, second.mask)
    assert first.id == second.id == "malignant (6)"


def test_a_phantom_does_not_depend_on_those_made_before() -> None:
    cohort_of_six = list(cohort(count=6, seed=1))
    for index in (4, 0):
        alone = phantom(seed=1, index=index, label=cohort_of_six[index].label)
        assert np.array_equal(alone.image, cohort_of_six[index].image)
        assert np.array_equal(alone.mask, cohort_of_six[index].mask)
    assert [item.id for item in cohort(count=3, seed=1)] == [item.id for item in cohort_of_six[:3]]


def test_thread_count_changes_nothing() -> None:
    before = cv2.getNumThreads()
    many = phantom(seed=0, index=0, label="benign")
    try:
        cv2.setNumThreads(1)
        one = phantom(seed=0, index=0, label="benign")
    finally:
        cv2.setNumThreads(before)
    assert np.array_equal(many.image, one.image)


@pytest.mark.parametrize(("seed", "index"), [(0, 1), (1, 0)])
def test_seed_and_index_both_matter(seed: int, index: int) -> None:
    base, other = phantom(seed=0, index=0, label="benign"), phantom(seed=seed, index=index, label="benign")
    assert base.image.shape != other.image.shape or not np.array_equal(base.image, other.image)


def test_arrays_are_well_formed(hundred: list[Phantom]) -> None:
    for item in hundred:
        height, width = item.image.shape
        assert 300 <= height <= 460
        assert 360 <= width <= 560
        assert item.mask.shape == item.image.shape
        assert item.image.dtype == item.mask.dtype == np.uint8
        assert set(np.unique(item.mask)) == {0, 1}
        assert cv2.connectedComponents(item.mask)[0] == 2, "one lesion"
    assert len({item.id for item in hundred}) == 100
    assert len({item.image.shape for item in hundred}) > 90


@pytest.mark.parametrize(("count", "malignant"), [(1, 0), (2, 1), (163, 53), (326, 106)])
def test_label_ratio(monkeypatch: pytest.MonkeyPatch, count: int, malignant: int) -> None:
    monkeypatch.setattr(
        "kdsweep.data.phantom.phantom", lambda *, seed, index, label: label
    )  # the labels alone, in no time
    labels = [str(label) for label in cohort(count=count, seed=0)]
    assert len(labels) == count
    assert labels.count("malignant") == malignant


def test_cohort_is_lazy() -> None:
    assert next(cohort(count=10**9, seed=0)).label == "benign"


def test_lesion_sizes_spread_as_in_clinical_sets(hundred: list[Phantom]) -> None:
    share = {label: [item.mask.mean() for item in hundred if item.label == label] for label in ("benign", "malignant")}
    both = share["benign"] + share["malignant"]
    assert min(both) > 0.003
    assert min(both) < 0.01
    assert 0.3 < max(both) < 0.5
    assert 0.04 < np.median(both) < 0.08
    assert 0.02 < np.median(share["benign"]) < 0.05
    assert 0.10 < np.median(share["malignant"]) < 0.18


def test_benign_lesions_are_wider_and_smoother(hundred: list[Phantom]) -> None:
    def shape_of(label: str) -> tuple[float, float]:
        contours = [
            cv2.findContours(item.mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0][0]
            for item in hundred
            if item.label == label
        ]
        boxes = [cv2.boundingRect(contour) for contour in contours]
        solidity = [cv2.contourArea(contour) / cv2.contourArea(cv2.convexHull(contour)) for contour in contours]
        return float(np.median([box[3] / box[2] for box in boxes])), float(np.median(solidity))

    (benign_height, benign_solidity), (malignant_height, malignant_solidity) = map(shape_of, ("benign", "malignant"))
    assert benign_height < 0.8 < malignant_height
    assert malignant_solidity < 0.93 < 0.96 < benign_solidity


def test_speckle_of_homogeneous_tissue_is_rayleigh() -> None:
    field = _scatter(np.random.default_rng(0), np.full((400, 400), 6.0, dtype=np.float32), focus_px=160.0)
    envelope = np.hypot(field[..., 0], field[..., 1])
    assert envelope.mean() / envelope.std() == pytest.approx(1.913, abs=0.04)
    assert np.mean(envelope > 2 * np.sqrt(np.mean(envelope**2))) == pytest.approx(np.exp(-4), rel=0.15)
    for top in (0, 120, 300):  # the echo level is met in and out of focus
        assert 10 * np.log10(np.mean(envelope[top : top + 100] ** 2)) == pytest.approx(6.0, abs=0.3)


def test_beam_is_finer_in_depth_and_widens_away_from_the_focus() -> None:
    field = _scatter(np.random.default_rng(1), np.zeros((400, 400), dtype=np.float32), focus_px=100.0)
    envelope = np.hypot(field[..., 0], field[..., 1])

    def roughness(part: np.ndarray, axis: int) -> float:
        return float(np.mean(np.diff(part, axis=axis) ** 2) / part.var())

    assert roughness(envelope[60:140], 0) > 1.2 * roughness(envelope[60:140], 1)
    assert roughness(envelope[60:140], 1) > 1.5 * roughness(envelope[320:], 1)


def test_image_darkens_with_depth(hundred: list[Phantom]) -> None:
    third = [[part.mean() for part in np.array_split(item.image, 3)] for item in hundred]
    top, middle, bottom = np.mean(third, axis=0)
    assert top > middle + 10 > bottom + 30


def test_malignant_lesions_cast_shadows(hundred: list[Phantom]) -> None:
    steps = [_step_behind(item) for item in hundred if item.label == "malignant"]
    assert np.count_nonzero(np.isfinite(steps)) > 20
    assert np.nanmean(steps) < -8


def test_cysts_enhance_what_lies_behind(hundred: list[Phantom]) -> None:
    cysts = [item for item in hundred if item.label == "benign" and item.image[item.mask == 1].mean() < 15]
    steps = [_step_behind(item) for item in cysts]
    assert np.count_nonzero(np.isfinite(steps)) >= 8
    assert np.nanmean(steps) > 15


def test_darkness_alone_does_not_find_the_lesion(hundred: list[Phantom]) -> None:
    def dice(threshold: int) -> float:
        pairs = ((item.image < threshold, item.mask == 1) for item in hundred)
        return float(np.mean([2 * (dark & mask).sum() / (dark.sum() + mask.sum()) for dark, mask in pairs]))

    assert max(dice(threshold) for threshold in range(10, 130, 10)) < 0.35


def test_contrast_varies_from_clear_to_barely_visible(hundred: list[Phantom]) -> None:
    kernel = np.ones((31, 31), dtype=np.uint8)
    contrast = []
    for item in hundred:
        ring = cv2.dilate(item.mask, kernel) > item.mask
        contrast.append(float(item.image[ring].mean() - item.image[item.mask == 1].mean()))
    assert min(contrast) < 15
    assert np.percentile(contrast, [10, 90]) == pytest.approx([27, 90], abs=12)


@pytest.mark.parametrize("count", [0, -4])
def test_bad_count_is_refused_at_the_call(count: int) -> None:
    with pytest.raises(InputError, match=rf"^data\.count is {count}: [^\n]*1 or more$"):
        cohort(count=count, seed=0)
