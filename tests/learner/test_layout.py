"""Layouts: packed sequences give what each gives by itself, and a model that lets them leak is found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hybrid_rl.components import UnknownArchitecture, read_model
from hybrid_rl.learner.layout import PACKED, arrange, choose_layout, use_segment_attention
from hybrid_rl.settings import ConfigError
from tests.families import FAMILIES, build

ROWS = [[5, 6, 7], [8], [9, 10, 11], [12, 13, 14, 15]]


@pytest.mark.parametrize("layout", ["segments", "positions", "padded", "single"])
def test_every_sequence_lies_where_it_is_said_to(layout: Any):
    given = arrange(ROWS, layout)
    flat = given.input_ids.flatten().tolist()
    assert [flat[start : start + len(row)] for start, row in zip(given.starts, ROWS, strict=True)] == ROWS
    assert given.kwargs["use_cache"] is False
    assert "attention_mask" not in given.kwargs
    if layout in PACKED:
        positions = given.kwargs["position_ids"].flatten().tolist()
        assert given.input_ids.shape == (1, 11)
        for start, row in zip(given.starts, ROWS, strict=True):
            assert positions[start : start + len(row)] == list(range(len(row)))
            assert start in given.kwargs["cu_seq_lens_q"].tolist()
    assert arrange([], layout).input_ids.shape == (1, 1)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "qwen3_moe", "gpt2", "deepseek_v3"])
def test_segments_are_exact(family: str):
    model = build(family)
    report = choose_layout(model)
    assert report.chosen == "segments"
    assert report.errors["segments"] < 1e-5
    assert report.gradient_errors["segments"] < 1e-5
    assert report.leaks["segments"] == 0.0
    assert model.config._attn_implementation == "hybrid_rl_segments"


def test_a_sliding_window_is_kept_within_a_sequence():
    config = FAMILIES["gemma3"]()
    assert config.sliding_window < 101, "the check's longest sequence"
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    row = torch.randint(3, 60, (60,)).tolist()
    given = arrange([row, row[:5]], "segments")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        assert use_segment_attention(model)
        packed = model(input_ids=given.input_ids, **given.kwargs).logits[0][given.starts[0] :][: len(row)]
        alone = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["falcon_h1", "qwen3_5", "lfm2", "jamba", "gpt_oss"])
def test_what_leaks_is_padded(family: str):
    """Some of these leak by far less than the tolerance: no gradient may pass from one sequence to another."""
    model = build(family)
    before = model.config._attn_implementation
    report = choose_layout(model)
    assert report.chosen == "padded"
    assert model.config._attn_implementation == before
    with pytest.raises(ConfigError, match=r"learner\.packing=always.*positions"):
        choose_layout(model, packing="always")
    assert model.config._attn_implementation == before


def test_attention_that_ignores_the_bounds_of_sequences_is_rejected():
    def leaky(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, scaling=kwargs["scaling"])

    AttentionInterface.register("leaky", leaky)
    AttentionMaskInterface.register("leaky", lambda **_: None)
    model = build("qwen3")
    model.set_attn_implementation("leaky")
    report = choose_layout(model)
    assert report.chosen == "padded"
    assert report.leaks["positions"] > 0
    assert "leak" in report.reason
    assert model.config._attn_implementation == "leaky"


@pytest.mark.parametrize("family", ["stablelm", "gemma2"])
def test_attention_that_cannot_be_switched_packs_by_positions(family: str):
    """StableLM hands its attention no bounds; Gemma 2's has a soft cap, which ours refuses."""
    model = build(family)
    report = choose_layout(model)
    assert report.chosen == "positions"
    assert model.config._attn_implementation == "sdpa"


def test_chunks_of_attention_are_not_packed():
    report = choose_layout(build("llama4"))
    assert report.chosen == "padded"
    assert "chunks" in report.raised["positions"]


def test_the_model_and_the_global_generator_are_left_alone():
    model = build("qwen3").train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    report = choose_layout(model, packing="never")
    assert report.chosen == "padded"
    assert set(report.errors) == {"padded"}
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].mlp.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_segments_train_with_gradient_checkpointing():
    model = build("qwen3").train()
    use_segment_attention(model)
    given = arrange(ROWS, "segments")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=given.input_ids, **given.kwargs).logits.logsumexp(-1).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_segments_are_exact_in_half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        report = choose_layout(build("gemma3"), tolerance=3e-2)
        assert report.chosen == "segments"
        assert report.leaks == {"segments": 0.0, "positions": 0.0, "padded": 0.0}
        assert choose_layout(build("falcon_h1"), tolerance=3e-2).chosen == "padded"


@pytest.mark.slow
def test_every_family_gets_a_layout_and_none_leaks(capsys: pytest.CaptureFixture[str]):
    lines = ["| family | topology | segments | positions | padded | chosen |", "|---|---|---|---|---|---|"]
    for family in FAMILIES:
        model = build(family)
        report = choose_layout(model)
        cells = [
            "raises" if name in report.raised else f"{report.errors[name]:.1e} / leak {report.leaks[name]:.0e}"
            for name in ("segments", "positions", "padded")
        ]
        try:
            topology = read_model(model).topology
        except UnknownArchitecture:
            topology = "unknown"
        lines.append(f"| {family} | {topology} | {' | '.join(cells)} | {report.chosen} |")
        assert report.leaks.get(report.chosen, 0.0) == 0.0, family
        assert report.chosen != "single", (family, report.reason)
        if "recurrent" in str(topology) or "hybrid" in str(topology):
            assert report.chosen == "padded", family
    with capsys.disabled():
        print("\n" + "\n".join(lines))


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe", "gpt2", "deepseek_v3"])
def test_a_shared_prompt_is_exact(family: str):
    """Gemma 3 has layers with a window that is shorter than the check's sequences."""
    report = choose_layout(build(family), sharing=True)
    assert report.chosen == "shared"
    assert report.errors["shared"] < 1e-5
    assert report.gradient_errors["shared"] < 1e-5
    assert report.leaks["shared"] == 0.0


@pytest.mark.parametrize("family", ["falcon_h1", "qwen3_5", "gpt_oss"])
def test_a_prompt_is_not_shared_where_the_completions_leak_or_attention_is_not_ours(family: str):
    report = choose_layout(build(family), sharing=True)
    assert report.chosen == "padded"
    assert "shared" in report.raised or report.leaks["shared"] > 0


def test_a_prompt_lies_once_for_all_of_its_completions():
    rows, prompts = [[5, 6, 7, 8], [9, 10, 11], [5, 6, 7, 12, 13], [5, 6, 7], [9, 10, 14]], [3, 2, 3, 3, 2]
    given = arrange(rows, "shared", prefixes=prompts)
    flat, positions = given.input_ids.flatten().tolist(), given.kwargs["position_ids"].flatten().tolist()
    places = [[given.at(i, t) for t in range(len(row))] for i, row in enumerate(rows)]
    assert [[flat[at] for at in each] for each in places] == rows
    assert [[positions[at] for at in each] for each in places] == [list(range(len(row))) for row in rows]
    assert places[0][:3] == places[2][:3] == places[3]
    assert (len(flat), given.saved) == (3 + 2 + 5, 3 + 3 + 2)
    assert given.kwargs["cu_seq_lens_q"].diff().sum() == len(flat)


def test_prompts_are_not_shared_where_that_saves_little():
    rows = [[1, *range(2, 40)], [1, *range(3, 41)]]
    given = arrange(rows, "shared", prefixes=[1, 1])
    assert given.saved == 0
    assert given.input_ids.equal(arrange(rows, "segments").input_ids)
