"""Denoising: what the network sees and is asked for, what it learns, and that nobody takes it for a segmentation."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from phantom_experiments import changed, preprocessed_demo
from torch import Tensor

from pipeline.config import BudgetSection, Config
from pipeline.data.manifest import load_manifest, save_manifest
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.errors import ConfigError, ModelError
from pipeline.model import DESCRIPTION, read_description
from pipeline.predictor import Predictor
from pipeline.stages import evaluate, manifest, run, train
from pipeline.stages.denoising_task import DenoisingTask, DenoisingValidation
from pipeline.tracking import metric_history
from pipeline.training.sampling.cases import HeldCase
from pipeline.training.sampling.denoising import NoisyBatches, WithoutLabel, noisy_volume, psnr_db
from pipeline.training.sampling.patches import PatchSampler

SETTINGS = (
    "task=denoise",
    "preprocessing.patch_size=[16, 16, 16]",
    "preprocessing.batch_size=4",
    "network={name: autoencoder, options: {width: 8, levels: 2, norm: batch}}",
    "training.budget.steps=80",
    "training.steps_per_epoch=20",
    "training.learning_rate=2e-2",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An experiment on phantoms; the first of each fold has no label."""
    folder = tmp_path_factory.mktemp("denoise")
    path = folder / "mine.json"
    manifest.run(write_phantom_dataset(folder / "set", cases=4), path, folds=2)
    dataset = load_manifest(path)
    first = [next(case.id for case in dataset.cases if case.fold == fold) for fold in dataset.folds]
    cases = tuple(case.changed(label=None) if case.id in first else case for case in dataset.cases)
    save_manifest(dataset.changed(cases=cases), path)
    return preprocessed_demo(path, SETTINGS)


def task_of(config: Config) -> DenoisingTask:
    (task,) = train.fold_tasks(config, "0", "cpu")
    assert isinstance(task, DenoisingTask)
    return task


def noisy(patches: int = 4, **changes: object) -> NoisyBatches:
    """Batches of a clean image that counts its voxels."""

    def clean(step: int) -> tuple[Tensor, Tensor]:
        return torch.arange(8.0**3).view(1, 1, 8, 8, 8).repeat(patches, 1, 1, 1, 1), torch.zeros(0)

    settings: dict[str, object] = {"noise_std": (0.1, 0.5), "output_size": (8, 8, 8), "seed": 3, **changes}
    return NoisyBatches(clean, **settings)  # type: ignore[arg-type]


def test_the_target_is_the_clean_middle_and_the_noise_is_as_strong_as_asked() -> None:
    image, target = noisy(16, output_size=(4, 6, 8))(0)
    whole = torch.arange(8.0**3).view(8, 8, 8)
    assert torch.equal(target[0, 0], whole[2:6, 1:7])
    measured = (image - whole).flatten(1).std(1)
    assert (measured > 0.09).all()
    assert (measured < 0.55).all()
    assert measured.max() > 1.5 * measured.min()
    assert (image - whole).mean().abs() < 0.02


def test_noise_depends_on_a_patchs_number_alone() -> None:
    image, _ = noisy(4)(1)
    assert torch.equal(image, noisy(4)(1)[0])
    assert torch.equal(image[0:2], noisy(2)(2)[0])  # patches 4 and 5 in both
    assert not torch.equal(image[0], image[1])
    assert not torch.equal(image, noisy(4, seed=4)(1)[0])


def test_a_case_is_always_noisy_in_the_same_way() -> None:
    image = torch.ones(1, 20, 20, 20)
    once, again, other = (noisy_volume(image, 0.5, 0, case) for case in ("a", "a", "b"))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert once.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_channel_that_a_case_lacks_gets_no_noise() -> None:
    image = torch.stack([torch.zeros(8, 8, 8), torch.ones(8, 8, 8)])

    def clean(step: int) -> tuple[Tensor, Tensor]:
        return image.clone()[None], torch.zeros(0)

    (patch,), _ = NoisyBatches(clean, noise_std=(0.1, 0.5), output_size=(8, 8, 8), seed=3)(0)  # type: ignore[arg-type]
    for one in (patch, noisy_volume(image, 0.5, 0, "a")):
        assert torch.equal(one[0], image[0])
        assert one[1].std() > 0.05


def test_peak_signal_to_noise_by_hand() -> None:
    clean = torch.tensor([0.0, 10.0, 5.0, 5.0])
    assert psnr_db(clean + 1, clean) == pytest.approx(20)  # a peak of 10 over an error of 1
    assert psnr_db(clean + 0.1, clean) == pytest.approx(40, abs=1e-3)
    assert psnr_db(clean, clean) == math.inf


def test_a_case_without_label_gives_patches_and_a_label_draws_none() -> None:
    image = np.random.default_rng(0).normal(size=(1, 12, 12, 12)).astype(np.float16)
    corner = {1: np.array([[0, 0, 0]], np.int32)}
    cases = [HeldCase(image, None, {}), HeldCase(image, np.ones((12, 12, 12), np.uint8), corner)]
    with pytest.raises(ValueError, match="case '' has no label"):
        cases[0].read_label((0, 0, 0), (2, 2, 2))
    without = [WithoutLabel(case) for case in cases]
    patch = (4, 4, 4)
    sampler = PatchSampler(without, patch_size=patch, read_size=patch, foreground_fraction=1.0, seed=0)
    images, labels, _ = sampler.read(range(8))
    assert not labels.any()
    at_corner = torch.from_numpy(image[:, :4, :4, :4])
    assert sum(torch.equal(patch, at_corner) for patch in images) < 2


def test_cases_with_and_without_label_are_trained_on_and_validated(prepared: Config) -> None:
    (segmenting,) = train.fold_tasks(prepared.changed(task="segment"), "0", "cpu")
    task = task_of(prepared)
    for chosen, labelled, fold in (
        (task.training_cases, segmenting.training_cases, 1),
        (task.validation_cases, segmenting.validation_cases, 0),
    ):
        assert list(chosen) == [case for case in task.manifest.cases if case.fold == fold]
        assert {case.label is None for case in chosen} == {True, False}
        assert list(labelled) == [case for case in chosen if case.label]


def test_a_network_with_margin_is_asked_for_what_it_returns(prepared: Config) -> None:
    options = {"width": 2, "levels": 2, "padding": "valid"}
    task = task_of(changed(prepared, "network", options=options))
    network = task.new_state().network
    image, target = task.batches(network)(0)
    assert image.shape[2:] > target.shape[2:] == task.plan.patch_size
    assert network(image).shape == target.shape


def test_an_untrained_network_gains_nothing_and_one_that_returns_what_it_sees_gains_zero(prepared: Config) -> None:
    task = task_of(prepared)
    network = task.new_state().network
    scores = DenoisingValidation(task, network).scores(task.validation_cases)
    assert scores.keys() == {"psnr_db", "psnr_gain_db", "score"}
    assert scores["score"] == scores["psnr_gain_db"]
    assert network.training  # as it was

    class Same(type(network)):  # type: ignore[misc]
        def forward(self, image: Tensor) -> Tensor:
            return image

    network.__class__ = Same
    same = DenoisingValidation(task, network).scores(task.validation_cases)
    assert same["psnr_gain_db"] == pytest.approx(0, abs=1e-4)
    assert scores["psnr_db"] < same["psnr_db"]
    assert DenoisingValidation(task, network).scores([]) == {"psnr_db": 0.0, "psnr_gain_db": 0.0, "score": 0.0}


def test_a_constant_case_has_no_psnr_and_spoils_none(prepared: Config) -> None:
    task = task_of(prepared)
    validation = DenoisingValidation(task, task.new_state().network)
    constant, *others = task.validation_cases
    expected = validation.scores(others)
    sound, key = task.store.read(constant.id), task.store.key_of(constant.id)
    assert key is not None
    task.store.write(constant.id, replace(sound, image=np.zeros_like(sound.image)), key)
    try:
        assert validation.scores(task.validation_cases) == expected
        assert validation.scores([constant]) == {"psnr_db": 0.0, "psnr_gain_db": 0.0, "score": 0.0}
    finally:
        task.store.write(constant.id, sound, key)


def test_a_network_that_returns_no_numbers_is_an_error(prepared: Config) -> None:
    task = task_of(prepared)
    network = task.new_state().network
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    with pytest.raises(ModelError, match="infinite or not a number"):
        DenoisingValidation(task, network).scores(task.validation_cases)


@pytest.fixture(scope="module")
def learned(prepared: Config) -> Path:
    """The run folder of a network that has learned for 80 steps."""
    (folder,) = run.run(prepared.changed(name="learned")).folders.values()
    return folder


def test_it_learns(learned: Path) -> None:
    history = metric_history(learned)
    losses = [value for _, value in history["train/loss"]]
    assert losses[-1] < 0.6 * losses[0]
    assert history["val/psnr_gain_db"][-1][1] > 3  # less than half the noise's power is left
    assert list((learned / "pictures").glob("*.png"))


def test_its_model_says_what_it_is_and_does_not_segment(learned: Path) -> None:
    best = learned / "models" / "best"
    description = read_description(best / DESCRIPTION)
    assert (description.task, description.num_classes) == ("denoise", 1)
    for refused in (lambda: Predictor.load(best), lambda: evaluate.run(str(best))):
        with pytest.raises(ModelError, match=r"has learned to denoise, not to segment; .* training\.init_from"):
            refused()


def test_run_evaluates_nothing(prepared: Config, learned: Path) -> None:
    written = (learned / "models" / "last" / "model.yaml").stat().st_mtime_ns
    assert run.run(prepared.changed(name="learned")).folders == {0: learned}
    assert (learned / "models" / "last" / "model.yaml").stat().st_mtime_ns == written
    assert not (learned / "evaluation").exists()


def test_deep_supervision_is_refused(prepared: Config) -> None:
    with pytest.raises(ConfigError, match="there is none under task: denoise"):
        train.run(changed(prepared, "training", deep_supervision=True))


def test_no_noise_of_the_augmentations_is_part_of_the_target(prepared: Config) -> None:
    always = prepared.training.augmentation.changed(noise_probability=1.0)
    assert task_of(changed(prepared, "training", augmentation=always)).augmentation.noise_probability == 0


@pytest.mark.slow
def test_it_learns_well(prepared: Config) -> None:
    config = changed(prepared.changed(name="well"), "training", budget=BudgetSection(steps=600))
    (folder,) = train.run(config)
    assert metric_history(folder)["val/psnr_gain_db"][-1][1] > 9
