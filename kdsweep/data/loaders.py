"""Loaders: both views of training images, and uncropped images for validation and test."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdsweep.data.images import Images
from kdsweep.data.views import Views, id_number, sampling_theta

PREFETCHED = 2  # batches that each process has ready


def affordable_workers(requested: int, *, batch_bytes: int, folder: Path = Path("/dev/shm")) -> int:
    """Return how many processes can prepare batches: these reach the training through shared memory.

    A container often has 64 MB of it, and a process that finds it full is killed.

    Args:
        requested: number of processes.
        batch_bytes: size of a batch.
        folder: of the shared memory; where it does not exist, as outside Linux, nothing is limited.
    """
    if not folder.is_dir():
        return requested
    free = shutil.disk_usage(folder).free
    return max(0, min(requested, (free // batch_bytes - 2) // PREFETCHED))  # two more: the one in use, one on the way


class TrainViews(Dataset[dict[str, np.ndarray]]):
    """Both views of the training images, by key (epoch, index); seed, split and key alone decide what is drawn."""

    def __init__(self, images: Images, *, views: Views, seed: int, split_index: int) -> None:
        self.images, self.views, self.seed, self.split_index = images, views, seed, split_index

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return the rendering as arrays by name, with ``theta`` (2, 3) for the warp from weak to strong."""
        epoch, index = key
        rendering = self.views.render(
            image=self.images.images[index],
            mask=self.images.masks[index],
            seed=[self.seed, self.split_index, epoch, id_number(self.images.ids[index])],
        )
        arrays = rendering._asdict()
        theta = sampling_theta(arrays.pop("matrix"), image_size=rendering.strong.shape[0])
        return {**arrays, "theta": theta}


class EpochBatches:
    """Endless batches of (epoch, index) keys; each epoch's order depends on its number alone.

    Args:
        indices: of the images.
        batch_size: images in a batch.
        seed: of the order.
        split_index: of the split.
        last_batch: what becomes of images that do not fill a batch at the end of an epoch. ``smaller``: one
            smaller batch; ``drop``: they are left out of this epoch; ``fill``: the epoch's first images come a second
            time, so that all batches have one shape.
    """

    def __init__(
        self, indices: list[int], *, batch_size: int, seed: int, split_index: int, last_batch: str = "smaller"
    ) -> None:
        self.indices, self.batch_size, self.seed, self.split_index = indices, batch_size, seed, split_index
        self.last_batch, self.first_epoch, self.first_batch = last_batch, 0, 0

    def per_epoch(self) -> int:
        """Return the number of batches in one epoch."""
        complete, left = divmod(len(self.indices), self.batch_size)
        return complete + (left > 0 and self.last_batch != "drop")

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in itertools.count(self.first_epoch):
            order = np.random.default_rng([self.seed, self.split_index, epoch]).permutation(self.indices)
            keys = [(epoch, int(index)) for index in order]
            if self.last_batch == "fill":
                keys += keys[: -len(keys) % self.batch_size]
            first = self.first_batch if epoch == self.first_epoch else 0
            for number in range(first, self.per_epoch()):
                yield keys[number * self.batch_size : (number + 1) * self.batch_size]


class TrainLoader:
    """Loader of training batches: dicts of ``strong``, ``weak`` (N, S, S, 3) uint8, their masks, ``theta``.

    The worker processes live as long as the loader and prepare the next epoch's batches ahead: the paper's epochs
    have two batches, so without that every second batch would be waited for.

    Args:
        images: the data set.
        views: draws the two views.
        batches: which images are drawn, and with which seed.
        workers: processes that prepare batches; 0 prepares them in this one. The batches are the same either way.
        pinned: put batches into memory from which a GPU reads while the processor continues.
    """

    def __init__(
        self, images: Images, *, views: Views, batches: EpochBatches, workers: int, pinned: bool = False
    ) -> None:
        self.batches, self.image_count = batches, len(batches.indices)
        self.loader = DataLoader(
            TrainViews(images, views=views, seed=batches.seed, split_index=batches.split_index),
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            pin_memory=pinned,
            generator=torch.Generator(),  # else it would draw from the generator that all networks share
        )
        self._ahead: Iterator[dict[str, Tensor]] = iter(())
        self._next_epoch = -1

    def __len__(self) -> int:
        return self.batches.per_epoch()

    def epoch(self, number: int, *, first: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of one epoch, which depend on its number alone; use them up before asking for the next.

        Args:
            number: of the epoch.
            first: number of the batch to begin with; those before it are not prepared.
        """
        if number != self._next_epoch or first:
            self.batches.first_epoch, self.batches.first_batch = number, first
            self._ahead = iter(self.loader)
        self._next_epoch = -1  # until this one has been used up
        try:
            yield from itertools.islice(self._ahead, len(self) - first)
        except Exception as error:
            self.close()
            if self.loader.num_workers:  # the worker's traceback is in the message, and frames would keep the workers
                error = error.with_traceback(None)
            raise error
        self._next_epoch = number + 1

    def close(self) -> None:
        """End the workers. As part of a cycle, such as that of an error, each would take five seconds more to end."""
        self._ahead = iter(())

    def step_seed(self, epoch: int, number: int) -> int:
        """Return the seed of all random draws while a learner learns from batch ``number`` of an epoch."""
        entropy = [self.batches.seed, self.batches.split_index, epoch, number]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@dataclass(frozen=True)
class EvalPart:
    """Validation or test images, uncropped, at the size at which they are scored.

    Attributes:
        ids: N ids.
        labels: N labels.
        groups: N groups, such as patients; None if the data set has none.
        images: (N, S, S, 3) uint8.
        masks: (N, 1, S, S) uint8 in {0, 1}, or in {0, ..., K} of K classes.
        class_names: K names; empty for one class.
    """

    ids: list[str]
    labels: list[str]
    images: Tensor
    masks: Tensor
    groups: list[str] | None = None
    class_names: tuple[str, ...] = ()

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and masks in batches of at most ``size``, in order."""
        yield from zip(self.images.split(size), self.masks.split(size), strict=True)


def eval_part(images: Images, indices: list[int], *, groups: Mapping[str, str] | None = None) -> EvalPart:
    """Return the part of a data set that ``indices`` select, with its images' groups if they have ids."""
    return EvalPart(
        ids=[images.ids[i] for i in indices],
        labels=[images.labels[i] for i in indices],
        images=torch.from_numpy(images.eval_images[indices]),
        masks=torch.from_numpy(images.eval_masks[indices])[:, None],
        groups=[groups[images.ids[i]] for i in indices] if groups else None,
        class_names=images.class_names,
    )


@dataclass(frozen=True)
class Feed:
    """The three parts of one split, ready to be used."""

    train: TrainLoader
    validation: EvalPart
    test: EvalPart
