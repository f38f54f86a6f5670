"""Score pairs of masks with panoptica, in its own environment, and print what it says as JSON.

Usage: python panoptica_scores.py FOLDER THRESHOLD...

FOLDER holds NAME_prediction.npy and NAME_reference.npy, or .nii.gz; any voxel that is not 0 is of a lesion.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from panoptica import ConnectedComponentsInstanceApproximator, InputType, NaiveThresholdMatching, Panoptica_Evaluator
from panoptica.metrics import Metric


def read(path: Path) -> Any:
    """Read a mask as 0 and 1."""
    if path.suffix == ".npy":
        array = np.load(path)
    else:
        import nibabel

        array = np.asarray(nibabel.load(path).dataobj)
    return (array != 0).astype(np.uint8)


def scores(prediction: Any, reference: Any, threshold: float) -> dict[str, float]:
    """Return what panoptica says at one threshold."""
    evaluator = Panoptica_Evaluator(
        expected_input=InputType.SEMANTIC,
        instance_approximator=ConnectedComponentsInstanceApproximator(),
        instance_matcher=NaiveThresholdMatching(matching_threshold=threshold),
        instance_metrics=[Metric.IOU, Metric.DSC],
        global_metrics=[],
    )
    (result,) = evaluator.evaluate(prediction, reference, verbose=False).values()
    return {name: float(getattr(result, name)) for name in ("tp", "fp", "fn", "rq", "sq", "pq")}


def main() -> None:
    """Score every pair of a folder."""
    folder, *thresholds = sys.argv[1:]
    found: dict[str, dict[str, dict[str, float]]] = {}
    with contextlib.redirect_stdout(sys.stderr):
        for path in sorted(Path(folder).glob("*_prediction.*")):
            name, _, ending = path.name.partition("_prediction")
            pair = read(path), read(path.with_name(f"{name}_reference{ending}"))
            found[name] = {f"{float(text):g}": scores(*pair, float(text)) for text in thresholds}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
