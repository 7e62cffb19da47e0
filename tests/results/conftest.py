"""The numbers of equal sweeps and the statistics of equal scores, computed once per process.

The tests of the tables make tables of one sweep again and again, of which few rows differ, and a row takes 0.1 s of a
CPU. What is remembered is what these functions have returned for exactly the same arguments.
"""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kdsweep.results import stats
from kdsweep.results.tables import effects, strata, table3, table4

memory: dict[tuple[object, ...], bytes] = {}  # pickles: what comes out of them may be changed


def once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """This function, computed in its first call with equal arguments; a test may have replaced the bootstrap."""

    def call(*arguments: Any, **options: Any) -> Any:
        key = (compute, stats.clustered_interval, pickle.dumps((arguments, options)))
        if key not in memory:
            memory[key] = pickle.dumps(compute(*arguments, **options))
        return pickle.loads(memory[key])

    return call


@pytest.fixture(scope="module", autouse=True)
def remembered_statistics() -> Iterator[None]:
    """Tables 3 and 4, effects and strata remember."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (table3, table4, effects, strata):
            for name in {"pair", "compare", "non_inferiority", "numbers"} & vars(module).keys():
                patch.setattr(module, name, once(getattr(module, name)))
        yield
