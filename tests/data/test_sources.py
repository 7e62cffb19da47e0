"""Data sets as they unpack, their errors, and the random splits."""

import csv
import itertools
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import ShuffleSplit

from kdsweep.core.errors import InputError
from kdsweep.data import phantom, sources
from kdsweep.data.images import Images, load_images, read_entry
from kdsweep.data.splits import Split, check_training_masks, random_split

HEIGHT, WIDTH = 40, 50
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[10:20, 15:35] = True
OTHER_MASK = np.zeros((HEIGHT, WIDTH), bool)
OTHER_MASK[25:30, 5:20] = True


def gray(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


def save(pixels: np.ndarray, file: Path, mode: str | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(file)
    return file


def folder_data(root: Path, count: int = 1) -> Path:
    """The plain layout: images/ and masks/ with `count` pairs called 00, 01, ..."""
    for number in range(count):
        save(gray(number), root / "images" / f"{number:02d}.png")
        save(MASK, root / "masks" / f"{number:02d}.png")
    return root


def udiat_data(root: Path) -> Path:
    for number in (1, 2, 10):
        save(gray(number), root / "original" / f"{number:06d}.png")
        save(MASK, root / "GT" / f"{number:06d}.png")
    return root


def load(source: sources.Source, *, image_size: int = 32, allow_empty_masks: bool = False) -> Images:
    return load_images(source, load_size=36, image_size=image_size, allow_empty_masks=allow_empty_masks)


def error_of(source: sources.Source, *, image_size: int = 32) -> str:
    """The one line that a data set is refused with."""
    with pytest.raises(InputError) as caught:
        load(source, image_size=image_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_labels(file: Path, rows: list[tuple[object, ...]], header: tuple[str, ...] = ("Image", "Type")) -> None:
    workbook = openpyxl.Workbook()
    for row in (header, *rows):
        workbook.active.append(row)
    workbook.save(file)


# --- UDIAT


@pytest.mark.parametrize("below", [".", "BUS", "Dataset B/BUS"])
def test_udiat_is_read_at_the_root_and_one_or_two_folders_deeper(tmp_path: Path, below: str) -> None:
    udiat_data(tmp_path / below)
    entries = sources.Udiat(tmp_path).entries()
    assert [entry.id for entry in entries] == ["000001", "000002", "000010"]
    for entry in entries:
        image, mask = read_entry(entry)
        assert np.array_equal(image, np.repeat(gray(int(entry.id))[..., None], 3, axis=2))
        assert np.array_equal(mask, MASK)


def test_udiat_folders_are_read_in_any_case(tmp_path: Path) -> None:
    udiat_data(tmp_path)
    (tmp_path / "original").rename(tmp_path / "Original")
    (tmp_path / "GT").rename(tmp_path / "gt")
    assert load(sources.Udiat(tmp_path)).ids == ["000001", "000002", "000010"]


def test_udiat_labels_come_from_the_spreadsheet_and_are_unknown_without_it(tmp_path: Path) -> None:
    udiat_data(tmp_path / "BUS")
    assert load(sources.Udiat(tmp_path)).labels == ["unknown"] * 3
    write_labels(tmp_path / "BUS" / "DatasetB.xlsx", [(1, "Benign"), (2, "Malignant "), (10, "Benign")])
    assert load(sources.Udiat(tmp_path)).labels == ["benign", "malignant", "benign"]


def test_udiat_spreadsheet_without_the_expected_columns_is_named(tmp_path: Path) -> None:
    udiat_data(tmp_path)
    write_labels(tmp_path / "DatasetB.xlsx", [(1, "Benign")], header=("File", "Class"))
    message = error_of(sources.Udiat(tmp_path))
    assert "DatasetB.xlsx" in message
    assert "Image" in message
    assert "Type" in message


# --- BUSI


def busi_data(root: Path) -> Path:
    save(gray(1), root / "benign" / "benign (1).png", "RGB")
    save(MASK, root / "benign" / "benign (1)_mask.png")
    save(OTHER_MASK, root / "benign" / "benign (1)_mask_1.png", "RGBA")
    save(gray(2), root / "malignant" / "malignant (1).png", "RGB")
    save(MASK, root / "malignant" / "malignant (1)_mask.png", "RGB")
    save(gray(3), root / "normal" / "normal (1).png", "RGB")
    save(np.zeros_like(MASK), root / "normal" / "normal (1)_mask.png", "RGB")
    return root


def test_busi_unites_the_masks_of_an_image_whatever_their_modes(tmp_path: Path) -> None:
    one, two = sources.Busi(busi_data(tmp_path)).entries()
    assert (one.id, one.label, len(one.mask_files)) == ("benign (1)", "benign", 2)
    assert np.array_equal(read_entry(one)[1], MASK | OTHER_MASK)
    assert (two.id, two.label) == ("malignant (1)", "malignant")
    assert np.array_equal(read_entry(two)[1], MASK)


def test_busi_leaves_normal_images_out_by_default(tmp_path: Path) -> None:
    busi_data(tmp_path)
    assert load(sources.Busi(tmp_path)).labels == ["benign", "malignant"]
    everything = load(sources.Busi(tmp_path, include_normal=True), allow_empty_masks=True)
    assert everything.labels == ["benign", "malignant", "normal"]
    assert not everything.masks[2].any()


def test_published_busi_files_read_as_their_gray_copies(real_data: Path) -> None:
    copies = {entry.id: entry for entry in sources.Busi(real_data / "busi163").entries()}
    originals = sources.Busi(real_data / "busi-originals").entries()
    names = ["benign (100)", "benign (51)", "benign (54)", "malignant (137)", "malignant (175)"]
    assert [entry.id for entry in originals] == names
    masks_per_image = {entry.id: len(entry.mask_files) for entry in originals}
    assert masks_per_image == dict(zip(names, [2, 1, 2, 1, 1], strict=True))
    for entry in originals:
        image, mask = read_entry(entry)
        copy_image, copy_mask = read_entry(copies[entry.id])
        assert np.array_equal(image, copy_image), entry.id
        assert np.array_equal(mask, copy_mask), entry.id
        assert 0 < mask.mean() < 0.6


def test_published_busi_normal_image_has_an_empty_mask(real_data: Path) -> None:
    normal = [
        e for e in sources.Busi(real_data / "busi-originals", include_normal=True).entries() if e.label == "normal"
    ]
    assert [entry.id for entry in normal] == ["normal (2)"]
    assert not read_entry(normal[0])[1].any()


def test_busi163_has_the_cohort_and_the_lesions_of_its_manifest(real_data: Path) -> None:
    entries = sources.Busi(real_data / "busi163").entries()
    labels = [entry.label for entry in entries]
    assert (len(entries), labels.count("benign"), labels.count("malignant")) == (163, 110, 53)
    assert sum(len(entry.mask_files) for entry in entries) == 168
    with (real_data / "busi163" / "manifest.csv").open(encoding="utf-8") as lines:
        manifest = {Path(row["file"]).stem: row for row in csv.DictReader(lines)}
    assert manifest.keys() == {entry.id for entry in entries}
    for entry in entries:
        image, mask = read_entry(entry)
        row = manifest[entry.id]
        assert image.shape == (int(row["height"]), int(row["width"]), 3)
        assert mask.mean() == pytest.approx(float(row["lesion_fraction"]), abs=1e-3)


# --- plain folders


def test_folder_pairs_equal_stems_and_ignores_other_files(tmp_path: Path) -> None:
    save(gray(1), tmp_path / "images" / "patient b.jpg")
    save(MASK, tmp_path / "masks" / "patient b.png")
    save(gray(2), tmp_path / "images" / "a.bmp")
    save(MASK, tmp_path / "masks" / "a.tif")
    save(MASK, tmp_path / "masks" / "alone.png")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    images = load(sources.Folder(tmp_path))
    assert (images.ids, images.labels) == (["a", "patient b"], ["unknown", "unknown"])
    assert images.masks.any(axis=(1, 2)).all()


# --- errors


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    for source in (sources.Udiat, sources.Busi, sources.Folder):
        message = error_of(source(tmp_path / "absent"))
        assert f"data.root={tmp_path / 'absent'}" in message
        assert "no such folder" in message


def test_a_root_whose_name_is_a_number_is_a_folder_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line, data.root=2024 arrives as a number."""
    folder_data(tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    assert load(sources.Folder(2024)).ids == ["00"]
    assert "data.root=2025: no such folder" in error_of(sources.Folder(2025))


@pytest.mark.parametrize(
    ("source", "expected"), [(sources.Udiat, "original/"), (sources.Busi, "benign/"), (sources.Folder, "images/")]
)
def test_an_empty_root_says_what_was_expected(tmp_path: Path, source: type, expected: str) -> None:
    message = error_of(source(tmp_path))
    assert str(tmp_path) in message
    assert expected in message


@pytest.mark.parametrize(
    ("source", "images", "masks"), [(sources.Udiat, "original", "GT"), (sources.Folder, "images", "masks")]
)
def test_an_absent_mask_folder_and_an_empty_image_folder_are_named(
    tmp_path: Path, source: type, images: str, masks: str
) -> None:
    (tmp_path / images).mkdir()
    assert f"{masks}/" in error_of(source(tmp_path))
    (tmp_path / masks).mkdir()
    message = error_of(source(tmp_path))
    assert str(tmp_path / images) in message
    assert ".png" in message


def test_an_image_without_a_mask_is_named(tmp_path: Path) -> None:
    folder_data(tmp_path, count=3)
    (tmp_path / "masks" / "01.png").unlink()
    message = error_of(sources.Folder(tmp_path))
    assert f"{tmp_path / 'images' / '01.png'} has no mask" in message
    assert "1 of 3 images" in message


def test_a_busi_image_without_a_mask_is_named(tmp_path: Path) -> None:
    busi_data(tmp_path)
    (tmp_path / "malignant" / "malignant (1)_mask.png").unlink()
    assert f"{tmp_path / 'malignant' / 'malignant (1).png'} has no mask" in error_of(sources.Busi(tmp_path))


def test_a_mask_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    folder_data(tmp_path)
    save(MASK[:, :-1], tmp_path / "masks" / "00.png")
    message = error_of(sources.Folder(tmp_path))
    assert f"{tmp_path / 'masks' / '00.png'} is 49 x 40 pixels" in message
    assert "50 x 40" in message


def test_of_many_bad_files_the_first_ten_are_named_and_all_counted(tmp_path: Path) -> None:
    folder_data(tmp_path, count=14)
    bad = [tmp_path / "images" / f"{number:02d}.png" for number in range(12)]
    for file in bad:
        file.write_bytes(b"junk")
    message = error_of(sources.Folder(tmp_path))
    assert "12 of 14 images" in message
    assert "2 more" in message
    assert [str(file) in message for file in bad] == [True] * 10 + [False] * 2


def test_training_masks_that_are_all_empty_are_refused() -> None:
    masks = np.zeros((6, 8, 8), np.uint8)
    masks[5, 2:4, 2:4] = 1
    pixels = np.zeros((6, 8, 8, 3), np.uint8)
    images = Images("six", list("abcdef"), ["unknown"] * 6, pixels, masks, pixels, masks, "")
    with pytest.raises(InputError, match="data=six: all 4 training masks are empty"):
        check_training_masks(images, Split(train=[0, 1, 2, 3], validation=[4], test=[5]))
    check_training_masks(images, Split(train=[5, 1, 2, 3], validation=[4], test=[0]))


# --- phantoms


def phantoms(cache_dir: Path, count: int = 4, seed: int = 0) -> sources.Phantoms:
    return sources.Phantoms(count=count, seed=seed, cache_dir=cache_dir)


@pytest.fixture(scope="module")
def phantom_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which four phantoms have been made, and what a killed process left."""
    cache = tmp_path_factory.mktemp("phantoms")
    (cache / ".making-killed" / "benign").mkdir(parents=True)
    (cache / ".making-killed" / "benign" / "benign (1).png").write_bytes(b"half")
    assert len(phantoms(cache).entries()) == 4
    return cache


def test_phantoms_are_made_once_and_then_read(phantom_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = phantoms(phantom_cache).entries()
    written = {file: file.stat().st_mtime_ns for file in phantom_cache.rglob("*.png")}
    monkeypatch.setattr(phantom, "phantom", lambda **_: pytest.fail("the phantoms were made again"))
    assert phantoms(phantom_cache).entries() == first
    assert {file: file.stat().st_mtime_ns for file in phantom_cache.rglob("*.png")} == written
    assert list(phantom_cache.glob(".making-*")) == []  # what a killed process left is gone


def test_phantoms_are_the_same_wherever_they_are_made(phantom_cache: Path, tmp_path: Path) -> None:
    first, second = (load_images(phantoms(cache), load_size=73, image_size=64) for cache in (phantom_cache, tmp_path))
    assert first.digest == second.digest
    assert first.masks.any(axis=(1, 2)).all()


def test_phantoms_of_another_count_or_seed_are_in_another_folder(tmp_path: Path) -> None:
    sources = [phantoms(tmp_path, count=1), phantoms(tmp_path, count=2), phantoms(tmp_path, count=1, seed=1)]
    roots = [source.entries()[0].image_file.parents[1] for source in sources]
    assert len(set(roots)) == 3


def test_phantoms_that_two_want_at_once_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = phantom.phantom, []

    def make_slowly(**arguments: Any) -> phantom.Phantom:
        made.append(arguments)
        time.sleep(0.5)
        return make(**arguments)

    monkeypatch.setattr(phantom, "phantom", make_slowly)
    with ThreadPoolExecutor(2) as pool:
        listed = list(pool.map(lambda _: phantoms(tmp_path, count=1).entries(), range(2)))
    assert listed[0] == listed[1]
    assert len(made) == 1


# --- a loaded data set


def test_loaded_arrays_have_the_promised_shapes_types_and_order(small_busi: Path) -> None:
    images = load_images(sources.Busi(small_busi), load_size=73, image_size=64)
    count = len(images.ids)
    assert count == 25
    assert images.ids == sorted(images.ids)
    assert all(name.startswith(label) for name, label in zip(images.ids, images.labels, strict=True))
    arrays = (images.images, images.masks, images.eval_images, images.eval_masks)
    assert [a.shape for a in arrays] == [(count, 73, 73, 3), (count, 73, 73), (count, 64, 64, 3), (count, 64, 64)]
    assert {a.dtype for a in arrays} == {np.dtype(np.uint8)}
    assert set(np.unique(images.masks)) == set(np.unique(images.eval_masks)) == {0, 1}


def test_resizing_keeps_lesions_where_they_are(tmp_path: Path) -> None:
    save(np.where(MASK, 200, 20).astype(np.uint8), tmp_path / "images" / "a.png")
    save(MASK, tmp_path / "masks" / "a.png")
    images = load_images(sources.Folder(tmp_path), load_size=20, image_size=20)
    expected = np.zeros((20, 20), np.uint8)
    expected[5:10, 6:14] = 1  # rows / 2, columns * 0.4
    assert np.array_equal(images.masks[0], expected)
    assert np.array_equal(images.images[0, ..., 0] > 110, expected)


def test_digest_follows_every_pixel_id_and_label_but_not_the_place(tmp_path: Path) -> None:
    root = busi_data(tmp_path / "first")
    digest = load(sources.Busi(root)).digest
    moved = shutil.move(root, tmp_path / "elsewhere")
    assert load(sources.Busi(moved)).digest == digest
    os.utime(moved / "benign" / "benign (1).png", (0, 0))
    assert load(sources.Busi(moved)).digest == digest

    mask_file = moved / "malignant" / "malignant (1)_mask.png"
    changed = MASK.copy()
    changed[0, 0] = True
    before = mask_file.read_bytes()
    save(changed, mask_file, "RGB")
    assert load(sources.Busi(moved)).digest != digest
    mask_file.write_bytes(before)
    assert load(sources.Busi(moved)).digest == digest

    for file in sorted((moved / "malignant").iterdir()):
        file.rename(file.with_name(file.name.replace("(1)", "(2)")))
    assert load(sources.Busi(moved)).digest != digest


# --- splits


def parts(split: Split) -> tuple[list[int], list[int], list[int]]:
    return split.train, split.validation, split.test


def test_163_images_split_as_in_the_paper() -> None:
    for index in range(3):
        assert tuple(map(len, parts(random_split(163, index=index)))) == (104, 26, 33)


def test_the_splits_of_163_images_stay_what_they_are() -> None:
    """Numbers written down once: a library that draws others would silently change every result."""
    assert [random_split(163, index=index).test[:5] for index in range(3)] == [
        [132, 19, 26, 134, 1],
        [75, 35, 146, 117, 129],
        [46, 129, 139, 100, 119],
    ]
    assert [random_split(163, index=index).validation[:5] for index in range(3)] == [
        [150, 161, 156, 113, 54],
        [97, 2, 1, 69, 27],
        [11, 23, 130, 105, 109],
    ]
    assert [random_split(163, index=index).train[:3] for index in range(3)] == [
        [108, 11, 53],
        [6, 145, 144],
        [94, 6, 112],
    ]


@example(count=163, index=0)
@given(count=st.integers(5, 500), index=st.integers(0, 2))
def test_a_split_is_disjoint_complete_and_fixed(count: int, index: int) -> None:
    split = random_split(count, index=index)
    assert sorted(itertools.chain(*parts(split))) == list(range(count))
    assert min(map(len, parts(split))) >= 1
    assert len(split.test) == pytest.approx(0.20 * count, abs=0.5)
    assert len(split.validation) == pytest.approx(0.16 * count, abs=0.5)
    assert random_split(count, index=index) == split


@given(count=st.integers(20, 500))
def test_the_three_splits_differ(count: int) -> None:
    tests = {tuple(sorted(random_split(count, index=index).test)) for index in range(3)}
    assert len(tests) == 3


def test_test_parts_are_those_of_sklearns_shuffle_split() -> None:
    shuffles = ShuffleSplit(n_splits=3, test_size=33, train_size=130, random_state=2025).split(np.zeros(163))
    for index, (_, test) in enumerate(shuffles):
        assert random_split(163, index=index).test == test.tolist()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_few_images_are_refused_with_their_number(count: int) -> None:
    with pytest.raises(InputError, match=f"{count} images.* at least 4"):
        random_split(count, index=0)
    assert random_split(4, index=0)
