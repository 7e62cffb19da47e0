"""A data set in memory: what is unusual in it is counted in one line for each kind, and what is wrong is refused."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdsweep.core.errors import InputError
from kdsweep.data import images, sources
from kdsweep.data.images import load_images, resize_mask
from kdsweep.data.sources import Entry

SIDE = 64


def pair(root: Path, name: str, image: np.ndarray, mask: np.ndarray, **options: object) -> None:
    """An image and its mask in the plain layout."""
    for part, pixels in (("images", image), ("masks", mask)):
        (root / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / part / f"{name}.png", **(options if part == "images" else {}))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 256, shape, dtype=np.uint8)


def box(height: int, width: int, *, rows: slice = slice(10, 30), columns: slice = slice(10, 25)) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[rows, columns] = 255
    return mask


def good(root: Path, count: int) -> Path:
    for number in range(count):
        pair(root, f"good{number}", noise(SIDE, SIDE), box(SIDE, SIDE))
    return root


def load(root: Path, *, image_size: int = SIDE, allow_empty_masks: bool = False) -> images.Images:
    return load_images(sources.Folder(root), load_size=73, image_size=image_size, allow_empty_masks=allow_empty_masks)


UNUSUAL = {  # image, mask, how the line continues
    "small": (noise(50, 90), box(50, 90), "are smaller than image_size=64 and are enlarged"),
    "full": (noise(SIDE, SIDE), np.full((SIDE, SIDE), 255, np.uint8), "are lesion everywhere"),
    "tiny": (noise(400, 400), box(400, 400, rows=slice(1), columns=slice(1)), "lose their lesion at image_size=64"),
    "dim": (noise(SIDE, SIDE) * np.uint16(16), box(SIDE, SIDE), "are nearly black, at most 16 of 255; 12 bits saved"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_counted_in_one_line_with_the_first_names(tmp_path, caplog, name) -> None:
    image, mask, expected = UNUSUAL[name]
    for number in range(5):
        pair(tmp_path, f"{name}{number}", image, mask)
    loaded = load(good(tmp_path, 5))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"data=folder: 5 of 10 images {expected}")
    assert line.endswith(f" ({name}0, {name}1, {name}2 and 2 more)")
    assert len(loaded.ids) == 10


def test_usual_images_are_loaded_without_a_word(tmp_path, caplog) -> None:
    pair(good(tmp_path, 2), "empty", noise(SIDE, SIDE), np.zeros((SIDE, SIDE), np.uint8))
    pair(tmp_path, "deep", noise(SIDE, SIDE) * np.uint16(257), box(SIDE, SIDE))
    load(tmp_path, allow_empty_masks=True)
    assert caplog.records == []


def test_a_worker_writes_the_line_to_files_alone(tmp_path, caplog, monkeypatch) -> None:
    """The screen has it from the check in the parent process."""
    pair(tmp_path, "small", *UNUSUAL["small"][:2])
    load(tmp_path)
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    load(tmp_path)
    assert [getattr(record, "place", "everywhere") for record in caplog.records] == ["everywhere", "file"]


def test_masks_that_are_mostly_full_are_refused(tmp_path) -> None:
    for number in range(3):
        pair(tmp_path, f"full{number}", *UNUSUAL["full"][:2])
    with pytest.raises(InputError, match=r"3 of 5 images are lesion everywhere.*\(full0.*save the lesion as 255 and"):
        load(good(tmp_path, 2))


def test_an_image_of_few_pixels_is_refused(tmp_path) -> None:
    pair(tmp_path, "thumb", noise(31, 90), box(31, 90))
    with pytest.raises(InputError, match=r"1 of 1 images: .*thumb\.png is 90 x 31 pixels, an image needs 32 a side"):
        load(tmp_path)


def test_masks_of_0_and_1_and_of_0_and_255_are_lesions_in_one_folder(tmp_path) -> None:
    for number, white in enumerate((1, 255, 1)):
        pair(tmp_path, f"{number}", noise(SIDE, SIDE), box(SIDE, SIDE) // 255 * np.uint8(white))
    for allow_empty_masks in (False, True):
        loaded = load(tmp_path, allow_empty_masks=allow_empty_masks)
        assert (loaded.eval_masks == box(SIDE, SIDE) // 255).all()


def test_a_mask_that_is_turned_against_its_image_is_refused_by_size_and_both_turned_are_paired(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    pair(tmp_path, "photo", noise(60, 80), box(80, 60), exif=exif)
    entry = sources.Folder(tmp_path).entries()[0]
    image, mask = images.read_entry(entry)
    assert image.shape[:2] == mask.shape == (80, 60)
    pair(tmp_path, "photo", noise(60, 80), box(60, 80), exif=exif)
    with pytest.raises(ValueError, match=r"masks/photo\.png is 80 x 60 pixels, its image 60 x 80"):
        images.read_entry(entry)


def test_an_error_in_resizing_names_the_image(tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "resize_image", fail)
    with pytest.raises(InputError, match=r"2 of 2 images: .*good0\.png is not a readable image \(MemoryError; save it"):
        load(good(tmp_path, 2))


def test_an_entry_without_masks_is_named() -> None:
    with pytest.raises(ValueError, match=r"x\.png has no mask"):
        images.read_entry(Entry("x", "unknown", Path("x.png"), ()))


def test_enlarging_a_mask_keeps_it_binary_and_in_place() -> None:
    mask = np.array([[0, 1], [0, 0]], np.uint8)
    assert np.array_equal(resize_mask(mask, 4), np.kron(mask, np.ones((2, 2), np.uint8)))


def test_a_pixel_of_which_half_is_lesion_is_lesion() -> None:
    mask = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]], np.uint8)  # 1/2, 1/4, 3/4, 0
    assert resize_mask(mask, 2).tolist() == [[1, 0], [1, 0]]
