"""What a run was made with: versions, and the state of the repository that it was begun in."""

from __future__ import annotations

import getpass
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline import __version__

PACKAGES = ("torch", "monai", "numpy", "scipy", "nibabel", "SimpleITK", "blosc2", "safetensors", "mlflow")

GIT_LIMIT_S = 10.0


def environment_tags() -> dict[str, str]:
    """Return tags that say what a run was made with: versions, machine, and git commit and dirtiness.

    The repository is that around the current folder.
    """
    return {
        "mlflow.source.name": "medseg",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
        "medseg.machine": platform.node(),
        "version.medseg": __version__,
        "version.python": platform.python_version(),
        **_package_versions(),
        **_git_tags(Path.cwd()),
    }


def _package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on, without importing one."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git_tags(folder: Path) -> dict[str, str]:
    """Return commit and dirtiness of the repository around a folder; nothing where there is none, or no git."""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain")
    if not commit or changed is None:
        return {}
    return {"mlflow.source.git.commit": commit, "medseg.git_dirty": "true" if changed else "false"}


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None where it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _user() -> str:
    """Return the user's name; a container's user may have none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
