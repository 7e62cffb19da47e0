"""One form of each value before it is hashed, named or compared; shipped configurations keep their fingerprints."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import open_dict

from kdsweep.config import composition, identity, user_code
from kdsweep.config.grid import Cell
from kdsweep.core.errors import InputError
from kdsweep.store import sweep_file
from kdsweep.sweep import estimate, plan

RECORDED = Path(__file__).parent / "fingerprints.json"
METHODS = "kd kd_t1 cwd cwd_feature fitnet at skd ifvd dist pkd cirkd emkd spkd mgd reviewkd"
SHIPPED = [
    *("path=L", "path=L loss=mse", "path=H teacher_aug=strong", "path=HR +path.kd_path.stage=encoder.4", "path=none"),
    *(f"method={name}" for name in METHODS.split()),
    *("profile=paper", "profile=study", "profile=cpu_study split=holdout"),
    *("kd.weight=matched kd.ratio=2", "kd.temperature=4.0 kd.lambda=1", "kd.weight=0 kd.temperature=0.5"),
    "views.noise_std=[0,1] views.rotate_deg=30",
    "precision=bf16",
    "seed=3 teacher.seed=2 split=s2 train.last_batch=fill train.monitor=dice train.schedule=cosine",
    "scores.nsd_tolerance_px=1 train.patience=3 train.batch_size=8 train.epochs=5 deterministic=true",
    "teacher.lr=1e-3 teacher.epochs=3 teacher.monitor=dice train.supervised=bce_dice image_size=64 data.load_size=70",
]


def compose(words: str, store: Path) -> Any:
    lead = [] if "profile=" in words else ["profile=quick"]
    lead += [] if "data=" in words else ["data.count=8"]
    return composition.compose([*lead, "weights=none", f"store={store}", *words.split()])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store, so that the phantoms are made once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images and masks whose bytes are the same on every machine: their digest is in each fingerprint."""
    root = tmp_path_factory.mktemp("images")
    for part in ("images", "masks"):
        (root / part).mkdir()
        for number in range(20):
            pixels = bytes(255 * (64 * number < place < 96 * number) for place in range(64 * 64))
            (root / part / f"{number:02d}.pgm").write_bytes(b"P5 64 64 255\n" + pixels)
    return root


@pytest.fixture
def cell(store: Path):
    """The cell that overrides describe."""
    return lambda words: identity.cell(compose(words, store))


def test_the_fingerprints_of_shipped_configurations_are_those_that_were_recorded(store: Path, images: Path) -> None:
    """A change here computes finished cells again. To record on purpose: KDSWEEP_RECORD=1."""
    fingerprints = {}
    for words in SHIPPED:
        student: Cell = identity.cell(compose(f"{words} data=folder data.root={images}", store))
        fingerprints[words] = [each.fingerprint[:16] if each else "" for each in (student, student.teacher)]
    if os.environ.get("KDSWEEP_RECORD"):
        RECORDED.write_text(json.dumps(fingerprints, indent=1) + "\n")
    assert fingerprints == json.loads(RECORDED.read_text())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("kd.temperature=1", "kd.temperature=1.0"),
        ("kd.temperature=4", "kd.temperature=4e0"),
        ("loss.logits.temperature=2", "loss.logits.temperature=2.0"),
        ("method=kd method.terms.logits.loss.temperature=1", "method=kd method.terms.logits.loss.temperature=1.0"),
        ("method=skd method.terms.pairs.loss.granularity=2", "method=skd method.terms.pairs.loss.granularity=2.0"),
        ("method=mgd method.terms.generated.path.erased=1", "method=mgd method.terms.generated.path.erased=1.0"),
        ("method=kd method.terms.logits.weight=2", "method=kd method.terms.logits.weight=2.0"),
        ("train.lr=1e-4", "train.lr=0.0001"),
        ("kd.weight=1", "kd.weight=1.0"),
        ("views.noise_std=[0,1]", "views.noise_std=[0.0,1.0]"),
        ("data.source.seed=1", "data.source.seed=1.0"),
        ("+data.window=[0,4095]", "+data.window=[0.0,4095.0]"),
        ("+path.depth=3", "+path.depth=3.0"),
    ],
)
def test_two_spellings_of_one_number_are_one_cell(cell, store: Path, one: str, other: str) -> None:
    assert cell(one).fingerprint == cell(other).fingerprint
    assert cell(one).key == cell(other).key
    params = [
        {key: str(value) for key, value in identity.params(compose(words, store)).items()} for words in (one, other)
    ]
    assert params[0] == params[1]


def test_a_default_that_is_typed_is_the_same_cell(cell) -> None:
    usual = cell("path=HR")
    typed = ["+path.kd_path.stage=encoder.5", "train.last_batch=smaller", "train.schedule=constant"]
    typed += ["train.supervised=bce", "teacher.monitor=loss", "kd.align=warp", "kd.weight=0.5"]
    typed += ["views.flip=0", "views.contrast=0", "scores.each_epoch=true"]
    for word in typed:
        each = cell(f"path=HR {word}")
        assert (each.fingerprint, each.teacher.fingerprint) == (usual.fingerprint, usual.teacher.fingerprint), word


def test_a_file_of_weights_counts_by_its_content(cell, tmp_path: Path) -> None:
    file, copy = tmp_path / "one.safetensors", tmp_path / "copy.safetensors"
    for each in (file, copy):
        each.write_bytes(b"some weights")
    one, same = (cell(f"student.weights={each} teacher.weights={each}") for each in (file, copy))
    assert (one.fingerprint, one.teacher.fingerprint) == (same.fingerprint, same.teacher.fingerprint)
    file.write_bytes(b"other weights")
    other = cell(f"student.weights={file}")
    retrained = cell(f"teacher.weights={file}")
    assert len({each.fingerprint for each in (one, other, retrained)}) == 3
    assert one.teacher.fingerprint != retrained.teacher.fingerprint != other.teacher.fingerprint


def test_other_numbers_are_other_cells(cell) -> None:
    values = ["1", "2", "1.5", "1e16", "0.1"]
    assert len({cell(f"loss.logits.temperature={value}").fingerprint for value in values}) == len(values)


@pytest.mark.parametrize("value", ["nan", "inf", "[1,nan]"])
def test_what_is_not_a_number_is_refused_in_keys_of_the_user_too(cell, value: str) -> None:
    with pytest.raises(InputError, match=r"^loss\.logits\.temperature=.* is not allowed: it must be finite$"):
        cell(f"loss.logits.temperature={value}")


def test_a_number_without_a_fraction_is_an_integer() -> None:
    node = {"_target_": "absent_module.loss", "delta": 1.0, "huge": 1e300, "on": True, "inner": {"x": [0.0, -2.0, 0.5]}}
    expected = node | {"delta": 1, "inner": {"x": [0, -2, 0.5]}}
    assert repr(user_code.canonical(node)) == repr(expected)
    shipped = node | {"_target_": "kdsweep.distill.losses.kld_pixels", "temperature": 4, "steps": 4.0}
    made = user_code.canonical(shipped)
    assert (repr(made["temperature"]), repr(made["steps"])) == ("4.0", "4")


# --- a sweep


@pytest.fixture
def jobs(small_busi: Path, tmp_path: Path):
    """Jobs of one command line, of which Hydra gives each its overrides."""

    def make(*each: str) -> list[plan.Job]:
        configs = []
        for word in each:
            words = ["profile=quick", "data=busi", f"data.root={small_busi}", f"store={tmp_path}", word]
            cfg = composition.compose_config(words)
            with open_dict(cfg):
                cfg.hydra = {"overrides": {"task": words}, "runtime": {"choices": {}}}
            configs.append(cfg)
        return plan.read_jobs(configs)

    return make


@pytest.mark.parametrize("values", [("train.lr=1e-4", "train.lr=0.0001"), ("kd.temperature=1", "kd.temperature=1.0")])
def test_two_spellings_in_one_sweep_are_one_cell_without_a_variant(jobs, values: tuple[str, str]) -> None:
    made = jobs(*values)
    assert len(plan.unique(made)) == 1
    assert [job.cell.title for job in made] == ["L_KLD_WAug split 0 seed 0"] * 2
    assert plan.swept_keys(made) == []


def test_a_value_in_another_spelling_later_is_the_same_variant(jobs) -> None:
    first = jobs("train.lr=1e-3", "train.lr=0.01")
    swept = plan.swept_keys(first)
    sweep_file.add(
        first[0].cell.store, first[0].settings.sweep_name, cells=[job.cell for job in first], teachers=[], swept=swept
    )
    (later,) = jobs("train.lr=0.001")
    assert later.cell == first[0].cell
    assert later.cell.title == first[0].cell.title == "L_KLD_WAug split 0 seed 0 (train.lr=0.001)"


def test_the_reason_for_a_new_cell_is_the_key_that_changed(jobs, caplog: pytest.LogCaptureFixture) -> None:
    (job,) = jobs("kd.temperature=1")
    job.cell.folder.parent.mkdir()
    earlier = job.cell.folder.with_name(f"{job.cell.folder.name.rpartition('-')[0]}-0123456789")
    earlier.mkdir()
    loss = {**job.cell.settings["loss.logits"], "temperature": 1}  # as int: an older record
    settings = {**job.cell.settings, "loss.logits": loss}
    record = {"tags": {}, "started_ms": 0, "params": {}, "settings": settings, "input_digests": job.cell.input_digests}
    (earlier / "cell.json").write_text(json.dumps(record))
    with caplog.at_level(logging.INFO):
        estimate.log_changes([job])
    assert "since then this has changed: loss.logits.temperature (1 -> 1.0)" in caplog.text
    assert "Teacher" not in caplog.text.partition("since then")[2]
