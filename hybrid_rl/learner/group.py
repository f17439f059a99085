"""The learner's ranks as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.scoring import Score
from hybrid_rl.types import StepStats, TrainSequence, WeightUpdate, WorkerHandle, call_all


class LearnerGroup:
    """Every call goes to all ranks at once, since each is a collective operation."""

    def __init__(self, workers: Sequence[WorkerHandle]) -> None:
        self._workers = list(workers)

    def connect(self, address: str, port: int) -> dict[str, Any]:
        """Join the ranks and load the model. Returns how it will be computed: `layout` and why, `whole_logits`."""
        return call_all(self._workers, "connect", address, port)[0]

    def begin_ranking(self, score: Score) -> None:
        call_all(self._workers, "begin_ranking", score)

    def observe(self, halves: Sequence[Sequence[TrainSequence]], lr: float = 0.0) -> None:
        call_all(self._workers, "observe", halves, lr)

    def finish_ranking(self) -> tuple[dict[str, float], set[str]]:
        return call_all(self._workers, "finish_ranking")[0]

    def build(self, plan: AdaptationPlan) -> None:
        call_all(self._workers, "build", plan.to_json())

    def train(self, batch: Any) -> StepStats:
        """Train on a `TrainBatch`, or on a reference to one. Ranks work in step; seconds are rank 0's."""
        return call_all(self._workers, "train", batch)[0]

    def divergences(self, sequences: Any) -> list[float]:
        """Each completion's divergence from the base policy, summed over its tokens; of a list of `TrainSequence`, or a
        reference to one."""
        return call_all(self._workers, "divergences", sequences)[0]

    def export(self, version: int) -> WeightUpdate:
        return call_all(self._workers, "export", version)[0]

    def save(self, directory: str) -> None:
        call_all(self._workers, "save", directory)

    def load(self, directory: str) -> None:
        call_all(self._workers, "load", directory)
