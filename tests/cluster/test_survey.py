"""What a cluster has, seen without starting anything there."""

from __future__ import annotations

import pytest

from hybrid_rl.cluster import ray as ray_cluster
from hybrid_rl.cluster.survey import cluster_address, survey
from hybrid_rl.config import Config


def test_a_survey_starts_no_process_anywhere(tiny_config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_cluster.RayCluster, "nodes", lambda self: ["another"])
    monkeypatch.setattr(ray_cluster, "_on", lambda *task: pytest.fail("a task was submitted"))
    (node,) = survey(tiny_config)
    assert node.free_cpus == node.cpus > 0
    assert node.memory > 0


def test_which_cluster_a_run_joins(tiny_config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(tiny_config) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_address(tiny_config) == "10.0.0.1:6379"
    other = tiny_config.cluster.model_copy(update={"address": "auto"})
    assert cluster_address(tiny_config.model_copy(update={"cluster": other})) == "auto"
    inline = tiny_config.cluster.model_copy(update={"backend": "inline"})
    assert cluster_address(tiny_config.model_copy(update={"cluster": inline})) is None
