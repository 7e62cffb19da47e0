"""Training batches depend on (seed, split, epoch, image id) alone; complete images come in order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kdsweep.data.images import Images
from kdsweep.data.loaders import EpochBatches, TrainLoader, eval_part
from kdsweep.data.views import Strengths, Views

IMAGE_SIZE, LOAD_SIZE, COUNT = 64, 73, 10
TRAIN = [8, 1, 2, 3, 9, 5, 6]  # seven images in batches of three: 3 + 3 + 1
STRONG = Strengths(shift=0.06, scale=0.1, rotate_deg=45, noise_std=(0.01, 0.03), dropout=0.01, probability=1.0)
PLAIN = Strengths(shift=0, scale=0, rotate_deg=0, noise_std=(0, 0), dropout=0, probability=0)

Batch = dict[str, Tensor]


def images_of(ids: list[str]) -> Images:
    """Random pictures, each determined by its id; the complete picture's level at 0, 0 is its number."""
    pictures, masks, small_pictures, small_masks = [], [], [], []
    for image_id in ids:
        rng = np.random.default_rng(list(image_id.encode()))
        pictures.append(rng.integers(0, 256, (LOAD_SIZE, LOAD_SIZE, 3), dtype=np.uint8))
        masks.append(rng.integers(0, 2, (LOAD_SIZE, LOAD_SIZE), dtype=np.uint8))
        small_pictures.append(pictures[-1][:IMAGE_SIZE, :IMAGE_SIZE])
        small_masks.append(masks[-1][:IMAGE_SIZE, :IMAGE_SIZE])
    labels = ["benign" if int(image_id[-1]) % 2 else "malignant" for image_id in ids]
    arrays = map(np.stack, (pictures, masks, small_pictures, small_masks))
    return Images("random", ids, labels, *arrays, digest="")


IDS = [f"image {number}" for number in range(COUNT)]
IMAGES = images_of(IDS)


def loader(
    images: Images = IMAGES,
    *,
    indices: list[int] = TRAIN,
    strengths: Strengths = STRONG,
    seed: int = 0,
    split_index: int = 0,
    batch_size: int = 3,
    workers: int = 0,
    last_batch: str = "smaller",
) -> TrainLoader:
    return TrainLoader(
        images,
        views=Views(image_size=IMAGE_SIZE, strengths=strengths),
        batches=EpochBatches(indices, batch_size=batch_size, seed=seed, split_index=split_index, last_batch=last_batch),
        workers=workers,
    )


def epoch(made: TrainLoader, number: int) -> list[Batch]:
    return list(made.epoch(number))


def equal(first: list[Batch], second: list[Batch]) -> bool:
    """Whether two epochs are the same bit for bit."""
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def views_of_ids(images: Images, indices: list[int], batches: list[Batch]) -> dict[str, Batch]:
    """What each image id was rendered as, by the place of the weak view in its picture."""
    by_id = {}
    rows = [
        {name: values[row] for name, values in batch.items()} for batch in batches for row in range(len(batch["weak"]))
    ]
    for row in rows:
        (owner,) = [index for index in indices if _contains(images.images[index], row["weak"].numpy())]
        by_id[images.ids[owner]] = row
    return by_id


def _contains(picture: np.ndarray, crop: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(picture, crop.shape)
    corners = np.argwhere(windows[..., 0, 0, 0] == crop[0, 0, 0])
    return any(np.array_equal(windows[tuple(corner)], crop) for corner in corners)


def test_batches_have_the_promised_shapes_and_types() -> None:
    batch = next(iter(loader().epoch(0)))
    shapes = {name: (tuple(values.shape), values.dtype) for name, values in batch.items()}
    assert shapes == {
        "strong": ((3, 64, 64, 3), torch.uint8),
        "strong_mask": ((3, 64, 64), torch.uint8),
        "weak": ((3, 64, 64, 3), torch.uint8),
        "weak_mask": ((3, 64, 64), torch.uint8),
        "theta": ((3, 2, 3), torch.float32),
    }
    assert set(batch["weak_mask"].unique().tolist()) == {0, 1}


def test_each_training_image_comes_once_per_epoch_and_no_other() -> None:
    made = loader()
    for number in range(3):
        views = views_of_ids(IMAGES, list(range(COUNT)), epoch(made, number))
        assert sorted(views) == sorted(IDS[index] for index in TRAIN)


def test_the_last_partial_batch_is_kept() -> None:
    made = loader()
    assert [len(batch["weak"]) for batch in epoch(made, 0)] == [3, 3, 1]
    assert (len(made), made.image_count) == (3, 7)
    assert [len(batch["weak"]) for batch in epoch(loader(batch_size=7), 0)] == [7]
    assert len(loader(batch_size=7)) == 1


@pytest.mark.parametrize(("last_batch", "sizes"), [("smaller", [3, 3, 1]), ("drop", [3, 3]), ("fill", [3, 3, 3])])
def test_a_last_batch_is_kept_dropped_or_filled(last_batch, sizes) -> None:
    made = loader(last_batch=last_batch)
    batches = epoch(made, 4)
    assert [len(batch["weak"]) for batch in batches] == sizes
    assert len(made) == len(sizes)
    complete = epoch(loader(), 4)
    assert equal(batches[:2], complete[:2])  # the order and the views are those of every kind
    if last_batch == "fill":  # the epoch's first images, seen as they were the first time
        assert torch.equal(batches[2]["strong"], torch.cat([complete[2]["strong"], complete[0]["strong"][:2]]))
    assert equal(list(made.epoch(4, first=1)), batches[1:])
    even = loader(indices=TRAIN[:6], last_batch=last_batch)
    assert [len(batch["weak"]) for batch in epoch(even, 0)] == [3, 3]


def test_an_epoch_is_the_same_whatever_was_drawn_before() -> None:
    fresh = epoch(loader(), 3)
    used = loader()
    for number in (0, 5, 3):
        epoch(used, number)
    next(iter(used.epoch(1)))  # left in the middle, as a killed run leaves it
    assert equal(epoch(used, 3), fresh)


def test_workers_change_nothing() -> None:
    alone, helped = loader(), loader(workers=2)
    for number in (0, 2, 1):
        assert equal(epoch(helped, number), epoch(alone, number))


def test_global_random_state_changes_nothing() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    first = epoch(loader(), 0)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002 - the global state must not matter
    assert equal(epoch(loader(), 0), first)


@pytest.mark.parametrize("change", [{"seed": 1}, {"split_index": 1}, {"number": 1}])
def test_another_seed_split_or_epoch_draws_other_views_and_another_order(change: dict[str, int]) -> None:
    number = change.get("number", 0)
    arguments = {key: value for key, value in change.items() if key != "number"}
    first, second = epoch(loader(), 0), epoch(loader(**arguments), number)
    one, two = (views_of_ids(IMAGES, TRAIN, batches) for batches in (first, second))
    assert list(one) != list(two)
    assert not any(torch.equal(one[name]["strong"], two[name]["strong"]) for name in one)


def test_views_of_an_image_do_not_depend_on_the_other_images() -> None:
    fewer = images_of([IDS[index] for index in (1, 3, 5, 8)])
    everywhere = views_of_ids(IMAGES, TRAIN, epoch(loader(), 2))
    alone = views_of_ids(fewer, [0, 1, 2, 3], epoch(loader(fewer, indices=[0, 1, 2, 3]), 2))
    assert sorted(alone) == fewer.ids
    for name, view in alone.items():
        assert equal([view], [everywhere[name]]), name


def test_two_images_with_the_same_pixels_get_different_views() -> None:
    twins = replace(IMAGES, images=np.repeat(IMAGES.images[:1], COUNT, axis=0))
    batch = next(iter(loader(twins, indices=[0, 1], batch_size=2).epoch(0)))
    assert not torch.equal(batch["strong"][0], batch["strong"][1])


def test_without_strengths_both_views_are_the_same_crop() -> None:
    for batch in epoch(loader(strengths=PLAIN), 0):
        assert torch.equal(batch["strong"], batch["weak"])
        assert torch.equal(batch["strong_mask"], batch["weak_mask"])
        assert torch.allclose(batch["theta"], torch.eye(3)[:2].expand(len(batch["theta"]), 2, 3), atol=1e-6)


def test_evaluation_parts_keep_the_requested_order() -> None:
    part = eval_part(IMAGES, [7, 0, 4])
    assert part.ids == ["image 7", "image 0", "image 4"]
    assert part.labels == ["benign", "malignant", "malignant"]
    assert (part.images.shape, part.images.dtype) == ((3, 64, 64, 3), torch.uint8)
    assert (part.masks.shape, part.masks.dtype) == ((3, 1, 64, 64), torch.uint8)
    for place, index in enumerate([7, 0, 4]):
        assert np.array_equal(part.images[place], IMAGES.eval_images[index])
        assert np.array_equal(part.masks[place, 0], IMAGES.eval_masks[index])


def test_evaluation_batches_join_to_the_complete_part() -> None:
    part = eval_part(IMAGES, list(range(COUNT)))
    batches = list(part.batches(4))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([images for images, _ in batches]), part.images)
    assert torch.equal(torch.cat([masks for _, masks in batches]), part.masks)
