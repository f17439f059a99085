"""Prometheus: the latest step at `/metrics`, on loopback unless told otherwise."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hybrid_rl.tracking.alerts import Alert
from hybrid_rl.tracking.tracker import Opening

_SUMMED = ("faults/", "tokens/generated", "tokens/trained")
"""Counts of a step, which a scrape every few steps would miss: they are served as totals since the process began."""


def open_tracker(opening: Opening) -> _Prometheus:
    return _Prometheus(opening)


class _Prometheus(Collector):
    after = 0

    def __init__(self, opening: Opening) -> None:
        tracking = opening.config.tracking
        self._run = opening.run.path.name
        self._lock = threading.Lock()
        self._row: dict[str, float] = {}
        self._totals: Counter[str] = Counter()
        self._at = 0.0
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(
            tracking.prometheus or 0, addr=tracking.prometheus_host, registry=registry
        )

    def step(self, step: int, row: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        with self._lock:
            # What is not measured at every step, such as held-out accuracy, keeps its last value.
            self._row |= {name: value for name, value in row.items() if not name.startswith(_SUMMED)}
            self._totals.update({name: value for name, value in row.items() if name.startswith(_SUMMED)})  # type: ignore[arg-type]
            self._at = time.time()

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            row, totals, at = dict(self._row), dict(self._totals), self._at
        for name, value in row.items():
            yield self._one(GaugeMetricFamily(metric_name(name), name, labels=["run"]), value)
        for name, value in totals.items():
            yield self._one(CounterMetricFamily(metric_name(name), f"{name}, summed", labels=["run"]), value)
        written = GaugeMetricFamily("hybrid_rl_step_finished_seconds", "when a step was last finished", labels=["run"])
        yield self._one(written, at)

    def _one(self, family: Any, value: float) -> Metric:
        family.add_metric([self._run], value)
        return family

    def rollouts(self, step: int, sample: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: there is no place for text."""

    def alert(self, alert: Alert) -> None:
        """Nothing: what is alarming is decided by rules of the server's own."""

    def close(self, finished: bool) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def metric_name(name: str) -> str:
    """`hybrid_rl_reward_mean` for `reward/mean`."""
    return "hybrid_rl_" + re.sub(r"\W", "_", name, flags=re.ASCII)


def is_total(name: str) -> bool:
    """Whether a metric is served as a counter, whose name ends with `_total`."""
    return name.startswith(_SUMMED)
