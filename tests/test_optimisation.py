"""Optimisers and the course of the learning rate: values by hand, options, and what null leaves to the table."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import TrainingSection
from pipeline.networks import Network
from pipeline.training.optimisation import (
    MOMENTS,
    OPTIMISERS,
    SCHEDULES,
    build_optimiser,
    build_schedule,
    check_optimiser,
    check_schedule,
    set_learning_rate,
)


class Halves(Network):
    """An encoder with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(1, 2, 1), nn.InstanceNorm3d(2, affine=True))
        self.head = nn.Conv3d(2, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(image))  # type: ignore[no-any-return]


def section(**values: Any) -> TrainingSection:
    return TrainingSection(**values)


@pytest.mark.parametrize("name", ["cosine", "poly", "constant"])
def test_a_warm_up_rises_in_a_line_and_the_course_never_rises_after(name: str) -> None:
    rate = SCHEDULES[name](0.5, 0.1)
    rates = [rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(0.5)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_schedules_by_hand() -> None:
    assert SCHEDULES["cosine"](1.0, 0.0)(50, 100) == pytest.approx(0.5)
    assert SCHEDULES["cosine"](1.0, 0.0)(99, 100) < 1e-3
    assert SCHEDULES["poly"](1.0, 0.0)(50, 100) == pytest.approx(0.5**0.9)
    assert SCHEDULES["poly"](1.0, 0.0, power=2.0)(50, 100) == pytest.approx(0.25)
    assert SCHEDULES["constant"](1.0, 0.0)(99, 100) == 1.0


def test_one_cycle_by_hand() -> None:
    # 100 steps, of which 30 rise: from 1/25 at step 0 over halfway at 15 to the peak at 30; down over halfway at 65.
    rate = SCHEDULES["one_cycle"](2.0)
    assert rate(0, 100) == pytest.approx(2 / 25)
    assert rate(15, 100) == pytest.approx((2 + 2 / 25) / 2)
    assert rate(30, 100) == pytest.approx(2.0)
    assert rate(65, 100) == pytest.approx((2 + 2 / 25e4) / 2)
    assert rate(100, 100) == pytest.approx(2 / 25e4)
    rates = [rate(step, 100) for step in range(100)]
    assert all(a < b for a, b in pairwise(rates[:31]))
    assert all(a > b for a, b in pairwise(rates[30:]))
    assert SCHEDULES["one_cycle"](2.0, 0.5, div_factor=2.0, final_div_factor=1.0)(0, 10) == pytest.approx(1.0)


def test_one_cycle_is_torchs_own() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=0.1)
    # torch's ends at its last step, ours at the budget's end; its rise takes 0.3 * 101 - 1 steps.
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 0.1, total_steps=101, pct_start=31 / 101, cycle_momentum=False
    )
    ours = SCHEDULES["one_cycle"](0.1)
    for step in range(100):
        assert ours(step, 100) == pytest.approx(reference.get_last_lr()[0])
        optimiser.step()
        reference.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_shortest_budgets_have_rates_too(name: str) -> None:
    for total in (1, 2, 3):
        assert all(0 <= SCHEDULES[name](1.0)(step, total) <= 1 for step in range(total))


def test_null_leaves_rates_to_the_table() -> None:
    adamw, sgd = (build_optimiser(Halves(), section(optimiser=name)) for name in ("adamw", "sgd"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(g["lr"], g["weight_decay"]) for g in adamw.param_groups] == [(3e-3, 1e-2), (3e-3, 0.0)]
    assert isinstance(sgd, torch.optim.SGD)
    assert [(g["lr"], g["weight_decay"]) for g in sgd.param_groups] == [(1e-2, 3e-5), (1e-2, 0.0)]
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.99, True)
    assert build_schedule(section(optimiser="sgd", schedule="constant", warmup_fraction=0.0), sgd)(7, 10) == 1e-2
    # A twentieth of 100 steps of warm-up for cosine, three tenths for one cycle.
    assert build_schedule(section(schedule="cosine"), adamw)(4, 100) == pytest.approx(3e-3)
    assert build_schedule(section(schedule="one_cycle"), adamw)(30, 100) == pytest.approx(3e-3)


def test_what_is_said_reaches_the_optimiser() -> None:
    values = {"learning_rate": 0.5, "weight_decay": 0.25}
    adamw = build_optimiser(Halves(), section(**values, optimiser_options={"beta2": 0.99}))
    assert adamw.defaults["betas"] == (0.9, 0.99)
    assert [(g["lr"], g["weight_decay"]) for g in adamw.param_groups] == [(0.5, 0.25), (0.5, 0.0)]
    plain = build_optimiser(Halves(), section(optimiser="sgd", optimiser_options={"momentum": 0}))
    assert (plain.defaults["momentum"], plain.defaults["nesterov"]) == (0.0, False)


def test_an_encoder_learns_at_its_own_rate() -> None:
    network = Halves()
    optimiser = build_optimiser(network, section(encoder_learning_rate_factor=0.1))
    set_learning_rate(optimiser, 2.0)
    rates = {id(p): g["lr"] for g in optimiser.param_groups for p in g["params"]}
    assert {name: rates[id(p)] for name, p in network.named_parameters()} == pytest.approx(
        {
            **dict.fromkeys(("encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"), 0.2),
            **dict.fromkeys(("head.weight", "head.bias"), 2.0),
        }
    )
    del network.encoder
    with pytest.raises(ValueError, match="no encoder that is told apart"):
        build_optimiser(network, section(encoder_learning_rate_factor=0.1))


def test_wrong_names_and_options_are_named() -> None:
    assert check_optimiser("sgd", {"momentum": 0.9}) == []
    ((key, message),) = check_optimiser("adam", {})
    assert key == "name"
    assert "did you mean 'adamw'?" in message
    ((key, message),) = check_optimiser("adamw", {"beta1": 1.0})
    assert key == "options.beta1"
    ((key, message),) = check_schedule("poly", {"powr": 1})
    assert (key, "did you mean 'power'?" in message) == ("options.powr", True)
    with pytest.raises(ValueError, match="poly has no such option"):
        build_schedule(
            section(schedule="poly", schedule_options={"div_factor": 3}), build_optimiser(Halves(), section())
        )


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_follows_the_gradient(name: str) -> None:
    network = Halves()
    before = network.head.weight.detach().clone()
    optimiser = build_optimiser(network, section(optimiser=name))
    network(torch.randn(1, 1, 3, 3, 3)).square().sum().backward()
    gradient = network.head.weight.grad
    optimiser.step()
    assert gradient is not None
    assert ((network.head.weight - before) * gradient).sum() < 0
    kept = [value for value in optimiser.state[network.head.weight].values() if value.shape == before.shape]
    assert len(kept) == MOMENTS[name]
