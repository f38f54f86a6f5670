"""What is shipped: version, pins, the wheel's content, and the two commands' set-up."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import pipeline

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return {canonical(re.split(r"[<>=~!\[ ;]", line)[0]) for line in wanted}


def test_every_requirement_is_pinned_to_one_version() -> None:
    pinned = {canonical(name) for name in pins("constraints.txt")}
    assert required() - pinned == {"torch"}


def test_who_develops_has_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    development = set(extras.pop("dev"))
    assert {line for lines in extras.values() for line in lines} - development == set()


def test_torch_is_pinned_apart_without_a_build_tag() -> None:
    assert list(pins("constraints-torch.txt")) == ["torch"]
    assert re.fullmatch(r"[\d.]+", pins("constraints-torch.txt")["torch"])


def test_pins_name_no_file_and_no_host() -> None:
    for name in ("constraints.txt", "constraints-torch.txt"):
        assert all(re.fullmatch(r"[\w.-]+", key) and re.fullmatch(r"[\w.]+", v) for key, v in pins(name).items())


def test_the_version_is_in_the_changelog() -> None:
    assert pipeline.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_pre_commit_runs_what_make_lint_runs() -> None:
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for command in re.findall(r"\$\(BIN\)/(\S+(?: check| format)?)", lint.group(1)):
        assert f".venv/bin/{command}" in hooks


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_configurations(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("medseg-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline").rglob("*.py")}
    shipped = {
        f"pipeline/{path.relative_to(ROOT).as_posix()}"
        for folder in ("configs", "data_manifests")
        for path in (ROOT / folder).glob("*.*")
    }
    assert sources <= names
    assert shipped <= names
    assert "pipeline/configs/demo.yaml" in names
    # What pages are made of, and NiiVue where it is installed, though git does not know it.
    parts = ("*.j2", "viewer/*.css", "viewer/*.js", "viewer/assets/*")
    made_of = {path.relative_to(ROOT).as_posix() for part in parts for path in (ROOT / "pipeline").rglob(part)}
    assert "pipeline/viewer/assets/LICENSE" in made_of
    assert made_of <= names
    assert not [
        name for name in names if name.startswith(("tests/", "benchmarks/")) or name.endswith((".nii.gz", ".pt"))
    ]
