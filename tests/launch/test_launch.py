"""The launchers for real: two nodes of Ray on this machine, a job server, and a Slurm that is played."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hybrid_rl.cluster.inline import free_port
from tests.launch.test_grpo_arguments import ROOT, own_address

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENVIRONMENT = {**os.environ, "HYBRID_RL_RAY_START": "--num-cpus=1 --object-store-memory=100000000"}


@pytest.fixture
def config(tiny_tree: dict, write_config: Callable[[dict], Path]) -> Path:
    tiny_tree |= {"rollout": {"engine": "transformers", "engines": 1}, "learner": {"world_size": 1}}
    return write_config(tiny_tree)


@pytest.fixture
def head() -> str:
    return f"{own_address()}:{free_port()}"


@pytest.fixture(autouse=True)
def nothing_left(head: str) -> Iterator[None]:
    """No process that knows the head's port outlives a test; Ray's own are all told it."""
    yield
    port = head.rpartition(":")[2]
    until = time.monotonic() + 15
    while left := [words for words in command_lines() if port in words]:
        assert time.monotonic() < until, left
        time.sleep(0.5)


def command_lines() -> list[str]:
    return [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]


def start(*words: object, log: Path, **variables: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            list(map(str, words)), cwd=ROOT, env=ENVIRONMENT | variables, stdout=out, stderr=subprocess.STDOUT
        )


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 300
    while steps_done(run) < steps:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)


def test_two_nodes_train_and_both_leave(config: Path, head: str, tmp_path: Path):
    logs = [tmp_path / f"node-{rank}.txt" for rank in (0, 1)]
    nodes = [
        start(
            *["launch/grpo.sh", "--nodes", "2", "--head-address"],
            head,
            "--node-rank",
            rank,
            "--config",
            config,
            log=log,
        )
        for rank, log in enumerate(logs)
    ]
    assert nodes[0].wait(300) == 0, logs[0].read_text()
    assert nodes[1].wait(60) == 0, logs[1].read_text()
    assert steps_done(tmp_path / "run") == 2
    assert "node 2 of 2" in logs[0].read_text()
    assert "the head is done" in logs[1].read_text()


def test_nodes_that_do_not_come(config: Path, head: str, tmp_path: Path):
    log = tmp_path / "log.txt"
    words = ["launch/grpo.sh", "--nodes", "2", "--head-address", head, "--timeout", "3", "--config", config]
    assert start(*words, log=log).wait(120) == 2
    assert "1 of 2 nodes came within 3 s" in log.read_text()


def test_a_preempted_slurm_job_saves_and_is_queued_again(config: Path, head: str, tmp_path: Path):
    address = head.partition(":")[0]
    played, calls = tmp_path / "bin", tmp_path / "calls.txt"
    played.mkdir()
    (played / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NNODES=1 SLURM_NODEID=0 exec "$@"\n'
    )
    (played / "scontrol").write_text(
        f'#!/bin/bash\necho "$*" >>{calls}\n[[ $1 != show ]] || printf "{address}\\nn2\\n"\n'
    )
    for program in played.iterdir():
        program.chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n[1-2]"}
    job |= {"SLURM_JOB_ID": "77", "PATH": f"{played}:{os.environ['PATH']}"}
    run, log = tmp_path / "run", tmp_path / "log.txt"
    words = ["bash", "launch/slurm.sbatch", "--config", config, f"--head-address={head}", f"run.dir={run}"]
    running = start(*words, "steps=100000", log=log, **job)
    wait_for_steps(run, 2, running, log)
    running.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    running.send_signal(signal.SIGTERM)  # Slurm repeats itself
    assert running.wait(120) == 128 + signal.SIGTERM, log.read_text()
    assert "requeue 77" in calls.read_text()

    done = steps_done(run)
    again = start(*words, f"steps={done + 1}", log=log, **job)
    assert again.wait(300) == 0, log.read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, done + 2))


@pytest.fixture
def cluster(head: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray that somebody else started at the head's address; gives its job server's."""
    address, _, port = head.partition(":")
    dashboard, client = free_port(), free_port()
    log = tmp_path / "ray.txt"
    ray = f"ray start --head --block --node-ip-address={address} --port={port} --dashboard-port={dashboard}"
    ray += f" --ray-client-server-port={client} --num-cpus=2 --object-store-memory=100000000"
    with_environment = 'source launch/env.sh; [[ -s ~/.ray/auth_token ]] || ray get-auth-token --generate; exec "$@"'
    running = start("setsid", "bash", "-c", with_environment, "-", *ray.split(), log=log)
    until = time.monotonic() + 60
    while "Ray runtime started" not in log.read_text():
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.5)
    yield f"http://127.0.0.1:{dashboard}"
    running.terminate()
    running.wait(60)


def test_a_ray_that_runs_already_is_left_running_and_takes_jobs(
    config: Path, tiny_model: Path, cluster: str, head: str, tmp_path: Path
):
    log = tmp_path / "log.txt"
    assert start("launch/grpo.sh", "--head-address", head, "--config", config, log=log).wait(300) == 0, log.read_text()
    assert "it is used, and left running" in log.read_text()
    assert steps_done(tmp_path / "run") == 2

    submit = ["launch/submit.sh", "--address", cluster, "--working-dir", tmp_path, "--env", "A_KEY", "--", config.name]
    (tmp_path / "A $SHELL 'b'").mkdir()
    run = tmp_path / "A $SHELL 'b'" / "job"
    job = start(*submit, f"run.dir={run}", log=log, A_KEY="hunter2")
    assert job.wait(300) == 0, log.read_text()
    assert steps_done(run) == 2
    assert "step 2" in log.read_text()
    assert "hunter2" not in log.read_text()

    refused = start(*submit, f"run.dir={run}", "model.path=/no/model", log=log, A_KEY="hunter2")
    assert refused.wait(120) == 2, log.read_text()
    assert "model.path='/no/model'" in log.read_text()
