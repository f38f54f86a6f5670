"""How the options that share work out over machines are read: an engine, or a shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pipeline.stages.cluster.options import RayOptions
    from pipeline.stages.shards import Shard


def cluster_of(
    engine: Literal["local", "ray"], address: str | None, workers: int | None, cpus: int | None, wait_minutes: float
) -> RayOptions | None:
    """Return how a cluster is used; None where this machine does the work."""
    from pipeline.stages.cluster.options import ray_options

    return ray_options(engine, address, workers, cpus, wait_minutes)


def shard_of(
    text: str | None, ray: RayOptions | None = None, *, jobs: int | None = None, device: str = "auto"
) -> Shard | None:
    """Return the shard that an option names, if any; what does not go with a cluster is refused."""
    from pipeline.stages.cluster.options import refuse_beside_ray
    from pipeline.stages.shards import Shard

    shard = None if text is None else Shard.parsed(text)
    refuse_beside_ray(ray, jobs=jobs, shard=shard, device=device)
    return shard
