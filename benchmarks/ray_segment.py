"""Cases per hour of `medseg segment` over Ray and without, by one and two worker processes of one core each.

    python benchmarks/ray_segment.py [--cases 400] [--rounds 3] [--cores 0,1]

The volumes are made up, of the size of the hippocampus set's; the network is a U-Net with random weights. All parties
segment the same files in turns: this machine's processes (`--jobs 1` and 2), and a Ray cluster of one and of two nodes
on loopback, each node and process on a core of its own. The command that asks the cluster shares the first core.

Cases per hour are counted over the second half of the label maps, when all workers have loaded Ray and the models; what
that takes is in the seconds of the whole command. The overhead is what a case takes longer over Ray, at one worker.
Ray has no password: the cluster lives in a network namespace (`unshare -rn`), without which this does not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from side_by_side import MEDSEG
from synthetic import save_untrained, untrained_plan

from pipeline.data.plan import Normalisation

SHAPE, PATCH = (36, 52, 36), (40, 56, 40)
LOOPBACK, PORT = "127.0.0.1", 6392
INSIDE = "MEDSEG_BENCHMARK_NAMESPACE"
START_S = 120.0


@dataclass(frozen=True)
class Batch:
    """What one command did: seconds a case over the second half of the label maps, and of the whole command."""

    case_s: float
    whole_s: float


def make_folder(folder: Path, cases: int) -> None:
    """Write volumes and a model."""
    (folder / "scans").mkdir()
    random = np.random.default_rng(0)
    for index in range(cases):
        volume = random.normal(100, 30, SHAPE).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / "scans" / f"case_{index:03}.nii.gz")
    plan = untrained_plan(3, "MR", Normalisation(scheme="zscore"), (1.0, 1.0, 1.0), patch_size=PATCH)
    save_untrained(folder / "model", plan, {"width": 16, "norm": "batch"})


def on_cores(cores: Sequence[int], command: Sequence[object]) -> list[str]:
    """Return a command that runs on some cores only."""
    return ["taskset", "-c", ",".join(map(str, cores)), *map(str, command)]


def segment(folder: Path, cores: Sequence[int], *more: object) -> Batch:
    """Segment all volumes anew."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = ["segment", folder / "scans", "--model", folder / "model", "--out", out, "--device", "cpu", *more]
    start = time.perf_counter()
    answer = subprocess.run(on_cores(cores, [*MEDSEG, *words]), capture_output=True, text=True, check=False)
    whole_s = time.perf_counter() - start
    if answer.returncode:
        raise SystemExit(answer.stdout + answer.stderr)
    written = sorted(path.stat().st_mtime for path in out.glob("*.nii.gz"))
    half = len(written) // 2
    return Batch((written[-1] - written[half - 1]) / (len(written) - half), whole_s)


@contextmanager
def cluster(cores: Sequence[int], logs: Path) -> Iterator[None]:
    """Run a cluster with a node of one core on each of some cores."""
    nodes: list[subprocess.Popen[bytes]] = []
    alike = ["--num-cpus=1", f"--node-ip-address={LOOPBACK}", "--object-store-memory=80000000", "--disable-usage-stats"]
    try:
        for core in cores:
            head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={logs / 'ray'}"]
            where = [f"--address={LOOPBACK}:{PORT}", "--include-log-monitor=false"] if nodes else head
            with (logs / f"node_{core}.log").open("wb") as log:
                start = on_cores([core], ["ray", "start", "--block", *where, *alike])
                nodes.append(subprocess.Popen(start, stdout=log, stderr=log, start_new_session=True))
            await_text(logs / f"node_{core}.log", "Ray runtime started")
        yield
    finally:
        for node in nodes:
            end_session(node)


def await_text(path: Path, text: str) -> None:
    """Wait until a log says something."""
    until = time.monotonic() + START_S
    while text not in path.read_text():
        if time.monotonic() > until:
            raise SystemExit(path.read_text())
        time.sleep(0.1)


def end_session(first: subprocess.Popen[bytes]) -> None:
    """Kill a process and all of its session: of a node of Ray all that it started."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.getsid(int(entry.name)) == first.pid:
                os.kill(int(entry.name), 9)
        except (ProcessLookupError, PermissionError):
            continue
    first.wait()


def measure(folder: Path, cores: Sequence[int], rounds: int) -> dict[tuple[str, int], list[Batch]]:
    """Return what each party did with so many workers, in turns."""
    found: dict[tuple[str, int], list[Batch]] = {}
    for count in range(1, len(cores) + 1):
        used = cores[:count]
        with cluster(used, folder):
            address = f"{LOOPBACK}:{PORT}"
            for _ in range(rounds):
                found.setdefault(("without", count), []).append(segment(folder, used, "--jobs", count))
                over_ray = segment(folder, used, "--engine", "ray", "--address", address, "--workers", count)
                found.setdefault(("Ray", count), []).append(over_ray)
        shutil.rmtree(folder / "ray", ignore_errors=True)
    return found


def main() -> None:
    """Measure, inside a network namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", default="0,1", help="a worker on each; all of one, then of two, ...")
    options = parser.parse_args()
    if INSIDE not in os.environ:
        again = 'ip link set lo up && exec "$@"'
        os.environ |= {INSIDE: "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        os.execvp("unshare", ["unshare", "-rn", "sh", "-c", again, "sh", sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as temporary:
        make_folder(Path(temporary), options.cases)
        found = measure(Path(temporary), [int(core) for core in options.cores.split(",")], options.rounds)
    print(f"{options.cases} volumes of {'x'.join(map(str, SHAPE))} voxels, median of {options.rounds} rounds")
    case_s = {party: statistics.median(one.case_s for one in batches) for party, batches in found.items()}
    for (who, count), batches in found.items():
        whole_s = statistics.median(one.whole_s for one in batches)
        rate = 3600 / case_s[who, count]
        print(f"  {who:8} {count} workers: {rate:7.0f} cases/h; the whole command {whole_s:.1f} s")
    for count in sorted({count for _, count in found}):
        ratio = case_s["without", count] / case_s["Ray", count]
        print(f"  {count} workers: Ray / without: {ratio:.2f} times the cases per hour")
    print(f"  overhead of Ray at one worker: {1000 * (case_s['Ray', 1] - case_s['without', 1]):+.0f} ms a case")


if __name__ == "__main__":
    main()
