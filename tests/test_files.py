"""Lines reach the disk whole and in order, whenever there is room again."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from hybrid_rl.files import Lines


class _Full:
    """A disk that takes three more bytes, and then none until it is emptied."""

    def __init__(self, file: Any) -> None:
        self._file, self.room = file, 3

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self.room = data[: self.room], self.room - len(data[: self.room])
        return self._file.write(taken)

    def fileno(self) -> int:
        return self._file.fileno()


def test_lines_that_there_was_no_room_for_come_before_the_next(tmp_path: Path):
    lines = Lines(tmp_path / "rows")
    lines.add("first")
    lines._file = disk = _Full(lines._file)  # type: ignore[assignment]
    for row in ("second", "third"):
        with pytest.raises(OSError, match="No space left"):
            lines.add(row)
    assert (tmp_path / "rows").read_text() == "first\nsec"
    disk.room = 1000
    lines.add("fourth")
    assert (tmp_path / "rows").read_text() == "first\nsecond\nthird\nfourth\n"
