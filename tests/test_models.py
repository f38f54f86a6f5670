"""Which folders the names of models mean."""

from pathlib import Path

import pytest
from tiny_models import make_model

from pipeline.errors import ModelError
from pipeline.model import save_model
from pipeline.stages.models import resolve_models


def test_models_are_found_by_experiment_or_one_by_one_none_of_them_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = tmp_path / "work"
    experiment = workspace / "runs" / "demo"
    best = [experiment / f"fold_{fold}" / "models" / "best" for fold in (0, 1)]
    for folder in (*best, best[0].with_name("last")):
        save_model(folder, make_model())
    yaml = tmp_path / "demo.yaml"
    yaml.write_text(f"name: demo\nworkspace: {workspace}\ndata: {{manifest: {tmp_path / 'none.json'}}}\n")
    for names in ([experiment], [yaml], [best[0], best[1].parents[1]], [best[0], experiment, best[1]]):
        assert resolve_models([str(name) for name in names], workspace) == best
    assert f"{experiment}: fold_1: not trained to the end" in caplog.text
    yaml.write_text(yaml.read_text().replace("name: demo", "name: untrained"))
    with pytest.raises(ModelError, match=r"untrained: no fold is trained yet; run `medseg train` first"):
        resolve_models([str(yaml)], workspace)
