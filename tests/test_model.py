"""A model's folder: what is written comes back; what is damaged is refused by name."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_model, make_plan

from pipeline.config import NetworkSection
from pipeline.errors import ModelError
from pipeline.model import FILES, load_model, model_digest, save_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "best", make_model())
    return tmp_path / "best"


def test_model_comes_back_as_it_was(folder: Path) -> None:
    saved, loaded = make_model(), load_model(folder, CPU)
    assert loaded.description == saved.description
    assert loaded.plan == saved.plan
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.config_text == saved.config_text
    assert not loaded.network.training
    image = torch.randn(1, 1, 16, 16, 8)
    with torch.inference_mode():
        assert torch.equal(loaded.network(image), saved.network.eval()(image))


def test_a_model_of_regions_has_an_output_for_each_label_but_the_background(tmp_path: Path) -> None:
    save_model(tmp_path / "best", make_model(output="regions"))
    loaded = load_model(tmp_path / "best", CPU)
    assert (loaded.description.output, loaded.description.num_classes) == ("regions", 2)
    assert loaded.network(torch.zeros(1, 1, 16, 16, 8)).shape[1] == 2


def test_a_model_that_does_not_say_is_one_of_softmax(folder: Path) -> None:
    _replace("output: softmax\n", "")(folder / "model.yaml")
    assert load_model(folder, CPU).description.output == "softmax"


def test_a_model_whose_levels_were_others_is_refused(tmp_path: Path) -> None:
    save_model(
        tmp_path / "best", make_model(plan=make_plan(patch_size=(36, 16, 8)), network=NetworkSection(name="dynunet"))
    )
    with pytest.raises(ModelError, match=r"patch_size: \(36, 16, 8\), of which dynunet makes \(40, 16, 8\)"):
        load_model(tmp_path / "best", CPU)


def test_folder_holds_nothing_else_and_no_pickle(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["best"]
    assert "# the median: over 8 cases\nspacing_mm:" in (folder / "plan.yaml").read_text()


def test_failed_write_leaves_the_older_model(folder: Path) -> None:
    before = model_digest(folder)
    broken = make_model(1)
    broken.plan = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        save_model(folder, broken)
    assert model_digest(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_reader_always_finds_a_whole_model_while_it_is_replaced(folder: Path) -> None:
    first, second = make_model(0), make_model(1)
    found: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            found.append("there" if (folder / FILES[0]).exists() else "missing")

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for step in range(20):
            save_model(folder, second if step % 2 == 0 else first)
    finally:
        stop.set()
        watcher.join()
    assert set(found) == {"there"}


def test_digest_is_that_of_weights_and_plan(folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "same", make_model())
    save_model(tmp_path / "other", make_model(1))
    assert model_digest(tmp_path / "same") == model_digest(folder)
    assert model_digest(tmp_path / "other") != model_digest(folder)


def _replace(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        *((name, Path.unlink, name) for name in FILES),
        ("weights.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100]), "weights.safetensors"),
        ("weights.safetensors", lambda path: save_file({"x": torch.zeros(1)}, path), "weights.safetensors"),
        ("model.yaml", lambda path: path.write_text("a: [1"), "model.yaml: is damaged"),
        ("model.yaml", lambda path: path.write_bytes(b"\xff\xfe\x00"), "model.yaml: is damaged"),
        ("model.yaml", lambda path: path.write_text("- 1"), "format version None"),
        ("model.yaml", _replace("format_version: 1", "format_version: 0"), "version 0.*train it anew"),
        ("model.yaml", _replace("format_version: 1", "format_version: 9"), "version 9.*update medseg"),
        (
            "model.yaml",
            _replace("step: 300", "stepp: 300"),
            "model.yaml.* step: Field required; stepp: Extra",
        ),
        ("model.yaml", _replace("name: unet", "name: unett"), "model.yaml: network: "),
        ("model.yaml", _replace("num_classes: 3", "num_classes: 4"), "not of one model"),
        ("plan.yaml", _replace("orientation: RAS", ""), "plan.yaml: orientation: is missing"),
        ("plan.yaml", _replace("format_version: 1", "format_version: 2"), "plan.yaml: format version 2.*update medseg"),
        ("fingerprint.json", lambda path: path.write_text("{"), "fingerprint.json: is damaged"),
    ],
)
def test_damage_is_named(folder: Path, name: str, damage: Callable[[Path], object], expected: str) -> None:
    damage(folder / name)
    with pytest.raises(ModelError, match=expected):
        load_model(folder, CPU)
