"""Augmentation: geometry by centroids, image and label together, draws keyed by the patch."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import AugmentationSection
from pipeline.networks.contract import centre_crop
from pipeline.training.sampling.augmentation import Augmentation
from pipeline.training.sampling.changes import _together
from pipeline.training.sampling.deformation import largest_share, rotations, spline_weights
from pipeline.training.sampling.intensity import Intensity, blurred

PATCH = (24, 20, 16)
NONE = {
    "affine_probability": 0.0,
    "elastic_probability": 0.0,
    "noise_probability": 0.0,
    "blur_probability": 0.0,
    "brightness_probability": 0.0,
    "contrast_probability": 0.0,
    "gamma_probability": 0.0,
    "low_resolution_probability": 0.0,
}


def augmentation(
    seed: int = 0,
    num_classes: int = 4,
    patch: tuple[int, int, int] = PATCH,
    target: tuple[int, int, int] | None = None,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    **changes: object,
) -> Augmentation:
    return Augmentation(
        AugmentationSection(**{**NONE, **changes}),  # type: ignore[arg-type]
        patch_size=patch,
        target_size=target or patch,
        left_right_axis=0,
        paired_classes=((1, 2),),
        num_classes=num_classes,
        spacing_mm=spacing_mm,
        seed=seed,
    )


def apply(changing: Augmentation, image: Tensor, label: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Change patches whose numbers begin at `first`."""
    return changing(image, label, changing.draw(range(first, first + len(image))))


def scaling(factor: float) -> Augmentation:
    """Every patch goes through the sampling grid, scaled about its middle and nothing else."""
    return augmentation(
        affine_probability=1.0,
        rotation_degrees=0.0,
        scale=(factor, factor),
        scale_anisotropy=0.0,
        shift_voxels=0.0,
    )


def batch(size: tuple[int, int, int], count: int = 3) -> tuple[Tensor, Tensor]:
    """Two boxes, of classes 1 and 2, off the middle; the image is 1 + class, smooth noise-free."""
    label = torch.zeros(count, *size, dtype=torch.uint8)
    x, y, z = (n // 2 for n in size)
    label[:, x - 7 : x - 2, y - 4 : y + 1, z - 3 : z + 4] = 1
    label[:, x + 1 : x + 6, y - 2 : y + 6, z - 3 : z + 2] = 2
    return 1 + label[:, None].float(), label


def centroid(mask: Tensor) -> Tensor:
    return torch.nonzero(mask).float().mean(0)


def test_disabled_returns_the_patch_itself() -> None:
    plain = augmentation(enabled=False)
    assert plain.read_size == PATCH
    image, label = batch(PATCH)
    changed, target = apply(plain, image, label, 0)
    assert torch.equal(changed, image)
    assert torch.equal(target, label.long())


def test_with_nothing_drawn_the_middle_of_what_was_read_is_returned() -> None:
    nothing = augmentation()
    image, label = batch(nothing.read_size)
    rim = [(r - p) // 2 for r, p in zip(nothing.read_size, PATCH, strict=True)]
    assert min(rim) >= 1
    inner = tuple(slice(m, m + p) for m, p in zip(rim, PATCH, strict=True))
    changed, target = apply(nothing, image, label, 0)
    assert torch.equal(changed, image[:, :, *inner])
    assert torch.equal(target, label[:, *inner].long())


def test_an_identity_transform_through_the_grid_moves_nothing() -> None:
    still = scaling(1.0)
    image, label = batch(still.read_size)
    changed, target = apply(still, image, label, 0)
    plain_image, plain_target = apply(augmentation(), image, label, 0)
    torch.testing.assert_close(changed, plain_image, atol=1e-4, rtol=0)
    assert torch.equal(target, plain_target)


def test_scale_above_one_enlarges_about_the_middle() -> None:
    larger = scaling(1.2)
    image, label = batch(larger.read_size)
    _, target = apply(larger, image, label, 0)
    _, plain = apply(augmentation(), image, label, 0)
    middle = (torch.tensor(PATCH) - 1) / 2
    for value in (1, 2):
        expected = (centroid(plain[0] == value) - middle) * 1.2
        torch.testing.assert_close(centroid(target[0] == value) - middle, expected, atol=0.5, rtol=0)
        assert (target[0] == value).sum() == pytest.approx(1.2**3 * int((plain[0] == value).sum()), rel=0.12)


@pytest.mark.parametrize("num_classes", [4, 20])
def test_image_and_label_move_together(num_classes: int) -> None:
    moving = augmentation(
        num_classes=num_classes, affine_probability=1.0, elastic_probability=1.0, rotation_degrees=20.0
    )
    image, label = batch(moving.read_size, count=6)
    changed, target = apply(moving, image, label, 0)
    plain, _ = apply(augmentation(), image, label, 0)
    assert not torch.equal(changed, plain)
    for value in (1, 2):
        # Inside a box the interpolated image is 1 + class; only the blurred border may differ.
        seen = (changed[:, 0] - 1 - value).abs() < 0.3
        both = (seen & (target == value)).sum() / (target == value).sum()
        assert both > 0.6
    background = (changed[:, 0] - 1).abs() < 0.01
    assert (target[background] == 0).float().mean() > 0.99


def test_ignored_voxels_are_deformed_as_one_more_class() -> None:
    # Class 3 of 4 is what lies right of the middle: it moves with what the image shows there.
    moving = augmentation(affine_probability=1.0, elastic_probability=1.0, rotation_degrees=20.0)
    label = torch.zeros(4, *moving.read_size, dtype=torch.uint8)
    label[:, moving.read_size[0] // 2 :] = 3
    changed, target = apply(moving, label[:, None].float(), label, 0)
    assert set(target.unique().tolist()) == {0, 3}
    # What the grid finds beyond what was read is background, and nothing else.
    clear = (changed[:, 0] < 0.1) | (changed[:, 0] > 2.9)
    assert clear.float().mean() > 0.8
    assert torch.equal(target[clear] == 3, changed[:, 0][clear] > 1.5)


def test_what_is_drawn_is_moved_as_one_and_comes_apart_again() -> None:
    moving = augmentation(**{**ALL, "flip_axes": ("x", "y", "z")})
    changes = moving.draw(range(3, 6)).changes
    parts = [change.rows for change in changes.values()] + [change.values for change in changes.values()]
    assert {part.dtype for part in parts} == {torch.int64, torch.float32}
    assert any(part.numel() == 0 for part in parts)  # a flip has rows, and no numbers
    moved = _together(parts, torch.device("cpu"))
    assert all(torch.equal(part, other) and part.dtype == other.dtype for part, other in zip(parts, moved, strict=True))


def test_every_patch_of_a_batch_is_drawn_anew() -> None:
    moving = augmentation(affine_probability=1.0)
    image, label = batch(moving.read_size)
    changed, _ = apply(moving, image, label, 0)
    assert not torch.equal(changed[0], changed[1])
    assert not torch.equal(changed[1], changed[2])


ALL = {name: 1.0 if name.endswith("probability") else value for name, value in NONE.items()}


def test_a_patch_depends_on_seed_and_index_alone() -> None:
    image, label = batch(augmentation().read_size, count=4)
    settings = {**ALL, "flip_axes": ("x", "y", "z")}
    together, targets = apply(augmentation(**settings), image, label, 8)
    for i in range(4):
        alone, target = apply(augmentation(**settings), image[i : i + 1], label[i : i + 1], 8 + i)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        assert torch.equal(target[0], targets[i])
    other, _ = apply(augmentation(seed=1, **settings), image, label, 8)
    assert not torch.allclose(other, together)


def test_only_the_left_right_flip_swaps_paired_classes() -> None:
    image, label = batch(augmentation().read_size, count=16)
    _, plain = apply(augmentation(), image, label, 0)
    for axis, name in enumerate("xyz"):
        changed, target = apply(augmentation(flip_axes=(name,)), image, label, 0)
        flipped = [i for i in range(16) if not torch.equal(changed[i], apply(augmentation(), image, label, 0)[0][i])]
        assert 0 < len(flipped) < 16
        for i in range(16):
            mirrored = plain[i].flip(axis) if i in flipped else plain[i]
            swapped = torch.tensor([0, 2, 1, 3])[mirrored] if i in flipped and axis == 0 else mirrored
            assert torch.equal(target[i], swapped)


@pytest.mark.parametrize("name", ["noise", "blur", "brightness", "contrast", "gamma", "low_resolution"])
def test_each_intensity_change_changes_the_image_and_never_the_label(name: str) -> None:
    changing = augmentation(**{f"{name}_probability": 1.0})
    image, label = batch(changing.read_size)
    image = image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    changed, target = apply(changing, image, label, 0)
    plain, plain_target = apply(augmentation(), image, label, 0)
    assert all(not torch.allclose(changed[i], plain[i], atol=1e-3) for i in range(3))
    assert torch.equal(target, plain_target)
    assert changed.isfinite().all()


def test_gamma_keeps_mean_and_deviation() -> None:
    bending = augmentation(gamma_probability=1.0, gamma=(2.0, 2.0))
    image = torch.randn(1, 2, *bending.read_size, generator=torch.Generator().manual_seed(0)) + 3
    changed, _ = apply(bending, image, torch.zeros(1, *bending.read_size, dtype=torch.uint8), 0)
    plain, _ = apply(augmentation(), image, torch.zeros(1, *bending.read_size, dtype=torch.uint8), 0)
    torch.testing.assert_close(changed.mean((2, 3, 4)), plain.mean((2, 3, 4)), atol=1e-4, rtol=0)
    torch.testing.assert_close(changed.std((2, 3, 4)), plain.std((2, 3, 4)), atol=1e-3, rtol=0)
    # The order of intensities stays: bigger is still bigger.
    order = plain[0, 0].flatten().argsort()
    assert (changed[0, 0].flatten()[order].diff() > -1e-4).all()


def test_contrast_stays_in_the_patch_own_range() -> None:
    stretching = augmentation(contrast_probability=1.0, contrast=(1.5, 1.5))
    image = torch.randn(1, 1, *stretching.read_size, generator=torch.Generator().manual_seed(0))
    changed, _ = apply(stretching, image, torch.zeros(1, *stretching.read_size, dtype=torch.uint8), 0)
    plain, _ = apply(augmentation(), image, torch.zeros(1, *stretching.read_size, dtype=torch.uint8), 0)
    assert changed.max() <= plain.max()
    assert changed.min() >= plain.min()
    assert changed.std() > 1.2 * plain.std()


def test_a_constant_image_survives_everything() -> None:
    everything = augmentation(**ALL)
    image = torch.full((2, 1, *everything.read_size), 5.0)
    changed, _ = apply(everything, image, torch.zeros(2, *everything.read_size, dtype=torch.uint8), 0)
    assert changed.isfinite().all()


def test_the_largest_share_by_hand() -> None:
    shares = torch.tensor([[0.2, 0.3], [0.4, 0.4], [0.3, 0.3], [0.25, 0.5], [0.5, 0.0]])  # of classes 1 and 2
    # 0.5 is left for the background; 0.2, and the first of equals; 0.4; 0.25; 0.5, which the background has too.
    expected = [0, 1, 0, 2, 0]
    assert largest_share(shares[:, :, None, None, None])[:, 0, 0, 0].tolist() == expected


def test_rotation_by_hand() -> None:
    # A quarter turn about the third axis takes x to y.
    turned = rotations(np.array([[0.0, 0.0, np.pi / 2]]))[0] @ [1.0, 0.0, 0.0]
    assert turned == pytest.approx([0.0, 1.0, 0.0])
    (matrix,) = rotations(np.array([[0.3, -0.7, 1.1]]))
    assert matrix @ matrix.T == pytest.approx(np.eye(3))
    assert np.linalg.det(matrix) == pytest.approx(1.0)


def test_of_thick_slices_a_ball_stays_a_ball() -> None:
    spacing_mm, patch = (1.0, 1.0, 4.0), (40, 40, 10)
    turning = augmentation(
        patch=patch,
        num_classes=3,
        spacing_mm=spacing_mm,
        affine_probability=1.0,
        rotation_degrees=90.0,
        scale=(1.0, 1.0),
        scale_anisotropy=0.0,
        shift_voxels=0.0,
    )
    middles = [(torch.arange(n) - (n - 1) / 2) * mm for n, mm in zip(turning.read_size, spacing_mm, strict=True)]
    distance = torch.stack(torch.meshgrid(*middles, indexing="ij")).square().sum(0).sqrt()
    ball = (distance < 14).to(torch.uint8).expand(8, *turning.read_size)
    _, turned = apply(turning, ball[:, None].float(), ball, 0)
    still = centre_crop(ball[:1, None], patch)[0, 0].long()
    for label in turned:
        overlap = 2 * (label * still).sum() / (label.sum() + still.sum())
        assert overlap > 0.93  # turned in voxels, as if they were cubes, it has 0.4


def test_shifts_and_bends_are_as_long_along_thick_slices() -> None:
    shifting = augmentation(
        spacing_mm=(1.0, 1.0, 4.0),
        affine_probability=1.0,
        shift_voxels=8.0,
        elastic_probability=1.0,
        elastic_voxels=2.0,
    )
    changes = shifting.deformation.draw(range(200))
    shifts = np.abs(changes["sampled"].values[:, :, 3].numpy()).max(axis=0)
    assert shifts[:2].min() > 7.5
    assert 1.9 < shifts[2] <= 2.0
    x, y, z = changes["bent"].values.numpy().std(axis=(0, 2, 3, 4))
    assert (x, y, z) == pytest.approx((2.0, 2.0, 0.5), rel=0.05)


def test_spline_weights_by_hand() -> None:
    weights = spline_weights(25, 6, 12.0)
    assert weights.sum(1) == pytest.approx(np.ones(25))
    # Voxel 0 lies on control point 1, where a cubic B-spline weighs 1/6, 2/3, 1/6.
    assert weights[0] == pytest.approx([1 / 6, 2 / 3, 1 / 6, 0, 0, 0])
    assert weights[24] == pytest.approx([0, 0, 1 / 6, 2 / 3, 1 / 6, 0])


def test_blur_keeps_a_constant_and_spreads_a_point() -> None:
    kernels = Intensity(AugmentationSection(blur_sigma_voxels=(0.5, 1.0)), 0).kernels(np.array([1.0, 0.5]))
    assert kernels.shape == (2, 4)
    assert kernels[:, 0] + 2 * kernels[:, 1:].sum(1) == pytest.approx([1, 1])
    weights = torch.from_numpy(kernels).float()
    constant = torch.full((2, 1, 9, 9, 9), 3.0)
    torch.testing.assert_close(blurred(constant, weights), constant)
    point = torch.zeros(2, 2, 15, 15, 15)
    point[:, 1, 7, 7, 7] = 1.0
    spread = blurred(point, weights)
    assert not spread[:, 0].any()
    assert spread[:, 1].sum((1, 2, 3)).tolist() == pytest.approx([1, 1], abs=1e-5)
    offsets = torch.arange(15.0) - 7
    for axis in range(3):
        along = spread[:, 1].sum([dim + 1 for dim in range(3) if dim != axis])
        assert (along * offsets**2).sum(1).tolist() == pytest.approx([1.0, 0.25], abs=0.05)


def test_a_deformed_label_is_the_class_with_the_largest_share() -> None:
    # Planes of two classes in turn, scaled by two about the middle: between planes the shares are 3/4 and 1/4, so that
    # each plane is doubled and none becomes background.
    doubled = scaling(2.0)
    size = doubled.read_size
    label = (1 + torch.arange(size[0]) % 2).to(torch.uint8)[None, :, None, None].expand(1, *size).contiguous()
    _, target = apply(doubled, label[:, None].float(), label, 0)
    column = target[0, :, 10, 8]
    assert set(column.tolist()) == {1, 2}
    assert (target == column[None, :, None, None]).all()
    assert torch.equal(column[::2], column[1::2])
    assert (column[1:-1:2] != column[2::2]).all()


@pytest.mark.parametrize("num_classes", [4, 9])
def test_a_smaller_target_is_the_middle_of_the_whole_one(num_classes: int) -> None:
    changes = {"affine_probability": 1.0, "elastic_probability": 1.0, "flip_axes": ("x", "y", "z")}
    whole = augmentation(num_classes=num_classes, **changes)
    smaller = augmentation(num_classes=num_classes, target=(12, 16, 10), **changes)
    image, label = batch(whole.read_size)
    (seen, target), (same, middle) = apply(whole, image, label, 0), apply(smaller, image, label, 0)
    assert torch.equal(seen, same)
    assert torch.equal(target[:, 6:18, 2:18, 3:13], middle)


def test_a_plane_is_deformed_within_itself() -> None:
    flat = augmentation(
        patch=(24, 20, 1),
        affine_probability=1.0,
        rotation_degrees=90.0,
        shift_voxels=3.0,
        elastic_probability=1.0,
        blur_probability=1.0,
        low_resolution_probability=1.0,
    )
    assert flat.read_size[2] == 1
    ones = torch.ones(8, 1, *flat.read_size)
    changed, target = apply(flat, ones, torch.ones(8, *flat.read_size, dtype=torch.uint8), 0)
    assert changed.shape == (8, 1, 24, 20, 1)
    # Whatever left the plane would have sampled the zeros beside it, in every voxel.
    assert (changed[:, :, 8:16, 7:13] > 0.99).all()
    assert (target[:, 8:16, 7:13] == 1).all()


def test_a_plane_is_not_flipped_across_itself() -> None:
    def flipped(*axes: str) -> tuple[Tensor, Tensor]:
        flat = augmentation(patch=(1, 20, 16), flip_axes=axes)
        label = torch.zeros(16, *flat.read_size, dtype=torch.uint8)
        label[:, :, 3:8] = 1
        label[:, :, 14:16] = 2
        return apply(flat, 1 + label[:, None].float(), label, 0)

    # The first axis is the left-right one: such a flip would swap labels of what stays where it is.
    (image, target), (along_y, target_along_y) = flipped("x", "y"), flipped("y")
    assert torch.equal(image, along_y)
    assert torch.equal(target, target_along_y)
    assert torch.equal(image[:, 0], 1 + target)
    assert not torch.equal(target, flipped()[1])


def test_a_channel_that_a_case_lacks_gets_no_noise_and_is_not_counted_when_one_is_dropped() -> None:
    noisy = augmentation(noise_probability=1.0, noise_std=(0.1, 0.1), channel_dropout_probability=1.0)
    image = torch.ones(20, 3, *noisy.read_size)
    image[:10, 1:] = 0
    image[10:, 2] = 0
    changed, _ = apply(noisy, image, torch.zeros(20, *noisy.read_size, dtype=torch.uint8), 0)
    present = changed.flatten(2).any(2)
    assert present[:10].tolist() == [[True, False, False]] * 10
    assert present[10:].sum(1).tolist() == [1] * 10
    assert not present[10:, 2].any()
    assert changed[:10, 0].std().item() == pytest.approx(0.1, rel=0.05)


def test_channel_dropout_takes_one_channel_that_is_there_and_leaves_the_last() -> None:
    dropping = augmentation(channel_dropout_probability=1.0)
    image = torch.ones(40, 3, *PATCH)
    image[:20, 2] = 0
    image[20:, 1:] = 0
    image = torch.nn.functional.pad(
        image, [n for r, p in zip(dropping.read_size[::-1], PATCH[::-1], strict=True) for n in [(r - p) // 2] * 2]
    )
    label = torch.zeros(40, *dropping.read_size, dtype=torch.uint8)
    changed, _ = apply(dropping, image, label, 0)
    present = changed.flatten(2).any(2)
    assert present[:20].sum(1).tolist() == [1] * 20
    assert set(present[:20, 0].tolist()) == {True, False}
    assert present[20:].tolist() == [[True, False, False]] * 20
