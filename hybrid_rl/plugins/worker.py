"""The called side: a nursery that imports plugins once, and the workers that it forks, which call them.

The nursery has one thread and runs no plugin's function, so forking it is safe and takes milliseconds: a worker that
had to be killed is replaced at once, with everything imported. A worker answers in JSON, which the caller can read
without trusting it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import pickle
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from hybrid_rl.plugins.tree import become_subreaper, children, die_with_parent, kill_descendants, kill_tree

Function = Callable[..., Iterator[Any]]
"""What a worker runs: its results, one after another, each of which restarts the time limit."""
LONGEST_MESSAGE = 1 << 26
"""Bytes of one answer."""
_LONGEST_REASON = 2000
_MOST_THREADS = 8
"""That a call may leave behind; a worker with more is replaced."""
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
    workers: dict[int, None] = {}
    _tell(caller, {"ready": True})
    while True:
        # Imports may have set their own.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        ready, _, _ = select.select([caller, wake_up], [], [])
        if wake_up in ready:
            os.read(wake_up, 4096)
            for pid, status in _ended():
                if pid in workers:
                    del workers[pid]
                    _tell(caller, {"ended": pid, "status": status})
            for orphan in set(children(os.getpid())) - workers.keys():
                kill_tree(orphan)
        if caller not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(caller, 1 << 16, 2)
        if not message:  # the caller is gone
            kill_descendants(os.getpid())
            os._exit(0)
        what, *rest = json.loads(message)
        if what == "load":
            _tell(caller, {"loaded": _load(*rest)})
            continue
        here = os.getpid()
        pid = os.fork()
        if pid == 0:
            caller.close()
            os.close(wake_up)
            os.close(woken)
            _work(here, *descriptors)
        workers[pid] = None
        for each in descriptors:
            os.close(each)
        _tell(caller, {"forked": pid})


def _load(module: str, function: str, *arguments: Any) -> str | None:
    """Why it failed, if it did."""
    try:
        getattr(importlib.import_module(module), function)(*arguments)
    except BaseException as error:
        return reason(error)
    return None


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
    try:
        signal.set_wakeup_fd(-1)
        os.setsid()
        die_with_parent(parent)
        become_subreaper()
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.close(output)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(i, "w", buffering=1, errors="replace", closefd=False) for i in (1, 2))
        faulthandler.enable(sys.stderr)
        connection = Connection(descriptor)
        own = set(threading.enumerate())
        while True:
            _reset_signals()
            function, arguments = pickle.loads(connection.recv_bytes())
            before = set(children(os.getpid()))
            try:
                for value in function(*arguments):
                    connection.send_bytes(json.dumps({"value": value}).encode())
                end: dict[str, Any] = {"end": None}
            except EOFError:
                end = {"end": "EOFError"}
            except BaseException as error:
                end = {"end": reason(error)}
            for left in set(children(os.getpid())) - before:
                kill_tree(left)
            end["worn"] = len([t for t in threading.enumerate() if t not in own]) > _MOST_THREADS
            connection.send_bytes(json.dumps(end).encode())
    except EOFError:  # no more calls
        for function in _at_end:
            with contextlib.suppress(Exception):
                function()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(0)


def _reset_signals() -> None:
    """Undo what a call did to signals, so that the next call does not pay for it."""
    for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        signal.setitimer(timer, 0)
    for number in (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's to handle
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def reason(error: BaseException) -> str:
    """The exception in a line."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."
