"""The command line: help and errors answer at once, a user's error has no traceback, a bug keeps its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli import aids, datasets, loading

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("torch", "monai", "mlflow", "SimpleITK", "nibabel", "scipy", "matplotlib")

# Runs the command line, then says on its last line which of the heavy libraries it has imported, and its exit code.
PROBE = f"""
import sys
from pipeline.cli import main
try:
    main()
    code = 0
except SystemExit as end:
    code = end.code or 0
print("LOADED", code, *(name for name in {HEAVY} if name in sys.modules))
"""
BUG = """
from pipeline.cli import app, main
@app.command()
def broken() -> None:
    secret = "patient"
    raise KeyError("a bug")
main()
"""


def medseg(*arguments: str, script: str = "from pipeline.cli import main; main()") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)


def commands() -> list[str]:
    every = [*cli.app.registered_commands, *aids.aids.registered_commands, *datasets.datasets.registered_commands]
    return [command.name or command.callback.__name__ for command in every if command.callback]


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.yaml"
    path.write_text("name: a\ndata: {manifest: m.json}\ntraining:\n  learning_rat: 1\n  weight_decay: abc\n")
    return path


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    done = medseg("--help", script=PROBE)
    *text, last = done.stdout.splitlines()
    assert last == "LOADED 0"
    listed = " ".join(text).split()
    assert len(commands()) >= 21
    assert [name for name in commands() if name not in listed] == []


@pytest.mark.parametrize("command", ["train", "new-config"])
def test_help_of_a_command_loads_nothing_heavy(command: str) -> None:
    done = medseg(command, "--help", script=PROBE)
    assert done.stdout.splitlines()[-1] == "LOADED 0"
    assert "Usage:" in done.stdout


@pytest.mark.parametrize("command", ["preprocess", "train", "evaluate", "run", "ui"])
def test_a_wrong_configuration_answers_before_anything_heavy_is_loaded(command: str, wrong: Path) -> None:
    done = medseg(command, str(wrong), script=PROBE)
    assert done.stdout.splitlines()[-1] == "LOADED 2"
    assert done.stderr.splitlines() == [
        f"error: {wrong}:4:3: training.learning_rat: unknown key, did you mean 'learning_rate'?",
        f"error: {wrong}:5:3: training.weight_decay: expected a number of at least 0 or null, got 'abc'",
    ]


def test_wrong_options_stand_in_the_same_list(wrong: Path) -> None:
    done = medseg("train", str(wrong), "--set", "network.options.widht=8")
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: --set network.options.widht=8: network.options.widht: ")
    assert "did you mean 'width'?" in first
    assert len(rest) == 2


def test_a_users_error_has_no_traceback(tmp_path: Path) -> None:
    done = medseg("train", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none.yaml'}: cannot be read: No such file or directory\n"
    assert done.stdout == ""


def test_a_bug_keeps_its_traceback_and_no_values() -> None:
    done = medseg("broken", script=BUG)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.endswith("KeyError: 'a bug'\n")
    assert "patient" not in done.stderr


def test_an_unknown_command_or_option_is_named() -> None:
    command = medseg("trian")
    assert command.returncode == 2
    assert "No such command 'trian'" in command.stderr
    assert "train" in command.stderr
    option = medseg("train", "x.yaml", "--resum")
    assert option.returncode == 2
    assert "--resume" in option.stderr


def test_the_schema_goes_to_standard_output() -> None:
    done = medseg("schema")
    assert done.returncode == 0
    assert '"$schema": "https://json-schema.org/draft/2020-12/schema"' in done.stdout


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], cwd=REPOSITORY, check=False, capture_output=True
    )
    assert done.returncode == 0


def test_the_workspace_of_the_command_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: a\ndata: {manifest: m.json}\nworkspace: said\n")
    monkeypatch.chdir(tmp_path)
    assert loading.load(path, ["seed=4"], None).workspace == tmp_path / "said"
    assert loading.load(path, None, Path("other")).workspace == tmp_path / "other"
    assert loading.load(path, ["seed=4"], None).seed == 4
