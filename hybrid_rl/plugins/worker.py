"""The called side: a nursery that imports plugins once, and the workers that it forks, which call them.

The nursery has one thread and runs no plugin's function, so forking it is safe and takes milliseconds: a worker that
had to be killed is replaced at once, with everything imported. A worker answers in JSON, which the caller can read
without trusting it.

After each call a worker undoes what would reach the next: signal handlers and timers, the working directory,
environment variables, and child processes, however they detached themselves; what a *lasting* call, one that makes a
plugin ready, did to the latter three stays. So does what any call changes in Python's own memory, threads included; a
worker with many threads, or with some that go on working, is replaced: it ends instead of taking up a call.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import pickle
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from hybrid_rl.plugins.tree import become_subreaper, children, die_with_parent, kill_descendants, kill_tree

Function = Callable[..., Iterator[Any]]
"""What a worker runs: its results, one after another, each of which restarts the time limit."""
MUTE = 74
"""Status of a worker that could not answer, as it had lost what it answers through."""
_LONGEST_REASON = 2000
_MOST_THREADS = 40
"""That calls may leave behind in a worker; an executor of asyncio's has 32."""
_MOST_BUSY_SECONDS = 0.1
"""Of the processor, that threads left behind may take between calls, or half of that time if it is more."""
_at_end: list[Callable[[], Any]] = []


def at_end(function: Callable[[], Any]) -> None:
    """Have `function` called when the worker is told to end; not when it is killed."""
    _at_end.append(function)


def nursery(descriptor: int) -> None:
    """Serve a caller until it closes its end: `["load", module, function, ...]` runs a function, to import what it
    imports; `["fork"]` with two descriptors starts a worker on them."""
    caller = socket.socket(fileno=descriptor)
    become_subreaper()
    wake_up, woken = os.pipe()
    os.set_blocking(woken, False)
    workers: set[int] = set()
    with open(os.devnull, "w") as nowhere:  # what imports print; errors on the way here were shown
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    _tell(caller, {"ready": True})
    while True:
        _reset_signals()  # imports may have set their own
        signal.signal(signal.SIGCHLD, lambda *_: None)  # ends that came before this are seen below
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        for pid, status in _ended():
            if pid in workers:
                workers.discard(pid)
                _tell(caller, {"ended": pid, "status": status})
        for orphan in set(children(os.getpid())) - workers:
            kill_tree(orphan)
        ready, _, _ = select.select([caller, wake_up], [], [])
        if wake_up in ready:
            os.read(wake_up, 4096)
        if caller not in ready:
            continue
        try:
            message, descriptors, _, _ = socket.recv_fds(caller, 1 << 16, 2)
        except ConnectionError:  # it left without reading all it was told
            message, descriptors = b"", []
        if not message:  # the caller is gone
            kill_descendants(os.getpid())
            os._exit(0)
        what, *rest = json.loads(message)
        if what == "load":
            _tell(caller, {"loaded": _load(*rest)})
            continue
        here = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # the system has its limits
            pid = None
            _tell(caller, {"forked": None, "why": reason(error)})
        if pid == 0:
            caller.close()
            os.close(wake_up)
            os.close(woken)
            _work(here, *descriptors)
        for each in descriptors:
            os.close(each)
        if pid is not None:
            workers.add(pid)
            _tell(caller, {"forked": pid})


def _load(module: str, function: str, *arguments: Any) -> str | None:
    """Why forking after it would not do, if so."""
    try:
        getattr(importlib.import_module(module), function)(*arguments)
    except BaseException as error:
        return reason(error)
    for _ in range(5):  # one that was waited for is still listed for a moment
        if len(os.listdir("/proc/self/task")) == 1:  # also those that Python knows nothing of
            return None
        time.sleep(0.02)
    return "it starts threads"


def _ended() -> Iterator[tuple[int, int]]:
    """Children that ended: number, and exit status or minus the signal."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found[0], os.waitstatus_to_exitcode(found[1])


def _tell(caller: socket.socket, message: Any) -> None:
    with contextlib.suppress(OSError):  # the caller's end is seen at the next read
        caller.sendall(json.dumps(message).encode() + b"\n")


def _work(parent: int, descriptor: int, output: int) -> None:
    """Be a worker."""
    status = MUTE
    try:
        signal.set_wakeup_fd(-1)
        os.setsid()
        die_with_parent(parent)
        become_subreaper()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # where memory runs out, it is this one's turn and not the trainer's
            Path("/proc/self/oom_score_adj").write_text("1000")
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.close(output)
        os.set_inheritable(descriptor, False)
        faulthandler.enable(2)
        _serve(cast(BinaryIO, socket.socket(fileno=descriptor).makefile("rwb")))
        status = 0
    finally:
        os._exit(status)


def _serve(caller: BinaryIO) -> None:
    """Answer calls until there are no more. Raises `OSError` if the caller cannot be reached."""
    own = set(threading.enumerate())
    idle, busy = 0.0, 0.0
    while True:
        _reset_signals()
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(i, "w", buffering=1, errors="replace", closefd=False) for i in (1, 2))
        since, spent = time.monotonic(), time.process_time()
        try:
            function, arguments, lasting = pickle.load(caller)
        except EOFError:
            break
        if set(threading.enumerate()) - own:
            idle, busy = idle + time.monotonic() - since, busy + time.process_time() - spent
            if busy > max(_MOST_BUSY_SECONDS, idle / 2):  # what calls left behind would slow all others
                break
        _say(caller, {"begun": True})
        before = _Surroundings()
        end, said = None, 0
        try:
            try:
                for value in function(*arguments):
                    _say(caller, {"value": value, "number": said})
                    said += 1
            finally:
                _reset_signals()
        except BaseException as error:
            end = reason(error)
        if not lasting:
            before.restore()
        worn = sum(thread not in own for thread in threading.enumerate()) > _MOST_THREADS
        _say(caller, {"end": end, "worn": worn, "number": said})
    for function in _at_end:
        with contextlib.suppress(Exception):
            function()
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def _say(caller: BinaryIO, message: Any) -> None:
    caller.write(json.dumps(message).encode() + b"\n")
    caller.flush()


class _Surroundings:
    """What of a process a call may change for the next one."""

    def __init__(self) -> None:
        self._children = set(children(os.getpid(), zombies=True))
        self._environment = dict(os.environ)
        self._directory = "/"
        with contextlib.suppress(OSError):  # it was removed
            self._directory = os.getcwd()

    def restore(self) -> None:
        if os.environ != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)
        with contextlib.suppress(OSError):
            os.chdir(self._directory)
        _end_children(self._children)


def _end_children(kept: Collection[int], passes: int = 8) -> None:
    """Kill all other children, and what these leave behind."""
    for _ in range(passes):
        left = set(children(os.getpid(), zombies=True)).difference(kept)
        if not left:
            return
        for pid in left:
            kill_tree(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _reset_signals() -> None:
    """Undo what a call did to signals, so that the next call does not pay for it."""
    for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        signal.setitimer(timer, 0)
    for number in (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's to handle
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def reason(error: BaseException) -> str:
    """The exception in a line, of what any file can hold."""
    name = type(error).__name__
    try:
        said = str(error)
    except BaseException:
        said = "(its message cannot be read)"
    said = " ".join(said[: 2 * _LONGEST_REASON].split()).encode(errors="replace").decode()
    text = f"{name}: {said}" if said else name
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."
