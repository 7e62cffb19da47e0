"""The 12 distillation trainings written for torchdistill 1.1.5, each on its own: kdsweep is timed against them.

Batches, initial weights, formulas and optimizer are kdsweep's: losses and weights come out the same. The machinery is
torchdistill's: the box and its configuration, hooks, registered losses, an auxiliary wrapper for the regressor. What
torchdistill leaves to its user is as PyTorch has it (NCHW memory, malloc).

    pip install torchdistill
    python benchmarks/torchdistill_cells.py --cells L_MSE,HReg_KLD_WAug --steps 3 --batch 16 --out FILE.json
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.datasets.registry import register_collate_func
from torchdistill.losses.registry import register_mid_level_loss
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from kdsweep.data.loaders import EpochBatches, TrainViews
from kdsweep.data.views import normalize
from kdsweep.distill import losses
from kdsweep.distill.distillation import warp
from kdsweep.distill.paths import HiddenRegressor
from kdsweep.models import unet
from kdsweep.models.unet import UNet

SAME = "."  # torchdistill's path of the model itself
STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
ENCODER = [f"encoder.{stage}" for stage in STAGES]  # of the ResNet family, as every Teacher is
NOTATIONS = {"L": "L", "H": "H", "HR": "HReg"}
CELLS = {
    f"{NOTATIONS[path]}_{loss.upper()}{'_WAug' if view == 'weak' else ''}": (path, loss, view)
    for path, loss, view in product(NOTATIONS, ("mse", "kld"), ("strong", "weak"))
}


class EpochKeys(Sampler[tuple[int, int]]):
    """(epoch, index) keys in kdsweep's order, one epoch further each time it is iterated."""

    def __init__(self, dataset: TrainViews, *, indices: list[int], batch_size: int) -> None:
        self.batches = EpochBatches(indices, batch_size=batch_size, seed=dataset.seed, split_index=dataset.split_index)
        self.next_epoch = 0

    def __len__(self) -> int:
        return len(self.batches.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.batches.first_epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        for keys in islice(self.batches, self.batches.per_epoch()):
            yield from keys


def _stack(samples: list[dict[str, np.ndarray]], name: str) -> Tensor:
    return torch.from_numpy(np.stack([sample[name] for sample in samples]))


def _floats(images: Tensor) -> Tensor:
    return normalize(images).contiguous()  # plain NCHW, as torchvision's ToTensor and Normalize give it


@register_collate_func
def strong_views(samples: list[dict[str, np.ndarray]]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Student's input, targets and nothing more: Teacher and Student see the same view."""
    return _floats(_stack(samples, "strong")), {"mask": _stack(samples, "strong_mask")[:, None].float()}, {}


@register_collate_func
def both_views(samples: list[dict[str, np.ndarray]]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Student's input, targets with the warp from weak to strong, and the Teacher's weak view."""
    strong, targets, _ = strong_views(samples)
    return strong, {**targets, "theta": _stack(samples, "theta")}, {"weak": _floats(_stack(samples, "weak"))}


@register_forward_proc_func
def forward_weak_view(
    model: nn.Module, sample_batch: Tensor, targets: object = None, supp_dict: Any = None, **_: object
) -> Any:
    """The forward of a Teacher that sees the weak view."""
    return model(supp_dict["weak"])


@register_auxiliary_model_wrapper
class StudentWithRegressor(AuxiliaryModelWrapper):
    """Trains a regressor of the Student's hidden map beside the Student, as Student4FactorTransfer its translator."""

    def __init__(
        self, *, student_model: UNet, input_module_path: str, teacher_channels: int, seed: int, **_: object
    ) -> None:
        super().__init__()
        self.student_model, self.input_module_path = student_model, input_module_path
        with torch.random.fork_rng(devices=[]):  # the initial weights that kdsweep's regressor has
            torch.manual_seed(seed)
            channels = student_model.encoder.out_channels[-1]
            self.regressor = HiddenRegressor(student_channels=channels, teacher_channels=teacher_channels).regressor

    def forward(self, images: Tensor) -> Any:
        """The Student's outputs."""
        return self.student_model(images)

    def secondary_forward(self, io_dict: dict[str, dict[str, Tensor]]) -> None:
        """The regressor's output reaches the loss through the hook on it."""
        self.regressor(io_dict[self.input_module_path]["output"])


@register_mid_level_loss
class SupervisedLoss(nn.Module):
    """Cross-entropy of the Student's logits."""

    def forward(self, student_io_dict: Any, teacher_io_dict: Any, targets: dict[str, Tensor]) -> Tensor:
        """The mean over all pixels."""
        return losses.cross_entropy(logits=student_io_dict[SAME]["output"].logits, mask=targets["mask"])


@register_mid_level_loss
class MapsLoss(nn.Module):
    """The KD term: ``loss`` of what the hooks took at two module paths."""

    def __init__(self, *, path: str, loss: str, student_module: str, teacher_module: str) -> None:
        super().__init__()
        kld = losses.kld_pixels if path == "L" else losses.kld_positions
        self.path, self.loss = path, {"mse": losses.mse, "kld": kld}[loss]
        self.student_module, self.teacher_module = student_module, teacher_module

    def _map(self, output: Any) -> Tensor:
        if self.path == "L":
            return output.logits
        return output.mean(dim=1, keepdim=True) if self.path == "H" else output

    def forward(self, student_io_dict: Any, teacher_io_dict: Any, targets: dict[str, Tensor]) -> Tensor:
        """The term; a weak view's maps are warped into the Student's frame first."""
        student = self._map(student_io_dict[self.student_module]["output"])
        teacher = self._map(teacher_io_dict[self.teacher_module]["output"])
        valid = torch.ones_like(teacher[:, :1], dtype=torch.bool)
        if "theta" in targets:
            teacher, valid = warp(teacher, theta=targets["theta"])
        return self.loss(student=student, teacher=teacher, valid=valid)


def networks_config(
    *, path: str, weak: bool, student: UNet, teacher: UNet, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Both networks' part of the configuration, and the paths of the modules whose outputs are compared."""
    teaches: dict[str, Any] = {
        "requires_grad": False,  # so the box runs it under no_grad and gives the optimizer the Student alone
        "forward_proc": "forward_weak_view" if weak else "forward_batch_only",
    }
    taught: dict[str, Any] = {"forward_proc": "forward_batch_only"}
    config = {"teacher": teaches, "student": taught}
    if path == "L":
        return config, {"student_module": SAME, "teacher_module": SAME}
    # "sequential" is torchdistill's way to leave out modules that no loss needs: here the Teacher's decoder.
    teaches |= {"sequential": ENCODER, "forward_hook": {"output": [ENCODER[-1]]}}
    hidden = ENCODER[-1] if hasattr(student.encoder, "layer4") else "encoder.blocks.4"
    if path == "H":
        taught["forward_hook"] = {"output": [hidden]}
        return config, {"student_module": hidden, "teacher_module": ENCODER[-1]}
    hidden = f"student_model.{hidden}"
    wrapper = {"input_module_path": hidden, "teacher_channels": teacher.encoder.out_channels[-1], "seed": seed}
    taught["auxiliary_model_wrapper"] = {"key": "StudentWithRegressor", "kwargs": wrapper}
    taught["forward_hook"] = {"output": [hidden, "regressor"]}
    return config, {"student_module": "regressor", "teacher_module": ENCODER[-1]}


class TorchdistillCell:
    """One training.

    Args:
        path: ``L``, ``H`` or ``HR``.
        loss: ``mse`` or ``kld``.
        teacher_aug: ``weak`` or ``strong``, what the Teacher sees.
        student: trained in place; its encoder is MobileNetV3-small, trimmed, or of the ResNet family.
        teacher: of the ResNet family; put into eval mode, which torchdistill leaves to its user.
        train_views: the data set; its seed is the regressor's too.
        indices: of its images that are trained on.
        batch_size: images per step.
        lr: Adam's learning rate.
        device: of networks and batches.
    """

    def __init__(
        self,
        *,
        path: str,
        loss: str,
        teacher_aug: str,
        student: UNet,
        teacher: UNet,
        train_views: TrainViews,
        indices: list[int],
        batch_size: int,
        lr: float,
        device: str = "cpu",
    ) -> None:
        weak, seed = teacher_aug == "weak", train_views.seed
        config, modules = networks_config(path=path, weak=weak, student=student, teacher=teacher, seed=seed)
        terms = {
            "kd": {"key": "MapsLoss", "kwargs": {"path": path, "loss": loss, **modules}},
            "supervised": {"key": "SupervisedLoss", "kwargs": {}},
        }
        sub_terms = {name: {"criterion": term, "weight": 0.5} for name, term in terms.items()}
        config |= {
            "num_epochs": 1,  # required, but only the loop that drives the box would read it
            "train_data_loader": {
                "dataset_id": "train",
                "requires_supp": False,  # the collate function gives the supplementary dict
                "sampler": {"class_or_func": EpochKeys, "kwargs": {"indices": indices, "batch_size": batch_size}},
                "collate_fn": "both_views" if weak else "strong_views",
                "kwargs": {"batch_size": batch_size, "pin_memory": device != "cpu"},
            },
            "optimizer": {"key": "Adam", "kwargs": {"lr": lr}},
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": sub_terms}},
        }
        self.device = torch.device(device)
        run_on = {"device": self.device, "device_ids": None, "distributed": False, "lr_factor": 1}
        self.box = get_distillation_box(teacher.eval(), student, {"train": train_views}, config, **run_on)
        self.epoch, self.last_loss = -1, float("nan")
        self._batches: Iterator[Any] = iter(())

    def _next_batch(self) -> Any:
        batch = next(self._batches, None)
        if batch is None:
            if self.epoch >= 0:
                self.box.post_epoch_process()
            self.epoch += 1
            self.box.pre_epoch_process(epoch=self.epoch)
            self._batches = iter(self.box.train_data_loader)
            batch = next(self._batches)
        return batch

    def steps(self, count: int) -> list[float]:
        """Run ``count`` steps; the wall seconds of each, from asking for its batch to having its loss as a number."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            strong, *others = self._next_batch()
            targets, supp = ({name: values.to(self.device) for name, values in part.items()} for part in others)
            loss = self.box.forward_process(strong.to(self.device), targets, supp)
            self.box.post_forward_process(loss=loss)
            self.last_loss = loss.item()
            seconds.append(time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        """Remove the hooks; torchdistill also makes all parameters trainable again."""
        self.box.clean_modules()


def main() -> None:
    """Run cells one after the other in this process, which spares all but the first torchdistill's own start."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cells", default=",".join(CELLS), help="comma-separated, in the paper's notation")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--teacher", default="resnext101", help="a file of conf/teacher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("overrides", nargs="*", help="of kdsweep's configuration, such as data=busi data.root=FOLDER")
    args = parser.parse_args()
    names = args.cells.split(",")
    if unknown := set(names) - set(CELLS):
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")

    from kdsweep.config import composition
    from kdsweep.training import factory

    cfg = composition.compose(
        [f"image_size={args.image_size}", f"teacher={args.teacher}", f"train.batch_size={args.batch}", *args.overrides]
    )
    train = factory.feed(cfg, seed=cfg.seed).train
    torch.backends.cudnn.benchmark = True  # as torchdistill's example scripts do; nothing to a CPU
    result: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torchdistill", "torch")},
        "threads": torch.get_num_threads(),
        "arguments": {**vars(args), "out": str(args.out)},
        "cells": {},
    }
    for name in names:
        start = time.perf_counter()
        path, loss, teacher_aug = CELLS[name]
        student, teacher = (
            unet.unet(encoder=node.encoder, decoder_channels=list(node.decoder_channels), weights="none", seed=seed)
            for node, seed in ((cfg.student, cfg.seed), (cfg.teacher, cfg.teacher.seed))
        )
        cell = TorchdistillCell(
            path=path,
            loss=loss,
            teacher_aug=teacher_aug,
            student=student,
            teacher=teacher,
            train_views=train.loader.dataset,
            indices=train.batches.indices,
            batch_size=args.batch,
            lr=cfg.train.lr,
            device=args.device,
        )
        startup = time.perf_counter() - start
        seconds = cell.steps(args.steps)
        result["cells"][name] = {
            "startup_seconds": startup,
            "step_seconds": seconds,
            "last_loss": cell.last_loss,
            # Of the process until now: the first cell's own, later ones' only where they exceed all before.
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")
        sys.stdout.write(f"{name}: {sum(seconds):.2f} s for {len(seconds)} steps, loss {cell.last_loss:.6f}\n")
        cell.close()
        del cell, student, teacher
        gc.collect()  # the next training starts without this one's networks


if __name__ == "__main__":
    main()
