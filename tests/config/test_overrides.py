"""The overrides of a command line: what Hydra would drop or explain badly is one line with key, value and remedy."""

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import composing
import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from omegaconf import OmegaConf

from kdsweep import cli, conf_dir
from kdsweep.__main__ import user_message
from kdsweep.config import composition, identity, overrides, user_code
from kdsweep.core.errors import InputError
from kdsweep.training import build


def refusal(*words: str) -> str:
    """The line with which a configuration is refused."""
    with pytest.raises(InputError) as caught:
        composition.compose(["profile=quick", *words])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_compositions_that_the_tests_remember_are_those_of_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ["data=busi", "data.root=/x", "split=kfold"]
    for words in (["path=H", "~loss.hidden.temperature"], ["method=emkd", *data], ["profile=study", "+foo.bar=1"]):
        composition.compose_config(words)
        remembered = composition.compose_config(words)
        with monkeypatch.context() as patch:
            patch.setattr(ConfigRepository, "load_config", composing.load)
            patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", composing.merge)
            composed = composition.compose_config(words)
        assert OmegaConf.to_container(remembered) == OmegaConf.to_container(composed)
        assert OmegaConf.is_struct(remembered) == OmegaConf.is_struct(composed)


# --- what Hydra takes without a word


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "path=[L,H]",
            "path=[L,H] is a list, of which only the last option counts: run one",
        ),
        ("teacher=[resnet18]", "run one command for each, or with -m teacher=resnet18"),
        ("teacher=[resnet18,resnet]", "teacher=resnet is not an option; teacher has: basicunet, "),
        ("+experiment=[table3,methods]", "only the last option counts: run one command for each"),
        ("path=L path=H", "path=L and path=H give path twice: leave one out, or run one command for each"),
        ("profile=quick profile=study", "give profile twice: leave one out"),
        ("+experiment=table3 +experiment=table4", "+experiment=table3 and +experiment=table4 give experiment twice"),
        ("path=L ~path", "path=L and ~path give path twice: leave one out"),
        ("path=L,H", "path=L,H gives several values: -m runs one cell for each"),
        ("split=glob(s*)", "split=glob(s*) gives several values: -m runs one cell for each"),
        ("views.noise_std=0.1,0.2", "one value is a list, 'views.noise_std=[0.1,0.2]', or a text, "),
        ("method=kd path=L", "method=kd brings its paths and losses: leave path out"),
    ],
)
def test_what_hydra_drops_is_refused(words: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        composition.compose(words.split())
    assert expected in str(caught.value)


@pytest.mark.parametrize("group", sorted(overrides.group_options()))
def test_every_group_takes_one_option(group: str) -> None:
    """All groups, those that come later too."""
    for words in ([f"+{group}=[a,b]"], [f"+{group}=a", f"+{group}=b"], [f"+{group}=7"], [f"+{group}="]):
        with pytest.raises(InputError, match=rf"^\+{group}="):
            overrides.check(words, multirun=True)


def test_a_key_that_is_typed_twice_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = composition.compose(["train.lr=1", "seed=1", "seed=1", "train.lr=2"])
    assert cfg.train.lr == 2
    assert capsys.readouterr().err == "kdsweep: train.lr=1 and train.lr=2 give train.lr twice: the last one counts\n"


@pytest.mark.parametrize(
    "words",
    [
        ["path=L,H", "loss=mse,kld", "views.noise_std=[0.1,0.2]", "train.lr=1e-3,1e-4", "hydra.launcher.plan=true"],
        ["path='L'", "+experiment=table3", "profile=quick", "profile=quick", "~tracking", "hydra/launcher=basic"],
        ["method=none,cwd", "path=L", "split=s0,kfold", "data.root='a,b'", "seed=range(0,3)"],
    ],
)
def test_what_a_sweep_may_have_is_left_as_it_is(words: list[str]) -> None:
    assert overrides.check(words, multirun=True) == words


# --- errors of Hydra, OmegaConf and pydantic


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("seed=null", "seed=null is not allowed: it must be a valid integer"),
        ("precision=fp16", "precision=fp16 is not allowed: it must be 'fp32', 'tf32' or 'bf16'"),
        ("weights=7", "weights=7 is not allowed: it must be a valid string; quotes within quotes"),
        ("train.epochs=0 kd.ratio=-1", "train.epochs=0 is not allowed"),
        ("data=busi data.root=x data.source.include_normal=maybe", "=maybe is not allowed: it must be a valid boolean"),
        ("experiment=mine", "experiment is not set by default: put + before it, +experiment=..."),
        ("+experiment=tabel4", "experiment=tabel4 is not an option; experiment has: capacity, cpu_study"),
        (
            "train.lrr=1",
            "train.lrr is not a key of the configuration; do you mean train.lr? train has: epochs, batch_size",
        ),
        ("trian.lr=1", "trian.lr is not a key of the configuration; do you mean train.lr? it has: method"),
        ("data=busi data.roto=x", "data.roto is not a key of the configuration; do you mean data.root? data has: "),
        ("hydra.launcher.foo=1", "hydra.launcher.foo: no such key here, and none without -m"),
        ("hydra.foo=1", "hydra.foo has no such key yet: to add one put + before it"),
        ("hydra.job.chdir=maybe", "hydra.job.chdir=maybe is not allowed: Value 'maybe' is not a valid bool"),
        ("+train.lr=1", "+train.lr is not allowed: the key exists, so leave + out, train.lr=..."),
        ("path={a:1}", "path does not take that value: give its keys one by one, path.KEY=..."),
        ("kd=5", "kd does not take that value: give its keys one by one, kd.KEY=..."),
        ("kd=null", "kd does not take that value: give its keys one by one, kd.KEY=..."),
        ("loss.logits=5", "loss.logits=5 is not allowed: it must be keys with values"),
        ("seed=${teacher.seed}", "seed cannot be read: it refers to itself"),
        ("kd.ratio=${kd.temperature} kd.temperature=${kd.ratio}", "it refers to itself; give it a value"),
        ("kd.ratio=${nothing}", "kd.ratio cannot be read: Interpolation key 'nothing' not found"),
        ("kd.ratio=${foo:1}", "kd.ratio cannot be read: Unsupported interpolation type foo"),
        ("data=busi", "data.root is missing: give it on the command line, data.root=..."),
        ("sweep_name=1e3", "quotes within quotes make it text: 'sweep_name=\"...\"'"),
        ("store=true", "quotes within quotes make it text: 'store=\"...\"'"),
        ("loss", "loss is not an override: type KEY=VALUE"),
        ("=5", "=5 is not an override: type KEY=VALUE"),
        ("path=L;", "path=L; cannot be read: brackets, quotes, commas"),
        ("data=4", "data=4 is not an option; data has: busi, folder, phantom, udiat"),
        ("split=5", "split=5 is not an option; split has: file, holdout"),
        ("student=resnet18", "student=resnet18 is not an option; student has: efficientnet_lite0_1600k"),
        ("hydra/launcher=foo", "hydra/launcher=foo is not an option; hydra/launcher has: basic, lockstep"),
    ],
)
def test_an_error_is_one_line_with_key_value_and_remedy(words: str, expected: str) -> None:
    assert expected in refusal(*words.split())


def test_a_quoted_name_is_text() -> None:
    cfg = composition.compose(['sweep_name="1e3"', 'store="true"'])
    assert (cfg.sweep_name, cfg.store) == ("1e3", "true")


def test_the_message_of_a_command_is_that_of_a_configuration() -> None:
    """Hydra's exceptions, as the command gets them."""
    for words in (["train.lrr=1"], ["experiment=mine"], ["loss=foo"]):
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"), pytest.raises(Exception) as caught:
            hydra.compose("config", ["profile=quick", *words])
        assert user_message(caught.value) == refusal(*words)


# --- what _target_ names


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (
            "profile.my_loss",
            "{folder}/profile.py: profile is the name of a module of Python, which Python may take; rename",
        ),
        ("own_imports_trace.my_loss", "{folder}/trace.py: trace is the name of a module of Python"),
        ("losses", "_target_=losses is not allowed: it must be a function or class with its module, losses.NAME"),
        ("own_imports_nothing.absent", "_target_=own_imports_nothing.absent: "),
        ("kdsweep.distill.losses.nope", "_target_=kdsweep.distill.losses.nope: "),
    ],
)
def test_a_target_that_cannot_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, expected: str
) -> None:
    files = {"profile": "", "trace": "", "own_imports_trace": "import trace", "own_imports_nothing": ""}
    for name, source in files.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for cached in (user_code._user_file, user_code._find_spec):
        monkeypatch.setattr(user_code, cached.__name__, cache(cached.__wrapped__))  # another process has another path
    with pytest.raises(InputError) as caught:
        cfg = composition.compose(
            ["profile=quick", "data.count=4", f"store={tmp_path}", f"loss.logits._target_={target}"]
        )
        identity.cell(cfg)
        build.distillation(cfg, teacher="")
    assert str(caught.value).startswith(expected.format(folder=tmp_path))
    assert "HYDRA_FULL_ERROR" not in str(caught.value)


def test_an_argument_that_a_path_does_not_take_is_named() -> None:
    cfg = composition.compose(["profile=quick", "path=H", "+path.kd_path.foo=3"])
    with pytest.raises(InputError, match=r"^_target_=kdsweep\.distill\.paths\.Hidden: TypeError: .* argument 'foo'$"):
        build.distillation(cfg, teacher="")


# --- options and overrides in any order


@pytest.mark.parametrize(
    "words",
    [
        "-m path=L,H --config-dir my/conf loss=mse",
        "path=L,H -m loss=mse --config-dir my/conf",
        "path=L,H loss=mse --config-dir=my/conf --multirun",
    ],
)
def test_options_may_be_between_overrides(words: str) -> None:
    options, typed = overrides.divide(words.split())
    assert typed == ["path=L,H", "loss=mse"]
    assert [*options, *typed] == [*(word for word in words.split() if word not in typed), *typed]


def test_an_option_that_does_not_exist_is_named() -> None:
    with pytest.raises(InputError, match=r"^--plann is not an option of this command; --help"):
        overrides.divide(["-m", "--plann", "path=L"])


@pytest.mark.parametrize("command", ["score", "audit"])
def test_commands_take_options_between_overrides(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(composition, "compose", lambda words: seen.append(words) or raise_(InputError("seen")))
    option = {"score": "--store", "audit": "--out"}[command]
    assert cli.main([command, "data=folder", option, "somewhere", "data.root=X"]) == 1
    assert seen == [("data=folder", "data.root=X")]


def raise_(error: Exception) -> None:
    raise error


def test_the_options_of_hydra_are_those_that_divide_expects() -> None:
    """A later Hydra with other names for them would break it."""
    parser = overrides.get_args_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    assert {"multirun", "config_dir", "overrides"} <= {action.dest for action in parser._actions}


def test_a_list_of_teachers_becomes_an_ensemble() -> None:
    expanded = overrides.with_ensembles(["path=L", "teacher=[a,b, b]", "teacher.lr=1"])
    members = ["+teacher@teacher.ensemble.b=b", "+teacher@teacher.ensemble.b_3=b"]
    assert expanded == ["path=L", "teacher=a", *members, "teacher.lr=1"]
    settings = composition.compose(["teacher=[resnet18,resnet34,resnet18]", "teacher.ensemble.resnet18.seed=5"])
    assert {name: (each.teacher.name, each.teacher.seed) for name, each in settings.members.items()} == {
        "teacher": ("resnet18", 0),
        "resnet34": ("resnet34", 0),
        "resnet18": ("resnet18", 5),
    }
