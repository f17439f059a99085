"""The files that a run leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.files import write_atomically
from hybrid_rl.types import ScoredGroup, TrainBatch


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.plan = path / "plan.json"
        self.plan_image = path / "plan.png"
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self.curve = path / "curve.png"
        self.routing = path / "routing.jsonl"
        self.routing_image = path / "routing.png"

    @staticmethod
    def create(config: Config, config_name: str) -> RunDirectory:
        """Make the directory: exactly `run.dir`, else `runs/<run.name or config name>-<time>`. Raises `ConfigError` if
        it holds a run already or cannot be written."""
        default = Path("runs") / f"{config.run.name or config_name}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunDirectory(Path(config.run.dir) if config.run.dir else default)
        if run.metrics.exists():
            raise ConfigError(
                f"run.dir={str(run.path)!r} holds a run already; choose another, or continue it with --resume"
            )
        try:
            run.rollouts.mkdir(parents=True, exist_ok=True)
            write_atomically(run.config, dump_config(config))
        except OSError as error:
            raise ConfigError(f"run.dir={str(run.path)!r} cannot be written: {error}") from None
        return run

    @staticmethod
    def open(config: Config) -> RunDirectory:
        """The directory `run.dir` of a run to resume. Raises `ConfigError` if there is none, or its settings differ."""
        if config.run.dir is None:
            raise ConfigError("--resume needs run.dir=DIRECTORY, the run to continue")
        run = RunDirectory(Path(config.run.dir))
        if not (run.config.is_file() and run.plan.is_file() and run.summary.is_file()):
            raise ConfigError(f"run.dir={config.run.dir!r} holds no run that can be resumed")
        now, then = yaml.safe_load(dump_config(config)), yaml.safe_load(run.config.read_text(encoding="utf-8"))
        changed = [k for k in now if now[k] != then.get(k) and k not in _MAY_CHANGE]
        if changed:
            flat_then, flat_now = _flatten(then), _flatten(now)
            details = "; ".join(
                f"{name}: {flat_then.get(name)} -> {value}"
                for name, value in flat_now.items()
                if name.split(".")[0] in changed and flat_then.get(name) != value
            )
            raise ConfigError(
                f"run.dir={config.run.dir!r} was started with other settings ({details}); resume it with its own: "
                f"hybrid-rl train {run.config} run.dir={config.run.dir} --resume"
            )
        return run

    def discard(self) -> None:
        """Remove what `create` made, where the run was refused before it began."""
        if not self.metrics.exists() and not self.plan.exists():
            self.config.unlink(missing_ok=True)
            for directory in (self.rollouts, self.path):
                with contextlib.suppress(OSError):  # it was there before and holds other things
                    directory.rmdir()

    def read_summary(self) -> dict[str, Any]:
        return json.loads(self.summary.read_text(encoding="utf-8"))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.summary, json.dumps(summary, indent=1) + "\n")

    def write_routing(self, step: int, updates: int, stepped: Mapping[str, tuple[int, ...]]) -> None:
        """How many updates a step made, and in how many of them each expert was stepped, by module. A step that is done
        again is written again."""
        with self.routing.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "updates": updates, "stepped": stepped}) + "\n")

    def read_routing(self) -> dict[int, tuple[int, dict[str, list[int]]]]:
        """What `write_routing` wrote, by step: the updates, and those that stepped each expert, by module."""
        if not self.routing.exists():
            return {}
        rows = [
            json.loads(line) for line in self.routing.read_text(encoding="utf-8").splitlines() if line.endswith("}")
        ]
        return {row["step"]: (row["updates"], row["stepped"]) for row in rows}

    def write_rollouts(self, step: int, groups: Sequence[ScoredGroup], advantages: Sequence[Sequence[float]]) -> None:
        """One line a completion: prompt, text, reward and its parts, advantage, how it ended, weight version, and which
        spans of its tokens the environment gave."""
        lines = [
            json.dumps(record(group, i) | {"advantage": row[i]}, default=str)
            for group, row in zip(groups, advantages, strict=True)
            for i in range(len(group.completions))
        ]
        (self.rollouts / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write_skipped(self, step: int, batch: TrainBatch) -> Path:
        """The mini-batches of a step whose update was skipped, for a look at them."""
        path = self.path / "skipped" / f"step_{step:06d}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps([[dataclasses.asdict(s) for s in m] for m in batch.mini_batches]))
        return path


def record(group: ScoredGroup, i: int) -> dict[str, Any]:
    """A completion and what was said of it, as files have it."""
    completion = group.completions[i]
    outcomes = {name: row[i] for name, row in group.outcomes.items()}
    return {
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "completion": completion.text,
        "reward": group.rewards_G[i],
        "rewards": {name: outcome.score for name, outcome in outcomes.items()},
        "failures": {name: outcome.detail for name, outcome in outcomes.items() if outcome.failed},
        "extra": {name: dict(outcome.extra) for name, outcome in outcomes.items() if outcome.extra},
        "tokens": len(completion.token_ids),
        "given": completion.given,
        "finish_reason": completion.finish_reason,
        "weight_version": completion.weight_version,
        "later_versions": completion.later_versions,
        "columns": group.prompt.columns,
    }


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


_MAY_CHANGE = ("run", "cluster", "tracking", "checkpoint", "reward")
"""Sections whose settings a resumed run may change: they decide nothing about what is trained, but for the limits of
`reward`, by which a completion may go unscored."""


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; a last line that a killed process left half-written is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
