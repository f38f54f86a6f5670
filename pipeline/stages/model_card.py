"""The model card: what a model was trained on, how well it did, what it is for and where it ends; beside its weights.

    MODEL/data.json        facts of the data set, which its manifest knows and no other file of the model does
          evaluation.json  what `medseg evaluate` found on cases of that manifest that the model has not seen
          MODEL_CARD.md    made of them and the model's own files, by `write_card`, each time one of these has changed

None is part of the model's digest, for no label map depends on them. No case or patient is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError

from pipeline.confidence.calibration import Calibration, read_calibration
from pipeline.data.manifest import Case, Manifest
from pipeline.data.plan import Fingerprint, Plan, read_plan
from pipeline.errors import ModelError
from pipeline.inference.postprocessing import read_postprocessing
from pipeline.model import (
    CONFIG,
    DESCRIPTION,
    FINGERPRINT,
    PLAN,
    WEIGHTS,
    ModelDescription,
    read_description,
    weights_sha256,
)
from pipeline.records import Record, write_json, write_text

CARD, DATA, EVALUATION = "MODEL_CARD.md", "data.json", "evaluation.json"

UNKNOWN = "not known"

_NOTICE = (
    "Research software. It is not a medical device, has been cleared by nobody, and must not be used for diagnosis, "
    "treatment or triage without a qualified person's own look at every image."
)


class DataFacts(Record):
    """What a manifest knows of the cases that a model has learned from; no case by its name.

    Attributes:
        name, description, licence, source: the manifest's own.
        manifest_digest: of the manifest.
        training_cases, training_patients: that the model has learned from.
        validation_cases, validation_patients: by which the best model was chosen.
        incomplete_cases: of the training's, those that lack a channel.
        partly_annotated_cases: of the training's, those in which people did not look for every structure.
    """

    name: str
    manifest_digest: str
    description: str
    licence: str
    source: str
    training_cases: int
    training_patients: int
    validation_cases: int
    validation_patients: int
    incomplete_cases: int
    partly_annotated_cases: int

    @classmethod
    def of(cls, manifest: Manifest, training: Sequence[Case], validation: Sequence[Case]) -> Self:
        """Count the cases of one fold's training."""
        return cls(
            name=manifest.name,
            manifest_digest=manifest.digest(),
            description=manifest.description,
            licence=manifest.licence,
            source=manifest.source,
            training_cases=len(training),
            training_patients=len({case.patient for case in training}),
            validation_cases=len(validation),
            validation_patients=len({case.patient for case in validation}),
            incomplete_cases=sum(len(case.images) < len(manifest.channels) for case in training),
            partly_annotated_cases=sum(case.annotated_classes is not None for case in training),
        )


class Score(Record):
    """One metric of one structure; what is no number is None.

    Attributes:
        structure, metric: their names.
        mean: over the cases that have a value.
        low, high: ends of its 95 % interval.
        cases: that have a value.
    """

    structure: str
    metric: str
    mean: float | None
    low: float | None
    high: float | None
    cases: int

    def as_row(self) -> str:
        """Return it as a row of the card's table."""
        mean, low, high = (UNKNOWN if value is None else f"{value:.4g}" for value in (self.mean, self.low, self.high))
        return f"| {self.structure} | {self.metric} | {mean} | {low} to {high} | {self.cases} |"


class Evaluated(Record):
    """What was found on some cases.

    Attributes:
        cases: fold, test or all, as `medseg evaluate --cases` calls them.
        number: of cases.
        scores: a metric of a structure each.
    """

    cases: str
    number: int
    scores: tuple[Score, ...]


def keep_evaluation(folder: Path, found: Evaluated) -> None:
    """Keep an evaluation's result in a model's folder, in place of an earlier one on such cases, and in its card.

    Raises:
        ModelError: a file of the model is damaged.
    """
    others = [one for one in _evaluations(folder) if one.cases != found.cases]
    write_json(folder / EVALUATION, [one.model_dump(mode="json") for one in (*others, found)])
    write_card(folder)


def _evaluations(folder: Path) -> list[Evaluated]:
    """Return the evaluations that a model's folder knows of."""
    path = folder / EVALUATION
    if not path.exists():
        return []
    try:
        return [Evaluated.model_validate(one) for one in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: is damaged: {str(error).partition(chr(10))[0]}; remove it") from error


def write_card(folder: Path, facts: DataFacts | None = None) -> None:
    """Write a model's card into its folder, or write it anew after another of its files has changed.

    Args:
        folder: of a whole model.
        facts: of its data; None: those that lie there, where there are any.

    Raises:
        ModelError: a file of the model is damaged.
    """
    if facts is not None:
        write_json(folder / DATA, facts.model_dump(mode="json"))
    write_text(folder / CARD, card_of(folder))


def card_of(folder: Path) -> str:
    """Return a model's card as Markdown, from what lies in its folder and from nothing else.

    Raises:
        ModelError: a file of the model is damaged.
    """
    description, plan = read_description(folder / DESCRIPTION), read_plan(folder / PLAN)
    fingerprint = Fingerprint.model_validate_json((folder / FINGERPRINT).read_bytes())
    settings: Any = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    facts, calibration = read_facts(folder), read_calibration(folder)
    sections: dict[str, Iterable[str]] = {
        "Intended use": _use(description, plan),
        "Data": _data(description, plan, fingerprint, facts),
        "Network and training": _training(description, plan, settings, weights_sha256(folder / WEIGHTS)),
        "Metrics": [*_metrics(description, facts), *_evaluated(_evaluations(folder))],
        "Confidence": _confidence(calibration),
        "Postprocessing": [f"- {_rules(description, folder)}"],
        "Limits": _limits(plan, fingerprint, facts),
    }
    fold = "all folds seen" if description.fold is None else f"fold {description.fold} held out"
    lines = [f"# {description.name}, {fold}", "", _NOTICE]
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *content]
    return "\n".join(lines) + "\n"


def read_facts(folder: Path) -> DataFacts | None:
    """Return what a model's folder knows of its data set; None of one from before there were cards.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / DATA
    if not path.exists():
        return None
    try:
        return DataFacts.model_validate(json.loads(path.read_bytes()))
    except (ValueError, ValidationError) as error:
        raise ModelError(f"{path}: is damaged: {str(error).partition(chr(10))[0]}; remove it") from error


def _use(description: ModelDescription, plan: Plan) -> Iterator[str]:
    """Yield what the model is for, and the command."""
    channels = ", ".join(f"{name} ({modality})" for name, modality in plan.channels.items())
    if description.task == "segment":
        structures = ", ".join(plan.structures)
        yield f"- Marks {structures} in 3D images of {channels}, for research on images like those below."
        yield "- `medseg segment IMAGE... --model MODEL --out FOLDER` writes a label map on each image's own grid:"
        yield "  " + ", ".join(f"{value} {name}" for name, value in plan.labels.items())
    else:
        yield f"- Takes noise away from images of {channels}; a training begins with it by `training.init_from`."
        yield "- It does not segment."
    yield "- Not for any decision about a patient, nor for images unlike those that it has learned from."


def _data(
    description: ModelDescription, plan: Plan, fingerprint: Fingerprint, facts: DataFacts | None
) -> Iterator[str]:
    """Yield what the model has learned from."""
    yield f"- data set: {description.manifest_name}, manifest {description.manifest_digest[:16]}"
    if facts is None:
        yield f"- description, licence, source, number of patients: {UNKNOWN}"
    else:
        for name in ("description", "source", "licence"):
            yield f"- {name}: {getattr(facts, name) or UNKNOWN}"
        yield f"- learned from {_counted(facts.training_cases, facts.training_patients)}"
        yield f"- validated on {_counted(facts.validation_cases, facts.validation_patients)}"
        if facts.incomplete_cases:
            yield f"- {facts.incomplete_cases} of the training cases lack a channel"
        if facts.partly_annotated_cases:
            yield f"- in {facts.partly_annotated_cases} of the training cases not every structure was looked for"
    yield f"- planned on {fingerprint.cases} cases: voxels of {_range(fingerprint.spacing_mm, 'mm')}"
    yield f"- fields of view of {_range(fingerprint.extent_mm, 'mm')}"
    yield f"- seen by the network in {plan.orientation} at {_by(plan.spacing_mm)} mm"
    yield ""
    yield "| channel | modality | within structures: 0.5 % to 99.5 %, mean | normalised by |"
    yield "|---|---|---|---|"
    for name, modality in plan.channels.items():
        channel, scheme = fingerprint.channels.get(name), plan.normalisation.get(name)
        shares = channel.percentiles if channel else {}
        extremes = f"{shares['0.5']:g} to {shares['99.5']:g}" if {"0.5", "99.5"} <= set(shares) else UNKNOWN
        mean = f"{channel.mean:.4g}" if channel else UNKNOWN
        yield f"| {name} | {modality} | {extremes}, {mean} | {scheme.scheme if scheme else UNKNOWN} |"
    yield ""
    yield "| structure | value | in cases | median volume, 1 % to 99 % (ml) |"
    yield "|---|---|---|---|"
    for name, value in list(plan.labels.items())[1:]:
        low, median, high = fingerprint.label_volume_ml.get(name, (0.0, 0.0, 0.0))
        cases = fingerprint.label_cases.get(name, 0)
        yield f"| {name} | {value} | {cases} | {median:.3g}, {low:.3g} to {high:.3g} |"


def _training(description: ModelDescription, plan: Plan, settings: Any, weights: str) -> Iterator[str]:
    """Yield what was trained, and how."""
    network = description.network
    options = ", ".join(f"{name} {value}" for name, value in network.options.items())
    yield f"- network: {network.name}{f' ({options})' if options else ''}, {network.spatial_dims}-D"
    yield f"- windows of {_by(plan.patch_size)} voxels"
    settings = settings if isinstance(settings, Mapping) else {}
    training = settings.get("training") or {}
    budget = [f"{amount} {unit}" for unit, amount in (training.get("budget") or {}).items() if amount is not None]
    yield f"- {description.step} optimiser steps{f', of a budget of {budget[0]}' if budget else ''}"
    yield f"- seed {settings.get('seed', UNKNOWN)}"
    if training.get("init_from"):
        yield "- began with another model's weights: its run's init_from.json says which"
    yield f"- trained in {description.precision}, {description.created}"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in description.versions.items())}"
    yield f"- weights: SHA-256 {weights}"
    yield f"- every setting: {CONFIG} and {PLAN} beside this card"


def _metrics(description: ModelDescription, facts: DataFacts | None) -> Iterator[str]:
    """Yield the validation scores, and what they are worth."""
    if not description.scores:
        yield "- No score is kept with this model; `medseg evaluate` gives scores with their intervals."
        return
    cases = f"{facts.validation_cases} validation cases" if facts else "the validation cases"
    yield "| score | mean |"
    yield "|---|---|"
    for name, value in description.scores.items():
        yield f"| {name} | {value:.4f} |"
    yield ""
    yield f"- Means over {cases} of fold {description.fold}, whole volumes on their native grids."
    yield "- The best of all validations during the training, on the cases that it was chosen by: a little too good."
    yield "- `medseg evaluate` gives other metrics and 95 % intervals; `--cases test`, of cases held out of it all."


def _evaluated(found: Sequence[Evaluated]) -> Iterator[str]:
    """Yield what evaluations found."""
    for one in found:
        yield ""
        yield f"By `medseg evaluate --cases {one.cases}`, on {one.number} cases:"
        yield ""
        yield "| structure | metric | mean | 95 % interval | cases |"
        yield "|---|---|---|---|---|"
        yield from (score.as_row() for score in one.scores)


def _confidence(calibration: Calibration | None) -> Iterator[str]:
    """Yield how far the model's probabilities can be trusted."""
    if calibration is None:
        yield "- Not calibrated: its probabilities are what the network says."
        return
    yield (
        f"- Temperature {calibration.temperature:.3g}, fitted on {calibration.cases} validation cases; expected "
        f"calibration error {calibration.after.ece:.4f} ({calibration.before.ece:.4f} without)."
    )
    predicted = [name for name, regression in calibration.labels.items() if regression is not None]
    if predicted:
        yield f"- `medseg segment` predicts the Dice of {', '.join(predicted)}, and marks what is doubtful."


def _rules(description: ModelDescription, folder: Path) -> str:
    """Return the rules that every label map goes through."""
    own, chosen = description.inference, read_postprocessing(folder)
    said = [f"largest component of {label}" for label in own.largest_component]
    said += [f"{label} in pieces of at least {ml:g} ml" for label, ml in own.smallest_volume_ml.items()]
    if chosen.has_rules:
        said.append(f"{chosen.as_text()}, chosen on {chosen.chosen_on or 'out-of-fold predictions'}")
    return "; ".join(said) or "none"


def _limits(plan: Plan, fingerprint: Fingerprint, facts: DataFacts | None) -> Iterator[str]:
    """Yield what the data did not hold."""
    modalities = ", ".join(dict.fromkeys(plan.channels.values()))
    yield f"- Has seen {modalities} ({', '.join(plan.channels)}) and no other modality or sequence."
    yield f"- Has seen no voxels outside {_range(fingerprint.spacing_mm, 'mm')}; `medseg segment` warns of such images."
    yield "- Ages, sexes, scanners, sites, diseases of its patients are not recorded: whom it serves worse is unknown."
    rare = [name for name, cases in fingerprint.label_cases.items() if cases < fingerprint.cases]
    always = [name for name in list(plan.labels)[1:] if name not in rare]
    if always:
        yield f"- {', '.join(always)} stood in every case: it may mark them where there is none."
    if rare:
        shares = (f"{name} in {fingerprint.label_cases[name]} of {fingerprint.cases}" for name in rare)
        yield f"- Not in every case: {', '.join(shares)}."
    if facts is not None and facts.training_patients < 100:
        yield f"- {facts.training_patients} patients are few: expect worse elsewhere than the scores above."
    yield f"- {_NOTICE}"


def _counted(cases: int, patients: int) -> str:
    """Return "160 cases of 158 patients"."""
    return f"{cases} cases of {patients} patients"


def _range(percentiles: Mapping[str, Sequence[float]], unit: str) -> str:
    """Return the smallest and largest of a fingerprint's percentiles, axis by axis."""
    low, high = percentiles.get("0"), percentiles.get("100")
    return f"{_by(low)} to {_by(high)} {unit}" if low and high else UNKNOWN


def _by(numbers: Iterable[float]) -> str:
    """Return 1x1x3.27."""
    return "x".join(f"{number:.4g}" for number in numbers)
