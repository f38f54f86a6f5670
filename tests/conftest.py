"""Fixtures that many tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.viewer import assets


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real volumes that stand beside the checkout on our machines and in CI; a stranger's clone has none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real volumes (../shared/data) are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def peer_python() -> Callable[[str], Path]:
    """Return the interpreter of a peer's own environment (`make peers`): nnunet, with MONAI, or panoptica."""

    def of(name: str) -> Path:
        python = Path(__file__).parents[1] / ".peers" / name / "bin" / "python"
        if not (python.parents[1] / ".installed").exists():
            pytest.skip(f"the peer {name} is not installed; `make peers` does it")
        return python

    return of


@pytest.fixture
def niivue() -> str:
    """Return NiiVue's script."""
    script = assets.niivue()
    if script is None:
        pytest.skip("NiiVue is not installed; `make setup` or `medseg install-viewer` does it")
    return script
