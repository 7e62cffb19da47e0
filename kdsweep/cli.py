"""The subcommands of ``python -m kdsweep`` as one click application.

Each command imports what it needs in its body: help, completion and a wrong option must not wait for torch or MLflow.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from kdsweep import __version__
from kdsweep.core import errors
from kdsweep.results.figures import FIGURES
from kdsweep.results.tables import TABLES

COMPLETE = "_KDSWEEP_COMPLETE"  # environment variable of click: bash_source, zsh_source or fish_source


class _Path(click.Path):
    """A path, its ~ replaced: a shell leaves the one of ``--store=~/runs``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(str(value)).expanduser()


class _List(click.ParamType):
    """Values with a comma between them."""

    def __init__(self, member: click.ParamType) -> None:
        self.member, self.name = member, f"{member.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        return [self.member.convert(part, param, ctx) for part in str(value).split(",")]


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
PATH = _Path()


def _together(*decorators: Decorator) -> Decorator:
    return lambda function: functools.reduce(lambda made, decorate: decorate(made), reversed(decorators), function)


_store = click.option("--store", type=PATH, default="multirun", help="folder of the runs")
_uri = click.option("--tracking-uri", "uri", help="MLflow server or database  [default: the one in the store]")
_name = click.option("--sweep", help="name of the sweep  [default: the last with a finished run]")
_sweep = _together(_store, _uri, _name)
_seeds = click.option("--seeds", type=_List(click.INT), help="only these seeds, such as those that are done")
_published = click.option("--published", type=PATH, multiple=True, help="file or folder of `publish`; may be repeated")
_test = click.option("--test", type=click.Choice(["ttest", "wilcoxon"]), default="ttest", help="of the differences")
_data_root = click.option("--data-root", type=PATH, help="folder of the sweep's images, if they were moved")
_run = _together(
    click.option("--run", required=True, help="NOTATION/splitK as in the tables, a folder, an MLflow run id, or best"),
    _store,
    _uri,
)


def _located(function: Callable[..., None]) -> Callable[..., None]:
    """Add options and Hydra overrides that name a sweep; the function gets its location."""

    @functools.wraps(function)
    def run(**options: Any) -> None:
        from kdsweep.results.figures import command

        named = {key: options.pop(key) for key in ("overrides", "store", "uri", "sweep", "data_root")}
        function(location=command.locate(**named), **options)

    store = click.option("--store", type=PATH, help="folder of the runs  [default: multirun]")
    return _together(click.argument("overrides", nargs=-1), store, _uri, _name, _data_root)(run)


def _out(text: str, **more: Any) -> Decorator:
    return click.option("--out", type=PATH, help=text, **more)


class _Words(click.Group):
    """Subcommands in the order of their declaration."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Words,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog="Without a word it trains cells, one per Hydra job: python -m kdsweep -m path=L,H loss=mse,kld. "
    "`python -m kdsweep -m --help` lists the configuration groups and all keys.",
)
@click.version_option(__version__, prog_name="kdsweep")
def app() -> None:
    """Run knowledge-distillation ablations: python -m kdsweep WORD [OPTIONS]."""


def _word(example: str, choices: str = "") -> Decorator:
    """Declare a function a subcommand, named as the function; its help ends with choices and an example."""
    return app.command(epilog=f"{choices}\n\nExample: python -m kdsweep {example}".strip())


@_word("status --store multirun")
@_store
@click.option("--sweep", help="name of the sweep  [default: the last that was started]")
@click.option("--trials", type=PATH, metavar="FILE.csv", help="write the trials of its tuning there too")
def status(store: Path, sweep: str | None, trials: Path | None) -> None:
    """Show how far a sweep is, and the time left."""
    from kdsweep.sweep import status

    sys.stdout.write(status.make(store=store, sweep=sweep, trials_file=trials))


@_word("tables table4 --published results/study", f"TABLES: one or more of {', '.join(TABLES)}.")
@click.argument("names", type=click.Choice(TABLES), metavar="TABLES", nargs=-1, required=True)
@_sweep
@_published
@_seeds
@_out("folder for Markdown, CSV and LaTeX  [default: STORE/tables]")
@_test
@click.option("--margin", type=float, help="points of non-inferiority  [default: the sweep's stats.margin_points]")
@click.option("--wide", is_flag=True, help="show all columns on the screen too")
def tables(names: Sequence[str], **options: Any) -> None:
    """Print the paper's tables, effects, seeds, strata and settings."""
    from kdsweep.results.tables import command

    command.show(names, **options)


@_word(
    "figures all --sweep NAME",
    "\b\nFIGURE is all, or\n" + "\n".join(f"{name:9}{text}" for name, text in FIGURES.items()),
)
@click.argument("figure", type=click.Choice([*FIGURES, "all"]), metavar="FIGURE")
@_located
@_published
@_out("folder for PNG, PDF and SVG  [default: STORE/figures]")
@click.option("--models", type=_List(click.STRING), help="figure2: notations of the models")
@click.option("--split", type=int, help="figure2: number of the split  [default: the first with most models finished]")
@click.option("--seed", type=int, help="figure2: seed of the cells  [default: likewise]")
@click.option("--count", type=int, default=1, help="figure2: test images, at even quantiles of Dice")
@click.option("--image", "ids", multiple=True, help="figure2: id of a test image instead; may be repeated")
def figures(figure: str, **options: Any) -> None:
    """Draw contours, effects, curves, each image against Student.

    OVERRIDES of Hydra may say which sweep is meant and where its images are: data=busi data.root=DIR.
    """
    from kdsweep.results.figures import command

    command.make(figure, **options)


@_word("report --sweep NAME --out report.html")
@_located
@_out("the file; one that is there is replaced  [default: STORE/reports/SWEEP.html]")
@click.option("--ui", help="address of MLflow's pages  [default: the tracking URI, or http://127.0.0.1:5000]")
@_test
@click.option("--with-images", is_flag=True, help="show Figure 2 also of images that are not phantoms")
@click.option("--with-costs/--no-costs", default=True, help="the tables whose latency is measured")
def report(**options: Any) -> None:
    """Write tables, figures and every cell as one HTML file.

    OVERRIDES of Hydra may say which sweep is meant and where its images are: data=busi data.root=DIR.
    """
    from kdsweep.results import report

    report.make(**options)


@_word("predict --run best --images scans --out masks")
@_run
@click.option("--images", type=PATH, required=True, help="folder of images of any size and mode")
@_out("folder for masks, overlays and the table", required=True)
@click.option("--device", default="cpu", help="cpu, cuda, cuda:NUMBER or auto")
@click.option("--overwrite", is_flag=True, help="write into a folder that is not empty")
def predict(**options: Any) -> int:
    """Predict masks of new images."""
    from kdsweep.export import predict

    return predict.predict(**options)


@_word("export --run HReg_MSE/split0 --out student.onnx")
@_run
@_out("ONNX file; one that is there is replaced", required=True)
@click.option("--images", type=PATH, help="folder of images to compare on  [default: the run's test images]")
@_data_root
@click.option("--register", metavar="NAME", help="make it the next version of this model in MLflow's registry")
def export(**options: Any) -> None:
    """Write a trained network as one ONNX file, with its card."""
    from kdsweep.export import onnx_file

    onnx_file.export(**options)


@_word("quantize --models Student,HReg_MSE --out int8")
@_sweep
@click.option("--models", type=_List(click.STRING), help="notations  [default: Student and the best distilled student]")
@click.option("--calibrate", type=click.IntRange(min=1), default=64, help="training images that settle the ranges")
@_data_root
@_out("folder for the ONNX files and the table", required=True)
def quantize(**options: Any) -> None:
    """Quantize Students to 8 bits; compare Dice, size and latency."""
    from kdsweep.export import quantize

    quantize.quantize(**options)


@_word("score data=folder data.root=/path/to/images")
@click.argument("overrides", nargs=-1, required=True)
@_sweep
@click.option("--name", help="what tables call the data set  [default: the folder of data=folder, else data.name]")
def score(**options: Any) -> int:
    """Score finished networks on another data set, without retraining.

    OVERRIDES of Hydra name the data set: data=folder data.root=DIR, and device=cuda.
    """
    from kdsweep.export import score

    return score.score(**options)


@_word("publish --sweep NAME --out scores.json.gz")
@_sweep
@_seeds
@_out("file, such as scores.json.gz; one that is there is replaced", required=True)
@click.option("--folds", type=PATH, metavar="FILE.json", help="write the ids of each split there, for split=file")
def publish(**options: Any) -> None:
    """Write runs and scores of each image as one file for others."""
    from kdsweep.results import published

    published.publish(**options)


@_word("data data=busi data.root=/path/to/BUSI")
@click.argument("overrides", nargs=-1)
@click.option("--sheet", type=PATH, metavar="FILE", help="contact sheet  [default: one in the user's cache]")
def data(**options: Any) -> int:
    """Check a data set: counts, faults, a contact sheet.

    OVERRIDES of Hydra name the data set and its split: data=busi data.root=DIR split=kfold.
    """
    from kdsweep.results import data_sheet

    return data_sheet.check(**options)


@_word("audit data=busi data.root=/path/to/BUSI")
@click.argument("overrides", nargs=-1, required=True)
@_out("folder for the results  [default: one in the user's cache, by data set]")
def audit(**options: Any) -> None:
    """Find near-duplicates of a data set, as groups for its splits.

    OVERRIDES of Hydra name the data set: data=busi data.root=DIR.
    """
    from kdsweep.results import audit

    audit.audit(**options)


@_word("models teacher=resnet34 image_size=128")
@click.argument("overrides", nargs=-1)
def models(overrides: Sequence[str]) -> None:
    """Show parameters, MACs and hidden shapes of the networks.

    OVERRIDES of Hydra configure them: teacher=resnet34 image_size=128.
    """
    from kdsweep.training import build

    sys.stdout.write(build.summary(overrides) + "\n")


@errors.command
def main(argv: list[str]) -> int:
    """Run a subcommand; return its exit code."""
    if COMPLETE in os.environ:
        app.main(argv, prog_name="kdsweep", complete_var=COMPLETE)
    try:
        with app.make_context("python -m kdsweep", argv) as context:
            return int(app.invoke(context) or 0)
    except click.exceptions.Exit as end:  # of --help and --version
        return end.exit_code
    except click.UsageError as error:
        errors.report(error, _line(error, word=argv[0]))
        return error.exit_code


def _line(error: click.UsageError, *, word: str) -> str:
    """Return what is wrong with a command line as one line: option, value, and where the remedy is."""
    text = " ".join(error.format_message().split()).replace("'", "").removeprefix("Invalid value for ")
    text = text.rstrip(".?").replace(". Did you mean", "; do you mean").replace(". Choose", "; choose")
    text = text[0].lower() + text[1:] if text[1].islower() else text  # not the name of an argument, such as TABLES
    return f"{text}; python -m kdsweep {word} --help shows its options"
