"""Receipts: every engine says what it now holds, and the driver compares."""

from __future__ import annotations

from collections.abc import Iterable

from hybrid_rl.types import Receipt, WeightUpdate


class SyncMismatch(RuntimeError):
    """An engine does not hold the weights that the learner sent; training on its completions would be wrong."""


def verify_receipts(update: WeightUpdate, receipts: Iterable[Receipt]) -> int:
    """Compare each receipt with the update. Returns the number of engines verified.

    Raises `SyncMismatch` naming the first engine and tensor that differ.
    """
    verified = 0
    for receipt in receipts:
        if receipt.version != update.version:
            raise SyncMismatch(
                f"engine {receipt.engine} holds weights of version {receipt.version}, the learner sent {update.version}"
            )
        for name, expected in update.digests.items():
            held = receipt.digests.get(name)
            if held != expected:
                what = "does not hold" if held is None else "holds other bytes for"
                raise SyncMismatch(f"engine {receipt.engine} {what} {name} (version {update.version})")
        extra = receipt.digests.keys() - update.digests.keys()
        if extra:
            raise SyncMismatch(
                f"engine {receipt.engine} reports {min(extra)}, which was not sent (version {update.version})"
            )
        verified += 1
    return verified
