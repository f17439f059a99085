"""A run on a disk that is full for some of its steps, a real one of a few MiB: no step is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid_rl.checkpoint import Checkpoints, damage, latest
from hybrid_rl.config_file import parse_config
from hybrid_rl.run_directory import read_metrics
from tests.trainers.test_grpo import check_rows, inline, learnable  # noqa: F401
from trainers.grpo import train

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """64 MiB, in which a run of a few small steps has room."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a file system")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_disk_that_is_full_for_a_while_costs_no_step(
    learnable: dict,  # noqa: F811
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    begin, ballast = Checkpoints.begin, disk / "ballast"

    def fill(checkpoints: Checkpoints, state: Any, *rest: Any) -> None:
        if state.step == 2:
            checkpoints.finish()
            with ballast.open("wb", buffering=0) as file:
                for size in (2**20, 2**12, 1):
                    while _fits(file, size):
                        pass
        begin(checkpoints, state, *rest)
        if state.step == 4:
            checkpoints.finish()
            ballast.unlink()

    def _fits(file: Any, size: int) -> bool:
        try:
            return file.write(bytes(size)) == size
        except OSError:
            return False

    monkeypatch.setattr(Checkpoints, "begin", fill)
    assert os.statvfs(disk).f_bsize * os.statvfs(disk).f_blocks == 2**26
    tree = inline(learnable, disk / "run", steps=6, checkpoint={"every": 1, "keep_last": 2})
    run = train(parse_config(tree), name="full")
    rows = read_metrics(run.metrics)
    check_rows(rows, 6)
    assert [row["faults/failed_checkpoints"] for row in rows] == [0, 0, 1, 1, 1, 0]
    assert sum(row["faults/unwritten_files"] for row in rows) > 0
    newest = latest(run.checkpoints)
    assert newest is not None
    assert (newest.name, damage(newest)) == ("step_000006", None)
    assert "No space left on device" in capsys.readouterr().err
