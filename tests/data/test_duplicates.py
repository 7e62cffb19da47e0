"""Near-duplicates: images of the same frame are paired, those that look alike or share a text are not."""

import cv2
import numpy as np
import pytest

from kdsweep import cli
from kdsweep.core import files
from kdsweep.core.errors import InputError
from kdsweep.data import duplicates, phantom, sources
from kdsweep.data.duplicates import NEIGHBOR, SAME_FILE, SAME_FRAME
from kdsweep.results import audit


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """Six phantoms (H, W) uint8, enlarged, so that they have structure as real images have."""
    return [cv2.resize(item.image, (480, 400)) for item in phantom.cohort(count=6, seed=3)]


def with_text(image: np.ndarray, text: str) -> np.ndarray:
    return cv2.putText(image.copy(), text, (40, 350), cv2.FONT_HERSHEY_SIMPLEX, 0.9, 255, 2, cv2.LINE_AA)


def with_calipers(image: np.ndarray) -> np.ndarray:
    marked = cv2.drawMarker(image.copy(), (150, 120), 255, cv2.MARKER_CROSS, 12, 2)
    return cv2.line(marked, (150, 120), (300, 180), 255, 1)


def kinds_of(images, labels=None):
    pairs = duplicates.find_pairs(images, labels or ["benign"] * len(images))
    return {(pair.first, pair.second): pair.kind for pair in pairs}


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image[30:370, 40:460],
        lambda image: cv2.resize(image, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA),
        with_calipers,
        lambda image: cv2.convertScaleAbs(image, alpha=0.8, beta=15),
    ],
    ids=["crop", "rescaled", "calipers", "gain"],
)
def test_a_changed_copy_is_the_same_frame_whatever_its_label(frames, change):
    images = [*frames, change(frames[2])]
    assert kinds_of(images, [*["benign"] * 6, "malignant"]) == {(2, 6): SAME_FRAME}


def test_equal_pixels_are_named_and_other_images_left_alone(frames):
    assert kinds_of([*frames, frames[0].copy()]) == {(0, 6): SAME_FILE}


def test_a_burnt_in_text_makes_no_duplicates(frames):
    images = [with_text(image, "RIGHT BREAST 10 OCLOCK") for image in frames]
    one, other = (duplicates.describe(image) for image in images[:2])
    assert duplicates.agreeing(one, other) == 0
    assert kinds_of(images) == {}


@pytest.mark.parametrize(("scale", "agree"), [(1.0, True), (0.6, True), (1.8, True), (0.4, False), (0.01, False)])
def test_features_that_shrink_or_grow_beyond_a_factor_of_two_are_of_no_same_frame(scale, agree):
    """Down to a point all matches agree, whatever the images show."""
    chance = np.random.default_rng(0)
    descriptors = np.abs(chance.normal(size=(60, 128))).astype(np.float32)
    places = chance.uniform(100, 300, (60, 2)).astype(np.float32)
    one, other = (duplicates.Features(places * np.float32(by), descriptors, 400) for by in (1, scale))
    assert (duplicates.agreeing(one, other) >= duplicates.INLIERS) == agree


def test_a_moved_view_of_one_label_is_a_neighbor(frames):
    smooth = [cv2.GaussianBlur(image, (0, 0), 12) for image in frames]  # no feature is left to match
    moved = np.roll(smooth[1], 8, axis=1)
    assert kinds_of([*smooth, moved])[1, 6] == NEIGHBOR
    assert (1, 6) not in kinds_of([*smooth, moved], [*["benign"] * 6, "malignant"])


def test_images_without_structure_are_no_error():
    flat = np.full((90, 100), 7, np.uint8)
    assert kinds_of([flat, flat + np.uint8(1)]) == {}


def test_groups_join_through_others():
    pairs = [duplicates.Pair(0, 1, SAME_FRAME, 30), duplicates.Pair(1, 4, SAME_FRAME, 30)]
    assert duplicates.join(6, [*pairs, duplicates.Pair(2, 5, NEIGHBOR, 0.8)]) == [[0, 1, 4], [2, 5]]


@pytest.fixture
def folder(frames, tmp_path):
    """A data set in BUSI's layout in which benign (1) is a crop of malignant (1)."""
    root = tmp_path / "data"
    for label, images in (("benign", [frames[0][20:390, 30:470], frames[1]]), ("malignant", [frames[0], frames[2]])):
        (root / label).mkdir(parents=True)
        for number, image in enumerate(images, start=1):
            cv2.imwrite(str(root / label / f"{label} ({number}).png"), image)
            cv2.imwrite(str(root / label / f"{label} ({number})_mask.png"), np.uint8(255) * (image > 200))
    return root


def test_the_command_writes_groups_that_a_split_takes(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["audit", "data=busi", f"data.root={folder}", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "4 images: 1 group of 2 images that show the same frame" in printed
    assert "1 group with more than one label: benign (1), malignant (1)" in printed
    assert f"split=kfold split.group={out / 'groups.csv'}" in printed
    ids = [entry.id for entry in sources.Busi(folder).entries()]
    from kdsweep.data import split_files

    groups = dict(zip(ids, split_files.read_groups(ids, str(out / "groups.csv"), root=None).names, strict=True))
    assert groups["benign (1)"] == groups["malignant (1)"] == "g001"
    assert len(set(groups.values())) == 3
    sheet = cv2.imread(str(out / "sheet-1.png"), cv2.IMREAD_GRAYSCALE)
    assert sheet.shape[0] == audit.THUMB_PX + 40
    assert sheet[20:140, 4:320].std() > 10  # two thumbnails


def test_no_patients_picture_is_written_into_the_checkout(folder, capsys):
    assert cli.main(["audit", "data=busi", f"data.root={folder}", "--out", str(files.CHECKOUT / "audit")]) == 1
    assert "is in kdsweep's checkout" in capsys.readouterr().err
    assert not (files.CHECKOUT / "audit").exists()


def test_an_unreadable_image_is_one_line(folder, tmp_path, capsys):
    (folder / "benign" / "benign (2).png").write_bytes(b"none")
    assert cli.main(["audit", "data=busi", f"data.root={folder}", "--out", str(tmp_path / "out")]) == 1
    assert "benign (2).png" in capsys.readouterr().err


def test_duplicates_of_busi_are_detected(real_data):
    """Those across classes that its description names (docs/data.md), and a text that many images share joins none."""
    same = [("benign (433)", "malignant (145)"), ("benign (399)", "malignant (93)"), ("benign (164)", "benign (85)")]
    apart = ["benign (205)", "malignant (110)", "benign (1)", "benign (134)"]  # RT AXILLA, LEFT BREAST
    entries = {entry.id: entry for entry in sources.Busi(real_data / "busi573").entries()}
    ids = [*(image_id for pair in same for image_id in pair), *apart]
    images = [audit._gray(entries[image_id]) for image_id in ids]
    pairs = {(pair.first, pair.second) for pair in duplicates.find_pairs(images, ["any"] * len(ids))}
    assert pairs == {(0, 1), (2, 3), (4, 5)}
    with pytest.raises(InputError):
        audit.write([sources.Entry("gone", "any", real_data / "absent.png", ())], real_data)
