"""medseg reproduce: a run made anew from a real MLflow database or server alone."""

import json
import shutil
from pathlib import Path

import pytest
from phantom_experiments import changed, preprocessed
from test_tracking_server import port, server
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Config
from pipeline.errors import ManifestError, ModelError, StoreError
from pipeline.stages import preprocess, reproduce, train
from pipeline.stages.fold.record import RECOUNTS
from pipeline.tracking import metric_history, read_state, send_pending

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::mlflow")]

assert port  # a fixture

SETTINGS = (
    "preprocessing.patch_size=[16, 16, 16]",
    "network.options={width: 4, levels: 2}",
    "training.budget.steps=2",
    "training.steps_per_epoch=1",
    "training.batch_size=2",
    "training.validation_every_epochs=2",
    "training.deterministic=true",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return preprocessed(tmp_path_factory.mktemp("reproduce"), SETTINGS, cases=6, folds=3)


@pytest.fixture(scope="module")
def trained(prepared: Config) -> tuple[Path, str, str]:
    """A run folder, its run's id and its database; config and workspace are then of no use to anyone."""
    (folder,) = train.run(prepared, device="cpu")
    assert send_pending(folder)
    state = read_state(folder)
    assert state.run_id is not None
    return folder, state.run_id, state.uri


def test_a_deterministic_run_has_the_same_weights_from_the_database_alone(
    prepared: Config, trained: tuple[Path, str, str], tmp_path: Path
) -> None:
    _, run_id, uri = trained
    elsewhere = tmp_path / "set"
    shutil.copytree(prepared.data.manifest.parent / "set", elsewhere)
    command = ["reproduce", f"runs:/{run_id}", "--workspace", str(tmp_path / "anew"), "--root", str(elsewhere)]
    done = CliRunner().invoke(app, [*command, "--tracking-uri", uri, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "weights: the same, to the last bit" in done.output
    assert done.output.endswith("matches\n")
    (report,) = (tmp_path / "anew").rglob("reproduction.json")
    assert json.loads(report.read_text())["same_weights"] is True

    from mlflow import MlflowClient

    new = MlflowClient(tracking_uri=uri).get_run(str(read_state(report.parent).run_id))
    assert new.data.tags["medseg.reproduces"] == run_id
    assert new.data.tags["medseg.reproduction"] == "same weights"


def test_in_the_workspace_of_the_original_it_is_made_anew_too(trained: tuple[Path, str, str], tmp_path: Path) -> None:
    folder, run_id, _ = trained
    shutil.copytree(folder.parents[2], tmp_path / "work")
    report = reproduce.run(str(folder), tmp_path / "work", device="cpu")
    assert report.same_weights is True
    assert report.folder == tmp_path / "work" / "reproduced" / run_id / folder.relative_to(folder.parents[2])
    assert read_state(report.folder).run_id not in (None, run_id)


def test_another_manifest_and_other_images_are_refused(
    prepared: Config, trained: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder, run_id, uri = trained
    content = json.loads(prepared.data.manifest.read_text())
    content["root"] = str(prepared.data.manifest.parent / "set")
    content["cases"][0]["fold"] = (content["cases"][0]["fold"] + 1) % 3
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=f"is not the manifest that runs:/{run_id} was trained on"):
        reproduce.run(str(folder), tmp_path / "a", manifest=other, device="cpu")
    moved = tmp_path / "set"
    shutil.copytree(prepared.data.manifest.parent / "set", moved)
    labels = sorted(moved.glob("labelsTr/*.nii.gz"))
    drawn_on(labels[0])
    with pytest.raises(ManifestError, match="is not the file that the manifest was made from"):
        reproduce.run(run_id, tmp_path / "b", root=moved, uri=uri, device="cpu")
    with pytest.raises(ModelError, match="cannot be fetched"):
        reproduce.run("0" * 32, tmp_path / "c", uri=uri)


def test_another_initial_model_is_refused_before_anything_is_made(
    prepared: Config, trained: tuple[Path, str, str], tmp_path: Path
) -> None:
    shutil.copytree(trained[0] / "models" / "best", tmp_path / "first")
    config = changed(prepared.changed(name="begun"), "training", init_from=str(tmp_path / "first"))
    (folder,) = train.run(config, device="cpu")
    description = tmp_path / "first" / "model.yaml"
    description.write_text(description.read_text() + "# trained anew\n")
    with pytest.raises(ModelError, match=r"init_from: .*first: is not the model that runs:/.* began with \(SHA-256"):
        reproduce.run(str(folder), tmp_path / "anew", device="cpu")
    assert not list((tmp_path / "anew").rglob("models"))


def drawn_on(label: Path) -> None:
    """Change one voxel of a label."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(label))
    image[0, 0, 0] = 1
    sitk.WriteImage(image, str(label))


def without_digests(value: object) -> object:
    """Return a manifest's content as if it had been written by hand: no digest of any file."""
    if isinstance(value, dict):
        return {key: without_digests(item) for key, item in value.items() if key != "sha256"}
    return [without_digests(item) for item in value] if isinstance(value, list) else value


def test_images_that_changed_are_noticed_where_the_manifest_has_no_digests(prepared: Config, tmp_path: Path) -> None:
    shutil.copytree(prepared.data.manifest.parent / "set", tmp_path / "set")
    content = json.loads(prepared.data.manifest.read_text())
    (tmp_path / "plain.json").write_text(json.dumps(without_digests({**content, "root": "set"})))
    config = changed(
        prepared.changed(name="plain", workspace=tmp_path / "work"), "data", manifest=tmp_path / "plain.json"
    )
    preprocess.run(config)
    (folder,) = train.run(config, device="cpu")
    drawn_on(next((tmp_path / "set" / "labelsTr").glob("*.nii.gz")))
    with pytest.raises(StoreError, match="the images or labels of 1 of 6 cases are not those that"):
        reproduce.run(str(folder), tmp_path / "anew", device="cpu")


def test_other_metrics_are_told_with_what_may_explain_them(
    prepared: Config, trained: tuple[Path, str, str], tmp_path: Path
) -> None:
    uri = trained[2]
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    free = changed(prepared.changed(name="free"), "training", deterministic=False)
    (folder,) = train.run(free, device="cpu")
    assert send_pending(folder)
    told = str(read_state(folder).run_id)
    # As if the machine had made something else of it.
    client.set_tag(told, "medseg.weights_sha256.last", "0" * 64)
    client.set_tag(told, "version.torch", "1.0")
    client.log_metric(told, "val/score", 0.875, step=99)
    command = ["reproduce", told, "--workspace", str(tmp_path), "--tracking-uri", uri, "--device", "cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert "val/score: 0.875, now 0." in done.output
    assert "version.torch: 1.0 then" in done.output
    assert done.output.endswith("DIFFERS, as was to be expected\n")


def test_minutes_are_as_many_steps_again_at_the_same_learning_rates_and_a_server_is_as_good(
    prepared: Config, tmp_path: Path, port: int
) -> None:
    with server(tmp_path, port):
        uri = f"http://127.0.0.1:{port}"
        config = changed(prepared.changed(name="minutes"), "tracking", uri=uri, register_as="net", alias="champion")
        config = changed(config, "training", deterministic=False, budget={"minutes": 0.35})
        (folder,) = train.run(config, device="cpu")
        assert send_pending(folder)
        report = reproduce.run(str(folder), tmp_path / "anew", device="cpu")
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        steps = client.get_run(report.run_id).data.params["training.total_steps"]
        new = client.get_run(str(read_state(report.folder).run_id))
        assert new.data.params["training.total_steps"] == new.data.params["training.budget.steps"] == steps
        assert new.info.run_id != report.run_id
        assert len(client.search_model_versions("name='net'")) == 1
        assert report.compared >= 5
        # The clock has its say once: where the steps in all were counted anew, they are again.
        recounts = [json.loads((path / RECOUNTS).read_text()) for path in (folder, report.folder)]
        assert len(recounts[0]) > 1
        assert recounts[1] == [[step, total] for step, total in recounts[0] if step > 0]
        rates = [metric_history(path)["train/learning_rate"] for path in (folder, report.folder)]
        assert rates[0] == rates[1]
