"""Which of a step's rollouts are shown to a person."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """The completions in a file of rollouts; a last line that a killed process left half-written is dropped."""
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def spread(rollouts: Sequence[Mapping[str, Any]], n: int) -> list[Mapping[str, Any]]:
    """At most `n` completions, from the best reward to the worst, evenly over what is between; without one, last."""
    order = sorted(rollouts, key=lambda row: -row["reward"] if row.get("reward") is not None else float("inf"))
    if len(order) <= n:
        return order
    return [order[round(i * (len(order) - 1) / max(1, n - 1))] for i in range(n)]
