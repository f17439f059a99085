"""What launch/submit.sh refuses before anything is sent."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOBODY = "http://127.0.0.1:9"
CONFIG = "configs/quickstart.yaml"
ELSEWHERE = "model.path=/shared/model"


def submit(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["launch/submit.sh", "--address", NOBODY, *words],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", CONFIG, ELSEWHERE], "run.dir=None"),
        (["--", CONFIG, ELSEWHERE, "run.dir=runs/x"], "run.dir='runs/x'"),
        (["--", CONFIG, ELSEWHERE, "run.dir=/shared/x", "cluster.address=auto"], "cluster.address"),
        (["--", CONFIG, ELSEWHERE, "run.dir=/shared/x", "stepz=1"], "stepz"),
        (["--", CONFIG, "run.dir=/shared/x", "model.path=configs"], "model.path='configs'"),
        (["--working-dir", "nowhere", "--", CONFIG, "run.dir=/shared/x"], "--working-dir nowhere cannot be entered"),
        (["--working-dir", "docs", "--", "README.md", "run.dir=/shared/x"], "config file README.md"),
        (["--env", "SURELY_NOT_SET", "--", CONFIG, ELSEWHERE, "run.dir=/shared/x"], "--env SURELY_NOT_SET"),
        (["--env", "KEY=value", "--", CONFIG, ELSEWHERE, "run.dir=/shared/x"], "it takes a name"),
    ],
)
def test_wrong_input_is_refused_here(words: list[str], message: str):
    done = submit(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_server_that_is_not_there():
    done = submit("--env", "A_KEY", "--", CONFIG, ELSEWHERE, "run.dir=/shared/x", "--auto-resume", A_KEY="hunter2")
    assert done.returncode == 2
    assert f"--address {NOBODY} is no job server" in done.stderr
    assert "hunter2" not in done.stderr
