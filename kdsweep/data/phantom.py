"""Synthetic B-mode breast-ultrasound phantoms: the embedded data set that needs no download.

An image is built as a scanner would see it. Layered tissue and one lesion give a map of echogenicity; complex
Gaussian scatterers weighted with it pass through a point-spread function that is finer in depth than across; the
magnitude is the envelope, whose speckle is Rayleigh in homogeneous tissue (Burckhardt 1978; Wagner et al. 1983);
attenuation accumulates down each column, so that shadows and enhancement lie behind what causes them; the sum is
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

Array = NDArray[np.float32]

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
        mask: The drawn lesion border, filled; (H, W) uint8 in {0, 1}. A shadow is no part of it.
    """

    id: str
    label: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


@dataclass(frozen=True)
class _Lesion:
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
class _Warp:
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


def cohort(*, count: int, seed: int) -> Iterator[Phantom]:
    """Yield phantoms lazily, benign and malignant mixed in the ratio 110 to 53.

    A shorter cohort of the same seed is the beginning of a longer one.

    Args:
        count: Number of phantoms, at least 1.
        seed: Seed of the cohort, at least 0.

    Returns:
        Iterator over `count` phantoms; 163 hold exactly 110 benign and 53 malignant ones.

    Raises:
        InputError: `count` is below 1.
    """
    if count < 1:
        raise InputError(f"data.count is {count}: it must be a whole number of phantoms, 1 or more")
    part, total = _MALIGNANT_SHARE

    def malignant_before(index: int) -> int:
        return (2 * index * part + total) // (2 * total)  # index * part / total, rounded

    labels = (LABELS[malignant_before(index + 1) - malignant_before(index)] for index in range(count))
    return (phantom(seed=seed, index=index, label=label) for index, label in enumerate(labels))


def phantom(*, seed: int, index: int, label: str) -> Phantom:
    """Make one phantom; the result depends on the arguments alone, not on what was made before.

    Other builds of NumPy or OpenCV may round a few pixels differently.

    Args:
        seed: Seed of the cohort, at least 0.
        index: Place in the cohort from 0; it also numbers the phantom.
        label: ``benign`` or ``malignant``.

    Returns:
        Image and mask of equal size, 300 to 460 pixels deep and 360 to 560 wide.

    Raises:
        ValueError: `label` is neither of the two.
    """
    if label not in LABELS:
        raise ValueError(f"label is {label!r}: one of {', '.join(LABELS)}")
    rng = np.random.default_rng([seed, index])
    shape = (int(rng.integers(300, 461)), int(rng.integers(360, 561)))
    lesion = _lesion(rng, shape, malignant=label == "malignant")
    warp = _bend(rng, lesion)
    echo_db, specular_db = _tissue(rng, warp)
    echo_db, specular_db = _insert(rng, lesion, echo_db, specular_db)
    gain_db = _attenuation(rng, lesion)
    scattered = _scatter(rng, echo_db, focus_px=shape[0] * rng.uniform(0.25, 0.6))
    image = _compress(rng, scattered, specular_db, gain_db)
    return Phantom(id=f"{label} ({index + 1})", label=label, image=image, mask=lesion.mask)


def _noise(rng: np.random.Generator, shape: tuple[int, int], *, depth_px: float, lateral_px: float) -> Array:
    """Draw smooth noise, (H, W), mean 0 and deviation about 1, with the correlation lengths."""
    # Two grid cells per correlation length and a blur of one cell: no trace of the grid survives the interpolation.
    rows, columns = (int(2 * side / scale) + 2 for side, scale in zip(shape, (depth_px, lateral_px), strict=True))
    coarse = cv2.GaussianBlur(rng.standard_normal((rows + 6, columns + 6), dtype=np.float32), (7, 7), 1.0)
    fine = cv2.resize(coarse[3:-3, 3:-3], (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    return np.asarray(fine * np.float32(2 * np.sqrt(np.pi)), dtype=np.float32)  # undoes the blur's loss of deviation


def _step(values: Array, softness: float | Array = 1.0) -> Array:
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
    high[1] = max(min(high[1], 0.75 * shape[0]), low[1])  # nor so deep that nobody would look for it
    center = low + (high - low) * np.array([rng.beta(2, 2), rng.beta(1.5, 2.5)])
    mask = np.zeros(shape, dtype=np.uint8)
    cv2.fillPoly(mask, [np.rint(outline + center).astype(np.int32)], 1)
    return mask, float(center[1])


def _lesion(rng: np.random.Generator, shape: tuple[int, int], *, malignant: bool) -> _Lesion:
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
    return _Lesion(
        malignant=malignant,
        mask=mask,
        outside_px=outer - inner,
        radius_px=radius_px,
        center_px=center_px,
        contrast_db=contrast_db,
        softness_px=softness_px,
        anechoic=anechoic,
    )


def _bend(rng: np.random.Generator, lesion: _Lesion) -> _Warp:
    """Bend the layers: undulation, a curved chest wall, and tissue pushed aside around the lesion."""
    height, width = lesion.mask.shape
    depth, lateral = np.mgrid[:height, :width].astype(np.float32)
    across = (lateral / width - rng.uniform(0.3, 0.7)) * 2
    wave = _noise(rng, (height, width), depth_px=height / 2, lateral_px=width / 3) * height * rng.uniform(0.008, 0.035)
    fine = _noise(rng, (height, width), depth_px=height / 8, lateral_px=width / 14) * height * rng.uniform(0.003, 0.01)
    slope = rng.normal(0, 0.05) * across + rng.normal(0.02, 0.04) * across**2
    deeper = np.minimum(depth / (0.3 * height), 1)  # the skin lies flat under the probe
    near = np.exp(-np.maximum(lesion.outside_px, 0) / (0.5 * lesion.radius_px))
    push = rng.uniform(0.2, 0.6) * (lesion.center_px - depth) * near
    bent = depth + (wave + fine + slope * height) * deeper + push
    sideways = lateral + _noise(rng, (height, width), depth_px=height / 4, lateral_px=width / 4) * 0.02 * width
    return _Warp(np.asarray(bent, dtype=np.float32), np.asarray(sideways, dtype=np.float32))


def _woven(rng: np.random.Generator, warp: _Warp, *, depth_px: float, lateral_px: float) -> Array:
    """Draw smooth noise that follows the bent layers."""
    shape = (warp.depth_px.shape[0], warp.depth_px.shape[1])
    flat = _noise(rng, shape, depth_px=depth_px, lateral_px=lateral_px)
    return np.asarray(cv2.remap(flat, warp.lateral_px, warp.depth_px, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def _filaments(rng: np.random.Generator, warp: _Warp, *, depth_px: float, lateral_px: float, width_px: float) -> Array:
    """Draw thin interrupted lines in [0, 1], (H, W): the zero crossings of noise that follows the layers."""
    noise = _woven(rng, warp, depth_px=depth_px, lateral_px=lateral_px)
    across, down = (cv2.Sobel(noise, cv2.CV_32F, dx, 1 - dx, scale=0.125) for dx in (1, 0))
    slope = cv2.magnitude(across, down) + np.float32(1e-5)
    gate = np.clip(0.5 + 0.7 * _woven(rng, warp, depth_px=depth_px, lateral_px=0.5 * lateral_px), 0, 1.5)
    line = np.exp(-((noise / (slope * width_px * (0.4 + gate))) ** 2))
    # An interface mirrors best where it faces the probe.
    return np.asarray(line * np.minimum(gate, 1) * np.abs(down) / slope, dtype=np.float32)


def _layers(rng: np.random.Generator, warp: _Warp) -> _Layers:
    """Stack skin, fat, gland and muscle at random depths of the bent tissue."""
    height, width = warp.depth_px.shape
    depth = warp.depth_px / height
    skin, fat = rng.uniform(0.02, 0.05), rng.uniform(0.16, 0.38)
    gland = fat + rng.uniform(0.15, 0.4)
    muscle = gland + rng.uniform(0.15, 0.3)
    bump = _woven(rng, warp, depth_px=height / 5, lateral_px=width / 8) * rng.uniform(0.01, 0.05)
    to_muscle = depth - gland + 0.3 * bump
    in_fat, in_gland = _step(depth - skin, 0.004), _step(depth - fat + bump, 0.012)
    in_muscle, in_deep = _step(to_muscle, 0.012), _step(depth - muscle, 0.01)
    fascia = np.exp(-((to_muscle * height / 2.0) ** 2)) + np.exp(-(((depth - muscle) * height / 2.5) ** 2))
    return _Layers(
        skin=1 - in_fat,
        fat=in_fat * (1 - in_gland),
        gland=in_gland * (1 - in_muscle),
        muscle=in_muscle,
        deep=in_deep,
        fascia=fascia * rng.uniform(0.5, 1),
    )


def _tissue(rng: np.random.Generator, warp: _Warp) -> tuple[Array, Array]:
    """Return the echo levels of the layers and of the mirror-like interfaces in them, both (H, W) in decibels."""
    height, width = warp.depth_px.shape
    layers = _layers(rng, warp)
    level = rng.uniform(0, 5) * layers.skin + rng.uniform(-10, -3) * layers.fat
    level += rng.uniform(-12, -4) * layers.muscle + rng.uniform(-6, 2) * layers.deep
    # Fat lobules among the glandular tissue and ducts: dark, and no lesion.
    lobules = _step(_woven(rng, warp, depth_px=height / 9, lateral_px=width / 7) - rng.uniform(0.5, 1.4), 0.25)
    ducts = _step(_woven(rng, warp, depth_px=height / 30, lateral_px=width / 18) - 2.1, 0.2)
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


def _insert(rng: np.random.Generator, lesion: _Lesion, echo_db: Array, specular_db: Array) -> tuple[Array, Array]:
    """Put the lesion with its rim into the tissue; return both maps again."""
    shape = (lesion.mask.shape[0], lesion.mask.shape[1])
    radius = lesion.radius_px
    ragged = _noise(rng, shape, depth_px=0.25 * radius + 4, lateral_px=0.25 * radius + 4)
    wander = lesion.softness_px * ragged * (0.7 if lesion.malignant else 0.2)
    inside = _step(-(lesion.outside_px + wander), lesion.softness_px)
    around = echo_db[(lesion.outside_px > 2) & (lesion.outside_px < 12 + 0.4 * radius)]
    coarse = _noise(rng, shape, depth_px=0.2 * radius + 4, lateral_px=0.5 * radius + 4)
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


def _calcifications(rng: np.random.Generator, lesion: _Lesion) -> Array:
    """Draw bright dots inside the lesion, (H, W) in decibels."""
    rows, columns = np.nonzero(lesion.outside_px < -0.15 * lesion.radius_px)
    picks = rng.integers(0, rows.size, int(rng.integers(4, 16)))
    dots = np.zeros(lesion.mask.shape, dtype=np.float32)
    dots[rows[picks], columns[picks]] = rng.uniform(0.4, 1, picks.size)
    blurred = cv2.GaussianBlur(dots, (0, 0), 1.2) * 9
    return np.asarray(8 - 50 * (1 - np.minimum(blurred, 1)), dtype=np.float32)


def _attenuation(rng: np.random.Generator, lesion: _Lesion) -> Array:
    """Return the gain in decibels, (H, W): tissue's losses that time-gain compensation did not restore."""
    height, width = lesion.mask.shape
    depth = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    lateral = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    knee, drop_db = rng.uniform(0.15, 0.45), rng.uniform(10, 32)
    gain = -drop_db * np.maximum(depth - knee, 0) / (1 - knee) + rng.uniform(4, 12) * np.exp(-depth / 0.012)
    # Poor contact at the sides, and shadows of the nipple, ligaments or ribs that no lesion casts.
    gain = gain + rng.normal(0, 1.0) * _noise(rng, (height, width), depth_px=2 * height, lateral_px=width / 7)
    for side in (lateral, 1 - lateral):
        gain = gain - float(rng.choice([0, 12], p=[0.65, 0.35])) * np.exp(-((side / rng.uniform(0.03, 0.12)) ** 2))
    for _ in range(rng.integers(0, 4)):
        start, middle, spread = rng.uniform(0.05, 0.8), rng.random(), rng.uniform(0.02, 0.09)
        ragged = _noise(rng, (height, width), depth_px=height / 3, lateral_px=width / 20)
        column = np.exp(-(((lateral - middle + 0.3 * spread * ragged) / (spread * (0.7 + 0.6 * depth))) ** 2))
        gain = gain - rng.uniform(3, 14) * column * _step(depth - start + 0.03 * ragged, 0.06)
    return np.asarray(gain - _loss_behind(rng, lesion) - _edge_shadows(rng, lesion), dtype=np.float32)


def _loss_behind(rng: np.random.Generator, lesion: _Lesion) -> Array:
    """Return the loss in decibels, (H, W), along paths through the lesion: a shadow, or enhancement if negative."""
    if lesion.malignant:
        through_db = float(rng.choice([-5, 0, 10, 20], p=[0.1, 0.2, 0.4, 0.3])) * rng.uniform(0.7, 1.3)
    elif lesion.anechoic:
        through_db = rng.uniform(-14, -8)
    else:
        through_db = float(rng.choice([-6, -2, 5], p=[0.45, 0.35, 0.2]))
    path = np.cumsum(lesion.mask, axis=0, dtype=np.float32) / (2 * lesion.radius_px)
    path = cv2.GaussianBlur(path, (0, 0), sigmaX=2 + 0.1 * lesion.radius_px, sigmaY=2)
    # Within the lesion half the loss counts: its contrast is drawn apart and would be lost in its own shadow.
    share = 0.5 + 0.5 * _step(lesion.outside_px, 2 + 0.15 * lesion.radius_px)
    return np.asarray(through_db * np.minimum(path, 1.4) * share, dtype=np.float32)


def _edge_shadows(rng: np.random.Generator, lesion: _Lesion) -> Array:
    """Return the loss in decibels, (H, W), by refraction at the sides of a smooth lesion."""
    height, width = lesion.mask.shape
    if lesion.malignant:
        return np.zeros((height, width), dtype=np.float32)
    columns = np.nonzero(lesion.mask.any(axis=0))[0]
    lateral = np.arange(width, dtype=np.float32)[None, :]
    below = _step(np.arange(height, dtype=np.float32)[:, None] - lesion.center_px, 0.3 * lesion.radius_px)
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
    beam = (1 - away) * narrow.T + away * wide.T  # each row's own lateral kernel, for its energy
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
