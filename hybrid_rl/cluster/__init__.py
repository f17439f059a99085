"""Where workers live: Ray actors across machines, or this process."""

from __future__ import annotations

from hybrid_rl.cluster.base import Cluster
from hybrid_rl.config import Config
from hybrid_rl.types import Resources


def open_cluster(config: Config) -> Cluster:
    """Start or join the cluster that the configuration asks for. No worker is started yet."""
    if config.cluster.backend == "inline":
        from hybrid_rl.cluster.inline import InlineCluster

        return InlineCluster(config)
    from hybrid_rl.cluster.ray import RayCluster

    return RayCluster(config)


__all__ = ["Cluster", "Resources", "open_cluster"]
