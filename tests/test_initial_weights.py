"""`training.init_from` a MONAI bundle or a state dict: what is read, how names are lined up, what is refused."""

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from phantom_experiments import changed, preprocessed
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.errors import ConfigError, ModelError
from pipeline.networks import build_network
from pipeline.networks.contract import NetworkTask
from pipeline.stages import train
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.initial_weights import aligned, initial_digest, read_initial
from pipeline.stages.initialisation import Initialisation, initialise
from pipeline.training.state import TrainState

SETTINGS = (
    "preprocessing.patch_size=[16, 16, 16]",
    "network={name: segresnet, options: {width: 8, blocks_down: [1, 1], blocks_up: [1]}}",
    "training.budget.steps=1",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An experiment on preprocessed phantoms, with a network that MONAI knows."""
    return preprocessed(tmp_path_factory.mktemp("weights"), SETTINGS, cases=4, folds=2)


def begun(config: Config, path: Path, **training: object) -> tuple[TrainState, Initialisation]:
    (task,) = train.fold_tasks(changed(config, "training", init_from=str(path), **training), "0", "cpu")
    state = task.new_state()
    report = initialise(task, state)
    assert report is not None
    return state, report


def fold_of(config: Config) -> FoldTask:
    (task,) = train.fold_tasks(config, "0", "cpu")
    return task


def segresnet(channels: int = 1, classes: int = 3) -> dict[str, Tensor]:
    """Return the state dict of MONAI's own SegResNet, as its own class names it."""
    from monai.networks.nets.segresnet import SegResNet

    torch.manual_seed(5)
    network = SegResNet(3, 8, in_channels=channels, out_channels=classes, blocks_down=(1, 1), blocks_up=(1,))
    return {name: torch.rand_like(tensor) for name, tensor in network.state_dict().items()}


def write_bundle(folder: Path, state: Mapping[str, Tensor], **metadata: object) -> Path:
    (folder / "models").mkdir(parents=True)
    (folder / "configs").mkdir()
    torch.save(dict(state), folder / "models" / "model.pt")
    (folder / "configs" / "metadata.json").write_text(json.dumps({"name": "theirs", **metadata}))
    return folder


def data_format(channels: list[str], classes: list[str]) -> dict[str, object]:
    return {
        "inputs": {"image": {"channel_def": {str(n): name for n, name in enumerate(channels)}}},
        "outputs": {"pred": {"channel_def": {str(n): name for n, name in enumerate(classes)}}},
    }


def test_a_state_dict_of_monais_class_fits_the_same_network_here(prepared: Config, tmp_path: Path) -> None:
    source = segresnet()
    save_file(source, tmp_path / "theirs.safetensors")
    state, report = begun(prepared, tmp_path / "theirs.safetensors")
    here = state.network.state_dict()
    assert (report.kind, report.name, report.task) == ("state dict", "theirs", None)
    assert report.prefixes == ("", "network.")
    assert set(report.copied) == {f"network.{name}" for name in source}
    assert all(torch.equal(here[f"network.{name}"], tensor) for name, tensor in source.items())
    lines = report.as_lines()
    assert lines[0].startswith(f"{len(source)} of {len(source)} tensors compared fit")
    assert "* there is network.* here" in lines
    assert any("its classes are not named" in line for line in lines)
    assert any("their scores are worth nothing" in line for line in lines)


def test_a_wrapped_checkpoint_is_unwrapped(prepared: Config, tmp_path: Path) -> None:
    source = segresnet()
    wrapped = {"epoch": 3, "state_dict": {f"module.net.{name}": tensor for name, tensor in source.items()}}
    torch.save(wrapped, tmp_path / "checkpoint.pt")
    _, report = begun(prepared, tmp_path / "checkpoint.pt")
    assert report.prefixes == ("module.net.", "network.")
    assert len(report.copied) == len(source)


def test_a_bundles_classes_and_channels_are_taken_by_name(prepared: Config, tmp_path: Path) -> None:
    (channel,) = fold_of(prepared).plan.channels
    assert list(fold_of(prepared).plan.labels) == ["background", "left", "right"]
    source = segresnet(channels=2, classes=4)
    named = data_format(["CT", channel], ["background", "spleen", "right", "left"])
    bundle = write_bundle(tmp_path / "theirs", source, network_data_format=named)
    state, report = begun(prepared, bundle)
    here = state.network.state_dict()
    assert (report.kind, report.name) == ("bundle", "theirs")
    assert set(report.in_part) == {
        *("network.convInit.conv.weight", "network.conv_final.2.conv.weight", "network.conv_final.2.conv.bias"),
    }
    assert torch.equal(here["network.convInit.conv.weight"][:, 0], source["convInit.conv.weight"][:, 1])
    head = here["network.conv_final.2.conv.weight"]
    assert torch.equal(head, source["conv_final.2.conv.weight"][[0, 3, 2]])
    assert (report.classes, report.new_classes) == (("background", "left", "right"), ())
    assert report.sha256 == initial_digest(bundle)


def test_other_counts_without_names_stay_random(prepared: Config, tmp_path: Path) -> None:
    save_file(segresnet(channels=2, classes=5), tmp_path / "theirs.safetensors")
    _, report = begun(prepared, tmp_path / "theirs.safetensors")
    assert report.other_shape["network.convInit.conv.weight"] == ((8, 2, 3, 3, 3), (8, 1, 3, 3, 3))
    assert report.other_shape["network.conv_final.2.conv.bias"] == ((5,), (3,))
    assert not report.in_part


def test_the_encoder_alone_is_taken_where_that_is_asked_for(prepared: Config, tmp_path: Path) -> None:
    options = {"width": 4, "levels": 2, "norm": "batch"}
    unet = changed(prepared, "network", name="unet", options=options)
    task = NetworkTask(1, 3, patch_size=(16, 16, 16), spacing_mm=(2.0, 2.0, 2.0))
    network = build_network("unet", options, task)
    torch.save(network.state_dict(), tmp_path / "mine.pt")
    everything = begun(unet, tmp_path / "mine.pt")[1]
    encoder = begun(unet, tmp_path / "mine.pt", init_parts="encoder")[1]
    assert any(name.startswith("heads.") for name in everything.copied)
    assert encoder.copied == tuple(name for name in everything.copied if name.startswith("encoder."))
    assert encoder.classes == ()
    with pytest.raises(ConfigError, match="network segresnet has no encoder that is told apart"):
        begun(prepared, tmp_path / "mine.pt", init_parts="encoder")


def test_a_bundle_of_a_medseg_model_that_saw_the_cases_held_out_is_refused(prepared: Config, tmp_path: Path) -> None:
    name = fold_of(prepared).manifest.name
    seen = write_bundle(tmp_path / "seen", segresnet(), medseg={"manifest": name, "fold": 1})
    unseen = write_bundle(tmp_path / "unseen", segresnet(), medseg={"manifest": name, "fold": 0})
    with pytest.raises(ConfigError, match="has seen the validation cases of fold 0"):
        begun(prepared, seen)
    begun(prepared, unseen)


def test_what_would_have_to_be_run_or_holds_no_weights_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Conv3d(1, 1, 1), tmp_path / "module.pt")
    with pytest.raises(ModelError, match=r"module\.pt: is no state dict that can be read as tensors alone"):
        read_initial(tmp_path / "module.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ModelError, match="holds no state dict, neither at its top nor under state_dict"):
        read_initial(tmp_path / "empty.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ModelError, match=r"broken\.safetensors: is no state dict"):
        read_initial(tmp_path / "broken.safetensors")
    bundle = write_bundle(tmp_path / "bundle", {})
    (bundle / "models" / "model.pt").rename(bundle / "models" / "model.ts")
    with pytest.raises(ModelError, match=r"a bundle without models/model\.safetensors or models/model\.pt"):
        initial_digest(bundle)


def test_a_tensor_of_several_names_is_found_under_each(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
    tied["b"] = tied["a"]
    save_model(tied, str(tmp_path / "tied.safetensors"))
    tensors = read_initial(tmp_path / "tied.safetensors").tensors
    assert set(tensors) == {"a.weight", "b.weight"}
    assert torch.equal(tensors["a.weight"], tensors["b.weight"])


def test_names_are_lined_up_by_what_fits_and_left_alone_otherwise() -> None:
    small, large = torch.zeros(2), torch.zeros(3, 3)
    here = {"network.swin.a": small, "network.swin.b": large, "head": small}
    renamed, prefixes = aligned({"module.a": small, "module.b": large, "module.c": small}, here)
    assert prefixes == ("module.", "network.swin.")
    assert set(renamed) == {"network.swin.a", "network.swin.b", "network.swin.c"}
    assert aligned({"x": small}, {"y": small}) == ({"x": small}, ("", ""))


@pytest.mark.slow
def test_a_training_begins_with_a_bundle_that_monai_made(
    peer_python: Callable[[str], Path], prepared: Config, tmp_path: Path
) -> None:
    made = """
import torch
from monai.bundle import init_bundle
from monai.networks.nets import SegResNet
torch.manual_seed(3)
network = SegResNet(3, 8, in_channels=1, out_channels=3, blocks_down=(1, 1), blocks_up=(1,))
init_bundle("theirs", network=network)
"""
    subprocess.run([str(peer_python("nnunet")), "-c", made], cwd=tmp_path, check=True, capture_output=True)
    config = changed(prepared.changed(name="begun"), "training", init_from=str(tmp_path / "theirs"))
    (run,) = train.run(config)
    report = Initialisation.model_validate_json((run / "init_from.json").read_bytes())
    assert report.kind == "bundle"
    assert not report.not_there
    assert len(report.copied) + len(report.in_part) + len(report.other_shape) > 20
    assert report.parameters > 10_000
