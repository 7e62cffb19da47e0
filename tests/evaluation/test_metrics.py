"""Metrics: against a second library, against cases worked out by hand, and what empty sets score."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_f1_score,
    binary_jaccard_index,
    binary_precision,
    binary_recall,
)
from torchmetrics.functional.segmentation.utils import mask_edges, surface_distance

from kdsweep.data.loaders import EvalPart
from kdsweep.evaluation import metrics, scoring

SECOND_OPINION = {
    "dice": binary_f1_score,
    "iou": binary_jaccard_index,
    "precision": binary_precision,
    "sensitivity": binary_recall,
}


def blobs(count: int, *, seed: int, size: tuple[int, int] = (24, 32)) -> Tensor:
    """(N, 1, H, W) bool: smooth random shapes, many of which touch the frame."""
    noise = torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 7, stride=1, padding=3)
    return smooth > smooth.flatten(1).quantile(0.8, dim=1)[:, None, None, None]


def pixels(*places: tuple[int, int], size: tuple[int, int] = (40, 30)) -> Tensor:
    """(1, 1, H, W) bool with these (row, column) pixels set."""
    mask = torch.zeros(1, 1, *size, dtype=torch.bool)
    for place in places:
        mask[0, 0, place[0], place[1]] = True
    return mask


def torchmetrics_hd95_px(prediction: Tensor, mask: Tensor) -> float:
    """By torchmetrics' edges and distances of one square image (its distances are wrong on others: x and y mixed)."""
    edges = [edge.bool() for edge in mask_edges(prediction, mask)]
    directed = [surface_distance(*pair, spacing=[1, 1]).numpy() for pair in (edges, edges[::-1])]
    return max(float(np.percentile(distances, 95)) for distances in directed)


def every_pair_hd95_px(prediction: Tensor, mask: Tensor) -> float:
    """By the definition: each edge pixel's distance to each of the other set's."""
    regions = (prediction.numpy(), mask.numpy())
    edges = [np.argwhere(region & ~binary_erosion(region)) for region in regions]
    distances = np.linalg.norm(edges[0][:, None] - edges[1][None], axis=2)
    return max(float(np.percentile(distances.min(axis=axis), 95)) for axis in (0, 1))


# ---- a second library ----------------------------------------------------------------------------------------------


def test_ratios_equal_torchmetrics_image_by_image() -> None:
    prediction, mask = blobs(12, seed=0), blobs(12, seed=1)
    result = metrics.overlap(prediction=prediction, mask=mask.byte())
    assert list(result) == list(metrics.RATIOS)
    for name, function in SECOND_OPINION.items():
        expected = [function(p.int(), m.int()).item() for p, m in zip(prediction, mask, strict=True)]
        assert result[name].shape == (12,)
        assert result[name] == pytest.approx(expected, rel=1e-5), name
        assert len(set(expected)) > 6, "the images must differ"


@pytest.mark.parametrize(("second_opinion", "size"), [(torchmetrics_hd95_px, (24, 24)), (every_pair_hd95_px, (24, 32))])
def test_hd95_equals_a_second_opinion_image_by_image(
    second_opinion: Callable[[Tensor, Tensor], float], size: tuple[int, int]
) -> None:
    prediction, mask = blobs(6, seed=2, size=size), blobs(6, seed=3, size=size)
    assert prediction[..., 0, :].any(), "the frame's edge must be part of the test"
    expected = [second_opinion(p[0], m[0]) for p, m in zip(prediction, mask, strict=True)]
    assert metrics.hd95_px(prediction=prediction, mask=mask.byte()) == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) > 4, "the images must differ"


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_ratios_by_hand() -> None:
    prediction, mask = pixels((0, 0), (0, 1), (0, 2), (0, 3)), pixels((0, 2), (0, 3), (0, 4))
    result = metrics.overlap(prediction=prediction, mask=mask)  # 2 found, 2 too many, 1 missed
    assert result["dice"] == pytest.approx([2 * 2 / (4 + 3)])
    assert result["iou"] == pytest.approx([2 / 5])
    assert result["precision"] == pytest.approx([2 / 4])
    assert result["sensitivity"] == pytest.approx([2 / 3])


def test_hd95_of_two_single_pixels_is_their_distance() -> None:
    result = metrics.hd95_px(prediction=pixels((5, 7), (30, 20)), mask=pixels((5, 7), (30, 20)))
    assert result == pytest.approx([0])
    assert metrics.hd95_px(prediction=pixels((5, 7)), mask=pixels((8, 11))) == pytest.approx([math.hypot(3, 4)])
    assert metrics.hd95_px(prediction=pixels((0, 0)), mask=pixels((39, 0))) == pytest.approx([39])


def test_hd95_is_the_larger_direction_at_the_95th_percentile_by_hand() -> None:
    line = pixels(*((row, 3) for row in range(21)))  # distances 0 to 20 from its end: 95 % of the way lies 19
    end = pixels((0, 3))
    assert metrics.hd95_px(prediction=end, mask=line) == pytest.approx([19])
    assert metrics.hd95_px(prediction=line, mask=end) == pytest.approx([19])


def square(start: int, stop: int) -> Tensor:
    region = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    region[..., start:stop, start:stop] = True
    return region


def test_hd95_is_measured_between_edges_not_regions() -> None:
    # The large square's edge has 56 pixels; most are 2 away, its 4 corners sqrt(8), and 4 are more than 5 % of 56.
    assert metrics.hd95_px(prediction=square(10, 21), mask=square(8, 23)) == pytest.approx([math.sqrt(8)])
    # A ring against its filled square: the 52 pixels about the hole lie 3 inside the outer edge.
    ring = square(5, 26) & ~square(9, 22)
    assert metrics.hd95_px(prediction=ring, mask=square(5, 26)) == pytest.approx([3])


def test_nsd_by_hand() -> None:
    # Of the large square's 56 edge pixels those 3 at each corner are more than 2 from the other edge; of the small
    # square's 40 none is.
    result = [metrics.nsd(prediction=square(10, 21), mask=square(8, 23), tolerance_px=px)[0] for px in (1.9, 2, 3)]
    assert result == pytest.approx([0, (44 + 40) / (56 + 40), 1])


# ---- empty sets, as the module's docstring defines them ------------------------------------------------------------


def test_empty_sets_score_the_worst_and_two_of_them_the_best() -> None:
    empty, some = pixels(), pixels((1, 1), (2, 1))
    prediction, mask = torch.cat([empty, some, empty, some]), torch.cat([some, empty, empty, some])
    result = metrics.per_image(prediction=prediction, mask=mask.byte(), nsd_tolerance_px=2.0)
    assert list(result) == list(metrics.SCORES)
    for name in (*metrics.RATIOS, "nsd"):
        assert result[name].tolist() == [0, 0, 1, 1], name
    assert result["hd95_px"] == pytest.approx([50, 50, 0, 0])  # the diagonal of 40 x 30


def test_images_are_scored_each_on_its_own() -> None:
    prediction, mask = blobs(5, seed=4), blobs(5, seed=5)
    prediction[1], mask[2] = False, False
    together = metrics.per_image(prediction=prediction, mask=mask, nsd_tolerance_px=2.0)
    for i in range(5):
        alone = metrics.per_image(prediction=prediction[i : i + 1], mask=mask[i : i + 1], nsd_tolerance_px=2.0)
        for name in metrics.SCORES:
            assert together[name][i] == alone[name][0], name


def test_a_table_of_scores_has_the_area_of_the_lesion_not_of_the_prediction() -> None:
    masks = torch.cat([pixels((1, 1), (2, 1), (3, 1)), pixels(), pixels((4, 4))]).byte()
    predictions = torch.cat([pixels((1, 1)), pixels((2, 2), (2, 3)), pixels((4, 4))]).bool()
    part = EvalPart(["c", "a", "b"], ["x", "y", "x"], torch.zeros(3, 40, 30, 3), masks, groups=["p", "q", "p"])
    table = scoring.score(predictions, part, nsd_tolerance_px=2.0)
    assert list(table) == ["image", "label", "group", "lesion_px", "predicted_px", *metrics.SCORES]
    assert table["lesion_px"].tolist() == [3, 0, 1]
    assert table["predicted_px"].tolist() == [1, 2, 1]
    assert table[["image", "label", "group"]].to_numpy().tolist() == [["c", "x", "p"], ["a", "y", "q"], ["b", "x", "p"]]
    assert table["dice"].tolist() == pytest.approx([0.5, 0.0, 1.0])


def test_no_warning_leaks_from_the_libraries() -> None:
    prediction, mask = torch.cat([blobs(2, seed=6), pixels(size=(24, 32))]), blobs(3, seed=7)
    metrics.per_image(prediction=prediction, mask=mask, nsd_tolerance_px=2.0)  # imports what it needs
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        metrics.per_image(prediction=prediction, mask=mask, nsd_tolerance_px=2.0)
    assert [str(warning.message) for warning in leaked] == []


# ---- the mean that training watches --------------------------------------------------------------------------------


def test_mean_dice_is_the_mean_of_the_images_dice() -> None:
    logits = torch.where(blobs(6, seed=8), 2.0, -3.0)
    mask = blobs(6, seed=9)
    logits[1], mask[2] = -1.0, False
    logits[3], mask[3] = -1.0, False
    dice = metrics.overlap(prediction=logits > 0, mask=mask)["dice"]
    assert dice[1:4].tolist() == [0, 0, 1]
    result = metrics.mean_dice(logits=logits, mask=mask.byte())
    assert result.item() == pytest.approx(dice.mean(), rel=1e-6)
    pooled = metrics.overlap(prediction=(logits > 0).flatten(0, 2)[None, None], mask=mask.flatten(0, 2)[None, None])
    assert result.item() != pytest.approx(pooled["dice"].item(), rel=1e-3), "images weigh alike, not pixels"


def test_a_logit_of_zero_is_background() -> None:
    mask = pixels((0, 0))
    assert metrics.mean_dice(logits=torch.zeros(1, 1, 40, 30), mask=mask).item() == 0
    assert metrics.mean_dice(logits=mask.float(), mask=mask).item() == 1
