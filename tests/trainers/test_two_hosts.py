"""Runs over two hosts: they train, outlive the loss of the rollouts' host and a cut cable, and stop and resume where
the learner's host is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hybrid_rl.run_directory import read_metrics
from tests.hosts import Host, Site, site  # noqa: F401
from tests.trainers.test_grpo import learnable  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Run:
    """`hybrid-rl train` on a host."""

    def __init__(self, host: Host, config: Path, directory: Path, *options: str) -> None:
        self.directory = directory
        self._out = (config.parent / "terminal.txt").open("a")
        self._seen = config.parent / "terminal.txt"
        words = [sys.executable, "-m", "hybrid_rl.cli", "train", str(config), *options]
        self._process = host.start(*words, stdout=self._out, stderr=subprocess.STDOUT)

    @property
    def terminal(self) -> str:
        return self._seen.read_text()

    @property
    def rows(self) -> list[dict]:
        path = self.directory / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def wait_for(self, what: Callable[[], bool], seconds: float) -> float:
        """Returns how long it took."""
        started = time.monotonic()
        while not what():
            assert self._process.poll() is None, self.terminal
            assert time.monotonic() - started < seconds, self.terminal
            time.sleep(0.1)
        return time.monotonic() - started

    def wait_for_steps(self, more: int, seconds: float) -> float:
        wanted = len(self.rows) + more
        return self.wait_for(lambda: len(self.rows) >= wanted, seconds)

    def end(self, seconds: float) -> int:
        return self._process.wait(seconds)


@pytest.fixture
def config(learnable: dict, tmp_path: Path) -> Callable[..., Path]:  # noqa: F811
    """A configuration whose learner takes a host of two CPUs, its engine one of one."""

    def write(head: Host, **changes: object) -> Path:
        tree = learnable | {
            "plan": {"score": "random"},
            "learner": {"world_size": 1, "cpus": 2},
            "rollout": {"engine": "transformers", "engines": 1, "cpus": 1},
            "cluster": {"address": f"{head.address}:6379"},
            "sync": {"gate": {"every": 10}},
            "checkpoint": {"every": 5},
            **changes,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def test_a_run_outlives_the_rollouts_host_and_a_cut_cable(site: Site, config: Callable[..., Path], tmp_path: Path):  # noqa: F811
    head, other = site.host(1), site.host(2)
    head.start_ray(cpus=2)
    other.start_ray(head, cpus=1)
    run = Run(head, config(head, steps=100_000), tmp_path / "run")
    started = run.wait_for(lambda: len(run.rows) >= 5, 240)
    print(f"\n5 steps after {started:.0f} s")

    other.link("down")
    time.sleep(10)
    other.link("up")
    print(f"cable cut for 10 s: next step {run.wait_for_steps(1, 120):.1f} s after it was back")
    run.wait_for_steps(10, 60)

    before = time.monotonic()
    other.lose()
    noticed = run.wait_for(lambda: "failed during" in run.terminal, 120)
    time.sleep(max(0.0, before + 10 - time.monotonic()))
    other = site.host(2)
    other.start_ray(head, cpus=1)
    back = run.wait_for_steps(1, 240)
    print(f"host lost: noticed after {noticed:.1f} s; first step {back:.1f} s after its Ray was started again")
    run.wait_for_steps(10, 60)
    rows = run.rows
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert sum(row["faults/engine_restarts"] for row in rows) >= 1
    print(run.terminal[-3000:])


def test_a_run_that_loses_the_learner_s_host_says_so_and_goes_on_from_its_checkpoint(
    site: Site,  # noqa: F811
    config: Callable[..., Path],
    tmp_path: Path,
):
    head, other = site.host(1), site.host(2)
    head.start_ray(cpus=1)
    other.start_ray(head, cpus=2)
    settings = config(head, steps=150)
    run = Run(head, settings, tmp_path / "run")
    run.wait_for(lambda: len(run.rows) >= 12, 240)
    before = time.monotonic()
    other.lose()
    assert run.end(180) == 1
    print(f"\nhost lost: ended after {time.monotonic() - before:.1f} s")
    message = run.terminal.partition("hybrid-rl train: ")[2]
    print(message)
    assert "a machine was lost. learner-0 (10.77.0.2, process " in message
    assert "Traceback" not in run.terminal
    assert f"run.dir={tmp_path / 'run'} --resume" in message
    assert len(message.splitlines()) < 10

    other = site.host(2)
    other.start_ray(head, cpus=2)
    resumed = Run(head, settings, tmp_path / "run", "--resume")
    assert resumed.end(300) == 0, resumed.terminal
    assert [row["step"] for row in resumed.rows] == list(range(1, 151))
    assert "eval_after" in json.loads((tmp_path / "run" / "summary.json").read_text())


def test_ranks_on_two_hosts_meet_and_the_lost_one_leads(
    site: Site,  # noqa: F811
    config: Callable[..., Path],
    tmp_path: Path,
):
    head, other = site.host(1), site.host(2)
    head.start_ray(cpus=2)
    other.start_ray(head, cpus=3)
    run = Run(head, config(head, steps=100_000, learner={"world_size": 2, "cpus": 2}), tmp_path / "run")
    run.wait_for(lambda: len(run.rows) >= 8, 240)
    other.lose()
    assert run.end(180) == 1
    message = run.terminal.partition("hybrid-rl train: ")[2]
    print(message)
    assert message.startswith("a machine was lost. learner-")
    assert "(10.77.0.2, process " in message.splitlines()[0]
    assert "Traceback" not in run.terminal
