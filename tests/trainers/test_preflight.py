"""What is looked at before a run: the machine or the cluster that it would be on, and room for its checkpoints."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from hybrid_rl.cluster.survey import Node
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.estimate import GIB, planned_memory
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import configured_plan, select_candidates
from trainers.preflight import check_surroundings, dry_run
from trainers.setup import Task, check_task
from trainers.sizing import Machine

Usage = namedtuple("Usage", "total used free")


def drafted(config: Config, task: Task) -> AdaptationPlan:
    sizes = {c.name: float(c.params) for c in select_candidates(task.anatomy, config.plan)}
    return configured_plan(task.anatomy, config, sizes, {})


def test_a_run_that_goes_on_has_its_checkpoints_already(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    config = parse_config(tiny_tree | {"steps": 10, "checkpoint": {"every": 1, "keep_last": 2}})
    task = check_task(config)
    memory = planned_memory(config, task.anatomy, drafted(config, task))
    each = 2 * memory.masters + memory.moments
    run = Path(tiny_tree["run"]["dir"])

    def room(free: int) -> None:
        monkeypatch.setattr("trainers.preflight.shutil.disk_usage", lambda path: Usage(10**12, 0, free))
        check_surroundings(config, task)

    room(3 * each)
    with pytest.raises(ConfigError, match="3 checkpoints of"):
        room(3 * each - 1)
    for step in (1, 2):
        checkpoint = run / "checkpoints" / f"step_{step:06d}"
        (checkpoint / "learner").mkdir(parents=True)
        (checkpoint / "state.json").touch()
        (checkpoint / "learner" / "rank_0").write_bytes(bytes(each))
    begun = run / "checkpoints" / ".writing_step_000003"
    begun.mkdir()
    (begun / "rank_0").write_bytes(bytes(each))
    room(each)
    with pytest.raises(ConfigError, match="that are there"):
        room(each - 1)


def test_a_directory_below_one_that_cannot_be_read(tiny_config: Config, monkeypatch: pytest.MonkeyPatch):
    task, exists = check_task(tiny_config), Path.exists

    def locked(path: Path) -> bool:
        if str(path).startswith(tiny_config.run.dir or "-"):
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", locked)
    with pytest.raises(ConfigError, match=r"run\.dir='.*' cannot be written: Permission denied"):
        check_surroundings(tiny_config, task)


@pytest.mark.parametrize("named", ["cluster.address", "RAY_ADDRESS"])
def test_a_dry_run_looks_at_the_cluster_that_would_be_joined(
    tiny_tree: dict, monkeypatch: pytest.MonkeyPatch, named: str
):
    monkeypatch.delenv("HYBRID_RL_DEVICE", raising=False)
    asked: list[Config] = []

    def found(config: Config) -> Sequence[Node]:
        asked.append(config)
        return [Node(f"10.0.0.{i}", 64, 8, 64, 8, GIB) for i in (1, 2)]

    monkeypatch.setattr("trainers.sizing.survey", found)
    monkeypatch.setattr(Machine, "here", lambda: pytest.fail("this machine was looked at"))
    if named == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        tiny_tree["cluster"] = {"address": "10.0.0.1:6379"}

    def dry(cpus: int, **learner: int) -> str:
        config = parse_config(tiny_tree | {"learner": {"world_size": 2, "cpus": cpus, **learner}})
        console = Console(width=150, file=io.StringIO(), record=True)
        task = check_task(config)
        check_surroundings(config, task)
        dry_run(config, task, console)
        return console.export_text()

    text = dry(60)
    assert "16 GPUs of unknown memory; the cluster at 10.0.0.1:6379" in text
    assert "64 of 64" in text
    with pytest.raises(ConfigError, match=r"needs 1200.* CPUs.*the cluster at 10\.0\.0\.1:6379 has 128"):
        dry(600)
    with pytest.raises(
        ConfigError, match=r"needs 17 GPUs.*has 16; .* learner\.gpus \(now 8\) or rollout\.gpus \(now 1\)"
    ):
        dry(1, gpus=8)
    assert len(asked) == 3


def test_a_driver_does_without_deepspeed():
    code = "import sys, trainers.grpo; print({'deepspeed', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
