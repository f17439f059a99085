"""What an engine would hold, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybrid_rl.types import WeightUpdate
from hybrid_rl.weight_sync import Transport, fetch, unpack


def receive(transport: Transport, updates: Sequence[WeightUpdate]) -> dict[str, Tensor]:
    """Tensors by name after `updates`, of which the first is an anchor."""
    held: dict[str, Tensor] = {}
    for update in updates:
        held = held if update.base_version is not None else {}
        for bucket in update.buckets:
            for record in unpack(fetch(transport, bucket, update.version)):
                if record.dense is not None:
                    held[record.name] = record.dense.clone()
                else:
                    record.write_to(held[record.name])
    return held
