"""Plan and bookkeeping of large sweeps: nothing is done again for each cell that could be done once."""

import importlib
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kdsweep import conf_dir
from kdsweep.config import composition, inputs
from kdsweep.config.composition import compose_jobs
from kdsweep.results import frame
from kdsweep.store import cell_folder, sweep_file
from kdsweep.sweep import estimate, plan
from kdsweep.tracking import mirror, reader

FIXED = ["profile=quick", "device=cpu"]
VALUES = ("0.5", "null", "many words", "${kd.temperature}", "'1'")


@pytest.fixture
def sweep():
    """Hydra's loader and the configuration of a sweep."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield loader, loader.load_configuration("config", FIXED, run_mode=RunMode.MULTIRUN)


@pytest.fixture
def growth(monkeypatch):
    """The benchmark, which is no module of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("growth")


def slow(loader, config, words: list[str]):
    """As Hydra composes a job, without what the jobs of a sweep share."""
    composed = loader.load_sweep_config(config, words)
    composed.hydra.job.override_dirname = "???"
    return composed


@pytest.mark.parametrize(
    "more",
    [
        *(["loss=mse"], ["hydra.job.chdir=false", "train.lr=1e-2"], ["kd={temperature:2}"], ["sweep_name='a b'"]),
        *(["+new=1"], ["path.notation=X", "path=HR"], ["teacher=resnet34", "teacher.seed=3"], ["~retry_failed"]),
    ],
)
def test_a_job_is_composed_as_hydra_composes_it(sweep, more):
    jobs = [[*FIXED, *more, f"seed={number}", f"kd.weight={value}"] for number, value in enumerate(VALUES)]
    for words, composed in zip(jobs, compose_jobs(*sweep, jobs), strict=True):
        expected = slow(*sweep, words)
        assert OmegaConf.to_yaml(composed) == OmegaConf.to_yaml(expected)
        assert [OmegaConf.is_struct(node) for node in (composed, composed.kd, composed.hydra)] == [True] * 3
        assert OmegaConf.is_readonly(composed.hydra) == OmegaConf.is_readonly(expected.hydra)


def test_of_two_words_for_one_key_the_later_one_counts_as_with_hydra(sweep):
    words = [*FIXED, "kd.weight=0.3", "++kd.weight=0.9"]
    (composed,) = compose_jobs(*sweep, [words])
    assert composed.kd.weight == slow(*sweep, words).kd.weight == 0.9


def test_hydra_composes_once_for_all_values_of_a_key(sweep, monkeypatch):
    loader, config = sweep
    calls = []
    compose = loader.load_sweep_config
    monkeypatch.setattr(loader, "load_sweep_config", lambda *args: calls.append(1) or compose(*args))
    expected = [(number, ("L", "HR")[number % 2]) for number in range(40)]
    jobs = [[*FIXED, f"path={path}", f"seed={number}"] for number, path in expected]
    assert [(each.seed, each.path.name) for each in compose_jobs(loader, config, jobs)] == expected
    assert len(calls) == 2


def test_a_changed_copy_leaves_the_next_ones_as_they_were(sweep):
    composed = compose_jobs(*sweep, [[*FIXED, "seed=1"], [*FIXED, "seed=2"]])
    next(composed).kd.weight = 0.9
    assert next(composed).kd.weight == 0.5


def configs_of(sweep, store: Path, root: Path, count: int) -> list[DictConfig]:
    fixed = [*FIXED, f"store={store}", "data=busi", f"data.root={root}"]
    words = [[*fixed, f"path={path}", f"train.lr=0.{n}1"] for path in ("none", "L") for n in range(1, 1 + count // 2)]
    return list(compose_jobs(*sweep, words))


def jobs_of(*of) -> list[plan.Job]:
    return plan.read_jobs(configs_of(*of))


@pytest.mark.parametrize("step", ["read", "plan"])
def test_a_plan_reads_images_once_each_configuration_once_and_each_teacher_once(
    sweep, small_busi, tmp_path, monkeypatch, step
):
    calls = {"list_images": 0, "read": 0, "read_finished": 0}
    for owner, name in ((inputs, "list_images"), (composition, "read"), (cell_folder, "read_finished")):
        inner = getattr(owner, name)

        def counted(*args, inner=inner, name=name):
            calls[name] += 1
            return inner(*args)

        monkeypatch.setattr(owner, name, counted)
    inputs._listing.cache_clear()
    counts = []
    for number in (8, 16):
        before = dict(calls)
        jobs = jobs_of(sweep, tmp_path / str(number), small_busi, number)
        if step == "plan":
            before = dict(calls)
            estimate.describe(jobs, groups=plan.form_groups(jobs, devices={"cpu": ["cpu"]}), preview=None)
            plan.teachers(jobs)
        counts.append({name: calls[name] - before[name] for name in calls})
    few, many = counts
    if step == "read":
        assert many == {"list_images": 0, "read": 16, "read_finished": 16}
        assert few["list_images"] == 1
    else:
        assert few["read_finished"] == many["read_finished"] == 1  # the one Teacher
        assert few["read"] == many["read"] == 0


def test_the_stub_is_a_finished_cell_for_records_mlflow_and_tables(growth, sweep, small_busi, tmp_path, empty_store):
    (tmp_path / "mlflow.db").write_bytes((empty_store / "mlflow.db").read_bytes())
    weights = tmp_path / "weights"
    weights.write_bytes(b"no weights")
    jobs = jobs_of(sweep, tmp_path, small_busi, 2)
    made = [(job.cell, job.settings) for job in jobs] + [(cell, jobs[1].settings) for cell, _ in plan.teachers(jobs)]
    tracker = mirror.Tracker(store=tmp_path, uri=None)
    sweep_file.add(tmp_path, "busi-quick", cells=[job.cell for job in jobs], teachers=[])
    for cell, settings in made:
        growth.stub(cell, settings, weights=weights)
        assert cell_folder.read_finished(cell.folder) is not None
        tracker.sync(cell_folder.read(cell.folder), sweep="busi-quick")
    assert [job.finished is not None for job in jobs_of(sweep, tmp_path, small_busi, 2)] == [True, True]
    read = reader.read_sweep(store=tmp_path, uri=None, name=None)
    runs = frame.placed_runs(read)
    assert set(runs["status"]) == {"FINISHED"}
    why = frame.gaps(
        runs=runs,
        scored=frame.scored_images(runs=runs, scores=read.scores),
        notations=["Student", "Teacher_WAug", "L_KLD_WAug"],
    )
    assert set(why.values()) == {""}
