"""Wall time and memory of `medseg check` and `medseg preprocess`, cold and with all fresh, against bare reading.

    python benchmarks/preprocessing.py [CONFIG]

The bound is one process that reads and unpacks every file of the manifest once and does nothing else. Memory is
resident memory (RSS) summed over a command's whole process tree, polled every 10 ms: pages that processes share count
in each. The machine's load is printed beside, for a busy one slows all of it.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from pipeline.config_loading import load_config
from pipeline.data.manifest import load_manifest

ROOT = Path(__file__).parents[1]
POLL_S = 0.01

READ_ALL = """
import sys
from pathlib import Path
from pipeline.data.manifest import load_manifest
from pipeline.volumes.volume import read_image
manifest = load_manifest(Path(sys.argv[1]))
for case in manifest.cases:
    for file in filter(None, [*case.images.values(), case.label]):
        read_image(manifest.path_of(file), file.index)
"""


def measure(*command: str) -> tuple[float, float]:
    """Return a command's wall seconds and the peak of its processes' memory together, in MB."""
    start = time.perf_counter()
    process = psutil.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process))
        time.sleep(POLL_S)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, peak / 1e6


def resident_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process and all its children."""
    try:
        tree = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in tree)
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    """Print both states' seconds, ratio to the bound, and peak memory."""
    config = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "configs" / "hippocampus_unet.yaml").resolve()
    manifest = load_config(config, []).data.manifest
    bound_s, bound_mb = measure("-c", READ_ALL, str(manifest))
    print(f"load {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores")
    print(f"{len(load_manifest(manifest).cases)} cases; bare reading: {bound_s:.2f} s, {bound_mb:.0f} MB")
    with tempfile.TemporaryDirectory() as workspace:
        check = ("-m", "pipeline", "check", str(manifest), "--workspace", workspace)
        preprocess = ("-m", "pipeline", "preprocess", str(config), "--workspace", workspace)
        for state in ("cold", "fresh"):
            (check_s, check_mb), (preprocess_s, preprocess_mb) = measure(*check), measure(*preprocess)
            total_s = check_s + preprocess_s
            print(
                f"{state}: check {check_s:.2f} s + preprocess {preprocess_s:.2f} s = {total_s:.2f} s, "
                f"{total_s / bound_s:.1f} times bare reading; peak {max(check_mb, preprocess_mb):.0f} MB"
            )


if __name__ == "__main__":
    main()
