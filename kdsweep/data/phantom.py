"""Synthetic B-mode breast-ultrasound phantoms: the embedded data set that needs no download.

An image is built as a scanner would see it. Layered tissue and one lesion give a map of echogenicity; complex
Gaussian scatterers weighted with it pass through a point-spread function that is finer in depth than across; the
magnitude is the envelope, whose speckle is Rayleigh in homogeneous tissue (Burckhardt 1978; Wagner et al. 1983);
attenuation accumulates down each column, so that shadows and enhancement are behind what causes them; the sum is
log-compressed. What is dark is therefore often not the lesion: fat lobules, ducts, deep tissue and shadows are too.

Depth is the first axis. Echo levels are in decibels of power relative to fibroglandular tissue.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from kdsweep.core.errors import InputError
from kdsweep.data.tissue import Array, Lesion, bend, draw_lesion, draw_tissue, insert, smooth_noise, smooth_step

GENERATOR_VERSION: Final = 1  # raise it when equal arguments give other images, so that stored ones are made again

LABELS: Final = ("benign", "malignant")
# The cohort of the published UDIAT set: 110 benign and 53 malignant among 163 images.
_MALIGNANT_SHARE: Final = (53, 163)


@dataclass(frozen=True)
class Phantom:
    """One synthetic image with its ground truth.

    Attributes:
        id: Unique name within a cohort, such as ``benign (1)``.
        label: ``benign`` or ``malignant``.
        image: Gray levels, (H, W) uint8.
        mask: The drawn lesion border, filled; (H, W) uint8 in {0, 1}. A shadow is not part of it.
    """

    id: str
    label: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def cohort(*, count: int, seed: int) -> Iterator[Phantom]:
    """Yield phantoms lazily, labeled as ``labels`` says.

    A shorter cohort of the same seed is the beginning of a longer one.

    Args:
        count: Number of phantoms, at least 1.
        seed: Seed of the cohort, at least 0.

    Raises:
        InputError: `count` is below 1.
    """
    return (phantom(seed=seed, index=index, label=label) for index, label in enumerate(labels(count)))


def labels(count: int) -> Iterator[str]:
    """Yield the labels of a cohort lazily: benign and malignant mixed in the ratio 110 to 53.

    Args:
        count: Number of phantoms, at least 1; 163 hold exactly 110 benign and 53 malignant ones.

    Raises:
        InputError: `count` is below 1.
    """
    if count < 1:
        raise InputError(f"data.count is {count}: it must be a number of phantoms, 1 or more")
    part, total = _MALIGNANT_SHARE

    def malignant_before(index: int) -> int:
        return (2 * index * part + total) // (2 * total)  # index * part / total, rounded

    return (LABELS[malignant_before(index + 1) - malignant_before(index)] for index in range(count))


def phantom(*, seed: int, index: int, label: str) -> Phantom:
    """Make one phantom; the result depends on the arguments alone, not on what was made before.

    Other builds of NumPy or OpenCV may round a few pixels differently.

    Args:
        seed: Seed of the cohort, at least 0.
        index: Place in the cohort from 0; it also numbers the phantom.
        label: ``benign`` or ``malignant``.

    Returns:
        Image and mask of equal size, 300 to 460 pixels deep and 360 to 560 wide.
    """
    rng = np.random.default_rng([seed, index])
    shape = (int(rng.integers(300, 461)), int(rng.integers(360, 561)))
    lesion = draw_lesion(rng, shape, malignant=label == "malignant")
    warp = bend(rng, lesion)
    echo_db, specular_db = draw_tissue(rng, warp)
    echo_db, specular_db = insert(rng, lesion, echo_db, specular_db)
    gain_db = _attenuation(rng, lesion)
    scattered = _scatter(rng, echo_db, focus_px=shape[0] * rng.uniform(0.25, 0.6))
    image = _compress(rng, scattered, specular_db, gain_db)
    return Phantom(id=f"{label} ({index + 1})", label=label, image=image, mask=lesion.mask)


def _attenuation(rng: np.random.Generator, lesion: Lesion) -> Array:
    """Return the gain in decibels, (H, W): tissue's losses that time-gain compensation did not restore."""
    height, width = lesion.mask.shape
    depth = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    lateral = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    knee, drop_db = rng.uniform(0.15, 0.45), rng.uniform(10, 32)
    gain = -drop_db * np.maximum(depth - knee, 0) / (1 - knee) + rng.uniform(4, 12) * np.exp(-depth / 0.012)
    # Poor contact at the sides, and shadows of the nipple, ligaments or ribs that no lesion casts.
    gain = gain + rng.normal(0, 1.0) * smooth_noise(rng, (height, width), depth_px=2 * height, lateral_px=width / 7)
    for side in (lateral, 1 - lateral):
        gain = gain - float(rng.choice([0, 12], p=[0.65, 0.35])) * np.exp(-((side / rng.uniform(0.03, 0.12)) ** 2))
    for _ in range(rng.integers(0, 4)):
        start, middle, spread = rng.uniform(0.05, 0.8), rng.random(), rng.uniform(0.02, 0.09)
        ragged = smooth_noise(rng, (height, width), depth_px=height / 3, lateral_px=width / 20)
        column = np.exp(-(((lateral - middle + 0.3 * spread * ragged) / (spread * (0.7 + 0.6 * depth))) ** 2))
        gain = gain - rng.uniform(3, 14) * column * smooth_step(depth - start + 0.03 * ragged, 0.06)
    return np.asarray(gain - _loss_behind(rng, lesion) - _edge_shadows(rng, lesion), dtype=np.float32)


def _loss_behind(rng: np.random.Generator, lesion: Lesion) -> Array:
    """Return the loss in decibels, (H, W), along paths through the lesion: a shadow, or enhancement if negative."""
    if lesion.malignant:
        through_db = float(rng.choice([-5, 0, 10, 20], p=[0.1, 0.2, 0.4, 0.3])) * rng.uniform(0.7, 1.3)
    elif lesion.anechoic:
        through_db = rng.uniform(-14, -8)
    else:
        through_db = float(rng.choice([-6, -2, 5], p=[0.45, 0.35, 0.2]))
    path = np.cumsum(lesion.mask, axis=0, dtype=np.float32) / (2 * lesion.radius_px)
    path = cv2.GaussianBlur(path, (0, 0), sigmaX=2 + 0.1 * lesion.radius_px, sigmaY=2)
    # Within the lesion half the loss counts: its contrast is drawn separately and would be lost in its shadow.
    share = 0.5 + 0.5 * smooth_step(lesion.outside_px, 2 + 0.15 * lesion.radius_px)
    return np.asarray(through_db * np.minimum(path, 1.4) * share, dtype=np.float32)


def _edge_shadows(rng: np.random.Generator, lesion: Lesion) -> Array:
    """Return the loss in decibels, (H, W), by refraction at the sides of a smooth lesion."""
    height, width = lesion.mask.shape
    if lesion.malignant:
        return np.zeros((height, width), dtype=np.float32)
    columns = np.nonzero(lesion.mask.any(axis=0))[0]
    lateral = np.arange(width, dtype=np.float32)[None, :]
    below = smooth_step(np.arange(height, dtype=np.float32)[:, None] - lesion.center_px, 0.3 * lesion.radius_px)
    spread = 3 + 0.1 * lesion.radius_px
    sides = sum(np.exp(-(((lateral - edge) / spread) ** 2)) for edge in (columns[0], columns[-1]))
    return np.asarray(max(rng.uniform(-4, 8), 0) * sides * below, dtype=np.float32)


def _scatter(rng: np.random.Generator, echo_db: Array, *, focus_px: float) -> Array:
    """Return the complex echo of unresolved scatterers behind the point-spread function.

    The magnitude of the result is Rayleigh-distributed where `echo_db` is constant, with mean over deviation 1.91
    (Burckhardt 1978, IEEE Trans. Sonics Ultrason. 25:1; Wagner et al. 1983, ibid. 30:156).

    Args:
        rng: Source of the scatterers.
        echo_db: Mean echo power, (H, W) in decibels.
        focus_px: Depth at which the beam is narrowest.

    Returns:
        (H, W, 2) float32, real and imaginary part; its mean power is 10 ** (echo_db / 10).
    """
    height, width = echo_db.shape
    amplitude = np.power(np.float32(10), echo_db / np.float32(20))
    field = rng.standard_normal((height, width, 2), dtype=np.float32) * amplitude[..., None]
    axial = cv2.getGaussianKernel(7, 0.75, cv2.CV_32F)
    narrow, wide = (cv2.getGaussianKernel(15, sigma, cv2.CV_32F) for sigma in (0.95, 2.3))
    in_focus = cv2.sepFilter2D(field, -1, narrow, axial)
    out_of_focus = cv2.sepFilter2D(field, -1, wide, axial)
    away = np.minimum(np.abs(np.arange(height) - focus_px) / (0.8 * height), 1)[:, None]
    beam = (1 - away) * narrow.T + away * wide.T  # the lateral kernel of each row, for its energy
    scale = 1 / np.sqrt(2 * (beam**2).sum(axis=1) * (axial**2).sum())
    away, scale = (np.asarray(value, dtype=np.float32).reshape(-1, 1, 1) for value in (away, scale))
    return np.asarray(scale * ((1 - away) * in_focus + away * out_of_focus), dtype=np.float32)


def _compress(rng: np.random.Generator, scattered: Array, specular_db: Array, gain_db: Array) -> NDArray[np.uint8]:
    """Detect the envelope and log-compress it to gray levels, (H, W) uint8, with the gain set as by a sonographer."""
    range_db, mean_gray = rng.uniform(50, 65), float(np.clip(rng.normal(82, 15), 50, 120))
    field = scattered.copy()
    field[..., 0] += np.power(np.float32(10), specular_db / np.float32(20))
    field *= np.power(np.float32(10), gain_db / np.float32(20))[..., None]
    depth = np.linspace(0, 1, field.shape[0], dtype=np.float32)[:, None, None]
    floor_db = rng.uniform(-52, -42) + 8 * depth  # compensation lifts the electronic noise along with the echo
    field += np.power(np.float32(10), floor_db / 20) * rng.standard_normal(field.shape, dtype=np.float32)
    envelope_db = 20 * np.log10(cv2.magnitude(field[..., 0], field[..., 1]) + 1e-6)
    # Scanners smooth speckle before display.
    gray = cv2.GaussianBlur(envelope_db, (0, 0), rng.uniform(0.8, 1.3)) * (255 / range_db)
    for _ in range(3):  # clipping moves the mean, so the offset needs a few rounds
        gray += mean_gray - float(np.clip(gray, 0, 255).mean())
    return np.rint(np.clip(gray, 0, 255)).astype(np.uint8)
