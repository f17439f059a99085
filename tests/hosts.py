"""Hosts on one machine: namespaces of network, processes and mounts, which talk over real sockets.

Each has its own processes, loopback, `/tmp/ray` and `/dev/shm`; other files are those of the machine, as on hosts with
a shared file system. Needs to be root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

_NETWORK = "10.77.0"
_GCS_PORT = 6379
_TOKEN = secrets.token_hex(32)
"""Without it, Ray would look for one in the user's home, and make it a cluster with or without one by what is there."""


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=30)


class Host:
    """A host that is up from when it is made."""

    def __init__(self, number: int, bridge: str, scratch: Path, hides: Sequence[Path] = ()) -> None:
        """`hides`: directories that are empty there."""
        self.address = f"{_NETWORK}.{number}"
        self._port = f"{bridge}p{number}"
        self._scratch = scratch / f"host-{number}-{time.monotonic_ns()}"
        (self._scratch / "ray").mkdir(parents=True)
        self._log = (self._scratch / "ray.log").open("w")
        self._unshare = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "infinity"]
        )
        self._init = self._first_process()
        # In a namespace of its own, the device goes with it.
        _run(*f"ip link add {self._port} type veth peer name eth0 netns {self._init}".split())
        _run(*f"ip link set {self._port} master {bridge} up".split())
        for words in ("link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up"):
            self.run("ip", *words.split())
        self.run(*f"ip route add default via {_NETWORK}.254".split())  # by which Ray finds its own address
        Path("/tmp/ray").mkdir(exist_ok=True)
        self.run("mount", "--bind", str(self._scratch / "ray"), "/tmp/ray")
        for directory in ("/dev/shm", *map(str, hides)):
            self.run("mount", "-t", "tmpfs", "tmpfs", directory)

    def _first_process(self) -> int:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "sleep\n":
                return int(children[0])
            time.sleep(0.02)
        raise TimeoutError("no namespace was made")

    def _inside(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self._init), "--net", "--mount", "--pid", f"--wd={os.getcwd()}", *words]

    def run(self, *words: str) -> None:
        _run(*self._inside(*words))

    def start(self, *words: str, **named: object) -> subprocess.Popen[str]:
        return subprocess.Popen(self._inside(*words), text=True, env=_ray_environment(), **named)  # type: ignore[call-overload]

    def start_ray(self, head: Host | None = None, *, cpus: int) -> None:
        """Start Ray, as a head or joining one, and wait until it has."""
        where = ["--head", f"--port={_GCS_PORT}", "--include-dashboard=false"]
        if head is not None:
            where = [f"--address={head.address}:{_GCS_PORT}"]
        ray = str(Path(sys.executable).with_name("ray"))
        common = [f"--node-ip-address={self.address}", f"--num-cpus={cpus}", "--object-store-memory=200000000"]
        self.start(ray, "start", *where, *common, "--block", stdout=self._log, stderr=self._log)
        until = time.monotonic() + 90
        while "Ray runtime started" not in (said := (self._scratch / "ray.log").read_text()):
            assert time.monotonic() < until, said
            time.sleep(0.2)

    def link(self, state: str) -> None:
        """Plug its network cable `up` or `down`."""
        _run("ip", "link", "set", self._port, state)

    def lose(self) -> None:
        """As if its power failed."""
        self._unshare.kill()
        self._unshare.wait()
        with contextlib.suppress(subprocess.CalledProcessError):  # mostly it is gone with the namespace
            _run("ip", "link", "delete", self._port)
        self._log.close()


def _ray_environment() -> Mapping[str, str]:
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
    # A machine that says nothing is given up after 4 times 5 s; by Ray's defaults, after 5 times 10 s.
    settings |= {"RAY_health_check_timeout_ms": "5000", "RAY_health_check_failure_threshold": "4"}
    # Set where this process has a cluster of its own machine alone.
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    return {**inherited, **settings}


class Site:
    """Some hosts on one wire."""

    def __init__(self, scratch: Path) -> None:
        self._bridge = f"hr{os.getpid()}"
        self._scratch = scratch
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "link", "set", self._bridge, "up")
        self._hosts: dict[int, Host] = {}

    def host(self, number: int, hides: Sequence[Path] = ()) -> Host:
        """A new host at this number's address; one that was there must be lost."""
        self._hosts[number] = Host(number, self._bridge, self._scratch, hides)
        return self._hosts[number]

    def close(self) -> None:
        for host in self._hosts.values():
            host.lose()
        _run("ip", "link", "delete", self._bridge)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Skips the test where namespaces cannot be made."""
    try:
        _run("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "true")
        made = Site(tmp_path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield made
    made.close()
