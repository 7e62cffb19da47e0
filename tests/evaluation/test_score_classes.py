"""Scores of K classes: each is that of its region alone, an image's the mean over the classes that it has."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
from torch import Tensor
from torchmetrics.functional.segmentation import dice_score

from kdsweep.core.device import Compute
from kdsweep.data.loaders import EvalPart
from kdsweep.evaluation import metrics, scoring
from kdsweep.models.networks import Network, Outputs

NAMES = ("benign", "malignant", "cyst")
SECOND_OPINION = {"dice": f1_score, "iou": jaccard_score, "precision": precision_score, "sensitivity": recall_score}


def class_maps(count: int, *, seed: int, size: tuple[int, int] = (24, 32)) -> Tensor:
    """(N, 1, H, W) uint8: smooth random regions of three classes on background."""
    noise = torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 7, stride=1, padding=3)
    return smooth.argmax(dim=1, keepdim=True).byte()


def pair() -> tuple[Tensor, Tensor]:
    """Predictions and masks of eight images; some lack classes: in one, in the other, in both, or all of them."""
    prediction, mask = class_maps(8, seed=0), class_maps(8, seed=1)
    prediction[1][prediction[1] == 2] = 0
    mask[2][mask[2] == 2] = 0
    for maps in (prediction, mask):
        maps[3][maps[3] >= 2] = 0
        maps[4] = 0
    prediction[5] = 0
    mask[6] = 0
    return prediction, mask


def per_image(prediction: Tensor, mask: Tensor) -> dict[str, np.ndarray]:
    return metrics.per_image(prediction=prediction, mask=mask, nsd_tolerance_px=2.0, class_names=NAMES)


def logits_of(classes: Tensor) -> Tensor:
    """Logits (N, 4, H, W) whose largest is at these classes."""
    noise = torch.rand(len(classes), 4, *classes.shape[2:], generator=torch.Generator().manual_seed(2))
    return noise + 2 * (classes == torch.arange(4)[:, None, None])


def test_each_classs_scores_are_those_of_its_region_alone() -> None:
    prediction, mask = pair()
    result = per_image(prediction, mask)
    assert list(result) == [*metrics.SCORES, *(f"{score}_{name}" for score in metrics.SCORES for name in NAMES)]
    for index, name in enumerate(NAMES, start=1):
        one, other = prediction == index, mask == index
        alone = metrics.per_image(prediction=one, mask=other, nsd_tolerance_px=2.0)
        is_absent = ~(one | other).flatten(1).any(dim=1).numpy()
        assert is_absent.any()
        for score in metrics.SCORES:
            expected = np.where(is_absent, np.nan, alone[score])
            np.testing.assert_array_equal(result[f"{score}_{name}"], expected, err_msg=f"{score} {name}")


def test_ratios_equal_scikit_learns_per_class_and_torchmetrics_mean() -> None:
    prediction, mask = pair()
    result = per_image(prediction, mask)
    for image in range(8):
        truth, guess = mask[image].flatten().numpy(), prediction[image].flatten().numpy()
        for score, function in SECOND_OPINION.items():
            values = function(truth, guess, labels=[1, 2, 3], average=None, zero_division=0)
            present = [k for k in (1, 2, 3) if k in truth or k in guess]
            for k, name in enumerate(NAMES, start=1):
                value = result[f"{score}_{name}"][image]
                assert value == pytest.approx(values[k - 1]) if k in present else math.isnan(value), (score, image)
            expected = np.mean([values[k - 1] for k in present]) if present else 1
            assert result[score][image] == pytest.approx(expected), (score, image)
    complete = [0, 7]
    expected = dice_score(
        *(maps[complete, 0].long() for maps in (prediction, mask)),
        *(4, False),
        average="macro",
        input_format="index",
        aggregation_level="samplewise",
    )
    assert result["dice"][complete] == pytest.approx(expected.numpy(), rel=1e-5)


def test_absent_classes_as_the_docstring_says() -> None:
    prediction, mask = pair()
    result = per_image(prediction, mask)
    diagonal = math.hypot(24, 32)
    assert [result[f"dice_{name}"][3] >= 0 for name in NAMES] == [True, False, False]
    assert result["dice"][3] == result["dice_benign"][3]
    for image, perfect in ((4, True), (5, False), (6, False)):  # no lesion in both, in the prediction, in the mask
        for score in (*metrics.RATIOS, "nsd"):
            assert result[score][image] == perfect
        assert result["hd95_px"][image] == pytest.approx(0 if perfect else diagonal)
    assert np.isnan([result[f"{score}_{name}"][4] for score in metrics.SCORES for name in NAMES]).all()
    assert result["hd95_px_malignant"][1:3] == pytest.approx([diagonal] * 2)
    assert result["dice_malignant"][1:3].tolist() == [0, 0]


def test_with_one_class_the_index_maps_score_as_the_mask() -> None:
    prediction, mask = (class_maps(4, seed=seed) == 1 for seed in (3, 4))
    one = metrics.per_image(prediction=prediction, mask=mask.byte(), nsd_tolerance_px=2.0)
    named = metrics.per_image(prediction=prediction, mask=mask.byte(), nsd_tolerance_px=2.0, class_names=["lesion"])
    for score, values in one.items():
        np.testing.assert_array_equal(named[score], values)


def test_the_most_probable_class_is_predicted_and_the_first_of_equal_ones() -> None:
    classes = class_maps(3, seed=5)
    predicted = metrics.predicted(logits_of(classes))
    assert predicted.dtype == torch.uint8
    assert torch.equal(predicted, classes)
    ties = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])[:, :, None, None]
    assert metrics.predicted(ties).flatten().tolist() == [0, 0, 1]
    one = metrics.predicted(torch.tensor([[[[-1.0, 0.0, 0.25]]]]))
    assert one.dtype == torch.bool
    assert one.flatten().tolist() == [False, False, True]


def test_the_validations_dice_is_the_mean_of_the_images() -> None:
    prediction, mask = pair()
    expected = per_image(prediction, mask)["dice"].mean()
    assert metrics.mean_dice(logits=logits_of(prediction), mask=mask).item() == pytest.approx(expected, rel=1e-6)
    for image in range(8):
        one, other = prediction[image : image + 1], mask[image : image + 1]
        expected = per_image(one, other)["dice"][0]
        assert metrics.mean_dice(logits=logits_of(one), mask=other).item() == pytest.approx(expected, rel=1e-6)


def test_trivial_dice_is_that_of_the_class_with_the_highest_mean() -> None:
    _, mask = pair()
    constant = [per_image(torch.full_like(mask, index), mask)["dice"].mean() for index in (1, 2, 3)]
    assert len(set(constant)) == 3
    assert metrics.trivial_dice(mask, NAMES) == pytest.approx(max(constant))
    assert metrics.trivial_dice((mask == 1).byte()) == pytest.approx(
        metrics.overlap(prediction=torch.ones_like(mask), mask=(mask == 1))["dice"].mean()
    )


class Fixed(Network):
    """A network that answers with these logits, image by image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.queue = list(logits)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs({"logits": torch.stack([self.queue.pop(0) for _ in images])})


def test_a_table_of_scores_has_the_pixels_and_scores_of_each_class() -> None:
    prediction, mask = pair()
    ids = list("abcdefgh")
    images = torch.zeros(8, 24, 32, 3, dtype=torch.uint8)
    part = EvalPart(ids, ids, images, mask, class_names=NAMES)
    compute = Compute(device=torch.device("cpu"), precision="fp32")
    predictions = scoring.predict(Fixed(logits_of(prediction)), part, compute=compute)
    assert torch.equal(predictions, prediction)
    table = scoring.score(predictions, part, nsd_tolerance_px=2.0)
    sizes = [f"lesion_px_{name}" for name in NAMES]
    assert list(table)[:6] == ["image", "label", "lesion_px", *sizes]
    predicted = ["predicted_px", *(f"predicted_px_{name}" for name in NAMES)]
    assert list(table)[6:] == [*predicted, *per_image(prediction, mask)]
    assert table["predicted_px"].tolist() == table[predicted[1:]].sum(axis=1).tolist()
    assert table["lesion_px"].tolist() == table[sizes].sum(axis=1).tolist()
    assert table[sizes].to_numpy().tolist() == [[int((each == k).sum()) for k in (1, 2, 3)] for each in mask]
    np.testing.assert_array_equal(table["dice_cyst"], per_image(prediction, mask)["dice_cyst"])
