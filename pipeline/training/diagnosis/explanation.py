"""What is not finite, in words: what, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.training.diagnosis.finiteness import Kind
from pipeline.training.diagnosis.replay import Finding

_WHAT: dict[Kind, str] = {
    "weights": "the weights {name} hold inf or NaN already in the checkpoint of that step",
    "image": "the image of {cases} holds inf or NaN",
    "layer": "layer {name} is the first whose output is inf or NaN, for {cases}",
    "loss": "the loss is inf or NaN, of finite logits, for {cases}",
    "gradient": "the gradient of {name} is inf or NaN, of a finite loss, for {cases}",
    "step": "the optimiser's step made weights inf or NaN, of finite gradients",
}
_SLOWER = "lower training.learning_rate, or set or lower training.gradient_clip"
_WHAT_TO_DO: dict[Kind, str] = {
    "weights": f"begin anew without --resume, and {_SLOWER}",
    "image": "mend the case or leave it out of the manifest, and run `medseg preprocess`",
    "layer": _SLOWER,
    "loss": f"try another training.loss or its loss_options, or {_SLOWER}",
    "gradient": _SLOWER,
    "step": _SLOWER,
}


def explained(finding: Finding, cases: Sequence[str], *, half_precision: bool) -> str:
    """Return a finding as one sentence.

    Args:
        finding: what a replay has found.
        cases: ids of the cases concerned.
        half_precision: whether the network computes in 16 bits.
    """
    fault = finding.fault
    what = _WHAT[fault.kind].format(name=repr(fault.name), cases=named(cases))
    advice = _WHAT_TO_DO[fault.kind]
    if half_precision and fault.kind in ("layer", "loss", "gradient"):
        advice = f"set training.precision: fp32 to see whether it is the half precision, or {advice}"
    return f"step {finding.step}: {what}; {advice}"


def named(cases: Sequence[str]) -> str:
    """Return case ids as words, each once."""
    unique = list(dict.fromkeys(cases))
    return f"case {unique[0]}" if len(unique) == 1 else f"cases {', '.join(unique)}"
