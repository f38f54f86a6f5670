"""The contract over every entry of the LOSSES table, each loss worked out by hand, and what is not known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.networks import NetworkTask, build_network
from pipeline.training.losses import LOSSES, Objective, Target, build_loss, check_options, truth_of
from pipeline.training.losses.boundary import surface_distance

CLASSES = 3
IGNORED = CLASSES
SHAPE = (2, 4, 5, 6)
# The second region lies within the first: a tumour and its core.
REGIONS = ((1, 2), (2,))
EVEN = 1e-9


def classes() -> Tensor:
    return torch.randint(0, CLASSES, SHAPE, generator=torch.Generator().manual_seed(0))


def noise(outputs: int = CLASSES) -> Tensor:
    return torch.randn(2, outputs, *SHAPE[1:], generator=torch.Generator().manual_seed(1))


def logits_of(wanted: Tensor, certainty: float, outputs: int = CLASSES) -> Tensor:
    return certainty * torch.nn.functional.one_hot(wanted, outputs).movedim(-1, 1).float()


def region_logits_of(wanted: Tensor, certainty: float) -> Tensor:
    inside = torch.stack([torch.isin(wanted, torch.tensor(region)) for region in REGIONS], 1)
    return certainty * (2 * inside.float() - 1)


def loss_of(name: str, logits: Tensor, target: Tensor | Target, **options: Any) -> Tensor:
    target = target if isinstance(target, Target) else Target(target)
    return build_loss(name, options)(logits, truth_of(target, logits.shape[1], progress=0.5))


def region_loss_of(name: str, logits: Tensor, target: Tensor | Target, **options: Any) -> Tensor:
    target = target if isinstance(target, Target) else Target(target)
    return build_loss(name, options)(logits, truth_of(target, len(REGIONS), regions=REGIONS, progress=0.5))


def annotated(*rows: tuple[int, ...]) -> Tensor:
    """Which classes were annotated in each patch, the background always."""
    return torch.tensor([[index == 0 or index in row for index in range(CLASSES)] for row in rows])


Read = Callable[..., Tensor]
HEADS = pytest.mark.parametrize(
    ("read", "made"), [(loss_of, logits_of), (region_loss_of, region_logits_of)], ids=["classes", "regions"]
)


@HEADS
@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    def test_right_beats_wrong_and_certainty_costs_nothing_when_right(self, name: str, read: Read, made: Read) -> None:
        truth = classes()
        right, unsure = read(name, made(truth, 30.0), truth), read(name, made(truth, 1.0), truth)
        wrong = read(name, made((truth + 1) % CLASSES, 30.0), truth)
        assert right.abs() < 1e-3
        assert right < unsure < wrong

    def test_gradient_is_finite_even_where_a_class_is_absent(self, name: str, read: Read, made: Read) -> None:
        for logits in (made(classes(), 1.0), made(torch.zeros_like(classes()), 100.0)):
            logits.requires_grad_()
            loss = read(name, logits, torch.zeros_like(classes()))
            loss.backward()
            assert loss.isfinite()
            assert logits.grad is not None
            assert logits.grad.isfinite().all()

    def test_it_can_be_learned_from(self, name: str, read: Read, made: Read) -> None:
        truth, logits = classes(), 0.1 * made((classes() + 1) % CLASSES, 1.0)
        before = read(name, logits.requires_grad_(), truth)
        (gradient,) = torch.autograd.grad(before, logits)
        assert read(name, logits - 0.1 * gradient / gradient.norm(), truth) < before

    def test_order_of_the_batch_does_not_matter(self, name: str, read: Read, made: Read) -> None:
        logits, truth = noise(made(classes(), 1.0).shape[1]), classes()
        torch.testing.assert_close(read(name, logits, truth), read(name, logits.flip(0), truth.flip(0)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_logits_are_summed_in_float32(
        self, name: str, read: Read, made: Read, dtype: torch.dtype
    ) -> None:
        logits = noise(made(classes(), 1.0).shape[1]).to(dtype)
        found = read(name, logits, classes())
        assert found.dtype == torch.float32
        assert torch.equal(found, read(name, logits.float(), classes()))

    def test_voxels_of_which_nobody_knows_change_nothing(self, name: str, read: Read, made: Read) -> None:
        truth, logits = classes(), noise(made(classes(), 1.0).shape[1])
        truth[:, :2, 1:3] = IGNORED
        other = logits.clone()
        other[:, :, :2, 1:3] = 20 * noise(logits.shape[1])[:, :, 2:, 1:3]
        other.requires_grad_()
        found = read(name, other, truth)
        torch.testing.assert_close(found, read(name, logits, truth))
        (gradient,) = torch.autograd.grad(found, other)
        assert not gradient[:, :, :2, 1:3].any()
        # Beside it a change where it is known is seen.
        assert not torch.isclose(read(name, 2 * logits, truth), found)

    def test_where_nothing_is_known_there_is_nothing_to_learn(self, name: str, read: Read, made: Read) -> None:
        logits = noise(made(classes(), 1.0).shape[1]).requires_grad_()
        loss = read(name, logits, torch.full(SHAPE, IGNORED))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert not gradient.any()

    def test_an_annotation_of_all_classes_is_none_left_out(self, name: str, read: Read, made: Read) -> None:
        logits = noise(made(classes(), 1.0).shape[1])
        whole = Target(classes(), annotated((1, 2), (1, 2)))
        torch.testing.assert_close(read(name, logits, whole), read(name, logits, classes()))


@pytest.mark.parametrize("name", LOSSES)
def test_a_class_that_was_not_annotated_may_be_what_counts_as_background(name: str) -> None:
    truth = torch.where(classes() == 2, 0, classes())
    target = Target(truth, annotated((1,), (1,)))
    right = logits_of(truth, 30.0)
    # In half of the background, what is predicted is the class of which nothing is known.
    also = right.clone()
    also[:, 2] = torch.where((truth == 0) & (noise()[:, 0] > 0), 60.0, 0.0)
    wrong = right.clone()
    wrong[:, 2] = torch.where(truth == 1, 60.0, 0.0)
    torch.testing.assert_close(loss_of(name, also, target), loss_of(name, right, target), atol=1e-4, rtol=0)
    assert loss_of(name, also, truth) > loss_of(name, also, target) + 0.01
    assert loss_of(name, wrong, target) > loss_of(name, right, target) + 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_each_patch_goes_by_what_was_annotated_in_its_own_case(name: str) -> None:
    truth = torch.where(classes() == 2, 0, classes())
    predicted = truth.clone()
    predicted[0][truth[0] == 0] = 2
    logits = logits_of(predicted, 30.0)
    assert loss_of(name, logits, Target(truth, annotated((1,), (1, 2)))).abs() < 1e-3
    assert loss_of(name, logits, Target(truth, annotated((1, 2), (1,)))) > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_a_region_is_learned_where_what_was_not_annotated_cannot_be(name: str) -> None:
    # Class 2, the core, was not annotated: background may be it, and so in both regions; class 1 is in the first alone.
    truth = torch.where(classes() == 2, 0, classes())
    target = Target(truth, annotated((1,), (1,)))
    right = region_logits_of(truth, 30.0)
    unknown = torch.where((truth == 0)[:, None], -right, right)
    torch.testing.assert_close(region_loss_of(name, unknown, target), region_loss_of(name, right, target))
    assert region_loss_of(name, unknown, truth) > 0.1
    wrong = right.clone()
    wrong[:, 1] = torch.where(truth == 1, 30.0, wrong[:, 1])
    assert region_loss_of(name, wrong, target) > region_loss_of(name, right, target) + 0.01


def test_what_was_drawn_of_a_class_that_counts_as_not_annotated_is_background() -> None:
    drawn, hidden = classes(), torch.where(classes() == 2, 0, classes())
    only_first = annotated((1,), (1,))
    found = loss_of("dice_ce", noise(), Target(drawn, only_first))
    torch.testing.assert_close(found, loss_of("dice_ce", noise(), Target(hidden, only_first)))


def test_merged_log_probabilities_are_those_of_the_sum() -> None:
    truth = truth_of(Target(torch.zeros(SHAPE, dtype=torch.long), annotated((1,), (1, 2))), CLASSES)
    logits = 50 * noise().requires_grad_()
    found = truth.probabilities(truth.scores(logits))
    plain = logits.softmax(1)
    torch.testing.assert_close(found[0, 0], plain[0, 0] + plain[0, 2])
    torch.testing.assert_close(found[0, 1], plain[0, 1])
    assert not found[0, 2].any()
    torch.testing.assert_close(found[1], plain[1])
    # Far below what a probability can hold, its logarithm is still right.
    low = torch.tensor([-200.0, 0.0, -201.0]).view(1, 3, 1, 1, 1)
    one = truth_of(Target(torch.zeros(1, 1, 1, 1, dtype=torch.long), annotated((1,))), CLASSES)
    assert one.sums(one.scores(low))[0].item() == pytest.approx(-200 + math.log1p(math.exp(-1)))


TWO_VOXELS = torch.tensor([0, 1]).view(1, 2, 1, 1)
UNSURE = torch.zeros(1, 2, 2, 1, 1)  # every probability is 1/2


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Dice of the foreground: 2 * 1/2 / (1/2 + 1/2 + 1) = 1/2.
        ("dice_ce", {"smooth": EVEN}, math.log(2) + 0.5),
        ("dice_ce", {"smooth": EVEN, "dice_weight": 2.0, "ce_weight": 0.0}, 1.0),
        ("dice_ce", {"smooth": EVEN, "include_background": True, "ce_weight": 0.0}, 0.5),
        ("cross_entropy", {}, math.log(2)),
        ("cross_entropy", {"label_smoothing": 0.2}, math.log(2)),
        ("focal", {"gamma": 2.0}, math.log(2) / 4),
        ("dice_focal", {"smooth": EVEN, "gamma": 1.0}, 0.5 + math.log(2) / 2),
        # One half found, one half too many, one half too few: 1/2 / (1/2 + 0.3/2 + 0.7/2) = 1/2.
        ("tversky", {"smooth": EVEN}, 0.5),
        ("tversky", {"smooth": EVEN, "alpha": 1.0, "beta": 1.0}, 1 - 1 / 3),
        ("tversky", {"smooth": EVEN, "gamma": 2.0}, math.sqrt(0.5)),
        ("generalised_dice", {"smooth": EVEN}, 0.5),
    ],
)
def test_two_voxels_by_hand(name: str, options: dict[str, Any], expected: float) -> None:
    assert loss_of(name, UNSURE, TWO_VOXELS, **options).item() == pytest.approx(expected, abs=1e-6)


def test_two_regions_by_hand() -> None:
    # Both voxels are in the first region, one in the second; every probability is 1/2.
    target = torch.tensor([1, 2]).view(1, 2, 1, 1)
    dice = (2 * 1 / (1 + 2) + 2 * 0.5 / (1 + 1)) / 2
    found = region_loss_of("dice_ce", torch.zeros(1, 2, 2, 1, 1), target, smooth=EVEN)
    assert found.item() == pytest.approx(math.log(2) + 1 - dice, abs=1e-6)


def test_generalised_dice_weighs_by_the_inverse_square_of_the_volume() -> None:
    # Of 4 background and 1 foreground voxels, all are taken for background. Weights 1/16 and 1.
    truth = torch.tensor([0, 0, 0, 0, 1]).view(1, 5, 1, 1)
    logits = logits_of(torch.zeros_like(truth), 50.0, 2)
    expected = 1 - 2 * (4 / 16) / (9 / 16 + 1)
    assert loss_of("generalised_dice", logits, truth, smooth=EVEN).item() == pytest.approx(expected, abs=1e-6)


def test_label_smoothing_and_class_weights_are_those_of_torch() -> None:
    weights = (0.5, 1.0, 2.0)
    plain = torch.nn.functional.cross_entropy(noise(), classes(), weight=torch.tensor(weights))
    torch.testing.assert_close(loss_of("cross_entropy", noise(), classes(), class_weights=weights), plain)
    smoothed = torch.nn.functional.cross_entropy(noise(), classes(), label_smoothing=0.1)
    torch.testing.assert_close(loss_of("cross_entropy", noise(), classes(), label_smoothing=0.1), smoothed)


def test_smoothing_spreads_over_what_may_be_there() -> None:
    # Class 2 was not annotated: background and class 1 are left, of probabilities 2/3 and 1/3.
    target = Target(torch.zeros(1, 1, 1, 1, dtype=torch.long), annotated((1,)))
    expected = -0.8 * math.log(2 / 3) - 0.2 * (math.log(2 / 3) + math.log(1 / 3)) / 2
    found = loss_of("cross_entropy", torch.zeros(1, 3, 1, 1, 1), target, label_smoothing=0.2)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_a_number_of_class_weights_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="class_weights: 2 numbers for 3 outputs"):
        loss_of("dice_ce", noise(), classes(), class_weights=(1.0, 2.0))


def test_batch_dice_pools_the_sums_and_sample_dice_does_not() -> None:
    # Sample 0 has 3 foreground voxels, sample 1 has 1; the prediction finds all of the first and none of the second.
    truth = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).view(2, 4, 1, 1)
    found = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]).view(2, 4, 1, 1)
    logits = logits_of(found, 50.0, 2)
    options = {"ce_weight": 0.0, "smooth": EVEN}
    assert loss_of("dice_ce", logits, truth, **options, batch=True).item() == pytest.approx(1 - 2 * 3 / 7, abs=1e-5)
    assert loss_of("dice_ce", logits, truth, **options, batch=False).item() == pytest.approx(1 - 1 / 2, abs=1e-5)


def test_monai_finds_the_same_dice_with_cross_entropy_focal_tversky_and_generalised_dice() -> None:
    from monai.losses.dice import DiceCELoss, GeneralizedDiceLoss
    from monai.losses.focal_loss import FocalLoss
    from monai.losses.tversky import TverskyLoss

    logits, target = noise(), classes()[:, None]
    common = {"to_onehot_y": True, "softmax": True, "batch": True, "include_background": False}
    pairs = {
        "dice_ce": DiceCELoss(**common, smooth_nr=1e-5, smooth_dr=1e-5),
        "tversky": TverskyLoss(**common, alpha=0.3, beta=0.7, smooth_nr=0, smooth_dr=1e-5),
        "generalised_dice": GeneralizedDiceLoss(
            to_onehot_y=True, softmax=True, batch=True, smooth_nr=0, smooth_dr=1e-9
        ),
        "focal": FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0),
    }
    for name, theirs in pairs.items():
        expected = theirs(logits, target)
        # MONAI's focal loss is a mean over the classes too, of which all but one are zero.
        expected = expected * CLASSES if name == "focal" else expected
        torch.testing.assert_close(loss_of(name, logits, classes()), expected, msg=name, atol=1e-5, rtol=1e-5)


def slow_distance(mask: Tensor, known: Tensor, reach: int) -> Tensor:
    """Each voxel's distance to the nearest known one of the other kind, one by one."""
    found = torch.full(mask.shape, float(reach))
    for here in torch.cartesian_prod(*map(torch.arange, mask.shape)):
        others = torch.nonzero((mask != mask[tuple(here)]) & known)
        if len(others):
            found[tuple(here)] = min(float(reach), (others - here).float().norm(dim=1).min().item())
    return found - 0.5


@pytest.mark.parametrize("reach", [3, 20])
def test_distance_to_the_surface_is_that_of_a_search(reach: int) -> None:
    random = torch.Generator().manual_seed(2)
    mask = torch.rand(2, 7, 1, 9, generator=random) > 0.85
    mask[1] = False
    mask[1, 0, 0, 0] = True
    known = torch.rand(mask.shape, generator=random) > 0.1
    expected = torch.stack([slow_distance(*pair, reach) for pair in zip(mask, known, strict=True)])
    torch.testing.assert_close(surface_distance(mask, known, reach), expected)


def test_boundary_loss_by_hand_and_how_it_takes_over() -> None:
    # A line of 5 voxels, the first is foreground; voxel 3 is taken for it too, 2.5 voxels from the surface.
    truth = torch.tensor([1, 0, 0, 0, 0]).view(1, 5, 1, 1)
    logits = logits_of(torch.tensor([1, 0, 0, 1, 0]).view(1, 5, 1, 1), 50.0, 2)
    dice, far_off = 1 - 2 / 3, 2.5 / 5
    loss = build_loss("boundary", {"smooth": EVEN})
    for progress, share in ((0.0, 0.01), (0.5, 0.5), (1.0, 0.99)):
        found = loss(logits, truth_of(Target(truth), 2, progress=progress))
        assert found.item() == pytest.approx((1 - share) * dice + share * far_off, abs=1e-5)


def test_cldice_by_hand_and_beside_monai() -> None:
    from monai.losses.cldice import SoftclDiceLoss

    # A tube 9 long and 3 wide, whose centreline the prediction leaves out for 3 voxels; volumes are nearly the same.
    truth = torch.zeros(1, 13, 7, 7, dtype=torch.long)
    truth[:, 2:11, 2:5, 2:5] = 1
    found = truth.clone()
    found[:, 5:8, 3, 3] = 0
    whole, gap = logits_of(truth, 50.0, 2), logits_of(found, 50.0, 2)
    assert loss_of("cldice", whole, truth, share=1.0).item() == pytest.approx(0, abs=1e-5)
    ours = loss_of("cldice", gap, truth, share=1.0)
    theirs = SoftclDiceLoss(include_background=False, smooth=1e-9)(gap.softmax(1), logits_of(truth, 1.0, 2))
    torch.testing.assert_close(ours, theirs)
    assert ours > 2 * loss_of("dice_ce", gap, truth, ce_weight=0.0)


def network_of(outputs: int) -> Any:
    task = NetworkTask(1, outputs, (16, 16, 16), (1.0, 1.0, 1.0))
    return build_network("unet", {"width": 4, "norm": "none"}, task)


def test_deep_supervision_weighs_levels_by_halves() -> None:
    network, image = network_of(CLASSES), torch.randn(1, 1, 16, 16, 16)
    truth = torch.zeros(1, 16, 16, 16, dtype=torch.long)
    truth[:, 8:] = 1
    fine, coarse = network.deep_supervision(image)
    # The border runs between coarse voxels: the coarse target is the fine one, every other voxel.
    expected = (loss_of("dice_ce", fine, truth) + 0.5 * loss_of("dice_ce", coarse, truth[:, ::2, ::2, ::2])) / 1.5
    loss = build_loss("dice_ce", {})
    target = Target(truth)
    torch.testing.assert_close(Objective(network, loss, deep_supervision=True)(image, target), expected)
    plain = Objective(network, loss, deep_supervision=False)(image, target)
    torch.testing.assert_close(plain, loss_of("dice_ce", fine, truth))


def test_a_loss_that_changes_with_the_progress_is_not_compiled_anew() -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    objective = Objective(network_of(CLASSES), build_loss("boundary", {}), deep_supervision=False)
    objective.compile_network_only()
    called = torch.compile(objective, backend=counting)
    image, target = torch.randn(1, 1, 16, 16, 16), Target(torch.zeros(1, 16, 16, 16, dtype=torch.long))
    losses = []
    for progress in (0.0, 0.4, 0.8):
        objective.progress = progress
        called(image, target).backward()
        losses.append(objective(image, target).item())
    assert graphs == 1
    assert len(set(losses)) == 3


@pytest.mark.parametrize("name", LOSSES)
def test_regions_ignored_voxels_and_partial_annotation_reach_every_level(name: str) -> None:
    network, image = network_of(len(REGIONS)), torch.randn(2, 1, 16, 16, 16)
    truth = torch.zeros(2, 16, 16, 16, dtype=torch.long)
    truth[:, 8:], truth[:, :, 12:] = 1, IGNORED
    objective = Objective(network, build_loss(name, {}), deep_supervision=True, regions=REGIONS)
    objective.progress = 0.5
    found = objective(image, Target(truth, annotated((1, 2), (1,))))
    found.backward()
    assert found.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    known = torch.where(truth == IGNORED, 2, truth)
    assert not torch.isclose(objective(image, Target(known, annotated((1, 2), (1,)))), found)


def test_a_misspelt_option_is_named() -> None:
    ((key, message),) = check_options("dice_ce", {"dice_wieght": 1})
    assert key == "options.dice_wieght"
    assert "did you mean 'dice_weight'?" in message
