"""Several rollout engines as one: requests shared out by tokens, engines that fail replaced, weights kept current.

The pool does something only while one of its methods runs: an engine works through a slice of time, answers with what
it finished, and is given the next slice. So nothing waits on an engine without a limit, and an update meets every
engine between two slices. An engine that is replaced loads the base model, is brought to the current weights, proves it
by its receipt, and only then serves.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from hybrid_rl.types import (
    Completion,
    Pending,
    Progress,
    Receipt,
    Request,
    WeightUpdate,
    WorkerDied,
    WorkerHandle,
    wait_any,
)
from hybrid_rl.weight_sync import SyncMismatch, SyncTimeout, UpdateRefused, verify_receipts

logger = logging.getLogger(__name__)

_SLICE_SECONDS = 0.5
"""Longest that an engine works between two answers, but for one step of it."""
_BACKUP_SECONDS = 10.0
"""A request is given to a second, idle engine too after this long, if that is several times what others took."""
_BACKUP_FACTOR = 4.0

_MENDABLE = (UpdateRefused, SyncTimeout)
"""What sending everything again may mend."""

_Doing = Literal["start", "catch up", "apply", "repair", "advance", "sleep", "wake"]


@dataclass
class _Slot:
    """One engine's place."""

    index: int
    engine: WorkerHandle
    serves: bool = False
    asleep: bool = False
    replaces: bool = False
    """Whether another engine was in this place before."""
    sent: WeightUpdate | None = None
    """The update that it was last asked to hold."""
    held: WeightUpdate | None = None
    """The one that it holds by its last receipt; `None` for the base model, or what is not known."""
    adapter: str = "none"
    """How it serves LoRA, by its last receipt."""
    holds: dict[str, float] = field(default_factory=dict)
    """Requests that it was given and has not answered -> when it got them."""
    fresh: list[Request] = field(default_factory=list)
    """Those of them that go with the next call."""
    cancelled: list[str] = field(default_factory=list)
    doing: _Doing = "start"
    pending: Pending | None = None
    limit: float = 0.0
    """Seconds that the call under way may take."""
    deadline: float = 0.0


class Courier(Protocol):
    """Takes updates to engines that cannot fetch them by themselves."""

    def bring(self, engines: Sequence[WorkerHandle], updates: Sequence[WeightUpdate]) -> None:
        """Begin to send `updates` to just these engines, which are asked to apply them next."""
        ...

    def free(self) -> bool:
        """Whether `bring` would begin at once."""
        ...


class RolloutPool:
    """No prompt is lost or answered twice, whatever engines do; what cannot be mended raises."""

    def __init__(
        self,
        spawn: Callable[[int], WorkerHandle],
        engines: int,
        *,
        max_restarts: int,
        timeout: float,
        start_timeout: float,
        max_concurrent: int,
        sync_timeout: float = 0.0,
        verify: bool = True,
        courier: Courier | None = None,
    ) -> None:
        """`spawn(i)` starts engine i, of which each decodes `max_concurrent` sequences at once. Times in seconds;
        `sync_timeout`: each of the updates that one is sent may take so much longer. `courier`: where the transport
        sends."""
        self._spawn = spawn
        self._timeout, self._start_timeout, self._sync_timeout = timeout, start_timeout, sync_timeout
        self._most_sequences = 2 * max_concurrent  # so that an engine always has the next ones at hand
        self._most_restarts = max_restarts
        self._check_receipts, self._courier = verify, courier
        self._queue: deque[Request] = deque()
        self._asked: dict[str, Request] = {}
        self._pinned: set[str] = set()
        """Requests that only the engine which was given them may answer."""
        self._finished: dict[str, tuple[Completion, ...]] = {}
        self._latencies: deque[float] = deque(maxlen=64)
        self._log: list[WeightUpdate] = []
        """The last anchor and all updates since: what a replaced engine needs."""
        self._draining = False
        self.restarts = 0
        """Engines replaced so far."""
        self.backups = 0
        """Requests given to a second engine so far, since the first was slow."""
        self.repairs = 0
        """Engines so far that did not hold what they were sent, and were sent everything again."""
        self._slots = [_Slot(i, spawn(i)) for i in range(engines)]
        for slot in self._slots:
            self._call(slot, "start", "info")

    def wait_ready(self) -> None:
        """Wait until every engine has loaded its model."""
        while not all(slot.serves for slot in self._slots):
            self.poll(1.0)

    @property
    def unfinished(self) -> int:
        """Requests that are not answered yet."""
        return len(self._asked)

    def submit(self, requests: Sequence[Request], *, first: bool = False) -> None:
        """Queue requests, at the end or before all others. Their ids must be new."""
        for request in requests:
            if request.id in self._asked or request.id in self._finished:
                raise ValueError(f"request {request.id} was submitted before")
            self._asked[request.id] = request
        if first:
            self._queue.extendleft(reversed(requests))
        else:
            self._queue.extend(requests)

    def ask_each(self, requests: Sequence[Request]) -> dict[int, list[tuple[Completion, ...]]]:
        """The same requests to every serving engine, beside what it is doing. Returns the answers by engine, without
        any that failed meanwhile; if all did, their successors are asked."""
        while not (engines := [slot for slot in self._slots if slot.serves]):
            self.poll(1.0)
        names = {slot.index: [f"{r.id}@{slot.index}" for r in requests] for slot in engines}
        for slot in engines:
            for name, request in zip(names[slot.index], requests, strict=True):
                self._asked[name] = replace(request, id=name)
                self._pinned.add(name)
                self._give(slot, self._asked[name])
        while any(name in self._asked for each in names.values() for name in each):
            self.poll(1.0)
        self._pinned.difference_update(name for each in names.values() for name in each)
        answers = {i: [self._finished.pop(n) for n in each if n in self._finished] for i, each in names.items()}
        whole = {index: found for index, found in answers.items() if len(found) == len(requests)}
        return whole or self.ask_each(requests)

    def take_finished(self) -> dict[str, tuple[Completion, ...]]:
        """What was answered since the last call, by request id."""
        finished, self._finished = self._finished, {}
        return finished

    @property
    def merged_engines(self) -> int:
        """Serving engines that have LoRA, or some of it, merged into their weights."""
        return sum(slot.serves and slot.adapter in ("merged", "mixed") for slot in self._slots)

    def poll(self, seconds: float) -> None:
        """Give the engines work and take their answers; returns after about `seconds`, or once one has answered."""
        self._catch_up()
        self._share_out()
        for slot in self._slots:
            if slot.serves and not slot.asleep and slot.pending is None and (slot.holds or slot.cancelled):
                requests, slot.fresh = slot.fresh, []
                cancelled, slot.cancelled = slot.cancelled, []
                self._call(slot, "advance", "advance", requests, cancelled, _SLICE_SECONDS)
        self._collect(seconds)

    def update(self, update: WeightUpdate, in_flight: str = "keep") -> int:
        """Bring every engine to `update`. Returns how many receipts were verified: of all engines but those that are
        being replaced, which are verified before they serve.

        Raises `SyncMismatch` if an engine does not hold it even after everything was sent again.
        """
        if in_flight == "wait":
            self._drain()
            in_flight = "keep"
        self._log = [update] if update.base_version is None else [*self._log, update]
        self._settle()
        # One that caught up meanwhile has it.
        self._apply([slot for slot in self._slots if slot.serves and slot.held is not update], in_flight)
        self._catch_up()
        self._settle()
        return sum(slot.serves and slot.held is update for slot in self._slots) * self._check_receipts

    def sleep(self) -> None:
        """Have every engine release its memory; one that is being replaced, once it serves."""
        while not all(slot.asleep for slot in self._slots):
            self.wait_ready()
            self._on_serving("sleep", [slot for slot in self._slots if not slot.asleep])

    def wake(self) -> None:
        """Undo `sleep`."""
        self._on_serving("wake", self._slots)

    def _on_serving(self, what: Literal["sleep", "wake"], slots: Sequence[_Slot]) -> None:
        """Make a call on those of `slots` that serve, once their slice is over, and wait for it."""
        self._settle()
        for slot in slots:
            if slot.serves:
                self._call(slot, what, what)
        self._settle()

    def _settle(self) -> None:
        """Wait until no serving engine has a call under way."""
        while any(slot.serves and slot.pending is not None for slot in self._slots):
            self._collect(1.0)

    def _drain(self) -> None:
        """Finish what engines hold; queued requests stay queued."""
        self._draining = True
        try:
            while any(slot.holds for slot in self._slots):
                self.poll(1.0)
        finally:
            self._draining = False

    def _share_out(self) -> None:
        """Queued requests to the engine with the fewest tokens to do, as long as one has room."""
        serving = [slot for slot in self._slots if slot.serves]
        while self._queue and serving and not self._draining:
            request = self._queue[0]
            slot = min(serving, key=self._tokens)
            held = sum(self._asked[name].sampling.n for name in slot.holds)
            if held and held + request.sampling.n > self._most_sequences:
                return
            self._give(slot, self._queue.popleft())
        if not self._queue:
            self._back_up(serving)

    def _back_up(self, serving: Sequence[_Slot]) -> None:
        """Give what a slow engine does not finish to an idle one too; the first answer counts."""
        idle = [slot for slot in serving if not slot.holds]
        if not idle or not self._latencies:
            return
        limit = max(_BACKUP_SECONDS, _BACKUP_FACTOR * statistics.median(self._latencies))
        holders: dict[str, list[_Slot]] = {}
        for slot in self._slots:
            for name in slot.holds:
                holders.setdefault(name, []).append(slot)
        late = [n for n, slots in holders.items() if len(slots) == 1 and _now() - slots[0].holds[n] > limit]
        late = [n for n in late if n not in self._pinned]
        for slot, name in zip(idle, late, strict=False):
            logger.warning("rollout engine %d is slow with %s; giving it to another too", holders[name][0].index, name)
            self.backups += 1
            self._give(slot, self._asked[name])

    def _tokens(self, slot: _Slot) -> int:
        """Tokens of what it holds, were every completion as long as it may be."""
        requests = [self._asked[name] for name in slot.holds]
        return sum(len(r.prompt_ids) + r.sampling.n * r.sampling.max_tokens for r in requests)

    def _give(self, slot: _Slot, request: Request) -> None:
        slot.holds[request.id] = _now()
        slot.fresh.append(request)

    def _call(self, slot: _Slot, doing: _Doing, method: str, *args: Any) -> None:
        slot.doing, slot.limit = doing, self._start_timeout if doing == "start" else self._timeout
        if doing in ("apply", "repair"):
            slot.limit += self._sync_timeout * len(args[0])
        slot.deadline = _now() + slot.limit
        try:
            slot.pending = slot.engine.submit(method, *args)
        except WorkerDied as death:
            self._replace(slot, death)
        except _MENDABLE as failure:  # workers in this process answer at once
            self._mend(slot, doing, failure)

    def _collect(self, seconds: float) -> None:
        """Wait for an answer for at most `seconds`, and take all that are there."""
        waiting = [slot for slot in self._slots if slot.pending is not None]
        if not waiting:
            return
        wait_any([slot.pending for slot in waiting if slot.pending is not None], seconds)
        for slot in waiting:
            if slot.pending is not None and slot.pending.ready(0):
                self._take(slot)
            elif _now() > slot.deadline:
                self._replace(slot, WorkerDied(f"no answer for {slot.limit:g} s", slot.engine.name))

    def _take(self, slot: _Slot) -> None:
        """Take a slot's answer, and do what follows from it."""
        assert slot.pending is not None
        pending, slot.pending = slot.pending, None
        try:
            answer = pending.result(0)
        except WorkerDied as death:
            return self._replace(slot, death)
        except _MENDABLE as failure:
            return self._mend(slot, slot.doing, failure)
        except RuntimeError as failure:
            if slot.doing == "start" and slot.replaces:  # another may start, say when the last one's memory is free
                return self._replace(slot, failure)
            raise
        if slot.doing == "start":
            slot.doing = "catch up"
            self._catch_up()
        elif slot.doing in ("sleep", "wake"):
            slot.asleep = slot.doing == "sleep"
        elif slot.doing in ("apply", "repair"):
            self._verify(slot, answer)
        elif slot.doing == "advance":
            self._receive(slot, answer)

    def _catch_up(self) -> None:
        """Bring engines that have started to the current weights."""
        for slot in self._slots:
            if slot.doing != "catch up" or slot.pending is not None:
                continue
            if not self._log:
                slot.serves, slot.doing = True, "advance"
            elif self._courier is None or self._courier.free():
                self._apply([slot], "keep")

    def _apply(self, slots: Sequence[_Slot], in_flight: str, doing: _Doing = "apply") -> None:
        """Send each engine what leads from what it holds to the last update: that alone, or all since the anchor."""
        by_start: dict[int, list[_Slot]] = {}
        for slot in slots:
            held = next((i + 1 for i, update in enumerate(self._log) if update is slot.held), 0)
            by_start.setdefault(held, []).append(slot)
        for start, takers in by_start.items():
            updates = self._log[start:]
            if self._courier is not None:
                self._courier.bring([slot.engine for slot in takers], updates)
            for slot in takers:
                slot.sent = updates[-1]
                self._call(slot, doing, "apply_updates", updates, in_flight)

    def _verify(self, slot: _Slot, receipt: Receipt) -> None:
        assert slot.sent is not None
        if self._check_receipts:
            try:
                verify_receipts(slot.sent, [receipt])
            except SyncMismatch as mismatch:
                return self._mend(slot, slot.doing, mismatch)
        slot.held, slot.adapter = slot.sent, receipt.adapter
        slot.serves = slot.sent is self._log[-1]
        if not slot.serves:  # others had another update meanwhile
            self._apply([slot], "keep")

    def _mend(self, slot: _Slot, doing: _Doing, why: Exception) -> None:
        """Send everything again, once; more often only where what was sent has been superseded."""
        slot.held = None
        if doing == "repair" and slot.sent is self._log[-1]:
            kind = next(k for k in (SyncMismatch, *_MENDABLE) if isinstance(why, k))  # Ray's own are made of these
            raise kind(f"{slot.engine.name}, which was sent everything again: {why}") from why
        if slot.sent is self._log[-1]:
            logger.warning("%s: %s; sending everything again", slot.engine.name, why)
            self.repairs += 1
            doing = "repair"
        self._apply([slot], "recompute", doing)

    def _receive(self, slot: _Slot, progress: Progress) -> None:
        version = 0 if slot.held is None else slot.held.version
        if progress.version != version:
            raise RuntimeError(
                f"{slot.engine.name} answered with weights of version {progress.version}, it should have {version}"
            )
        for name, completions in progress.finished.items():
            started = slot.holds.pop(name, None)
            if name not in self._asked:  # another engine was faster, by less than the time to say so
                continue
            if started is not None:
                self._latencies.append(_now() - started)
            self._finished[name] = completions
            del self._asked[name]
            for other in self._slots:
                if other.holds.pop(name, None) is not None:
                    other.fresh = [r for r in other.fresh if r.id != name]
                    other.cancelled.append(name)

    def _replace(self, slot: _Slot, why: Exception) -> None:
        """Start another engine in its place; what it held is queued again, first."""
        if self.restarts == self._most_restarts:
            raise RuntimeError(
                f"rollout engine {slot.index} failed ({why}) and rollout.max_restarts={self._most_restarts} "
                "replacements are used up; raise the setting if the cause is outside the run"
            ) from why
        logger.warning("rollout engine %d failed during %s (%s); replacing it", slot.index, slot.doing, why)
        self.restarts += 1
        elsewhere = {name for other in self._slots if other is not slot for name in other.holds}
        for name in self._pinned & slot.holds.keys():
            self._asked.pop(name, None)
        self._queue.extendleft(self._asked[n] for n in reversed(slot.holds) if n not in elsewhere and n in self._asked)
        slot.engine.kill()
        slot.holds, slot.fresh, slot.cancelled = {}, [], []
        slot.held, slot.serves, slot.asleep, slot.replaces, slot.pending = None, False, False, True, None
        slot.engine = self._spawn(slot.index)
        self._call(slot, "start", "info")


def prompt_seed(run_seed: int, prompt_id: str) -> int:
    """Seed of one prompt's sampling, from the run's (or step's) seed and the prompt's id. 31 bits."""
    digest = hashlib.blake2b(f"{run_seed}/{prompt_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF


def _now() -> float:
    return time.monotonic()
