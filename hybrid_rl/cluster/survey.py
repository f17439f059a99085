"""What a Ray cluster has, and what of it is free: a short `ray status`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hybrid_rl.config import Config


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: its address, and CPUs and GPUs, those that nothing has reserved among them."""

    address: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float
    memory: int
    """Bytes."""


def cluster_address(config: Config) -> str | None:
    """Where the cluster is that a run joins, if it does not start one: `cluster.address`, else RAY_ADDRESS."""
    if config.cluster.backend == "inline":
        return None
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def survey(config: Config) -> list[Node]:
    """The machines of the cluster that a run joins. Joins it for as long as that takes; starts no worker. Raises
    `ConfigError` if it cannot be joined."""
    from hybrid_rl.cluster.ray import RayCluster

    cluster = RayCluster(config)
    try:
        import ray
        from ray._private.state import available_resources_per_node

        free, nodes = available_resources_per_node(), []
        for node in ray.nodes():
            if node["Alive"]:
                has, left = node["Resources"], free.get(node["NodeID"], {})
                amounts = (float(of.get(kind, 0)) for of in (has, left) for kind in ("CPU", "GPU"))
                nodes.append(Node(node["NodeManagerAddress"], *amounts, memory=int(has.get("memory", 0))))
        return nodes
    finally:
        cluster.close()
