"""The folder of a data set: each file is used, or named as ignored, or refused as doubtful in one line."""

import errno
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image

from kdsweep.core.errors import InputError
from kdsweep.data import folders, sources
from kdsweep.data.folders import DEEPER, ELSEWHERE, HIDDEN, LONE_MASKS, NOT_IMAGES, OTHER, UNREADABLE
from kdsweep.data.listing import list_images
from kdsweep.data.sources import NORMAL, Busi, Folder, Phantoms, Udiat

PIXELS = np.zeros((8, 9), np.uint8)
FOLDER = ("images/0.png", "images/1.png", "masks/0.png", "masks/1.png")
BUSI = tuple(f"{label}/{label} (1){tail}.png" for label in ("benign", "malignant") for tail in ("", "_mask"))
UDIAT = ("original/000001.png", "original/000002.png", "GT/000001.png", "GT/000002.png")
LABELS = [(1, "Benign"), (2, "Malignant")]


def make(root: Path, *names: str | bytes) -> Path:
    """Write files: images by their suffix, others with a few letters."""
    for name in names:
        file = root / (os.fsdecode(name))
        file.parent.mkdir(parents=True, exist_ok=True)
        if folders.is_image(file):
            Image.fromarray(PIXELS).save(file)
        else:
            file.write_bytes(b"text")
    return root


def spreadsheet(file: Path, rows: list[tuple[object, object]]) -> None:
    workbook = openpyxl.Workbook()
    for row in (("Image", "Type"), *rows):
        workbook.active.append(row)
    workbook.save(file)


def refusal(source: sources.Source) -> str:
    with pytest.raises(InputError) as caught:
        list_images(source)
    message = str(caught.value)
    message.encode()  # or it could not be printed
    assert "\n" not in message
    return message


LATIN_1 = b"images/caf\xe9.png"
DOUBTFUL = {
    "two sets": (
        Folder,
        [f"{part}/{name}" for part in ("a", "b") for name in FOLDER],
        "more than one data set: 2 (a/, b/); name one",
    ),
    "two sets, remedy": (Folder, [f"{part}/{name}" for part in ("a", "b") for name in FOLDER], "data.root=ROOT/a"),
    "two sets of UDIAT": (Udiat, [f"{part}/{name}" for part in ("a", "b") for name in UDIAT], "2 (a/, b/)"),
    "masks of another part": (
        Folder,
        ["train/images/0.png", "test/masks/0.png"],
        "no folder masks/ next to train/images/",
    ),
    "two folders by case": (Folder, [*FOLDER, "Images/2.png"], "Images and images differ by case alone; rename one"),
    "two images, one stem": (
        Folder,
        [*FOLDER, "images/0.tif"],
        "images/0.png and 0.tif have one name: remove or rename",
    ),
    "two masks, one stem": (Folder, [*FOLDER, "masks/0.tif"], "masks/0.png and 0.tif have one name"),
    "two masks, UDIAT": (Udiat, [*UDIAT, "GT/000001.bmp"], "GT/000001.bmp and 000001.png have one name"),
    "two masks, BUSI": (
        Busi,
        [*BUSI, "benign/benign (1)_mask.tif"],
        "benign (1)_mask.png and benign (1)_mask.tif have",
    ),
    "two images by case": (Folder, [*FOLDER, "images/A.png", "images/a.png"], "A.png and a.png have one name"),
    "one id, two labels": (
        Busi,
        [*BUSI, "benign/7.png", "malignant/7.png"],
        "two images have the id '7': ROOT/benign/7",
    ),
    "no mask by that name": (
        Folder,
        ["images/0.png", "masks/0_mask.png"],
        "no image has a mask of its name: ROOT/images/0",
    ),
    "no image format": (
        Folder,
        ["images/0.nii", "masks/0.png"],
        "ROOT/images: no images; it has 1 (images/0.nii); they must be",
    ),
    "images in subfolders": (Folder, ["images/a/0.png", "masks/a/0.png"], "no images; it has 1 (images/a/0.png)"),
    "malignant alone": (Busi, BUSI[2:], "no folder benign/ next to malignant/; expected benign/*.png and malignant/"),
    "benign alone": (Busi, BUSI[:2], "no folder malignant/ next to benign/"),
    "benign without images": (Busi, [*BUSI[2:], "benign/notes.txt"], "benign: no images"),
    "name in Latin-1": (Folder, [*FOLDER, LATIN_1], r"'images/caf\xe9.png' has bytes that are not UTF-8"),
    "folder in Latin-1": (
        Folder,
        [b"caf\xe9/" + name.encode() for name in FOLDER],
        r"'caf\xe9/images/0.png' has bytes",
    ),
    "sets in Latin-1": (
        Folder,
        [b"caf\xe9/" + n.encode() for n in FOLDER] + ["b/" + n for n in FOLDER],
        r"2 (b/, caf\xe9/)",
    ),
    "no images in Latin-1": (
        Folder,
        [b"caf\xe9/images/0.nii", b"caf\xe9/masks/0.png"],
        r"ROOT/caf\xe9/images: no images",
    ),
    "line break in a name": (Folder, [*FOLDER, "images/a\nb.png"], r"'images/a\x0ab.png' has bytes"),
    "a broken spreadsheet": (Udiat, [*UDIAT, "DatasetB.xlsx"], "ROOT/DatasetB.xlsx is not a readable .xlsx file"),
    "two spreadsheets": (Udiat, [*UDIAT, "a/DatasetB.xlsx", "b/DatasetB.xlsx"], "which one has the labels?"),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_a_doubtful_folder_is_refused_in_one_line(tmp_path, case):
    source, names, expected = DOUBTFUL[case]
    assert expected.replace("ROOT", str(tmp_path)) in refusal(source(make(tmp_path, *names)))


def test_normal_images_that_are_configured_must_be_there(tmp_path):
    source = Busi(make(tmp_path, *BUSI), include_normal=True)
    assert "no folder normal/ next to benign/, malignant/" in refusal(source)
    assert "data.source.include_normal=true also needs normal/" in refusal(source)
    make(tmp_path, "normal/normal (1).png", "normal/normal (1)_mask.png")
    assert [entry.label for entry in source.entries()] == ["benign", "malignant", "normal"]
    assert source.ignored() == {}


NORMAL_FILES = ["normal/normal (1).png", "normal/normal (1)_mask.png"]
DEEP = "images/a/b/c"  # the third level is a/b
IGNORED = {
    "another part": (Folder, [f"train/{name}" for name in FOLDER], ["test/images/0.png"], {ELSEWHERE}),
    "another part of UDIAT": (Udiat, [f"x/{name}" for name in UDIAT], ["y/original/000001.png"], {ELSEWHERE}),
    "a set below the root": (Folder, FOLDER, [f"old/{name}" for name in FOLDER], {ELSEWHERE}),
    "a folder below images/": (Folder, FOLDER, ["images/old/3.png"], {ELSEWHERE}),
    "images in the root": (Folder, FOLDER, ["figure.png"], {ELSEWHERE}),
    "an unknown class": (Busi, BUSI, ["cyst/cyst (1).png", "cyst/cyst (1)_mask.png"], {ELSEWHERE}),
    "normal images": (Busi, BUSI, NORMAL_FILES, {NORMAL}),
    "masks without an image": (Folder, FOLDER, ["masks/2.png", "masks/0_mask.png"], {LONE_MASKS}),
    "UDIAT's masks without an image": (Udiat, UDIAT, ["GT/000003.png"], {LONE_MASKS}),
    "BUSI's masks without an image": (Busi, BUSI, ["benign/benign (2)_mask.png"], {LONE_MASKS}),
    "files that are not images": (Folder, FOLDER, ["images/2.nii", "masks/0.json", "images/README"], {NOT_IMAGES}),
    "companions": (Folder, FOLDER, ["manifest.csv", "LICENSE", "tables/a.csv", "volume.h5"], {OTHER}),
    "hidden files": (Folder, FOLDER, ["images/._0.png", ".DS_Store", "masks/Thumbs.db"], {HIDDEN}),
    "too deep": (Folder, FOLDER, [f"{DEEP}/0.png"], {DEEPER}),
}


@pytest.mark.parametrize("case", IGNORED)
def test_a_file_that_is_not_used_is_named_and_changes_nothing_else(tmp_path, case):
    source, used, others, reasons = IGNORED[case]
    root = make(tmp_path, *used)
    before = list_images(source(root))
    assert before.ignored == {}
    after = list_images(source(make(tmp_path, *others)))
    assert (after.entries, after.digest) == (before.entries, before.digest)
    assert after.ignored.keys() == reasons
    names = [name for names in after.ignored.values() for name in names]
    assert names == sorted(others) if case != "too deep" else names == [DEEP]
    line = folders.ignored_line(after.ignored)
    assert (line == "") == (reasons <= folders.QUIET)
    assert line == "" or f": {len(names)} ({names[0]}" in line


def test_a_line_on_ignored_files_has_counts_and_the_first_names(tmp_path):
    make(tmp_path, *FOLDER, *(f"test/images/{n}.png" for n in range(12)), "masks/x.png", "manifest.csv")
    line = folders.ignored_line(list_images(Folder(tmp_path)).ignored)
    first = "test/images/0.png, test/images/1.png, test/images/10.png, ..."
    assert line == f"images in other folders: 12 ({first}); masks without an image: 1 (masks/x.png)"


@pytest.mark.parametrize(("source", "names", "inner"), [(Folder, FOLDER, "images"), (Busi, BUSI, "benign")])
def test_a_root_that_is_one_folder_too_deep_is_named(tmp_path, source, names, inner):
    make(tmp_path, *names)
    assert refusal(source(tmp_path / inner)).endswith(f"; name the folder above, data.root={tmp_path}")


def test_a_folder_that_cannot_be_read_and_names_that_cannot_be_printed_are_ignored_by_name(tmp_path, monkeypatch):
    make(tmp_path, *FOLDER, b"caf\xe9.csv", "lost+found/x")
    scandir = os.scandir

    def refusing(folder):
        if Path(folder).name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    assert list_images(Folder(tmp_path)).ignored == {UNREADABLE: ["lost+found"], OTHER: [r"caf\xe9.csv"]}
    root = tmp_path / "lost+found"
    assert refusal(Folder(root)) == f"data.root={root}: cannot be read (Permission denied); make it readable"


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("absent")])
def test_a_broken_link_or_a_pipe_is_one_line(tmp_path, put):
    make(tmp_path, *FOLDER)
    put(tmp_path / "images" / "2.png")
    make(tmp_path, "masks/2.png")
    assert f"{tmp_path / 'images' / '2.png'} is a broken link, a pipe or a device" in refusal(Folder(tmp_path))


def test_folders_that_are_links_are_read_and_circles_end(tmp_path):
    make(tmp_path / "disk", *FOLDER)
    (tmp_path / "data").mkdir()
    for name in ("images", "masks"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    assert [entry.id for entry in Folder(tmp_path / "data").entries()] == ["0", "1"]


@pytest.mark.parametrize("suffix", ["gif", "webp", "ppm", "pgm", "jp2", "tga", "PNG", "jfif", "pcx"])
def test_any_format_that_pillow_decodes_is_an_image(tmp_path, suffix):
    make(tmp_path, *FOLDER, f"images/2.{suffix}", f"masks/2.{suffix}")
    assert [entry.id for entry in Folder(tmp_path).entries()] == ["0", "1", "2"]
    make(tmp_path / "busi", *BUSI, f"benign/2.{suffix}", f"benign/2_mask.{suffix}")
    assert len(Busi(tmp_path / "busi").entries()) == 3


NFC, NFD = (unicodedata.normalize(form, "\u00e9") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("image", "mask"), [(NFC, NFD), (NFD, NFC), ("Scan", "scan"), ("a", "A")])
def test_image_and_mask_belong_together_whatever_the_form_of_their_letters(tmp_path, image, mask):
    make(tmp_path, *FOLDER, f"images/{image}.png", f"masks/{mask}.PNG")
    (entry,) = [each for each in Folder(tmp_path).entries() if each.id == image]
    assert entry.mask_files == (tmp_path / "masks" / f"{mask}.PNG",)
    make(tmp_path, *BUSI, f"benign/{image}.png", f"benign/{mask}_Mask.png", f"benign/{mask}_mask_1.png")
    (entry,) = [each for each in Busi(tmp_path).entries() if each.id == image]
    assert {file.name for file in entry.mask_files} == {f"{mask}_Mask.png", f"{mask}_mask_1.png"}


# ---- labels of UDIAT


@pytest.mark.parametrize("form", ["{:06d}.png", "{:06d}", "{}", "{:04d}", "{:06d}.PNG", " {:06d}.bmp "])
def test_a_row_names_its_image_by_number_stem_or_file(tmp_path, form):
    make(tmp_path, *UDIAT)
    rows = [(form.format(number), label) for number, label in LABELS]
    spreadsheet(tmp_path / "DatasetB.xlsx", [*rows, rows[0], (None, None)])
    listed = list_images(Udiat(tmp_path))
    assert [entry.label for entry in listed.entries] == ["benign", "malignant"]
    assert listed.ignored == {}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([*LABELS, ("000001.png", "Malignant")], "image 000001.png is 'benign' in one row and 'malignant' in another"),
        (LABELS[:1], "has no label for 1 (000002) of 2 images"),
        ([LABELS[0], (2, None)], "has no label for 1 (000002) of 2 images"),
        ([("case 1", "Benign")], "has no label for 2 (000001, 000002) of 2 images"),
    ],
)
def test_labels_are_never_unknown_with_a_spreadsheet(tmp_path, rows, expected):
    spreadsheet(make(tmp_path, *UDIAT) / "DatasetB.xlsx", rows)
    message = refusal(Udiat(tmp_path))
    assert message.startswith(str(tmp_path / "DatasetB.xlsx"))
    assert expected in message
    assert message.endswith("correct it, or move it elsewhere: then there are no labels")


def test_rows_without_an_image_are_named_and_a_spreadsheet_elsewhere_is_read(tmp_path):
    make(tmp_path, *(f"Dataset B/BUS/{name}" for name in UDIAT))
    spreadsheet(tmp_path / "datasetb.XLSX", [*LABELS, (163, "Benign")])
    listed = list_images(Udiat(tmp_path))
    assert listed.summary() == "2 images (1 benign, 1 malignant)"
    assert listed.ignored == {"rows of datasetb.XLSX without an image": ["163"]}


# ---- other classes


@dataclass(frozen=True)
class Clinic:
    """A user's class: a name and entries, as docs/extending.md has it."""

    root: Path
    name: str = "clinic"

    def entries(self) -> list[sources.Entry]:
        return [sources.Entry(f.stem, "unknown", f, (f,)) for f in self.root.glob("images/*.png")]


class Half(Folder):
    """A user's class that takes a part of another one's images."""

    def entries(self) -> list[sources.Entry]:
        return super().entries()[:1]


def test_a_users_class_needs_a_name_and_entries_alone(tmp_path):
    make(tmp_path, *FOLDER)
    listed = list_images(Clinic(tmp_path))
    assert ([entry.id for entry in listed.entries], listed.ignored) == (["0", "1"], {})
    assert [entry.id for entry in list_images(Half(tmp_path)).entries] == ["0"]
    assert refusal(Clinic(tmp_path / "empty")) == "data=clinic: no images; its class lists none"


def test_a_full_disk_while_phantoms_are_made_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    message = refusal(Phantoms(count=4, seed=0, cache_dir=tmp_path))
    assert message.startswith(f"{tmp_path}/4-seed0-generator")
    assert "4 phantoms cannot be written (No space left on device); make room, or choose another folder" in message
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_phantoms_of_which_some_are_gone_are_one_line(tmp_path):
    source = Phantoms(count=4, seed=0, cache_dir=tmp_path)
    source.entries()[0].image_file.unlink()
    assert refusal(source).endswith("holds 3 of 4 phantoms: delete this folder, and they are made again")
