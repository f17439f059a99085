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

    def __init__(
        self, learner: Callable[[], LearnerGroup], endpoint: Callable[[], tuple[str, int]], timeout: float
    ) -> None:
        """`endpoint`: address and a free port on the machine of the learner's rank 0. Who has not answered after
        `timeout` seconds is not waited for."""
        self._learner, self._endpoint, self._timeout = learner, endpoint, timeout
        self._epochs = itertools.count()
        self._members: list[WorkerHandle] = []
        self._sending: Pending | None = None

    def bring(self, engines: Sequence[WorkerHandle], updates: Sequence[WeightUpdate]) -> None:
        """Where a meeting fails nothing is sent; the engines' own calls fail then, and the pool sees to it."""
        sound = self._sending is None or self._over(self._sending)
        self._sending = None
        if (sound and list(engines) == self._members) or self._meet(engines):
            self._sending = self._learner().begin_send(updates)

    def _meet(self, engines: Sequence[WorkerHandle]) -> bool:
        """Whether all have come."""
        members = ("learner", *(engine.name for engine in engines))
        meeting = Meeting(*self._endpoint(), members, next(self._epochs))
        learner = self._learner().begin_join(meeting)
        came = []
        for rank, engine in enumerate(engines, start=1):
            try:
                came.append(engine.submit("join", meeting, rank))
            except WorkerDied:
                continue
        complete = all([self._over(learner), *(self._over(call, engine=True) for call in came)])
        self._members = list(engines) if complete else []
        return complete

    def _over(self, call: Pending, *, engine: bool = False) -> bool:
        """Wait for a call; whether it went well. An engine that died is the pool's to notice, a learner that did ends
        the run."""
        try:
            call.result(self._timeout)
        except SyncTimeout as failure:
            logger.warning("%s", failure)
            return False
        except WorkerDied as death:
            if not engine:
                raise
            logger.warning("%s", death)
            return False
        return True

    def free(self) -> bool:
        return not self._learner().trains and (self._sending is None or self._sending.ready(0))
