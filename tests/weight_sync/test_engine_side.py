"""Updates on vLLM beyond one dense model in one process: recurrent layers, experts, tensor parallelism, bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hybrid_rl.config import ConfigError, WarmStartConfig
from hybrid_rl.rollout import RolloutEngine
from hybrid_rl.rollout.engine import run_requests
from hybrid_rl.types import Request, Sampling
from hybrid_rl.weight_sync import UpdateRefused
from tests.weight_sync.engine_side import Learner, Memory, check_logprobs, settings_for, settings_of, started
from trainers.warm_start import build_model, build_tokenizer

PROMPTS = [(20, 21, 22), (30, 31, 32, 33, 34), (40,)]
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
FALCON: dict[str, Any] = SMALL | {
    "mamba_d_ssm": 128,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_chunk_size": 32,
}
MOE: dict[str, Any] = SMALL | {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2}


def saved(config: Any, path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def follow(engine: RolloutEngine, learner: Learner, kinds: str, shares: Sequence[float], tolerance: float = 1e-4):
    """Bring an engine through updates and compare it with the learner after each."""
    sampling = Sampling(2, 0.7, 1.0, 12, (), 0)
    for step, share in enumerate(shares):
        learner.move(step, share, scale=0.03)
        update = learner.publish()
        receipt = engine.apply_updates([update])
        assert (receipt.digests, receipt.adapter) == (update.digests, kinds)
        requests = [Request(f"{step}/{i}", prompt, sampling, 11 + i) for i, prompt in enumerate(PROMPTS)]
        for request, group in zip(requests, run_requests(engine, requests), strict=True):
            for c in group:
                expected = learner.logprobs(request.prompt_ids, c.token_ids, 0.7)
                check_logprobs(c, expected, tolerance)


def check_recomputed(engine: RolloutEngine, learner: Learner) -> None:
    """An update under way: states of the old weights are left behind."""
    request = Request("under way", PROMPTS[1], Sampling(2, 0.7, 1.0, 30, (), 0), 5)
    engine.advance([request], (), 0.0)
    engine.advance((), (), 0.0)
    learner.move(99, scale=0.03)
    engine.apply_updates([learner.publish()], "recompute")
    group = engine.advance((), (), 60.0).finished[request.id]
    crossed = [c for c in group if c.later_versions]
    assert crossed
    for c in crossed:
        at = c.later_versions[0][0]
        expected = learner.logprobs((*PROMPTS[1], *c.token_ids[:at]), c.token_ids[at:], 0.7)
        check_logprobs(replace(c, logprobs=c.logprobs[at:]), expected)


@pytest.mark.parametrize("mode", ["auto", "merged"])
def test_recurrent_projections(tmp_path: Path, mode: str):
    path = saved(transformers.FalconH1Config(**FALCON), tmp_path / "falcon")
    transport = Memory()
    learner = Learner(path, transport, ("layers.1.mamba.in_proj", "mamba.out_proj", "layers.0.self_attn.q_proj"))
    assert "model.layers.0.mamba.in_proj" in learner.lora_modules
    with started("vllm", settings_of(learner, adapter=mode)) as engine:
        follow(engine, learner, "native" if mode == "auto" else "merged", (1.0, 0.01, 0.5))
        check_recomputed(engine, learner)


def test_experts_are_refused_and_what_vllm_has_no_lora_for_is_merged(tmp_path: Path):
    path = saved(transformers.Qwen3MoeConfig(**MOE), tmp_path / "moe")
    transport = Memory()
    learner = Learner(path, transport, ("layers.0.self_attn.q_proj", "experts", "gate"))
    with pytest.raises(ConfigError, match=r"native.*set sync\.adapter=merged"):
        started("vllm", settings_for(path, transport, adapter="native")).__enter__()
    with started("vllm", settings_of(learner)) as engine:
        follow(engine, learner, "merged", (1.0, 0.01))
        update = learner.anchor()
        experts = {**update.digests, "model.layers.0.mlp.experts.gate_up_proj": "x"}
        with pytest.raises(UpdateRefused, match="experts"):
            engine.apply_updates([replace(update, digests=experts)])


def test_a_module_that_vllm_cannot_adapt_is_named_at_the_start(tiny_model: Path):
    settings = settings_for(tiny_model, Memory(), adapter="native", lora_modules=("model.norm",))
    with pytest.raises(ConfigError, match=r"model\.norm.*sync\.adapter=merged"), started("vllm", settings):
        pass


@pytest.mark.parametrize(
    "full", [("lm_head", "embed_tokens", "q_proj"), ("embed_tokens", "v_proj")], ids=["full", "native"]
)
def test_untied_head_and_embedding(tmp_path: Path, full: tuple[str, ...]):
    """As full matrices; the head with an adapter, too."""
    path = saved(transformers.Qwen3Config(**SMALL, head_dim=32), tmp_path / "untied")
    learner = Learner(path, Memory(), full, more=("lm_head", "model.embed_tokens"))
    assert ("lm_head" in learner.lora_modules) == ("lm_head" not in full)
    with started("vllm", settings_of(learner)) as engine:
        follow(engine, learner, "native", (1.0, 0.01, 0.5))


@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"),
    [
        ("native", "float32", 1e-4),
        pytest.param("merged", "float32", 1e-4, marks=pytest.mark.slow),
        pytest.param("native", "bfloat16", 0.2, marks=pytest.mark.slow),
    ],
)
def test_tensor_parallel(tmp_path: Path, mode: str, dtype: str, tolerance: float):
    """Two processes, which share one head of keys and values."""
    path = tmp_path / "parallel"
    tokenizer = build_tokenizer()
    build_model(WarmStartConfig(hidden_size=128, layers=2, heads=4, kv_heads=1), tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    transport = Memory()
    full = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.down_proj")
    learner = Learner(path, transport, full, getattr(torch, dtype))
    with started("vllm", settings_of(learner, adapter=mode, tensor_parallel=2, dtype=dtype)) as engine:
        follow(engine, learner, mode, (1.0, 0.01, 0.5), tolerance)


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
@pytest.mark.parametrize("mode", ["native", "merged"])
def test_bfloat16(tiny_model: Path, kind: str, mode: str):
    transport = Memory()
    learner = Learner(tiny_model, transport, ("q_proj", "down_proj"), torch.bfloat16)
    with started(kind, settings_of(learner, adapter=mode, dtype="bfloat16")) as engine:
        follow(engine, learner, mode, (1.0, 0.01, 0.5), tolerance=0.2)
