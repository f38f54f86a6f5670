"""The package's floors: who imports whom, read from the source with `ast`, and which library is imported where."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pipeline"

FLOORS = {
    0: (
        *("errors", "records", "geometry", "options", "progress", "pyramid"),
        *("config", "config_yaml", "config_schema", "config_loading"),
    ),
    1: ("volumes",),
    2: ("data",),
    3: ("networks", "tracking", "hardware", "free_memory", "pictures", "downloads"),
    4: ("preparation", "training", "inference", "confidence", "evaluation", "viewer", "model"),
    5: ("predictor",),
    6: ("stages",),
    7: ("cli", "__main__"),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
# The base and the command line are files of one folder, the package's own: they may import one another.
ONE_ROOM = (0, 7)

# Library -> the only modules, or folders of modules, that may import it.
KEEPERS = {
    "mlflow": ("pipeline.tracking",),
    "SimpleITK": ("pipeline.volumes",),
    "nibabel": ("pipeline.volumes",),
    "blosc2": ("pipeline.data",),
    "monai": (
        *("pipeline.networks.monai_networks", "pipeline.training.losses.centreline", "pipeline.evaluation.metrics"),
        "pipeline.downloads.decathlon",
        "pipeline.stages.exporting.bundle_scripts",  # which run in MONAI's environment
    ),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), ("pipeline.stages.exporting.onnx_file",)),
    "optuna": ("pipeline.stages.sweeping.search", "pipeline.stages.sweeping.pruning"),
    "typer": ("pipeline.cli",),
    "pydicom": ("pipeline.volumes.dicom",),
    "highdicom": ("pipeline.volumes.dicom.annotations.seg.writing",),
    "contourpy": ("pipeline.volumes.dicom.annotations.rtstruct.tracing",),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "python_multipart"), ("pipeline.stages.serving.web",)),
    "ray": ("pipeline.stages.cluster.ray_cluster",),
}
# Libraries that cost a second or are missing on a bare node: imported inside the functions that need them.
LAZY = ("SimpleITK", "monai", "pydicom", "highdicom", "contourpy", "onnx", "onnxscript", "onnxruntime", "ray")


def modules() -> Iterator[tuple[str, Path]]:
    """Yield each module's name and file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names that are imported anywhere below a node; of `from a import b` it is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return each import of a module that goes up, sideways, or to a library kept elsewhere."""
    tree = ast.parse(source)
    own = module.split(".")[1] if "." in module else None
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for name in imports(tree, package):
        first, *rest = name.split(".")
        if first == "pipeline" and rest and rest[0] in FLOOR_OF and not _may_import(own, rest[0]):
            found.append(f"{module} imports {name}: up or sideways")
        if first in KEEPERS and not any(module == k or module.startswith(f"{k}.") for k in KEEPERS[first]):
            found.append(f"{module} imports {first}, which only {', '.join(KEEPERS[first])} may")
    at_top = (node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef))
    names = [name for node in at_top for name in imports(node, package)]
    found += [f"{module} imports {name} at its top" for name in names if name.split(".")[0] in LAZY]
    return found


def _may_import(own: str | None, other: str) -> bool:
    if own is None:  # pipeline/__init__.py stands under all of them
        return False
    floor, below = FLOOR_OF[own], FLOOR_OF[other]
    return own == other or below < floor or (below == floor and floor in ONE_ROOM)


def test_every_module_keeps_to_its_floor() -> None:
    assert [v for name, path in modules() for v in violations(name, path.read_text(), path.name == "__init__.py")] == []


def test_every_module_has_a_floor() -> None:
    rooms = {name.split(".")[1] for name, _ in modules() if "." in name}
    assert len(rooms) > 10
    assert rooms <= set(FLOOR_OF)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pipeline.volumes.volume", "from pipeline.training.loop import train"),
        ("pipeline.volumes.volume", "from pipeline import predictor"),
        ("pipeline.volumes.volume", "import pipeline.stages.check"),
        ("pipeline.volumes.volume", "from ..inference import windows"),
        ("pipeline.geometry", "def f():\n    from pipeline.volumes.volume import Volume"),
        ("pipeline.training.loop", "from pipeline.inference.windows.streaming import stream_logits"),
        ("pipeline.networks.unet", "if TYPE_CHECKING:\n    from pipeline.tracking import RunLog"),
        ("pipeline.stages.train", "from pipeline.cli import app"),
        ("pipeline.stages.train", "def f():\n    import mlflow.tracking"),
        ("pipeline.training.losses", "def f():\n    from monai.losses import DiceLoss"),
        ("pipeline.volumes.volume", "import SimpleITK as sitk"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pipeline.stages.train", "from pipeline.stages import check\nfrom pipeline.predictor import Predictor"),
        ("pipeline.training.loop", "from .losses import LOSSES\nfrom ..data.store import CaseStore"),
        ("pipeline.config", "from pipeline.records import Record"),
        ("pipeline.model", "from pipeline import __version__"),
        ("pipeline.volumes.volume", "def f():\n    import SimpleITK as sitk"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    assert violations(module, source) == []


def loaded(modules: str, libraries: list[str]) -> list[str]:
    """Return which libraries a fresh interpreter has loaded after importing modules."""
    code = f"import sys, {modules}; print(*(m for m in sys.argv[1:] if m in sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code, *libraries], capture_output=True, text=True, check=True)
    return answer.stdout.split()


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    heavy = ["torch", "monai", "mlflow", "SimpleITK", "scipy", "nibabel", "matplotlib"]
    assert loaded("pipeline.cli, pipeline.config_loading, pipeline.geometry", heavy) == []


def test_training_and_prediction_start_where_mlflow_simpleitk_and_monai_are_missing() -> None:
    assert loaded("pipeline.stages.train, pipeline.predictor", ["torch"]) == ["torch"]
    assert loaded("pipeline.stages.train, pipeline.predictor", ["mlflow", "SimpleITK", "monai"]) == []
