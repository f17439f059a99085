"""What this process logs: in a file, so that the terminal shows the run's own lines alone.

`driver.log` has what Python code of this process warns of and, of this project's own code, also what it tells: starts
and stops, a line a step. Its own warnings are also shown. Workers' output is in files beside it (`cluster/logs.py`).
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from pathlib import Path

from hybrid_rl.redaction import scrub
from hybrid_rl.settings import ConfigError

OURS = ("hybrid_rl", "trainers", "rewards")
"""Loggers of this project's own code."""
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Scrubbed(logging.Formatter):
    """Without the environment's secrets, which the error of a reward or a client may quote."""

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


class _DriverLog(logging.FileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(Scrubbed(FORMAT))

    def handleError(self, record: logging.LogRecord) -> None:
        """On a full disk, `logging` would print a traceback for every line."""


def log_to(directory: Path) -> Path:
    """From now on, log to `driver.log` in `directory`, which is made; what is there is kept. Returns that file.

    Raises `ConfigError` if it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        log = _DriverLog(directory.resolve() / "driver.log")
    except OSError as error:
        raise ConfigError(f"logs cannot be written to {directory}: {error}") from None
    root = logging.getLogger()
    if (last := _log()) is not None:
        root.removeHandler(last)
        last.close()
    root.addHandler(log)
    logging.captureWarnings(True)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
        if logging.lastResort is not None:  # what shows warnings where nothing handles them, as it was until now
            logging.lastResort.setFormatter(Scrubbed("%(message)s"))
            logging.getLogger(name).addHandler(logging.lastResort)
    return Path(log.baseFilename)


def log_directory() -> Path:
    """Where logs go. Where no one has said, or that directory is gone, one that is removed as the process ends unless
    `keep_logs` was called."""
    if (log := _log()) is None or not Path(log.baseFilename).exists():
        directory = Path(tempfile.mkdtemp(prefix="hybrid-rl-logs-"))
        atexit.register(_discard, directory)
        log_to(directory)
        return directory
    return Path(log.baseFilename).parent


def keep_logs() -> None:
    """Leave logs where they are: something is going to be looked up there."""
    atexit.unregister(_discard)


def _discard(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def _log() -> _DriverLog | None:
    return next((h for h in logging.getLogger().handlers if isinstance(h, _DriverLog)), None)
