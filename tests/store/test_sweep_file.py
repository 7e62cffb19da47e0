"""The file of a sweep: a cell that is requested again in another form replaces the old one, and nothing else goes."""

from dataclasses import replace

import pytest

from kdsweep.config import grid
from kdsweep.config.grid import Cell
from kdsweep.store import sweep_file


def make_cell(notation="L_MSE", split=0, input_digests="a", variant=None, **settings) -> Cell:
    role = {"Student": "baseline", "Teacher": "teacher"}.get(notation, "distilled")
    return Cell(
        role, notation, split, 0, settings or {"lr": 1}, {"data": input_digests}, store=None, variant=variant or {}
    )


@pytest.fixture
def ask(tmp_path):
    """Requests cells and returns the fingerprints that the sweep then requests."""

    def ask(*cells: Cell, **more) -> set[str]:
        sweep_file.add(tmp_path, "sweep", cells=cells, teachers=[], **more)
        return {row.fingerprint for row in sweep_file.read(tmp_path, "sweep").requests.values()}

    return ask


def test_a_replaced_image_replaces_the_cell(ask):
    old, other, new = make_cell(), make_cell("H_MSE"), make_cell(input_digests="b")
    ask(old, other)
    assert ask(new) == {new.fingerprint, other.fingerprint}


def test_the_same_cell_under_another_name_of_its_data_is_one(ask):
    cell = make_cell()
    moved = replace(cell, sources={"data.root": "/elsewhere"})
    assert moved.key != cell.key
    ask(cell)
    assert ask(moved) == {cell.fingerprint}


def test_a_later_results_version_replaces_cells_of_the_same_name_and_variant(ask, monkeypatch):
    """Its settings may have further keys, so that the digest differs."""
    old = [make_cell(lr=1, variant={"train.lr": "1"}), make_cell(lr=2, variant={"train.lr": "2"}), make_cell(split=1)]
    ask(*old)
    new = make_cell(lr=1, more=1, variant={"train.lr": "1"})
    assert len(ask(new)) == 4  # of the same version it is another cell
    monkeypatch.setattr(grid, "RESULTS_VERSION", grid.RESULTS_VERSION + 1)
    newest = make_cell(lr=1, more=2, variant={"train.lr": "1"})
    assert ask(newest) == {newest.fingerprint, old[1].fingerprint, old[2].fingerprint}


def test_a_cell_requested_alone_keeps_its_variant_and_keys_add_up(ask, tmp_path):
    cell, teacher = make_cell(variant={"kd.weight": "1"}), make_cell("Teacher")
    ask(cell, teacher, swept=["kd.weight"], varied=["kd.weight", "x"], tuned=["train.lr"], command="first")
    ask(replace(cell, variant={}), swept=["a"], varied=["a", "x"], command="second")
    ask(cell, command="first")
    content = sweep_file.read(tmp_path, "sweep")
    assert content.requests[cell.key].variant == {"kd.weight": "1"}
    assert (content.swept, content.varied, content.tuned) == (["kd.weight", "a"], ["kd.weight", "x", "a"], ["train.lr"])
    assert content.commands == ["second", "first"]
    assert content.swept == ["kd.weight", "a"]
    expected = {
        tmp_path / ("teachers" if row is teacher else "cells") / replace(row, store=tmp_path).folder.name
        for row in (cell, teacher)
    }
    assert sweep_file.folders(tmp_path) == expected


def test_sweeps_are_listed_by_their_latest_request(tmp_path):
    for name in ("one", "other", "one"):
        sweep_file.add(tmp_path, name, cells=[], teachers=[])
    assert sweep_file.sweeps(tmp_path) == ["other", "one"]
    assert sweep_file.read(tmp_path, "never requested") == sweep_file.SweepFile()
