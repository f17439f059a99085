"""The metrics of a run, a row a step: in its directory first, then wherever they are asked for."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hybrid_rl.config import Config
from hybrid_rl.files import Lines, write_atomically
from hybrid_rl.redaction import scrub_tree
from hybrid_rl.run_directory import RunDirectory, read_metrics
from hybrid_rl.samples import read_rollouts, spread
from hybrid_rl.tracking.alerts import Alert, Alerts
from hybrid_rl.tracking.choice import chosen
from hybrid_rl.tracking.tracker import Opening, Outlet

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends one object a step to `metrics.jsonl`, tells the trackers, and says what is alarming."""

    def __init__(self, run: RunDirectory, config: Config, *, last: Mapping[str, float] | None = None) -> None:
        """`last`: the row of the step from which the run is resumed. Later rows are dropped, since those steps are to
        be done again, and this one is added where the process was killed before it was logged."""
        before = read_metrics(run.metrics) if last else []
        kept: list[Mapping[str, float]] = [row for row in before if last and row["step"] <= last["step"]]
        if last and (not kept or kept[-1]["step"] < last["step"]):
            kept.append(last)
        write_atomically(run.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = Lines(run.metrics)
        self._run, self._config = run, config
        self.unwritten = 0
        self._done = int(kept[-1]["step"]) if kept else 0
        self._alerts = Alerts(config)
        for row in kept:
            self._alerts.see(row)
        opening = partial(
            Opening,
            run=run,
            config=config,
            settings=scrub_tree(config.model_dump(mode="json", by_alias=True)),
            identity=run.identity(),
            told=int(before[-1]["step"]) if before else 0,
            first=self._done + 1,
        )
        self._outlets = [Outlet(name, opener, opening) for name, opener in chosen(config)]
        if len(kept) > len(before):
            self._tell(self._done, kept[-1], {})

    def write(self, row: Mapping[str, float], histograms: Mapping[str, Sequence[float]] = {}) -> list[Alert]:
        """`histograms` go to trackers alone; the file has their quantiles among the metrics. Returns what is alarming
        from this step on, which is logged.

        A row that there is no room for on the disk is written before the next one, and counted in `unwritten`.
        """
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        try:
            self._file.add(json.dumps(numbers, allow_nan=False))
        except OSError as error:
            self.unwritten += 1
            logger.error("step %d: %s could not be written to: %s", int(row["step"]), self._run.metrics, error)
        self._done = int(row["step"])
        self._tell(self._done, row, histograms)
        alerts = self._alerts.see(numbers)
        for alert in alerts:
            logger.warning("step %d: %s: %s", alert.step, alert.name, alert.text)
            for outlet in self._outlets:
                outlet.send(alert.step, lambda tracker, alert=alert: tracker.alert(alert))
        return alerts

    def faults(self) -> dict[str, float]:
        """What trackers did not take since this was last asked, as metrics."""
        return {f"faults/tracking_{outlet.name}": outlet.failures() for outlet in self._outlets}

    def close(self) -> None:
        """Give trackers a bounded time to finish."""
        self._file.close()
        until = time.monotonic() + self._config.tracking.timeout
        for outlet in self._outlets:
            outlet.finish(self._done == self._config.steps)
        for outlet in self._outlets:
            outlet.join(until)

    def _tell(self, step: int, row: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        finite = {name: float(value) for name, value in row.items() if math.isfinite(value)}
        every = self._config.tracking.rollouts_every
        for outlet in self._outlets:
            outlet.send(step, lambda tracker: tracker.step(step, finite, histograms))
            if every and (step == 1 or step % every == 0):
                outlet.send(step, lambda tracker: tracker.rollouts(step, self._sample(step)))

    def _sample(self, step: int) -> list[Mapping[str, Any]]:
        return spread(read_rollouts(self._run.rollouts_of(step)), self._config.tracking.rollouts_rows)
