"""MLflow: a run of the experiment `tracking.project`, found again by its tag when it is resumed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Usage statistics are sent by those who ask for it; and a dead server is not waited for long.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

from hybrid_rl.plain_text import visible
from hybrid_rl.run_directory import flatten
from hybrid_rl.tracking.alerts import Alert
from hybrid_rl.tracking.tracker import Opening

_TAG = "hybrid_rl.run"
_LONGEST = 4000
_AT_ONCE = 100
"""Parameters that a server takes in one request; of metrics, 1,000."""
_LONGEST_PARAM = 500


def open_tracker(opening: Opening) -> _Mlflow:
    return _Mlflow(opening)


class _Mlflow:
    def __init__(self, opening: Opening) -> None:
        tracking, run = opening.config.tracking, opening.run
        self._client = MlflowClient(tracking_uri=tracking.mlflow)
        experiment = self._client.get_experiment_by_name(tracking.project)
        if experiment:
            place = experiment.experiment_id
        else:
            place = self._client.create_experiment(tracking.project, artifact_location=_files(str(tracking.mlflow)))
        found = self._client.search_runs([place], f"tags.`{_TAG}` = '{opening.identity}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self.after = int(found[0].data.metrics.get("step", 0))
            self._client.update_run(self._id, status="RUNNING")
            return
        self.after = 0
        tags = {_TAG: opening.identity, **({"tags": ", ".join(tracking.tags)} if tracking.tags else {})}
        self._id = self._client.create_run(place, run_name=run.path.name, tags=tags).info.run_id
        flat = {_name(name): str(value)[:_LONGEST_PARAM] for name, value in flatten(opening.settings).items()}
        params = [Param(name, value) for name, value in flat.items()]
        for i in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._id, params=params[i : i + _AT_ONCE])
        for path in (run.config, run.plan, run.plan_image):
            self._client.log_artifact(self._id, str(path))

    def step(self, step: int, row: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        now = int(1000 * time.time())
        metrics = [Metric(_name(name), value, now, step) for name, value in row.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def rollouts(self, step: int, sample: Sequence[Mapping[str, Any]]) -> None:
        texts = ("prompt", "completion")
        rows = [{**row, **{name: visible(row[name], _LONGEST) for name in texts}} for row in sample]
        self._client.log_dict(self._id, {"rollouts": rows}, f"rollouts/step_{step:06d}.json")

    def alert(self, alert: Alert) -> None:
        self._client.set_tag(self._id, _name(f"alert.{alert.name}"), f"step {alert.step}: {alert.text}")

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def _files(uri: str) -> str | None:
    """Where an experiment's files go: beside a database that is a file, where MLflow alone would have the working
    directory; elsewhere as MLflow or its server has it."""
    if not urlsplit(uri).scheme.startswith("sqlite"):
        return None
    from sqlalchemy import make_url  # pyright: ignore[reportMissingImports]

    return (Path(make_url(uri).database or "").resolve().parent / "mlruns").as_uri()


def _name(name: str) -> str:
    """Of the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
