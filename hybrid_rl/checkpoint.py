"""Checkpoints that a killed process cannot break: written aside, synced, then renamed.

`checkpoints/step_000010/` holds what each learner rank needs to go on (`learner/`), the trained weights alone, in fp32
(`weights.safetensors`), the plan, rollouts that were waiting to be trained on (`waiting.json`, asynchronous runs), and
`state.json`, which has the size and digest of all of these. Nothing in it is a pickle. Ranks write in the background:
until all have, `begun.json` says what it will be, by which `recover` can finish it when the run has ended.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import xxhash

from hybrid_rl.config import CheckpointConfig, ConfigError
from hybrid_rl.files import FileFacts, describe, sync_and_describe, sync_path, write_atomically
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.types import Completion

logger = logging.getLogger(__name__)

STATE = "state.json"
BEGUN = "begun.json"
"""What `STATE` will say, but for the files that ranks are still writing, which are `awaited`."""
PLAN = "plan.json"
WAITING = "waiting.json"
_FORMAT = 2
_NAME = re.compile(r"step_\d{6,}")
_ASIDE = re.compile(rf"\.writing_({_NAME.pattern})_[0-9a-f]+")


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands after a finished step."""

    step: int
    prompts_drawn: int
    plan_hash: str
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
    evaluated: int = 0
    """The step of `last_eval`."""
    layout: str = ""
    """Ranks and ZeRO stage of the learner, for people."""


class Saver(Protocol):
    """What writes the learner's state (`LearnerGroup`)."""

    def begin_save(self, checkpoint: str) -> Sequence[str]: ...

    def saved(self, wait: bool) -> Mapping[str, FileFacts] | None: ...


Waiting = Sequence[tuple[str, Sequence[Completion]]]
"""By prompt's id, completions that no step has trained on yet."""


@dataclass
class _Begun:
    state: TrainerState
    aside: Path
    files: dict[str, FileFacts]
    """Those that the driver wrote."""


class Checkpoints:
    """Those of one run. One at most is being written."""

    def __init__(self, root: Path, settings: CheckpointConfig, saver: Saver) -> None:
        self._root, self._settings, self._saver = root, settings, saver
        self._begun: _Begun | None = None
        self._given_up: list[Path] = []
        self.failed = 0
        """Those that could not be written."""
        self.last: int | None = None
        """Step of the latest that is finished."""

    def begin(self, state: TrainerState, plan: AdaptationPlan, waiting: Waiting = ()) -> None:
        """Save `state` and what the learner holds. Returns once that is copied, or with `checkpoint.background=false`
        written."""
        self.finish()
        root = self._root
        # What is still written of an earlier try at this step, on a machine that was cut off, is written elsewhere.
        aside = root / f".writing_{_name(state.step)}_{secrets.token_hex(4)}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in [*root.glob(".old_*"), *self._given_up]:
                _delete(leftover)
            aside.mkdir()
            plan.save(aside / PLAN)
            files = {PLAN: sync_and_describe(aside / PLAN)}
            if waiting:
                done = [[prompt, [asdict(c) for c in completions]] for prompt, completions in waiting]
                (aside / WAITING).write_text(json.dumps(done), encoding="utf-8")
                files[WAITING] = sync_and_describe(aside / WAITING)
        except OSError as error:
            self._give_up(state.step, aside, error)
            return
        # The ranks may have started in another directory.
        awaited = self._saver.begin_save(str(aside.resolve()))
        try:
            _write_json(aside / BEGUN, _tree(state, files) | {"awaited": sorted(awaited)})
        except OSError as error:
            logger.warning("if the run ended before step %d is saved, it could not be finished: %s", state.step, error)
        self._begun = _Begun(state, aside, files)
        if not self._settings.background:
            self.finish()

    def poll(self) -> None:
        """Finish the one that is being written, if all of it is there."""
        self._conclude(wait=False)

    def finish(self) -> None:
        """Wait for the one that is being written. One that fails is given up: it is counted, and the ones before it
        stay."""
        self._conclude(wait=True)

    def _conclude(self, wait: bool) -> None:
        if self._begun is None:
            return
        state, aside = self._begun.state, self._begun.aside
        try:
            written = self._saver.saved(wait)
            if written is None:
                return
            files = {**self._begun.files, **written}
            absent = next((name for name in files if not (aside / name).is_file()), None)
            if absent is not None:
                raise RuntimeError(
                    f"a learner rank wrote {absent}, and it is not under {aside}; all ranks and the driver must see "
                    "the run directory: put run.dir on a shared file system"
                )
            write_state(aside, state, files)
            _give_name(aside, self._root / _name(state.step))
        except OSError as error:
            self._begun = None
            self._give_up(state.step, aside, error)
            return
        self._begun, self.last = None, state.step
        try:
            self._rotate()
        except OSError as error:
            logger.warning("old checkpoints could not be deleted: %s", error)

    def _rotate(self) -> None:
        """Delete what is neither among the latest nor among the best; and later ones, whose steps are done again."""
        assert self.last is not None
        saved = checkpoints(self._root)
        valid = [path for path in saved if _step(path) <= self.last]
        kept = set(valid[-self._settings.keep_last :])
        if self._settings.keep_best:
            scored = [(_score(path), path) for path in valid]
            best = sorted((score, path) for score, path in scored if score is not None)
            kept |= {path for _, path in best[-self._settings.keep_best :]}
        for old in set(saved) - kept:
            _remove(old)

    def _give_up(self, step: int, aside: Path, error: OSError) -> None:
        self.failed += 1
        _delete(aside)
        self._given_up.append(aside)  # in which a rank that was slower may still write
        logger.error(
            "step %d could not be saved under %s: %s; training goes on, a resumed run would begin after step %d",
            *(step, self._root, error, self.last or 0),
        )


def write_state(checkpoint: Path, state: TrainerState, files: Mapping[str, FileFacts]) -> None:
    """Write what a checkpoint is, and the files that it consists of."""
    _write_json(checkpoint / STATE, _tree(state, files))


def _tree(state: TrainerState, files: Mapping[str, FileFacts]) -> dict[str, Any]:
    return {"format": _FORMAT, **asdict(state), "files": {name: asdict(facts) for name, facts in files.items()}}


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps({**tree, "digest": _digest(tree)}, indent=1) + "\n")


def _give_name(aside: Path, final: Path) -> None:
    """Make what was written aside, `STATE` last, the checkpoint of its step."""
    for mark in (BEGUN, f".writing_{BEGUN}"):
        (aside / mark).unlink(missing_ok=True)
    sync_path(aside)
    if final.exists():  # a resumed run repeats a step that was saved already
        _remove(final)
    aside.rename(final)
    sync_path(final.parent)


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = (path for path in root.glob("step_*") if _NAME.fullmatch(path.name) and (path / STATE).is_file())
    return sorted(found, key=_step)


def recover(root: Path) -> None:
    """Finish what a run that ended had written whole, and delete what it had not. Not for a run that goes on.

    Raises `ConfigError` if that cannot be told.
    """
    for aside in sorted(root.glob(".writing_step_*")):
        if (named := _ASIDE.fullmatch(aside.name)) is None:
            continue
        final = root / named[1]
        # A run begins after the latest that is whole: what is there of the same step is damaged.
        if final.exists() and damage(final) is None:
            _delete(aside)
            continue
        try:
            if not (aside / STATE).is_file():
                _complete(aside, final)
            _give_name(aside, final)
        except (FileNotFoundError, _NotWhole) as reason:
            logger.warning("%s was not written to its end, and is not gone on from: %s", final.name, reason)
            _delete(aside)
        except (OSError, ConfigError) as error:
            raise ConfigError(f"{error}; mend that, or delete {aside} and go on from the one before") from None


class _NotWhole(ValueError):
    """A checkpoint has not the files that it should have."""


def _complete(aside: Path, final: Path) -> None:
    """Write `STATE`. Raises `FileNotFoundError` or `_NotWhole` if something else is missing."""
    if not (aside / BEGUN).is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(aside / BEGUN))
    state, known, awaited = _load(aside / BEGUN)
    found = {name: describe(_file_of(aside, name)) for name in [*known, *awaited]}
    if _name(state.step) != final.name or found != found | known:
        raise _NotWhole(f"{aside / BEGUN} is of something else")
    write_state(aside, state, found)


def _file_of(checkpoint: Path, name: str) -> Path:
    """Raises `_NotWhole` if that is not in the checkpoint, `FileNotFoundError` if it is no file."""
    path = checkpoint / name
    if not path.resolve().is_relative_to(checkpoint.resolve()):
        raise _NotWhole(f"{checkpoint / STATE} names {name}, which is not in it")
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    return path


def latest(root: Path) -> Path | None:
    """The latest finished checkpoint, damaged or not."""
    return next(reversed(checkpoints(root)), None)


def latest_whole(root: Path, only: Collection[str] | None = None) -> tuple[Path, list[str]] | None:
    """The latest checkpoint without damage (in `only` these files), and what is wrong with later ones; `None` if there
    is none at all. Raises `ConfigError` if all are damaged."""
    problems: list[str] = []
    for path in reversed(checkpoints(root)):
        problem = damage(path, only)
        if problem is None:
            return path, problems
        problems.append(problem)
    if problems:
        raise ConfigError("no checkpoint is whole: " + "; ".join(problems[:4]))
    return None


def damage(checkpoint: Path, only: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint's files (`only` these), every byte of which is read; `None` if nothing is."""
    try:
        _, files, _ = _load(checkpoint / STATE)
        for name in files if only is None else only:
            if name not in files or describe(_file_of(checkpoint, name)) != files[name]:
                return f"{checkpoint / name} is not what was written"
    except FileNotFoundError as error:
        return f"{error.filename} is not what was written"
    except OSError as error:
        return f"{error.filename or checkpoint} cannot be read: {error.strerror or error}"
    except (ConfigError, _NotWhole) as error:
        return str(error)
    return None


def load_state(checkpoint: Path) -> TrainerState:
    """Raises `ConfigError` if it is damaged, or of another format."""
    return _load(checkpoint / STATE)[0]


def _load(path: Path) -> tuple[TrainerState, dict[str, FileFacts], list[str]]:
    """What `_write_json` wrote: the state, the files that were there, and those that were awaited. Raises `ConfigError`
    if it is damaged, or of another format."""
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        digest, version = tree.pop("digest", None), tree.get("format")
        if version != _FORMAT:
            raise ConfigError(
                f"{path} has format {version}, and this version reads {_FORMAT}; go on with the version of Hybrid-RL "
                "that wrote it"
            )
        if digest != _digest(tree):
            raise ValueError("it is not what was written")
        files = {name: FileFacts(**facts) for name, facts in tree.pop("files").items()}
        awaited = [str(name) for name in tree.pop("awaited", [])]
        del tree["format"]
        return TrainerState(**tree), files, awaited
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def load_waiting(checkpoint: Path) -> dict[str, tuple[Completion, ...]]:
    """Completions by prompt's id, that were waiting to be trained on."""
    path = checkpoint / WAITING
    if not path.is_file():
        return {}
    return {
        prompt: tuple(_completion(tree) for tree in completions)
        for prompt, completions in json.loads(path.read_text(encoding="utf-8"))
    }


def _completion(tree: Mapping[str, Any]) -> Completion:
    pairs = {name: tuple(tuple(pair) for pair in tree[name]) for name in ("later_versions", "given")}
    return Completion(**{**tree, "token_ids": tuple(tree["token_ids"]), "logprobs": tuple(tree["logprobs"]), **pairs})


def _digest(tree: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _score(checkpoint: Path) -> float | None:
    """Accuracy measured at its step; `None` where none was, or it cannot be read."""
    try:
        return load_state(checkpoint).row.get("eval/accuracy")
    except ConfigError:
        return None


def _remove(checkpoint: Path) -> None:
    """Rename first, so that no half-deleted directory has a finished one's name. Raises `OSError` if that fails."""
    old = checkpoint.with_name(f".old_{checkpoint.name}")
    checkpoint.rename(old)
    _delete(old)


def _delete(directory: Path) -> None:
    """What is left of it is tried again with the next checkpoint."""
    if not os.path.lexists(directory):
        return
    try:
        if directory.is_symlink():
            directory.unlink()
            return
        for mark in (STATE, BEGUN):  # first: what is half deleted is no checkpoint, nor one that can be finished
            (directory / mark).unlink(missing_ok=True)
        shutil.rmtree(directory)
    except OSError as error:
        logger.warning("%s is not needed any more and could not be deleted: %s", directory, error)
