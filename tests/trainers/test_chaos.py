"""A run whose processes are killed or stopped at random, for `HYBRID_RL_CHAOS_MINUTES` (2 by default), ends with every
planned step done once and every sync verified."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml

from hybrid_rl.run_directory import read_metrics
from tests.trainers.test_grpo import learnable  # noqa: F401

STEPS_A_MINUTE = 400
CALM_SECONDS = (4.0, 25.0)
"""Between two faults; starting anew takes longer than the shorter, so that workers are hit at every stage."""


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_random_kills_do_not_keep_a_run_from_its_end(learnable: dict, tmp_path: Path):  # noqa: F811
    minutes = float(os.environ.get("HYBRID_RL_CHAOS_MINUTES", "2"))
    draw = random.Random(os.environ.get("HYBRID_RL_CHAOS_SEED", "0"))
    steps = round(STEPS_A_MINUTE * minutes)
    learnable |= {
        "steps": steps,
        "plan": {"score": "random"},
        "learner": {"world_size": 1, "timeout": 60},
        "rollout": {"engine": "transformers", "engines": 2, "timeout": 5, "max_restarts": 10_000},
        "async": {"max_staleness": 1},
        "checkpoint": {"every": 5},
        "sync": {"gate": {"every": 10}, "timeout": 5},
    }
    config = tmp_path / "chaos.yaml"
    config.write_text(yaml.safe_dump(learnable))
    log = (tmp_path / "log.txt").open("w")
    faults: Counter[str] = Counter()
    until = time.monotonic() + 60 * minutes
    attempts = 0
    summary = Path(learnable["run"]["dir"]) / "summary.json"
    while not _done(summary):
        attempts += 1
        assert attempts < 60 * minutes + 5, (tmp_path / "log.txt").read_text()[-4000:]
        run = subprocess.Popen(_command(config, summary), stdout=log, stderr=log, start_new_session=True)
        calm = time.monotonic() + draw.uniform(*CALM_SECONDS)
        while run.poll() is None:
            time.sleep(0.2)
            if calm < time.monotonic() < until:
                faults[_strike(run.pid, draw)] += 1
                calm = time.monotonic() + draw.uniform(*CALM_SECONDS)
        _clean_up(run.pid)
    rows = read_metrics(summary.parent / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "every step once"
    verified = sum(row["sync/verified_engines"] for row in rows)
    restarts = sum(row["faults/engine_restarts"] for row in rows)
    unverified = [r["step"] for r in rows if r["sync/verified_engines"] < 2]
    assert len(unverified) < steps / 2, "engines are verified but while they are being replaced"
    assert all(row["sync/repaired_engines"] == 0 for row in rows)
    assert all(row["sync/version"] == row["step"] for row in rows)
    assert all(row["staleness/max"] <= 1 for row in rows)
    last = [json.loads(line) for line in (summary.parent / "rollouts" / f"step_{steps:06d}.jsonl").open()]
    assert len(last) == 16
    print(
        f"\n{minutes:g} minutes, {steps} steps, {attempts} starts, faults {dict(faults)}, {restarts:g} engines "
        f"replaced, {verified:g} receipts verified of {2 * steps}"
    )


def _done(summary: Path) -> bool:
    return summary.is_file() and "eval_after" in json.loads(summary.read_text())


def _command(config: Path, summary: Path) -> list[str]:
    """Go on where there is something to go on from."""
    command = [sys.executable, "-m", "hybrid_rl.cli", "train", str(config)]
    run = summary.parent
    if any(run.glob("checkpoints/step_*/state.json")):
        return [*command, "--resume"]
    if run.exists():  # killed before the first checkpoint
        subprocess.run(["rm", "-rf", str(run)], check=True)
    return command


def _strike(driver: int, draw: random.Random) -> str:
    """Kill a random worker, stop it for good, or kill the driver."""
    workers = [p for p in _family(driver) if re.match("ray::(learner|engine|rewards)", " ".join(_cmdline(p)))]
    if not workers:
        return "none"
    what = draw.choice(["kill a worker"] * 5 + ["stop a worker"] * 3 + ["kill the driver"])
    try:
        if what == "kill the driver":
            os.kill(driver, signal.SIGKILL)
        else:
            draw.choice(workers).send_signal(signal.SIGKILL if what == "kill a worker" else signal.SIGSTOP)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return "none"
    return what


def _family(driver: int) -> list[psutil.Process]:
    try:
        return psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def _clean_up(driver: int) -> None:
    """What a killed driver leaves: Ray's processes, in the driver's session."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == driver:
                process.kill()
        except (ProcessLookupError, psutil.NoSuchProcess, PermissionError):
            continue
