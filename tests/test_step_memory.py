"""What a step of training takes: counted by hand, and against steps that are really done."""

from math import prod
from pathlib import Path

import pytest
import torch
from test_planning import make_facts, make_manifest
from torch import Tensor, nn

from pipeline.config import Config, DataSection, NetworkSection, PreprocessingSection, TrainingSection
from pipeline.config_loading import PRESETS, load_config
from pipeline.data.manifest import ImageFile
from pipeline.data.plan import Plan
from pipeline.networks.footprint import LiveBytes, StepFootprint, step_footprint
from pipeline.preparation.planning import make_plan
from pipeline.stages.fold.step_size import blank_batch, step_of
from pipeline.stages.step_memory import GIB, dtype_of, memory_for, task_of

FACTS, MANIFEST, CPU = make_facts((1.0, 1.0, 1.0), (32, 32, 32)), make_manifest(), torch.device("cpu")


def config_of(network: str = "unet", batch: int = 2, memory: float | str = "auto", **training: object) -> Config:
    return Config(
        name="a",
        data=DataSection(manifest=Path("m.json")),
        preprocessing=PreprocessingSection(patch_size=(32, 32, 32), batch_size=batch, memory_gb=memory),  # type: ignore[arg-type]
        network=NetworkSection(name=network, options={"width": 4}),
        training=TrainingSection.model_validate({"ema_decay": None, **training}),
    )


def plan_of(config: Config) -> Plan:
    return make_plan(FACTS, MANIFEST, config.preprocessing)


def step(config: Config, dtype: torch.dtype = torch.float32) -> StepFootprint:
    return step_of(task_of(config, MANIFEST, FACTS, plan_of(config)), dtype)


class Scaled(nn.Module):
    """The mean of an image times a weight for each of its voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, 8, 8, 8, device="meta"))

    def forward(self, image: Tensor, target: None) -> Tensor:
        return (image * self.weight).mean()


def test_a_step_by_hand() -> None:
    image = torch.empty(1, 1, 8, 8, 8, device="meta")
    found = step_footprint(Scaled(), (image, None), copies=3)
    # Weights and three copies of them; the image, its product and two tensors of gradients besides a few scalars.
    assert found.kept_bytes == 4 * 2048
    assert 3 * 2048 <= found.passes_bytes <= 4 * 2048 + 64
    assert found.peak_bytes == found.kept_bytes + found.passes_bytes


@pytest.mark.parametrize(
    ("network", "dtype", "off"),
    [
        ("unet", torch.float32, 1e-3),
        ("unet", torch.bfloat16, 1e-3),
        ("residual_encoder_unet", torch.float32, 1e-3),
        # On a CPU, unlike a GPU, autocast takes means in float32.
        ("residual_encoder_unet", torch.bfloat16, 0.15),
    ],
)
def test_a_step_without_values_takes_what_a_real_one_takes(network: str, dtype: torch.dtype, off: float) -> None:
    config = config_of(network)
    task = task_of(config, MANIFEST, FACTS, plan_of(config), CPU)
    torch.manual_seed(0)
    state = task.new_state()
    image, target = blank_batch(task, state.network)
    mode = LiveBytes(image, [*state.objective.parameters(), *state.objective.buffers()])
    with mode, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        state.objective(image, target).backward()
    assert step(config, dtype).passes_bytes == pytest.approx(mode.peak_bytes, rel=off)


def test_what_makes_a_step_larger() -> None:
    plain = step(config_of())
    assert step(config_of(batch=4)).passes_bytes == pytest.approx(2 * plain.passes_bytes, rel=0.05)
    assert step(config_of(), torch.bfloat16).passes_bytes < 0.65 * plain.passes_bytes
    assert step(config_of(activation_checkpointing=True)).passes_bytes < 0.8 * plain.passes_bytes
    weights = step(config_of(optimiser="sgd")).kept_bytes - (plain.kept_bytes - plain.kept_bytes // 3)
    assert abs(weights) < 64  # weights and one moment, where AdamW has two
    assert step(config_of(ema_decay=0.9)).kept_bytes == pytest.approx(plain.kept_bytes * 4 / 3, rel=0.01)
    # Whatever the loss, it is counted as one; some cannot be computed without values.
    assert step(config_of(loss="cross_entropy")).peak_bytes == plain.peak_bytes


def test_a_denoising_step_has_images_for_targets() -> None:
    config = config_of("autoencoder").changed(task="denoise")
    assert step(config).passes_bytes > 0


def test_memory_is_that_of_the_gpu_that_is_said() -> None:
    said = memory_for(config_of(memory=24), MANIFEST, FACTS, "cpu")
    assert said.is_gpu
    assert 0.7 * 24 * GIB < said.usable_bytes < 0.9 * 24 * GIB
    assert said.name == "a GPU of 24 GB"
    assert dtype_of(config_of(memory=24), CPU) == torch.bfloat16
    assert dtype_of(config_of(memory=24, precision="fp32"), CPU) == torch.float32
    here = memory_for(config_of(), MANIFEST, FACTS, "cpu")
    assert not here.is_gpu
    assert here.usable_bytes > 0


def test_a_network_that_does_not_fit_takes_nothing() -> None:
    config = config_of()
    config = config.changed(network=config.network.changed(options={"levels": 9}))
    assert memory_for(config, MANIFEST, FACTS, "cpu").step_bytes(plan_of(config)) is None
    known = memory_for(config_of(memory=8, precision="fp32"), MANIFEST, FACTS, "cpu")
    assert known.step_bytes(plan_of(config)) == step(config_of()).peak_bytes


def test_partly_annotated_cases_take_more() -> None:
    config = config_of()
    known = {"label": ImageFile(path="label.nii.gz"), "annotated_classes": ("organ",)}
    cases = tuple(case.changed(**known) for case in MANIFEST.cases)
    partly = step_of(task_of(config, MANIFEST.changed(cases=cases), FACTS, plan_of(config)), torch.float32)
    assert partly.peak_bytes > step(config).peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_plans_a_larger_step_for_a_larger_gpu(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"extends: preset:{preset}\nname: a\ndata: {{manifest: m.json}}\n")
    facts, voxels = make_facts((0.8, 0.8, 0.8), (512, 512, 600)).changed(cases=300), []
    for gigabytes in (8, 24, 80):
        config = load_config(path, [f"preprocessing.memory_gb={gigabytes}"])
        memory = memory_for(config, MANIFEST, facts)
        plan = make_plan(facts, MANIFEST, config.preprocessing, memory)
        needed = memory.step_bytes(plan)
        assert needed is not None and memory.usable_bytes / 2 < needed <= memory.usable_bytes < gigabytes * GIB
        assert plan.batch_size >= 2
        voxels.append(plan.batch_size * prod(plan.patch_size))
    assert voxels == sorted(set(voxels))
