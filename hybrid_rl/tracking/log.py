"""The metrics of a run, a row a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_rl.config import Config
from hybrid_rl.files import write_atomically
from hybrid_rl.run_directory import RunDirectory, read_metrics


class MetricsLog:
    """Appends one object a step to `metrics.jsonl` and to wandb."""

    def __init__(self, run: RunDirectory, config: Config, *, last: Mapping[str, float] | None = None) -> None:
        """`last`: the row of the step from which the run is resumed. Later rows are dropped, since those steps are to
        be done again, and this one is added where the process was killed before it was logged."""
        kept: list[Mapping[str, float]] = []
        if last:
            kept = [row for row in read_metrics(run.metrics) if row["step"] <= last["step"]]
            kept += [last] if not kept or kept[-1]["step"] < last["step"] else []
        write_atomically(run.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = run.metrics.open("a", encoding="utf-8")
        self._wandb: Any = None
        if config.tracking.wandb != "disabled":
            import wandb

            os.environ.setdefault("WANDB_SILENT", "true")
            self._wandb = wandb.init(
                project=config.tracking.project,
                name=run.path.name,
                dir=str(run.path),
                mode=config.tracking.wandb,
                config=config.model_dump(mode="json"),
            )

    def write(self, row: Mapping[str, float], histograms: Mapping[str, Sequence[float]] = {}) -> None:
        """`histograms` go to wandb alone; the file has their quantiles among the metrics."""
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._file.write(json.dumps(numbers, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._wandb is not None:
            import wandb

            drawn = {name: wandb.Histogram(list(values)) for name, values in histograms.items() if values}
            self._wandb.log({k: v for k, v in row.items() if k != "step"} | drawn, step=int(row["step"]))

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
