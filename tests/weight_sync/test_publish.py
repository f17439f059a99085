"""Versions published one after another bring an engine, bit for bit, to what was trained."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid_rl.cluster.inline import Memory
from hybrid_rl.types import Receipt, WeightUpdate
from hybrid_rl.weight_sync import Publisher, SyncMismatch, UpdateRefused, digest, fetch, verify_receipts
from tests.held import receive

KIB = 1024


class Learner:
    """Tensors that move a little at every step."""

    def __init__(self, dtype: torch.dtype, scale: float = 1e-4, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._scale, self._dtype = scale, dtype
        shapes = {"a": (40, 60), "b": (30,), "c": (200, 50), "d": (3, 5)}
        self.masters = {n: 0.02 * torch.randn(s, generator=self._generator) for n, s in shapes.items()}

    def step(self) -> None:
        for master in self.masters.values():
            master += self._scale * torch.randn(master.shape, generator=self._generator)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: master.to(self._dtype) for name, master in self.masters.items()}


def publisher(transport: Memory, *, dtype: torch.dtype = torch.bfloat16, kib: int = 64, **changes) -> Publisher:
    options = {"anchor_every": 50, "sparse": True, **changes}
    return Publisher(transport, dtype=dtype, bucket_bytes=kib * KIB, **options)


def assert_holds(held: dict[str, Tensor], expected: dict[str, Tensor], update: WeightUpdate) -> None:
    assert held.keys() == expected.keys() == update.digests.keys()
    for name, tensor in expected.items():
        assert torch.equal(held[name], tensor), name
    receipt = Receipt("e", update.version, {name: digest(t) for name, t in held.items()}, "none")
    assert verify_receipts(update, [receipt]) == 1


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    scale=st.sampled_from([1e-7, 1e-5, 1e-2]),
    kib=st.sampled_from([1, 8, 1000]),
    anchor_every=st.integers(1, 4),
    sparse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_chain_is_what_was_trained(dtype, scale: float, kib: int, anchor_every: int, sparse: bool, seed: int):
    transport, learner = Memory(), Learner(dtype, scale, seed)
    source = publisher(transport, dtype=dtype, kib=kib, anchor_every=anchor_every, sparse=sparse)
    chain: list[WeightUpdate] = []
    for version in range(7):
        update = source.publish(learner.tensors.items(), version, adapter_rank=0)
        chain = [*([] if update.base_version is None else chain), update]
        assert [u.base_version for u in chain] == [None, *(u.version for u in chain[:-1])]
        assert len(chain) <= anchor_every
        assert_holds(receive(transport, chain), learner.tensors, update)
        for bucket in update.buckets:
            assert bucket.bytes <= kib * KIB + 2 * KIB or len(bucket.tensors) == 1, "names and all"
        learner.step()


def test_anchors_come_at_the_start_when_due_and_when_the_deltas_have_grown():
    def versions_of_anchors(scale: float, **options) -> list[int]:
        transport, learner = Memory(), Learner(torch.bfloat16, scale)
        source, found = publisher(transport, **options), []
        for version in range(12):
            if source.publish(learner.tensors.items(), version, 0).base_version is None:
                found.append(version)
            learner.step()
        return found

    assert versions_of_anchors(1e-5) == [0]
    assert versions_of_anchors(1e-5, anchor_every=5) == [0, 5, 10]
    assert versions_of_anchors(1e-5, sparse=False) == list(range(12))
    grown = versions_of_anchors(2e-3)  # about half an anchor each
    assert grown[0] == 0
    assert 4 <= grown[1] <= 6


def test_a_float32_run_builds_no_chain():
    transport, learner = Memory(), Learner(torch.float32)
    source = publisher(transport, dtype=torch.float32)
    for version in range(4):
        assert source.publish(learner.tensors.items(), version, 0).base_version is None
        learner.step()
    assert len(transport._payloads) == 2, "of this version and the one that engines may still be fetching"


def test_superseded_updates_are_dropped_one_publish_later():
    transport, learner = Memory(), Learner(torch.bfloat16, 1e-5)
    source = publisher(transport, anchor_every=3)
    kept = []
    for version in range(8):
        source.publish(learner.tensors.items(), version, 0)
        kept.append(len(transport._payloads))
        learner.step()
    assert kept == [1, 2, 3, 4, 2, 3, 4, 2]


def test_what_fails_while_it_is_published_leaves_nothing_behind():
    transport, learner = Memory(), Learner(torch.bfloat16)
    source = publisher(transport, kib=1)

    def breaking():
        yield from list(learner.tensors.items())[:3]
        raise RuntimeError("a rank died")

    update = source.publish(learner.tensors.items(), 0, 0)
    kept = len(transport._payloads)
    assert kept == len(update.buckets) > 1
    source.restart()
    with pytest.raises(RuntimeError, match="a rank died"):
        source.publish(breaking(), 1, 0)
    assert len(transport._payloads) == kept


def test_after_a_restart_what_changes_is_looked_at_again():
    transport, learner = Memory(), Learner(torch.float32)
    source = publisher(transport, dtype=torch.float32)
    source.publish(learner.tensors.items(), 0, 0)
    learner.step()
    assert source.publish(learner.tensors.items(), 1, 0).base_version is None, "all has changed"
    source.restart()
    source.publish(learner.tensors.items(), 2, 0)
    assert source.publish(learner.tensors.items(), 3, 0).base_version == 2, "nothing has"


def test_other_tensors_need_a_restart():
    transport, learner = Memory(), Learner(torch.bfloat16)
    source = publisher(transport)
    source.publish(learner.tensors.items(), 0, 0)
    for other, name in (({"x": torch.ones(3)}, "x"), ({"a": learner.tensors["a"]}, "b")):
        with pytest.raises(ValueError, match=f"^{name} "):
            source.publish(other.items(), 1, 0)
        update = source.publish(learner.tensors.items(), 2, 0)
        assert update.base_version is None, "what was half done is no base"
        assert_holds(receive(transport, [update]), learner.tensors, update)
    source.restart()
    update = source.publish([("x", torch.ones(3))], 3, 0)
    assert update.base_version is None
    assert receive(transport, [update]).keys() == {"x"}


def test_each_tensor_is_read_before_the_next_is_asked_for():
    """Under ZeRO-3, a module is whole only until then."""
    transport, learner = Memory(), Learner(torch.bfloat16)
    source, buffers = publisher(transport), {n: torch.empty_like(t) for n, t in learner.tensors.items()}

    def gathering():
        for name, tensor in learner.tensors.items():
            buffers[name].copy_(tensor)
            yield name, buffers[name]
            buffers[name].fill_(float("nan"))

    chain = []
    for version in range(3):
        chain.append(source.publish(gathering(), version, 0))
        assert_holds(receive(transport, chain), learner.tensors, chain[-1])
        learner.step()


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_a_damaged_part_is_refused(position: int, bit: int):
    transport, learner = Memory(), Learner(torch.bfloat16)
    update = publisher(transport).publish(learner.tensors.items(), 7, 0)
    (bucket,) = update.buckets
    damaged = bytearray(transport._payloads[bucket.ticket])
    damaged[position % len(damaged)] ^= 1 << bit
    transport._payloads[bucket.ticket] = bytes(damaged)
    with pytest.raises(UpdateRefused, match="a and 3 more tensors of version 7 arrived damaged"):
        fetch(transport, bucket, 7)


def test_receipts_name_engine_tensor_and_version():
    learner = Learner(torch.bfloat16)
    update = publisher(Memory()).publish(learner.tensors.items(), 7, 0)
    good = Receipt("engine-0", 7, dict(update.digests), "none")
    assert verify_receipts(update, [good, good]) == 2
    wrong = {
        r"engine-1 holds weights of version 6, the learner sent 7": {"version": 6},
        r"engine-1 holds other bytes for b \(version 7\)": {"digests": {**update.digests, "b": "0"}},
        r"engine-1 does not hold a \(version 7\)": {"digests": {k: v for k, v in update.digests.items() if k != "a"}},
        r"engine-1 reports x, which was not sent \(version 7\)": {"digests": {**update.digests, "x": "0"}},
    }
    for message, change in wrong.items():
        with pytest.raises(SyncMismatch, match=message):
            verify_receipts(update, [good, dataclasses.replace(good, engine="engine-1", **change)])
