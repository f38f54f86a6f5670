"""Fixtures that many tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real volumes that stand beside the checkout on our machines and in CI; a stranger's clone has none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real volumes (../shared/data) are not beside this checkout")
    return folder
