"""``python -m kdsweep data``: the answer first, each fault and doubt named, a sheet of the images that tell most."""

import shutil

import numpy as np
import pytest
from PIL import Image

from kdsweep import cli
from kdsweep.core.files import CHECKOUT
from kdsweep.data import account as accounts
from kdsweep.data.account import Account, Measured
from kdsweep.data.sources import Entry, Folder, read_as
from kdsweep.results import data_sheet

SIDE = 80


def write(root, number, mask):
    for folder, pixels in (("images", np.full_like(mask, 90)), ("masks", mask)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / folder / f"{number:02d}.png")


def disc(radius, *, side=SIDE):
    y, x = np.mgrid[:side, :side]
    return ((x - side // 2) ** 2 + (y - side // 3) ** 2 < radius**2) * np.uint8(255)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, to which the sheet goes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kdsweep" / "data"


@pytest.fixture
def root(tmp_path):
    """Ten good images: lesions of 5 to 14 pixels radius."""
    folder = tmp_path / "data"
    for number in range(10):
        write(folder, number, disc(5 + number))
    return folder


def command(capsys, *words):
    """Exit code, standard output and standard error of the command."""
    code = cli.main(["data", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_good_data_set_is_usable_and_counted_by_label_and_part(small_busi, tmp_path, cache, capsys):
    (tmp_path / "groups.csv").write_text(
        "id,group\n"
        + "".join(f"{file.stem},{number // 2}\n" for number, file in enumerate(sorted(small_busi.glob("*/*).png"))))
        + "absent,x\n"
    )
    shutil.copytree(small_busi, tmp_path / "busi")
    (tmp_path / "busi" / "manifest.csv").write_text("file\n")
    words = ["data=busi", f"data.root={tmp_path / 'busi'}", "image_size=64"]
    words += ["split=holdout", f"split.group={tmp_path / 'groups.csv'}"]
    code, out, err = command(capsys, *words)
    assert (code, err) == (0, "")
    table = [line.split() for line in out.split("\n\n")[2].splitlines()]
    lines = out.splitlines()
    assert lines[0] == "data=busi: 25 images, usable at image_size=64"
    assert table[0] == ["images", "train", "validation", "test", "all"]
    assert [(row[0], row[-1]) for row in table[1:]] == [("benign", "16"), ("malignant", "9"), ("all", "25")]
    for row in table[1:]:
        assert sum(map(int, row[1:-1])) == int(row[-1])
    assert "groups: 13 of 1 to 2 images" in lines
    assert "ignored, other files: 1 (manifest.csv)" in lines
    assert f"  ignored, rows of split.group={tmp_path / 'groups.csv'} without an image: 1 (absent)" in lines
    (file,) = cache.glob("busi-*.png")
    assert lines[-1].startswith(f"wrote {file}: 25 images with contours")
    with Image.open(file) as sheet:
        assert sheet.size == (1560, round(5 * 130 * 2.32 + 65))


def test_faulty_images_are_all_named_and_the_others_are_still_accounted_for(root, tmp_path, capsys):
    (root / "images" / "03.png").write_bytes(b"not an image")
    (root / "masks" / "04.png").unlink()
    write(root, 5, np.zeros((SIDE, SIDE), np.uint8))
    write(root, 6, np.full((SIDE, SIDE), 255, np.uint8))
    write(root, 7, np.pad(np.full((1, 1), 255, np.uint8), (20, 1060)))
    write(root, 8, np.pad(disc(5, side=40), ((0, 60), (0, 0))))  # one side alone is smaller
    Image.fromarray(np.full((SIDE, SIDE), 16, np.uint8)).save(root / "images" / "09.png")
    words = ["data=folder", f"data.root={root}", "image_size=64", "--sheet", str(tmp_path / "a" / "sheet.png")]
    code, out, _ = command(capsys, *words)
    answer, faults, doubts, *rest, wrote = out.split("\n\n")
    assert code == 1
    assert answer == "data=folder: 10 images, NOT usable: 3 of them faulty"
    assert faults.splitlines()[0] == "faults:"
    files = [root / "images" / "03.png", root / "images" / "04.png", root / "masks" / "05.png"]
    assert [str(file) in line for file, line in zip(files, faults.splitlines()[1:], strict=True)] == [True] * 3
    assert doubts.splitlines() == [
        "worth a look:",
        "  full mask: 1 (06)",
        "  lesion lost at 64 pixels: 1 (07)",
        "  enlarged to 64 pixels: 1 (08)",
        "  nearly black image: 1 (09)",
    ]
    assert "size in pixels: smallest 40 x 100, median 80 x 80, largest 1081 x 1081" in rest[-1]
    assert "max: 100" in rest[-1]
    counts = "empty mask: 1; full mask: 1; lesion lost at 64 pixels: 1; enlarged to 64 pixels: 1; nearly black image: 1"
    assert counts in rest[-1]
    assert "8 images with contours" in wrote, "those that can be read"
    assert (tmp_path / "a" / "sheet.png").is_file()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["split=kfold", "split.folds=20"], "split.folds=20 is not allowed: the data set has 10 images"),
        (["split=kfold", "split.group=absent.csv"], "split.group=absent.csv: cannot be read"),
    ],
)
def test_a_split_that_cannot_be_drawn_is_a_fault_beside_the_account(root, capsys, words, fault):
    common = ["data=folder", f"data.root={root}", "image_size=64"]
    code, out, _ = command(capsys, *common, *words)
    assert code == 1
    assert out.startswith("data=folder: 10 images, NOT usable: the split is refused\n\nfaults:\n  split")
    assert fault in out
    assert "unknown          10" in out


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (0, "no mask shows a lesion, so nothing can be learned"),
        (255, "6 masks are lesion everywhere: are they inverted, or images?"),
    ],
)
def test_masks_that_are_all_alike_are_a_fault(tmp_path, capsys, value, fault):
    for number in range(6):
        write(tmp_path / "data", number, np.full((SIDE, SIDE), value, np.uint8))
    words = ["data=folder", f"data.root={tmp_path / 'data'}", "image_size=64"]
    code, out, _ = command(capsys, *words, "data.allow_empty_masks=true")
    assert code == 1
    assert out.startswith("data=folder: 6 images, NOT usable: see its masks\n")
    assert f"  data=folder: {fault}\n" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.root=absent"], "data.root=absent: no such folder"),
        (["--sheet", str(CHECKOUT / "sheet.png")], "is in kdsweep's checkout; the pictures show patients"),
        (["--sheet", "/proc/sheet.png"], "--sheet /proc/sheet.png: cannot be written"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(root, capsys, words, line):
    default = [] if words[0].startswith("data.root") else [f"data.root={root}"]
    code, _, err = command(capsys, "data=folder", "image_size=64", *default, *words)
    assert code == 1
    assert line in err
    assert err.count("\n") == 1
    assert not (CHECKOUT / "sheet.png").exists()


def account(lesions, *, sides=None):
    """An account of images that are not there."""
    sides = sides or [300] * len(lesions)
    entries = [Entry(f"{number:03d}", "unknown", None, ()) for number in range(len(lesions))]
    measured = [Measured(side, side, share, share, 255) for side, share in zip(sides, lesions, strict=True)]
    return Account("any", entries, measured, image_size=224)


def test_the_sheet_shows_doubts_first_then_extremes_then_a_fixed_random_choice():
    lesions = [0.10 + number / 1000 for number in range(100)]
    lesions[50], lesions[60] = 0.0, 1.0
    chosen = data_sheet.choose(account(lesions, sides=[100 if number > 90 else 300 for number in range(100)]))
    assert len(chosen) == data_sheet.IMAGES
    reasons = list(chosen.values())
    kinds = ["empty mask", "full mask", "enlarged to 224 pixels", data_sheet.SMALLEST, data_sheet.LARGEST]
    assert list(dict.fromkeys(reasons)) == [*kinds, data_sheet.RANDOM]
    assert [reasons.count(kind) for kind in kinds] == [1, 1, 6, 6, 6]
    numbers = {kind: [n for n, reason in chosen.items() if reason == kind] for kind in kinds}
    assert numbers[data_sheet.SMALLEST] == [0, 1, 2, 3, 4, 5]
    assert numbers[data_sheet.LARGEST] == [99, 98, 97, 90, 89, 88]
    again = account(lesions, sides=[100 if number > 90 else 300 for number in range(100)])
    assert data_sheet.choose(again) == chosen
    assert len(data_sheet.choose(account([0.1] * 5))) == 5


def test_a_contour_is_where_the_lesion_is_and_the_title_says_whose(root):
    write(root, 0, np.pad(np.full((10, 30), 255, np.uint8), ((20, 50), (15, 35))))
    entries = Folder(root).entries()
    measured = accounts.measure(entries, sizes=(64, 73), allow_empty_masks=False)
    drawn = data_sheet.draw(
        Account("mine", entries, measured, image_size=64, parts={"00": "test"}), {0: "full mask", 3: data_sheet.RANDOM}
    )
    first, second, *others = drawn.axes
    (line,) = first.get_lines()
    x, y = line.get_data()
    assert (min(x), max(x), min(y), max(y)) == (15.5, 44.5, 20.5, 29.5)  # centers of the outermost pixels
    assert first.get_title(loc="left") == "00\ntest, lesion 4.7 %"
    assert first.texts[0].get_text() == "FULL MASK, 80 x 80"
    assert second.texts[0].get_text() == "at random, 80 x 80"
    assert not any(axes.get_lines() or axes.images for axes in others)


def of_classes(folder):
    """Ten images of two classes: 1 at the left, in the last five also 3 at the right."""
    for number in range(10):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[10:30, 10:30], mask[40:50, 50:70] = 1, 3 * (number > 4)
        write(folder, number, mask)
    return folder


def test_several_classes_are_counted_each(tmp_path, capsys):
    words = ["data=folder", f"data.root={of_classes(tmp_path / 'data')}", "image_size=64"]
    code, out, _ = command(capsys, *words, "+data.classes={left: 1, right: 3}")
    assert code == 0
    assert "class left: in 10 images, 6.25 % of all pixels\nclass right: in 5 images, 1.56 % of all pixels\n" in out
    code, out, _ = command(capsys, *words, "+data.classes={left: 1, right: 3, none: 2}")
    assert code == 1
    assert "faults:\n  data=folder: no mask shows the class none; leave it out of data.classes\n" in out


def test_each_class_has_a_contour_of_its_color_and_the_legend_names_it(tmp_path):
    entries = read_as(Folder(of_classes(tmp_path)), None, {"left": 1, "right": 3}).entries()
    measured = accounts.measure(entries, sizes=(64, 73), allow_empty_masks=False)
    drawn = data_sheet.draw(Account("mine", entries, measured, image_size=64), dict.fromkeys((0, 9), data_sheet.RANDOM))
    (legend,) = drawn.legends
    shown = [(text.get_text(), line.get_color()) for text, line in zip(legend.texts, legend.get_lines(), strict=True)]
    assert shown == [("left", "#E69F00"), ("right", "#56B4E9")]
    first, second = (axes.get_lines() for axes in drawn.axes[:2])
    corners = [(line.get_color(), min(line.get_xdata()), min(line.get_ydata())) for line in second]
    assert corners == [("#E69F00", 10.5, 10.5), ("#56B4E9", 50.5, 40.5)]
    assert [line.get_color() for line in first] == ["#E69F00"]
    titles = [axes.get_title(loc="left") for axes in drawn.axes[:2]]
    assert titles == ["00\nleft 6.2 %", "09\nleft 6.2 %, right 3.1 %"]
