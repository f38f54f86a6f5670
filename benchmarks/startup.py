"""Start-up of the command line: `medseg --help` against a bare interpreter, in interleaved pairs.

Target: under 0.4 s. Run: python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

PAIRS = 15
TARGET_S = 0.4
BARE = [sys.executable, "-c", "pass"]
HELP = [sys.executable, "-m", "pipeline", "--help"]


def seconds(command: list[str]) -> float:
    """Return the wall time of a command in seconds."""
    start = time.perf_counter()
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print both medians, their ratio, and whether the target is met."""
    seconds(HELP)  # the first run compiles and fills the file cache
    bare, shown = zip(*((seconds(BARE), seconds(HELP)) for _ in range(PAIRS)), strict=True)
    ratio = statistics.median(b / a for a, b in zip(bare, shown, strict=True))
    middle = statistics.median(shown)
    print(f"python -c pass   {statistics.median(bare):.3f} s, median of {PAIRS}")
    print(f"medseg --help    {middle:.3f} s, median of {PAIRS}; slowest {max(shown):.3f} s")
    print(f"ratio            {ratio:.1f}; target {TARGET_S} s {'met' if middle < TARGET_S else 'MISSED'}")


if __name__ == "__main__":
    main()
