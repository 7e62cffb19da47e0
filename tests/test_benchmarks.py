"""The benchmarks' own machinery: arguments, the time limit, what is written when, the script for a bare machine."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdsweep.data.loaders import EpochBatches

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.sh"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports one of the scripts, which are not modules of the package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def gpu(benchmark):
    return benchmark("gpu")


# ---- gpu.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ([], ["table4", "lockstep", "profile", "torchdistill", "tests"]),
        (["--stages", "tests,table4"], ["table4", "tests"]),
        (["--study", "data=busi"], ["study"]),
    ],
)
def test_stages_run_by_value(gpu, arguments, stages):
    assert gpu.parse(arguments)[1] == stages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "tests,all"], "--stages: unknown all; allowed are table4, lockstep"),
        (["--precisions", "fp16"], "--precisions: unknown fp16; allowed are bf16, fp32, tf32"),
        (["data=busi"], "data=busi: overrides are for --study"),
    ],
)
def test_a_wrong_argument_is_named(gpu, capsys, arguments, message):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert message in capsys.readouterr().err


def test_an_absent_distribution_is_an_answer(benchmark, monkeypatch):
    machine = benchmark("machine")
    real = machine.version

    def version(name):
        if name in ("mlflow", "torchdistill"):
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(machine, "version", version)
    versions = benchmark("bench").described(torch.device("cpu"))
    assert versions["mlflow"] == versions["torchdistill"] == "absent"
    assert versions["torch"] == real("torch")


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self):
        self.now_s = 0.0

    def monotonic(self):
        return self.now_s

    def part(self, took_s, **figures):
        def run():
            self.now_s += took_s
            if "error" in figures:
                raise ImportError(figures["error"])
            return figures

        return run


@pytest.fixture
def clock(gpu, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(gpu, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (150, ["error", "x", "x"]),
        (149, ["error", "x", "left_out"]),
        (119, ["error", "left_out", "left_out"]),
        (19, ["left_out", "left_out", "left_out"]),
    ],
)
def test_a_stage_leaves_out_what_would_not_end_in_time(gpu, clock, limit, expected):
    """Each part is expected to take as long as the longest before; an error in one does not touch the others."""
    session = gpu.Session(SimpleNamespace(limit=limit), Path())
    parts = {"a": clock.part(60, error="no torchdistill"), "b": clock.part(30, x=1), "c": clock.part(60, x=1)}
    written = {}
    gpu.run_stage("stage", parts, session, lambda stage, name, figures: written.update({name: figures}))
    assert [next(iter(figures)) for figures in written.values()] == expected
    assert [figures.get("took_s") for figures in written.values() if "left_out" not in figures] == [60, 30, 60][
        : 3 - expected.count("left_out")
    ]


@pytest.mark.parametrize(("limit", "rounds"), [(100, 5), (35, 2)])
def test_rounds_end_with_the_time(gpu, clock, limit, rounds):
    session = gpu.Session(SimpleNamespace(limit=limit, rounds=5), Path())
    values = itertools.count(9, -1)
    step_s = clock.part(10)
    assert session.fastest_s(lambda: step_s() or next(values)) == 10 - rounds


def test_results_are_in_out_after_each_part(gpu, monkeypatch, tmp_path):
    out = tmp_path / "new" / "gpu.json"
    out.parent.mkdir()
    out.write_text(json.dumps({"tests": {"all": {"x": 1}}, "lockstep": {"tf32": {"lockstep_s": 9}}}))

    def second():
        assert json.loads(out.read_text())["lockstep"] == {
            "bf16": {"lockstep_s": 2.0, "took_s": pytest.approx(0, abs=9)}
        }
        raise RuntimeError("broken\nin two lines")

    stages = {
        "lockstep": {"bf16": lambda: {"lockstep_s": 2.0}, "fp32": second},
        "torchdistill": {"bf16": lambda: {"one_by_one_s": 24.0}, "fp32": lambda: {"one_by_one_s": 50.0}},
    }
    monkeypatch.setattr(gpu, "parts", lambda session, stage: stages[stage])
    assert gpu.main(["--device", "cpu", "--stages", "torchdistill,lockstep", "--out", str(out)]) == 1
    results = json.loads(out.read_text())
    assert results["tests"] == {"all": {"x": 1}}  # of an earlier call
    assert results["lockstep"]["fp32"]["error"].startswith("RuntimeError: broken")
    assert results["compared"] == {
        "table4_minutes": None,
        "lockstep_times_as_fast_as_torchdistill": {"bf16": 12.0},
    }


def test_a_device_that_is_absent_is_one_line(gpu, tmp_path, capsys):
    out = tmp_path / "new" / "gpu.json"
    assert gpu.main(["--device", "cuda:99", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("device=cuda:99: PyTorch sees ")


def test_fewer_cells_of_torchdistill_give_no_sum(gpu, monkeypatch, tmp_path):
    (tmp_path / "torchdistill.json").write_text('{"workers": 4}')
    limits = []

    def step_s(bench, file, *, precision, limit_s):
        limits.append(limit_s)
        return {"L_MSE": 1.0}

    monkeypatch.setattr(gpu, "torchdistill_step_s", step_s)
    monkeypatch.setattr(gpu.Session, "bench", None)
    figures = gpu.torchdistill(gpu.Session(SimpleNamespace(limit=100), tmp_path), "bf16")
    assert "one_by_one_s" not in figures
    assert figures["left_out"] == "no time was left for 11 of 12 cells"
    assert 0 < limits[0] < 100


def test_torchdistill_may_be_absent(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "version_of", lambda _: "absent")
    session = gpu.Session(SimpleNamespace(limit=100), Path())
    assert gpu.torchdistill(session, "bf16") == {"left_out": "torchdistill is not installed"}


def event(name, device, start, end, *, annotation=False):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=span)


def test_kernels_are_neither_annotations_nor_copies_nor_waits(benchmark):
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        event("Optimizer.step#Adam.step", cuda, 0, 10e6, annotation=True),
        event("Memcpy HtoD", cuda, 8e6, 9e6),
        event("Context Sync", cuda, 8e6, 9e6),
        event("aten::conv2d", cpu, 0, 10e6),
        event("conv", cuda, 5e6, 6e6),
        event("conv", cuda, 0, 2e6),
        event("add", cuda, 1e6, 3e6),
    ]
    assert benchmark("kernels").busiest(events, steps=2, step_s=4.0) == {
        "kernels_per_step": 1.5,
        "busy_s_per_step": 2.0,
        "busy_share": 0.5,
        "longest_kernels_s": {"conv": 1.5, "add": 1.0},
    }


def test_only_files_with_tests_for_a_gpu_are_collected(gpu, tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "test_one.py").write_text(f"@pytest.mark.{'gpu'}\ndef test_x(): ...\n")
    (tmp_path / "test_other.py").write_text("import absent\n")
    assert [file.name for file in gpu.test_files(tmp_path)] == ["test_one.py"]
    assert "test_loop.py" in [file.name for file in gpu.test_files()]


@pytest.mark.parametrize(("seconds", "command", "code"), [(60, "exit 3", 3), (0.5, "sleep 60 & wait", None)])
def test_a_command_ends_with_the_time_and_its_children_too(gpu, tmp_path, seconds, command, code):
    assert gpu.run_within(seconds, ["bash", "-c", f"echo $$; {command}"], tmp_path / "log") == code
    group = int((tmp_path / "log").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(group, 0)
            subprocess.run(["sleep", "0.05"], check=True)


# ---- torchdistill_cells.py -----------------------------------------------------------------------------------------


def test_torchdistill_trains_on_the_same_batches_across_epochs(benchmark):
    cells = benchmark("torchdistill_cells")
    batches = EpochBatches(list(range(5)), batch_size=2, seed=3, split_index=1, last_batch="fill")
    keys = cells.EpochKeys(None, batches=batches)
    assert len(keys) == 6
    expected = [key for batch in itertools.islice(batches, 7) for key in batch]
    assert list(itertools.islice(keys, 14)) == expected
    assert {epoch for epoch, _ in expected} == {0, 1, 2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torchdistill_trains_in_the_precision_with_the_workers_of_the_configuration(
    benchmark, monkeypatch, tmp_path, precision
):
    cells = benchmark("torchdistill_cells")
    out, types, workers = tmp_path / "out.json", set(), []
    real, real_steps = cells.MapsLoss.forward, cells.TorchdistillCell.steps

    def forward(self, student_io_dict, *others):
        types.add(student_io_dict["."]["output"].logits.dtype)
        return real(self, student_io_dict, *others)

    def steps(self, count):
        workers.append(self.box.train_data_loader.num_workers)
        return real_steps(self, count)

    monkeypatch.setattr(cells.MapsLoss, "forward", forward)
    monkeypatch.setattr(cells.TorchdistillCell, "steps", steps)
    sizes = ["image_size=64", "teacher=resnet18", "train.batch_size=4", "data.count=25", "weights=none"]
    fixed = ["device=cpu", f"store={tmp_path}", f"precision={precision}", "train.workers=1"]
    monkeypatch.setattr(sys, "argv", ["cells", "--cells", "L_MSE", "--steps", "1", "--out", str(out), *sizes, *fixed])
    cells.main()
    result = json.loads(out.read_text())
    assert workers == [result["workers"]] == [1]
    assert list(result["cells"]) == ["L_MSE"]
    assert types == {torch.float32 if precision == "fp32" else torch.bfloat16}


# ---- gpu.sh --------------------------------------------------------------------------------------------------------

PYTHON = """#!/bin/bash
echo "$PYTHONPATH | $*" >> "$CALLS"
for word in $FAILS; do case "$*" in *"$word"*) exit 7 ;; esac; done
"""


@pytest.fixture
def script(tmp_path):
    """Runs gpu.sh with a Python that only records its calls; those with a word of ``fails`` fail."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("a.whl", "b.whl"):
        (wheels / name).touch()

    def run(*arguments, fails="", **environment):
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        stub = {"PYTHON": str(tmp_path / "python"), "CALLS": str(tmp_path / "calls"), "FAILS": fails}
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            cwd=tmp_path, env={**kept, **stub, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


@pytest.mark.parametrize("fails", ["", "install", "--stages", "install pip --stages"])
def test_each_part_runs_though_one_before_failed(script, tmp_path, fails):
    done, calls = script("--wheels", "wheels", "--out", "results", "--device", "cpu", "--", "--batch", "4", fails=fails)
    assert done.returncode == (1 if fails else 0), done.stderr
    install, machine, tests, measure = (call.partition(" | ")[2] for call in calls)
    folder, site = (calls[0].partition(" | ")[0].split(":")[each] for each in (0, 2))
    assert calls[0].startswith(f"{SCRIPT.parents[1]}:{SCRIPT.parents[1]}/kdsweep/plugins:")
    assert folder == str(SCRIPT.parents[1])
    assert not Path(site).exists()
    assert install.startswith("-m pip install --no-index --no-deps --no-compile ")
    assert install.endswith(f"--target {site} wheels/a.whl wheels/b.whl")
    assert machine.startswith("-m pip list")
    common = f"gpu.py --device cpu --out {tmp_path}/results/gpu.json --batch 4 --stages "
    assert f"{common}tests --limit " in tests
    assert f"{common}table4,lockstep,profile,torchdistill --limit " in measure
    summary = (tmp_path / "results" / "summary.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in summary] == ["install", "machine", "tests", "measure"]
    failed = {"install": [0], "--stages": [2, 3], "install pip --stages": [0, 1, 2, 3]}.get(fails, [])
    assert [number for number, line in enumerate(summary) if "exit code 7" in line] == failed
    limits = [int(call.rpartition(" ")[2]) for call in (tests, measure)]
    assert 0 < limits[0] < limits[1] < 9 * 60


def test_the_environment_holds_the_defaults(script, tmp_path):
    settings = {"KDSWEEP_OUT": "elsewhere", "KDSWEEP_DEVICE": "cpu", "KDSWEEP_MINUTES": "2"}
    done, calls = script(KDSWEEP_WHEELS="wheels", **settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "elsewhere" / "summary.txt").exists()
    assert int(calls[-1].rpartition(" ")[2]) < 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wheels", "absent"], "--wheels absent: there is no wheel in it"),
        (["--minutes", "0"], "--minutes 0: use a positive integer"),
        (["--minutes"], "--minutes needs a value"),
        (["cpu"], "unknown argument cpu"),
    ],
)
def test_a_wrong_argument_of_the_script_is_named(script, arguments, message):
    done, calls = script(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not calls
