"""ONNX: the only file that imports onnx, onnxscript and onnxruntime; all three are the extra `onnx`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.stages.exporting.parity import Run
from pipeline.stages.exporting.program import Program, quietly

INPUT, OUTPUT = "image", "logits"

# Beyond it, weights go into a file of their own: a message of the format's may have 2 GB at most.
LARGEST_FILE_BYTES = 1_800_000_000


def refuse_without_onnx() -> None:
    """Raise where a package of the extra is missing.

    Raises:
        PipelineError: names it and the command that installs it.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise PipelineError(
            f"--format onnx needs {', '.join(missing)}, not installed here; pip install '.[onnx]' in medseg's checkout"
        )


def write_onnx(path: Path, program: Program, facts: Mapping[str, str]) -> None:
    """Write an exported program as ONNX, its batch and free axes free there too.

    Args:
        path: to write.
        program: the network.
        facts: kept in the file as its metadata.
    """
    import onnx

    exported = program.exported
    parameters = sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict.values())
    separate = parameters > LARGEST_FILE_BYTES
    with quietly():
        torch.onnx.export(
            exported,
            (),
            path,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamo=True,
            external_data=separate,
            verbose=False,
        )
    model = onnx.load(str(path), load_external_data=False)
    onnx.helper.set_model_props(model, dict(facts))
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))


def onnx_run(path: Path) -> Run:
    """Return an ONNX file as a function of arrays, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> NDArray[np.float32]:
        (logits,) = session.run([OUTPUT], {INPUT: batch.numpy()})
        return np.asarray(logits, np.float32)

    return run


def free_axes(path: Path) -> list[int]:
    """Return the axes of an ONNX file's input whose size is free."""
    import onnx

    (image,) = onnx.load(str(path), load_external_data=False).graph.input
    return [axis for axis, dim in enumerate(image.type.tensor_type.shape.dim) if dim.dim_param]
