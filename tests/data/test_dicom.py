"""Gray images of more than 8 bits and DICOM: through a window to gray levels, or refused in one line."""

import copy
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import MPEG2MPML, JPEG2000Lossless, JPEGLSLossless, RLELossless
from scans import PATIENT, deep_phantom, save_dicom

from kdsweep.config import composition, identity, inputs
from kdsweep.core.errors import InputError
from kdsweep.data import account, run_data, sources
from kdsweep.data.images import load_images, read_entry
from kdsweep.data.listing import list_images
from kdsweep.data.pixels import FileError, read_gray_or_color, read_mask
from kdsweep.results import audit

DEEP = deep_phantom()  # 12 bits


def levels(file: Path, window: tuple[float, float] | None = None) -> np.ndarray:
    image = read_gray_or_color(file, window)
    assert image.dtype == np.uint8
    assert (image == image[..., :1]).all()
    return image[..., 0]


def refusal(file: Path, window: tuple[float, float] | None = None) -> str:
    with pytest.raises(FileError) as caught:
        read_gray_or_color(file, window)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    assert PATIENT not in message
    return message.removeprefix(f"{file} ")


def is_rounded(image: np.ndarray, exact: np.ndarray) -> bool:
    """Whether gray levels are nearest to exact ones, either of them if two are as near."""
    return bool((np.abs(image - exact) <= 0.5 + 1e-9).all())


def by_window(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.interp(values, [low, high], [0, 255])


def by_standard(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """The formulas of DICOM PS3.3 C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2, with output from 0 to 255."""
    x = values.astype(float)
    if function == "SIGMOID":
        return 255 / (1 + np.exp(-4 * (x - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    inside = ((x - center) / width + 0.5) * 255
    return np.where(x <= center - width / 2, 0, np.where(x > center + width / 2, 255, inside))


# --- other formats


def test_16_bits_without_a_window_are_divided_by_257_and_with_their_range_as_a_window_the_same(tmp_path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for suffix in ("png", "tif", "pgm"):
        Image.fromarray(values).save(tmp_path / f"all.{suffix}")
        expected = (values / 257).round()
        assert np.array_equal(levels(tmp_path / f"all.{suffix}"), expected)
        assert np.array_equal(levels(tmp_path / f"all.{suffix}", (0, 65535)), expected)


@pytest.mark.parametrize("window", [(0, 4095), (1000, 1001), (-200.5, 5000.25)])
def test_a_window_maps_gray_values_of_more_than_8_bits_and_clips_them(tmp_path, window) -> None:
    signed = DEEP.astype(np.int32) - 300
    for name, values in {"deep.png": DEEP, "deep.tif": DEEP, "signed.tif": signed}.items():
        Image.fromarray(values).save(tmp_path / name)
        assert is_rounded(levels(tmp_path / name, window), by_window(values, *window)), name


def test_a_window_leaves_8_bits_as_they_are(tmp_path) -> None:
    gray = (DEEP // 16).astype(np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(np.dstack([gray, 255 - gray, gray])).save(tmp_path / "rgb.png")
    save_dicom(tmp_path / "gray.dcm", gray, WindowCenter=20, WindowWidth=10)
    for name in ("gray.png", "rgb.png"):
        assert np.array_equal(read_gray_or_color(tmp_path / name, (0, 4095)), read_gray_or_color(tmp_path / name))
    assert np.array_equal(levels(tmp_path / "gray.dcm", (0, 4095)), gray)


def test_32_bits_are_refused_with_their_range_and_as_a_mask(tmp_path) -> None:
    file = tmp_path / "deep.tif"
    Image.fromarray(np.array([[-7, 0], [3, 900]], np.int32)).save(file)
    assert refusal(file) == "has pixels of 32 bits, from -7 to 900; set data.window=[low,high], or save it with 8 bits"
    with pytest.raises(FileError, match=r"deep\.tif has pixels of 32 bits; save the lesion as 255 and all else as 0"):
        read_mask(file)


# --- DICOM

VALUES = {  # stored pixels, bits stored, further elements, values after the modality's
    "12 bits in 16": (DEEP, 12, {}, DEEP),
    "16 bits": (deep_phantom(16), 16, {}, deep_phantom(16)),
    "signed": (DEEP.astype(np.int16) - 2048, 12, {}, DEEP.astype(int) - 2048),
    "rescaled": (DEEP, 12, {"RescaleSlope": 0.5, "RescaleIntercept": -1024}, DEEP / 2 - 1024),
    "rescaled downward": (DEEP, 12, {"RescaleSlope": -2, "RescaleIntercept": 10}, 10 - 2 * DEEP.astype(int)),
    "8 bits": ((DEEP // 16).astype(np.uint8), 8, {}, DEEP // 16),
}


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("name", VALUES)
def test_the_window_of_a_file_is_that_of_the_standard(tmp_path, name, function) -> None:
    stored, bits, elements, values = VALUES[name]
    for file, share in (("narrow.dcm", 0.3), ("wide.DICOM", 1.5)):
        center, width = round(float(np.median(values))), round(share * float(np.ptp(values)))
        window = {"WindowCenter": center, "WindowWidth": width, "VOILUTFunction": function}
        saved = save_dicom(tmp_path / file, stored, bits=bits, **elements, **window)
        expected = by_standard(values, center, width, function)
        assert is_rounded(levels(saved), expected)
        assert np.ptp(expected) > 100
        inverse = save_dicom(tmp_path / f"i{file}", stored, bits=bits, kind="MONOCHROME1", **elements, **window)
        assert np.array_equal(levels(inverse), 255 - levels(saved))


def test_without_a_function_it_is_linear_and_of_several_windows_the_first_counts(tmp_path) -> None:
    file = save_dicom(tmp_path / "0.dcm", DEEP, bits=12, WindowCenter=[900, 5], WindowWidth=[1200, 9])
    assert is_rounded(levels(file), by_standard(DEEP, 900, 1200))


@pytest.mark.parametrize("name", [name for name in VALUES if name != "8 bits"])
def test_data_window_takes_the_place_of_the_files(tmp_path, name) -> None:
    stored, bits, elements, values = VALUES[name]
    low, high = np.percentile(values, [10, 95])
    for window in ({}, {"WindowCenter": 5, "WindowWidth": 2}):
        file = save_dicom(tmp_path / "0.dcm", stored, bits=bits, **elements, **window)
        assert is_rounded(levels(file, (low, high)), by_window(values, low, high))


def test_unused_bits_do_not_count(tmp_path) -> None:
    file = save_dicom(tmp_path / "0.dcm", DEEP, bits=12)
    data = pydicom.dcmread(file)
    data.PixelData = (DEEP | 0xA000).tobytes()
    data.save_as(file)
    assert is_rounded(levels(file, (0, 4095)), by_window(DEEP, 0, 4095))


def test_padding_is_read_without_a_word(tmp_path, caplog) -> None:
    file = save_dicom(tmp_path / "0.dcm", DEEP, bits=12)
    data = pydicom.dcmread(file)
    data.PixelData += bytes(128)
    data.save_as(file)
    assert is_rounded(levels(file, (0, 4095)), by_window(DEEP, 0, 4095))
    assert caplog.records == []


def test_a_table_of_the_modality_is_applied_before_the_window(tmp_path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4096, 0, 16], "US"
    curve = (np.arange(4096) ** 2 // 256).astype(np.uint16)
    table.add_new("LUTData", "OW", curve.tobytes())
    elements = {"ModalityLUTSequence": [table], "WindowCenter": 20000, "WindowWidth": 30000}
    file = save_dicom(tmp_path / "0.dcm", DEEP, bits=12, **elements)
    assert is_rounded(levels(file), by_standard(curve[DEEP], 20000, 30000))
    assert is_rounded(levels(file, (100, 60000)), by_window(curve[DEEP], 100, 60000))


def test_8_bits_without_a_window_are_gray_levels(tmp_path) -> None:
    gray = (DEEP // 16).astype(np.uint8)
    assert np.array_equal(levels(save_dicom(tmp_path / "0.dcm", gray)), gray)
    assert np.array_equal(levels(save_dicom(tmp_path / "1.dcm", gray.astype(np.uint16), bits=8)), gray)
    same = save_dicom(tmp_path / "2.dcm", gray, RescaleSlope=1, RescaleIntercept=0)
    assert np.array_equal(levels(same), gray)
    assert np.array_equal(levels(save_dicom(tmp_path / "3.dcm", gray, kind="MONOCHROME1")), 255 - gray)


def test_colors_are_those_of_a_png(tmp_path) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for window in (None, (0, 9)):
        assert np.array_equal(read_gray_or_color(save_dicom(tmp_path / "0.dcm", colors, kind="RGB"), window), colors)
    ybr = np.asarray(Image.fromarray(colors).convert("YCbCr"))
    converted = read_gray_or_color(save_dicom(tmp_path / "1.dcm", ybr, kind="YBR_FULL")).astype(int)
    assert np.abs(converted - np.asarray(Image.fromarray(ybr, "YCbCr").convert("RGB"))).max() <= 1
    file = save_dicom(tmp_path / "2.dcm", colors, kind="RGB")
    data = pydicom.dcmread(file)
    data.PlanarConfiguration, data.PixelData = 1, np.ascontiguousarray(np.moveaxis(colors, 2, 0)).tobytes()
    data.save_as(file)
    assert np.array_equal(read_gray_or_color(file), colors)


def compressed(file: Path, syntax: str) -> Path:
    data = pydicom.dcmread(save_dicom(file, DEEP, bits=12, WindowCenter=2000, WindowWidth=4000))
    data.compress(RLELossless)
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(file)
    return file


def test_a_compressed_file_is_read_or_the_decoder_that_it_lacks_is_named(tmp_path) -> None:
    file = compressed(tmp_path / "0.dcm", RLELossless)
    assert is_rounded(levels(file), by_standard(DEEP, 2000, 4000))
    if not pydicom.pixels.get_decoder(JPEGLSLossless).is_available:
        expected = (
            "is compressed as JPEG-LS Lossless Image Compression, for which no decoder is installed; pip install "
        )
        assert refusal(compressed(file, JPEGLSLossless)) == f"{expected}'pylibjpeg[all]', or save it uncompressed"
    assert "is not a readable image (No pixel data decoders" in refusal(compressed(file, MPEG2MPML))
    assert "is not a readable image (" in refusal(compressed(file, JPEG2000Lossless))  # its content is RLE


REFUSED = {
    "frames": (np.stack([DEEP] * 3), {"bits": 12}, "holds 3 pages or frames; save one of them as a separate file"),
    "no window": (
        DEEP,
        {"bits": 12, "RescaleSlope": 2, "RescaleIntercept": -10000},
        f"has values from {2 * float(DEEP.min()) - 10000:g} to {2 * float(DEEP.max()) - 10000:g} and no window; "
        "set data.window=[low,high], or save it with 8 bits",
    ),
    "half a window": (DEEP, {"bits": 12, "WindowCenter": 9}, "and no window; set data.window="),
    "an empty window": (DEEP, {"bits": 12, "WindowCenter": None, "WindowWidth": None}, "and no window; set data.w"),
    "signed 8 bits": (DEEP.astype(np.int8), {}, "and no window; set data.window="),
    "a window of no width": (DEEP, {"bits": 12, "WindowCenter": 9, "WindowWidth": 0}, "Window Width must be"),
    "16-bit colors": (np.dstack([DEEP] * 3), {"kind": "RGB"}, "has pixels of the kind RGB of 16 bits; save it in gray"),
    "a palette": (DEEP.astype(np.uint8), {"PhotometricInterpretation": "PALETTE COLOR"}, "of the kind PALETTE COLOR"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_dicom_file_of_doubtful_meaning_is_refused(tmp_path, name) -> None:
    pixels, elements, expected = REFUSED[name]
    assert expected in refusal(save_dicom(tmp_path / "0.dcm", pixels, **elements))


@pytest.mark.parametrize("share", [0, 0.0001, 0.004, 0.5, 0.999])
def test_what_is_not_dicom_or_truncated_is_one_line(tmp_path, share) -> None:
    file = save_dicom(tmp_path / "0.dcm", DEEP, bits=12, WindowCenter=2000, WindowWidth=4000)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert "is not a readable image (" in refusal(file)
    file.write_bytes(b"text" * 100)
    assert refusal(file) == "is not a readable image (its content is not DICOM; save it again or leave it out)"


def test_without_pydicom_the_remedy_is_named(tmp_path, monkeypatch) -> None:
    file = save_dicom(tmp_path / "0.dcm", DEEP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert refusal(file) == "is a DICOM file; pip install 'kdsweep[dicom]' reads it"


def test_a_mask_is_not_a_dicom_file(tmp_path) -> None:
    file = save_dicom(tmp_path / "0.dcm", (DEEP > 2000) * np.uint8(255))
    with pytest.raises(FileError, match=r"0\.dcm is a DICOM file, as a mask cannot be; save the lesion as 255.*PNG"):
        read_mask(file)


def test_nothing_of_the_patient_is_read(tmp_path, monkeypatch) -> None:
    file, read = save_dicom(tmp_path / "0.dcm", DEEP, WindowCenter=900, WindowWidth=900), []
    dcmread = pydicom.dcmread
    monkeypatch.setattr(pydicom, "dcmread", lambda *args, **options: read.append(dcmread(*args, **options)) or read[0])
    levels(file)
    assert {element.tag.group for element in read[0]} == {0x0028, 0x7FE0}
    assert PATIENT not in str(read[0])


# --- a data set


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder of each kind of image, with masks in PNG."""
    gray = (DEEP // 16).astype(np.uint8)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.fromarray(gray).save(tmp_path / "images" / "gray.png")
    Image.fromarray(np.dstack([gray] * 3)).save(tmp_path / "images" / "rgb.png")
    Image.fromarray(DEEP).save(tmp_path / "images" / "deep.tif")
    save_dicom(tmp_path / "images" / "1.2.840.dcm", DEEP, bits=12, WindowCenter=100, WindowWidth=50)
    for name in ("gray", "rgb", "deep", "1.2.840"):
        mask = np.zeros(DEEP.shape, np.uint8)
        mask[40:90, 50:100] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def settings(root: Path, *overrides: str):
    words = ["profile=quick", "path=none", "data=folder", f"data.root={root}", f"store={root / 'store'}"]
    return composition.compose([*words, *overrides])


def test_data_window_counts_wherever_images_are_read(mixed) -> None:
    plain, through = settings(mixed), settings(mixed, "data.window=[0,4080]")
    images = inputs.images(through)
    assert images.ids == ["1.2.840", "deep", "gray", "rgb"]
    assert np.ptp(images.images.astype(int), axis=0).max() <= 1, "12 bits through the window look as 8 bits do"
    assert np.ptp(inputs.images(plain).images.astype(int), axis=0).max() > 100
    # of a finished run, as values and as MLflow keeps them
    for convert in (dict, lambda params: {key: str(value) for key, value in params.items()}):
        params = convert(identity.params(through))
        assert run_data.window(params) == (0, 4080)
        again = run_data.scored(run_data.source(params, store=mixed), images.ids, image_size=through.image_size)
        assert np.array_equal(np.stack([one.image for one in again.values()]), images.eval_images)
        assert run_data.window(convert(identity.params(plain))) is None
    # data and audit
    entries = inputs.listing(through).entries
    sizes = (through.image_size, through.load_size)
    measured = account.measure(entries, sizes=sizes, allow_empty_masks=False)
    assert [one.fault for one in measured] == [""] * 4
    assert len({one.brightest for one in measured}) == 1
    assert np.ptp([audit._gray(entry).astype(int) for entry in entries], axis=0).max() <= 1


def test_a_data_set_through_a_window_is_in_all_else_the_same(mixed) -> None:
    folder = sources.Folder(mixed)
    through = sources.read_as(folder, [1, 2])
    assert sources.read_as(folder, None) is folder
    assert (through.name, through.root, through.ignored()) == (folder.name, folder.root, folder.ignored())
    assert list_images(through).digest == list_images(folder).digest
    assert sources.read_as(folder, [1, 2]) == through != sources.read_as(folder, [1, 3])
    assert copy.copy(through) == through
    assert read_entry(through.entries()[1])[0].max() == 255


def test_files_of_a_series_in_several_folders_or_of_one_name_are_refused(mixed) -> None:
    save_dicom(mixed / "images" / "gray.dcm", DEEP)
    with pytest.raises(InputError, match=r"images/gray\.dcm and gray\.png have one name: remove or rename"):
        inputs.listing(settings(mixed))
    for part in ("a", "b"):
        save_dicom(mixed / "series" / "images" / part / "IM0001.dcm", DEEP)
    (mixed / "series" / "masks").mkdir()
    with pytest.raises(InputError, match=r"no images; it has 2 \(images/a/IM0001\.dcm, images/b/IM0001\.dcm\)"):
        sources.Folder(mixed / "series").entries()


def test_a_faulty_file_is_named_before_training(mixed) -> None:
    (mixed / "images" / "1.2.840.dcm").write_bytes(b"text")
    with pytest.raises(InputError, match=r"data=folder: 1 of 4 images: .*1\.2\.840\.dcm is not a readable image"):
        load_images(sources.Folder(mixed), load_size=64, image_size=64)
