"""What a run's report is made from: whatever of its files is there, be the run done, under way or killed."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import load_config
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_grid import routing_shares
from hybrid_rl.report.svg import Series
from hybrid_rl.run_directory import RunDirectory, dump_config, read_metrics
from hybrid_rl.samples import read_rollouts, spread
from hybrid_rl.tracking import NO_COUNTS, Alert, Alerts

_SHOWN_STEPS = 3
_OF_A_STEP = 3


@dataclass(frozen=True)
class Sampled:
    """Completions of one step: the best, a middling and the worst."""

    step: int
    rollouts: list[Any]


@dataclass(frozen=True)
class Contents:
    run: RunDirectory
    config: Config
    settings: str
    """The resolved configuration, as YAML."""
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    plan: AdaptationPlan | None
    """None where the run ended before there was one."""
    routing: dict[str, dict[str, float]]
    """Of MoLF: by expert and module, how often it was stepped."""
    samples: list[Sampled]
    machine: dict[str, Any]
    alerts: list[Alert]

    @property
    def done(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def finished(self) -> bool:
        return "eval_after" in self.summary

    @cached_property
    def faults(self) -> dict[str, int]:
        """By kind, of those that occurred."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            for name, value in row.items():
                if value and name.startswith("faults/") and name not in NO_COUNTS:
                    counts[name.removeprefix("faults/")] += int(value)
        return dict(counts.most_common())

    def series(self, name: str) -> Series:
        """A metric where it is finite; held-out scores from before training on."""
        points = list(self._points.get(name, ()))
        before = self.summary.get("eval_before", {}).get(name)
        if _finite(before) and (not points or points[0][0] > 0):
            points.insert(0, (0.0, float(before)))
        return Series(name, tuple(s for s, _ in points), tuple(v for _, v in points))

    def names(self) -> list[str]:
        """Every metric with a finite value."""
        return list(dict.fromkeys([*self._points, *self.summary.get("eval_before", {})]))

    @cached_property
    def _points(self) -> dict[str, list[tuple[float, float]]]:
        """By metric, the steps at which it is finite, and its values."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            step = float(row["step"])
            for name, value in row.items():
                if _finite(value):
                    found.setdefault(name, []).append((step, float(value)))
        return found


def read_contents(directory: Path) -> Contents:
    """Raises `ConfigError` if `directory` holds no run."""
    run = RunDirectory(directory)
    if not run.config.is_file():
        raise ConfigError(f"{directory} holds no run: it has no {run.config.name}")
    config = load_config(run.config)
    rows = read_metrics(run.metrics) if run.metrics.is_file() else []
    plan = AdaptationPlan.load(run.plan) if run.plan.is_file() else None
    watch = Alerts(config)
    return Contents(
        run=run,
        config=config,
        settings=dump_config(config),
        rows=rows,
        summary=_read_json(run.summary),
        plan=plan,
        routing=_routing(run, plan),
        samples=_samples(run),
        machine=_read_json(run.machine),
        alerts=[alert for row in rows for alert in watch.see(row)],
    )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _routing(run: RunDirectory, plan: AdaptationPlan | None) -> dict[str, dict[str, float]]:
    by_module = routing_shares(run, plan)[0] if plan is not None else {}
    experts = dict.fromkeys(name for stepped in by_module.values() for name in stepped)
    return {
        name: {module: stepped[name] for module, stepped in by_module.items() if name in stepped}
        for name in sorted(experts, key=lambda name: (name != "weight", len(name), name))
    }


def _samples(run: RunDirectory) -> list[Sampled]:
    """Of the first step, one halfway and the last."""
    files = sorted(run.rollouts.glob("step_*.jsonl"))
    last = len(files) - 1
    chosen = sorted({round(i * last / (_SHOWN_STEPS - 1)) for i in range(_SHOWN_STEPS)}) if files else []
    found = [(int(files[i].stem.removeprefix("step_")), read_rollouts(files[i])) for i in chosen]
    return [Sampled(step, spread(rollouts, _OF_A_STEP)) for step, rollouts in found if rollouts]
