"""Files that a killed process leaves whole: written aside, synced, then renamed."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: after a crash it holds either the old content or the new one."""
    aside = path.with_name(f".writing_{path.name}")
    aside.write_text(text, encoding="utf-8")
    sync_path(aside)
    aside.rename(path)
    sync_path(path.parent)


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
