"""What launch/submit.sh refuses before anything is sent."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOBODY = "http://127.0.0.1:9"
CONFIG = "configs/quickstart.yaml"
ELSEWHERE = "model.path=/shared/model"


def submit(*words: str, address: str = NOBODY, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["launch/submit.sh", "--address", address, *words],
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


@pytest.fixture
def strict() -> Iterator[str]:
    """The address of a job server that lets nobody in, as Ray's does: 401 without a token, 403 with a wrong one."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403 if "Authorization" in self.headers else 401)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("variables", "which"),
    [
        ({"RAY_AUTH_TOKEN": "hunter2"}, "the token in RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN_PATH": "{}/mine"}, "the token in {}/mine (RAY_AUTH_TOKEN_PATH)"),
        ({"RAY_AUTH_TOKEN_PATH": "{}/none"}, "no token in {}/none (RAY_AUTH_TOKEN_PATH)"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "hunter2"}, "no token (RAY_AUTH_MODE=disabled)"),
    ],
)
def test_a_wrong_token_is_told_by_its_place(strict: str, variables: dict[str, str], which: str, tmp_path: Path):
    (tmp_path / "mine").write_text("hunter2")
    clean = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": ""}
    given = {name: value.format(tmp_path) for name, value in variables.items()}
    done = submit("--", CONFIG, ELSEWHERE, "run.dir=/shared/x", address=strict, **(clean | given))
    assert done.returncode == 2
    assert done.stderr == (
        f"submit: --address {strict} was shown {which.format(tmp_path)} and refuses it; it must be the token of the "
        "head (docs/cluster.md)\n"
    )
