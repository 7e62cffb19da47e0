"""Tuning: equal budgets, no test before the choice, and a killed command that ends as an unbroken one."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import commands
import hydra
import optuna
import pandas as pd
import pytest
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext, RunMode
from small import STUBS

from kdsweep import cli, conf_dir
from kdsweep.__main__ import user_message
from kdsweep.config import composition, identity
from kdsweep.core.errors import InputError, LostError
from kdsweep.results.table import Options
from kdsweep.results.tables import command as tables
from kdsweep.results.tables import table4
from kdsweep.store import cell_folder, checkpoint, sweep_file
from kdsweep.sweep import estimate, launcher, status, tuner
from kdsweep.sweep.executors.executor import Executor
from kdsweep.tracking import reader
from kdsweep.training import build, group, lockstep, loop
from kdsweep.tuning.pruning import Pruning
from kdsweep.tuning.study import default_storage, read_studies, read_trials

SEARCH = {
    "train": {"lr": {"log": [3e-4, 1e-2]}},
    "teacher": {"lr": [1e-3, 3e-3]},
    "kd": {"weight": {"range": [0.1, 0.9]}},
}
QUICK = ["profile=quick", "data=busi", "train.batch_size=8", "train.epochs=6", "device=cpu", *STUBS]
METHODS = [["path=none"], ["path=L", "loss=kld", "teacher_aug=weak"]]
OPTIONS = {"search": SEARCH, "trials": 4, "round": 2}
NO_PRUNING = {"_target_": "optuna.pruners.NopPruner"}


class Inline(Executor):
    """An executor that does works in this process, one after the other."""

    def preview(self, jobs, *, times):
        return estimate.Preview({job.settings.device: ["cpu"] for job in jobs}, timed_on="cpu")

    def submit(self, work):
        future = Future()
        future.set_result(work.call(work.jobs))
        return future


class Never(Inline):
    """An executor that must not be used."""

    def preview(self, jobs, *, times):
        raise AssertionError("something was begun")


def launch(jobs, common=(), *, executor=None, plan=False, **options):
    """Run jobs through a tuner as Hydra's multirun would, in this process."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        common = ["+experiment=tuned", "hydra.sweeper.params=null", *common]  # the jobs are those of the call
        config = loader.load_configuration("config", common, run_mode=RunMode.MULTIRUN)
        JobRuntime.instance().set("name", "kdsweep")
        lockstep = launcher.LockstepLauncher(executor or Inline(), plan=plan)
        hydra_context = HydraContext(loader, Callbacks())
        lockstep.setup(hydra_context=hydra_context, task_function=launcher.train_cell, config=config)
        return tuner.Tuner(lockstep, tuner.Options(**options)).launch([[*common, *job] for job in jobs], 0)


def tune(root: Path, store: Path, **options) -> None:
    """Tune the two methods in a store."""
    launch(METHODS, [*QUICK, f"data.root={root}", f"store={store}"], **{**OPTIONS, **options})


def doomed(root: Path, store: Path, steps: int) -> None:
    """Tune; this process kills itself after so many training steps, with a checkpoint of some learner after each."""
    taken, step, turns = itertools.count(1), loop._step, itertools.count()

    def stepping(*args):
        step(*args)
        if next(taken) == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    def next_turn(_, learners):
        return learners[next(turns) % len(learners)] if learners else None

    loop._step, loop.CheckpointSchedule.next = stepping, next_turn
    tune(root, store)


def trials(store: Path) -> pd.DataFrame:
    """Return the trials of the sweep in a store, without what depends on time."""
    rows = read_trials(read_studies(store, "busi-quick"))
    return rows.drop(columns="seconds").sort_values(["notation", "number"], ignore_index=True)


def scores(store: Path) -> dict[str, str]:
    """Return the SHA-256 of the scores and weights of all finished cells, by the name of their folder."""
    return {
        folder.parent.name: json.loads(folder.read_text())["sha256"] for folder in sorted(store.rglob("finished.json"))
    }


@pytest.fixture(scope="module")
def unbroken(small_busi, empty_store, tmp_path_factory):
    """A store after a tuning that nothing happened to."""
    store = tmp_path_factory.mktemp("tuned") / "store"
    shutil.copytree(empty_store, store)
    tune(small_busi, store)
    return store


# --- the protocol


def test_every_method_has_the_same_number_of_trials_the_first_as_configured(unbroken):
    rows = trials(unbroken)
    assert dict(rows.groupby("notation").size()) == {"L_KLD_WAug": 4, "Student": 4, "Teacher_WAug": 4}
    first = rows[rows["number"] == 0].set_index("notation")["params"]
    assert first["Student"] == {"train.lr": 1e-3}
    assert first["L_KLD_WAug"] == {"train.lr": 1e-3, "kd.weight": 0.5}
    assert first["Teacher_WAug"] == {"teacher.lr": 1e-3}


def test_a_trial_is_pruned_at_a_rung_or_has_all_epochs(unbroken):
    rows = trials(unbroken)
    lengths = rows["dice"].map(len)
    assert set(lengths[rows["state"] == "COMPLETE"]) == {6}
    assert set(lengths[rows["state"] == "PRUNED"]) <= {1, 3}  # a sixth of six epochs, and half of them
    assert (rows["state"] == "PRUNED").any()


def test_the_choice_is_the_best_validation_dice_and_its_scores_are_of_the_same_training(unbroken):
    rows = trials(unbroken)
    sweep = reader.read_sweep(store=unbroken, uri=None, name="busi-quick-tuned")
    for notation, members in rows.groupby("notation"):
        chosen = members[members["is_chosen"]].iloc[0]
        ended = members[members["state"] == "COMPLETE"]
        assert chosen["value"] == ended["value"].max()
        run = sweep.runs[sweep.runs["notation"] == notation].iloc[0]
        assert run["val_dice"] == chosen["value"] == max(chosen["dice"])
        for key, value in chosen["params"].items():
            assert float(run["params"][key]) == value


def test_each_split_has_its_choice_and_each_seed_is_trained_with_it(small_busi, empty_store, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(empty_store, store)
    jobs = [["path=none", f"split=s{split}", f"seed={seed}"] for split in (0, 1) for seed in (0, 1)]
    options = {"search": {"train": {"lr": [1e-4, 1e-2]}}, "sampler": {"_target_": "optuna.samplers.GridSampler"}}
    common = [*QUICK, "train.epochs=2", f"data.root={small_busi}", f"store={store}"]
    launch(jobs, common, **options, trials=3, round=3, pruner={"_target_": "optuna.pruners.NopPruner"})
    rows = trials(store)
    assert dict(rows.groupby("split").size()) == {0: 3, 1: 3}, "as many trials, however many seeds there are"
    chosen = rows[rows["is_chosen"]].set_index("split")["params"]
    assert any(chosen), "a split where the configured settings lose"
    for name in ("busi-quick", "busi-quick-tuned"):
        runs = reader.read_sweep(store=store, uri=None, name=name).runs
        assert sorted(zip(runs["split"], runs["seed"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert set(runs["status"]) == {"FINISHED"}
        for split, params in zip(runs["split"], runs["params"], strict=True):
            expected = chosen[split].get("train.lr", 1e-3) if name.endswith("tuned") else 1e-3
            assert float(params["train.lr"]) == expected


def test_only_what_was_chosen_or_configured_was_tested(unbroken):
    requested = sweep_file.folders(unbroken)
    assert sweep_file.sweeps(unbroken) == ["busi-quick", "busi-quick-tuned"]
    tested = {file.parent for part in ("cells", "teachers") for file in (unbroken / part).rglob("test_scores.csv")}
    assert tested <= requested
    others = {folder.parent for folder in unbroken.rglob("cell.json")} - requested
    assert others  # trials that were not chosen
    assert not any((folder / checkpoint.CHECKPOINT).exists() for folder in others)


def test_distilled_trials_learn_from_the_chosen_teacher(unbroken):
    rows = trials(unbroken)
    chosen = rows[(rows["notation"] == "Teacher_WAug") & rows["is_chosen"]].iloc[0]["params"]["teacher.lr"]
    cells = [json.loads(file.read_text()) for file in (unbroken / "cells").glob("L_KLD*/cell.json")]
    configured = {(1e-3,), (chosen,)}
    assert {(cell["params"]["teacher.lr"],) for cell in cells} <= configured
    trained = [cell for cell in cells if cell["params"]["teacher.lr"] == chosen]
    assert len(trained) >= 4


def test_a_trial_is_not_tested_before_the_choice(small_busi, tmp_path, monkeypatch):
    """Every way to test images is closed; trials need none."""

    def refuse(*_, **__):
        raise AssertionError("a test score was computed")

    monkeypatch.setattr(lockstep, "finish", refuse)
    configs = [config(small_busi, tmp_path, lr) for lr in (1e-3, 3e-3)]
    assert all(isinstance(each, float) for each in run_trials(configs).values())


# --- one group


def config(root, store, lr, *words):
    common = [*QUICK, "train.monitor=dice", "train.patience=6", f"data.root={root}", f"store={store}", *words]
    return composition.compose(["path=none", f"train.lr={lr}", *common])


def study_of(settings, *, count=0):
    """Return the study in the store of these settings, with so many trials at least."""
    store = identity.cell(settings).store
    store.mkdir(parents=True, exist_ok=True)
    storage = default_storage(store)
    study = optuna.create_study(storage=storage, study_name="study", direction="maximize", load_if_exists=True)
    study.set_user_attr("round", "8")
    study.set_user_attr("epochs", 6)
    for _ in range(count - len(study.trials)):
        study.ask()
    return study


def run_trials(configs, *, pruner=None, storage=None):
    """Train those trials of a study that have not ended; return the results by number."""
    jobs = [identity.job(settings) for settings in configs]
    states = [trial.state for trial in study_of(configs[0], count=len(jobs)).trials]
    running = {number: job for number, job in enumerate(jobs) if not states[number].is_finished()}
    trials = {job.cell.folder: [("study", number)] for number, job in running.items()}
    pruning = Pruning(storage or default_storage(jobs[0].cell.store), pruner or {}, trials)
    results = group.run_trials(list(running.values()), pruning=pruning)
    return dict(zip(running, results, strict=True))


def curve(cfg):
    return [row["val/dice"] for row in cell_folder.read(identity.cell(cfg).folder).history]


def test_other_trials_never_change_a_trials_curve(small_busi, tmp_path):
    rates = (1e-3, 3e-3, 1e-2)
    together = [config(small_busi, tmp_path / "a", lr) for lr in rates]
    backwards = [config(small_busi, tmp_path / "b", lr) for lr in reversed(rates)]
    run_trials(together)
    run_trials(backwards)
    alone = config(small_busi, tmp_path / "c", rates[1])
    run_trials([alone], pruner=NO_PRUNING)
    assert [curve(cfg) for cfg in together] == [curve(cfg) for cfg in reversed(backwards)]
    assert curve(together[1]) == curve(alone)[: len(curve(together[1]))]
    assert sorted(len(curve(cfg)) for cfg in together) != [6, 6, 6]  # one at least was pruned
    seconds = cell_folder.read(identity.cell(alone).folder).seconds
    assert len(seconds) == len(curve(alone)) == 6
    assert all(each > 0 for each in seconds)


def test_a_trial_that_fails_counts_as_failed_and_the_others_continue(small_busi, tmp_path):
    configs = [config(small_busi, tmp_path, lr) for lr in (1e-3, 1e38, 3e-3)]
    first, failed, last = run_trials(configs).values()
    assert isinstance(first, float)
    assert isinstance(last, float)
    assert isinstance(failed, Exception)
    assert 6 in (len(curve(configs[0])), len(curve(configs[2])))


def test_a_group_that_was_stopped_resumes_from_what_the_storage_and_the_checkpoints_hold(
    small_busi, tmp_path, monkeypatch
):
    """Stopped at each step of three trials: the same reports, ends and values as of a group that was not."""
    rates, step = (1e-3, 3e-3, 1e-2), loop._step
    unbroken = [config(small_busi, tmp_path / "unbroken", lr) for lr in rates]
    broken = [config(small_busi, tmp_path / "broken", lr) for lr in rates]
    results = run_trials(unbroken)
    for last in (4, 9, 13):
        taken = itertools.count(1)

        def stepping(*args, taken=taken, last=last):
            if next(taken) == last:
                raise KeyboardInterrupt
            step(*args)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(loop, "_step", stepping)
            run_trials(broken)
    for number, value in run_trials(broken).items():
        assert value == results[number]
    ends = [[(each.state, each.intermediate_values) for each in study_of(of[0]).trials] for of in (unbroken, broken)]
    assert ends[0] == ends[1]
    assert [curve(settings) for settings in broken] == [curve(settings) for settings in unbroken]


def test_a_group_that_was_stopped_while_it_decides_decides_before_it_trains(small_busi, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    configs = [config(small_busi, tmp_path, lr) for lr in (1e-3, 3e-3, 1e-2)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "tell", stop)
        run_trials(configs)
    assert [len(curve(settings)) for settings in configs] == [1, 1, 1]
    run_trials(configs)
    assert sorted(len(curve(settings)) for settings in configs) == [1, 1, 6]


def test_a_storage_that_fails_ends_the_group_and_no_trial(small_busi, tmp_path):
    configs = [config(small_busi, tmp_path, lr) for lr in (1e-3, 3e-3)]
    with pytest.raises(InputError, match=r"^hydra\.sweeper\.storage=.* cannot be used"):
        run_trials(configs, storage="sqlite:////no/such/folder/optuna.db")
    assert not list(tmp_path.rglob("failed.json"))
    assert [trial.state.name for trial in study_of(configs[0]).trials] == ["RUNNING"] * 2


# --- killed and resumed


@pytest.mark.slow
def test_a_tuning_killed_again_and_again_ends_as_an_unbroken_one(small_busi, empty_store, unbroken, tmp_path):
    """The same trials, the same decisions, the same scores: after kills in each of its phases."""
    store, kills = tmp_path / "store", []
    shutil.copytree(empty_store, store)
    for steps in (9, 40, 30):  # among the Teacher's trials, among the Students', and later
        process = commands.process(doomed, small_busi, store, steps)
        process.start()
        process.join(120)
        kills.append(process.exitcode)
    assert kills == [-signal.SIGKILL] * 3
    tune(small_busi, store)
    pd.testing.assert_frame_equal(trials(store), trials(unbroken))
    assert scores(store) == scores(unbroken)


def test_a_tuning_that_has_ended_does_nothing_more_than_read(small_busi, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_step", lambda *_: pytest.fail("something was trained"))
    before = trials(unbroken)
    tune(small_busi, unbroken)
    pd.testing.assert_frame_equal(trials(unbroken), before)


def test_a_second_command_on_the_same_sweep_is_refused(small_busi, unbroken):
    with tuner._held(unbroken, "busi-quick"), pytest.raises(InputError, match="busi-quick is being tuned by another"):
        tune(small_busi, unbroken)


def test_a_group_whose_process_dies_resumes_in_halves(small_busi, empty_store, tmp_path):
    class Dying(Inline):
        has_died = False

        def submit(self, work):
            if self.has_died or len(work.jobs) == 1:
                return super().submit(work)
            self.has_died, future = True, Future()
            future.set_exception(LostError("its process ended early, killed by SIGKILL"))
            return future

    store = tmp_path / "store"
    shutil.copytree(empty_store, store)
    tune(small_busi, store, executor=Dying())
    rows = trials(store)
    assert len(rows) == 12
    assert "FAIL" not in set(rows["state"])


# --- what is shown


def test_the_table_says_what_tuning_changed(unbroken, tmp_path):
    sweep = reader.read_sweep(store=unbroken, uri=None, name="busi-quick")
    text = tables.write(tables.make("tuned", sweep, Options(unbroken)), name="tuned", sweep=sweep, out=tmp_path)
    rows = pd.read_csv(tmp_path / "tuned.csv").set_index("notation")
    assert list(rows.index) == ["Teacher_WAug", "Student", "L_KLD_WAug"]
    assert list(rows["trials"]) == [4, 4, 4]
    before, after = (
        reader.read_sweep(store=unbroken, uri=None, name=name).scores for name in ("busi-quick", "busi-quick-tuned")
    )
    for name, side in (("configured", before), ("chosen", after)):
        mean = 100 * side.groupby("fingerprint")["dice"].mean()
        assert all(any(abs(mean - value) < 1e-9) for value in rows[f"{name}_dice_percent"])
    assert (tmp_path / "tuned.md").read_text(encoding="utf-8") == text
    assert "unknown, that takes several seeds" in text
    assert "split 0: " in rows.loc["Student", "chosen"] or "as configured" in rows.loc["Student", "chosen"]


def test_methods_with_unlike_choices_are_one_table(unbroken):
    """What was chosen differs between methods (and splits), and makes neither variants nor a mixed sweep."""
    sweep = reader.read_sweep(store=unbroken, uri=None, name="busi-quick-tuned")
    assert set(sweep.tuned) <= {"train.lr", "teacher.lr", "kd.weight"}
    assert "train.lr" in sweep.tuned
    is_student = sweep.runs["notation"] == "Student"
    params = [
        {**each, "train.lr": "0.5"} if here else each
        for each, here in zip(sweep.runs["params"], is_student, strict=True)
    ]
    unlike = replace(sweep, runs=sweep.runs.assign(params=params))
    table = table4.numbers(unlike)
    assert "settings" not in table
    with pytest.raises(InputError, match=r"mixes train\.lr="):
        table4.numbers(replace(unlike, tuned=()))
    assert list(table.loc[table["gap"] == "", "notation"]) == ["Teacher_WAug", "Student", "L_KLD_WAug"]
    configured = reader.read_sweep(store=unbroken, uri=None, name="busi-quick")
    assert configured.tuned == ()  # there a second learning rate would be mixed in by mistake


def test_the_status_counts_and_writes_the_trials(unbroken, tmp_path, capsys):
    text, file = status.make(store=unbroken, sweep="busi-quick"), tmp_path / "trials.csv"
    assert text.startswith("tuning of sweep busi-quick: 12 of 12 trials ended: ")
    assert "Teacher_WAug split 0" in text
    arguments = ["--store", str(unbroken), "--trials", str(file)]
    assert cli.main(["status", *arguments, "--sweep", "busi-quick-tuned"]) == 0
    assert f"wrote 12 trials to {file}" in capsys.readouterr().out
    written = pd.read_csv(file).set_index(["notation", "number"])
    for _, trial in trials(unbroken).iterrows():
        row = written.loc[(trial["notation"], trial["number"])]
        assert (row["state"], row["is_chosen"]) == (trial["state"], trial["is_chosen"])
        assert (row["epochs"], row["val_dice_percent"]) == (len(trial["dice"]), pytest.approx(100 * max(trial["dice"])))
        assert row[["kd.weight", "teacher.lr", "train.lr"]].dropna().to_dict() == trial["params"]

    studies = read_studies(unbroken, "busi-quick")
    assert written["seconds"].sum() == pytest.approx(read_trials(studies)["seconds"].map(sum).sum())
    assert (written["seconds"] > 0).all()

    sweep_file.add(store := tmp_path / "store", "untuned", cells=[], teachers=[])
    assert cli.main(["status", "--store", str(store), "--trials", str(file)]) == 1
    assert f"--trials {file}: sweep untuned was not tuned" in capsys.readouterr().err
    assert cli.main(["status", "--store", str(unbroken), "--trials", str(tmp_path)]) == 1
    assert f"--trials {tmp_path}: cannot be written" in capsys.readouterr().err


def test_a_plan_counts_and_prices_the_trials_and_begins_nothing(small_busi, unbroken, tmp_path, capsys):
    tune(small_busi, unbroken, plan=True, trials=6)
    assert "18 trials, 6 of each, 12 of them done" in capsys.readouterr().out
    store = tmp_path / "store"
    tune(small_busi, store, plan=True)
    printed = capsys.readouterr().out
    assert "tuning 3 methods on 1 split: 12 trials, 4 of each" in printed
    assert "L_KLD_WAug split 0: train.lr: log 0.0003 to 0.01; kd.weight: 0.1 to 0.9" in printed
    assert "device hours of trials without pruning; nothing was started" in printed
    assert not (store / "optuna.db").exists()


def test_a_plan_prices_teachers_that_are_trained_as_configured(small_busi, tmp_path, capsys):
    """In seconds of the preview: 16 images, 1 for a Student's step, 4 for a Teacher's, 1 for its forward."""
    tune(small_busi, tmp_path, plan=True, search={"train": {"lr": SEARCH["train"]["lr"]}})
    students, forwards, teacher = 2 * 4 * 6 * 1, 2 * 6 * 1, 6 * 4
    hours = (students + forwards + teacher) / 3600
    assert f"at most {hours:.2g} device hours of trials" in capsys.readouterr().out


def test_methods_of_unlike_epochs_learn_from_one_teacher(small_busi, tmp_path):
    common = [*QUICK, f"data.root={small_busi}", f"store={tmp_path}"]
    configs = [
        composition.compose([*METHODS[1], *common, f"train.epochs={epochs}", "teacher.epochs=3", "train.patience=9"])
        for epochs in (4, 9)
    ]
    assert len({identity.teacher_cell(cfg).fingerprint for cfg in configs}) == 1
    assert build.learner(configs[0], identity.teacher_cell(configs[0])).epochs == 3
    unset = composition.compose([*METHODS[1], *common, "train.epochs=3", "train.patience=9"])
    assert identity.teacher_cell(unset).fingerprint == identity.teacher_cell(configs[0]).fingerprint


# --- bad input


def test_bad_input_is_refused_before_anything_begins(small_busi, tmp_path):
    one_measure = ".monitor=loss: all methods are chosen by one measure; give dice"
    cases = [
        ({"search": {"train.lx": [1, 2]}}, [], "train.lx is not a key of the configuration; do you mean train.lr"),
        (
            {"search": {"kd.weight": {"range": [0.1, 1.5]}}},
            [],
            "kd.weight=1.5 is not allowed: it must be a number",
        ),
        ({"search": {"train.lr": {"log": [0, 1]}}}, [], "must be a list of unlike values, or .*from above 0"),
        ({"search": {"kd.ratio": [1, 2]}}, [], "kd.ratio is used by none of Student, L_KLD_WAug"),
        ({"search": {"kd.ratio": None}}, [], "hydra.sweeper.search: all of its keys are null"),
        ({"trials": 0}, [], "hydra.sweeper.trials=0 is not allowed: it must be at least 1"),
        ({"round": 0}, [], "hydra.sweeper.round=0 is not allowed"),
        ({"pruner": "median"}, [], "hydra.sweeper.pruner=median is not allowed: it must be {KEY: VALUE"),
        ({}, ["hydra.sweeper.budget={steps: 9}"], "hydra.sweeper.budget"),
        ({}, ["train.monitor=loss"], f"train{one_measure}"),
        ({}, ["teacher.monitor=loss"], f"teacher{one_measure}"),
        ({}, ["train.patience=3"], "train.patience=3: a method would be stopped by its curve"),
        ({"search": {"kd.weight": [0.1, 0.9]}}, ["train.patience=3"], "train.patience=3: "),
        ({}, ["teacher.patience=3"], "teacher.patience=3: .* so that budgets differ; give teacher.patience=6"),
    ]
    for options, words, expected in cases:
        common = [*QUICK, f"data.root={small_busi}", f"store={tmp_path / 'store'}", *words]
        with pytest.raises((InputError, ConfigCompositionException)) as error:
            launch(METHODS, common, executor=Never(), **{**OPTIONS, **options})
        message = user_message(error.value)
        assert re.search(expected, message), message
        assert "\n" not in message
        assert not (tmp_path / "store" / "cells").exists(), expected


def test_an_ensemble_is_not_tuned(small_busi, tmp_path):
    words = [*METHODS[1], *QUICK[:4], "device=cpu", "teacher=[resnet18,resnet34]", f"data.root={small_busi}"]
    with pytest.raises(
        InputError, match=r"teacher\.lr is used by none of L_KLD_WAug; .*teacher\.lr=null leaves it out"
    ):
        launch([words], [f"store={tmp_path}"], executor=Never(), **OPTIONS)


def test_a_key_that_is_swept_and_searched_is_refused(small_busi, tmp_path):
    jobs = [[*METHODS[0], f"train.lr={lr}"] for lr in (1e-3, 1e-4)]
    with pytest.raises(InputError, match=r"train\.lr is swept by the command too"):
        launch(jobs, [*QUICK, f"data.root={small_busi}", f"store={tmp_path}"], executor=Never(), **OPTIONS)


@pytest.mark.parametrize(
    ("uri", "storage"),
    [
        ("sqlite:///x.db", "sqlite:///{cwd}/x.db"),
        ("null", "sqlite:///{cwd}/store/mlflow.db"),
        ("sqlite:///store/optuna.db", None),
        ("postgresql://u:secret@host/db", "postgresql+psycopg2://u:secret@host:5432/db"),
    ],
)
def test_one_database_for_runs_and_trials_is_refused_before_anything_is_begun(
    small_busi, tmp_path, monkeypatch, uri, storage
):
    monkeypatch.chdir(tmp_path)
    common = [*QUICK, f"data.root={small_busi}", "store=store", f"tracking.uri={uri}"]
    storage = storage and storage.format(cwd=tmp_path)
    with pytest.raises(InputError, match=r"^hydra\.sweeper\.storage=.* are one database: MLflow and Optuna") as error:
        launch(METHODS, common, executor=Never(), **{**OPTIONS, "storage": storage})
    assert "secret" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_of_another_space_is_refused(small_busi, unbroken):
    with pytest.raises(InputError, match="has trials with another space"):
        tune(small_busi, unbroken, search={**SEARCH, "train": {"lr": [1e-3, 2e-3]}})


def test_students_that_learned_from_another_teacher_are_refused(unbroken, small_busi, tmp_path):
    """With more trials another Teacher may be chosen: its Students' trials are not those of before."""
    store = tmp_path / "store"
    shutil.copytree(unbroken, store)
    studies = read_studies(store, "busi-quick")
    distilled = next(study for study in studies if study.user_attrs["notation"] == "L_KLD_WAug")
    distilled.set_user_attr("Teacher", "teacher.lr=0.5")
    with pytest.raises(InputError, match=r"has trials with another Teacher \(teacher\.lr=0\.5, now "):
        tune(small_busi, store, trials=6)


def test_the_status_is_that_of_the_tuning_that_runs(unbroken):
    with tuner._held(unbroken, "busi-quick"):
        assert status.make(store=unbroken, sweep=None).startswith("tuning of sweep busi-quick: 12 of 12")


def test_a_single_run_does_not_tune(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kdsweep", "+experiment=tuned"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "kdsweep: error: hydra.sweeper.search tunes sweeps: add -m, or leave it out\n"


def test_a_launcher_that_trains_no_groups_is_refused():
    with pytest.raises(InputError, match="needs hydra/launcher=lockstep"):
        tuner.tuned(None, {"search": SEARCH})
