"""Processes that call plugins: what they begin with, how they end, and what replaces them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hybrid_rl.plugins import Answer, Failure, PluginProcesses, nursery
from tests.plugins import calls
from tests.plugins.lineage import MARK, marked, settle

STOPPED = Answer([], Failure("crash", "was stopped"))


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All processes that a test starts have it, and none is left."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield mark
    assert not settle(mark, 0)


@pytest.fixture
def start(mark: str) -> Iterator[Callable[..., PluginProcesses]]:
    started: list[PluginProcesses] = []

    def start(workers: int = 1, timeout: float = 10.0, **settings) -> PluginProcesses:
        started.append(PluginProcesses(workers=workers, timeout=timeout, memory_mib=1024, **settings))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_values_come_in_order_and_those_before_a_failure_are_kept(start: Callable[..., PluginProcesses]):
    plugins = start(timeout=0.5)
    assert plugins.run(calls.echo, 1, "two", None, [3.0]) == Answer([1, "two", None, [3.0]], None)
    assert plugins.run(calls.echo, 1, {2}).values == [1]
    answer = plugins.run(calls.spread, 0, 60)
    assert answer == Answer([None], Failure("timeout", "took more than reward.timeout=0.5 s"))


def test_no_more_calls_are_under_way_than_there_are_workers(start: Callable[..., PluginProcesses]):
    plugins = start(workers=2)
    plugins.run(calls.echo)
    started = time.monotonic()
    asked = [plugins.schedule(calls.sleep, 0.4) for _ in range(4)]
    assert all(each.result() == Answer([0.4], None) for each in asked)
    assert 0.8 <= time.monotonic() - started < 2.0


def test_workers_that_die_while_idle_are_replaced_and_so_is_their_nursery(
    start: Callable[..., PluginProcesses], mark: str, caplog: pytest.LogCaptureFixture
):
    plugins = start(workers=2)
    for victims in (slice(0, 1), slice(1, 2), slice(0, 2)):
        [pids] = plugins.run(calls.where).values
        for pid in pids[victims]:
            os.kill(pid, signal.SIGKILL)
        settle(mark, 0, 0.5)
        answer = plugins.run(calls.where)
        assert answer.failure is None
        assert pids[0] != answer.values[0][0]
    assert "died while idle" in caplog.text
    assert "forked from died" in caplog.text
    assert len(settle(mark, 2)) <= 2


def test_a_stopped_worker_is_found_before_it_is_blamed(
    start: Callable[..., PluginProcesses], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hybrid_rl.plugins.processes._BEGIN_SECONDS", 0.5)
    plugins = start(timeout=1.0)
    [pids] = plugins.run(calls.where).values
    os.kill(pids[0], signal.SIGSTOP)
    assert plugins.run(calls.echo, 1) == Answer([1], None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_call_that_ends_the_nursery_fails_and_the_next_goes_on(
    start: Callable[..., PluginProcesses], number: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(nursery, "_FORK_SECONDS", 1.0)
    plugins = start(timeout=0.5)
    answer = plugins.run(calls.signal_the_nursery, number)
    assert answer.failure is not None
    assert plugins.run(calls.echo, 1) == Answer([1], None)


def test_memory_that_processes_share_is_counted_once(start: Callable[..., PluginProcesses]):
    plugins = start()
    assert plugins.run(calls.share, 400, 4, 0.5).failure is None
    used = "used more than reward.memory_mib=1024 MiB"
    assert plugins.run(calls.share, 1200, 0, 5.0).failure == Failure("crash", used)


def test_closing_while_calls_hang_takes_a_moment_and_leaves_nothing(start: Callable[..., PluginProcesses], mark: str):
    plugins = start(workers=2, timeout=60.0)
    answers: list[Answer] = []
    waiting = [
        threading.Thread(target=lambda: answers.append(plugins.run(calls.spread, 2, 60.0))) for _ in range(4)
    ]  # two are under way, two wait for a worker
    scheduled = plugins.schedule(calls.sleep, 60.0)
    for each in waiting:
        each.start()
    while len(marked(mark)) < 1 + 2 + 3:
        time.sleep(0.05)
    started = time.monotonic()
    plugins.close()
    assert time.monotonic() - started < 2.0
    for each in waiting:
        each.join(1.0)
    assert not settle(mark, 0, 1.0)
    assert [each.failure for each in answers] == [STOPPED.failure] * 4
    assert scheduled.cancelled() or scheduled.result().failure == STOPPED.failure
    assert plugins.run(calls.echo, 1) == STOPPED
    with pytest.raises(RuntimeError, match="were stopped"):
        plugins.schedule(calls.echo)
    plugins.close()
    assert not marked(mark), "nothing is started again"


def test_closing_while_an_import_hangs_takes_a_moment(start: Callable[..., PluginProcesses], tmp_path: Path):
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    plugins = start()
    plugins.run(calls.echo)
    errors: list[str] = []

    def load() -> None:
        try:
            plugins.preload(f"{tmp_path}/hangs.py:f")
        except RuntimeError as error:
            errors.append(str(error))

    loading = threading.Thread(target=load)
    loading.start()
    time.sleep(0.5)
    started = time.monotonic()
    plugins.close()
    assert time.monotonic() - started < 3.0
    loading.join(1.0)
    assert errors == ["plugin processes cannot be started: they were stopped"]


def test_what_waits_for_the_end_is_called_then(start: Callable[..., PluginProcesses], tmp_path: Path):
    plugins = start()
    plugins.run(calls.write_at_end, str(tmp_path / "end"))
    plugins.close()
    assert (tmp_path / "end").read_text() == "closed\n"


def test_a_caller_that_is_killed_leaves_nothing(mark: str):
    code = """
        import sys, threading, time
        from hybrid_rl.plugins import PluginProcesses
        from tests.plugins import calls

        plugins = PluginProcesses(workers=2, timeout=60.0, memory_mib=1024)
        for _ in range(2):
            threading.Thread(target=plugins.run, args=(calls.spread, 2, 60.0)).start()
        time.sleep(60)
    """
    caller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        until = time.monotonic() + 30
        while len(marked(mark)) < 1 + 1 + 2 * (1 + 2 + 1) and time.monotonic() < until:
            time.sleep(0.05)
        assert len(marked(mark)) >= 10
    finally:
        caller.kill()
        caller.wait()
    assert not settle(mark, 0)


def test_processes_that_make_a_plugin_ready_stay(start: Callable[..., PluginProcesses], mark: str):
    plugins = start()
    helper = plugins.check(calls.start_helper)
    plugins.run(calls.start_helper)
    assert len(settle(mark, 3)) == 3
    assert helper in marked(mark)


def test_a_worker_that_cannot_be_made_ready_fails_the_call(
    start: Callable[..., PluginProcesses], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plugins = start()
    first = (calls.hang_at_first, str(tmp_path / "begun"))
    assert plugins.run(calls.echo, 1, first=first) == Answer([1], None)
    [pids] = plugins.run(calls.where).values
    os.kill(pids[0], signal.SIGKILL)
    monkeypatch.setattr(nursery, "START_SECONDS", 1.0)
    answer = plugins.run(calls.echo, 1, first=first)
    assert answer.failure == Failure("timeout", "took more than 1 s to start")
    assert plugins.run(calls.echo, 1) == Answer([1], None), "another's call needs nothing of that"


def test_a_worker_is_made_ready_once_for_what_it_is_asked(start: Callable[..., PluginProcesses], tmp_path: Path):
    plugins = start()
    for name in "aabab":
        plugins.run(calls.echo, first=(calls.append, str(tmp_path / "ready"), name))
    plugins.run(calls.echo)
    assert (tmp_path / "ready").read_text() == "ab"


def test_memory_that_earlier_calls_kept_is_not_blamed_on_this_one(start: Callable[..., PluginProcesses]):
    plugins = start()
    assert plugins.run(calls.keep, 700, 0.0) == Answer([None], None)
    assert plugins.run(calls.keep, 700, 0.5) == Answer([None], None)


def test_a_call_that_lost_its_nursery_is_made_again(start: Callable[..., PluginProcesses], tmp_path: Path):
    assert start().run(calls.kill_the_nursery_at_first, str(tmp_path / "begun")) == Answer([1], None)


def test_where_no_process_can_be_had_the_call_fails_alone(start: Callable[..., PluginProcesses], tmp_path: Path):
    (tmp_path / "plugin.py").write_text(
        "import errno, os\nfork, asked = os.fork, []\n"
        "def once():\n"
        "    asked.append(1)\n"
        "    if len(asked) == 1: raise BlockingIOError(errno.EAGAIN, 'no place')\n"
        "    return fork()\n"
        "os.fork = once\ndef f(): ...\n"
    )
    plugins = start()
    [(_, parent)] = plugins.run(calls.where).values
    plugins.preload(f"{tmp_path}/plugin.py:f")
    failure = plugins.run(calls.echo, 1).failure
    assert failure is not None
    assert (failure.kind, "no place" in failure.detail) == ("crash", True)
    assert plugins.run(calls.where).values[0][1] == parent, "the same nursery"


def test_a_thread_that_goes_on_working_does_not_slow_later_calls(start: Callable[..., PluginProcesses]):
    plugins = start()
    [(before, _)] = plugins.run(calls.where).values
    plugins.run(calls.leave_spinning)
    time.sleep(0.3)
    [(after, _)] = plugins.run(calls.where).values
    assert after != before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", None),
        ("print('x' * (1 << 22))\nimport sys; print('y' * (1 << 22), file=sys.stderr)", None),
        ("import signal\nsignal.alarm(1); signal.signal(signal.SIGTERM, signal.SIG_IGN)", None),
        ("import os\nos.chdir('/'); os.environ['X'] = 'y'", None),
        ("raise ValueError('no')", "ValueError: no"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("import os\nos._exit(3)", "it ends the process, or takes too long"),
        ("import time\ntime.sleep(60)", "it ends the process, or takes too long"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", "it starts threads"),
        (
            "import ctypes\nc, thread = ctypes.CDLL(None), ctypes.c_ulong()\n"
            "c.pthread_create(ctypes.byref(thread), None, c.pause, None)",
            "it starts threads",
        ),
    ],
)
def test_what_cannot_be_imported_ahead_is_left_to_the_workers(
    start: Callable[..., PluginProcesses],
    tmp_path: Path,
    source: str,
    said: str | None,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    path = tmp_path / "plugin.py"
    path.write_text(source + "\ndef f(): ...\n")
    plugins = start()
    plugins.run(calls.echo)
    monkeypatch.setattr(nursery, "START_SECONDS", 1.5 if source.endswith("sleep(60)") else 60.0)
    plugins.preload(f"{path}:f")
    [threads] = plugins.run(calls.threads).values
    assert threads == 1
    if "alarm" in source:
        time.sleep(1.2)
    assert plugins.run(calls.echo, 1) == Answer([1], None)
    assert (said or "") in caplog.text
    assert ("cannot be imported ahead" in caplog.text) == (said is not None)
    assert capfd.readouterr().out == ""


def test_what_was_imported_ahead_is_there_at_once(start: Callable[..., PluginProcesses], tmp_path: Path):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.5)\ndef f(): ...\n")
    plugins = start(paths=[str(tmp_path)])
    [before] = plugins.run(calls.takes, "slow_to_import").values
    plugins.preload("slow_to_import:f")
    [after] = plugins.run(calls.takes, "slow_to_import").values
    assert before >= 0.5 > 0.1 > after
