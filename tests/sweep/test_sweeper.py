"""The jobs of a sweep: those of its grid, then those of the further grids."""

from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.sweeper import Sweeper

from kdsweep.core.errors import InputError

GRID = ["path=none,L", "seed=0,1", "store=here"]


def sweeper_class():
    """As Hydra has it: it loads its plugins again whenever it looks for them."""
    return next(each for each in Plugins.instance().discover(Sweeper) if each.__name__ == "LockstepSweeper")


def jobs(*also, words=GRID, batch=None):
    sweeper = sweeper_class()(batch, also=also, search=None)
    sweeper.hydra_context = SimpleNamespace(config_loader=None)
    batches = sweeper.split_arguments(OverridesParser.create().parse_overrides(words), batch)
    return [job for batch in batches for job in batch], batches


def test_a_further_grid_replaces_its_keys_and_keeps_the_others():
    made, _ = jobs("method=cwd,at path=none seed=0")
    assert made[:4] == [
        ["path=none", "seed=0", "store=here"],
        ["path=none", "seed=1", "store=here"],
        ["path=L", "seed=0", "store=here"],
        ["path=L", "seed=1", "store=here"],
    ]
    assert made[4:] == [
        ["store=here", "method=cwd", "path=none", "seed=0"],
        ["store=here", "method=at", "path=none", "seed=0"],
    ]


def test_without_further_grids_it_is_that_of_hydra():
    made, batches = jobs()
    assert [made] == sweeper_class().__base__.split_arguments(OverridesParser.create().parse_overrides(GRID), None)
    assert batches == [made]


def test_batches_are_filled_over_all_grids():
    made, batches = jobs("path=H", batch=4)
    assert [len(batch) for batch in batches] == [4, 2]
    assert made[4:] == [["seed=0", "store=here", "path=H"], ["seed=1", "store=here", "path=H"]]


def test_words_are_divided_as_a_shell_does():
    made, _ = jobs("data.root='my images'", words=["path=L"])
    assert made == [["path=L"], ["path=L", "data.root=my\\ images"]]  # as Hydra writes a blank


def test_words_that_are_none_are_refused():
    with pytest.raises(OverrideParseException):
        jobs("path=[L")
    with pytest.raises(InputError, match=r"also: path='L: No closing quotation"):
        jobs("path='L")
