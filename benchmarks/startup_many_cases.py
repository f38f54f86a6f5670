"""Start-up with many cases: `medseg train --dry-run` on generated manifests, whose images are nowhere.

Target: under 20 s at 100,000 cases. Run: python benchmarks/startup_many_cases.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNTS = (1_000, 10_000, 100_000)
TARGET_S = 20.0
COMMAND = [sys.executable, "-m", "pipeline", "train"]


def write_experiment(folder: Path, cases: int) -> Path:
    """Write a manifest of so many cases, each with an image, a label and both digests, and a YAML that names it."""
    entries = [
        {
            "id": f"case_{n:06}",
            "patient": f"patient_{n:06}",
            "images": {"CT": {"path": f"images/case_{n:06}.nii.gz", "sha256": f"{n:064x}"}},
            "label": {"path": f"labels/case_{n:06}.nii.gz", "sha256": f"{n:064x}"},
            "fold": n % 5,
        }
        for n in range(cases)
    ]
    labels = {"background": 0, "organ": 1}
    facts = {"format_version": 1, "name": "many", "root": "images", "channels": {"CT": "CT"}, "labels": labels}
    (folder / "many.json").write_text(json.dumps({**facts, "cases": entries}, indent=1))
    path = folder / "many.yaml"
    path.write_text("extends: preset:standard\nname: many\ndata: {manifest: many.json}\n")
    return path


def measured(yaml: Path) -> tuple[float, float, float]:
    """Return wall time and processor time in seconds, and peak memory in MB, of a dry run."""
    command = [*COMMAND, str(yaml), "--dry-run", "--fold", "all", "--workspace", str(yaml.parent / "work")]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    processor = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - start, processor, usage.ru_maxrss / 1024  # Linux: in KiB


def main() -> None:
    """Print seconds and memory for each number of cases, and whether the target is met."""
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            seconds, processor, megabytes = measured(write_experiment(Path(folder), count))
        print(f"{count:>7,} cases  {seconds:6.1f} s  ({processor:.1f} s of a processor)  {megabytes:6.0f} MB")
    print(f"target {TARGET_S:g} s {'met' if seconds < TARGET_S else 'MISSED'}")


if __name__ == "__main__":
    main()
