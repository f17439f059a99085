"""The learner's ranks as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_rl.adaptation import PARTS
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.scoring import Score
from hybrid_rl.types import Pending, StepStats, TrainSequence, WeightUpdate, WorkerHandle, call_all, gather
from hybrid_rl.weight_sync import Meeting


class LearnerGroup:
    """Every call goes to all ranks at once, since each is a collective operation."""

    def __init__(self, workers: Sequence[WorkerHandle]) -> None:
        self._workers = list(workers)
        self.first = self._workers[0]
        """Rank 0."""

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
        return self.begin_train(batch).result()

    def begin_train(self, batch: Any) -> Pending:
        """`train`, without waiting for it."""
        return _First([w.submit("train", batch) for w in self._workers])

    def divergences(self, sequences: Any) -> list[float]:
        """Each completion's divergence from the base policy, summed over its tokens; of a list of `TrainSequence`, or a
        reference to one."""
        return call_all(self._workers, "divergences", sequences)[0]

    def logprobs(self, sequences: Any, parts: Sequence[str]) -> list[list[float]]:
        """Log-probability of each token that was sampled, by completion, under the policy with these parts (`full`,
        `lora`) alone; of a list of `TrainSequence`, or a reference to one."""
        return call_all(self._workers, "logprobs", sequences, parts)[0]

    def export(self, version: int, parts: Sequence[str] = PARTS) -> WeightUpdate:
        """Publish the policy with these parts alone."""
        return call_all(self._workers, "export", version, parts)[0]

    def begin_join(self, meeting: Meeting) -> Pending:
        """Meet the engines, which `join` the same meeting meanwhile; for transports that send."""
        return self.first.submit("join", meeting)

    def begin_send(self, updates: Sequence[WeightUpdate]) -> Pending:
        """Send updates to the engines, which apply them meanwhile; for transports that send."""
        return self.first.submit("send", updates)

    def perturb(self, seed: int, scale: float) -> None:
        """Move every trained weight at random, as if it had been trained."""
        call_all(self._workers, "perturb", seed, scale)

    def save(self, directory: str) -> None:
        call_all(self._workers, "save", directory)

    def load(self, directory: str) -> None:
        call_all(self._workers, "load", directory)


class _First:
    """What every rank is doing, as one call with rank 0's result."""

    def __init__(self, ranks: Sequence[Pending]) -> None:
        self._ranks = list(ranks)
        self._result: list[Any] | None = None

    def result(self, timeout: float | None = None) -> Any:
        """`timeout` is not looked at: the ranks wait for each other, and the first failure ends the wait."""
        if self._result is None:
            self._result = gather(self._ranks)
        return self._result[0]

    def ready(self, timeout: float) -> bool:
        """Whether rank 0 is done; if another rank failed, `result` says so."""
        return self._ranks[0].ready(timeout) or any(r.ready(0) for r in self._ranks)
