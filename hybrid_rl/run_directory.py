"""The files that a run leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.files import write_atomically
from hybrid_rl.machine import machine_facts
from hybrid_rl.redaction import json_lines, scrub_tree
from hybrid_rl.types import ScoredGroup, TrainBatch

logger = logging.getLogger(__name__)


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.plan = path / "plan.json"
        self.plan_image = path / "plan.png"
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts"
        self.evaluations = path / "evaluations"
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self.curve = path / "curve.png"
        self.routing = path / "routing.jsonl"
        self.routing_image = path / "routing.png"
        self.report = path / "report.html"
        self.machine = path / "machine.json"
        self.logs = path / "logs"
        self.lock = path / ".lock"
        self._made: list[Path] = []
        """What `create` made that was not there."""
        self._settings_before: Path | None = None
        """Where settings are kept that `create` replaced."""

    @staticmethod
    def create(config: Config, config_name: str, *, again: bool = False) -> RunDirectory:
        """Make the directory: exactly `run.dir`, else `runs/<run.name or config name>-<time>`. Raises `ConfigError` if
        it holds a run already, other than one that is to begin `again`, or cannot be written."""
        default = Path("runs") / f"{config.run.name or config_name}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunDirectory(Path(config.run.dir) if config.run.dir else default)
        if not again:
            run.check_free()
        made = (run.config, run.lock, run.logs, run.rollouts, run.path)
        run._made = [path for path in made if not path.exists()]
        try:
            run.rollouts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.dir={str(run.path)!r} cannot be written: {error}") from None
        return run

    def begin(self, config: Config, *, again: bool = False) -> None:
        """Write down the settings of a new run, when this process is `alone`. Raises `ConfigError` as `create` does."""
        if not again:
            self.check_free()
        try:
            self._write_settings(config)
        except OSError as error:
            raise ConfigError(f"run.dir={str(self.path)!r} cannot be written: {error}") from None

    def check_free(self) -> None:
        """Raises `ConfigError` if it holds a run."""
        if self.metrics.exists():
            raise ConfigError(
                f"run.dir={str(self.path)!r} holds a run already; choose another, or continue it with --resume (or "
                "--auto-resume, which begins it again where it has no checkpoint)"
            )

    @staticmethod
    def open(config: Config) -> RunDirectory:
        """The directory `run.dir` of a run to resume. Raises `ConfigError` if there is none, or its settings differ."""
        if config.run.dir is None:
            raise ConfigError("--resume needs run.dir=DIRECTORY, the run to continue")
        run = RunDirectory(Path(config.run.dir))
        if not (run.config.is_file() and run.plan.is_file() and run.summary.is_file()):
            raise ConfigError(f"run.dir={config.run.dir!r} holds no run that can be resumed")
        changed = [
            line + " (only with a constant learner.schedule and without AdaLoRA)" * (name == "steps")
            for name, line in run._changes(config)
            if not _may_change(name, config)
        ]
        if changed:
            shown = "".join(f"\n  {line}" for line in changed[:8])
            more = f"\n  and {len(changed) - 8} more" if len(changed) > 8 else ""
            raise ConfigError(
                f"run.dir={config.run.dir!r} was started with other settings; resume it with its own: "
                f"hybrid-rl train {run.config} run.dir={config.run.dir} --resume{shown}{more}"
            )
        return run

    def _changes(self, config: Config) -> list[tuple[str, str]]:
        """Settings that are not those of `config.yaml`: the name of each, and what it was and is."""
        try:
            then = flatten(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise ConfigError(f"{self.config} cannot be read ({error}); restore it, or start a new run") from None
        now = flatten(yaml.safe_load(dump_config(config)))
        names = [name for name in dict.fromkeys([*now, *then]) if now.get(name) != then.get(name)]
        return [(name, f"{name}: {then.get(name)} -> {now.get(name)}") for name in names]

    @property
    def steps(self) -> int:
        """Of the run, as it was last started or resumed."""
        return yaml.safe_load(self.config.read_text(encoding="utf-8"))["steps"]

    def change_settings(self, config: Config) -> None:
        """Write down the settings that a resumed run goes on with; those before are kept beside them."""
        if not (changes := self._changes(config)):
            return
        logger.warning("settings of the run were changed: %s", "; ".join(line for _, line in changes))
        self._write_settings(config)

    def _write_settings(self, config: Config) -> None:
        """Others that are there are kept beside them."""
        text = dump_config(config)
        if self.config.exists() and (before := self.config.read_text(encoding="utf-8")) != text:
            number = 1 + len(list(self.path.glob("config.*.yaml")))
            self._settings_before = self.path / f"config.{number}.yaml"
            write_atomically(self._settings_before, before)
        write_atomically(self.config, text)

    def discard(self) -> None:
        """Remove what `create` made, where the run was refused before it began."""
        if self.metrics.exists() or self.plan.exists():
            return
        if self._settings_before is not None:
            self._settings_before.rename(self.config)
        for path in self._made:
            if path in (self.config, self.lock):
                path.unlink(missing_ok=True)
            elif path == self.logs:
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # it holds other things by now
                    path.rmdir()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from training in this directory. The lock ends with the process, however that ends.

        Raises `ConfigError` if another one does.
        """
        try:
            file = self.lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.dir={str(self.path)!r} cannot be written: {error}") from None
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise ConfigError(
                        f"run.dir={str(self.path)!r} is in use: {holder} trains in it; wait for it, stop it, or choose "
                        f"another. If its machine is gone, delete {self.lock}"
                    ) from None
                logger.warning("%s cannot be locked (%s): see to it that no other run uses it", self.path, error)
            with contextlib.suppress(OSError):  # who holds it is for the message alone
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            yield

    def identity(self) -> str:
        """By which trackers know the run: the same for as long as its directory is there."""
        path = self.path / "tracking_id"
        if not path.exists():
            write_atomically(path, f"{secrets.token_hex(8)}\n")
        return path.read_text(encoding="utf-8").strip()

    def write_machine(self) -> None:
        """What the run runs on, since it was last started or resumed."""
        write_atomically(self.machine, json.dumps(machine_facts(), indent=1) + "\n")

    def rollouts_of(self, step: int) -> Path:
        return self.rollouts / f"step_{step:06d}.jsonl"

    def read_summary(self) -> dict[str, Any]:
        return json.loads(self.summary.read_text(encoding="utf-8"))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.summary, json.dumps(summary, indent=1) + "\n")

    def write_routing(self, step: int, updates: int, stepped: Mapping[str, tuple[int, ...]]) -> None:
        """How many updates a step made, and in how many of them each expert was stepped, by module. A step that is done
        again is written again."""
        cut = self.routing.exists() and not self.routing.read_bytes().endswith(b"\n")
        with self.routing.open("a", encoding="utf-8") as file:  # a killed process may have left half a line
            file.write("\n" * cut + json.dumps({"step": step, "updates": updates, "stepped": stepped}) + "\n")

    def read_routing(self) -> dict[int, tuple[int, dict[str, list[int]]]]:
        """What `write_routing` wrote, by step: the updates, and those that stepped each expert, by module."""
        if not self.routing.exists():
            return {}
        rows = []
        for line in self.routing.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return {row["step"]: (row["updates"], row["stepped"]) for row in rows}

    def write_rollouts(self, step: int, groups: Sequence[ScoredGroup], advantages: Sequence[Sequence[float]]) -> None:
        """One line a completion: prompt, text, reward and its parts, advantage, how it ended, weight version, and which
        spans of its tokens the environment gave."""
        lines = json_lines(
            record(group, i) | {"advantage": row[i]}
            for group, row in zip(groups, advantages, strict=True)
            for i in range(len(group.completions))
        )
        self.rollouts_of(step).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def evaluation_of(self, step: int) -> Path:
        return self.evaluations / f"step_{step:06d}.json"

    def write_evaluation(self, step: int, problems: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """The score of every held-out problem, by set and metric: what two runs are compared by, problem by problem."""
        self.evaluations.mkdir(exist_ok=True)
        write_atomically(self.evaluation_of(step), json.dumps(problems) + "\n")

    def skipped_of(self, step: int) -> Path:
        return self.path / "skipped" / f"step_{step:06d}.json"

    def write_skipped(self, step: int, batch: TrainBatch) -> None:
        """The mini-batches of a step whose update was skipped, for a look at them."""
        path = self.skipped_of(step)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps([[dataclasses.asdict(s) for s in m] for m in batch.mini_batches]))


def record(group: ScoredGroup, i: int) -> dict[str, Any]:
    """A completion and what was said of it, as files have it once `json_lines` has written it."""
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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


_MAY_CHANGE = (
    *("run", "cluster", "tracking", "checkpoint", "reward", "rollout", "sync", "eval", "warm_start", "plan.path"),
    *(f"learner.{name}" for name in ("world_size", "zero_stage", "offload", "packing", "sequence_parallel")),
    *(f"learner.{name}" for name in ("logits_mib", "peak_tflops", "gradient_checkpointing", "timeout")),
    *(
        "learner.cpus",
        "learner.gpus",
        "learner.max_skipped_updates",
        "batch.tokens_per_micro_batch",
        "model.path",
        "model.attention",
    ),
)
"""Settings, or sections of them, that a resumed run may change: they decide where and how fast something is computed
and what is kept of it, not what is trained. `model.path` is held to its weights' digest."""
_ROLLOUT = ("rollout.engine", "rollout.environment", "rollout.max_turns")


def _may_change(name: str, config: Config) -> bool:
    if name == "steps":  # on which a falling rate, or AdaLoRA's phases, depend from the first step on
        schedules = {part.schedule or config.learner.schedule for part in (config.full, config.lora)}
        return schedules == {"constant"} and config.rest != "adalora"
    return name not in _ROLLOUT and any(name == may or name.startswith(f"{may}.") for may in _MAY_CHANGE)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, without its secrets."""
    return yaml.safe_dump(scrub_tree(config.model_dump(mode="json")), sort_keys=False)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; a last line that a killed process left half-written is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
