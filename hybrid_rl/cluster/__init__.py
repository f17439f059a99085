"""Where workers live: Ray actors across machines, or this process."""

from __future__ import annotations

import os

from hybrid_rl.cluster.base import Cluster
from hybrid_rl.config import Config
from hybrid_rl.types import Resources


def open_cluster(config: Config) -> Cluster:
    """Start or join the cluster that the configuration asks for. No worker is started yet."""
    if config.cluster.backend == "inline":
        from hybrid_rl.cluster.inline import InlineCluster

        return InlineCluster(config)
    if config.cluster.address is None:
        # Read when Ray is imported: a cluster of this machine alone, which listens on loopback only. It is Ray's
        # default on the systems that give the variable its name; `_node_ip_address` does not do it elsewhere.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from hybrid_rl.cluster.ray import RayCluster

    return RayCluster(config)


__all__ = ["Cluster", "Resources", "open_cluster"]
