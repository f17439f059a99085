"""Finding what was started, wherever it went: all of it has a mark in its environment."""

from __future__ import annotations

import os
import time
from pathlib import Path

MARK = "HYBRID_RL_TEST_LINEAGE"


def marked(mark: str) -> dict[int, tuple[int, str]]:
    """Number -> parent and state of each process whose environment at its start had the mark, but this one. Zombies
    have no environment; those of marked parents count."""
    found: dict[int, tuple[int, str]] = {}
    others: dict[int, tuple[int, str]] = {}
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            has = wanted in (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        (found if has else others)[int(entry.name)] = (int(parent), state)
    zombies = {pid: row for pid, row in others.items() if row[1] == "Z" and row[0] in (*found, os.getpid())}
    return found | zombies


def settle(mark: str, most: int, seconds: float = 3.0) -> dict[int, tuple[int, str]]:
    """The marked processes, once there are no more than so many, or after so many seconds."""
    until = time.monotonic() + seconds
    while len(found := marked(mark)) > most and time.monotonic() < until:
        time.sleep(0.05)
    return found
