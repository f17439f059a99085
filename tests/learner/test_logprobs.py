"""Lean log-probabilities equal those of the whole logits, in less memory, and under ZeRO-3."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen3Config

from hybrid_rl.learner.logprobs import Head, PolicyModel, read_head
from tests.families import FAMILIES, VOCAB
from tests.learner.processes import on_ranks

CASES = {
    "qwen2": {},  # tied
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": None},
    "granite_hybrid_dense": {"logits_scaling": 7.0},
    "cohere2": {},
    "falcon_h1": {"lm_head_multiplier": 0.3, "tie_word_embeddings": True},
    "gpt2": {},
    "llama4": {},
}


def _model(family: str, options: dict[str, Any]) -> Any:
    config = FAMILIES[family]()
    for name, value in options.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.double()


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    at = torch.tensor([2, 3, 4, 7, 10, 11, 15])
    return ids, at, ids.flatten()[at + 1], torch.randn(2, len(at), generator=generator, dtype=torch.float64)


def _gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CASES)
def test_it_equals_the_whole_logits(family: str):
    model = _model(family, CASES[family]).eval()
    ids, at, targets, weights = _batch()
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[at] / 0.7
    distribution = torch.log_softmax(logits, -1)
    expected = distribution.gather(-1, targets[:, None])[:, 0]
    entropy = -(distribution.exp() * distribution).sum(-1)
    wanted = _gradients(model, weights[0] @ expected + weights[1] @ entropy)
    for tokens in (1, 3, 100):
        policy = PolicyModel(model, temperature=0.7, chunk_mib=1)
        assert policy.whole_logits is None
        policy._chunks._tokens = tokens
        logprobs, entropies = policy(ids, at, targets, "grad", use_cache=False)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(entropies, entropy, rtol=0, atol=1e-10)
        got = _gradients(model, weights[0] @ logprobs + weights[1] @ entropies)
        assert got.keys() == wanted.keys()
        for name in got:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-10, msg=name)
        logprobs, entropies = policy(ids, at, targets, True, use_cache=False)
        assert not entropies.requires_grad
        assert policy(ids, at, targets, use_cache=False)[1].numel() == 0


@pytest.mark.parametrize(
    ("family", "options", "scale", "cap"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ("granite_moe", {"logits_scaling": 8.0}, 0.125, None),
        ("falcon_h1", {"lm_head_multiplier": 0.02}, 0.02, None),
        ("qwen3", {}, 1.0, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_read(family: str, options: dict[str, Any], scale: float, cap: float | None, dtype: torch.dtype):
    model = _model(family, options).to(dtype).train()
    before = copy.deepcopy(model.state_dict())
    head = read_head(model)
    assert isinstance(head, Head)
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert head.cap == (pytest.approx(cap, rel=1e-6) if cap else None)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unknown_treatment_of_logits_falls_back():
    model = _model("qwen3", {})
    forward = model.forward

    def shifted(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        output.logits = output.logits + torch.arange(VOCAB) / 7
        return output

    model.forward = shifted
    policy = PolicyModel(model, temperature=1.0, chunk_mib=1)
    assert policy.whole_logits is not None
    assert "soft cap" in str(policy.whole_logits)
    ids, at, targets, _ = _batch()
    expected = model(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)[at].gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(policy(ids, at, targets)[0], expected)


class _Largest(TorchDispatchMode):
    """The size of the largest tensor whose rows are as long as the vocabulary."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.bytes = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dim() and x.shape[-1] == self.vocab:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


def test_chunks_bound_the_logits():
    config = Qwen3Config(  # so narrow that the head's weight, transposed, is no larger than a chunk
        vocab_size=65536,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    policy = PolicyModel(AutoModelForCausalLM.from_config(config), temperature=0.9, chunk_mib=4)
    ids = torch.randint(3, 60000, (2, 60))
    at = torch.arange(0, 118)
    with _Largest(65536) as largest:
        logprobs, entropies = policy(ids, at, ids.flatten()[at + 1], "grad", use_cache=False)
        (logprobs + entropies).sum().backward()
    assert 0 < largest.bytes <= 4 * 2**20
    assert logprobs.dtype == torch.float32


@pytest.mark.parametrize("lean", [True, False])
def test_no_positions_are_still_a_backward_pass(lean: bool):
    policy = PolicyModel(_model("qwen3", {}), temperature=1.0, chunk_mib=1)
    policy.whole_logits = None if lean else "for the test"
    none = torch.zeros(0, dtype=torch.long)
    logprobs, entropies = policy(torch.ones(1, 1, dtype=torch.long), none, none, "grad", use_cache=False)
    assert logprobs.shape == entropies.shape == (0,)
    gradients = _gradients(policy, logprobs.sum() + entropies.sum())
    assert any("layers" in name for name in gradients)
    assert all(not gradient.any() for gradient in gradients.values())


def test_it_works_with_gradient_checkpointing():
    ids, at, targets, weights = _batch()
    found = []
    for enabled in (False, True):
        model = _model("qwen3", {}).train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = PolicyModel(model, temperature=1.0, chunk_mib=1)
        policy._chunks._tokens = 2
        found.append(_gradients(model, weights[0] @ policy(ids, at, targets, use_cache=False)[0]))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_partitions_the_policy(stage: int):
    """One step of SGD moves every trained weight by its gradient, and the next pass sees the change."""
    on_ranks(1, _partitions, stage)


def _partitions(rank: int, port: int, stage: int) -> None:
    import deepspeed.ops

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    os.environ["LOCAL_SIZE"] = "1"
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for trained in ("all", "tied", "head", "lora head", "all but the head"):
        _check_partitions(stage, trained)


def _check_partitions(stage: int, trained: str) -> None:
    import deepspeed

    model = _model("qwen2" if trained == "tied" else "qwen3", {}).float().train()
    if trained == "lora head":
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(target_modules=["lm_head", "q_proj"], r=2, init_lora_weights=False)
        model = inject_adapter_in_model(config, model)
    elif trained == "head":
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    elif trained == "all but the head":
        model.lm_head.requires_grad_(False)
    ids, at, targets, weights = _batch()
    batches = [(ids, at[:n], targets[:n], weights[0, :n].float()) for n in (7, 0, 3)]

    def loss(policy: Any, batch: Any) -> Tensor:
        return batch[3] @ policy(*batch[:3], "grad", use_cache=False)[0]

    def passes(policy: Any, before: Any, backward: Any, step: Any) -> list[float]:
        losses = []
        for _ in range(2):
            for i, batch in enumerate(batches):
                before(i == len(batches) - 1)
                value = loss(policy, batch)
                backward(value)
                losses.append(float(value.detach()))
            step()
        return losses

    plain = PolicyModel(copy.deepcopy(model), temperature=0.8, chunk_mib=1)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    expected = passes(plain, lambda last: None, lambda x: x.backward(), step)
    policy = PolicyModel(model, temperature=0.8, chunk_mib=1)
    policy._chunks._tokens = 2
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # the default clips
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {
                "stage": stage,
                "contiguous_gradients": True,
                "overlap_comm": False,
                "stage3_param_persistence_threshold": 0,
            },
        },
    )

    def backward(x: Tensor) -> None:
        engine.backward(x, scale_wrt_gas=False)

    losses = passes(engine, engine.set_gradient_accumulation_boundary, backward, engine.step)
    assert losses == pytest.approx(expected, abs=1e-5), trained
    assert expected[0] != pytest.approx(expected[3], abs=1e-3), "the step did something"
