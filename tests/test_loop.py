"""The training loop on a tiny network: what it does at each turning point, and that a checkpoint forgets nothing."""

import json
import math
import time
from collections.abc import Callable, Container
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.errors import TrainingError
from pipeline.hardware import deterministic
from pipeline.networks import Network
from pipeline.networks.recomputing import recompute_activations
from pipeline.training.budget import Costs, TimedBudget, repeated
from pipeline.training.checkpoints import load_checkpoint, save_checkpoint
from pipeline.training.loop import LoopSettings, train
from pipeline.training.losses import Objective, Target, build_loss
from pipeline.training.optimisation import OPTIMISERS, Schedule, cosine, one_cycle
from pipeline.training.state import TrainState, averaged_tensors, averaged_weights


class Tiny(Network):
    """A convolution, a norm with running buffers, dropout and a head: all kinds of state that training has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Dropout3d(0.3), nn.Conv3d(4, 2, 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.body(image)
        return result


def settings(**changes: object) -> LoopSettings:
    values: dict[str, object] = {
        "steps_per_epoch": 4,
        "validation_every_epochs": 1,
        "early_stop_validations": None,
        "checkpoint_s": 1e9,
        "gradient_clip": 1.0,
        "ema_decay": 0.9,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "seed": 0,
        **changes,
    }
    return LoopSettings(**values)  # type: ignore[arg-type]


def new_state(total_steps: int = 10, optimiser: str = "adamw", ema: bool = True) -> TrainState:
    torch.manual_seed(0)
    network = Tiny().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    chosen = OPTIMISERS[optimiser]([{"params": list(network.parameters())}])
    objective = Objective(network, build_loss("dice_ce", {}), deep_supervision=False)
    state = TrainState.begin(objective, chosen, torch.amp.GradScaler("cpu", enabled=False), ema=ema)
    state.total_steps = total_steps
    return state


def batches(step: int) -> tuple[Tensor, Target]:
    image = torch.randn(2, 1, 6, 6, 6, generator=torch.Generator().manual_seed(step))
    return image.contiguous(memory_format=torch.channels_last_3d), Target((image[:, 0] > 0.5).long())


@dataclass
class Recorder:
    """Hooks that write down what happened, and give the scores they were told to."""

    scores: list[float] = field(default_factory=list)
    validated: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    epochs: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    path: Path | None = None

    def validate(self, state: TrainState) -> dict[str, float]:
        self.validated.append(state.step)
        return {"score": self.scores[len(self.validated) - 1] if self.scores else float(state.step)}

    def improved(self, state: TrainState, scores: dict[str, float]) -> None:
        self.kept.append(state.step)

    def checkpoint(self, state: TrainState) -> None:
        self.checkpoints.append(state.step)
        if self.path is not None:
            save_checkpoint(self.path.with_name(f"{state.step}.safetensors"), state, {"fold": 0})

    def epoch_ended(self, state: TrainState, metrics: dict[str, float]) -> None:
        self.epochs.append((state.step, metrics))

    def not_finite(self, state: TrainState, step: int) -> TrainingError:
        return TrainingError(f"step {step} is not finite")


SCHEDULE = cosine(1e-2, 0.1)


def test_turning_points_of_a_training_that_ends_within_an_epoch() -> None:
    hooks = Recorder()
    train(new_state(10), batches, SCHEDULE, settings(validation_every_epochs=2), hooks)
    assert [step for step, _ in hooks.epochs] == [4, 8, 10]
    assert hooks.validated == [8, 10]
    assert hooks.checkpoints == [4, 8, 10]
    assert "val/score" not in hooks.epochs[0][1]
    assert hooks.epochs[1][1]["val/score"] == 8.0


def test_the_epoch_loss_is_the_mean_of_its_steps() -> None:
    hooks, state = Recorder(), new_state(6, ema=False)
    losses = []

    def watched(step: int) -> tuple[Tensor, Target]:
        losses.append(state.sums.loss.item())
        return batches(step)

    train(state, watched, SCHEDULE, settings(), hooks)
    # The sum is set to zero at each epoch's end; before step 4 it holds three losses.
    first = hooks.epochs[0][1]["train/loss"]
    assert losses[0] == 0.0
    assert losses[4] == 0.0
    assert losses[3] / 3 == pytest.approx(first, rel=0.5)
    assert 4 * first > losses[3]


def test_only_a_model_that_is_no_worse_is_kept_and_training_stops_when_none_is_better() -> None:
    hooks, state = Recorder(scores=[0.5, 0.7, 0.6, 0.7, 0.9]), new_state(40)
    train(state, batches, SCHEDULE, settings(early_stop_validations=2), hooks)
    assert hooks.kept == [4, 8, 16]
    assert hooks.validated == [4, 8, 12, 16]
    assert state.step == 16
    assert (state.best_score, state.best_step) == (0.7, 16)


def test_a_run_resumed_after_its_early_stop_trains_no_further() -> None:
    state = new_state(40)
    state.step, state.stale_validations = 16, 2
    hooks = Recorder()
    train(state, batches, SCHEDULE, settings(early_stop_validations=2), hooks)
    assert state.step == 16
    assert hooks.checkpoints == []


def test_checkpoints_come_by_the_clock_too() -> None:
    hooks = Recorder()
    train(new_state(5), batches, SCHEDULE, settings(checkpoint_s=0.0), hooks)
    assert hooks.checkpoints == [1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_stops_training_and_says_what_to_do() -> None:
    def poisoned(step: int) -> tuple[Tensor, Target]:
        image, target = batches(step)
        return image * (math.nan if step == 2 else 1.0), target

    hooks = Recorder()
    with pytest.raises(TrainingError, match="step 2 is not finite"):
        train(new_state(8), poisoned, SCHEDULE, settings(), hooks)
    # What came of it is neither validated nor written.
    assert (hooks.validated, hooks.checkpoints, hooks.epochs) == ([], [], [])


def overflow(state: TrainState, steps: Container[int]) -> None:
    """Let the gradient be infinite at some steps."""
    parameter = next(state.network.parameters())
    parameter.register_hook(lambda gradient: gradient * math.inf if state.step in steps else gradient)


def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is_not_to_blame() -> None:
    state = new_state(8)
    overflow(state, (5,))
    hooks = Recorder()
    with pytest.raises(TrainingError, match="step 5 is not finite"):
        train(state, batches, SCHEDULE, settings(), hooks)
    assert hooks.checkpoints == [4]
    assert all(math.isfinite(metrics["train/gradient_norm"]) for _, metrics in hooks.epochs)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_that_overflows_in_half_precision_is_left_out_and_is_no_failure(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state(4, name, ema=False)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    overflow(state, range(4))
    before = [parameter.detach().clone() for parameter in state.network.parameters()]
    hooks = Recorder()
    train(state, batches, SCHEDULE, settings(), hooks)
    assert state.scaler.get_scale() == 2.0**6  # halved at each step
    assert all(torch.equal(a, b) for a, b in zip(before, state.network.parameters(), strict=True))
    assert "train/gradient_norm" not in hooks.epochs[0][1]
    assert "no step of the epoch counted" in caplog.text
    assert hooks.checkpoints == [4]


def test_momentum_begins_at_nothing_where_the_first_step_overflowed() -> None:
    state = new_state(1, "sgd", ema=False)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    overflow(state, (0,))
    with deterministic(True):  # torch then fills memory that nobody has written with NaN
        train(state, batches, SCHEDULE, settings(), Recorder())
    momenta = [values["momentum_buffer"] for values in state.optimiser.state.values()]
    assert len(momenta) == len(list(state.network.parameters()))
    assert not any(momentum.any() for momentum in momenta)


def test_a_training_goes_on_where_precision_auto_is_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From a machine that computes in bf16 to one that must scale its gradients, and back."""
    begun, scaled = new_state(4), new_state(0)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(begun, batches, SCHEDULE, settings(), Recorder())
    for number, (written, read) in enumerate(((begun, scaled), (scaled, new_state(0)))):
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, written, {})
        load_checkpoint(path, read, {})
        assert read.step == 4
        assert caplog.text.count("on which training.precision auto is another") == number + 1
    assert scaled.scaler.get_scale() == 2.0**10


def test_the_speed_of_an_epoch_is_that_of_the_steps_done_here() -> None:
    state, hooks = new_state(8), Recorder()
    state.step = 3  # as after a resume: one step is left of the epoch

    def slowly(step: int) -> tuple[Tensor, Target]:
        time.sleep(0.05)
        return batches(step)

    train(state, slowly, SCHEDULE, settings(), hooks)
    assert all(0 < metrics["train/steps_per_s"] < 20 for _, metrics in hooks.epochs)


def test_the_gradient_norm_is_that_before_clipping_by_hand() -> None:
    state, hooks = new_state(2, ema=False), Recorder()
    norms = []

    def recording(step: int, total_steps: int) -> float:
        norms.append(total_norm(state))  # of the step before
        return SCHEDULE(step, total_steps)

    train(state, batches, recording, settings(steps_per_epoch=2, gradient_clip=None), hooks)
    norms.append(total_norm(state))
    assert norms[0] == 0.0 < norms[1]
    assert hooks.epochs[0][1]["train/gradient_norm"] == pytest.approx((norms[1] + norms[2]) / 2)
    clipped, later = new_state(1, ema=False), Recorder()
    train(clipped, batches, SCHEDULE, settings(gradient_clip=1e-3), later)
    assert later.epochs[0][1]["train/gradient_norm"] == pytest.approx(norms[1])
    assert total_norm(clipped) == pytest.approx(1e-3, rel=1e-2)


def total_norm(state: TrainState) -> float:
    """Return the norm of all gradients as one vector."""
    return math.sqrt(sum(float(p.grad.square().sum()) for p in state.network.parameters() if p.grad is not None))


class Plain(Network):
    """A network in which the patches of a batch know nothing of one another."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.Conv3d(4, 2, 1))

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.body(image)
        return result


@pytest.mark.parametrize(("loss", "same"), [("cross_entropy", True), ("dice_ce", False)])
def test_accumulated_batches_are_one_large_batch_unless_the_loss_sums_over_it(loss: str, same: bool) -> None:
    def patches(first: int, count: int) -> tuple[Tensor, Target]:
        pairs = [batches(number) for number in range(first, first + count)]
        images = torch.cat([image[:1] for image, _ in pairs]).double()
        return images, Target(torch.cat([target.classes[:1] for _, target in pairs]))

    def trained(size: int, accumulate: int) -> TrainState:
        torch.manual_seed(0)
        network = Plain().double()
        optimiser = torch.optim.SGD(network.parameters(), momentum=0.9)
        objective = Objective(network, build_loss(loss, {}), deep_supervision=False)
        state = TrainState.begin(objective, optimiser, torch.amp.GradScaler("cpu", enabled=False), ema=False)
        state.total_steps = 3
        changed = settings(accumulate=accumulate, gradient_clip=None, ema_decay=None)
        train(state, lambda number: patches(number * size, size), lambda step, total: 0.1, changed, Recorder())
        return state

    large, accumulated, other = trained(6, 1), trained(2, 3), trained(2, 1)
    pairs = [list(state.network.parameters()) for state in (large, accumulated, other)]
    equal = [torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(pairs[0], pairs[1], strict=True)]
    assert all(equal) == same
    assert not torch.allclose(pairs[0][0], pairs[2][0], rtol=1e-9, atol=1e-12)  # the test can fail


def test_training_learns() -> None:
    hooks = Recorder()
    train(new_state(200, ema=False), batches, cosine(5e-2, 0.1), settings(steps_per_epoch=20), hooks)
    assert hooks.epochs[-1][1]["train/loss"] < 0.7 * hooks.epochs[0][1]["train/loss"]


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("at", [4, 7])
def test_a_resumed_training_has_the_weights_of_the_uninterrupted_one(
    tmp_path: Path, optimiser: str, ema: bool, at: int
) -> None:
    def new(total_steps: int) -> TrainState:
        return new_state(total_steps, optimiser, ema)

    resume_is_exact(tmp_path, new, SCHEDULE, settings(checkpoint_s=0.0, ema_decay=0.9 if ema else None), at)


def test_a_resumed_training_that_accumulates_cycles_scales_and_recomputes_has_the_same_weights(tmp_path: Path) -> None:
    def new(total_steps: int) -> TrainState:
        state = new_state(total_steps)
        recompute_activations(state.network, nullcontext)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        overflow(state, (0, 1, 6))
        return state

    changed = settings(checkpoint_s=0.0, accumulate=2)
    state = resume_is_exact(tmp_path, new, one_cycle(1e-2), changed, 5)
    assert state.scaler.get_scale() == 2.0 ** (10 - 2 + 1 - 1 + 1)  # three steps between overflows, and three after
    assert state.sums.bad_step == -1


def resume_is_exact(
    folder: Path, new: Callable[[int], TrainState], schedule: Schedule, changed: LoopSettings, at: int
) -> TrainState:
    """Train ten steps in one go and from the checkpoint of a step; all that came of it is the same."""
    whole, hooks = new(10), Recorder(path=folder / "x")
    train(whole, batches, schedule, changed, hooks)
    resumed, later = new(0), Recorder()
    load_checkpoint(folder / f"{at}.safetensors", resumed, {"fold": 0})
    assert (resumed.step, resumed.total_steps) == (at, 10)
    train(resumed, batches, schedule, changed, later)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    for mine, other in zip(whole.average or [], resumed.average or [], strict=True):
        assert torch.equal(mine, other)
    assert (whole.best_score, whole.best_step) == (resumed.best_score, resumed.best_step)
    assert whole.scaler.state_dict() == resumed.scaler.state_dict()
    # The epoch in which it was cut has the same sums too: what was summed before is in the checkpoint.
    for name in ("train/loss", "train/gradient_norm"):
        of_whole, of_resumed = ([m.get(name) for step, m in run.epochs if step > at] for run in (hooks, later))
        assert of_whole == of_resumed
    return resumed


def test_a_checkpoint_is_put_back_into_a_state_that_went_on(tmp_path: Path) -> None:
    state, hooks = new_state(10), Recorder(path=tmp_path / "x")
    train(state, batches, SCHEDULE, settings(checkpoint_s=0.0), hooks)
    final = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    load_checkpoint(tmp_path / "1.safetensors", state, {"fold": 0})
    train(state, batches, SCHEDULE, settings(), Recorder())
    for name, tensor in state.network.state_dict().items():
        assert torch.equal(tensor, final[name]), name


def test_a_fresh_start_differs_so_that_the_resume_test_can_fail(tmp_path: Path) -> None:
    whole, cut = new_state(10), new_state(10)
    train(whole, batches, SCHEDULE, settings(), Recorder())
    cut.step = 4  # the position alone, without what the checkpoint remembers
    train(cut, batches, SCHEDULE, settings(), Recorder())
    assert any(
        not torch.equal(a, b)
        for a, b in zip(whole.network.state_dict().values(), cut.network.state_dict().values(), strict=True)
    )


class TestCheckpointsAreRefused:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        save_checkpoint(tmp_path / "c.safetensors", new_state(), {"fold": 0, "plan": "a"})
        return tmp_path / "c.safetensors"

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="no checkpoint to resume from; start without --resume"):
            load_checkpoint(tmp_path / "none", new_state(), {})

    def test_cut_short(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(TrainingError, match="damaged"):
            load_checkpoint(path, new_state(), {"fold": 0, "plan": "a"})

    def test_of_another_run(self, path: Path) -> None:
        with pytest.raises(TrainingError, match="another plan; put back what was changed"):
            load_checkpoint(path, new_state(), {"fold": 0, "plan": "b"})

    def test_of_another_format(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            assert json.loads(file.metadata()["medseg"])["format_version"] == 3
        path.write_bytes(path.read_bytes().replace(b'\\"format_version\\": 3', b'\\"format_version\\": 7'))
        with pytest.raises(TrainingError, match="format 7, this medseg reads 3"):
            load_checkpoint(path, new_state(), {"fold": 0, "plan": "a"})


def test_the_average_follows_by_hand_and_is_lent_to_the_network() -> None:
    state = new_state(1)
    before = [t.clone() for t in averaged_tensors(state.network)]
    train(state, batches, SCHEDULE, settings(), Recorder())
    after = [t.clone() for t in averaged_tensors(state.network)]
    # After the first step the decay is (1 + 1) / (10 + 1), the smaller of it and 0.9.
    decay = 2 / 11
    for mean, old, new in zip(state.average or [], before, after, strict=True):
        torch.testing.assert_close(mean, decay * old + (1 - decay) * new)
    with averaged_weights(state):
        for own, mean in zip(averaged_tensors(state.network), state.average or [], strict=True):
            assert torch.equal(own, mean)
    for own, new in zip(averaged_tensors(state.network), after, strict=True):
        assert torch.equal(own, new)


COSTS = Costs(step_s=0.5, epoch_end_s=1.0, validation_s=10.0, calibration_s=2.0)
RHYTHM = {"steps_per_epoch": 10, "validation_every_epochs": 2}


def at(step: int, spent_s: float, total_steps: int = 0) -> TrainState:
    """Return a state that stands at a step after so many seconds."""
    state = new_state(total_steps)
    state.step, state.spent_s = step, spent_s
    return state


def test_minutes_become_steps_by_hand() -> None:
    # 123 s, of which 20 are gone; the end takes 10 + 2 + 1. In 90 s go 84 steps, 42 s, the eight epoch ends before the
    # last of them, 8 s, and the four validations, 40 s.
    assert TimedBudget(123.0, COSTS, at(0, 20.0), **RHYTHM).probed_steps == 84
    with pytest.raises(TrainingError, match=r"no step fits into the 13 s left .* allow more minutes"):
        TimedBudget(13.0, COSTS, at(0, 0.0), **RHYTHM)


def test_the_clock_corrects_what_the_probe_found_by_hand() -> None:
    budget = TimedBudget(403.0, COSTS, at(0, 20.0), **RHYTHM)
    assert budget.probed_steps == 340
    assert budget(at(16, 60.0, 340)) == 340  # not yet: it counts after a twentieth
    # The first twenty took 28 s, not 11, which is no measure of the others. Of the 355 s left the end takes 13; in 342
    # go 302 steps, 151 s, the ends of 31 epochs, that of this step among them, and sixteen validations.
    assert budget(at(20, 48.0, 340)) == 20 + 302
    # The next twenty took 104 s, not 22 with two ends of epochs and a validation. With a minute at the probe's pace
    # that is 164 / 82, twice as long, and the 251 s left are as 125.5. Less the end they are 112.5: a hundred steps,
    # 50 s, ten ends of epochs and five validations, that of this step among them; one more step brings a sixth.
    assert budget(at(40, 152.0, 322)) == 40 + 100
    assert budget(at(44, 154.0, 140)) == 140
    assert budget(at(50, 154.0, 140)) > 140  # faster again


def test_a_budget_that_is_over_ends_with_the_step_and_a_resumed_one_has_a_step_left() -> None:
    budget = TimedBudget(403.0, COSTS, at(0, 20.0), **RHYTHM)
    assert budget(at(20, 391.0, 340)) == 20
    assert budget(at(340, 60.0, 340)) == 340  # the schedule has come to its end
    assert TimedBudget(403.0, COSTS, at(40, 400.0), **RHYTHM).probed_steps == 41


@pytest.mark.parametrize("from_step", [20, 150, 190])
def test_a_machine_that_slows_down_costs_steps_and_not_minutes(tmp_path: Path, from_step: int) -> None:
    """Half a second a step, and two from some step on, in a budget of 100 seconds."""
    state, hooks = new_state(0), Recorder(path=tmp_path / "x")
    budget = TimedBudget(100.0, Costs(0.5, 0.0, 0.0), state, steps_per_epoch=50, validation_every_epochs=2)
    assert budget.probed_steps == 200
    rates: dict[int, float] = {}

    def recount(state: TrainState) -> int:
        state.spent_s = 0.5 * min(state.step, from_step) + 2.0 * max(0, state.step - from_step)
        return budget(state)

    def schedule(step: int, total_steps: int) -> float:
        rates[step] = SCHEDULE(step, total_steps)
        return rates[step]

    state.total_steps = budget.probed_steps
    train(state, batches, schedule, settings(steps_per_epoch=50), hooks, recount=recount)
    assert 98.0 <= state.spent_s <= 105.1  # ten steps may lie between two counts
    assert state.step == state.total_steps < 200
    assert hooks.epochs[-1][0] == state.step and "val/score" in hooks.epochs[-1][1]
    assert rates[state.step - 1] < 0.1 * max(rates.values())  # the schedule ends with it
    assert all(metrics["train/learning_rate"] == rates[step - 1] for step, metrics in hooks.epochs)
    # Counted as it was, from the start or from a checkpoint on, it has the same rates again.
    for step in (0, 50):
        again, first = new_state(200), dict(rates)
        if step:
            load_checkpoint(tmp_path / f"{step}.safetensors", again, {"fold": 0})
            assert again.spent_s > 0
        assert again.step == step
        train(again, batches, schedule, settings(steps_per_epoch=50), Recorder(), recount=repeated(state.recounts))
        assert rates == first and again.step == state.step
        assert torch.equal(*(next(run.network.parameters()) for run in (state, again)))
