"""A run that is killed at random, again and again, ends as one that never was: in every metric, rollout and weight.

The driver, a learner rank or all processes get SIGKILL, or the driver or its process group SIGTERM, at random moments
and in the midst of a save; `HYBRID_RL_KILLS` says how often (20 by default).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from hybrid_rl.checkpoint import checkpoints
from hybrid_rl.run_directory import read_metrics
from tests.trainers.test_grpo import check_rows, learnable, timeless  # noqa: F401

KILLS = int(os.environ.get("HYBRID_RL_KILLS", "20"))
STEPS = 10 * KILLS
VICTIMS = ("driver", "learner", "group", "asked", "all-asked")
MOMENTS = ("start", "step", "save")


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(learnable: dict, tmp_path: Path, engine: str):  # noqa: F811
    draw = random.Random(0)
    learnable |= {
        "steps": STEPS,
        "plan": {"score": "random"},
        "learner": {"world_size": 2},
        "rollout": {"engine": engine, "engines": 2},
        "checkpoint": {"every": 1},
        "eval": {"every": 10, "k": 2},
        "tracking": {"wandb": "disabled"},
    }
    whole, parts = (_config(learnable, tmp_path, name) for name in ("whole", "parts"))
    assert _start(whole).wait() == 0, (tmp_path / "whole.log").read_text()[-3000:]

    kills: Counter[str] = Counter()
    while kills.total() < KILLS:
        process = _start(parts)
        wanted = f"{draw.choice(VICTIMS)} {draw.choice(MOMENTS)}"
        struck = _strike(process, tmp_path / "parts", wanted, draw)
        kills[wanted] += struck
        process.wait(timeout=120)
        if struck and wanted.partition("asked ")[2] in ("step", "save"):
            assert process.returncode == 128 + signal.SIGTERM
        _clean_up(process.pid)
        assert process.returncode != 0, "the run is long enough to be killed so often"
    last = _start(parts)
    assert last.wait() == 0, (tmp_path / "parts.log").read_text()[-3000:]

    rows, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("parts", "whole"))
    check_rows(rows, STEPS)
    for row, wanted in zip(timeless(rows), timeless(expected), strict=True):
        assert row == wanted
    for path in sorted((tmp_path / "whole/rollouts").iterdir()):
        assert (tmp_path / "parts/rollouts" / path.name).read_bytes() == path.read_bytes()
    weights, reference = (_last_weights(tmp_path / name) for name in ("parts", "whole"))
    assert all(torch.equal(weights[name], reference[name]) for name in reference)
    print(f"\n{engine}: {KILLS} kills ({dict(kills)}), {STEPS} steps equal")


def _config(tree: dict, root: Path, name: str) -> Path:
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**tree, "run": {"dir": str(root / name)}}))
    return path


def _start(config: Path) -> subprocess.Popen[bytes]:
    log = config.with_suffix(".log").open("ab")
    command = [sys.executable, "-m", "hybrid_rl.cli", "train", str(config), "--auto-resume"]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _strike(process: subprocess.Popen[bytes], run: Path, wanted: str, draw: random.Random) -> bool:
    """Kill as `wanted` says; false if the run ended before it came to that."""
    victim, moment = wanted.split()
    if moment == "start":
        time.sleep(draw.uniform(1.0, 15.0))
    else:
        before = _newest(run)
        while process.poll() is None and _newest(run) == before:
            time.sleep(0.05)
        if moment == "step":
            time.sleep(draw.uniform(0.0, 1.0))
        else:
            while process.poll() is None and not list((run / "checkpoints").glob(".writing_*")):
                time.sleep(0.0005)
            time.sleep(draw.uniform(0.0, 0.01))
    if process.poll() is not None:
        return False
    if victim == "all-asked":
        os.killpg(process.pid, signal.SIGTERM)
        return True
    for pid in _victims(process.pid, victim):
        os.kill(pid, signal.SIGTERM if victim == "asked" else signal.SIGKILL)
    return True


def _newest(run: Path) -> str:
    return max((path.name for path in checkpoints(run / "checkpoints")), default="")


def _victims(driver: int, victim: str) -> list[int]:
    if victim == "learner":
        ranks = [p.pid for p in _family(driver) if "learner-" in " ".join(p.cmdline())]
        return ranks[-1:] or [driver]
    return [p.pid for p in _family(driver)] + [driver] if victim == "group" else [driver]


def _family(driver: int) -> list[psutil.Process]:
    try:
        return [p for p in psutil.Process(driver).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def _clean_up(driver: int) -> None:
    """What a killed driver leaves: Ray's processes, in the driver's session."""
    for pid in _session(driver):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _session(driver: int) -> Iterator[int]:
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == driver:
                yield pid
        except (ProcessLookupError, PermissionError):
            continue


def _last_weights(run: Path) -> dict[str, Any]:
    return load_file(checkpoints(run / "checkpoints")[-1] / "weights.safetensors")
