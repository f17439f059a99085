"""The learner's ranks as one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from hybrid_rl.adaptation import PARTS, Start
from hybrid_rl.files import FileFacts
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.scoring import Score
from hybrid_rl.types import Pending, TrainSequence, WeightUpdate, WorkerDied, WorkerHandle, gather
from hybrid_rl.weight_sync import Meeting


class LearnerGroup:
    """Every call goes to all ranks at once, since each is a collective operation."""

    def __init__(self, workers: Sequence[WorkerHandle], *, timeout: float | None = None) -> None:
        """A rank that has not answered after `timeout` seconds is taken for dead."""
        self._workers, self._timeout = list(workers), timeout
        self.first = self._workers[0]
        """Rank 0."""
        self._training: Pending | None = None
        self._failure: Exception | None = None
        """Of the first call that failed: its ranks may be waiting for one another for ever."""

    def connect(self, address: str, port: int) -> dict[str, Any]:
        """Join the ranks and load the model. Returns how it will be computed: `layout` and why, `whole_logits`."""
        return self._all("connect", address, port)[0]

    def begin_ranking(self, score: Score) -> None:
        self._all("begin_ranking", score)

    def observe(self, halves: Sequence[Sequence[TrainSequence]], lr: float = 0.0) -> None:
        self._all("observe", halves, lr)

    def finish_ranking(self) -> tuple[dict[str, float], set[str]]:
        return self._all("finish_ranking")[0]

    def base_digest(self) -> str:
        """Of the base model's parameters; before there is anything else to them."""
        return gather([self.first.submit("base_digest")], self._timeout)[0]

    def build(self, plan: AdaptationPlan, start: Start | None = None) -> None:
        """Apply the plan, with the values of `start`, and start DeepSpeed."""
        self._all("build", plan.to_json(), start)

    def begin_train(self, batch: Any) -> Pending:
        """Train on a `TrainBatch`, or on a reference to one: a call whose result is `StepStats`. Ranks work in step;
        seconds are rank 0's."""
        self._training = _First([w.submit("train", batch) for w in self._workers], self._timeout, self._fail)
        return self._training

    def _fail(self, failure: Exception) -> None:
        self._failure = failure

    @property
    def trains(self) -> bool:
        """Whether a training step is under way, behind which any other call would wait."""
        return self._training is not None and not self._training.ready(0)

    def divergences(self, sequences: Any) -> list[float]:
        """Each completion's divergence from the base policy, summed over its tokens; of a list of `TrainSequence`, or a
        reference to one."""
        return self._all("divergences", sequences)[0]

    def logprobs(self, sequences: Any, parts: Sequence[str]) -> list[list[float]]:
        """Log-probability of each token that was sampled, by completion, under the policy with these parts (`full`,
        `lora`) alone; of a list of `TrainSequence`, or a reference to one."""
        return self._all("logprobs", sequences, parts)[0]

    def export(self, version: int, parts: Sequence[str] = PARTS) -> WeightUpdate:
        """Publish the policy with these parts alone."""
        return self._all("export", version, parts)[0]

    def begin_join(self, meeting: Meeting) -> Pending:
        """Meet the engines, which `join` the same meeting meanwhile; for transports that send."""
        return self.first.submit("join", meeting)

    def begin_send(self, updates: Sequence[WeightUpdate]) -> Pending:
        """Send updates to the engines, which apply them meanwhile; for transports that send."""
        return self.first.submit("send", updates)

    def perturb(self, seed: int, scale: float) -> None:
        """Move every trained weight at random, as if it had been trained."""
        self._all("perturb", seed, scale)

    def blind(self, path: str) -> list[int]:
        """Ranks that do not see a file of the driver's."""
        return [rank for rank, sees in enumerate(self._all("sees", path)) if not sees]

    def begin_save(self, checkpoint: str) -> list[str]:
        """Copy what training depends on, and begin to write it to this directory. Returns the files, as they are named
        from there; each appears when it is whole."""
        return [name for names in self._all("begin_save", checkpoint) for name in names]

    def saved(self, wait: bool) -> dict[str, FileFacts] | None:
        """The files that all ranks have written since; `None` if some are not there yet and `wait` is false. Raises
        `OSError` if one could not be written."""
        of_ranks = self._all("saved", wait)
        return None if None in of_ranks else {name: facts for files in of_ranks for name, facts in files.items()}

    def load(self, checkpoint: str) -> None:
        self._all("load", checkpoint)

    def _all(self, method: str, *args: Any) -> list[Any]:
        """Call every rank, and wait for all: the answers by rank."""
        if self._failure is not None:
            raise self._failure
        try:
            return gather([w.submit(method, *args) for w in self._workers], self._timeout)
        except Exception as failure:
            if method != "saved" or isinstance(failure, WorkerDied):  # in which no rank waits for another
                self._failure = failure
            raise


class _First:
    """What every rank is doing, as one call with rank 0's result."""

    def __init__(self, ranks: Sequence[Pending], limit: float | None, failed: Callable[[Exception], None]) -> None:
        self._ranks, self._limit, self._started, self._failed = list(ranks), limit, time.monotonic(), failed
        self._result: list[Any] | None = None

    @property
    def name(self) -> str:
        return self._ranks[0].name

    def result(self, timeout: float | None = None) -> Any:
        """The first failure ends the wait: the other ranks may be waiting for the one that failed. `timeout` is not
        looked at, but the ranks' own limit."""
        if self._result is None:
            try:
                self._result = gather(self._ranks, self._limit, self._started)
            except Exception as failure:
                self._failed(failure)
                raise
        return self._result[0]

    def ready(self, timeout: float) -> bool:
        """Whether there is anything for `result` to return or raise: rank 0 is done, or some rank failed or is late."""
        late = self._limit is not None and time.monotonic() > self._started + self._limit
        return self._ranks[0].ready(timeout) or late or any(r.ready(0) for r in self._ranks)
