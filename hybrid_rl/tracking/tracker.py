"""What every tracker is, and how a run hands it what it is to show."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hybrid_rl.config import Config
from hybrid_rl.redaction import scrub
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.tracking.alerts import Alert

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with."""

    run: RunDirectory
    config: Config
    settings: Mapping[str, Any]
    """The configuration as a tree, without its secrets."""
    identity: str
    """Of the run, the same whenever it is resumed."""
    told: int
    """The last step that trackers may have been told of before; 0 for a new run."""
    first: int
    """The step that comes first: `told` + 1, or earlier where steps are done again."""
    failed: Callable[[str], None]
    """To be called where the tracker goes on with less than was asked for."""


class Tracker(Protocol):
    """Shows a run somewhere. Called from one thread; what it raises is counted and ends nothing."""

    after: int
    """Steps up to this one are there already, from before the run was resumed."""

    def step(self, step: int, row: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        """The metrics of a step, all finite, and values to draw the distribution of."""
        ...

    def rollouts(self, step: int, sample: Sequence[Mapping[str, Any]]) -> None:
        """Completions of a step, as `RunDirectory.write_rollouts` has them."""
        ...

    def alert(self, alert: Alert) -> None: ...

    def close(self, finished: bool) -> None:
        """Hand over what is left. `finished`: the run reached its last step."""
        ...


class Outlet:
    """A tracker in a thread of its own, so that one which is slow or cannot be reached costs the run nothing: what it
    does not take is counted, and said once."""

    _WAITING = 1000
    """Calls that a tracker may be behind."""

    def __init__(self, name: str, open_tracker: Callable[[Opening], Tracker], opening: Callable[..., Opening]) -> None:
        """`opening`: makes the `Opening`, given `failed`."""
        self.name = name
        self._lock, self._failures, self._said = threading.Lock(), 0, False
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(self._WAITING)
        self._thread = threading.Thread(
            target=self._work, args=(open_tracker, opening(failed=self._fail)), name=f"tracking-{name}", daemon=True
        )
        self._thread.start()

    def send(self, step: int, call: Callable[[Tracker], None]) -> None:
        """Have the tracker do something about `step`, soon; returns at once."""
        try:
            self._calls.put_nowait(lambda tracker: call(tracker) if step > tracker.after else None)
        except queue.Full:
            self._fail("it does not keep up")

    def failures(self) -> int:
        """Failures since this was last asked."""
        with self._lock:
            count, self._failures = self._failures, 0
        return count

    def finish(self, finished: bool) -> None:
        """Have the tracker close once it has done all it was sent; returns at once."""
        try:
            self._calls.put_nowait(lambda tracker: tracker.close(finished))
            self._calls.put_nowait(None)
        except queue.Full:
            self._fail("it does not keep up")

    def join(self, until: float) -> None:
        """Wait for that, until `time.monotonic()` is `until`."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._fail("it did not finish in time (tracking.timeout)")

    def _work(self, open_tracker: Callable[[Opening], Tracker], opening: Opening) -> None:
        tracker = None
        try:
            tracker = open_tracker(opening)
        except Exception as error:  # whatever a client of a remote service raises
            self._fail(_reason(error))
        while (call := self._calls.get()) is not None:
            if tracker is None:
                self._fail("it could not be opened")
                continue
            try:
                call(tracker)
            except Exception as error:
                self._fail(_reason(error))

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._failures += 1
            said, self._said = self._said, True
        if not said:
            logger.warning(
                "tracking by %s fails: %s. The run goes on, its metrics are in metrics.jsonl; further failures are "
                "counted as faults/tracking_%s",
                *(self.name, scrub(reason), self.name),
            )


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
