"""The plans of a store, each kept until its facts change or a person edits it.

    plan.yaml               the first that was made: the cases are prepared by it
    plans/NETWORK-....yaml  those of other networks, or for another GPU's memory: images are treated as plan.yaml says,
                            patch, batch and U-Net are their own

Beside each lies NAME.record.json: how it was written, and for whom.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Fingerprint, Plan, read_plan, write_plan
from pipeline.errors import ConfigError
from pipeline.preparation.planning import make_plan
from pipeline.preparation.sizing import Memory, sized
from pipeline.records import Record, write_json

log = logging.getLogger(__name__)

PLAN, PLANS, FINGERPRINT = "plan.yaml", "plans", "fingerprint.json"


class PlanRecord(Record):
    """How a plan was written, and for whom.

    Attributes:
        plan: its digest; a plan with another was edited.
        facts: digest of the fingerprint that it was made from; None in records of before.
        network: digest of the network's section; None in records of before, whose plan is every network's.
        memory_gb: of the GPU that it was made for.
    """

    plan: str
    facts: str | None = None
    network: str | None = None
    memory_gb: float | Literal["auto"] = "auto"


def settle_plan(
    folder: Path, facts: Fingerprint, manifest: Manifest, config: Config, *, replan: bool = False, device: str = "auto"
) -> Plan:
    """Write a configuration's plan and return it; one that a person has edited, or that has the same facts, is kept.

    Raises:
        ConfigError: an edited plan cannot be read, its channels or labels are not the manifest's, or it treats images
            in another way than plan.yaml.
    """

    def anew() -> Plan:
        return planned(facts, manifest, config, device)

    first = folder / PLAN
    is_replaced = replan and (_own(folder, config, replan=True) == first or _is_edited(first))
    whole = None if is_replaced else _kept(first, facts, manifest, anew)
    if whole is None:
        whole = _written(first, anew(), facts, config)
    write_json(folder / FINGERPRINT, facts.model_dump(mode="json"))
    own = _own(folder, config, replan=replan)
    if own == first:
        return whole

    def resized() -> Plan:
        return sized(whole, facts, config.preprocessing, _memory(facts, manifest, config, device))

    kept = None if replan else _kept(own, facts, manifest, resized, treated_as=whole)
    return kept or _written(own, resized(), facts, config)


def plan_path(folder: Path, config: Config) -> Path:
    """Return the plan of a store by which a configuration is trained: its own; where it has none, plan.yaml.

    Raises:
        ConfigError: it says no memory, and there are plans for several.
    """
    own = _own(folder, config)
    chosen = own if own.exists() else folder / PLAN
    if others := [path for path in _of_network(folder, config) if path != chosen]:
        log.warning(
            "%s: is for %s; there is a plan for %s too: --set preprocessing.memory_gb=...",
            *(chosen, _memory_of(chosen), " and for ".join(map(_memory_of, others))),
        )
    return chosen


def planned(facts: Fingerprint, manifest: Manifest, config: Config, device: str = "auto") -> Plan:
    """Return the plan of a configuration, its patch and batch chosen for the memory that its network has."""
    return make_plan(facts, manifest, config.preprocessing, _memory(facts, manifest, config, device))


def _memory(facts: Fingerprint, manifest: Manifest, config: Config, device: str) -> Memory:
    """Return what a step of a configuration's training may take, and what it would."""
    # Only planning asks networks: what is planned already is found fresh without torch.
    from pipeline.stages.step_memory import memory_for

    return memory_for(config, manifest, facts, device)


def _own(folder: Path, config: Config, *, replan: bool = False) -> Path:
    """Return where a configuration's own plan lies, or would.

    A configuration that says no memory also takes the plan of its network for whatever memory, unless it replans: who
    has said `--gpu-memory 8` once need not say it again.

    Raises:
        ConfigError: it says no memory, and there are plans for several.
    """
    first, memory, network = folder / PLAN, config.preprocessing.memory_gb, config.network.digest()
    named = folder / PLANS / f"{_stem(config)}{'' if memory == 'auto' else f'-{memory:g}gb'}.yaml"
    record = _record(first)
    if not first.exists() or record is None or record.network is None:
        return first
    if (record.network, record.memory_gb) == (network, memory):
        return first
    if named.exists() or memory != "auto" or replan:
        return named
    found = _of_network(folder, config)
    if len(found) > 1:
        said = "; ".join(f"{path}, {_memory_of(path)}" for path in found)
        raise ConfigError(
            f"preprocessing.memory_gb: is not said, and there are plans for several: {said}; say which, in the YAML or "
            "by --set preprocessing.memory_gb=..."
        )
    return next(iter(found), named)


def _stem(config: Config) -> str:
    """Return how the names of a network's own plans begin."""
    return f"{config.network.name}-{config.network.digest()[:8]}"


def _of_network(folder: Path, config: Config) -> list[Path]:
    """Return the plans that there are for a network: the store's first, where it is one, and those for a memory."""
    first = folder / PLAN
    record = _record(first) if first.exists() else None
    is_first = record is not None and record.network == config.network.digest()
    return [*([first] if is_first else []), *sorted((folder / PLANS).glob(f"{_stem(config)}-*gb.yaml"))]


def _memory_of(path: Path) -> str:
    """Say for which memory a plan was made."""
    record = _record(path)
    return f"{record.memory_gb:g} GB" if record and record.memory_gb != "auto" else "the memory where it was made"


def _kept(
    path: Path, facts: Fingerprint, manifest: Manifest, anew: Callable[[], Plan], treated_as: Plan | None = None
) -> Plan | None:
    """Return a plan as it stands; None where it is to be made anew: there is none, or ours is of other facts.

    Raises:
        ConfigError: it was edited and does not fit the manifest, or the plan by which images are treated.
    """
    if not path.exists():
        return None
    kept, record = read_plan(path), _record(path)
    is_alike = treated_as is None or kept.preprocessing_digest() == treated_as.preprocessing_digest()
    if not _is_edited(path):
        assert record is not None  # else it would count as edited
        is_known = _is_of(record, path.parent / FINGERPRINT, facts)
        return kept if is_known and is_alike and not _misfits(kept, manifest) else None
    # A run killed between plan and record has left a plan of ours that is not recorded.
    if kept.digest() == anew().digest():
        return None
    _refuse_unfit(path, kept, manifest)
    if not is_alike:
        raise ConfigError(
            f"{path}: only patch_size, batch_size and network may differ from ../{PLAN}, by which the cases are "
            "prepared; mend it, or plan anew with `medseg preprocess CONFIG --replan`"
        )
    log.info("%s: edited by hand, kept; --replan makes it anew", path)
    return kept


def _written(path: Path, plan: Plan, facts: Fingerprint, config: Config) -> Plan:
    """Write a plan, then its record."""
    record = PlanRecord(
        plan=plan.digest(),
        facts=facts.digest(),
        network=config.network.digest(),
        memory_gb=config.preprocessing.memory_gb,
    )
    write_plan(path, plan)
    write_json(path.with_suffix(".record.json"), record.model_dump(mode="json"))
    return plan


def _record(path: Path) -> PlanRecord | None:
    """Return a plan's record; stores of before have but the digest."""
    record, digest = path.with_suffix(".record.json"), path.with_suffix(".sha256")
    if record.exists():
        return PlanRecord.model_validate_json(record.read_bytes())
    return PlanRecord(plan=digest.read_text(encoding="utf-8").strip()) if digest.exists() else None


def _is_edited(path: Path) -> bool:
    """Tell whether a plan is there that is not as we wrote it."""
    if not path.exists():
        return False
    record = _record(path)
    return record is None or read_plan(path).digest() != record.plan


def _is_of(record: PlanRecord, written: Path, facts: Fingerprint) -> bool:
    """Tell whether a plan was made from these facts; records of before leave it to the facts beside them."""
    if record.facts is not None:
        return record.facts == facts.digest()
    return written.exists() and json.loads(written.read_text(encoding="utf-8")) == facts.model_dump(mode="json")


def _refuse_unfit(path: Path, plan: Plan, manifest: Manifest) -> None:
    """Raise where an edited plan is not for this manifest."""
    for name in _misfits(plan, manifest):
        raise ConfigError(
            f"{path}: {name}: this edited plan says {getattr(plan, name)}, the manifest {getattr(manifest, name)}; "
            "mend the plan, or plan anew with `medseg preprocess CONFIG --replan`"
        )
    if set(plan.normalisation) != set(plan.channels):
        raise ConfigError(f"{path}: normalisation: one entry for each of {', '.join(plan.channels)} is needed")


def _misfits(plan: Plan, manifest: Manifest) -> list[str]:
    """Return the fields in which a plan is not for a manifest; the order of channels and labels counts."""
    names = ("channels", "labels", "label_pairs", "regions", "ignore_label")
    return [name for name in names if repr(getattr(plan, name)) != repr(getattr(manifest, name))]
