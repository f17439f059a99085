"""A checkpoint directory is whole or not there, whenever the process is killed."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from hybrid_rl.checkpoint import LEARNER, STATE, WEIGHTS, TrainerState, checkpoints, load_state, save_checkpoint


def state(step: int) -> TrainerState:
    return TrainerState(step, 4 * step, "hash", 2, 2)


def write_learner(directory: str) -> None:
    Path(directory).mkdir()
    for rank in range(2):
        (Path(directory) / f"rank_{rank}_optim_states.pt").write_text("x")
    (Path(directory) / WEIGHTS).write_text("x")


def test_checkpoints_are_rotated_and_read_back(tmp_path: Path):
    for step in (2, 4, 10):
        path = save_checkpoint(tmp_path, state(step), write_learner, keep_last=2)
        assert load_state(path) == state(step)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000004", "step_000010"]
    assert {p.name for p in path.iterdir()} == {LEARNER, STATE, WEIGHTS}
    save_checkpoint(tmp_path, state(10), write_learner, keep_last=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000004", "step_000010"]


def test_a_rank_that_wrote_elsewhere_is_noticed(tmp_path: Path):
    with pytest.raises(RuntimeError, match="0 of 2 learner ranks"):
        save_checkpoint(tmp_path, state(1), lambda directory: Path(directory).mkdir(), keep_last=2)
    assert checkpoints(tmp_path) == []


def _killed(root: Path, at: str) -> None:
    """Save step 2 in a process that is gone when it reaches the call `at`."""

    def leave(*args: object, **kwargs: object) -> None:
        os._exit(9)

    learner = leave if at == "learner" else write_learner
    if at == "rename":
        Path.rename = leave  # type: ignore[method-assign, assignment]
    elif at != "learner":
        setattr(os, at, leave)
    save_checkpoint(root, state(2), learner, keep_last=3)


@pytest.mark.parametrize("at", ["learner", "fsync", "walk", "rename"])
def test_a_process_killed_while_saving_leaves_the_last_checkpoint(tmp_path: Path, at: str):
    save_checkpoint(tmp_path, state(1), write_learner, keep_last=3)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path, at))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000001"]
    assert load_state(checkpoints(tmp_path)[0]) == state(1)
    save_checkpoint(tmp_path, state(2), write_learner, keep_last=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000001", "step_000002"]
