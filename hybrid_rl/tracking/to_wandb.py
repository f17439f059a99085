"""wandb: metrics, distributions, the plan's heat map, sampled rollouts, alerts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import wandb

from hybrid_rl.plain_text import visible
from hybrid_rl.tracking.alerts import Alert
from hybrid_rl.tracking.tracker import Opening

_LONGEST = 4000
"""Characters of a prompt or completion in a table."""


def open_tracker(opening: Opening) -> _Wandb:
    return _Wandb(opening)


class _Wandb:
    def __init__(self, opening: Opening) -> None:
        tracking, run = opening.config.tracking, opening.run
        settings = wandb.Settings(
            init_timeout=tracking.timeout,
            finish_timeout=tracking.timeout,
            silent=True,
            console="off",
            x_disable_meta=True,  # it has the command line, and with it whatever secret was typed there
        )
        named: dict[str, Any] = {
            "project": tracking.project,
            "entity": tracking.entity,
            "group": tracking.group,
            "tags": tracking.tags,
            "name": run.path.name,
            "id": opening.identity,
            "dir": str(run.path),
            "config": dict(opening.settings),
            "settings": settings,
        }
        mode = tracking.wandb
        if mode == "online":
            try:
                self._run = wandb.init(mode="online", resume="allow", **named)
            except (wandb.Error, OSError, TimeoutError) as error:
                said = (str(error).splitlines() or [type(error).__name__])[0]
                sync = f"wandb sync --id {opening.identity} {run.path}/wandb/offline-run-*"
                opening.failed(f"{said}; it is kept offline, to be uploaded by `{sync}`")
                mode, named["id"] = "offline", f"{opening.identity}-offline"  # wandb still holds the other
        if mode == "offline":
            self._run = wandb.init(mode="offline", **named)
        # A server says itself how far it has come; it drops steps before that.
        self.after = opening.told if mode == "offline" else 0
        if not opening.told:
            self._run.log({"plan": wandb.Image(str(run.plan_image), caption="adaptation plan")}, step=0)
            artifact = wandb.Artifact(f"plan-{opening.identity}", type="plan")
            artifact.add_file(str(run.plan))
            self._run.log_artifact(artifact)

    def step(self, step: int, row: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        drawn = {name: wandb.Histogram(list(values)) for name, values in histograms.items() if values}
        self._run.log({name: value for name, value in row.items() if name != "step"} | drawn, step=step)

    def rollouts(self, step: int, sample: Sequence[Mapping[str, Any]]) -> None:
        parts = list(dict.fromkeys(name for row in sample for name in row["rewards"]))
        columns = ["prompt", "completion", "reward", *parts, "advantage", "finish_reason", "tokens", "weight_version"]
        table = wandb.Table(columns=columns, allow_mixed_types=True)
        for row in sample:
            texts = [visible(row[name], _LONGEST) for name in ("prompt", "completion")]
            scores = [row["reward"], *(row["rewards"].get(name) for name in parts), row["advantage"]]
            table.add_data(*texts, *scores, row["finish_reason"], row["tokens"], row["weight_version"])
        self._run.log({"rollouts": table}, step=step)

    def alert(self, alert: Alert) -> None:
        self._run.alert(title=alert.name, text=f"step {alert.step}: {alert.text}", level="WARN")

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=None if finished else 1)
