"""An engine's end of the chain of updates: which it takes on, and that every part arrived whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hybrid_rl.types import WeightUpdate
from hybrid_rl.weight_sync.apply import NotServed
from hybrid_rl.weight_sync.transport import Meeting, Transport, UpdateRefused, fetch


class EngineBroken(UpdateRefused):
    """An update failed after part of it was written: the engine holds no version and serves nothing until an anchor."""


class Target(Protocol):
    """An engine's weights, in however many processes; methods as `HeldWeights`'s."""

    def begin(self, names: Sequence[str], rank: int, anchor: bool) -> None: ...

    def write(self, payload: bytes) -> None: ...

    def finish(self) -> None: ...


class Updates:
    """An engine's end of the chain of updates."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._broken: str | None = None
        self.version = 0
        """Of the weights that the engine holds."""

    def join(self, meeting: Meeting, rank: int) -> None:
        """Meet the learner, where the transport sends."""
        self._transport.join(meeting, rank)

    def ensure_whole(self) -> None:
        """Raises `EngineBroken` if the last update failed half-way."""
        if self._broken is not None:
            raise EngineBroken(self._broken)

    def _check_chain(self, updates: Sequence[WeightUpdate]) -> None:
        """Raises `UpdateRefused` if `updates` do not lead from what is held to their last."""
        if not updates:
            raise UpdateRefused("no update was given")
        held = None if self._broken is not None else self.version
        for update in updates:
            if update.base_version is not None and update.base_version != held:
                has = "no version" if held is None else f"version {held}"
                raise UpdateRefused(
                    f"version {update.version} is the difference to version {update.base_version}, but {has} is held"
                )
            held = update.version

    def apply(self, updates: Sequence[WeightUpdate], target: Target) -> None:
        """Bring `target` to the last of `updates`, one after the other, each part checked before it is written.

        Raises `UpdateRefused` or `SyncTimeout` with `target` as it was, or `EngineBroken`.
        """
        self._check_chain(updates)
        changed = False
        try:
            for update in updates:
                try:
                    target.begin(tuple(update.digests), update.adapter_rank, update.base_version is None)
                except NotServed as error:
                    raise UpdateRefused(f"version {update.version}: {error}") from error
                for bucket in update.buckets:
                    payload = fetch(self._transport, bucket, update.version)
                    changed = True
                    target.write(payload)
                changed = True
                target.finish()
                self.version = update.version
        except Exception as error:
            if not changed:
                raise
            self._broken = f"an update failed half-way, an anchor is needed: {error}"
            raise EngineBroken(self._broken) from error
        self._broken = None
