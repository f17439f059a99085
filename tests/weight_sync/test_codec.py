"""Every form of every tensor gives back its bits, wherever it is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid_rl.weight_sync import Record, digest, encode_tensor, lora_factors, lora_names, pack, unpack
from hybrid_rl.weight_sync.codec import Parts, size

ODD = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40, 3e38]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def sent(parts: Parts) -> Record:
    (record,) = unpack(pack({"a.weight": parts}))
    return record


def written(record: Record, old: Tensor, shard: tuple[int, int] | None = None, length: int = 0) -> Tensor:
    """Into a view with holes and swapped strides."""
    old = old if shard is None else old.narrow(*shard, length)
    backing = torch.full((*old.shape[::-1], 2), 7.0, dtype=old.dtype)
    held = backing[..., 0].permute(tuple(reversed(range(old.dim()))))
    held.copy_(old)
    record.write_to(held, shard)
    assert (backing[..., 1] == 7).all(), "nothing beside it is touched"
    return held


@st.composite
def changes(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A tensor before and after: any share of it changed, by little, by much, to and from odd values."""
    shape = draw(st.sampled_from([(), (1,), (0, 3), (7,), (300,), (5, 1031), (40, 33), (3, 4, 50)]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    share = draw(st.sampled_from([0.0, 0.001, 0.02, 0.3, 0.6, 1.0]))
    scale = draw(st.sampled_from([1e-6, 1e-3, 0.1, 10.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def odd(tensor: Tensor) -> Tensor:
        where = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.05]))
        values = torch.tensor(ODD)[torch.randint(len(ODD), shape, generator=generator)]
        return torch.where(where, values, tensor).to(dtype)

    old = odd(torch.randn(shape, generator=generator) * 0.02)
    moved = odd(old.float() * (1 + scale * torch.randn(shape, generator=generator)))
    return old, torch.where(torch.rand(shape, generator=generator) < share, moved, old)


@settings(max_examples=300, deadline=None)
@given(changes())
def test_any_change_arrives_bit_for_bit(pair: tuple[Tensor, Tensor]):
    old, new = pair
    parts = encode_tensor(new, old, sparse=True)
    record = sent(parts)
    assert record.shape == new.shape
    assert torch.equal(bits(written(record, old)), bits(new))
    assert size(parts) <= new.nbytes
    for dim in range(old.dim()):
        length = old.shape[dim] // 2
        for start in (0, old.shape[dim] - length):
            part = new.narrow(dim, start, length)
            assert torch.equal(bits(written(record, old, (dim, start), length)), bits(part))


def test_each_form_is_used_where_it_is_the_smallest():
    old = torch.linspace(0.1, 0.2, 10_000, dtype=torch.bfloat16).view(100, 100)
    one = old.clone()
    one[99, 99] += 1
    assert encode_tensor(one, None, sparse=True).keys() == encode_tensor(one, old, sparse=False).keys() == {""}
    sparse = encode_tensor(one, old, sparse=True)
    assert "gaps" in sparse
    # 9,999 unchanged elements are 39 times 255 and 54 more.
    assert sparse["gaps"].tolist() == [255] * 39 + [54]
    assert sparse["steps"].tolist() == [-128]
    assert sparse["values"].tolist() == [one[99, 99].item()]
    everywhere = encode_tensor((old.view(torch.int16) + 3).view(torch.bfloat16), old, sparse=True)
    assert everywhere.keys() == {"steps", "values"}
    assert size(everywhere) == old.nbytes / 2
    assert encode_tensor(-old, old, sparse=True).keys() == {""}
    assert encode_tensor(old, old, sparse=True)["steps"].numel() == 0


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 5000])
def test_gaps_around_the_escape(gap: int):
    old, new = torch.zeros(6000), torch.zeros(6000)
    new[[3, 4 + gap]] = 1e-45  # the smallest step
    parts = encode_tensor(new, old, sparse=True)
    assert parts["gaps"].tolist() == [3] + [255] * (gap // 255) + [gap % 255]
    assert torch.equal(written(sent(parts), old), new)


def test_what_does_not_fit_is_refused():
    old = torch.zeros(4, 6)
    new = old.clone()
    new[1, 1] = 1
    record = sent(encode_tensor(new, old, sparse=True))
    for held, shard in [(torch.zeros(6, 4), None), (torch.zeros(4, 6).half(), None), (torch.zeros(3, 6), (0, 2))]:
        with pytest.raises(ValueError, match=r"a\.weight is torch\.float32"):
            record.write_to(held, shard)


def test_factors_have_one_rank_and_their_scaling_in_b():
    lora = {"l.0.k": (torch.randn(2, 6), torch.randn(4, 2), 0.3), "l.0.v": (torch.randn(3, 6), torch.randn(4, 3), 2.0)}
    factors = lora_factors(lora, 3)
    for module, (a, b, scaling) in lora.items():
        name_a, name_b = lora_names(module)
        assert factors[name_a].shape == (3, 6)
        assert factors[name_b].shape == (4, 3)
        torch.testing.assert_close(factors[name_b] @ factors[name_a], scaling * b @ a)


def test_digests_tell_shape_type_and_every_bit():
    tensor = torch.randn(4, 6)
    other = tensor.clone()
    other.view(torch.int32)[3, 5] ^= 1
    different = [tensor, other, tensor.view(6, 4), tensor.view(torch.int32), tensor.bfloat16()]
    assert len({digest(t) for t in different}) == len(different)
    assert digest(tensor.T.contiguous().T) == digest(tensor)
