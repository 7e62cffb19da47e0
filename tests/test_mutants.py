"""The list of planted defects (`make mutants`) keeps up with the package."""

import collections

import mutants


def test_each_mutants_text_stands_once_in_its_file():
    wrong = {m.what for m in mutants.MUTANTS if (mutants.ROOT / "kdsweep" / m.file).read_text().count(m.old) != 1}
    assert wrong == set()
    assert max(collections.Counter(m.what for m in mutants.MUTANTS).values()) == 1
