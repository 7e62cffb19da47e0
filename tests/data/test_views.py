"""Views: seeded draws, masks, and the warp between the views against Albumentations' warp."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdsweep.data import views
from kdsweep.data.views import Rendering, Strengths, Views
from kdsweep.distill.distillation import warp

SIZE = 64
SEEDS = range(5)
# No noise, no dropout, and an affine that always applies and leaves much of the frame uncovered.
GEOMETRY = Strengths(shift=0.3, scale=0.2, rotate_deg=45, noise_std=(0.0, 0.0), dropout=0.0, probability=1.0)
PAPER = Strengths(shift=0.0625, scale=0.1, rotate_deg=45, noise_std=(0.0124, 0.0277), dropout=0.01, probability=0.5)


def smooth_image(height: int = SIZE + 12, width: int = SIZE + 20) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    gray = 127.5 + 60 * np.sin(2 * np.pi * x / 30) + 60 * np.cos(2 * np.pi * y / 36 + 0.02 * x)
    return np.repeat(gray.round().astype(np.uint8)[..., None], 3, axis=2)


def noise_image(height: int = SIZE + 12, width: int = SIZE + 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def disc_mask(height: int = SIZE + 12, width: int = SIZE + 20) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((x - width / 2) ** 2 + (y - height / 2) ** 2 < 20**2).astype(np.uint8)


def render(strengths: Strengths, *seed: int, image: np.ndarray | None = None) -> Rendering:
    image = smooth_image() if image is None else image
    drawn = Views(image_size=SIZE, strengths=strengths)
    return drawn.render(image=image, mask=disc_mask(*image.shape[:2]), seed=list(seed))


def same(first: Rendering, second: Rendering) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def theta_of(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(views.sampling_theta(matrix, image_size=SIZE))[None]


def maps_of(image: np.ndarray) -> Tensor:
    """(1, 1, H, W) float32 of an image's first channel, or of a mask."""
    return torch.from_numpy((image if image.ndim == 2 else image[..., 0]).astype(np.float32))[None, None]


def source_of_cells(matrix: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the center of each strong cell (row, column) is in the weak frame, in pixels: x and y."""
    centers = (np.arange(cells) + 0.5) * SIZE / cells - 0.5
    x, y = np.meshgrid(centers, centers)
    inverse = np.linalg.inv(matrix)
    source = inverse @ np.stack([x.ravel(), y.ravel(), np.ones(cells**2)])
    return source[0].reshape(cells, cells), source[1].reshape(cells, cells)


def outside_by(matrix: np.ndarray, cells: int) -> np.ndarray:
    """How far (pixels) each strong cell's source is outside the weak frame; negative inside."""
    x, y = source_of_cells(matrix, cells)
    middle = (SIZE - 1) / 2
    return np.maximum(np.abs(x - middle), np.abs(y - middle)) - SIZE / 2


# ---- draws ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_views_whatever_was_drawn_before() -> None:
    drawn, image, mask = Views(image_size=SIZE, strengths=PAPER), noise_image(), disc_mask()
    seeds = [[0, 1, epoch, image_id] for epoch in range(4) for image_id in (7, 8)]
    first = {tuple(seed): drawn.render(image=image, mask=mask, seed=seed) for seed in seeds}
    np.random.seed(1)  # noqa: NPY002 - it is the global state that must not matter
    torch.manual_seed(1)
    drawn.render(image=noise_image(90, 90), mask=disc_mask(90, 90), seed=[99])
    for seed in reversed(seeds):
        assert same(first[tuple(seed)], drawn.render(image=image, mask=mask, seed=seed))
        assert same(first[tuple(seed)], render(PAPER, *seed, image=image))
    drawn_views = list(first.values())
    assert not any(same(one, other) for i, one in enumerate(drawn_views) for other in drawn_views[:i])


def test_rendering_leaves_the_image_and_the_global_random_state_alone() -> None:
    image, before = noise_image(), np.random.get_state()[1].copy()  # noqa: NPY002 - the state under test
    kept = image.copy()
    render(PAPER, 3, image=image)
    assert np.array_equal(image, kept)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_without_the_strong_transforms_both_views_are_the_same_crop() -> None:
    never = Strengths(shift=0.3, scale=0.2, rotate_deg=45, noise_std=(0.1, 0.2), dropout=0.5, probability=0.0)
    for seed in range(20):
        rendering = render(never, seed, image=noise_image())
        assert np.array_equal(rendering.strong, rendering.weak)
        assert np.array_equal(rendering.strong_mask, rendering.weak_mask)
        assert np.array_equal(rendering.matrix, np.eye(3))


def test_the_weak_view_is_a_random_crop_of_image_and_mask_alike() -> None:
    image, mask = noise_image(), disc_mask()
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    image[..., 0], image[..., 1] = x, y  # each pixel says where it came from
    corners = set()
    for seed in range(40):
        weak = render(PAPER, seed, image=image)
        left, top = (int(value) for value in weak.weak[0, 0, :2])
        window = (slice(top, top + SIZE), slice(left, left + SIZE))
        assert np.array_equal(weak.weak, image[window])
        assert np.array_equal(weak.weak_mask, mask[window])
        corners.add((left, top))
    assert len(corners) > 30
    assert min(left for left, _ in corners) < 5, "crops reach across the image"
    assert max(left for left, _ in corners) > 15


def test_the_crop_does_not_depend_on_the_strong_transforms() -> None:
    for seed in SEEDS:
        assert np.array_equal(render(PAPER, seed).weak, render(GEOMETRY, seed).weak)


def test_the_three_strong_transforms_are_drawn_independently() -> None:
    """One seed for all three, as Compose.set_random_seed gives, would leave only all-on and all-off."""
    strengths = Strengths(shift=0.05, scale=0.1, rotate_deg=20, noise_std=(0.05, 0.05), dropout=0.1, probability=0.5)
    drawn = Views(image_size=32, strengths=strengths)
    gray, empty = np.full((36, 36, 3), 128, dtype=np.uint8), np.zeros((36, 36), dtype=np.uint8)
    counts: dict[tuple[bool, bool, bool], int] = {}
    for seed in range(300):
        rendering = drawn.render(image=gray, mask=empty, seed=[seed])
        center = rendering.strong[8:24, 8:24, 0]  # always covered, so a 0 is a dropped pixel and not the frame
        moved = not np.array_equal(rendering.matrix, np.eye(3))
        noisy, dropped = bool(np.any((center != 128) & (center != 0))), bool(np.any(center == 0))
        counts[moved, noisy, dropped] = counts.get((moved, noisy, dropped), 0) + 1
    assert len(counts) == 8
    assert min(counts.values()) > 20  # 300 / 8 = 37.5 each, deviation 5.7
    assert max(counts.values()) < 57


def test_a_mirrored_image_is_mirrored_in_both_views_and_masks_and_moves_nothing_else() -> None:
    image = noise_image()
    never, always, half = (replace(PAPER, flip=share) for share in (0.0, 1.0, 0.5))
    flipped = 0
    for seed in range(60):
        plain, mirrored, drawn = (render(each, seed, image=image) for each in (never, always, half))
        for name in ("weak", "weak_mask"):
            assert np.array_equal(getattr(mirrored, name), getattr(plain, name)[:, ::-1])
        assert np.array_equal(mirrored.matrix, plain.matrix), "the warp is between the views: both are mirrored"
        again = cv2.warpAffine(mirrored.weak_mask, mirrored.matrix[:2], (SIZE, SIZE), flags=cv2.INTER_NEAREST)
        assert np.mean(again != mirrored.strong_mask) < 0.02
        assert same(drawn, mirrored) or same(drawn, plain)
        flipped += same(drawn, mirrored)
    assert 20 < flipped < 40  # 30, deviation 3.9


def test_contrast_changes_the_gray_levels_of_the_strong_view_alone() -> None:
    still = Strengths(shift=0, scale=0, rotate_deg=0, noise_std=(0, 0), dropout=0, probability=1.0)
    image, means, spreads = smooth_image(), [], []
    for seed in range(60):
        plain, drawn = render(still, seed, image=image), render(replace(still, contrast=0.3), seed, image=image)
        assert np.array_equal(drawn.weak, plain.weak)
        assert not np.array_equal(drawn.strong, plain.strong), "applied with the probability of the others, here 1"
        assert np.array_equal(drawn.strong_mask, plain.strong_mask)
        assert np.array_equal(drawn.strong[..., 0], drawn.strong[..., 2]), "gray stays gray"
        means.append(drawn.strong.mean() / plain.strong.mean())
        inside = (drawn.strong > 0) & (drawn.strong < 255)  # others are cut off
        spreads.append(np.polyfit(plain.strong[inside].astype(float), drawn.strong[inside].astype(float), 1)[0])
    assert 0.69 < min(spreads) < 0.8 < 1.2 < max(spreads) < 1.31  # the slope is the contrast
    assert min(means) < 0.8 < 1.2 < max(means)


def test_noise_keeps_a_gray_image_gray_and_dropout_zeroes_its_share() -> None:
    noise = Strengths(shift=0, scale=0, rotate_deg=0, noise_std=(0.05, 0.05), dropout=0.0, probability=1.0)
    rendering = render(noise, 0, image=np.full((70, 70, 3), 128, dtype=np.uint8)).strong.astype(float)
    assert np.array_equal(rendering[..., 0], rendering[..., 1])
    assert np.array_equal(rendering[..., 0], rendering[..., 2])
    assert rendering[..., 0].std() == pytest.approx(0.05 * 255, rel=0.05)
    dropout = Strengths(shift=0, scale=0, rotate_deg=0, noise_std=(0.0, 0.0), dropout=0.1, probability=1.0)
    rendering = render(dropout, 0, image=np.full((70, 70, 3), 128, dtype=np.uint8)).strong
    assert set(np.unique(rendering)) == {0, 128}
    assert np.mean(rendering == 0) == pytest.approx(0.1, abs=0.02)
    both = Views(image_size=SIZE, strengths=replace(dropout, noise_std=(0.05, 0.05)))
    drawn = both.render(image=noise_image(), mask=disc_mask(), seed=[0])
    assert np.array_equal(drawn.strong_mask, drawn.weak_mask), "a pixel that is dropped or noisy is lesion all the same"


def test_the_affine_stays_within_its_ranges_and_scales_both_axes_apart() -> None:
    strengths = Strengths(shift=0.1, scale=0.2, rotate_deg=0, noise_std=(0, 0), dropout=0.0, probability=1.0)
    matrices = np.stack([render(strengths, seed).matrix for seed in range(60)])
    x_scale, y_scale = matrices[:, 0, 0], matrices[:, 1, 1]
    for scales in (x_scale, y_scale):
        assert 0.8 <= scales.min() < 0.87 < 1.13 < scales.max() <= 1.2
    assert abs(np.corrcoef(x_scale, y_scale)[0, 1]) < 0.4
    middle = np.array([(SIZE - 1) / 2, (SIZE - 1) / 2, 1])
    shifts = (matrices @ middle - middle)[:, :2] / SIZE
    for along in shifts.T:
        assert -0.1 - 1 / SIZE < along.min() < -0.07
        assert 0.07 < along.max() < 0.1 + 1 / SIZE
    turned = Strengths(shift=0, scale=0, rotate_deg=30, noise_std=(0, 0), dropout=0.0, probability=1.0)
    angles = [math.degrees(math.atan2(m[1, 0], m[0, 0])) for m in (render(turned, seed).matrix for seed in range(60))]
    assert -30 <= min(angles) < -22
    assert 22 < max(angles) <= 30


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strengths", [PAPER, GEOMETRY])
def test_masks_stay_zero_and_one(strengths: Strengths) -> None:
    for seed in range(20):
        rendering = render(strengths, seed)
        for mask in (rendering.weak_mask, rendering.strong_mask):
            assert mask.dtype == np.uint8
            assert mask.shape == (SIZE, SIZE)
            assert set(np.unique(mask)) <= {0, 1}
        for image in (rendering.weak, rendering.strong):
            assert image.dtype == np.uint8
            assert image.shape == (SIZE, SIZE, 3)


def test_the_strong_mask_is_the_weak_mask_warped() -> None:
    for seed in range(20):
        rendering = render(GEOMETRY, seed)
        warped, valid = warp(maps_of(rendering.weak_mask), theta=theta_of(rendering.matrix))
        warped_mask, strong_mask = ((warped > 0.5) & valid)[0, 0].numpy(), rendering.strong_mask == 1
        assert (warped_mask & strong_mask).sum() / (warped_mask | strong_mask).sum() > 0.93
        if seed < 5:
            still = rendering.weak_mask == 1
            assert (still & strong_mask).sum() / (still | strong_mask).sum() < 0.9, "the mask must have moved"


# ---- the matrix ----------------------------------------------------------------------------------------------------


def test_the_matrix_is_the_one_that_albumentations_applied() -> None:
    for seed in SEEDS:
        rendering = render(GEOMETRY, seed, image=noise_image())
        again = cv2.warpAffine(rendering.weak, rendering.matrix[:2], (SIZE, SIZE), flags=cv2.INTER_LINEAR)
        assert np.array_equal(again, rendering.strong)
        assert rendering.matrix.dtype == np.float64
        assert not np.array_equal(rendering.strong, rendering.weak)


# ---- the warp against Albumentations' warp ----------------------------------------------------------------------


def interior(valid: Tensor, margin: int = 3) -> Tensor:
    """Valid pixels that are this far from the frame's edge and from invalid ones."""
    hollow = F.pad((~valid).float(), [margin] * 4, value=1.0)
    return F.max_pool2d(hollow, 2 * margin + 1, stride=1) == 0


def errors(warped: Tensor, rendering: Rendering, inside: Tensor) -> Tensor:
    """Gray levels between a warped weak view and Albumentations' strong one."""
    return (warped - maps_of(rendering.strong))[inside].abs()


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_is_albumentations_warp_to_the_gray_level(seed: int) -> None:
    rendering = render(GEOMETRY, seed)
    warped, valid = warp(maps_of(rendering.weak), theta=theta_of(rendering.matrix))
    inside = interior(valid)
    assert inside.float().mean() > 0.3
    error = errors(warped, rendering, inside)
    assert error.mean() < 0.3  # Albumentations rounds to integer gray levels: 0.25 on average, 0.5 at most
    assert error.max() < 0.6
    unwarped = errors(maps_of(rendering.weak), rendering, inside)
    assert unwarped.mean() > 20, "the views must differ"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("grid_corners", "sample_corners"), [(True, True), (True, False), (False, True)])
def test_another_corner_convention_would_be_seen(seed: int, grid_corners: bool, sample_corners: bool) -> None:
    rendering = render(GEOMETRY, seed)
    weak, theta = maps_of(rendering.weak), theta_of(rendering.matrix)
    _, valid = warp(weak, theta=theta)
    grid = F.affine_grid(theta, [1, 1, SIZE, SIZE], align_corners=grid_corners)
    warped = F.grid_sample(weak, grid, padding_mode="border", align_corners=sample_corners)
    limit = 1.5 if grid_corners and sample_corners else 5  # both wrong: the translation alone is off, by 1 / SIZE of it
    assert errors(warped, rendering, interior(valid)).max() > limit


def ramp_case(matrix: np.ndarray, *, cells: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """A linear ramp over the weak frame, what it is in the strong frame, and where bilinear sampling must give it."""

    def ramp(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return 0.5 * x - 0.25 * y + 3

    weak_x, weak_y = source_of_cells(np.eye(3), cells)
    x, y = source_of_cells(matrix, cells)
    outermost = weak_x.max()  # beyond the outermost centers the map continues flat
    inside = (np.minimum(x, y) >= weak_x.min()) & (np.maximum(x, y) <= outermost)
    return torch.from_numpy(ramp(weak_x, weak_y)).float()[None, None], ramp(x, y), inside


@pytest.mark.parametrize("cells", [7, 14, SIZE])
@pytest.mark.parametrize("seed", SEEDS)
def test_one_theta_serves_maps_of_any_resolution(seed: int, cells: int) -> None:
    matrix = render(GEOMETRY, seed).matrix
    ramp, expected, inside = ramp_case(matrix, cells=cells)
    warped, valid = warp(ramp, theta=theta_of(matrix))
    assert warped.shape == ramp.shape
    assert inside.mean() > 0.2
    assert valid[0, 0].numpy()[inside].all()
    assert warped[0, 0].numpy()[inside] == pytest.approx(expected[inside], abs=1e-3)


def test_warp_moves_every_channel_and_image_by_its_theta() -> None:
    matrices = [render(GEOMETRY, seed).matrix for seed in (0, 1)]
    maps = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    together, valid = warp(maps, theta=torch.cat([theta_of(matrix) for matrix in matrices]))
    assert valid.shape == (2, 1, 7, 7)
    for i, matrix in enumerate(matrices):
        for channel in range(3):
            alone, inside = warp(maps[i : i + 1, channel : channel + 1], theta=theta_of(matrix))
            torch.testing.assert_close(together[i, channel], alone[0, 0])
            assert torch.equal(valid[i], inside[0])


def test_the_channel_mean_commutes_with_the_warp() -> None:
    theta = theta_of(render(GEOMETRY, 2).matrix)
    maps = torch.randn(1, 8, 7, 7, generator=torch.Generator().manual_seed(1))
    before, _ = warp(maps.mean(dim=1, keepdim=True), theta=theta)
    after, _ = warp(maps, theta=theta)
    torch.testing.assert_close(before, after.mean(dim=1, keepdim=True))


# ---- where the warp is valid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [7, SIZE])
@pytest.mark.parametrize("seed", SEEDS)
def test_valid_is_false_exactly_where_the_source_lies_outside(seed: int, cells: int) -> None:
    matrix = render(GEOMETRY, seed).matrix
    _, valid = warp(torch.zeros(1, 1, cells, cells), theta=theta_of(matrix))
    outside = outside_by(matrix, cells)
    clear = np.abs(outside) > 1e-3  # what is on the border itself may fall either way
    assert clear.mean() > 0.99
    assert np.array_equal(valid[0, 0].numpy()[clear], outside[clear] < 0)
    assert valid.any()
    assert not valid.all()


@pytest.mark.parametrize("seed", SEEDS)
def test_albumentations_covers_what_is_valid(seed: int) -> None:
    rendering = render(GEOMETRY, seed, image=np.full((SIZE, SIZE, 3), 255, dtype=np.uint8))
    _, valid = warp(maps_of(rendering.weak), theta=theta_of(rendering.matrix))
    # The edge's pixels blend with the black outside: leave those within one pixel of it out.
    outside = outside_by(rendering.matrix, SIZE)
    strong, clear = rendering.strong[..., 0], np.abs(outside) > 1.5
    assert (strong[clear & valid[0, 0].numpy()] == 255).all()
    assert (strong[clear & ~valid[0, 0].numpy()] == 0).all()
    assert (clear & ~valid[0, 0].numpy()).sum() > 50


@pytest.mark.parametrize("cells", [7, SIZE])
def test_the_identity_leaves_the_map_as_it_is_and_valid(cells: int) -> None:
    maps = torch.randn(2, 3, cells, cells, generator=torch.Generator().manual_seed(2))
    warped, valid = warp(maps, theta=theta_of(np.eye(3)).repeat(2, 1, 1))
    torch.testing.assert_close(warped, maps, rtol=1e-5, atol=1e-4)
    assert valid.dtype == torch.bool
    assert valid.all()


def test_a_shift_by_hand() -> None:
    """The frame moves right by two of its four columns: they repeat its border and are not valid."""
    matrix = np.array([[1.0, 0, SIZE / 2], [0, 1, 0], [0, 0, 1]])
    warped, valid = warp(torch.tensor([[[[1.0, 2, 3, 4]] * 4]]), theta=theta_of(matrix))
    assert warped[0, 0] == pytest.approx(torch.tensor([[1.0, 1, 1, 2]] * 4), abs=1e-5)
    assert valid[0, 0].tolist() == [[False, False, True, True]] * 4


def test_sampling_theta_by_hand() -> None:
    # 2 x larger about the pixel (-1/2, -1/2), the frame's corner: from [-1, 1] the left upper quarter is read
    matrix = np.array([[2.0, 0, 0.5], [0, 2, 0.5], [0, 0, 1]])
    expected = np.array([[0.5, 0, -0.5], [0, 0.5, -0.5]])
    assert views.sampling_theta(matrix, image_size=224) == pytest.approx(expected, abs=1e-6)
    assert views.sampling_theta(matrix, image_size=224).dtype == np.float32


def test_bf16_autocast_does_not_blur_coordinates() -> None:
    rendering = render(GEOMETRY, 0)
    weak, theta = maps_of(rendering.weak), theta_of(rendering.matrix)
    warped, valid = warp(weak, theta=theta)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warped_bf16, valid_bf16 = warp(weak, theta=theta)
        from_bf16, _ = warp(weak.bfloat16(), theta=theta)
    assert torch.equal(warped_bf16, warped)
    assert torch.equal(valid_bf16, valid)
    assert from_bf16.dtype == torch.float32
    torch.testing.assert_close(from_bf16, warped, rtol=2**-8, atol=1e-3)


# ---- normalization and ids -----------------------------------------------------------------------------------------


def test_normalize_by_hand_in_channels_last_memory() -> None:
    images = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
    images[0, 1, 2] = torch.tensor([255, 128, 0])
    normalized = views.normalize(images)
    assert normalized.shape == (2, 3, 4, 5)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    assert normalized[0, :, 1, 2].tolist() == pytest.approx(expected, rel=1e-5)
    assert normalized[1, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-5)


def test_id_number_is_the_start_of_the_ids_sha256() -> None:
    assert views.id_number("abc") == 0xBA7816BF
    assert len({views.id_number(f"benign ({i})") for i in range(500)}) == 500
