"""A tracked model as MLflow loads it: `mlflow.pyfunc.load_model("models:/NAME@ALIAS").predict(["volume.nii.gz"])`.

The `MLmodel` file beside the weights names this module; nothing of the model is a pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.predictor import Predictor
from pipeline.volumes.volume import read_image


class PathPredictor:
    """Segments files; `predict` is called by MLflow."""

    def __init__(self, predictor: Predictor):
        self._predictor = predictor

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[NDArray[np.integer[Any]]]:
        """Segment cases.

        Args:
            model_input: One entry a case: a path, or a mapping of channel to path; or a data frame, a column a channel.
            params: MLflow's; none is known.

        Returns:
            A label map (X, Y, Z) a case, on the grid of its first channel.

        Raises:
            ValueError: parameters were given.
            VolumeError: a file cannot be read.
        """
        if params:
            raise ValueError(f"unknown parameters: {', '.join(params)}; this model takes none")
        cases = model_input.to_dict("records") if hasattr(model_input, "to_dict") else model_input
        return [self._segment(case) for case in cases]

    def _segment(self, case: str | Path | Mapping[str, str]) -> NDArray[np.integer[Any]]:
        """Segment one case."""
        if isinstance(case, str | Path):
            return self._predictor.predict(read_image(Path(case))).array
        return self._predictor.predict({channel: read_image(Path(path)) for channel, path in case.items()}).array


def _load_pyfunc(path: str) -> PathPredictor:
    """Load the model in a folder; MLflow looks for this name."""
    return PathPredictor(Predictor.load(Path(path)))
