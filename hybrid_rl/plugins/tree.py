"""A process and all it started, whatever groups and sessions these went to. Linux only.

A worker is a *subreaper* (prctl(2)): what a child of it leaves behind becomes its own child, so that a walk from the
worker misses nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LISTED = Path(f"/proc/self/task/{os.getpid()}/children").exists()


def become_subreaper() -> None:
    """Orphans among the descendants of this process become its children from now on."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that forked this process, of process `parent`, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def children(pid: int) -> list[int]:
    """Living children of all threads of a process."""
    if not _LISTED:  # a kernel without CONFIG_PROC_CHILDREN
        everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return [other for other in everyone if _state(other)[1] == pid and _alive(other)]
    found = []
    for task in _tasks(pid):
        with contextlib.suppress(OSError):
            found += [int(word) for word in (task / "children").read_text().split()]
    return [child for child in found if _alive(child)]


def descendants(pid: int) -> Iterator[int]:
    """Children, their children and so on."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def memory(pid: int) -> int:
    """Resident bytes of one process, 0 if it is gone."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return 0


def kill_descendants(pid: int, seconds: float = 2.0) -> None:
    """Kill all that a process started. They are stopped first, so that none can fork away from under the count."""
    until = time.monotonic() + seconds
    while (found := list(descendants(pid))) and time.monotonic() < until:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for each in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(each, number)


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # it starts nothing new, and what it started goes on belonging to it
        kill_descendants(pid)
        os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    return _state(pid)[0] not in "ZX"


def _state(pid: int) -> tuple[str, int]:
    """State and parent of a process; `X` if it is gone."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return "X", 0
    return state, int(parent)


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
