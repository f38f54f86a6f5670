"""`medseg describe` and `medseg networks`: what they say, where the plan comes from, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.config_loading import load_config
from pipeline.data.phantoms import write_phantom_dataset
from pipeline.errors import ConfigError
from pipeline.networks import NETWORKS, Network, NetworkTask
from pipeline.stages import describe, manifest, networks, preprocess

SAID = ["preprocessing.patch_size=[16, 24, 16]", "preprocessing.spacing_mm=[1, 1, 2]", "preprocessing.batch_size=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("described")
    source = write_phantom_dataset(path / "set", cases=4, layout="decathlon")
    manifest.run(source, path / "phantom.json", layout=None, folds=2, test_fraction=0.0, seed=0, force=False)
    return path


def config(folder: Path, *overrides: str) -> Config:
    path = folder / "tiny.yaml"
    path.write_text(
        "name: tiny\ndata: {manifest: phantom.json}\n"
        "network: {name: unet, options: {width: 4, levels: 2, norm: batch, convs: 1}}\n"
    )
    return load_config(path, [*overrides, f"workspace={folder / 'work'}"])


def test_all_is_said_in_text_and_json(folder: Path) -> None:
    explanation = describe.run(config(folder, *SAID))
    text = explanation.as_text()
    assert "unet (3-D)" in text
    assert "16x24x16 voxels of 1x1x2 mm, from the configuration's own patch and spacing" in text
    # By hand: 3^3, then 3^3 at a stride of 2, its transpose of 2^3, and 3^3 once more.
    assert "receptive field   7x7x7 voxels, 7x7x14 mm\n" in text
    assert "from 2x2x2 voxels in steps of 2x2x2" in text
    assert "for a batch of 3" in text
    figures = json.loads(json.dumps(explanation.as_json()))
    assert figures["network"] == "unet"
    assert figures["field_voxels"] == [[7, 7]] * 3
    assert figures["field_mm"] == [7.0, 7.0, 14.0]
    weights = 27 * 4 + 27 * 4 * 8 + (8 * 8 * 4 + 4) + 27 * 8 * 4 + (4 * 3 + 3)
    norms = 2 * (4 + 8 + 4)
    assert figures["parameters"] == weights + norms
    assert sum(layer["parameters"] for layer in figures["layers"]) == weights
    assert figures["scales"] == [[1, 1, 1], [2, 2, 2]]


def test_a_2d_network_is_described_by_its_planes(folder: Path) -> None:
    text = describe.run(config(folder, *SAID, "network.spatial_dims=2")).as_text()
    assert "unet (2-D, planes across axis 2)" in text
    assert "16x24x1 voxels" in text
    assert "receptive field   7x7x1 voxels, 7x7x2 mm" in text


def test_the_plan_of_the_store_goes_first(folder: Path) -> None:
    loaded = config(folder, "preprocessing.patch_size=[16, 16, 8]", "network.options.levels=2")
    with pytest.raises(ConfigError, match="run `medseg preprocess`, or say both"):
        describe.run(loaded)
    preprocess.run(loaded)
    explanation = describe.run(loaded)
    assert explanation.source.startswith("the plan phantom-")
    assert explanation.task.patch_size == (16, 16, 8)


def test_what_does_not_fit_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"network unet: a patch of \(16, 24, 16\) voxels .* levels: 6"):
        describe.run(config(folder, *SAID, "network.options.levels=6"))


def test_every_network_is_listed() -> None:
    entries = networks.run()
    assert [entry.name for entry in entries] == list(NETWORKS)
    assert all(entry.summary and not entry.summary.startswith("Build") for entry in entries)
    margins = {entry.name: entry.margin for entry in entries}
    assert margins["unet"] == 0
    assert margins["multiscale_pathways"] > 40
    text = networks.entries_text(entries)
    assert len(text.splitlines()) == 1 + len(NETWORKS)


def test_a_network_that_refuses_planes_is_listed_as_3d(monkeypatch: pytest.MonkeyPatch) -> None:
    def solid(task: NetworkTask) -> Network:
        if task.flat_axis is not None:
            raise ValueError("there is no 2-D form")
        return Network()

    monkeypatch.setitem(NETWORKS, "solid", solid)
    dims = {entry.name: entry.spatial_dims for entry in networks.run()}
    assert dims.pop("solid") == (3,)
    assert set(dims.values()) == {(2, 3)}


def test_the_options_of_one_are_listed_with_what_they_take() -> None:
    documentation, options = networks.options_of("unet")
    assert documentation.startswith("Build a U-Net")
    takes = {option.name: (option.type, option.default) for option in options}
    assert takes["width"] == ("integer at least 1 or null", "null")
    assert takes["levels"] == ("integer at least 2 or null", "null")
    assert takes["dropout"] == ("number at least 0, below 1", "0.0")
    assert takes["downsampling"] == ("max | average | strided", '"strided"')
    with pytest.raises(ConfigError, match="did you mean 'unet'"):
        networks.options_of("unte")


@pytest.mark.slow
def test_both_commands_answer(folder: Path) -> None:
    config(folder)
    settings = [part for setting in SAID for part in ("--set", setting)]
    described = command(folder, "describe", "tiny.yaml", *settings, "--json")
    assert json.loads(described)["parameters"] > 0
    assert json.loads(command(folder, "networks", "unet", "--json"))[0]["name"] == "width"


def command(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout
