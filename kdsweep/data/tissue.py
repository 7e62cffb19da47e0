"""The anatomy of a phantom: layered tissue bent by a lesion, as maps of echo levels.

Depth is the first axis. Echo levels are in decibels of power relative to fibroglandular tissue.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Lesion:
    """A placed lesion: its mask, its distance map and how it looks and attenuates."""

    malignant: bool
    mask: NDArray[np.uint8]
    outside_px: Array  # signed distance to the border, positive outside
    radius_px: float
    center_px: float  # depth
    contrast_db: float  # against the tissue around it
    softness_px: float
    anechoic: bool


@dataclass(frozen=True)
class Warp:
    """Position of each pixel in the flat, unbent stack of layers: (H, W) maps in pixels."""

    depth_px: Array
    lateral_px: Array


@dataclass(frozen=True)
class _Layers:
    """Share of each layer in each pixel, (H, W) in [0, 1]; `deep` is a part of `muscle`."""

    skin: Array
    fat: Array
    gland: Array
    muscle: Array
    deep: Array
    fascia: Array  # brightness of the sheets around the muscle


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], *, depth_px: float, lateral_px: float) -> Array:
    """Draw smooth noise, (H, W), mean 0 and deviation about 1, with the correlation lengths."""
    # Two grid cells per correlation length and a blur of one cell: no trace of the grid survives the interpolation.
    rows, columns = (int(2 * side / scale) + 2 for side, scale in zip(shape, (depth_px, lateral_px), strict=True))
    coarse = cv2.GaussianBlur(rng.standard_normal((rows + 6, columns + 6), dtype=np.float32), (7, 7), 1.0)
    fine = cv2.resize(coarse[3:-3, 3:-3], (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    return np.asarray(fine * np.float32(2 * np.sqrt(np.pi)), dtype=np.float32)  # undoes the blur's loss of deviation


def smooth_step(values: Array, softness: float | Array = 1.0) -> Array:
    """Return a smooth step from 0 (values far below 0) to 1."""
    return np.asarray(0.5 + 0.5 * np.tanh(values / softness), dtype=np.float32)


def _outline(rng: np.random.Generator, *, malignant: bool) -> NDArray[np.float64]:
    """Draw a closed lesion border around the origin, (720, 2) as (x, y), before scaling."""
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    radius = np.ones_like(angle)
    top, fall, strength = (22, 1.25, 0.17) if malignant else (5, 1.8, rng.choice([0.03, 0.06, 0.14], p=[0.3, 0.4, 0.3]))
    for order in range(2, top + 1):
        radius += strength * (2 / order) ** fall * rng.normal() * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    if malignant:
        for _ in range(rng.integers(0, 6)):
            gap = np.angle(np.exp(1j * (angle - rng.uniform(0, 2 * np.pi))))
            radius += rng.uniform(0.1, 0.45) * np.exp(-np.abs(gap) / rng.uniform(0.08, 0.22))
    radius = np.maximum(radius, 0.4)
    flatness = rng.lognormal(-0.08, 0.3) if malignant else rng.lognormal(-0.46, 0.22)
    tilt = rng.normal(0, 0.3 if malignant else 0.16)
    x, y = radius * np.cos(angle), radius * np.sin(angle) * flatness
    return np.stack([x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)], axis=1)


def _place(
    rng: np.random.Generator, shape: tuple[int, int], outline: NDArray[np.float64], *, share: float
) -> tuple[NDArray[np.uint8], float]:
    """Scale the outline to `share` of the image area and place it inside; return its mask and its origin's depth."""
    size = np.array([shape[1], shape[0]], dtype=np.float64)
    outline = outline * np.sqrt(share * size.prod() / cv2.contourArea(outline.astype(np.float32)))
    outline *= np.minimum(1, 0.97 * size / np.ptp(outline, axis=0))  # the largest are squeezed to fit, not cut
    low, high = -outline.min(axis=0), size - outline.max(axis=0)
    low[1] = min(low[1] + 0.05 * shape[0], (low[1] + high[1]) / 2)  # not in the skin
    high[1] = max(min(high[1], 0.75 * shape[0]), low[1])  # nor deeper than a scan is set
    center = low + (high - low) * np.array([rng.beta(2, 2), rng.beta(1.5, 2.5)])
    mask = np.zeros(shape, dtype=np.uint8)
    cv2.fillPoly(mask, [np.rint(outline + center).astype(np.int32)], 1)
    return mask, float(center[1])


def draw_lesion(rng: np.random.Generator, shape: tuple[int, int], *, malignant: bool) -> Lesion:
    """Draw a lesion of random size, shape, place and contrast inside an image of a shape."""
    outline = _outline(rng, malignant=malignant)
    # Log-normal sizes as in clinical sets: many small, few that fill the image.
    share = rng.lognormal(np.log(0.14), 0.75) if malignant else rng.lognormal(np.log(0.036), 1.0)
    mask, center_px = _place(rng, shape, outline, share=float(np.clip(share, 0.004, 0.45)))
    outer = cv2.distanceTransform(1 - mask, cv2.DIST_L2, 5)
    inner = cv2.distanceTransform(mask, cv2.DIST_L2, 5)
    radius_px = float(np.sqrt(mask.sum() / np.pi))
    anechoic = not malignant and rng.random() < 0.25
    contrast_db = rng.uniform(-30, -20) if anechoic else -rng.gamma(5, 2.0 if malignant else 2.7) - 1.0
    softness_px = radius_px * rng.uniform(0.05, 0.16) if malignant else rng.uniform(1.2, 3.5)
    return Lesion(
        malignant=malignant,
        mask=mask,
        outside_px=outer - inner,
        radius_px=radius_px,
        center_px=center_px,
        contrast_db=contrast_db,
        softness_px=softness_px,
        anechoic=anechoic,
    )


def bend(rng: np.random.Generator, lesion: Lesion) -> Warp:
    """Bend the layers: undulation, a curved chest wall, and tissue pushed aside around the lesion."""
    height, width = lesion.mask.shape
    depth, lateral = np.mgrid[:height, :width].astype(np.float32)
    across = (lateral / width - rng.uniform(0.3, 0.7)) * 2
    wave = (
        smooth_noise(rng, (height, width), depth_px=height / 2, lateral_px=width / 3)
        * height
        * rng.uniform(0.008, 0.035)
    )
    fine = (
        smooth_noise(rng, (height, width), depth_px=height / 8, lateral_px=width / 14)
        * height
        * rng.uniform(0.003, 0.01)
    )
    slope = rng.normal(0, 0.05) * across + rng.normal(0.02, 0.04) * across**2
    deeper = np.minimum(depth / (0.3 * height), 1)  # the skin is flat under the probe
    near = np.exp(-np.maximum(lesion.outside_px, 0) / (0.5 * lesion.radius_px))
    push = rng.uniform(0.2, 0.6) * (lesion.center_px - depth) * near
    bent = depth + (wave + fine + slope * height) * deeper + push
    sideways = lateral + smooth_noise(rng, (height, width), depth_px=height / 4, lateral_px=width / 4) * 0.02 * width
    return Warp(np.asarray(bent, dtype=np.float32), np.asarray(sideways, dtype=np.float32))


def _woven(rng: np.random.Generator, warp: Warp, *, depth_px: float, lateral_px: float) -> Array:
    """Draw smooth noise that follows the bent layers."""
    shape = (warp.depth_px.shape[0], warp.depth_px.shape[1])
    flat = smooth_noise(rng, shape, depth_px=depth_px, lateral_px=lateral_px)
    return np.asarray(cv2.remap(flat, warp.lateral_px, warp.depth_px, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def _filaments(rng: np.random.Generator, warp: Warp, *, depth_px: float, lateral_px: float, width_px: float) -> Array:
    """Draw thin interrupted lines in [0, 1], (H, W): the zero crossings of noise that follows the layers."""
    noise = _woven(rng, warp, depth_px=depth_px, lateral_px=lateral_px)
    across, down = (cv2.Sobel(noise, cv2.CV_32F, dx, 1 - dx, scale=0.125) for dx in (1, 0))
    slope = cv2.magnitude(across, down) + np.float32(1e-5)
    gate = np.clip(0.5 + 0.7 * _woven(rng, warp, depth_px=depth_px, lateral_px=0.5 * lateral_px), 0, 1.5)
    line = np.exp(-((noise / (slope * width_px * (0.4 + gate))) ** 2))
    # An interface mirrors best where it faces the probe.
    return np.asarray(line * np.minimum(gate, 1) * np.abs(down) / slope, dtype=np.float32)


def _layers(rng: np.random.Generator, warp: Warp) -> _Layers:
    """Stack skin, fat, gland and muscle at random depths of the bent tissue."""
    height, width = warp.depth_px.shape
    depth = warp.depth_px / height
    skin, fat = rng.uniform(0.02, 0.05), rng.uniform(0.16, 0.38)
    gland = fat + rng.uniform(0.15, 0.4)
    muscle = gland + rng.uniform(0.15, 0.3)
    bump = _woven(rng, warp, depth_px=height / 5, lateral_px=width / 8) * rng.uniform(0.01, 0.05)
    to_muscle = depth - gland + 0.3 * bump
    in_fat, in_gland = smooth_step(depth - skin, 0.004), smooth_step(depth - fat + bump, 0.012)
    in_muscle, in_deep = smooth_step(to_muscle, 0.012), smooth_step(depth - muscle, 0.01)
    fascia = np.exp(-((to_muscle * height / 2.0) ** 2)) + np.exp(-(((depth - muscle) * height / 2.5) ** 2))
    return _Layers(
        skin=1 - in_fat,
        fat=in_fat * (1 - in_gland),
        gland=in_gland * (1 - in_muscle),
        muscle=in_muscle,
        deep=in_deep,
        fascia=fascia * rng.uniform(0.5, 1),
    )


def draw_tissue(rng: np.random.Generator, warp: Warp) -> tuple[Array, Array]:
    """Return the echo levels of the layers and of the mirror-like interfaces in them, both (H, W) in decibels."""
    height, width = warp.depth_px.shape
    layers = _layers(rng, warp)
    level = rng.uniform(0, 5) * layers.skin + rng.uniform(-10, -3) * layers.fat
    level += rng.uniform(-12, -4) * layers.muscle + rng.uniform(-6, 2) * layers.deep
    # Fat lobules among the glandular tissue and ducts: dark, and no lesion.
    lobules = smooth_step(_woven(rng, warp, depth_px=height / 9, lateral_px=width / 7) - rng.uniform(0.5, 1.4), 0.25)
    ducts = smooth_step(_woven(rng, warp, depth_px=height / 30, lateral_px=width / 18) - 2.1, 0.2)
    level -= layers.gland * (rng.uniform(3, 10) * lobules + rng.uniform(0, 14) * ducts)
    patches = _woven(rng, warp, depth_px=height / 12, lateral_px=width / 10) * rng.uniform(1.5, 3.5)
    grain = _woven(rng, warp, depth_px=height / 55, lateral_px=width / 28) * (1 + 1.5 * layers.gland)
    streaks = _woven(rng, warp, depth_px=height / 40, lateral_px=width / 7) * rng.uniform(1.5, 4.5)
    level += patches + grain + streaks * (0.4 + 0.6 * (layers.gland + layers.muscle))
    septa = _filaments(rng, warp, depth_px=height / 14, lateral_px=width / 3.5, width_px=1.6)
    strands = _filaments(rng, warp, depth_px=height / 18, lateral_px=width / 5, width_px=1.8)
    fibres = _filaments(rng, warp, depth_px=height / 22, lateral_px=width / 3.5, width_px=1.8)
    bright = septa * (layers.fat + 0.5 * layers.gland) + 0.75 * strands * layers.gland + 0.85 * fibres * layers.muscle
    bright = np.clip(np.maximum(bright, layers.fascia), 0, 1)
    specular_db = level + 40 * (bright - rng.uniform(0.5, 0.65))
    return np.asarray(level + 9 * bright, dtype=np.float32), np.asarray(specular_db, dtype=np.float32)


def insert(rng: np.random.Generator, lesion: Lesion, echo_db: Array, specular_db: Array) -> tuple[Array, Array]:
    """Put the lesion with its rim into the tissue; return both maps again."""
    shape = (lesion.mask.shape[0], lesion.mask.shape[1])
    radius = lesion.radius_px
    ragged = smooth_noise(rng, shape, depth_px=0.25 * radius + 4, lateral_px=0.25 * radius + 4)
    wander = lesion.softness_px * ragged * (0.7 if lesion.malignant else 0.2)
    inside = smooth_step(-(lesion.outside_px + wander), lesion.softness_px)
    around = echo_db[(lesion.outside_px > 2) & (lesion.outside_px < 12 + 0.4 * radius)]
    coarse = smooth_noise(rng, shape, depth_px=0.2 * radius + 4, lateral_px=0.5 * radius + 4)
    uneven_db = 0.5 if lesion.anechoic else rng.uniform(1.5, 4.0) if lesion.malignant else rng.uniform(0.8, 2.8)
    interior_db = float(around.mean()) + lesion.contrast_db + uneven_db * (coarse + 0.4 * ragged)
    echo_db = np.asarray(echo_db * (1 - inside) + interior_db * inside, dtype=np.float32)
    kept = 0.25 if lesion.malignant else 0.1  # strands that cross the lesion all but vanish
    specular_db = specular_db - 60 * inside * (1 - kept * np.clip(coarse, 0, 1))
    # A capsule mirrors where it faces the probe; a halo scatters all around, in patches.
    facing = np.abs(cv2.Sobel(lesion.outside_px, cv2.CV_32F, 0, 1, scale=0.125))
    if lesion.malignant:
        halo = np.exp(-(((lesion.outside_px - 0.12 * radius - 3) / (0.1 * radius + 4)) ** 2))
        echo_db = echo_db + rng.uniform(0, 6) * halo * np.clip(0.5 + 0.7 * ragged, 0, 1.2)
    else:
        rim = np.exp(-(((lesion.outside_px - 1) / 1.6) ** 2)) * np.clip(0.7 + 0.4 * ragged, 0, 1)
        echo_db = echo_db + rng.uniform(0, 5) * rim
        specular_db = np.maximum(specular_db, rng.uniform(-25, 6) - 40 * (1 - rim * facing**2))
    if lesion.malignant and rng.random() < 0.35:
        specular_db = np.maximum(specular_db, _calcifications(rng, lesion))
    return np.asarray(echo_db, dtype=np.float32), np.asarray(specular_db, dtype=np.float32)


def _calcifications(rng: np.random.Generator, lesion: Lesion) -> Array:
    """Draw bright dots inside the lesion, (H, W) in decibels."""
    rows, columns = np.nonzero(lesion.outside_px < -0.15 * lesion.radius_px)
    picks = rng.integers(0, rows.size, int(rng.integers(4, 16)))
    dots = np.zeros(lesion.mask.shape, dtype=np.float32)
    dots[rows[picks], columns[picks]] = rng.uniform(0.4, 1, picks.size)
    blurred = cv2.GaussianBlur(dots, (0, 0), 1.2) * 9
    return np.asarray(8 - 50 * (1 - np.minimum(blurred, 1)), dtype=np.float32)
