"""The contract over every entry of the NETWORKS table, what each learns of a phantom, and the topology by hand."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from network_contract import CHECKS, Case
from network_variants import ALL, TASK, VARIANTS
from torch import Tensor

from pipeline.data.phantoms import make_phantom
from pipeline.geometry import Geometry
from pipeline.networks import NETWORKS, NetworkTask, build_network, check_options
from pipeline.networks.contract import Size, centre_crop
from pipeline.pyramid import topology
from pipeline.training.losses import Target, build_loss, truth_of


def test_every_network_stands_in_the_contract_test() -> None:
    assert set(VARIANTS) == set(NETWORKS)


@pytest.fixture(scope="module", params=ALL, ids=lambda variant: variant[0])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


def test_topology_of_the_hippocampus_is_nnunets() -> None:
    # nnU-Net 2.8.1 plans patch 40x56x40 at 1 mm with four levels, each halved.
    kernels, strides = topology((40, 56, 40), (1.0, 1.0, 1.0), None)
    assert kernels == ((3, 3, 3),) * 4
    assert strides == ((2, 2, 2),) * 3


def test_a_thick_axis_waits_until_the_others_are_as_coarse() -> None:
    # 1 x 1 x 4 mm: two halvings in plane bring the voxels to 4 mm; until then kernels are flat.
    kernels, strides = topology((64, 64, 16), (1.0, 1.0, 4.0), None)
    assert kernels[:3] == ((3, 3, 1), (3, 3, 3), (3, 3, 3))
    assert strides == ((2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1))


def test_a_long_axis_is_still_convolved_where_it_alone_is_halved() -> None:
    # 128 voxels are halved five times, 48 three times: at last they are 32 mm beside 8.
    kernels, strides = topology((128, 48, 48), (1.0, 1.0, 1.0), None)
    assert strides == ((2, 2, 2),) * 3 + ((2, 1, 1),) * 2
    assert kernels == ((3, 3, 3),) * 6
    # The first axis cannot be halved, so the last is halved while it is far longer.
    kernels, strides = topology((7, 64, 64), (1.0, 1.0, 4.0), 4)
    assert strides == ((1, 2, 1), (1, 2, 2), (1, 2, 2))
    assert kernels == ((3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3))


def test_more_levels_than_the_patch_holds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"holds 3 levels, got levels: 5"):
        topology((16, 16, 16), (1.0, 1.0, 1.0), 5)


def test_options_are_checked_against_the_builders_signature() -> None:
    assert check_options("unet", {"width": 8}) == []
    assert check_options("unett", {})[0][1].endswith("did you mean 'unet'?")
    (key, message), (other, second) = sorted(check_options("unet", {"widht": 8, "dropout": 2}))
    assert (key, other) == ("options.dropout", "options.widht")
    assert "less than 1" in message
    assert "got 2" in message
    assert "did you mean 'width'?" in second
    with pytest.raises(ValueError, match="did you mean 'width'"):
        build_network("unet", {"widht": 8}, TASK)


# Name, options, steps, and the least Dice on the phantom it learned: 0.9, but for the coarse FCNs, which blur what is
# smaller than their stride.
LEARNERS: list[tuple[str, dict[str, Any], int, float]] = [
    ("patch_classifier", {"widths": [8, 16], "hidden": [32]}, 120, 0.9),
    ("fcn", {"width": 12, "stride": 1, "stages": 3}, 200, 0.9),
    ("fcn", {"width": 8, "stride": 8}, 200, 0.6),
    ("fcn", {"width": 8, "stride": 32}, 200, 0.3),
    ("simple_fcn", {"width": 16}, 300, 0.9),
    ("unet", {"width": 8}, 100, 0.9),
    ("unet", {"width": 8, "padding": "valid", "norm": "batch", "levels": 3}, 60, 0.9),
    ("simple_unet", {"widths": [8, 16, 32]}, 100, 0.9),
    ("residual_encoder_unet", {"width": 8}, 100, 0.9),
    ("multiscale_pathways", {"size": "small"}, 60, 0.9),
    ("multiscale_unet", {"width": 8, "levels": 3}, 60, 0.9),
    ("dynunet", {"width": 8}, 100, 0.9),
    ("segresnet", {"width": 8}, 100, 0.9),
    ("attention_unet", {"width": 8}, 100, 0.9),
    ("basic_unet_plus_plus", {"width": 8}, 90, 0.9),
    ("mednext", {"width": 8, "blocks": [1, 1], "expansion": [2, 2]}, 100, 0.9),
    ("unetr", {"width": 8, "hidden": 48, "mlp": 96, "heads": 4}, 60, 0.9),
    ("swin_unetr", {"width": 12, "depths": [1, 1, 1, 1], "window": 4}, 60, 0.9),
]
SPACING_MM = 2.4
CROP = (24, 32, 24)


def phantom() -> tuple[Tensor, Tensor]:
    """Return a patient's normalised image (1, 1, X, Y, Z), and (1, X, Y, Z) where the paired structures lie: as bright
    as the midline, and told from it by where they are.
    """
    made = make_phantom(0, geometry=Geometry((28, 32, 28), np.diag([SPACING_MM] * 3 + [1.0])))
    values = torch.from_numpy(made.images["T1"].array)
    label = torch.from_numpy((made.label.array > 0).astype(np.int64))
    return ((values - values.mean()) / values.std())[None], label[None]


def around_the_centre(values: Tensor, size: Size) -> Tensor:
    """Return the central (..., *size) of (..., X, Y, Z), zeros beyond."""
    short = [max(0, want - have) for have, want in zip(values.shape[-3:], size, strict=True)]
    padding = [n for missing in reversed(short) for n in (missing // 2, missing - missing // 2)]
    return centre_crop(torch.nn.functional.pad(values, padding), size)


def trained(name: str, options: dict[str, Any], outputs: int, steps: int, image: Tensor, loss: Any) -> Tensor:
    """Return what a network makes of the phantom after some steps on it."""
    torch.manual_seed(0)
    network = build_network(name, options, NetworkTask(1, outputs, CROP, (SPACING_MM,) * 3))
    size = network.input_size(CROP)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimiser.zero_grad()
        loss(centre_crop(network(around_the_centre(image, size)), CROP)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimiser.step()
    with torch.no_grad():
        return centre_crop(network.eval()(around_the_centre(image, size)), CROP)


@pytest.mark.slow
def test_every_segmentation_network_has_something_to_learn() -> None:
    assert {name for name, *_ in LEARNERS} == set(NETWORKS) - {"autoencoder"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "steps", "floor"), LEARNERS, ids=lambda value: str(value)[:40])
def test_a_phantom_is_learned(name: str, options: dict[str, Any], steps: int, floor: float) -> None:
    image, label = phantom()
    target = centre_crop(label[:, None], CROP)[:, 0]
    loss, truth = build_loss("dice_ce", {}), truth_of(Target(target), 2)
    found = trained(name, options, 2, steps, image, lambda logits: loss(logits, truth)).argmax(dim=1)
    dice = 2 * (found * target).sum() / (found.sum() + target.sum())
    assert dice >= floor


@pytest.mark.slow
def test_the_autoencoder_learns_to_denoise() -> None:
    image, _ = phantom()
    noise = 0.5 * torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    clean = centre_crop(image, CROP)
    restored = trained(
        "autoencoder", {"width": 8}, 1, 150, image + noise, lambda found: (found - clean).square().mean()
    )
    assert (restored - clean).square().mean() < 0.5 * noise.square().mean()


def test_the_example_of_the_documentation_is_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "networks.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(source.splitlines()) <= 30
    module: dict[str, Any] = {"__name__": "hourglass"}
    exec(compile(source, "docs/networks.md", "exec"), module)
    (line,) = re.findall(r'The line: `"(\w+)": (\w+),`', page)
    monkeypatch.setitem(NETWORKS, line[0], module[line[1]])
    example = Case(line[0], {"width": 4})
    for check in CHECKS:
        check(example)
    assert check_options(line[0], {"widht": 4})[0][1].endswith("it has width")
