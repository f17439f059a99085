"""The learner's side of the weight sync: from trained tensors to updates that engines can fetch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hybrid_rl.config import Config
from hybrid_rl.digests import digest
from hybrid_rl.types import Bucket, WeightUpdate
from hybrid_rl.weight_sync.codec import Parts, encode_tensor, pack, size
from hybrid_rl.weight_sync.transport import Transport, contents, digest_bytes

_FLOAT32 = 4
"""Bytes of an element."""
_PATIENCE = 16
"""Updates after which a float32 tensor that could only be sent whole is looked at again."""
_MOST_DELTAS = 2.0
"""Once the bytes of all updates since an anchor have added up to more than this many times the anchor's, the next is an
anchor: they are all kept, and a replaced engine is sent them all."""


def open_publisher(config: Config, transport: Transport) -> Publisher:
    """Publishes in `model.dtype`, as `sync` says."""
    return Publisher(
        transport,
        dtype=getattr(torch, config.model.dtype),
        bucket_bytes=config.sync.bucket_mib * 2**20,
        anchor_every=config.sync.anchor_every,
        sparse=config.sync.encoding == "auto",
    )


class Publisher:
    """Publishes one version after another; each is the difference to the one before, or an anchor.

    What engines hold of the trained tensors is kept in CPU memory, in their precision: it is what a difference is taken
    to.
    """

    def __init__(
        self, transport: Transport, *, dtype: torch.dtype, bucket_bytes: int, anchor_every: int, sparse: bool
    ) -> None:
        """`sparse`: send what changed where that is smaller; else everything, every time."""
        self._transport, self._dtype, self._sparse = transport, dtype, sparse
        self._bucket_bytes, self._anchor_every = bucket_bytes, anchor_every
        self._held: dict[str, Tensor] = {}
        self._version: int | None = None
        """That every engine is brought to; `None` if the next update is the first, or the last failed."""
        self._chain: list[WeightUpdate] = []
        """The last anchor and all updates since."""
        self._count = 0
        """Updates published."""
        self._whole_until: dict[str, int] = {}
        """The count until which a tensor is sent whole without a look at what changed."""
        self._retired: list[WeightUpdate] = []
        """The chain before, which engines may still be fetching."""
        self._since_anchor, self._delta_bytes = 0, 0
        """Updates, the anchor included, and bytes without it."""
        self._resumed: dict[str, Any] | None = None

    @property
    def cadence(self) -> dict[str, Any]:
        """What decides when the next anchors are due, and of which tensors the changes are looked for."""
        return {
            "count": self._count,
            "since_anchor": self._since_anchor,
            "delta_bytes": self._delta_bytes,
            "whole_until": dict(self._whole_until),
        }

    def resume(self, cadence: dict[str, Any]) -> None:
        """After the next update, which is an anchor, go on as a publisher with this `cadence` would: what a resumed run
        sends is what it would have sent."""
        self._resumed = cadence

    def restart(self) -> None:
        """The next update is an anchor: other tensors will be trained."""
        self._version = None
        self._whole_until = {}

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int, adapter_rank: int) -> WeightUpdate:
        """Publish named tensors, each read before the next is asked for, as `version`.

        Raises `ValueError` if they are not the ones of the version before, and `restart` was not called.
        """
        for update in self._retired:
            self._drop(update.buckets)
        self._retired = []
        buckets: list[Bucket] = []
        try:
            return self._publish(tensors, version, adapter_rank, buckets)
        except BaseException:
            self._drop(buckets)
            raise

    def _publish(
        self, tensors: Iterable[tuple[str, Tensor]], version: int, adapter_rank: int, buckets: list[Bucket]
    ) -> WeightUpdate:
        """`publish`; `buckets` gets what was put."""
        base = None if self._anchor_is_due() else self._version
        self._version = None
        held, self._held = self._held, {}
        digests: dict[str, str] = {}
        waiting: dict[str, Parts] = {}
        filled, all_dense = 0, True
        for name, tensor in tensors:
            if base is not None and name not in held:
                raise ValueError(f"{name} was not trained in version {base}, which version {version} is based on")
            parts = self._take(name, tensor, held.pop(name, None), base is not None)
            digests[name] = digest(self._held[name])
            all_dense &= "" in parts
            if waiting and filled + size(parts) > self._bucket_bytes:
                buckets.append(self._put(waiting, version))
                waiting, filled = {}, 0
            waiting[name] = parts
            filled += size(parts)
        if waiting:
            buckets.append(self._put(waiting, version))
        if base is not None and held:
            raise ValueError(f"{next(iter(held))} of version {base} is not in version {version}, which is based on it")
        update = WeightUpdate(version, None if all_dense else base, tuple(buckets), digests, adapter_rank)
        if update.base_version is None:
            self._retired, self._chain = self._chain, []
            self._since_anchor, self._delta_bytes = 0, 0
        else:
            self._delta_bytes += update.bytes
        self._chain.append(update)
        self._version = version
        self._count += 1
        self._since_anchor += 1
        if self._resumed is not None:
            self._count, self._whole_until = self._resumed["count"], self._resumed["whole_until"]
            self._since_anchor, self._delta_bytes = self._resumed["since_anchor"], self._resumed["delta_bytes"]
            self._resumed = None
        return update

    def _anchor_is_due(self) -> bool:
        if self._version is None or not self._sparse:
            return True
        return self._since_anchor >= self._anchor_every or self._delta_bytes > _MOST_DELTAS * self._chain[0].bytes

    def _take(self, name: str, tensor: Tensor, old: Tensor | None, sparse: bool) -> Parts:
        """Encode a tensor, on the device where it is, and hold it from now on."""
        new = tensor.detach().to(self._dtype)
        if old is None or old.shape != new.shape:
            old, sparse = torch.empty(new.shape, dtype=self._dtype), False
        sparse = sparse and self._count >= self._whole_until.get(name, 0)
        parts = encode_tensor(new, old.to(new.device) if sparse else None, sparse=sparse)
        if sparse and "" in parts and new.element_size() == _FLOAT32:  # for many small tensors, looking is what costs
            self._whole_until[name] = self._count + _PATIENCE
        self._held[name] = old.copy_(new)
        return {"": old} if "" in parts else parts  # `new` may be the parameter, which ZeRO-3 takes apart again

    def _put(self, entries: dict[str, Parts], version: int) -> Bucket:
        payload = pack(entries)
        names = tuple(entries)
        ticket: Any = self._transport.put(payload, contents(names, version))
        return Bucket(ticket, len(payload), digest_bytes(payload), names)

    def _drop(self, buckets: Iterable[Bucket]) -> None:
        for bucket in buckets:
            self._transport.drop(bucket.ticket)
