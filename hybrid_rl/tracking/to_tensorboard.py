"""TensorBoard: event files in the run's directory, written without TensorFlow or TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from hybrid_rl.plain_text import visible
from hybrid_rl.tracking.alerts import Alert
from hybrid_rl.tracking.tracker import Opening

_LONGEST = 2000
"""Characters of a prompt or completion."""


def open_tracker(opening: Opening) -> _TensorBoard:
    return _TensorBoard(opening)


class _TensorBoard:
    after = 0

    def __init__(self, opening: Opening) -> None:
        run = opening.run
        # Steps that are done again replace those that were written before. A file is named after the second.
        purge = opening.first if opening.told else None
        self._writer = SummaryWriter(
            str(run.path / "tensorboard"), purge_step=purge, filename_suffix=f".from-{opening.first}"
        )
        if not opening.told:
            self._writer.add_text("config", _verbatim(json.dumps(opening.settings, indent=1)), 0)
            plan = np.asarray(Image.open(run.plan_image).convert("RGB"))
            self._writer.add_image("plan", plan, 0, dataformats="HWC")

    def step(self, step: int, row: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        for name, values in histograms.items():
            if values:
                self._writer.add_histogram(name, np.asarray(values), step)
        self._writer.flush()

    def rollouts(self, step: int, sample: Sequence[Mapping[str, Any]]) -> None:
        for i, row in enumerate(sample):
            said = {name: row[name] for name in ("reward", "rewards", "advantage", "finish_reason", "tokens")}
            texts = "\n".join(visible(row[name], _LONGEST) for name in ("prompt", "completion"))
            self._writer.add_text(f"rollouts/{i:02d}", _verbatim(f"{json.dumps(said)}\n{texts}"), step)

    def alert(self, alert: Alert) -> None:
        self._writer.add_text(f"alerts/{alert.name}", _verbatim(alert.text), alert.step)

    def close(self, finished: bool) -> None:
        self._writer.close()


def _verbatim(text: str) -> str:
    """As a block of code: TensorBoard reads Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
