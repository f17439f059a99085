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


def born(pid: int) -> int:
    """When a process was started, in ticks since boot, which tells it from a later one of the same number; 0 if it is
    gone or a zombie."""
    state, _, started = _stat(pid)
    return 0 if state in "ZX" else started


def children(pid: int, *, zombies: bool = False) -> list[int]:
    """Children of all threads of a process; living ones only, unless zombies are asked for too."""
    if not _LISTED:  # a kernel without CONFIG_PROC_CHILDREN
        everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        found = [other for other in everyone if _stat(other)[1] == pid]
    else:
        found = []
        for task in _tasks(pid):
            with contextlib.suppress(OSError):
                found += [int(word) for word in (task / "children").read_text().split()]
    return [child for child in found if zombies or born(child)]


def descendants(pid: int) -> Iterator[int]:
    """Children, their children and so on, those that were started first before the others."""
    generation = [pid]
    while generation:
        generation = [child for parent in generation for child in children(parent)]
        yield from generation


def memory(pid: int, *, exact: bool = False) -> int:
    """Resident bytes of one process, 0 if it is gone. `exact`: what it shares with others, as forks do, counts in parts
    only, where the system tells; takes milliseconds a GiB."""
    if exact:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    return int(line.split()[1]) << 10
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return 0


def kill_descendants(pid: int, seconds: float = 2.0) -> None:
    """Kill all that a process started; they may still be ending when this returns."""
    until = time.monotonic() + seconds
    killed: set[int] = set()
    while (found := _stop_descendants(pid) - killed) and time.monotonic() < until:
        for each in found:
            _signal(each, signal.SIGKILL)
        killed |= found


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGSTOP)  # most of what forks in a rush, at one blow
        os.kill(pid, signal.SIGSTOP)  # it starts nothing new, and what it started goes on belonging to it
        kill_descendants(pid)
        os.kill(pid, signal.SIGKILL)


def _stop_descendants(pid: int) -> set[int]:
    """Stop each before its children are listed, so that none can fork away from under the count."""
    found: set[int] = set()
    to_list = [pid]
    while to_list:
        for child in children(to_list.pop(), zombies=True):
            _signal(child, signal.SIGSTOP)
            found.add(child)
            to_list.append(child)
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _stat(pid: int) -> tuple[str, int, int]:
    """State, parent and start of a process; state `X` if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[1]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return "X", 0, 0


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
