"""The contract over every entry of the LOSSES table, and Dice with cross-entropy worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.networks import NetworkTask, build_network
from pipeline.training.losses import LOSSES, Objective, build_loss, check_options

CLASSES = 3


def target() -> Tensor:
    return torch.randint(0, CLASSES, (2, 4, 5, 6), generator=torch.Generator().manual_seed(0))


def logits_of(classes: Tensor, certainty: float) -> Tensor:
    return certainty * torch.nn.functional.one_hot(classes, CLASSES).movedim(-1, 1).float()


@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    def test_right_beats_wrong_and_certainty_costs_nothing_when_right(self, name: str) -> None:
        loss, truth = build_loss(name, {}), target()
        right, unsure = loss(logits_of(truth, 30.0), truth), loss(logits_of(truth, 1.0), truth)
        wrong = loss(logits_of((truth + 1) % CLASSES, 30.0), truth)
        assert right < 1e-3
        assert right < unsure < wrong

    def test_gradient_is_finite_even_where_a_class_is_absent(self, name: str) -> None:
        truth = torch.zeros_like(target())
        logits = torch.randn(2, CLASSES, 4, 5, 6, requires_grad=True)
        build_loss(name, {})(logits, truth).backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert logits.grad.abs().sum() > 0

    def test_order_of_the_batch_does_not_matter(self, name: str) -> None:
        logits, truth = torch.randn(2, CLASSES, 4, 5, 6), target()
        loss = build_loss(name, {})
        torch.testing.assert_close(loss(logits, truth), loss(logits.flip(0), truth.flip(0)))

    def test_half_precision_logits_are_summed_in_float32(self, name: str) -> None:
        logits = torch.randn(2, CLASSES, 4, 5, 6).bfloat16()
        assert build_loss(name, {})(logits, target()).dtype == torch.float32


def test_dice_and_cross_entropy_by_hand() -> None:
    # Two voxels, two classes, equal logits: every probability is 1/2. Voxel 0 is background, voxel 1 foreground.
    truth = torch.tensor([0, 1]).view(1, 2, 1, 1)
    logits = torch.zeros(1, 2, 2, 1, 1)
    # Dice of the foreground: 2 * 1/2 / (1/2 + 1/2 + 1) = 1/2.
    expected = math.log(2) + 0.5
    assert build_loss("dice_ce", {"smooth": 1e-9})(logits, truth).item() == pytest.approx(expected, abs=1e-6)
    weighted = build_loss("dice_ce", {"smooth": 1e-9, "dice_weight": 2.0, "ce_weight": 0.0})(logits, truth)
    assert weighted.item() == pytest.approx(1.0, abs=1e-6)


def test_batch_dice_pools_the_sums_and_sample_dice_does_not() -> None:
    # Sample 0 has 3 foreground voxels, sample 1 has 1; the prediction finds all of the first and none of the second.
    truth = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).view(2, 4, 1, 1)
    found = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]).view(2, 4, 1, 1)
    logits = 50.0 * torch.nn.functional.one_hot(found, 2).movedim(-1, 1).float()
    options = {"ce_weight": 0.0, "smooth": 1e-9}
    pooled = build_loss("dice_ce", {**options, "batch": True})(logits, truth)
    single = build_loss("dice_ce", {**options, "batch": False})(logits, truth)
    assert pooled.item() == pytest.approx(1 - 2 * 3 / 7, abs=1e-5)
    assert single.item() == pytest.approx(1 - (1 + 0) / 2, abs=1e-5)


def test_deep_supervision_weighs_levels_by_halves() -> None:
    task = NetworkTask(1, CLASSES, (16, 16, 16), (1.0, 1.0, 1.0))
    network = build_network("unet", {"width": 4, "norm": "none"}, task)
    image = torch.randn(1, 1, 16, 16, 16)
    truth = torch.zeros(1, 16, 16, 16, dtype=torch.long)
    truth[:, 8:] = 1
    loss = build_loss("dice_ce", {})
    fine, coarse = network.deep_supervision(image)
    # The border runs between coarse voxels: the coarse target is the fine one, every other voxel.
    expected = (loss(fine, truth) + 0.5 * loss(coarse, truth[:, ::2, ::2, ::2])) / 1.5
    torch.testing.assert_close(Objective(network, loss, deep_supervision=True)(image, truth), expected)
    torch.testing.assert_close(Objective(network, loss, deep_supervision=False)(image, truth), loss(fine, truth))


def test_a_misspelt_option_is_named() -> None:
    ((key, message),) = check_options("dice_ce", {"dice_wieght": 1})
    assert key == "options.dice_wieght"
    assert "did you mean 'dice_weight'?" in message
