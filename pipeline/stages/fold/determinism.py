"""What `training.deterministic` refuses before the first step: operators that give other bits each time.

Batches, noise and dropout are functions of their number in any training. What is left is the order in which an operator
adds; torch knows which of its own have no fixed one on a device, and says so only when they are called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pipeline.errors import TrainingError
from pipeline.stages.fold.task import FoldTask
from pipeline.training.loop import Batches, train_step

# How torch says it, in an error that has no type of its own.
_REFUSAL = re.compile(r"^(?P<operator>\S+) does not have a deterministic implementation")


def refuse_nondeterministic(task: FoldTask, batches: Batches) -> None:
    """Do one step, and validate one case, on a state that is thrown away; to be called under `deterministic`.

    Raises:
        TrainingError: an operator has no deterministic implementation on the device; names it, and the layer in which
            it is called or the last one before it.
    """
    state = task.new_state()
    with _layer_reached(state.objective) as reached:
        try:
            train_step(state, batches, task.schedule(state)(0, 1), task.settings)
            task.validation(state.network).scores(task.validation_cases[:1])
        except RuntimeError as error:
            found = _REFUSAL.match(str(error))
            if found is None:
                raise
            raise TrainingError(
                f"training.deterministic: {found['operator']} has no deterministic implementation on {task.device} "
                f"(reached: {reached[-1]}); choose a network and a loss without it, train on another device, or set "
                "training.deterministic false"
            ) from error


@contextmanager
def _layer_reached(objective: nn.Module) -> Iterator[list[str]]:
    """Yield a list whose last entry is the layer that the computation has reached, forwards or backwards."""
    names = {module: f"{name or 'the loss'}, {type(module).__name__}" for name, module in objective.named_modules()}
    reached = ["the batch"]

    def begins(module: nn.Module, _: Any) -> None:
        reached.append(names.get(module, type(module).__name__))

    def ended(module: nn.Module, _: Any, output: Any) -> None:
        # A tensor's hook, not the module's: that one forbids what changes its result in place.
        if isinstance(output, Tensor) and output.requires_grad:
            name = f"{names.get(module, type(module).__name__)}, backwards"
            output.register_hook(lambda _: reached.append(name))  # type: ignore[no-untyped-call]

    handles = [register_module_forward_pre_hook(begins), register_module_forward_hook(ended)]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()
