"""Components and topology on tiny models of several families, without their weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hybrid_rl.components import candidate_matrices, topology

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
FAMILIES = {
    "Qwen3Config": ({"head_dim": 16}, "attention-only", {"attention": 8, "mlp": 6}),
    "LlamaConfig": ({}, "attention-only", {"attention": 8, "mlp": 6}),
    "Gemma3TextConfig": ({"head_dim": 16}, "attention-only", {"attention": 8, "mlp": 6}),
    "FalconH1Config": (MAMBA, "parallel-hybrid", {"attention": 8, "recurrent": 4, "mlp": 6}),
    "Qwen3_5TextConfig": (
        {"head_dim": 16, "num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 2},
        "sequential-hybrid",
        {"attention": 4, "recurrent": 15, "mlp": 12},
    ),
    "Mamba2Config": (
        {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
        "recurrent-only",
        {"recurrent": 4},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str):
    options, kind, counts = FAMILIES[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(transformers, family)(**{**COMMON, **options}))
    candidates = candidate_matrices(model)
    assert topology(model) == kind
    found = {c: sum(m.component == c for m in candidates) for c in ("attention", "recurrent", "mlp")}
    assert {c: n for c, n in found.items() if n} == counts
    modules = dict(model.named_modules())
    for c in candidates:
        assert c.shape == tuple(modules[c.name].weight.shape)
        assert f".{c.layer}." in c.name
    assert len({c.name for c in candidates}) == len(candidates)
