"""Two augmented renderings ("views") of one image, for Student and Teacher, and the geometry between them.

A view here is an augmentation of an image, not a scan plane. Both views share one random crop, mirrored or not. The
weak view is that crop; the strong view adds shift, scale and rotation, Gaussian noise and pixel dropout (PAPER,
"Augmentation"), and with ``views.contrast`` another gain.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import albumentations as A
import numpy as np
import torch
from torch import Tensor

from kdsweep.data.images import IMAGENET_MEAN, IMAGENET_STD


class Rendering(NamedTuple):
    """Both views of one image.

    Attributes:
        strong: (S, S, 3) uint8.
        strong_mask: (S, S) uint8, class indices, 0 for background.
        weak: (S, S, 3) uint8, the crop, mirrored or not.
        weak_mask: (S, S) uint8, alike.
        matrix: (3, 3) float64, maps weak pixel coordinates (x, y, 1) to strong ones.
    """

    strong: np.ndarray
    strong_mask: np.ndarray
    weak: np.ndarray
    weak_mask: np.ndarray
    matrix: np.ndarray


@dataclass(frozen=True)
class Strengths:
    """Ranges of the views; the paper is silent on all of them.

    Attributes:
        shift: largest shift, as a share of the image's side.
        scale: largest change of scale, x and y drawn apart as Albumentations' ShiftScaleRotate does.
        rotate_deg: largest rotation.
        noise_std: range of the Gaussian noise's standard deviation, as a share of the gray range.
        dropout: share of pixels set to 0.
        probability: of applying each of the strong view's transforms, independently.
        contrast: largest change of contrast and of brightness, as a share of the gray range; the paper has none.
        flip: probability that both views are mirrored, left to right; the paper has none.
    """

    shift: float
    scale: float
    rotate_deg: float
    noise_std: tuple[float, float]
    dropout: float
    probability: float
    contrast: float = 0.0
    flip: float = 0.0


class Views:
    """Renderer of both views of an image from one seed, with Albumentations.

    Args:
        image_size: side of the square views in pixels.
        strengths: ranges of the views.
    """

    def __init__(self, *, image_size: int, strengths: Strengths) -> None:
        p = strengths.probability
        self.crop = A.RandomCrop(image_size, image_size, p=1.0)
        self.affine = A.Affine(
            translate_percent=(-strengths.shift, strengths.shift),
            scale=(1 - strengths.scale, 1 + strengths.scale),
            rotate=(-strengths.rotate_deg, strengths.rotate_deg),
            p=p,
        )
        # B-mode is gray in three equal channels: one noise field for all three keeps it gray.
        self.noise = A.GaussNoise(std_range=strengths.noise_std, per_channel=False, p=p)
        self.dropout = A.PixelDropout(dropout_prob=strengths.dropout, p=p)
        self.flip = A.HorizontalFlip(p=strengths.flip)
        self.contrast = A.RandomBrightnessContrast(strengths.contrast, strengths.contrast, p=p)
        self.shared = A.Compose([self.crop, self.flip])
        gain = [self.contrast] if strengths.contrast else []
        self.strong = A.Compose([self.affine, *gain, self.noise, self.dropout], save_applied_params=True)

    def render(self, *, image: np.ndarray, mask: np.ndarray, seed: list[int]) -> Rendering:
        """Render both views of one image; the same seed gives the same views, whatever was drawn before.

        Args:
            image: (H, W, 3) uint8, H and W at least image_size.
            mask: (H, W) uint8, class indices.
            seed: any number of non-negative integers.
        """
        # Compose.set_random_seed would give all its transforms one seed, so that they apply together or not at all.
        transforms = (self.crop, self.affine, self.noise, self.dropout, self.flip, self.contrast)  # a new one is last
        children = np.random.SeedSequence(seed).generate_state(len(transforms))
        for transform, child in zip(transforms, children, strict=True):
            transform.set_random_seed(int(child))
        weak = self.shared(image=image, mask=mask)
        strong = self.strong(image=weak["image"], mask=weak["mask"])
        return Rendering(
            strong=strong["image"],
            strong_mask=strong["mask"],
            weak=weak["image"],
            weak_mask=weak["mask"],
            matrix=_applied_matrix(strong["applied_transforms"]),
        )


def _applied_matrix(applied: list[tuple[str, dict[str, Any]]]) -> np.ndarray:
    for name, parameters in applied:
        if name == "Affine":
            return np.asarray(parameters["matrix"], dtype=np.float64)
    return np.eye(3)


def id_number(image_id: str) -> int:
    """Return the number of an image in seeds, which depends on its id alone, not on its place in a list."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:4], "big")


def normalize(images: Tensor) -> Tensor:
    """Normalize (N, H, W, 3) uint8 as for ImageNet, to (N, 3, H, W) float32 in channels-last memory."""
    mean, std = _gray_statistics(images.device)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


@cache
def _gray_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation in gray levels, copied to the device once: a copy per step would make the host wait."""
    return torch.tensor(IMAGENET_MEAN, device=device) * 255, torch.tensor(IMAGENET_STD, device=device) * 255


def sampling_theta(matrix: np.ndarray, *, image_size: int) -> np.ndarray:
    """Return the (2, 3) float32 theta for ``affine_grid`` that renders a weak-frame map in the strong frame.

    With M the forward pixel matrix and N the map from pixel centers to [-1, 1] (``align_corners=False``),
    theta = N M^-1 N^-1. It holds for maps of any resolution over the same frame.

    Args:
        matrix: (3, 3), weak pixel coordinates to strong ones.
        image_size: side in pixels of the matrix's frame.
    """
    offset = 1 / image_size - 1
    to_unit = np.array([[2 / image_size, 0, offset], [0, 2 / image_size, offset], [0, 0, 1]])
    theta = to_unit @ np.linalg.inv(matrix) @ np.linalg.inv(to_unit)
    return theta[:2].astype(np.float32)
