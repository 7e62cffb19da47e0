"""Kill it anywhere, type the same command again: a short version of ``make chaos``."""

import chaos
import pytest
from small import STUDENT, TEACHER

pytestmark = pytest.mark.slow

SMALL = ["path=none,HR", "teacher_aug=weak", "profile=quick", "data=busi", "train.batch_size=8", "train.epochs=5"]
SMALL += [*TEACHER, *STUDENT]


def test_kills_come_at_the_birth_then_in_turn_and_from_the_seed():
    kills = chaos.draw(12, seed=3)
    assert kills == chaos.draw(12, seed=3) != chaos.draw(12, seed=4)
    assert [kill.number for kill in kills] == list(range(1, 13))
    assert kills[0].kind == chaos.BIRTH
    assert {kill.kind for kill in kills[1:6]} == {kill.kind for kill in kills[6:11]} == set(chaos.KINDS)
    assert all(0 <= kill.moment < 1 for kill in kills)


def test_differences_and_faults_are_named():
    before = {"table4.csv": "a", "run L/split0, status": "FINISHED, active", "run L/split0, metric m, step 1": "0.5"}
    after = {
        "run L/split0, status": "RUNNING, active",
        "run L/split0, how many": "2",
        "run L/split0, metric m, step 1": "0.5 and 0.5",
        "file cells/x/.cell.json.7.part": "there",
        "file phantoms/.making-1/a.png": "there",
        "file cells/x/cell.json": "there",
    }
    assert not list(chaos.faults(before))
    assert [fault.split(":")[0] for fault in chaos.faults(after)] == list(after)[:-1]
    named = [line.split(":")[0] for line in chaos.differences(before, after)]
    assert named == sorted(before.keys() | after.keys())
    assert not list(chaos.differences(before, before))


def test_a_sweep_killed_at_three_moments_equals_an_unbroken_one(small_busi, tmp_path, capsys):
    options = ["--kills", "3", "--seed", "1475", "--folder", str(tmp_path)]
    code = chaos.main([*options, *SMALL, f"data.root={small_busi}", "device=cpu"])
    output = capsys.readouterr().out
    assert code == 0, output
    assert "equal to the unbroken sweep" in output
