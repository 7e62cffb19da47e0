"""Pixels of one file: orientation, transparency, what of a mask is lesion, and files that are refused."""

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from kdsweep.data import pixels
from kdsweep.data.pixels import DoubtError, FileError, lesion, read_gray_or_color, read_mask

HEIGHT, WIDTH = 40, 50
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[10:20, 15:35] = True
OTHER = np.zeros((HEIGHT, WIDTH), bool)
OTHER[25:33, 5:20] = True
BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 200)


def gray(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


def saved(picture: Image.Image, file: Path, **options: object) -> Path:
    picture.save(file, **options)
    return file


def levels(inside: int, outside: int = 0, other: int | None = None, dtype: type = np.uint8) -> Image.Image:
    """A gray mask; a second shape may have another value."""
    values = np.where(MASK, inside, outside)
    return Image.fromarray((values if other is None else np.where(OTHER, other, values)).astype(dtype))


def colors(inside: tuple[int, ...], outside: tuple[int, ...] = BLACK, other: tuple[int, ...] | None = None):
    """A mask in color or, with a fourth number, opacity."""
    values = np.where(MASK[..., None], inside, outside)
    return Image.fromarray((values if other is None else np.where(OTHER[..., None], other, values)).astype(np.uint8))


def palette(inside: int, other: int, entries: dict[int, tuple[int, ...]]) -> Image.Image:
    """A mask of the indices 0, inside and other, whose palette is black but for these entries."""
    table = np.zeros((256, 3), int)
    for index, color in entries.items():
        table[index] = color
    picture = Image.fromarray(np.where(OTHER, other, np.where(MASK, inside, 0)).astype(np.uint8))
    picture.putpalette(table.ravel().tolist())
    return picture


def white_first() -> Image.Image:
    picture = Image.fromarray(np.where(MASK, 0, 1).astype(np.uint8))
    picture.putpalette([*WHITE, *BLACK])
    return picture


def soft() -> Image.Image:
    """What JPEG leaves of a black and white mask: levels around 0 and 255, with the two nearest to the threshold."""
    values = np.where(MASK, 250, 4).astype(np.uint8)
    values[10, 15], values[0, 0] = 128, 127
    return Image.fromarray(values)


VOC = {1: (128, 0, 0), 8: (64, 0, 0), 255: (224, 224, 192)}  # entries of PASCAL VOC's palette

# name: mode in its PNG, picture
MASKS = {
    "1-bit": ("1", Image.fromarray(MASK)),
    "gray": ("L", levels(255)),
    "gray, 0 and 1": ("L", levels(1)),
    "gray, 0 and 85": ("L", levels(85)),
    "16 bits": ("I;16", levels(65535, dtype=np.uint16)),
    "16 bits, 0 and 255": ("I;16", levels(255, dtype=np.uint16)),
    "16 bits, 0 and 1": ("I;16", levels(1, dtype=np.uint16)),
    "palette, red": ("P", palette(1, 0, {1: (200, 0, 0)})),
    "palette, VOC's class 1": ("P", palette(1, 0, VOC)),
    "palette, VOC's class 8": ("P", palette(8, 0, VOC)),
    "palette, white first": ("P", white_first()),
    "RGB": ("RGB", colors(WHITE)),
    "RGB, green": ("RGB", colors(GREEN)),
    "RGB, two colors, neither black": ("RGB", colors((253, 231, 37), (68, 1, 84))),
    "RGBA, opaque": ("RGBA", colors((*WHITE, 255), (*BLACK, 255))),
    "RGBA, opacity 0 everywhere": ("RGBA", colors((*WHITE, 0), (*BLACK, 0))),
    "RGBA, white shape in alpha": ("RGBA", colors((*WHITE, 255), (*WHITE, 0))),
    "RGBA, red on transparent white": ("RGBA", colors((*RED, 255), (*WHITE, 0))),
    "LA, white shape in alpha": (
        "LA",
        Image.fromarray(np.dstack([np.full_like(MASK, 255, np.uint8), 255 * np.uint8(MASK)])),
    ),
    "soft": ("L", soft()),
    "empty": ("L", levels(0)),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_lesion_of_a_mask_is_the_same_in_every_form(tmp_path: Path, name: str) -> None:
    mode, picture = MASKS[name]
    file = saved(picture, tmp_path / "mask.png")
    with Image.open(file) as stored:
        assert stored.mode == mode
    mask = read_mask(file)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, MASK if name != "empty" else np.zeros_like(MASK))


LOSSY = {
    "JPEG 95": ("JPEG", {"quality": 95}),
    "JPEG 30": ("JPEG", {"quality": 30}),
    "WebP 80": ("WEBP", {"quality": 80}),
    "WebP 20": ("WEBP", {"quality": 20}),
}


@pytest.mark.parametrize("inside", [WHITE, RED, GREEN])
@pytest.mark.parametrize("way", [*LOSSY, "blurred", "smaller", "larger"])
def test_compressed_and_smoothed_masks_are_read_by_threshold(tmp_path: Path, way: str, inside: tuple[int, ...]) -> None:
    y, x = np.mgrid[:240, :300]
    disc = ((y - 110) / 60) ** 2 + ((x - 140) / 90) ** 2 < 1
    picture = Image.fromarray(np.where(disc[..., None], inside, BLACK).astype(np.uint8))
    file = tmp_path / "mask"
    if way in LOSSY:
        saved(picture, file, format=LOSSY[way][0], **LOSSY[way][1])
    else:
        sizes = {"smaller": (140, 90), "larger": (700, 650)}
        changed = picture.resize(sizes[way]) if way in sizes else picture.filter(ImageFilter.GaussianBlur(3))
        saved(changed, file, format="PNG")
    with Image.open(file) as stored:
        decoded = np.asarray(stored.convert("RGB"))
    assert len(np.unique(decoded)) > pixels.LABELS
    assert np.array_equal(read_mask(file), decoded.max(axis=2) > 127)


DOUBTFUL = {
    "two classes, dark and bright": (levels(255, other=85), "has areas of the values 0, 85, 255, but background and"),
    "class 1 and void 255": (levels(1, other=255), "has areas of the values 0, 1, 255, but"),
    "classes 1 and 2": (levels(1, other=2), "has the values 0, 1, 2, all below half of the range"),
    "classes of 16 bits": (levels(1, other=255, dtype=np.uint16), "has the values 0, 1, 255, all below half"),
    "1 alone": (levels(1, outside=1), "has the value 1, all below half of the range"),
    "1 and 2, none black": (levels(2, outside=1), "has the values 1, 2, all below"),
    "red and green": (colors(RED, other=GREEN), "has areas of the values 0, (0, 255, 0), (255, 0, 0), but"),
    "red and dark blue": (colors(RED, other=(0, 0, 100)), "has areas of the values 0, (0, 0, 100), (255, 0, 0), but"),
    "VOC's class 8 and void": (palette(8, 255, VOC), "has areas of the values 0, (64, 0, 0), (224, 224, 192), but"),
    "palette of one color": (palette(1, 0, {}), "has pixels that differ but show one color"),
    "black shape on transparency": (colors((*BLACK, 255), (*WHITE, 0)), "has pixels that differ but show one color"),
    "color under transparency": (
        colors((*RED, 255), (*WHITE, 0), other=(*GREEN, 0)),
        "has several colors under transparent pixels",
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_mask_that_can_be_read_in_two_ways_is_refused(tmp_path: Path, name: str) -> None:
    picture, expected = DOUBTFUL[name]
    file = saved(picture, tmp_path / "mask.png")
    with pytest.raises(FileError) as caught:
        read_mask(file)
    assert str(caught.value).startswith(f"{file} {expected}")
    assert "save the lesion as 255 and all else as 0" in str(caught.value)


def test_a_mask_of_many_classes_is_described_by_the_first_five() -> None:
    with pytest.raises(DoubtError, match="the values 0, 40, 80, 120, 160 and 1 more, but"):
        lesion(np.repeat(np.repeat(np.arange(0, 240, 40).astype(np.uint8), 5)[None], 9, axis=0))


@given(value=st.integers(1, 65535), dtype=st.sampled_from([np.uint8, np.uint16]))
def test_of_black_and_one_more_value_that_one_is_the_lesion(value: int, dtype: type) -> None:
    mask = (MASK * min(value, np.iinfo(dtype).max)).astype(dtype)
    assert np.array_equal(lesion(mask), MASK)


# --- images


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_images_and_masks_are_upright_as_a_viewer_shows_them(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"exif": exif, **({"lossless": True} if suffix == "webp" else {})}
    file = saved(Image.fromarray(MASK.astype(np.uint8) * 255), tmp_path / f"mask.{suffix}", **options)
    turned = {2: MASK[:, ::-1], 3: MASK[::-1, ::-1], 4: MASK[::-1], 5: MASK.T, 6: MASK[::-1].T, 7: MASK[::-1, ::-1].T}
    expected = {1: MASK, **turned, 8: MASK[:, ::-1].T}[orientation]
    assert np.array_equal(read_mask(file), expected)
    assert np.array_equal(read_gray_or_color(file)[..., 0] > 127, expected)


def test_an_opacity_of_one_value_is_ignored_and_16_bits_become_8(tmp_path: Path) -> None:
    values = gray()
    expected = np.repeat(values[..., None], 3, axis=2)
    for name, opacity in {"rgba": 128, "clear": 0}.items():
        picture = Image.fromarray(np.dstack([expected, np.full((HEIGHT, WIDTH), opacity, np.uint8)]))
        assert np.array_equal(read_gray_or_color(saved(picture, tmp_path / f"{name}.png")), expected)
        assert np.array_equal(read_gray_or_color(saved(picture.convert("LA"), tmp_path / f"{name}-gray.png")), expected)
    deep = Image.fromarray(values * np.uint16(257))
    for suffix in ("png", "tif", "pgm"):
        image = read_gray_or_color(saved(deep, tmp_path / f"deep.{suffix}"))
        assert image.dtype == np.uint8
        assert np.array_equal(image, expected)


def test_text_under_transparent_pixels_stays_invisible(tmp_path: Path) -> None:
    values = np.full((HEIGHT, WIDTH), 200, np.uint8)
    opacity = np.where(MASK, 0, np.where(OTHER, 51, 255)).astype(np.uint8)
    expected = np.where(MASK, 0, np.where(OTHER, 40, 200))
    rgba = Image.fromarray(np.dstack([values, values, values, opacity]))
    files = [saved(rgba, tmp_path / "rgba.png"), saved(rgba.convert("LA"), tmp_path / "la.png")]
    files += [saved(rgba, tmp_path / "rgba.webp", lossless=True, exact=True), saved(rgba, tmp_path / "rgba.tif")]
    for file in files:
        assert np.array_equal(read_gray_or_color(file), np.repeat(expected[..., None], 3, axis=2)), file
    keyed = saved(Image.fromarray(np.where(MASK, 255, 90).astype(np.uint8)), tmp_path / "key.png", transparency=255)
    assert np.array_equal(read_gray_or_color(keyed)[..., 0], np.where(MASK, 0, 90))


def test_color_keeps_its_channels(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    assert np.array_equal(read_gray_or_color(saved(Image.fromarray(values), tmp_path / "color.png")), values)


# --- files that are refused


def damaged(file: Path, fault: str) -> None:
    content = saved(Image.fromarray(gray()), file).read_bytes()
    faulty = {
        "junk": b"this is not a picture",
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "broken chunk": content[:60] + b"\xff" * 20 + content[80:],
    }
    file.write_bytes(faulty[fault])


@pytest.mark.parametrize("read", [read_mask, read_gray_or_color])
@pytest.mark.parametrize("fault", ["junk", "truncated", "empty", "broken chunk", "absent", "a folder"])
def test_an_unreadable_file_is_named(tmp_path: Path, fault: str, read) -> None:
    file = tmp_path / "00.png"
    if fault == "a folder":
        file.mkdir()
    elif fault != "absent":
        damaged(file, fault)
    with pytest.raises(FileError, match=r"00\.png is not a readable image \(.+\)$") as caught:
        read(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "MemoryError; save it with fewer pixels or free memory"),
        (cv2.error("OpenCV: Insufficient memory\n"), "error OpenCV: Insufficient memory; save it with fewer"),
        (OSError("image file is truncated"), "image file is truncated; save it again or leave it out"),
        (OSError(13, "Permission denied"), "Permission denied"),
        (RuntimeError(), "RuntimeError; save it again"),
    ],
)
def test_every_error_of_a_file_is_one_line_with_its_name(error: Exception, expected: str) -> None:
    with pytest.raises(FileError) as caught, pixels.naming(Path("scan\udce9.png")):
        raise error
    assert str(caught.value).startswith(f"scan\\xe9.png is not a readable image ({expected}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_not_an_error_of_a_file(stop: type) -> None:
    with pytest.raises(stop), pixels.naming(Path("scan.png")):
        raise stop


@pytest.mark.parametrize("limit", [HEIGHT * WIDTH // 2 - 1, HEIGHT * WIDTH - 1])  # an error, a warning made one
def test_a_file_of_too_many_pixels_is_named_with_their_number(tmp_path, monkeypatch, limit) -> None:
    file = saved(Image.fromarray(gray()), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FileError, match=r"large.png is not a readable image \(.*2000 pixels.*with fewer pixels\)$"):
            read_gray_or_color(file)


def test_pixels_of_floating_point_are_refused(tmp_path: Path) -> None:
    file = saved(Image.fromarray(gray().astype(np.float32)), tmp_path / "deep.tif")
    with pytest.raises(FileError, match=r"deep\.tif has pixels of 32 bits, of unknown range; save it with 8 or"):
        read_gray_or_color(file)


@pytest.mark.parametrize("suffix", ["tif", "gif", "webp", "png"])
def test_a_file_of_several_pages_is_refused_unless_it_is_a_photograph_with_its_preview(tmp_path, suffix) -> None:
    first, second = Image.fromarray(gray(1)), Image.fromarray(gray(2))
    file = saved(first, tmp_path / f"many.{suffix}", save_all=True, append_images=[second])
    for read in (read_gray_or_color, read_mask):
        with pytest.raises(FileError, match=f"many.{suffix} holds 2 pages or frames; save one of them"):
            read(file)
    single = saved(first, tmp_path / f"one.{suffix}", save_all=True)
    assert read_gray_or_color(single).shape == (HEIGHT, WIDTH, 3)
    stream, camera = io.BytesIO(), tmp_path / "camera.jpg"
    first.save(stream, "JPEG")
    saved(first, camera, format="MPO", save_all=True, append_images=[second])
    with Image.open(stream) as alone:
        assert np.array_equal(read_gray_or_color(camera)[..., 0], np.asarray(alone))
