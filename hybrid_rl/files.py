"""Files that a killed process leaves whole: written aside, synced, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Replace `path` by what is written to the path that this gives: after a crash it is the old file, or the new."""
    aside = path.with_name(f".writing_{path.name}")
    yield aside
    sync_path(aside)
    aside.rename(path)
    sync_path(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: after a crash it holds either the old content or the new one."""
    with written_atomically(path) as aside:
        aside.write_text(text, encoding="utf-8")


class Lines:
    """A file that lines are added to. What there is no room for is kept, and written before the next."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def add(self, line: str) -> None:
        """Write a line, and bring it to the disk. Raises `OSError` if that fails."""
        self._waiting += line.encode() + b"\n"
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def sync_tree(root: Path) -> None:
    """Bring everything below `root` to the disk."""
    for directory, _, names in os.walk(root):
        for name in names:
            sync_path(Path(directory) / name)
        sync_path(Path(directory))


def sync_path(path: Path) -> None:
    """Bring one file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class FileFacts:
    """What a file was when it was written, or found whole."""

    size: int
    digest: str
    """xxh3, 128 bits: it detects damage, not malice."""


def describe(path: Path) -> FileFacts:
    """Size and digest of a file's content."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
        return FileFacts(file.tell(), hasher.hexdigest())


def sync_and_describe(path: Path) -> FileFacts:
    """Bring a file to the disk, and say what it is."""
    sync_path(path)
    return describe(path)


_CHUNK = 2**22
