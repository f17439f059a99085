"""What a worker prints, in a file of its own: by Python or by a library in C, and up to its last line.

The files are beside the driver's log. A worker on a machine that does not see that directory writes under its own
temporary one; its last lines are fetched when it dies, and the rest when the run ends.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import secrets
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hybrid_rl.logs import FORMAT, OURS, Scrubbed

_LINES = 12
"""Last lines of a log that are shown."""
_WIDTH = 200
"""Longest that one of them is shown, in characters."""
_FETCHED_BYTES = 1 << 20
"""As much of a log's end is brought from another machine."""
_START = re.compile(rb"=== \S+ starts .* OOM kills so far: (\d+) ===\n")
_NOISE = re.compile(r"^:(actor|task)_name:|^:job_id:|^Extension modules: |logging\.cc:\d+: |^(PC:)? +@ +0x")
"""What Ray writes for itself, and addresses within binaries."""


@dataclass(frozen=True)
class Remains:
    """What a worker that died left on its machine."""

    lines: tuple[str, ...]
    """The last ones of its log, since it was started."""
    out_of_memory: bool
    """Whether the kernel has killed a process there for want of memory since the worker was started."""


@dataclass(frozen=True)
class WorkerLogs:
    """Where each worker's output goes. Travels to the workers."""

    directory: Path
    """The driver's, absolute."""
    token: str
    """By which other machines see whether it is theirs too."""

    @staticmethod
    def open(directory: Path) -> WorkerLogs:
        logs = WorkerLogs(directory.resolve(), secrets.token_hex(8))
        logs._mark.write_text(logs.token, encoding="ascii")
        return logs

    @property
    def _mark(self) -> Path:
        return self.directory / ".token"

    @property
    def shared(self) -> bool:
        """Whether this machine sees the driver's directory."""
        try:
            return self._mark.read_text(encoding="ascii") == self.token
        except OSError:
            return False

    def path(self, worker: str) -> Path:
        """The log on this machine."""
        directory = self.directory if self.shared else Path(tempfile.gettempdir()) / f"hybrid-rl-logs-{self.token}"
        return directory / f"{worker}.log"

    def take(self, worker: str) -> None:
        """From now on, what this process and its children print goes to the worker's log. Where it cannot be opened,
        it stays where Ray puts it."""
        shown = logging.StreamHandler()
        shown.setFormatter(Scrubbed(FORMAT))
        for name in OURS:
            logging.getLogger(name).addHandler(shown)
        path = self.path(worker)
        start = f"=== {worker} starts {time.strftime('%Y-%m-%d %H:%M:%S')} on {socket.gethostname()}, process "
        start += f"{os.getpid()}, OOM kills so far: {_oom_kills()} ===\n"
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(log, start.encode())
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)

    def remains(self, worker: str) -> Remains:
        """What a worker that died on this machine left."""
        try:
            with self.path(worker).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as log:
                begin = max(log.rfind(b"=== " + worker.encode() + b" starts "), 0)
                start = _START.match(log[begin : begin + 1000])
                said = log[max(begin + (start.end() if start else 0), len(log) - _FETCHED_BYTES) :].decode(
                    errors="replace"
                )
        except (OSError, ValueError):  # there is none, or it is empty
            return Remains((), False)
        # A progress bar writes itself over and over on one line.
        whole = [line.rstrip().rpartition("\r")[2][:_WIDTH] for line in said.split("\n")]
        lines = [line for line in whole if line and not _NOISE.search(line)]
        # Behind that, Python's stack is told from its innermost call on.
        crash = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
        last = lines[:crash][-_LINES // 3 :] + lines[crash : crash + _LINES] if lines[crash:] else lines[-_LINES:]
        return Remains(tuple(last[:_LINES]), start is not None and _oom_kills() > int(start[1]))

    def unseen(self, workers: list[str]) -> dict[str, bytes]:
        """The ends of the logs on this machine, if the driver does not see them."""
        found: dict[str, bytes] = {}
        for path in [] if self.shared else [self.path(worker) for worker in workers]:
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(-min(_FETCHED_BYTES, path.stat().st_size), os.SEEK_END)
                found[path.stem] = file.read()
        return found

    def add(self, found: dict[str, bytes]) -> None:
        """Put what `unseen` found elsewhere beside the driver's log."""
        for worker, log in found.items():
            with (self.directory / f"{worker}.log").open("ab") as file:
                file.write(log)


def _oom_kills() -> int:
    """Processes of this machine that its kernel has killed for want of memory, in whatever control group."""
    try:
        counts = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in counts.splitlines() if line.startswith("oom_kill ")), 0)
