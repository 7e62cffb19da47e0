"""Masks of several classes: by value, color, label or a file each; resized, augmented, and part of the fingerprint."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from test_pixels import HEIGHT, MASK, OTHER, VOC, WIDTH, palette

from kdsweep.config import composition, decisions, identity, inputs
from kdsweep.core.errors import InputError
from kdsweep.data import account, run_data, splits
from kdsweep.data.class_maps import read_class_map
from kdsweep.data.images import load_images, read_entry, resize_mask
from kdsweep.data.pixels import FileError
from kdsweep.data.sources import Busi, Folder, Phantoms, Udiat, read_as
from kdsweep.data.views import Strengths, Views

TRUTH = np.where(OTHER, 2, MASK).astype(np.uint8)  # two classes
SIDE = 64
GREEN, RED = (0, 255, 0), (255, 0, 0)
BY_VALUE, BY_COLOR = {"benign": 1, "malignant": 2}, {"benign": list(GREEN), "malignant": list(RED)}
BY_LABEL = {"benign": "Benign", "malignant": "malignant"}


def picture(*codes: int | tuple[int, ...], dtype: type = np.uint8) -> Image.Image:
    """A mask with these values, or colors, of the background and both classes."""
    return Image.fromarray(np.array(codes, dtype)[TRUTH])


def write(root: Path, masks: dict[str, Image.Image], *, images: tuple[str, ...] = ("a",)) -> Folder:
    """A folder of noise and masks."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    for name in images:
        Image.fromarray(noise).save(root / "images" / f"{name}.png")
    for name, mask in masks.items():
        mask.save(root / "masks" / f"{name}.png")
    return Folder(root)


GRAY_PALETTE = {1: (2, 2, 2), 8: (1, 1, 1)}  # indices in another order than the gray levels that they show
VALUES = {
    "gray": ((1, 2), picture(0, 1, 2)),
    "gray, other values": ((85, 7), picture(0, 85, 7)),
    "16 bits": ((300, 65535), picture(0, 300, 65535, dtype=np.uint16)),
    "32 bits": ((1, 2), picture(0, 1, 2, dtype=np.int32)),
    "RGB": ((1, 2), picture((0, 0, 0), (1, 1, 1), (2, 2, 2))),
    "RGBA, opaque": ((1, 2), picture((0, 0, 0, 255), (1, 1, 1, 255), (2, 2, 2, 255))),
    "LA, opaque": ((1, 2), picture((0, 255), (1, 255), (2, 255))),
    "LA, on transparent white": ((1, 2), picture((255, 0), (1, 255), (2, 255))),
    "palette of colors": ((1, 8), palette(1, 8, VOC)),
    "palette of grays": ((2, 1), palette(1, 8, GRAY_PALETTE)),
}
COLORS = {
    "RGB": picture((0, 0, 0), GREEN, RED),
    "RGBA, opaque": picture((0, 0, 0, 255), (*GREEN, 255), (*RED, 255)),
    "RGBA, on transparent white": picture((255, 255, 255, 0), (*GREEN, 255), (*RED, 255)),
    "palette": palette(3, 8, {3: GREEN, 8: RED}),
}


@pytest.mark.parametrize("name", VALUES)
def test_classes_by_value(tmp_path: Path, name: str) -> None:
    codes, mask = VALUES[name]
    mask.save(file := tmp_path / ("mask.tif" if name == "32 bits" else "mask.png"))
    classes = read_class_map(file, codes)
    assert classes.dtype == np.uint8
    assert np.array_equal(classes, TRUTH)
    assert np.array_equal(read_class_map(file, codes[::-1]), np.array([0, 2, 1])[TRUTH]), "in the order of the codes"


@pytest.mark.parametrize("name", COLORS)
def test_classes_by_color(tmp_path: Path, name: str) -> None:
    COLORS[name].save(file := tmp_path / "mask.png")
    assert np.array_equal(read_class_map(file, (GREEN, RED)), TRUTH)


def test_a_mask_of_one_bit_shows_the_class_1(tmp_path: Path) -> None:
    Image.fromarray(MASK).save(file := tmp_path / "mask.png")
    assert np.array_equal(read_class_map(file, (2, 1)), 2 * MASK)


CODES = (1, 2)
REFUSED = {
    "a value without a name": (picture(0, 1, 3), CODES, "has the value 3, which data.classes does not name; name them"),
    "void": (picture(0, 1, 255), CODES, "has the value 255, which data.classes does not name"),
    "a color without a name": (
        picture((0, 0, 0), GREEN, (0, 0, 9)),
        (GREEN, RED),
        "has the value (0, 0, 9), which data",
    ),
    "JPEG's colors": (picture((0, 1, 0), GREEN, RED), (GREEN, RED), "has the value (0, 1, 0), which data.classes"),
    "color by value": (picture((0, 0, 0), GREEN, RED), CODES, "is in color; give data.classes a color [r, g, b] for"),
    "16 bits by color": (
        picture(0, 255, 65535, dtype=np.uint16),
        ((255, 255, 255), RED),
        "is gray of more than 8 bits; give data.classes a value for each name",
    ),
    "hidden in one color": (
        palette(1, 8, {}),
        (GREEN, RED),
        "has pixels that differ but show one color (palette or transparency); save each class as data.classes says and",
    ),
    "hidden by transparency": (
        picture((9, 0), (1, 0), (2, 255)),
        CODES,
        "has several colors under transparent pixels; save each class as data.classes says and all else as 0, opaque",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_data_classes_does_not_name_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    mask, codes, message = REFUSED[name]
    mask.save(file := tmp_path / "mask.png")
    with pytest.raises(FileError) as caught:
        read_class_map(file, codes)
    assert str(caught.value).startswith(f"{file} {message}")
    assert "255" not in str(caught.value).partition(";")[2], "the lesion is not one class"


@pytest.mark.parametrize("folder", ["benign", "malignant"])
def test_classes_by_the_label_of_the_image(small_busi: Path, folder: str) -> None:
    entries = read_as(Busi(small_busi), None, BY_LABEL).entries()
    plain = Busi(small_busi).entries()
    for entry, alike in zip(entries, plain, strict=True):
        if entry.label == folder:
            index = list(BY_LABEL).index(folder) + 1
            assert np.array_equal(read_entry(entry)[1], index * read_entry(alike)[1])


def test_a_label_without_a_class_is_refused_unless_its_mask_is_empty(small_busi: Path) -> None:
    (entry, *_) = read_as(Busi(small_busi), None, {"a": "malignant", "b": "normal"}).entries()
    with pytest.raises(
        FileError, match=r"shows a lesion of the label benign, which data\.classes does not name; add it"
    ):
        read_entry(entry)


def test_udiats_labels_are_matched_in_any_case(tmp_path: Path) -> None:
    for name, values in (("original", [9, 9, 9]), ("GT", [0, 255, 0])):
        (tmp_path / name).mkdir()
        Image.fromarray(np.array(values, np.uint8)[TRUTH]).save(tmp_path / name / "000001.png")
    (entry,) = read_as(Udiat(tmp_path), None, BY_LABEL).entries()
    _, mask = read_entry(entry._replace(label="Malignant"))
    assert np.array_equal(mask, 2 * MASK)


# ---- a file for each class


def files(root: Path) -> dict[str, Image.Image]:
    return {"a_mask_Benign": Image.fromarray(MASK), "a_mask_malignant": Image.fromarray(OTHER)}


def test_classes_by_a_file_each(tmp_path: Path) -> None:
    masks = {**files(tmp_path), "b_mask_malignant": Image.fromarray(OTHER)}
    source = read_as(write(tmp_path, masks, images=("a", "b")), None, BY_LABEL)
    assert [
        np.array_equal(read_entry(entry)[1], truth)
        for entry, truth in zip(source.entries(), (TRUTH, 2 * OTHER), strict=True)
    ] == [True, True]
    assert source.ignored() == {}


def test_two_classes_in_one_pixel_are_refused_with_both_files(tmp_path: Path) -> None:
    masks = {"a_mask_benign": Image.fromarray(MASK), "a_mask_malignant": Image.fromarray(MASK | OTHER)}
    (entry,) = read_as(write(tmp_path, masks), None, BY_LABEL).entries()
    with pytest.raises(FileError, match=r"a_mask_benign\.png and \S*a_mask_malignant\.png give a pixel two classes;"):
        read_entry(entry)


def test_a_mask_that_names_no_class_is_refused_where_it_is_the_only_one_and_ignored_else(tmp_path: Path) -> None:
    masks = {**files(tmp_path), "a": Image.fromarray(MASK), "b": Image.fromarray(MASK), "c": picture(0, 0, 0)}
    source = read_as(write(tmp_path, masks, images=("a", "b", "c")), None, BY_LABEL)
    first, second, third = source.entries()
    assert source.ignored() == {"masks without an image": ["masks/a.png"]}
    assert np.array_equal(read_entry(first)[1], TRUTH)
    with pytest.raises(FileError, match=r"b\.png shows a lesion of the label unknown.*name the mask b_mask_LABEL, a"):
        read_entry(second)
    assert not read_entry(third)[1].any(), "without a lesion"


# ---- resizing


def areas(part: np.ndarray, size: int) -> np.ndarray:
    """Exact areas (size, size) of a part (H, W) bool in each pixel, in units of 1 / size**2 of a pixel of the mask."""

    def overlaps(length: int) -> np.ndarray:
        """Overlaps (size, length) of both grids on a line of size x length units."""
        large, small = np.arange(size)[:, None] * length, np.arange(length) * size
        return np.clip(np.minimum(large + length, small + size) - np.maximum(large, small), 0, None)

    return overlaps(part.shape[0]) @ part.astype(np.int64) @ overlaps(part.shape[1]).T


@pytest.mark.parametrize("shape", [(64, 96), (48, 64), (40, 100), (67, 35)])
def test_a_pixel_is_what_most_of_its_area_is_by_exact_areas(shape: tuple[int, int]) -> None:
    """Of equal areas the lesion, of two lesions the first."""
    size = 32
    for seed in range(10):
        blobs = np.random.default_rng(seed).random((6, 8, 4)).argmax(axis=2).astype(np.uint8)
        mask = cv2.resize(blobs, shape[::-1], interpolation=cv2.INTER_NEAREST)
        mask[seed::5, ::3] = 3
        order = (1, 2, 3, 0)
        expected = np.array(order)[np.argmax([areas(mask == index, size) for index in order], axis=0)]
        resized = resize_mask(mask, size)
        assert resized.dtype == np.uint8
        assert np.array_equal(resized, expected)


@pytest.mark.parametrize(("height", "width", "size"), [(36, 35, 28), (35, 20, 8), (20, 23, 10)])
def test_ties_of_areas_that_floats_do_not_hold_go_to_the_first_too(height: int, width: int, size: int) -> None:
    for seed in range(20):
        mask = np.random.default_rng(seed).integers(0, 3, (height, width)).astype(np.uint8)
        winner = np.argmax([areas(mask == index, size) for index in (1, 2, 0)], axis=0)
        assert np.array_equal(resize_mask(mask, size), np.array([1, 2, 0])[winner])


def test_ties_by_hand() -> None:
    blocks = {
        (0, 0, 2, 2): 2,
        (0, 1, 2, 2): 2,
        (1, 2, 0, 0): 0,
        (2, 1, 0, 3): 1,
        (0, 0, 3, 2): 0,
        (0, 1, 2, 3): 1,
        (3, 3, 0, 1): 3,
    }
    for block, expected in blocks.items():
        assert resize_mask(np.array(block, np.uint8).reshape(2, 2), 1) == expected


def test_zeros_and_ones_are_resized_as_one_lesion() -> None:
    mask = (np.random.default_rng(0).random((61, 83)) < 0.5).astype(np.uint8)
    share = cv2.resize(mask.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA)
    assert np.array_equal(resize_mask(mask, 32), share >= 0.5)
    assert np.array_equal(resize_mask(2 * mask, 32), 2 * (share >= 0.5)), "the second class alone"


# ---- views


def test_views_have_no_class_that_the_mask_lacks_and_move_all_alike() -> None:
    large = cv2.resize(np.where(TRUTH == 2, 5, TRUTH), (SIDE + 12, SIDE + 12), interpolation=cv2.INTER_NEAREST)
    image = np.random.default_rng(0).integers(0, 256, (*large.shape, 3), dtype=np.uint8)
    strengths = Strengths(shift=0.3, scale=0.2, rotate_deg=45, noise_std=(0.1, 0.2), dropout=0.1, probability=1.0)
    moved = 0
    for seed in range(20):
        view = Views(image_size=SIDE, strengths=strengths).render(image=image, mask=large, seed=[seed])
        assert set(np.unique([view.weak_mask, view.strong_mask])) <= {0, 1, 5}
        warped = cv2.warpAffine(view.weak_mask, view.matrix[:2], (SIDE, SIDE), flags=cv2.INTER_NEAREST)
        assert np.array_equal(view.strong_mask, warped)
        moved += not np.array_equal(view.strong_mask, view.weak_mask)
    assert moved == 20


# ---- account, training, fingerprint


def test_shares_are_of_pixels_not_of_indices(tmp_path: Path) -> None:
    source = read_as(write(tmp_path, {"a": picture(0, 2, 1)}), None, BY_VALUE)
    (measured,) = account.measure(source.entries(), sizes=(SIDE, 73), allow_empty_masks=False)
    assert measured.lesion == (TRUTH > 0).mean()
    assert measured.classes == ((TRUTH == 2).mean(), (TRUTH == 1).mean())
    assert 0 < measured.resized < 1.1 * measured.lesion


def test_a_class_that_no_training_mask_shows_is_refused_with_a_remedy(tmp_path: Path) -> None:
    masks = {"a": picture(0, 1, 1), "b": picture(0, 1, 2)}
    source = read_as(write(tmp_path, masks, images=("a", "b")), None, BY_VALUE)
    images = load_images(source, load_size=SIDE, image_size=SIDE)
    assert images.class_names == ("benign", "malignant")
    with pytest.raises(InputError, match=r"none of 1 training masks shows the class malignant; add images of it, take"):
        splits.check_training_masks(images, splits.Split(np.array([0]), np.array([1]), np.array([1])))
    splits.check_training_masks(images, splits.Split(np.array([1]), np.array([0]), np.array([0])))


def test_masks_that_are_mostly_full_are_refused_with_a_remedy_that_fits(tmp_path: Path) -> None:
    source = read_as(write(tmp_path, {"a": picture(1, 1, 2)}), None, BY_VALUE)
    with pytest.raises(
        InputError, match=r"1 of 1 images are lesion everywhere.*; save each class as data\.classes says"
    ):
        load_images(source, load_size=SIDE, image_size=SIDE)


def settings(*overrides: str):
    return composition.compose(["data.count=12", *overrides])


@pytest.mark.parametrize("classes", [BY_VALUE, BY_COLOR, {"größer": "None", "b": "\U0001d400"}])
def test_a_run_is_read_again_with_its_classes(classes: dict[str, object], tmp_path: Path) -> None:
    node = settings().data.model_copy(update={"classes": classes})
    params = identity.params(settings().model_copy(update={"data": node}))
    as_strings = {key: str(value) for key, value in params.items()}
    for recorded in (params, as_strings):
        assert run_data.classes(recorded) == classes
        assert run_data.class_names(recorded) == tuple(classes)
        assert run_data.source(recorded, store=tmp_path).classes[0][0] == next(iter(classes))
    for one_class in ({}, {"data.classes": "None"}, {"data.classes": None}):
        assert run_data.classes(one_class) is None
        assert run_data.class_names(one_class) == ()


def test_the_order_of_classes_is_part_of_the_fingerprint_and_null_is_not() -> None:
    classes = ("null", "{a: benign, b: malignant}", "{b: malignant, a: benign}")
    every = [settings("path=none"), *(settings("path=none", f"+data.classes={value}") for value in classes)]
    decided = [decisions.deciding(each, "baseline") for each in every]
    assert decided[0] == decided[1]
    assert "data.classes" not in decided[0]
    assert decided[2] != decided[3] != decided[0]
    prints = [identity.cell(each).fingerprint for each in every]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_phantoms_have_their_labels_as_classes(tmp_path: Path) -> None:
    chosen = settings(f"store={tmp_path}", "+data.classes={malignant: malignant, benign: benign}")
    entries = inputs.listing(chosen).entries
    plain = Phantoms(12, chosen.data.source["seed"], tmp_path / "phantoms").entries()
    assert chosen.logits == 3
    for entry in entries:
        (alike,) = (each for each in plain if each.id == entry.id)
        index = 1 + (entry.label == "benign")
        assert np.array_equal(read_entry(entry)[1], index * read_entry(alike)[1])


# ---- real images


def test_busi_by_label(real_data: Path) -> None:
    busi = Busi(real_data / "busi573")
    entries = read_as(busi, None, BY_LABEL).entries()
    for entry, alike in list(zip(entries, busi.entries(), strict=True))[::20]:
        index = 1 + (entry.label == "malignant")
        assert np.array_equal(read_entry(entry)[1], index * read_entry(alike)[1])


def test_bus_bra_by_color(real_data: Path) -> None:
    source = read_as(Folder(real_data / "busbra36"), None, BY_COLOR)
    images = load_images(source, load_size=SIDE, image_size=SIDE)
    assert images.masks.shape == (36, SIDE, SIDE)
    shown = [set(np.unique(mask)) - {0} for mask in images.masks]
    assert (shown.count({1}), shown.count({2})) == (19, 17)
    one_lesion = load_images(Folder(real_data / "busbra36"), load_size=SIDE, image_size=SIDE)
    assert np.array_equal(images.masks > 0, one_lesion.masks > 0)
    assert images.digest == one_lesion.digest
