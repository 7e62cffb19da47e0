"""Splits: the paper's, held out, k folds, files; groups stay together, and what cannot be divided is one line."""

import json
from collections import Counter
from pathlib import Path

import pytest

from kdsweep.config import composition, identity, inputs
from kdsweep.core.errors import InputError
from kdsweep.data import split_files, splits
from kdsweep.data.splits import PARTS, Listed, Split

IDS = [f"p{number // 3:02d}_{number:03d}" for number in range(60)]  # 20 patients of 3 images
LABELS = ["malignant" if number % 3 == 0 else "benign" for number in range(60)]
PATIENTS = [image_id[:3] for image_id in IDS]
BY_IMAGE, BY_PATIENT = Listed(IDS, LABELS), Listed(IDS, LABELS, PATIENTS)
UNLABELLED = Listed(IDS, ["unknown"] * 60)


def every(split):
    return [number for part in PARTS for number in getattr(split, part)]


def drawn(listed):
    yield from (splits.holdout(listed, index=index) for index in range(3))
    yield from (splits.kfold(listed, folds=5, fold=fold) for fold in range(5))


@pytest.mark.parametrize("listed", [BY_IMAGE, BY_PATIENT, UNLABELLED, Listed(IDS, ["unknown"] * 60, PATIENTS)])
def test_each_image_is_in_one_part_and_the_shares_are_the_papers(listed):
    for split in drawn(listed):
        assert sorted(every(split)) == list(range(60))
        assert [len(getattr(split, part)) / 60 for part in PARTS] == pytest.approx([0.64, 0.16, 0.20], abs=0.09)


def test_each_image_is_tested_once_in_k_folds():
    for listed in (BY_IMAGE, BY_PATIENT):
        folds = [splits.kfold(listed, folds=4, fold=fold) for fold in range(4)]
        assert sorted(number for split in folds for number in split.test) == list(range(60))


def test_labels_have_equal_shares_in_all_parts():
    for split in drawn(BY_IMAGE):
        for part in PARTS:
            numbers = getattr(split, part)
            assert sum(LABELS[number] == "malignant" for number in numbers) / len(numbers) == pytest.approx(
                1 / 3, abs=0.1
            )
    shares = [sum(LABELS[n] == "malignant" for n in splits.holdout(UNLABELLED, index=i).test) for i in range(8)]
    assert len(set(shares)) > 1, "without labels the shares are left to chance"


def test_no_patient_is_on_two_sides():
    for split in drawn(BY_PATIENT):
        assert splits.leaking_groups(BY_PATIENT, split) == {}
    divided = Split(train=[0, *range(3, 60)], validation=[1], test=[2])
    assert splits.leaking_groups(BY_PATIENT, divided) == {"p00": IDS[:3]}
    assert splits.leaking_groups(BY_IMAGE, divided) == {}


def test_indices_are_different_splits_and_equal_ones_are_equal():
    for listed in (BY_IMAGE, BY_PATIENT):
        drawn_splits = [splits.holdout(listed, index=index) for index in range(3)]
        assert len({tuple(split.test) for split in drawn_splits}) == 3
        assert splits.holdout(listed, index=1) == drawn_splits[1]
    assert splits.holdout(BY_IMAGE, index=0).test != splits.random_split(60, index=0).test


@pytest.mark.parametrize(
    ("listed", "held_out", "folded"),
    [
        (BY_IMAGE, [12, 10, 2, 22, 41, 23, 6], [2, 6, 7, 58, 3, 5, 20]),
        (BY_PATIENT, [6, 7, 8, 3, 4, 0, 1], [9, 10, 11, 12, 13, 0, 1]),
        (UNLABELLED, [46, 14, 19, 7, 37, 24, 45], [1, 9, 11, 3, 56, 31, 6]),
        (Listed(IDS, ["unknown"] * 60, PATIENTS), [27, 28, 29, 21, 22, 0, 1], [3, 4, 5, 6, 7, 0, 1]),
    ],
)
def test_splits_stay_what_they_are(listed, held_out, folded):
    """Numbers written down once, as for the paper's: others would silently change every result."""
    for split, expected in (
        (splits.holdout(listed, index=1), held_out),
        (splits.kfold(listed, folds=5, fold=2), folded),
    ):
        assert [*split.test[:3], *split.validation[:2], *split.train[:2]] == expected


@pytest.mark.parametrize(
    ("listed", "folds", "line"),
    [
        (Listed(IDS[:3], ["unknown"] * 3), 5, "split.folds=5 is not allowed: the data set has 3 images"),
        (Listed(IDS[:12], ["unknown"] * 12, PATIENTS[:12]), 5, "the data set has 4 groups"),
        (Listed(IDS[:12], ["malignant", *["benign"] * 11]), 5, "the data set has 1 malignant images"),
    ],
)
def test_too_few_for_the_folds_is_one_line(listed, folds, line):
    with pytest.raises(InputError, match=line):
        splits.kfold(listed, folds=folds, fold=0)


def test_as_many_folds_as_images_groups_or_images_of_a_label_are_allowed():
    for listed in (Listed(IDS[:6], ["unknown"] * 6), Listed(IDS[:18], LABELS[:18], PATIENTS[:18])):
        assert sorted(every(splits.kfold(listed, folds=6, fold=5))) == list(range(len(listed.ids)))


def test_too_few_to_divide_is_one_line():
    with pytest.raises(InputError, match="3 images cannot be divided into training, validation and test"):
        splits.holdout(Listed(IDS[:3], ["a", "b", "b"]), index=0)
    with pytest.raises(InputError, match="3 images in 1 group cannot be divided"):
        splits.holdout(Listed(IDS[:3], ["unknown"] * 3, ["p"] * 3), index=0)


def test_five_images_have_one_for_test_and_one_for_validation():
    split = splits.holdout(Listed(IDS[:5], ["unknown"] * 5), index=0)
    assert [len(getattr(split, part)) for part in PARTS] == [3, 1, 1]


# ---- files


def write_csv(file: Path, rows) -> Path:
    file.write_text("id,part\n" + "".join(f"{image_id},{part}\n" for image_id, part in rows), encoding="utf-8")
    return file


PARTED = [(image_id, ("train", "val", "test")[number % 3]) for number, image_id in enumerate(IDS)]


def test_a_csv_is_taken_as_it_is(tmp_path):
    split = split_files.read_split(BY_IMAGE, write_csv(tmp_path / "s.csv", PARTED), fold=0)
    assert [split.train, split.validation, split.test] == [list(range(start, 60, 3)) for start in range(3)]


def test_ids_are_the_same_in_each_form_of_unicode(tmp_path):
    listed = Listed([f"cafe\u0301{number}" for number in range(3)], ["unknown"] * 3)
    rows = [(f"caf\u00e9{number}", part) for number, part in enumerate(("train", "val", "test"))]
    assert split_files.read_split(listed, write_csv(tmp_path / "s.csv", rows), fold=0).test == [2]


def test_nnunets_val_is_scored_and_validation_comes_from_train(tmp_path):
    file = tmp_path / "splits_final.json"
    folds = [{"train": IDS[:48], "val": IDS[48:]}, {"train": IDS[12:], "val": IDS[:12]}]
    file.write_text(json.dumps(folds), encoding="utf-8")
    split = split_files.read_split(BY_PATIENT, file, fold=1)
    assert split.test == list(range(12))
    assert sorted(split.train + split.validation) == list(range(12, 60))
    assert len(split.validation) == pytest.approx(0.2 * 48, abs=3)
    assert splits.leaking_groups(BY_PATIENT, split) == {}
    folds[0] = {"train": IDS[:40], "val": IDS[40:50], "test": IDS[50:]}
    file.write_text(json.dumps(folds), encoding="utf-8")
    assert split_files.read_split(BY_IMAGE, file, fold=0).validation == list(range(40, 50))
    with pytest.raises(InputError, match=r"split.fold=2 is not allowed: .* has 2 folds"):
        split_files.read_split(BY_IMAGE, file, fold=2)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([*PARTED, ("p99_000", "train")], r"1 image \(p99_000\) are not in the data set"),
        (PARTED[1:], r"1 image \(p00_000\) of the data set are in no part"),
        ([*PARTED, (IDS[4], "test")], rf"1 image \({IDS[4]}\) are in two parts"),
        ([(image_id, "train") for image_id in IDS], "no image is in the part validation"),
        ([*PARTED[1:], (IDS[0], "dev")], f"part 'dev' of {IDS[0]} is not train, validation or test"),
    ],
)
def test_a_wrong_csv_is_one_line(tmp_path, rows, line):
    with pytest.raises(InputError, match=f"split.file=.*{line}") as caught:
        split_files.read_split(BY_IMAGE, write_csv(tmp_path / "s.csv", rows), fold=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("s.csv", "image,fold\na,1\n", "needs the columns id and part, it has image, fold"),
        ("s.csv", "", "needs the columns id and part, it has no row"),
        ("s.csv", "id,part\n" + "x" * 200_000, r"is not CSV \(Error: field larger than field limit"),
        ("s.csv", b"id,part\ncaf\xe9,train\n", "is not text in UTF-8 .* save it in UTF-8"),
        ("s.json", "{", "its content: Invalid JSON"),
        ("s.json", "[" * 100_000, "its content: Invalid JSON"),
        ("s.json", "null", "its content: Input should be a valid array; expected nnU-Net's list of folds"),
        ("s.json", '{"train": []}', "its content: Input should be a valid array; expected nnU-Net's list of folds"),
        ("s.json", '[{"train": null, "val": []}]', "0.train: Input should be a valid array"),
        ("s.json", '[{"train": [], "val": {"a": 1}}]', "0.val: Input should be a valid array"),
        ("s.json", '[{"train": "p00_000", "val": []}]', "0.train: Input should be a valid array"),
        ("s.json", '[{"train": [["p00_000"]], "val": []}]', "0.train.0: Input should be a valid string"),
        ("s.json", '[{"train": [null], "val": []}]', "0.train.0: Input should be a valid string"),
        ("s.json", '[{"train": [true], "val": []}]', "0.train.0: Input should be a valid string"),
        ("s.json", '[{"train": [], "val": [], "tests": []}]', "0.tests: Extra inputs are not permitted"),
        ("absent.csv", None, r"cannot be read \(No such file"),
    ],
)
def test_a_file_that_is_no_split_is_one_line(tmp_path, name, text, line):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=line) as caught:
        split_files.read_split(BY_IMAGE, tmp_path / name, fold=0)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- groups


def test_groups_come_from_a_pattern_a_file_or_a_column_next_to_the_images(tmp_path):
    assert split_files.read_groups(IDS, r"(?P<patient>p\d+)_.*", root=None) == (PATIENTS, [])
    groups = tmp_path / "groups.csv"
    groups.write_text("image,group\n" + "".join(f"{i},{g}\n" for i, g in zip(IDS, PATIENTS, strict=True)))
    assert split_files.read_groups(IDS, str(groups), root=None) == (PATIENTS, [])
    (tmp_path / "manifest").mkdir()
    manifest = tmp_path / "manifest" / "manifest.csv"
    manifest.write_text("file,woman\n" + "".join(f"benign/{i}.png,{g}\n" for i, g in zip(IDS, PATIENTS, strict=True)))
    assert split_files.read_groups(IDS, "woman", root=manifest.parent) == (PATIENTS, [])


@pytest.mark.parametrize(
    ("group", "line"),
    [
        (r"(?P<patient>q\d+)_.*", r"does not match 60 images \(p00_000, .*, \.\.\.\); it must match each complete id"),
        ("(unclosed", "is not a regular expression"),
        (r"(?:p\d+)_.*", "which part is the group"),
        ("woman", "no CSV file in .* has a column of this name"),
        ("absent.csv", r"cannot be read \(No such file"),
        ("few.csv", r"59 images .* of the data set have no group in"),
        ("other.csv", r"needs the columns id \(or image, or file\) and group, it has id, patient"),
    ],
)
def test_groups_that_are_not_there_are_one_line(tmp_path, monkeypatch, group, line):
    monkeypatch.chdir(tmp_path)
    Path("few.csv").write_text(f"id,group\n{IDS[0]},x\n")
    Path("other.csv").write_text(f"id,patient\n{IDS[0]},x\n")
    with pytest.raises(InputError, match=line):
        split_files.read_groups(IDS, group, root=tmp_path / "empty")


@pytest.mark.parametrize(
    ("ids", "rows", "expected"),
    [
        (["a", "b"], "a,1\na,2\nb,3", "has two groups for a, '1' and '2'; leave one row"),
        (["a", "b"], "a,1\na,1\nb,3", (["1", "3"], [])),
        (["a", "b"], "a,1\na,\nb,3", "has two groups for a, '1' and ''"),
        (["a", "b"], "a,1\nx/a.png,2\nb,3", "has two groups for a, '1' and '2'"),
        (["1", "2"], "benign/1.png,A\nmalignant/1.png,B\n2,C", "has two groups for 1, 'A' and 'B'"),
        (["p.1", "p"], "p.1,A\np,B", (["A", "B"], [])),  # p is the stem of p.1
        (["p.1", "p"], "p,B\np.1.png,A", (["A", "B"], [])),
        (["cafe\u0301"], "caf\u00e9,A", (["A"], [])),  # NFD in the file system, NFC in the table
        (["a"], "a,1\nb,2\nx/c.png,3", (["1"], ["b", "x/c.png"])),
    ],
)
def test_a_row_of_the_groups_file_names_one_image_and_each_image_has_one_group(tmp_path, ids, rows, expected):
    file = tmp_path / "groups.csv"
    file.write_text(f"id,group\n{rows}\n", encoding="utf-8")
    if not isinstance(expected, str):
        assert split_files.read_groups(ids, str(file), root=None) == expected
        return
    with pytest.raises(InputError) as caught:
        split_files.read_groups(ids, str(file), root=None)
    assert f"split.group={file}: {file} {expected}" in str(caught.value)


# ---- as configured


def settings(small_busi, *overrides):
    return composition.compose(["data=busi", f"data.root={small_busi}", "profile=quick", *overrides])


def test_the_papers_splits_have_the_fingerprints_of_their_index_alone(small_busi):
    cells = [identity.cell(settings(small_busi, f"split=s{index}")) for index in range(3)]
    assert [cell.split for cell in cells] == [0, 1, 2]
    assert all("split" not in cell.input_digests for cell in cells)
    assert [cell.run_name for cell in cells] == [f"L_KLD_WAug/split{index}" for index in range(3)]


def test_another_protocol_is_another_cell_and_the_same_images_are_the_same(small_busi, tmp_path):
    of = {name: settings(small_busi, f"split={name}") for name in ("s0", "holdout", "kfold")}
    assert len({identity.cell(each).fingerprint for each in of.values()}) == 3
    assert len({identity.cell(each).key for each in of.values()}) == 3
    parts = inputs.split_ids(of["kfold"])
    file = write_csv(tmp_path / "s.csv", [(image_id, part) for part, ids in parts.items() for image_id in ids])
    sorted_parts = {part: sorted(ids) for part, ids in parts.items()}
    assert inputs.split_ids(settings(small_busi, "split=file", f"split.file={file}")) == sorted_parts


def test_a_file_that_divides_groups_is_refused_unless_leakage_is_allowed(small_busi, tmp_path):
    ids = [entry.id for entry in inputs.listing(settings(small_busi)).entries]
    parts = ["train", "train", "val", "test"]
    file = write_csv(tmp_path / "s.csv", [(image_id, parts[number % 4]) for number, image_id in enumerate(ids)])
    groups = tmp_path / "groups.csv"
    groups.write_text("id,group\n" + "".join(f"{image_id},{number // 2}\n" for number, image_id in enumerate(ids)))
    overrides = ("split=file", f"split.file={file}", f"split.group={groups}")
    with pytest.raises(InputError, match=r"puts images of \d+ groups .* the first is 1 \(benign.*allow_leakage=true"):
        identity.cell(settings(small_busi, *overrides))
    allowed = settings(small_busi, *overrides, "split.allow_leakage=true")
    ungrouped = settings(small_busi, *overrides[:2])  # the same images, but its tables would not mention the leak
    assert inputs.split_ids(allowed) == inputs.split_ids(ungrouped)
    assert identity.cell(allowed).fingerprint != identity.cell(ungrouped).fingerprint
    leaking = f"as {file.name} lists them, by group ({groups.name}), although groups are on both sides"
    assert allowed.split.in_words().startswith(leaking)
    assert Counter(map(len, inputs.split_ids(allowed).values())) == Counter([13, 6, 6])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("split=s0", "split.index=3"), "split.index=3 is not allowed: the paper has 0, 1 and 2"),
        (("split=kfold", "split.fold=5"), "split.fold=5 is not allowed: split.folds=5 are counted from 0"),
        (("split=kfold", "split.folds=1"), "split.folds=1 is not allowed: it must be greater than or equal to 2"),
        (("split=file",), "split.file is missing"),
        (("split=1",), "split=1 is not an option; split has: file, holdout, kfold, s0, s1, s2"),
        (("split=kfold", "split.folds=10"), "split.folds=10 is not allowed: the data set has 9 malignant images"),
    ],
)
def test_wrong_splits_are_one_line(small_busi, overrides, line):
    with pytest.raises(InputError, match=line):
        identity.cell(settings(small_busi, *overrides))
