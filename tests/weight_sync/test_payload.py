"""The payload is exact and complete; a receipt that differs stops the run and names the tensor."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hybrid_rl.types import Receipt
from hybrid_rl.weight_sync import SyncMismatch, decode_update, digest, encode_update, lora_names, verify_receipts


def update(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    full = {"l.0.q.weight": torch.randn(4, 6)}
    lora = {"l.0.k": (torch.randn(2, 6), torch.randn(4, 2), 0.3), "l.0.v": (torch.randn(3, 6), torch.randn(4, 3), 2.0)}
    return full, lora, encode_update(full, lora, version=7, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_sent_is_what_was_trained(dtype: torch.dtype):
    full, lora, sent = update(dtype)
    got_full, got_lora = decode_update(sent)
    torch.testing.assert_close(got_full["l.0.q.weight"], full["l.0.q.weight"].to(dtype), atol=0, rtol=0)
    for module, (a, b, scaling) in lora.items():
        name_a, name_b = lora_names(module)
        assert got_lora[name_a].shape == (3, 6), "padded to the largest rank"
        product = got_lora[name_b].float() @ got_lora[name_a].float()
        tolerance = 1e-6 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(product, scaling * b @ a, atol=tolerance, rtol=0)
    assert sent.adapter_rank == 3
    assert {**got_full, **got_lora}.keys() == sent.digests.keys()
    assert all(digest(t) == sent.digests[n] for n, t in {**got_full, **got_lora}.items())


def test_a_digest_sees_one_bit_the_shape_and_the_type():
    x = torch.arange(6.0)
    changed = x.clone()
    changed.view(torch.int32)[3] ^= 1
    assert len({digest(x), digest(changed), digest(x.view(2, 3)), digest(x.bfloat16())}) == 4
    assert digest(x.view(2, 3).t()) == digest(x.view(2, 3).t().contiguous())


def test_receipts_are_compared_tensor_by_tensor():
    _, _, sent = update()
    good = Receipt("engine-0", 7, dict(sent.digests))
    assert verify_receipts(sent, [good, good]) == 2
    bad_name = next(iter(sent.digests))
    for receipt, message in [
        (dataclasses.replace(good, version=6), "version 6"),
        (dataclasses.replace(good, digests={**sent.digests, bad_name: "00"}), f"other bytes for {bad_name}"),
        (dataclasses.replace(good, digests={k: v for k, v in sent.digests.items() if k != bad_name}), "does not hold"),
        (dataclasses.replace(good, digests={**sent.digests, "extra": "00"}), "was not sent"),
    ]:
        with pytest.raises(SyncMismatch, match=message):
            verify_receipts(sent, [good, receipt])
