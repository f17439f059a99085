"""Ray as the cluster: where it listens, how a death looks, what it refuses."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hybrid_rl.cluster import open_cluster
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.types import Resources, WorkerDied

LISTENERS = """
    import sys, psutil
    from hybrid_rl.cluster import Resources, open_cluster
    from hybrid_rl.config_file import load_config
    from hybrid_rl.learner import LearnerGroup
    from hybrid_rl.learner.worker import LearnerWorker

    config = load_config(sys.argv[1])
    cluster = open_cluster(config)
    cluster.reserve([Resources(0.5, 0)] * 2)
    transport, half = cluster.transport(config), Resources(0.5, 0)
    workers = [
        cluster.start(r, LearnerWorker, config, r, transport, name=f"learner-{r}", takes=half) for r in range(2)
    ]
    LearnerGroup(workers).connect(*cluster.endpoint(workers[0]))
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        for connection in process.net_connections("tcp"):
            if connection.status == "LISTEN":
                print("LISTENS", connection.laddr.ip, process.name())
    cluster.close()
"""


class Echo:
    def echo(self, value: object) -> object:
        return value

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self) -> None:
        raise KeyError("the worker's own error")


def test_a_local_cluster_is_a_new_one_that_listens_on_loopback_only(tiny_tree: dict, write_config):
    """In a process of its own, since Ray decides when it is imported."""
    command = [sys.executable, "-c", textwrap.dedent(LISTENERS), str(write_config(tiny_tree))]
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # of a short name: sockets are in it
        (Path(place) / "ray").mkdir()
        (Path(place) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")  # another one's, that is gone
        environment = {**os.environ, "RAY_TMPDIR": place}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    addresses = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("LISTENS")}
    assert len(done.stdout.splitlines()) > 5, "Ray's own services and the learner's"
    assert addresses
    assert all(ipaddress.ip_address(a.removeprefix("::ffff:")).is_loopback for a in addresses), done.stdout


def test_workers_answer_fail_and_die_as_their_handles_say(tiny_config: Config):
    cluster = open_cluster(tiny_config)
    try:
        with pytest.raises(ConfigError, match="needs 1000 CPUs"):
            cluster.reserve([Resources(1000, 0)])
        cluster.reserve([Resources(0.5, 0), Resources(0.5, 0)])
        worker = cluster.start(0, Echo, name="echo", takes=Resources(0.5, 0))
        assert worker.submit("echo", cluster.share(b"shared")).result() == b"shared"
        with pytest.raises(KeyError, match="the worker's own error"):
            worker.submit("fail").result()
        with pytest.raises(WorkerDied, match=r"echo did not answer within 0\.2 s"):
            worker.submit("sleep", 30).result(timeout=0.2)
        other = cluster.start(1, Echo, name="other", takes=Resources(0.5, 0))
        pid = other.submit("pid").result()
        pending = other.submit("sleep", 30)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="other"):
            pending.result()
        other.kill()
        replacement = cluster.start(1, Echo, name="other", takes=Resources(0.5, 0))
        assert replacement.submit("pid").result() != pid, "a dead worker's place can be taken again"
        late = replacement.submit("sleep", 30)
        for wait in (late.ready, late.result):
            with pytest.raises(InterruptedError, match="asked to end"), asked_to_end(0.5):
                wait(2.0)
    finally:
        cluster.close()


@contextmanager
def asked_to_end(seconds: float) -> Iterator[None]:
    """A signal arrives after `seconds`, whose handler raises."""

    def leave(*_: object) -> None:
        raise InterruptedError("asked to end")

    before = signal.signal(signal.SIGUSR1, leave)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
