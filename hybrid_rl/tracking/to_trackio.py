"""trackio: its local database, or the server that its own variables name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import trackio  # pyright: ignore[reportMissingImports]

from hybrid_rl.plain_text import visible
from hybrid_rl.tracking.alerts import Alert
from hybrid_rl.tracking.tracker import Opening

_LONGEST = 4000


def open_tracker(opening: Opening) -> _Trackio:
    return _Trackio(opening)


class _Trackio:
    def __init__(self, opening: Opening) -> None:
        tracking = opening.config.tracking
        self._run = trackio.init(
            project=tracking.project,
            name=f"{opening.run.path.name}-{opening.identity}",  # by which it is found again
            group=tracking.group,
            config=dict(opening.settings),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        self.after = opening.told

    def step(self, step: int, row: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=step)

    def rollouts(self, step: int, sample: Sequence[Mapping[str, Any]]) -> None:
        columns = ["prompt", "completion", "reward", "rewards", "advantage", "finish_reason", "tokens"]
        data = [
            [visible(row[c], _LONGEST) if c in ("prompt", "completion") else _cell(row[c]) for c in columns]
            for row in sample
        ]
        self._run.log({"rollouts": trackio.Table(columns=columns, data=data)}, step=step)

    def alert(self, alert: Alert) -> None:
        self._run.alert(alert.name, f"step {alert.step}: {alert.text}", level=trackio.AlertLevel.WARN, step=alert.step)

    def close(self, finished: bool) -> None:
        self._run.finish()


def _cell(value: Any) -> Any:
    return ", ".join(f"{name} {score}" for name, score in value.items()) if isinstance(value, dict) else value
