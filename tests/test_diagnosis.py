"""Diagnosis: where time goes and what to change, a stall and its place, the first number that is not finite."""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pipeline.networks import Network
from pipeline.training.diagnosis.advice import Circumstances, advice, shares_of, spoken
from pipeline.training.diagnosis.explanation import explained, named
from pipeline.training.diagnosis.finiteness import Fault, faulty_weight, inspect
from pipeline.training.diagnosis.replay import Finding, replay
from pipeline.training.diagnosis.stopwatch import (
    AUGMENTATION,
    CHECKPOINTS,
    PHASES,
    REST,
    STEPS,
    VALIDATION,
    WAITING,
    Stopwatch,
    untimed,
)
from pipeline.training.diagnosis.watchdog import Watchdog
from pipeline.training.loop import LoopSettings, train_step
from pipeline.training.losses import Objective
from pipeline.training.state import TrainState

NOW = Circumstances(on_disk=False, workers=2, validation_every_epochs=10, steps_per_epoch=100)


class Ticks:
    """A clock that is put forward by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def clock(ticks: Ticks) -> Stopwatch:
    return Stopwatch(torch.device("cpu"), ticks)


def test_the_innermost_phase_counts_and_nothing_is_lost(clock: Stopwatch, ticks: Ticks) -> None:
    ticks.now = 1.0
    with clock(WAITING):
        ticks.now = 3.0
        with clock(AUGMENTATION):
            ticks.now = 7.0
        ticks.now = 7.5
    with clock(STEPS):
        ticks.now = 17.5
    assert clock.phase == REST
    expected = {REST: 1.0, WAITING: 2.5, AUGMENTATION: 4.0, STEPS: 10.0}
    assert clock.read() == {**dict.fromkeys(PHASES, 0.0), **expected}


def test_a_reading_begins_anew_even_within_a_phase(clock: Stopwatch, ticks: Ticks) -> None:
    with clock(VALIDATION):
        ticks.now = 2.0
        assert clock.read()[VALIDATION] == 2.0
        ticks.now = 5.0
    assert clock.read()[VALIDATION] == 3.0
    assert sum(clock.read().values()) == 0.0


def test_an_error_ends_its_phase(clock: Stopwatch, ticks: Ticks) -> None:
    with pytest.raises(KeyError), clock(STEPS):
        raise KeyError
    ticks.now = 4.0
    assert clock.read()[REST] == 4.0


def test_untimed_does_nothing() -> None:
    with untimed(STEPS) as nothing:
        assert nothing is None


def test_real_time_on_a_cpu() -> None:
    clock = Stopwatch(torch.device("cpu"))
    begun = time.perf_counter()
    with clock(WAITING):
        time.sleep(0.02)
    spent = clock.read()
    assert 0.02 <= spent[WAITING] <= sum(spent.values()) <= time.perf_counter() - begun + 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available to torch")
def test_a_gpus_time_is_counted_to_the_phase_that_queued_it() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    matrix @ matrix
    torch.cuda.synchronize()
    clock = Stopwatch(device)
    with clock(STEPS):
        for _ in range(100):
            matrix @ matrix
    with clock(WAITING):
        queued = time.perf_counter()  # Python is here long before the device
    with clock(VALIDATION):
        torch.cuda.synchronize()
        waited = time.perf_counter() - queued
    spent = clock.read()
    assert spent[STEPS] > 0.8 * waited
    assert spent[WAITING] + spent[VALIDATION] < 0.2 * spent[STEPS]
    with clock(WAITING):
        time.sleep(0.05)
    assert clock.read()[WAITING] > 0.045


class TestAdvice:
    def test_of_a_well_kept_training_there_is_none(self) -> None:
        assert advice({WAITING: 200.0, AUGMENTATION: 100.0, STEPS: 600.0, VALIDATION: 100.0}, NOW) == {}

    def test_of_a_training_that_is_over_at_once_there_is_none(self) -> None:
        assert advice({STEPS: 1.0, VALIDATION: 29.0}, NOW) == {}

    def test_waiting_for_threads_or_for_a_disk(self) -> None:
        (sentence,) = advice({WAITING: 210.0, STEPS: 790.0}, NOW).values()
        assert sentence.startswith("waiting for data takes 21 % of the time; raise training.workers (now 2)")
        (sentence,) = advice({WAITING: 210.0, STEPS: 790.0}, replace(NOW, on_disk=True)).values()
        assert "do not fit into memory" in sentence

    def test_rarer_validation_by_hand(self) -> None:
        # 400 s of validation beside 600 s: a fifth of the time is 150 s, so 400 / 150 times as rarely: 26.7 epochs.
        (sentence,) = advice({STEPS: 600.0, VALIDATION: 400.0}, NOW).values()
        assert sentence == ("validation takes 40 % of the time; set training.validation_every_epochs to 27 (now 10)")

    def test_each_phase_has_its_own(self) -> None:
        assert set(advice({WAITING: 100.0, AUGMENTATION: 100.0, CHECKPOINTS: 100.0}, NOW)) == {
            WAITING,
            AUGMENTATION,
            CHECKPOINTS,
        }

    def test_no_time_no_advice(self) -> None:
        assert advice(dict.fromkeys(PHASES, 0.0), NOW) == {}
        assert shares_of({STEPS: 0.0}) == {STEPS: 0.0}

    def test_in_words(self) -> None:
        assert spoken({WAITING: 0.01, STEPS: 34.0, VALIDATION: 8.0}) == (
            "42.0 s: forward and backward 81 %, validation 19 %"
        )


class TestWatchdog:
    def watch(
        self, clock: Stopwatch, barks: list[str], place: Callable[[], str] = lambda: "step 3: case a"
    ) -> Watchdog:
        return Watchdog(clock, 0.05, place=place, report=barks.append)

    def test_a_stall_is_told_once_with_stage_and_place_and_where_in_the_code(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        clock, barks, barked = Stopwatch(torch.device("cpu")), list[str](), threading.Event()

        def report(said: str) -> None:
            barks.append(said)
            barked.set()

        def blocks() -> None:
            assert barked.wait(10)
            time.sleep(0.1)  # the same stall, twice as long: it is not told again

        with (
            caplog.at_level(logging.WARNING),
            Watchdog(clock, 0.05, place=lambda: "step 3: case a", report=report),
            clock(WAITING),
        ):
            blocks()
        assert len(barks) == 1
        assert barks[0].startswith("no progress for 0.0 minutes; waiting for data, step 3: case a")
        (record,) = caplog.records
        assert barks[0] in record.message
        assert "in blocks" in record.message
        assert "watchdog.py" not in record.message

    def test_the_next_stall_is_told_again(self) -> None:
        clock, barks, barked = Stopwatch(torch.device("cpu")), list[str](), threading.Semaphore(0)

        def report(said: str) -> None:
            barks.append(said)
            barked.release()

        with Watchdog(clock, 0.05, place=lambda: clock.case, report=report), clock(VALIDATION):
            for case in ("a", "b"):
                clock.reached(case)
                assert barked.acquire(timeout=10)
        assert [bark[-1] for bark in barks] == ["a", "b"]

    def test_progress_within_a_phase_is_no_stall_and_no_thread_is_left(self) -> None:
        clock, barks = Stopwatch(torch.device("cpu")), list[str]()

        def is_watched() -> bool:
            return "watchdog" in [thread.name for thread in threading.enumerate()]

        with Watchdog(clock, 5.0, place=str, report=barks.append), clock(VALIDATION):
            assert is_watched()
            for number in range(3):
                clock.reached(str(number))
        assert barks == []
        assert not is_watched()


class TwoLayers(Network):
    """Two convolutions, and a factor between the last of them and the end."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1))
        self.scale = 1.0

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.body(image) * self.scale
        return result


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


IMAGE = torch.arange(8.0).reshape(2, 1, 4, 1, 1) / 8


class TestInspection:
    """A pass taken apart; each fault put in at a known place."""

    def fault(self, network: nn.Module, image: Tensor = IMAGE, loss: Callable[[Tensor], Tensor] = torch.mean) -> Fault:
        found = inspect(network, image, lambda: loss(network(image)), backward=True)
        assert found is not None
        assert all(parameter.grad is None for parameter in network.parameters())
        return found

    @pytest.fixture
    def network(self) -> TwoLayers:
        torch.manual_seed(0)
        return TwoLayers()

    def test_nothing_is_found_where_all_is_finite(self, network: TwoLayers) -> None:
        assert inspect(network, IMAGE, lambda: network(IMAGE).mean(), backward=True) is None

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_an_image_by_its_row(self, network: TwoLayers, value: float) -> None:
        image = IMAGE.clone()
        image[1, 0, 2] = value
        assert self.fault(network, image) == Fault("image", rows=(1,))

    def test_the_first_layer_by_its_name_and_rows(self, network: TwoLayers) -> None:
        with torch.no_grad():
            network.body[1].weight.fill_(3e38)  # finite, but not its products with what is above 1
            network.body[0].weight.fill_(1.0)
            network.body[0].bias.zero_()
        image = IMAGE * 0
        image[1] = 100.0
        assert self.fault(network, image) == Fault("layer", "body.1", (1,), place=1)

    def test_what_a_module_computes_between_its_layers_is_its_own(self, network: TwoLayers) -> None:
        network.scale = math.inf
        assert self.fault(network) == Fault("layer", "TwoLayers", (0, 1), place=3)

    def test_of_several_processes_the_fault_that_came_about_first_is_told(self) -> None:
        faults = [Fault("image"), Fault("layer", "b", place=0), Fault("layer", "a", place=1), Fault("loss")]
        findings = [Finding(3, None, Fault("weights")), *(Finding(3, 7, fault) for fault in faults)]
        findings += [Finding(3, 8, Fault("image")), Finding(4, 9, Fault("image"))]
        assert [finding.order for finding in findings] == sorted(finding.order for finding in findings)

    def test_the_loss(self, network: TwoLayers) -> None:
        assert self.fault(network, loss=lambda logits: logits.mean() / 0) == Fault("loss")

    def test_the_gradient_nearest_to_the_loss(self, network: TwoLayers) -> None:
        # The root of 0 is 0, its slope infinite.
        assert self.fault(network, loss=lambda logits: (logits - logits.detach()).abs().mean().sqrt()) == Fault(
            "gradient", "body.1.bias"
        )

    def test_gradients_that_a_scaler_deals_with_are_no_fault(self, network: TwoLayers) -> None:
        def loss() -> Tensor:
            logits: Tensor = network(IMAGE)
            return (logits - logits.detach()).abs().mean().sqrt()

        assert inspect(network, IMAGE, loss, backward=False) is None

    def test_no_hook_stays(self, network: TwoLayers) -> None:
        inspect(network, IMAGE, lambda: network(IMAGE).mean(), backward=True)
        assert not any(module._forward_hooks for module in network.modules())

    def test_weights_and_buffers_by_name(self, network: TwoLayers) -> None:
        assert faulty_weight(network) is None
        with torch.no_grad():
            network.body[1].bias[0] = math.nan
        assert faulty_weight(network) == "body.1.bias"


class TestReplay:
    SETTINGS = LoopSettings(
        steps_per_epoch=10,
        validation_every_epochs=1,
        early_stop_validations=None,
        checkpoint_s=1e9,
        gradient_clip=None,
        ema_decay=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=0,
        accumulate=2,
    )

    def state(self) -> TrainState:
        torch.manual_seed(0)
        objective = Objective(TwoLayers(), mean_square, deep_supervision=False)
        optimiser = torch.optim.SGD(objective.parameters(), lr=1e-2)
        state = TrainState.begin(objective, optimiser, torch.amp.GradScaler("cpu", enabled=False), ema=False)
        state.total_steps = 10
        return state

    def batches(self, number: int) -> tuple[Tensor, Tensor]:
        image = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(number))
        if number == 7:
            image[0, 0, 1, 2, 3] = math.inf
        return image, torch.zeros(2, 2, 4, 4, 4)

    def found(self, state: TrainState, bad_step: int, rate: float = 1e-2) -> Finding | None:
        return replay(state, self.batches, lambda step, total: rate, self.SETTINGS, bad_step)

    def test_the_batch_of_a_later_step_after_those_before_it(self) -> None:
        state = self.state()
        assert self.found(state, 3) == Finding(3, 7, Fault("image", rows=(0,)))
        before = self.state()
        for _ in range(3):
            train_step(before, self.batches, 1e-2, self.SETTINGS)
        for mine, other in zip(state.network.parameters(), before.network.parameters(), strict=True):
            assert torch.equal(mine, other)

    def test_what_is_finite_this_time(self) -> None:
        assert self.found(self.state(), 2) is None

    def test_weights_of_the_checkpoint(self) -> None:
        state = self.state()
        state.step = 2
        with torch.no_grad():
            next(state.network.parameters()).fill_(math.nan)
        assert self.found(state, 3) == Finding(2, None, Fault("weights", "body.0.weight"))

    def test_a_step_that_overflows_the_weights(self) -> None:
        finding = self.found(self.state(), 1, rate=math.inf)
        assert finding is not None
        assert (finding.step, finding.batch, finding.fault.kind) == (0, None, "step")


def test_a_finding_in_words() -> None:
    image = Finding(3, 7, Fault("image", rows=(0,)))
    assert explained(image, ["a", "a"], half_precision=True) == (
        "step 3: the image of case a holds inf or NaN; mend the case or leave it out of the manifest, and run "
        "`medseg preprocess`"
    )
    layer = Finding(3, 7, Fault("layer", "body.1", (0, 1)))
    said = explained(layer, ["a", "b"], half_precision=True)
    assert "layer 'body.1' is the first whose output is inf or NaN, for cases a, b" in said
    assert "training.precision: fp32" in said
    assert "training.precision" not in explained(layer, ["a"], half_precision=False)
    assert named(["b", "a", "b"]) == "cases b, a"
