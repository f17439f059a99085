"""Checkpoints that a killed process cannot break: written aside, synced, then renamed.

`checkpoints/step_000010/` holds DeepSpeed's shards (trained weights, both optimizer groups' masters and moments) under
`learner/`, the trained weights alone, in fp32, as `weights.safetensors`, and `state.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybrid_rl.adaptation import WEIGHTS
from hybrid_rl.config import ConfigError
from hybrid_rl.files import sync_path, sync_tree

LEARNER = "learner"
STATE = "state.json"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands after a finished step."""

    step: int
    prompts_drawn: int
    plan_hash: str
    zero_stage: int
    world_size: int
    wall_seconds: float = 0.0
    """Spent on the run so far, over all its resumptions."""
    last_eval: Mapping[str, float] = field(default_factory=dict)
    """The latest held-out evaluation."""
    row: Mapping[str, float] = field(default_factory=dict)
    """The step's metrics, in case the process is killed before they are logged."""
    base: str = ""
    """Digest of the base model's parameters (`digest_of_all`); empty where it was not taken."""
    started_from: Mapping[str, Any] = field(default_factory=dict)
    """Of the export that the run started from: `format`, `step`, hash of its `plan`, and what that one started from."""


def save_checkpoint(root: Path, state: TrainerState, save_learner: Callable[[str], None], *, keep_last: int) -> Path:
    """Write the checkpoint of `state.step` under `root` and delete all but the last `keep_last`.

    `save_learner` makes the directory that it is given, and writes the learner's shards and `WEIGHTS` into it.
    """
    root.mkdir(parents=True, exist_ok=True)
    root = root.resolve()  # the ranks may have started in another directory
    for leftover in [*root.glob(".writing_*"), *root.glob(".old_*")]:
        shutil.rmtree(leftover)
    final = root / f"step_{state.step:06d}"
    aside = root / f".writing_{final.name}"
    aside.mkdir()
    save_learner(str(aside / LEARNER))
    shards = len(list((aside / LEARNER).rglob("*optim_states.pt")))
    if shards != state.world_size:
        raise RuntimeError(
            f"{shards} of {state.world_size} learner ranks wrote their optimizer state under {aside}; all ranks and "
            "the driver must see the run directory: put run.dir on a shared file system"
        )
    (aside / LEARNER / WEIGHTS).rename(aside / WEIGHTS)
    (aside / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
    sync_tree(aside)
    if final.exists():  # a resumed run repeats a step that was saved already
        _remove(final)
    aside.rename(final)
    sync_path(root)
    for old in checkpoints(root)[:-keep_last]:
        _remove(old)
    return final


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in root.glob("step_*") if (path / STATE).is_file())


def load_state(checkpoint: Path) -> TrainerState:
    """Raises `ConfigError` if it is damaged."""
    try:
        return TrainerState(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{checkpoint / STATE} cannot be read: {error}") from None


def _remove(checkpoint: Path) -> None:
    """Rename first, so that no half-deleted directory has a finished one's name."""
    old = checkpoint.with_name(f".old_{checkpoint.name}")
    checkpoint.rename(old)
    shutil.rmtree(old)
