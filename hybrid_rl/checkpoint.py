"""Checkpoints that a killed process cannot break: written aside, synced, then renamed.

`checkpoints/step_000010/` holds DeepSpeed's shards (trained weights, both optimizer groups' masters and moments) under
`learner/`, the trained weights alone as `weights.safetensors`, and `state.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hybrid_rl.types import WeightUpdate

LEARNER = "learner"
WEIGHTS = "weights.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands after a finished step."""

    step: int
    prompts_drawn: int
    plan_hash: str
    zero_stage: int
    world_size: int


def save_checkpoint(
    root: Path, state: TrainerState, update: WeightUpdate, save_learner: Callable[[str], None], *, keep_last: int
) -> Path:
    """Write the checkpoint of `state.step` under `root` and delete all but the last `keep_last`."""
    final = root / f"step_{state.step:06d}"
    aside = root / f".writing_{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_learner(str(aside / LEARNER))
    (aside / WEIGHTS).write_bytes(update.tensors)
    (aside / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
    _sync_tree(aside)
    if final.exists():  # a resumed run repeats a step that was saved already
        shutil.rmtree(final)
    aside.rename(final)
    _sync(root)
    for old in checkpoints(root)[:-keep_last]:
        shutil.rmtree(old)
    return final


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in root.glob("step_*") if (path / STATE).is_file())


def load_state(checkpoint: Path) -> TrainerState:
    return TrainerState(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for name in files:
            _sync(Path(directory) / name)
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
