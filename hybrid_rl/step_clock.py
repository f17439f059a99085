"""Where the seconds of a step go."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping


@dataclasses.dataclass
class StepClock:
    """Seconds of one step by part; what no part claims is `other`, so the parts sum to the whole."""

    started: float = dataclasses.field(default_factory=time.perf_counter)
    parts: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(STEP_PARTS, 0.0))

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Count the time inside towards `part`."""
        started = time.perf_counter()
        yield
        self.parts[part] += time.perf_counter() - started

    def add(self, seconds: Mapping[str, float]) -> None:
        for part, value in seconds.items():
            self.parts[part] += value

    def row(self) -> dict[str, float]:
        """`time/step` and its parts."""
        total = time.perf_counter() - self.started
        parts = {**self.parts, "other": total - sum(self.parts.values())}
        return {"time/step": total, **{f"time/{part}": seconds for part, seconds in parts.items()}}


STEP_PARTS = ("generate", "reward", "logprob", "train", "sync", "gate", "eval", "checkpoint")
