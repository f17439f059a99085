"""What launch/grpo.sh understands, of its arguments and of torchrun's and Slurm's variables."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = "configs/quickstart.yaml"
_UNDERSTOOD = ("NNODES", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NNODES", "SLURM_NODEID")


def own_address() -> str:
    """By which other machines would reach this one."""
    addresses = [a.address for device in psutil.net_if_addrs().values() for a in device if a.family == socket.AF_INET]
    outward = [address for address in addresses if not address.startswith("127.")]
    if not outward:
        pytest.skip("this machine has a loopback interface alone")
    return outward[0]


@pytest.fixture(scope="module")
def here() -> str:
    return own_address()


@dataclass(frozen=True)
class Answer:
    status: int
    commands: list[list[str]]
    said: str


def grpo(*words: str, **variables: str) -> Answer:
    environment = {name: value for name, value in os.environ.items() if name not in _UNDERSTOOD}
    done = subprocess.run(
        ["launch/grpo.sh", *words],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Answer(done.returncode, [shlex.split(line) for line in done.stdout.splitlines()], done.stderr)


def test_one_node_trains_without_starting_ray_itself():
    answer = grpo("--config", CONFIG, "--resume", "run.dir=/a b", "seed=1", "--print")
    assert answer.commands == [["hybrid-rl", "train", CONFIG, "--resume", "run.dir=/a b", "seed=1"]]
    assert "on loopback only" in answer.said


def test_the_machine_with_the_heads_address_is_the_head(here: str):
    answer = grpo("--nodes=3", f"--head-address={here}:7000", f"--config={CONFIG}", "steps=2", "--print")
    ray, train = answer.commands
    assert {"--head", f"--node-ip-address={here}", "--port=7000", "--include-dashboard=false"} <= set(ray)
    assert train == ["hybrid-rl", "train", CONFIG, "steps=2", f"cluster.address={here}:7000"]
    assert f"3 nodes (--nodes), head {here}:7000 (--head-address), this is the head (its address)" in answer.said


def test_one_nodes_head_may_be_on_loopback():
    answer = grpo("--nodes", "1", "--head-address", "127.0.0.1:7379", "--config", CONFIG, "--print")
    ray, train = answer.commands
    assert {"--head", "--node-ip-address=127.0.0.1", "--port=7379"} <= set(ray)
    assert train[-1] == "cluster.address=127.0.0.1:7379"
    assert "1 node (--nodes)" in answer.said


def test_another_machine_joins():
    answer = grpo("--nodes", "2", "--head-address", "198.51.100.7", "--config", CONFIG, "--print")
    assert answer.commands == [["ray", "start", "--block", "--address=198.51.100.7:6379"]]


def test_torchruns_variables(here: str):
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": here, "MASTER_PORT": "29500"}
    answer = grpo("--config", CONFIG, "--print", **variables)
    assert answer.commands == [["ray", "start", "--block", f"--address={here}:29500"]]
    assert f"2 nodes (NNODES), head {here}:29500 (MASTER_ADDR), this is node 1 (NODE_RANK)" in answer.said


def test_slurms_variables(here: str, tmp_path: Path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\n[ "$*" = "show hostnames n[1-3]" ] && printf "{here}\\nn2\\nn3\\n"\n')
    scontrol.chmod(0o755)
    variables = {"SLURM_NNODES": "3", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n[1-3]"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    answer = grpo("--config", CONFIG, "--print", PATH=path, **variables)
    assert f"3 nodes (SLURM_NNODES), head {here}:6379 (SLURM_JOB_NODELIST), this is the head (SLURM_NODEID)" in (
        answer.said
    )
    assert "--head" in answer.commands[0]


def test_flags_win(here: str):
    variables = {"NNODES": "8", "NODE_RANK": "5", "SLURM_NNODES": "4", "MASTER_ADDR": "198.51.100.7"}
    answer = grpo(
        "--config", CONFIG, "--nodes", "2", "--node-rank", "1", "--head-address", here, "--print", **variables
    )
    assert f"2 nodes (--nodes), head {here}:6379 (--head-address), this is node 1 (--node-rank)" in answer.said


def test_further_options_of_ray_start(here: str):
    answer = grpo(
        "--config", CONFIG, "--nodes", "2", "--head-address", here, "--print", HYBRID_RL_RAY_START="--num-cpus=4 --foo"
    )
    assert answer.commands[0][-2:] == ["--num-cpus=4", "--foo"]


REFUSED = {
    "no configuration": ([], {}, "--config FILE is needed"),
    "a configuration that is not there": (["--config", "no.yaml"], {}, "--config no.yaml cannot be read"),
    "an option without its value": (["--config"], {}, "--config needs a value"),
    "an unknown option": (["--config", CONFIG, "--node", "2"], {}, "there is no option --node"),
    "a word": (["--config", CONFIG, "fast"], {}, "'fast' is neither an option nor key=value"),
    "no nodes": (["--config", CONFIG, "--nodes", "0"], {}, "--nodes=0 is no number of nodes"),
    "an elastic number of nodes": (["--config", CONFIG], {"NNODES": "1:4"}, "NNODES=1:4 is no number of nodes"),
    "no head": (["--config", CONFIG, "--nodes", "2"], {}, "2 nodes need a head"),
    "a rank too high": (["--config", CONFIG, "--nodes", "2", "--node-rank", "2"], {}, "is no rank of 2 nodes"),
    "numbers that differ": (["--config", CONFIG], {"NNODES": "2", "SLURM_NNODES": "3"}, "NNODES=2 but SLURM_NNODES=3"),
    "a head on loopback": (
        ["--config", CONFIG, "--nodes", "2", "--head-address", "127.0.0.1"],
        {},
        "127.0.0.1 is loopback",
    ),
    "a head that is unknown": (
        ["--config", CONFIG, "--nodes", "2", "--head-address", "head.invalid"],
        {},
        "'head.invalid' is not known here",
    ),
    "a port for the superuser": (
        ["--config", CONFIG, "--nodes", "2", "--head-address", "198.51.100.7:80"],
        {},
        "not of the form HOST[:PORT]",
    ),
    "a head elsewhere": (
        ["--config", CONFIG, "--nodes", "2", "--head-address", "198.51.100.7", "--node-rank", "0"],
        {},
        "is no address of this machine",
    ),
    "another cluster": (
        ["--config", CONFIG, "--nodes", "2", "--head-address", "198.51.100.7", "cluster.address=auto"],
        {},
        "cluster.address is what --head-address says",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_in_one_line(case: str):
    words, variables, message = REFUSED[case]
    answer = grpo(*words, **variables)
    assert answer.status == 2
    assert message in answer.said
    assert answer.said.count("\n") == 1
    assert not answer.commands
