"""A run that is asked to end (SIGTERM: a spot machine, a scheduler) keeps what it has learnt."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Stopped(BaseException):
    """The run was asked to end; the argument says where it stands. As `KeyboardInterrupt`, it is nothing that those who
    mend failures should see."""


class StopSignal:
    """Inside, SIGTERM raises `Stopped` in the main thread: at once, or after what must not be left half done."""

    def __init__(self) -> None:
        self._asked, self._held = False, False
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @contextmanager
    def released(self) -> Iterator[None]:
        """What is inside need not be done to its end, though it is within `held`."""
        if self._asked:
            self._leave()
        self._held = False
        try:
            yield
        finally:
            self._held = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is inside is done to its end first."""
        if self._asked:  # and somebody took the exception for a failure
            self._leave()
        self._held = True
        yield
        self._held = False
        if self._asked:
            self._leave()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if not self._held:
            self._leave()

    def _leave(self) -> None:
        self._held = True  # a second signal does not disturb the saving
        raise Stopped
