"""Near-duplicates in a data set: images of the same frame (crops, rescaled copies, calipers) and neighboring views.

Images of one lesion on both sides of a split let a network be tested on what it was trained on. OpenCV finds them: SIFT
features of all images in one search tree propose pairs, a similarity transform that many of them agree on confirms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from scipy.cluster.hierarchy import DisjointSet

SAME_FILE, SAME_FRAME, NEIGHBOR = "same pixels", "same frame", "neighboring view"
FEATURES = 500  # of an image, the strongest
PROPOSALS = 12  # images that an image is compared with, those that share most features
NEAREST = 6  # neighbors of a feature in the search tree; the first is itself
RATIO = 0.8  # Lowe's: the best match must be closer than this share of the second best
INLIERS = 24  # matches that agree on one similarity transform of a scale between 1 / SCALE and SCALE
SCALE = 2.0
INLIER_PX = 5.0
# Matches in few of the cells of an image, or along a line, are a burnt-in text or a logo.
CELLS, OCCUPIED = 8, 8  # along the shorter side; the fewest with a match
NARROW = 0.04  # of the shorter side: the least standard deviation of the matches' places across their long direction
SIDE, BACKGROUND_PX = 32, 6.0  # of the small copies of neighboring views, and the blur that is taken off as background
CORRELATION = 0.70


class Pair(NamedTuple):
    """Two images that belong together.

    Attributes:
        first: index of the one, below ``second``.
        second: index of the other.
        kind: SAME_FILE, SAME_FRAME or NEIGHBOR.
        strength: matches that agree, or the correlation.
    """

    first: int
    second: int
    kind: str
    strength: float


class Features(NamedTuple):
    """SIFT features of an image: (N, 2) float32 places and its shorter side in pixels, (N, 128) float32 descriptors."""

    places: np.ndarray
    descriptors: np.ndarray
    side: int


def find_pairs(
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    *,
    progress: Callable[[Iterable[int], str], Iterable[int]] = lambda steps, _: steps,
) -> list[Pair]:
    """Find the images of a data set that show the same frame, and those of one label that show neighboring views.

    Args:
        images: N gray images (H, W) uint8 of any sizes.
        labels: N labels; neighboring views are sought within a label.
        progress: wraps the steps of the slow parts, such as tqdm, with their name.

    Returns:
        Each pair once, in its strongest kind.
    """
    pairs = {(pair.first, pair.second): pair for pair in neighbors(images, labels)}
    features = [describe(images[number]) for number in progress(range(len(images)), "features")]
    proposed = propose(features, progress=progress)
    for first, second in (sorted(proposed)[step] for step in progress(range(len(proposed)), "pairs")):
        if (agreed := agreeing(features[first], features[second])) >= INLIERS:
            pairs[first, second] = Pair(first, second, SAME_FRAME, agreed)
    same: dict[str, int] = {}
    for number, image in enumerate(images):
        first = same.setdefault(hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest(), number)
        if first != number:
            pairs[first, number] = Pair(first, number, SAME_FILE, 1.0)
    return [pairs[key] for key in sorted(pairs)]


def describe(image: np.ndarray) -> Features:
    """Return the SIFT features of a gray image (H, W) uint8; descriptors as RootSIFT.

    Sources: Lowe, Distinctive image features from scale-invariant keypoints, IJCV 60, 2004; Arandjelovic and
    Zisserman, Three things everyone should know to improve object retrieval, CVPR 2012 (RootSIFT).
    """
    points, descriptors = cv2.SIFT.create(nfeatures=FEATURES).detectAndCompute(image, None)
    if descriptors is None:
        return Features(np.empty((0, 2), np.float32), np.empty((0, 128), np.float32), min(image.shape))
    unit = descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-7)
    places = np.array([point.pt for point in points], np.float32).reshape(-1, 2)
    return Features(places, np.sqrt(unit).astype(np.float32), min(image.shape))


def propose(
    features: Sequence[Features], *, progress: Callable[[Iterable[int], str], Iterable[int]]
) -> set[tuple[int, int]]:
    """Propose pairs: for each image the PROPOSALS others whose features are nearest to its features most often."""
    full = [number for number, image in enumerate(features) if len(image.descriptors)]
    if len(full) < 2:
        return set()
    tree = cv2.FlannBasedMatcher({"algorithm": 1, "trees": 4}, {"checks": 32})
    tree.add([features[number].descriptors for number in full])
    tree.train()
    cv2.setRNGSeed(0)
    pairs = set()
    for number in progress(full, "search"):
        votes = np.zeros(len(features))
        for nearest in tree.knnMatch(features[number].descriptors, k=NEAREST):
            others = {full[match.imgIdx] for match in nearest} - {number}
            votes[list(others)] += 1
        for other in np.argsort(-votes, kind="stable")[:PROPOSALS].tolist():
            if votes[other]:
                pairs.add((min(number, other), max(number, other)))
    return pairs


def agreeing(one: Features, other: Features) -> int:
    """Return how many matches of two images agree on one similarity transform (rotation, scale up to 2, shift).

    0 if they are in few places of the image or along a line: a shared burnt-in text does not make the same frame.
    """
    if min(len(one.descriptors), len(other.descriptors)) < 2:
        return 0
    nearest = cv2.BFMatcher(cv2.NORM_L2).knnMatch(one.descriptors, other.descriptors, k=2)
    kept = [first for first, second in nearest if first.distance < RATIO * second.distance]
    kept = list({match.trainIdx: match for match in sorted(kept, key=lambda match: -match.distance)}.values())
    if len(kept) < INLIERS:
        return 0
    source = one.places[[match.queryIdx for match in kept]]
    target = other.places[[match.trainIdx for match in kept]]
    cv2.setRNGSeed(0)
    transform, inliers = cv2.estimateAffinePartial2D(source, target, ransacReprojThreshold=INLIER_PX)
    if transform is None:
        return 0
    scale = float(np.hypot(transform[0, 0], transform[1, 0]))
    agreed = source[inliers.ravel() == 1]
    occupied = len(np.unique(agreed // (one.side / CELLS), axis=0))
    across = np.linalg.svd(agreed - agreed.mean(axis=0), compute_uv=False)[-1] / np.sqrt(len(agreed))
    is_spread = occupied >= OCCUPIED and across >= NARROW * one.side
    return len(agreed) if 1 / SCALE <= scale <= SCALE and is_spread else 0


def neighbors(images: Sequence[np.ndarray], labels: Sequence[str]) -> list[Pair]:
    """Return pairs of one label whose small copies (32 x 32), less their slow background, correlate at 0.70 or more."""
    small = np.stack([_small(image) for image in images])
    correlated = small @ small.T
    alike = np.triu(correlated >= CORRELATION, k=1) & (np.array(labels)[:, None] == np.array(labels))
    return [Pair(int(i), int(j), NEIGHBOR, float(correlated[i, j])) for i, j in np.argwhere(alike)]


def _small(image: np.ndarray) -> np.ndarray:
    copy = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    copy -= cv2.GaussianBlur(copy, (0, 0), BACKGROUND_PX)
    flat = copy.ravel() - copy.mean()
    return np.asarray(flat / max(float(np.linalg.norm(flat)), 1e-7))


def join(count: int, pairs: Iterable[Pair]) -> list[list[int]]:
    """Return the groups that pairs join, directly or through others: the larger ones first, no single images."""
    sets = DisjointSet(range(count))
    for pair in pairs:
        sets.merge(pair.first, pair.second)
    return sorted((sorted(group) for group in sets.subsets() if len(group) > 1), key=lambda group: (-len(group), group))
