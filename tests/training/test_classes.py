"""Several classes from the configuration to the scores: networks, losses, Teachers, tables."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score
from small import STUDENT, TEACHER

from kdsweep.config import composition, identity, inputs
from kdsweep.core.errors import InputError
from kdsweep.data.views import normalize
from kdsweep.results import notes
from kdsweep.results.tables import strata
from kdsweep.store import cell_folder, checkpoint
from kdsweep.sweep import plan, rehearsal
from kdsweep.tracking import reader, sync
from kdsweep.training import build, group

THREE = "+data.classes={benign: benign, malignant: malignant}"
TRAINING = ["train.batch_size=8", "train.epochs=1", "device=cpu", "profile=quick", "data=busi", *TEACHER, *STUDENT]


@pytest.fixture(scope="module")
def compose(small_busi, empty_store, tmp_path_factory):
    store = tmp_path_factory.mktemp("classes") / "store"
    shutil.copytree(empty_store, store)

    def make(*overrides):
        chosen = {override.partition("=")[0] for override in overrides}
        fixed = [each for each in (*TRAINING, f"store={store}") if each.partition("=")[0] not in chosen]
        return composition.compose([*fixed, f"data.root={small_busi}", *overrides])

    return make


def run(*configs):
    jobs = [plan.Job(settings, identity.cell(settings)) for settings in configs]
    plan.watch(jobs)
    rehearsal.preview(jobs, times=False)
    try:
        return group.run_group(jobs)
    finally:
        sync.close_all()


@pytest.fixture(scope="module")
def cells(compose):
    """Return settings of finished cells of three classes: paths of logits and maps, and methods that take masks."""
    kinds = [
        ["path=none"],
        ["path=L", "loss=kld"],
        ["path=HR", "loss=mse"],
        ["method=ifvd", "kd.weight=0.5"],
        ["method=dkd", "kd.weight=0.5"],
    ]
    settings = [compose(THREE, *kind) for kind in kinds]
    assert all(isinstance(result, float) for result in run(*settings))
    return settings


def test_scores_are_those_of_the_stored_weights_by_another_library(cells):
    for settings in cells:
        folder, part = identity.cell(settings).folder, inputs.split(settings).test
        images = inputs.images(settings)
        network = build.student_network(settings)
        checkpoint.load_network(folder / "student.safetensors", network)
        with torch.no_grad():
            logits = network.eval()(normalize(torch.from_numpy(images.eval_images[part])), ("logits",)).logits
        assert logits.shape[1] == 3
        predicted, truth = logits.argmax(dim=1).numpy(), images.eval_masks[part]
        table = pd.read_csv(folder / cell_folder.SCORES)
        for row, one, other in zip(table.to_dict("records"), predicted, truth, strict=True):
            present = np.union1d(one, other)[np.union1d(one, other) > 0]
            dices = f1_score(other.ravel(), one.ravel(), labels=present, average=None, zero_division=0)
            assert row["dice"] == pytest.approx(dices.mean(), abs=1e-6)
            named = {index: row[f"dice_{name}"] for index, name in enumerate(settings.class_names, start=1)}
            assert {index for index, dice in named.items() if not np.isnan(dice)} == set(present)
        values = cell_folder.read(folder).values
        assert values["test/dice"] == pytest.approx(table["dice"].mean())
        assert values["test/dice_benign"] == pytest.approx(table["dice_benign"].mean())


def test_a_cell_in_a_group_is_what_it_is_alone(cells, compose, tmp_path):
    alone = compose(THREE, "path=L", "loss=kld", f"store={tmp_path}")
    shutil.copytree(identity.cell(cells[1]).store / "teachers", tmp_path / "teachers")
    run(alone)
    files = [identity.cell(settings).folder / "student.safetensors" for settings in (alone, cells[1])]
    assert files[0].parent != files[1].parent
    assert files[0].read_bytes() == files[1].read_bytes()


def test_tables_name_the_measure_and_have_a_column_for_each_class(cells):
    sweep = reader.read_sweep(store=identity.cell(cells[0]).store, uri=None, name=None)
    assert any(
        note.startswith("DSC: mean over those of the classes benign, malignant") for note in notes.provenance(sweep)
    )
    table = strata.numbers(sweep).query("stratum == 'malignant' and notation == 'Student'")
    scores = pd.read_csv(identity.cell(cells[0]).folder / cell_folder.SCORES).query("label == 'malignant'")
    assert table["mean_dice_percent_malignant"].item() == pytest.approx(100 * scores["dice_malignant"].mean())


def test_the_order_of_classes_and_their_codes_make_other_cells(compose):
    orders = [THREE, "+data.classes={malignant: malignant, benign: benign}", "+data.classes={a: benign, b: malignant}"]
    prints = {identity.cell(compose(order)).fingerprint for order in orders} | {identity.cell(compose()).fingerprint}
    assert len(prints) == 4


def test_what_does_not_go_with_classes_is_refused_before_the_training(compose, cells, tmp_path):
    one_class = tmp_path / "one_class.pt"
    torch.save(build.teacher_network(compose()).state_dict(), one_class)
    cases = {
        "segmentation_head.0.bias has shape (1,), not (3,)": [THREE, "path=L", f"teacher.trained={one_class}"],
        "none of": [THREE[:-1] + ", cyst: cyst}"],
        "data.classes": ["method=dkd"],
        "has the classes benign, malignant, data.classes has one": [
            *("path=L", "teacher=student", "teacher.trained=run:Student/split0"),
            *(override.replace("student.", "teacher.") for override in STUDENT),
        ],
    }
    for message, overrides in cases.items():
        with pytest.raises(InputError) as error:
            run(compose(*overrides))
        assert message in str(error.value) and "\n" not in str(error.value)


def test_an_ensemble_has_the_mean_of_the_softmax(compose):
    both = compose(
        THREE,
        "path=L",
        "teacher=[resnet18,resnet18]",
        "teacher.ensemble.resnet18.seed=1",
        *(override.replace("teacher.", "teacher.ensemble.resnet18.") for override in TEACHER),
    )
    ensemble = build.teacher_network(both).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shares = [member(images, ("logits",)).logits.softmax(dim=1) for member in ensemble.networks.values()]
        torch.testing.assert_close(ensemble(images).logits.softmax(dim=1), torch.stack(shares).mean(dim=0))


def test_bf16_trains_too(compose):
    assert isinstance(run(compose(THREE, "path=L", "loss=kld", "precision=bf16"))[0], float)
