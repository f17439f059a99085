"""Updates to engines by a transport that sends: learner and engines meet, then one sends while the others receive."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

from hybrid_rl.learner import LearnerGroup
from hybrid_rl.types import Pending, WeightUpdate, WorkerDied, WorkerHandle
from hybrid_rl.weight_sync import Meeting, SyncTimeout

logger = logging.getLogger(__name__)


class MeetingCourier:
    """`Courier` for `sync.transport=nccl`. A meeting lasts as long as the same engines take part and nothing fails."""

    def __init__(self, learner: Callable[[], LearnerGroup], endpoint: Callable[[], tuple[str, int]]) -> None:
        """`endpoint`: address and a free port on the machine of the learner's rank 0."""
        self._learner, self._endpoint = learner, endpoint
        self._epochs = itertools.count()
        self._members: list[WorkerHandle] = []
        self._sending: Pending | None = None

    def bring(self, engines: Sequence[WorkerHandle], updates: Sequence[WeightUpdate]) -> None:
        sound = self._over(self._sending)
        if not sound or list(engines) != self._members:
            self._meet(engines)
        self._sending = self._learner().begin_send(updates)

    def _meet(self, engines: Sequence[WorkerHandle]) -> None:
        """An engine that does not come is noticed by the pool, when it does not answer the update either."""
        members = ("learner", *(engine.name for engine in engines))
        meeting = Meeting(*self._endpoint(), members, next(self._epochs))
        joining = [self._learner().begin_join(meeting)]
        for rank, engine in enumerate(engines, start=1):
            try:
                joining.append(engine.submit("join", meeting, rank))
            except WorkerDied:
                continue
        self._members = list(engines) if all([self._over(j) for j in joining]) else []

    def _over(self, call: Pending | None) -> bool:
        """Wait for a call; whether it went well."""
        try:
            if call is not None:
                call.result()
        except (SyncTimeout, WorkerDied) as failure:
            logger.warning("%s", failure)
            return False
        return True
