"""Workers that die on real Ray: whatever ended them, their own last lines and the cause come out."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from hybrid_rl.cluster import Cluster, open_cluster
from hybrid_rl.config import Config
from hybrid_rl.failures import explain
from hybrid_rl.logs import log_to
from hybrid_rl.types import Pending, Resources, WorkerDied, gather
from tests.hosts import Site, site  # noqa: F401

SHARE = Resources(0.1, 0)
MEMORY_GROUP = Path("/sys/fs/cgroup/memory")


class Mortal:
    def process(self) -> tuple[int, str]:
        return os.getpid(), Path("/proc/self/cmdline").read_text().strip("\0")

    def end(self, how: str) -> None:
        print("said in Python")
        os.write(2, b"said by a library\n")
        if how == "segfault":
            ctypes.string_at(0)
        elif how == "exit":
            os._exit(3)
        elif how == "raise":
            raise KeyError("its own")
        elif how == "lose its peer":
            raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")
        elif how == "fill its memory":
            group = MEMORY_GROUP / f"hybrid-rl-{os.getpid()}"
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(600 << 20))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            _ = [bytearray(b"1" * (50 << 20)) for _ in range(40)]
        else:
            time.sleep(60)


@contextmanager
def opened(config: Config, logs: Path) -> Iterator[Cluster]:
    """No fixture, since pytest changes standard output between a fixture and its test."""
    log_to(logs)
    with closing(open_cluster(config)) as cluster:
        cluster.reserve([Resources(1, 0)])
        yield cluster


def screen(pending: Pending) -> list[str]:
    with pytest.raises(Exception) as failed:  # noqa: PT011
        pending.result(60)
    return explain(failed.value).splitlines()


def test_the_dead_speak(tiny_config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    logs = tmp_path / "run" / "logs"
    with opened(tiny_config, logs) as cluster:
        ways = ["sleep", "segfault", "exit", "raise", "lose its peer"]
        workers = {how: cluster.start(0, Mortal, name=f"learner-{i}", takes=SHARE) for i, how in enumerate(ways)}
        address, port = cluster.endpoint(workers["sleep"])
        with pytest.raises(OSError, match="in use"):
            socket.create_server((address, port))
        pid, title = workers["sleep"].submit("process").result(60)
        assert title == "ray::learner-0.call"
        calls = {how: worker.submit("end", how) for how, worker in workers.items()}

        assert screen(calls["segfault"])[0].endswith("crashed: segmentation fault")
        lines = screen(calls["segfault"])
        assert "  learner-1 | said by a library" in lines
        assert any("in end" in line for line in lines), "where in Python"
        assert not any("@     0x" in line for line in lines), "no addresses"

        first, *lines = screen(calls["exit"])
        assert re.search(r"learner-2 \(\S+, process ", first)
        assert lines[:2] == ["  learner-2 | said in Python", "  learner-2 | said by a library"]

        first, place, *_ = screen(calls["raise"])
        assert first == "learner-3: KeyError: 'its own'"
        assert place.startswith("  at tests/cluster/test_deaths.py:")

        while "said by" not in (logs / "learner-0.log").read_text():
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match=r"learner-0 .* was killed from outside \(SIGKILL\), or ended"):
            gather([calls["lose its peer"], calls["sleep"]])

        until = time.monotonic() + 20
        while "A worker died" not in (logs / "driver.log").read_text():  # as Ray says it
            assert time.monotonic() < until
            time.sleep(0.1)
    shown = "".join(capfd.readouterr())
    assert "Traceback" not in shown
    assert "raylet" not in shown


@pytest.mark.slow
def test_the_kernel_s_want_of_memory_is_named(tiny_config: Config, tmp_path: Path):
    if not os.access(MEMORY_GROUP / "memory.limit_in_bytes", os.R_OK) or os.getuid() != 0:
        pytest.skip("needs root and control groups of version 1")
    with opened(tiny_config, tmp_path / "logs") as cluster:
        worker = cluster.start(0, Mortal, name="engine-0", takes=SHARE)
        pid, _ = worker.submit("process").result(60)
        try:
            first, *rest = screen(worker.submit("end", "fill its memory"))
        finally:
            (MEMORY_GROUP / f"hybrid-rl-{pid}").rmdir()
    assert re.match(r"memory \(RAM\) is full\. engine-0 \(\S+, process ", first)
    assert first.endswith("was killed by the kernel: its machine, or the container, was out of memory")
    assert any("rollout.max_concurrent" in line for line in rest)


FAR = """
    import os, sys, time
    from pathlib import Path
    from hybrid_rl.cluster import Resources, open_cluster
    from hybrid_rl.config_file import load_config
    from hybrid_rl.failures import explain
    from hybrid_rl.logs import log_to

    class Mortal:
        def end(self):
            os.write(2, b"said far away\\n")
            os.kill(os.getpid(), 9)

        def live(self):
            print("heard at the end", flush=True)
            return os.environ["GLOO_SOCKET_IFNAME"]

    log_to(Path(sys.argv[2]))
    cluster = open_cluster(load_config(sys.argv[1]))
    cluster.reserve([Resources(2, 0)])
    dead, alive = (cluster.start(0, Mortal, name=name, takes=Resources(1, 0)) for name in ("learner-0", "learner-1"))
    print("INTERFACE", alive.submit("live").result(60))
    try:
        dead.submit("end").result(60)
    except Exception as error:
        print(explain(error))
    cluster.close()
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_last_words_come_from_a_host_that_does_not_see_the_run(
    site: Site,  # noqa: F811
    tiny_tree: dict,
    write_config,
    tmp_path: Path,
):
    directory = tmp_path / "run" / "logs"
    directory.mkdir(parents=True)
    head, other = site.host(1), site.host(2, hides=[directory])
    head.start_ray(cpus=1)
    other.start_ray(head, cpus=2)
    script = tmp_path / "far.py"
    script.write_text(textwrap.dedent(FAR))
    config = write_config({**tiny_tree, "cluster": {"address": f"{head.address}:6379"}})
    words = [sys.executable, str(script), str(config), str(directory)]
    driver = head.start(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    shown, _ = driver.communicate(timeout=150)
    assert driver.returncode == 0, shown
    assert "INTERFACE eth0" in shown, "gloo is told the one that Ray uses"
    assert "learner-0 (10.77.0.2, process " in shown
    assert "  learner-0 | said far away" in shown
    assert "heard at the end" in (directory / "learner-1.log").read_text()
    assert "said far away" in (directory / "learner-0.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_cluster_that_asks_for_a_token_is_told_from_one_that_is_not_there(
    site: Site,  # noqa: F811
    tiny_tree: dict,
    write_config,
    tmp_path: Path,
):
    head = site.host(1)
    head.start_ray(cpus=1)
    config = write_config({**tiny_tree, "cluster": {"address": f"{head.address}:6379"}})
    script = tmp_path / "joins.py"
    script.write_text(textwrap.dedent(FAR))
    words = [sys.executable, str(script), str(config), str(tmp_path / "logs")]
    stranger = ["env", "-u", "RAY_AUTH_MODE", "-u", "RAY_AUTH_TOKEN", f"HOME={tmp_path}", *words]
    driver = head.start(*stranger, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    shown, _ = driver.communicate(timeout=150)
    said = shown.strip().splitlines()[-1]
    assert said.endswith("and set RAY_AUTH_MODE=token, here and before `ray start`")
    assert "InvalidAuthToken" not in shown, "Ray's own words are in the log"
    assert "InvalidAuthToken" in (tmp_path / "logs" / "driver.log").read_text()
