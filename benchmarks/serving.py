"""`medseg serve` under load: requests/s and latency at 1, 4 and 16 clients, beside the bare predictor's cases/s.

    python benchmarks/serving.py --data DATA [--model MODEL] [--clients 1 4 16] [--seconds 20] [--rounds 3]

DATA holds Task04_Hippocampus/; the first volumes are taken. MODEL is a trained model of one MR channel; without one the
network of configs/hippocampus_unet.yaml has random weights, which costs the same. The server is a process with one
worker process; the clients are threads of a third process, each sending one volume after another to POST /v1/segment
and waiting for its label map, over connections that are kept. A round is the bare predictor (volumes in memory, nothing
read or written, the server idle), then each number of clients, for --seconds each; all share the same cores. A request
that is not answered with a label map ends the benchmark.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, cycle, islice
from pathlib import Path

import httpx
from side_by_side import MEDSEG, memory_mb, run_apart
from synthetic import untrained_model, untrained_plan

from pipeline.data.plan import Normalisation
from pipeline.model import save_model
from pipeline.predictor import Engine, Predictor
from pipeline.volumes.volume import read_image

MOST = 40
PATCH, OPTIONS = (40, 56, 40), {"width": 16, "norm": "batch"}
START_S = 300.0


def make_model(folder: Path) -> Path:
    """Write the network of configs/hippocampus_unet.yaml with random weights."""
    plan = untrained_plan(3, "MR", Normalisation(scheme="zscore"), (1.0, 1.0, 1.0), patch_size=PATCH)
    save_model(folder, untrained_model(plan, OPTIONS))
    return folder


@contextmanager
def serving(model: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a server, and yield its address once it is ready, and its process."""
    command = [*MEDSEG, "serve", "--model", str(model), "--port", "0", "--spool", str(folder / "spool")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], stderr=log, text=True)
    try:
        until, found = time.monotonic() + START_S, None
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.1)
            found = re.search(r"http://\S+", (folder / "log").read_text())
            if found and httpx.get(f"{found[0]}/readyz").status_code == 200:
                yield found[0], process
                return
        raise SystemExit((folder / "log").read_text())
    finally:
        process.terminate()
        process.wait()


def load(options: argparse.Namespace) -> None:
    """Be the clients; print the latencies as JSON."""
    latencies: list[list[float]] = [[] for _ in range(options.clients[0])]
    bodies = [path.read_bytes() for path in options.images]
    begun = time.perf_counter()
    until = begun + options.seconds

    def client(number: int) -> None:
        with httpx.Client(base_url=options.url, timeout=START_S) as http:
            for body in islice(cycle(bodies), number, None):
                start = time.perf_counter()
                if start >= until:
                    return
                answer = http.post("/v1/segment", content=body, headers={"Content-Type": "application/octet-stream"})
                answer.raise_for_status()
                latencies[number].append(time.perf_counter() - start)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(len(latencies))]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    print(json.dumps({"seconds": time.perf_counter() - begun, "latencies": list(chain(*latencies))}))


def bare(options: argparse.Namespace) -> None:
    """Segment the volumes again and again by the predictor alone; print how many a second."""
    predictor = Predictor.load(options.model, Engine(device="cpu"))
    images = [read_image(path) for path in options.images]
    predictor.predict(images[0])
    start, done = time.perf_counter(), 0
    while time.perf_counter() < start + options.seconds:
        predictor.predict(images[done % len(images)])
        done += 1
    print(json.dumps(done / (time.perf_counter() - start)))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Print a line for each number of clients, and the bare predictor's."""
    images = sorted((options.data / "Task04_Hippocampus/imagesTr").glob("[!.]*.nii.gz"))[:MOST]
    model = options.model or make_model(folder / "model")
    own = [sys.executable, __file__, "--seconds", options.seconds, "--images", *images]
    rates: dict[int, list[float]] = {0: [], **{clients: [] for clients in options.clients}}
    latencies: dict[int, list[float]] = {clients: [] for clients in options.clients}
    with serving(model, folder) as (url, process):
        for _ in range(options.rounds):
            rates[0].append(json.loads(run_apart([*own, "--role", "bare", "--model", model]).output))
            for clients in options.clients:
                answer = run_apart([*own, "--role", "load", "--url", url, "--clients", clients]).answer
                rates[clients].append(len(answer["latencies"]) / answer["seconds"])
                latencies[clients] += answer["latencies"]
        resident = memory_mb("VmRSS", process.pid)
    alone = statistics.median(rates[0])
    print(f"{len(images)} volumes, {'trained' if options.model else 'random'} weights, {options.rounds} rounds")
    print(f"bare predictor: {alone:.2f} cases/s (medians); the server without its worker holds {resident:.0f} MB")
    for clients in options.clients:
        cuts = statistics.quantiles(latencies[clients], n=20)
        ratio = statistics.median(a / b for a, b in zip(rates[clients], rates[0], strict=True))
        print(
            f"{clients:3} clients: {statistics.median(rates[clients]):.2f} requests/s, {ratio:.2f} of bare;"
            f" p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s, of {len(latencies[clients])} requests"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--role", choices=["measure", "load", "bare"], default="measure", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=Path, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "measure":
        with tempfile.TemporaryDirectory() as folder:
            measure(options, Path(folder))
    else:
        {"load": load, "bare": bare}[options.role](options)


if __name__ == "__main__":
    main()
