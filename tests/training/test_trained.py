"""A Teacher that comes trained: read, scored on the test images, distilled from; never trained here."""

import shutil

import pandas as pd
import pytest
import torch
from small import STUDENT, TEACHER

from kdsweep.config import composition, identity, inputs
from kdsweep.core.errors import InputError
from kdsweep.core.files import without_folders
from kdsweep.results import notes
from kdsweep.results.tables import table4
from kdsweep.store import cell_folder
from kdsweep.sweep import plan, rehearsal
from kdsweep.tracking import reader, sync
from kdsweep.training import build, group

TRAINING = ["train.batch_size=8", "train.epochs=1", "device=cpu", "profile=quick", "data=busi", *TEACHER, *STUDENT]
ENSEMBLE = [
    *TEACHER,
    *(override.replace("teacher.", "teacher.ensemble.resnet18.") for override in TEACHER),
]
SELF = ["teacher=student", *STUDENT]


@pytest.fixture(scope="module")
def compose(small_busi, empty_store, tmp_path_factory):
    store = tmp_path_factory.mktemp("trained") / "store"
    shutil.copytree(empty_store, store)

    def make(*overrides):
        chosen = {override.partition("=")[0] for override in overrides}
        fixed = [each for each in TRAINING if each.partition("=")[0] not in chosen]
        if "teacher=student" in overrides:
            fixed = [each for each in fixed if not each.startswith("teacher.")]
        return composition.compose([*fixed, f"data.root={small_busi}", f"store={store}", *overrides])

    return make


def run(*configs):
    jobs = [plan.Job(settings, identity.cell(settings)) for settings in configs]
    plan.watch(jobs)
    rehearsal.check(jobs)
    try:
        return group.run_group(jobs)
    finally:
        sync.close_all()


@pytest.fixture(scope="module")
def file(compose, tmp_path_factory):
    """Return the file of a Teacher as Lightning saves it, trained elsewhere."""
    network = build.teacher_network(compose(), weights="none")
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    file = tmp_path_factory.mktemp("teachers") / "fold0.pt"
    torch.save({"state_dict": state, "epoch": 3}, file)
    return file


def test_its_weights_are_scored_and_distilled_from(compose, file):
    settings = compose("path=L", f"teacher.trained={file}")
    assert not [result for result in run(settings) if isinstance(result, Exception)]
    teacher = identity.cell(settings).teacher
    trained = build.teacher_network(compose(), weights="none").state_dict()
    kept = build.teacher_network(compose(), weights=str(teacher.folder / "teacher.safetensors")).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in trained.items())
    record = cell_folder.read(teacher.folder)
    assert (record.status, record.history, record.epochs) == ("FINISHED", [], 0)
    scores = pd.read_csv(teacher.folder / cell_folder.SCORES)
    assert record.values["test/dice"] == pytest.approx(scores["dice"].mean())
    sweep = reader.read_sweep(store=teacher.store, uri=None, name=None)
    (row,) = table4.numbers(sweep).query("notation == 'Teacher'").to_dict("records")
    assert row["mean_dice_percent"] == pytest.approx(100 * scores["dice"].mean())
    assert "fold0.pt serves all splits: it may have been trained on test images" in "".join(notes.provenance(sweep))
    assert "fold0.pt (SHA-256" in "".join(notes.provenance(sweep))


def test_keys_of_training_do_not_make_another_teacher(compose, file, tmp_path):
    trained = f"teacher.trained={file}"
    one = identity.teacher_cell(compose("path=L", trained))
    same = ["teacher.lr=0.5", "teacher.seed=7", "train.epochs=2", "teacher_aug=strong", "views.shift=0.3"]
    for override in same:
        assert identity.teacher_cell(compose("path=L", trained, override)).fingerprint == one.fingerprint, override
    moved = shutil.copy(file, tmp_path / f"fold{0}.pt")
    pattern = f'teacher.trained="{tmp_path}/fold{{split}}.pt"'
    assert identity.teacher_cell(compose("path=L", pattern)).fingerprint == one.fingerprint
    state = torch.load(moved, weights_only=True)
    torch.save({**state, "state_dict": {name: 2 * value for name, value in state["state_dict"].items()}}, moved)
    assert identity.teacher_cell(compose("path=L", pattern)).fingerprint != one.fingerprint
    assert (
        identity.cell(compose("path=L", pattern)).fingerprint != identity.cell(compose("path=L", trained)).fingerprint
    )


def test_a_finished_student_teaches_its_like(compose):
    (student,) = run(alone := compose("path=none"))
    settings = compose("path=H", "loss=mse", *SELF, 'teacher.trained="run:Student/split{split}"')
    (result,) = run(settings)
    assert isinstance(result, float)
    teacher = cell_folder.read(identity.cell(settings).teacher.folder)
    assert teacher.values["test/dice"] == student
    assert identity.cell(alone).folder.name.startswith("Student-split0-seed0-")
    by_folder = compose("path=H", *SELF, f"teacher.trained=run:{identity.cell(alone).folder.name}")
    assert identity.teacher_cell(by_folder).fingerprint == identity.teacher_cell(settings).fingerprint


def test_an_ensemble_is_the_mean_of_its_members_and_shares_them(compose):
    both = compose("path=L", "loss=mse", "teacher=[resnet18,resnet18]", "teacher.ensemble.resnet18.seed=1", *ENSEMBLE)
    results = run(both, compose("path=L", "teacher=resnet18"))  # which learns from a member, in the same group
    assert all(isinstance(result, float) for result in results)
    ensemble = identity.cell(both).teacher
    assert cell_folder.read(ensemble.folder).history == []
    other = compose("path=L", "loss=mse", "teacher=[resnet18,resnet18]", "teacher.ensemble.resnet18.seed=2", *ENSEMBLE)
    assert identity.teacher_cell(other).fingerprint != ensemble.fingerprint
    alone = identity.teacher_cell(compose("path=L", "teacher=resnet18"))
    assert alone.fingerprint == ensemble.members["teacher"].fingerprint
    assert cell_folder.read(alone.folder).status == "FINISHED"
    network = group.obtain_teachers([identity.job(both)])[ensemble.fingerprint]
    members = [
        build.teacher_network(settings, weights=str(ensemble.members[name].folder / "teacher.safetensors"))
        for name, settings in both.members.items()
    ]
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probabilities = [member.eval()(images, ("logits",)).logits.double().sigmoid() for member in members]
        mean = network(images, ("logits",)).logits.double().sigmoid()
    assert not torch.allclose(*probabilities)
    torch.testing.assert_close(mean, torch.stack(probabilities).mean(dim=0), rtol=1e-5, atol=1e-7)
    sweep = reader.read_sweep(store=ensemble.store, uri=None, name=None)
    assert set(sweep.runs.query("role == 'teacher'")["fingerprint"]) >= {ensemble.fingerprint}


def test_the_file_of_a_member_is_noted_too(compose, file):
    settings = compose("path=L", "teacher=[resnet18,resnet18]", f"teacher.ensemble.resnet18.trained={file}", *ENSEMBLE)
    runs = pd.DataFrame({"role": ["distilled"], "params": [without_folders(identity.params(settings))]})
    assert "fold0.pt serves all splits: it may have been trained on test images" in notes.trained_teachers(runs)[0]
    alone = compose("path=L", "teacher=[resnet18,resnet18]", *ENSEMBLE)
    assert identity.teacher_cell(settings).fingerprint != identity.teacher_cell(alone).fingerprint


def test_an_ensemble_has_logits_alone(compose):
    with pytest.raises(InputError, match=r"with teacher.ensemble: logits"):
        compose("path=H", "teacher=[resnet18,resnet18]", *ENSEMBLE)
    with pytest.raises(InputError, match=r"teacher.ensemble.teacher is not allowed: members have other names"):
        compose("path=L", "+teacher@teacher.ensemble.teacher=resnet18")


def test_bad_ones_are_refused_before_anything_is_trained(compose, file, tmp_path):
    run(compose("path=none"))
    other = tmp_path / "other.pt"
    torch.save({"conv.weight": torch.zeros(3)}, other)
    encoder = tmp_path / "encoder.pt"
    torch.save(build.teacher_network(compose(), weights="none").encoder.state_dict(), encoder)
    module = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), module)
    cases = {
        f"{tmp_path}/none.pt": "no such file; use a .safetensors or .pt file, or run:NAME/split0",
        "run:L_KLD/split0": "that run is not in store=",
        "run:Student/split0/seed5": "that run is not in store=",
        str(other): "the file alone has conv.weight; the network alone has decoder.blocks.0",
        str(encoder): "the network alone has decoder.blocks.0",
        str(module): "holds torch.nn.modules.linear.Linear next to its tensors, which is not read",
        "run:Student/split0": "has decoder_channels=[16, 8, 8, 4, 4], not teacher.decoder_channels=[32, 16, 8, 8, 4]; ",
    }
    for trained, message in cases.items():
        with pytest.raises(InputError) as error:
            run(compose("path=L", f"teacher.trained={trained}"))
        assert message in str(error.value) and "\n" not in str(error.value), trained
    other_split = compose("path=L", "split=s1", *SELF, "teacher.trained=run:Student/split0")
    parts, seen = inputs.split_ids(other_split), set(inputs.split_ids(compose())["train"])
    count = len(seen & {*parts["validation"], *parts["test"]})
    with pytest.raises(InputError, match=f"was trained on {count} images that this split holds out, the first is "):
        run(other_split)
