"""The 12 distillation trainings written for torchdistill 1.1.5, each on its own: kdsweep is timed against them.

Batches, the number of processes that prepare them, initial weights, formulas, optimizer, precision and cuDNN's flags
are kdsweep's: losses and weights come out the same. The machinery is torchdistill's: the box and its configuration,
hooks, registered losses, an auxiliary wrapper for the regressor. What torchdistill leaves to its user is as PyTorch has
it (NCHW memory, malloc).

    pip install torchdistill
    python benchmarks/torchdistill_cells.py --cells L_MSE,HReg_KLD_WAug --steps 3 --out FILE.json precision=bf16
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
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

from kdsweep.core.device import Compute
from kdsweep.data.loaders import EpochBatches, TrainLoader, TrainViews, affordable_workers
from kdsweep.data.views import normalize
from kdsweep.distill import losses
from kdsweep.distill.distillation import warp
from kdsweep.distill.paths import HiddenRegressor
from kdsweep.models.networks import Network

SAME = "."  # torchdistill's path of the model itself
STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
ENCODER = [f"encoder.{stage}" for stage in STAGES]  # of the ResNet family, as every Teacher is
NOTATIONS = {"L": "L", "H": "H", "HR": "HReg"}
CELLS = {
    f"{NOTATIONS[path]}_{loss.upper()}{'_WAug' if view == 'weak' else ''}": (path, loss, view)
    for path, loss, view in itertools.product(NOTATIONS, ("mse", "kld"), ("strong", "weak"))
}


class EpochKeys(Sampler[tuple[int, int]]):
    """(epoch, index) keys in kdsweep's order, without end: batches are prepared across epochs, as kdsweep's are."""

    def __init__(self, dataset: TrainViews, *, batches: EpochBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches.per_epoch() * self.batches.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.chain.from_iterable(self.batches)


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
        self, *, student_model: Network, input_module_path: str, teacher_channels: int, seed: int, **_: object
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
    *, path: str, weak: bool, student: Network, teacher: Network, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Both networks' part of the configuration, and the paths of the modules whose outputs are compared."""
    teaches: dict[str, Any] = {
        "requires_grad": False,  # so the box runs it under no_grad and gives the optimizer the Student alone
        "forward_proc": "forward_weak_view" if weak else "forward_batch_only",
    }
    student_config: dict[str, Any] = {"forward_proc": "forward_batch_only"}
    config = {"teacher": teaches, "student": student_config}
    if path == "L":
        return config, {"student_module": SAME, "teacher_module": SAME}
    # "sequential" is torchdistill's way to leave out modules that no loss needs: here the Teacher's decoder.
    teaches |= {"sequential": ENCODER, "forward_hook": {"output": [ENCODER[-1]]}}
    hidden = ENCODER[-1] if hasattr(student.encoder, "layer4") else "encoder.blocks.4"
    if path == "H":
        student_config["forward_hook"] = {"output": [hidden]}
        return config, {"student_module": hidden, "teacher_module": ENCODER[-1]}
    hidden = f"student_model.{hidden}"
    wrapper = {"input_module_path": hidden, "teacher_channels": teacher.encoder.out_channels[-1], "seed": seed}
    student_config["auxiliary_model_wrapper"] = {"key": "StudentWithRegressor", "kwargs": wrapper}
    student_config["forward_hook"] = {"output": [hidden, "regressor"]}
    return config, {"student_module": "regressor", "teacher_module": ENCODER[-1]}


def worker_count(train: TrainLoader, *, image_size: int) -> int:
    """Return how many processes prepare batches: as many as kdsweep's, or as shared memory has room for."""
    batch_bytes = 28 * image_size**2 * train.batches.batch_size  # two views of three channels and a mask, all fp32
    requested = train.loader.num_workers
    return affordable_workers(requested, batch_bytes=batch_bytes) if requested else 0


class TorchdistillCell:
    """One training.

    Args:
        path: ``L``, ``H`` or ``HR``.
        loss: ``mse`` or ``kld``.
        teacher_aug: ``weak`` or ``strong``, what the Teacher sees.
        student: trained in place; its encoder is MobileNetV3-small, trimmed, or of the ResNet family.
        teacher: of the ResNet family; put into eval mode, which torchdistill leaves to its user.
        train: kdsweep's loader, whose images and batches are used; its seed is the regressor's too.
        workers: processes that prepare batches.
        lr: Adam's learning rate.
        compute: device and precision.
    """

    def __init__(
        self,
        *,
        path: str,
        loss: str,
        teacher_aug: str,
        student: Network,
        teacher: Network,
        train: TrainLoader,
        workers: int,
        lr: float,
        compute: Compute,
    ) -> None:
        weak, seed = teacher_aug == "weak", train.batches.seed
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
                "sampler": {"class_or_func": EpochKeys, "kwargs": {"batches": copy.copy(train.batches)}},
                "collate_fn": "both_views" if weak else "strong_views",
                "kwargs": {
                    "batch_size": train.batches.batch_size,
                    "pin_memory": train.loader.pin_memory,
                    "num_workers": workers,
                },
            },
            "optimizer": {"key": "Adam", "kwargs": {"lr": lr}},
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": sub_terms}},
        }
        self.compute = compute
        run_on = {"device": compute.device, "device_ids": None, "distributed": False, "lr_factor": 1}
        self.box = get_distillation_box(teacher.eval(), student, {"train": train.loader.dataset}, config, **run_on)
        self.last_loss = float("nan")
        self.box.pre_epoch_process(epoch=0)
        self._batches = iter(self.box.train_data_loader)

    def steps(self, count: int) -> list[float]:
        """Run ``count`` steps; the wall seconds of each, from asking for its batch to having its loss as a number."""
        seconds, device = [], self.compute.device
        for _ in range(count):
            start = time.perf_counter()
            strong, *others = next(self._batches)
            targets, supp = ({name: values.to(device) for name, values in part.items()} for part in others)
            with self.compute.autocast():
                loss = self.box.forward_process(strong.to(device), targets, supp)
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
    parser.add_argument("--limit", type=float, help="seconds; cells beyond it are left out")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("overrides", nargs="*", help="of kdsweep's configuration, such as precision=bf16 data.count=50")
    args = parser.parse_args()
    names = args.cells.split(",")
    if unknown := set(names) - set(CELLS):
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")

    from kdsweep.config import composition
    from kdsweep.training import build

    begun = time.perf_counter()
    settings = composition.compose(args.overrides)
    train, compute = build.feed(settings, seed=settings.seed).train, build.compute(settings)
    if settings.train.last_batch == "smaller" and train.image_count % settings.train.batch_size:
        parser.error(
            f"{train.image_count} images do not fill batches of {settings.train.batch_size}: add train.last_batch=fill"
        )
    if compute.device.type == "cuda":
        compute.prepare()  # the same flags; on the CPU it would tune malloc, which is kdsweep's own doing
    workers = worker_count(train, image_size=settings.image_size)
    result: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torchdistill", "torch")},
        "threads": torch.get_num_threads(),
        "workers": workers,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "arguments": {**vars(args), "out": str(args.out)},
        "cells": {},
    }
    student, teacher = build.student_network(settings), build.teacher_network(settings)
    longest = 0.0
    for name in names:
        start = time.perf_counter()
        if args.limit is not None and start - begun + longest > args.limit:
            break
        path, loss, teacher_aug = CELLS[name]
        cell = TorchdistillCell(
            path=path,
            loss=loss,
            teacher_aug=teacher_aug,
            student=copy.deepcopy(student),
            teacher=copy.deepcopy(teacher),
            train=train,
            workers=workers,
            lr=settings.train.lr,
            compute=compute,
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
        del cell
        gc.collect()  # the next training starts without this one's networks
        longest = max(longest, time.perf_counter() - start)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
