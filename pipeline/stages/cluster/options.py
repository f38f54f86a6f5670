"""How the command line's words for a cluster become options: what goes with what is refused here, without Ray."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.errors import PipelineError
from pipeline.records import Record

EngineName = Literal["local", "ray"]


class RayOptions(Record):
    """How a Ray cluster is used.

    Attributes:
        address: HOST:PORT of its head, or auto: the one that this machine belongs to.
        workers: at most so many; None: as many as the cluster has room for, now and later.
        cpus: cores of each; None: a node's, shared out among its GPUs where it has any.
        wait_s: how long it is waited while no worker of ours runs, for want of free cores or GPUs.
    """

    address: str
    workers: Annotated[int, Field(ge=1)] | None = None
    cpus: Annotated[int, Field(ge=1)] | None = None
    wait_s: Annotated[float, Field(gt=0)] = 600.0


def ray_options(
    engine: EngineName, address: str | None, workers: int | None, cpus: int | None, wait_minutes: float
) -> RayOptions | None:
    """Return the options of a cluster; None for the engine that needs none.

    Raises:
        PipelineError: an option is missing, or goes with the other engine.
    """
    if engine == "local":
        given = {"--address": address, "--workers": workers, "--cpus-per-worker": cpus}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise PipelineError(f"{', '.join(wrong)}: of a cluster; add --engine ray, or leave it out")
        return None
    if not address:
        raise PipelineError(
            "--engine ray: name the cluster with --address HOST:PORT, or auto where this machine belongs to one; "
            "on a single machine --jobs N does without Ray"
        )
    if "://" in address:
        raise PipelineError(
            f"--address {address}: expected HOST:PORT or auto; run the command on a node of the cluster"
        )
    return RayOptions(address=address, workers=workers, cpus=cpus, wait_s=60 * wait_minutes)


def refuse_beside_ray(ray: RayOptions | None, *, jobs: int | None, shard: object | None, device: str = "auto") -> None:
    """Raise where an option of one machine is given together with a cluster."""
    if ray is None:
        return
    if jobs is not None:
        raise PipelineError(f"--jobs {jobs}: with --engine ray say --workers {jobs}")
    if shard is not None:
        raise PipelineError(f"--shard {shard}: Ray shares the cases out itself; leave one of the two out")
    if device not in ("auto", "cpu", "cuda"):
        raise PipelineError(f"--device {device}: with --engine ray each worker is given its GPU; say auto, cuda or cpu")
