"""The demo, as a stranger runs it."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.volumes.stored import read_header


@pytest.mark.slow
def test_the_demo_learns_says_where_all_landed_and_goes_on_when_run_again(tmp_path: Path) -> None:
    first = demo(tmp_path)
    learned, untrained = map(float, re.findall(r"(0\.\d+) (?:after training|with the same network)", first))
    assert learned > 0.8
    assert untrained < 0.2
    landed = dict(re.findall(r"^(report|label maps|model) +(\S+)$", first, re.MULTILINE))
    assert {name: Path(path).exists() for name, path in landed.items()} == dict.fromkeys(
        ("report", "label maps", "model"), True
    )
    for name in ("new_patient_a.nii.gz", "new_patient_b.nii.gz"):
        image, label = (read_header(tmp_path / "demo" / folder / name) for folder in ("new", "segmented"))
        assert image.geometry == label.geometry
    assert (tmp_path / "demo" / "mlflow.db").exists()
    start = time.monotonic()
    assert f"{learned:.3f} after training" in demo(tmp_path)
    assert time.monotonic() - start < 60


def demo(folder: Path) -> str:
    """Run the demo in a folder and return what it said."""
    command = [sys.executable, "-m", "pipeline", "demo", "--workspace", "demo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr
