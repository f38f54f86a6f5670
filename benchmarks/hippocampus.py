"""Accuracy on the Decathlon's hippocampus: native-grid Dice of one fold after a configuration's own budget.

Beside it the five-fold means published for nnU-Net 3d_fullres and MONAI's DynUNet, after some 9 GPU hours a fold; one
fold differs from another by about 0.004.

    python benchmarks/hippocampus.py [--config configs/hippocampus_unet.yaml] [--fold 0] [--minutes 15] [--workspace W]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

PUBLISHED = {"nnU-Net, five folds": (0.8975, 0.8807), "MONAI DynUNet, five folds": (0.8983, 0.8816)}


def medseg(*arguments: object) -> float:
    """Run a stage and return its seconds."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "pipeline", *map(str, arguments)], check=True)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--config", type=Path, default=root / "configs" / "hippocampus_unet.yaml")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--workspace", type=Path)
    chosen = parser.parse_args()
    workspace = chosen.workspace or Path(tempfile.mkdtemp(prefix="medseg-hippocampus-"))
    common = [chosen.config, "--workspace", workspace]
    if chosen.minutes:
        common += ["--set", f"training.budget={{minutes: {chosen.minutes}}}"]
    seconds = {"preprocess": medseg("preprocess", *common)}
    seconds["train"] = medseg("train", *common, "--fold", chosen.fold)
    run = workspace / "runs" / yaml.safe_load(chosen.config.read_text())["name"] / f"fold_{chosen.fold}"
    seconds["evaluate"] = medseg("evaluate", run / "models" / "best", "--workspace", workspace)
    summary = json.loads((run / "evaluation" / "fold" / "summary.json").read_text())
    scores = {name: found["metrics"]["dice"]["mean"] for name, found in summary["classes"].items()}
    print("  ".join(f"{stage} {took:.0f} s" for stage, took in seconds.items()))
    for name, (anterior, posterior) in PUBLISHED.items():
        print(f"{name:28} anterior {anterior:.4f}  posterior {posterior:.4f}")
    this = f"this run, fold {chosen.fold}"
    print(f"{this:28} anterior {scores['anterior']:.4f}  posterior {scores['posterior']:.4f}")
    print(f"all of it: {run / 'evaluation' / 'fold' / 'report.html'}")


if __name__ == "__main__":
    main()
