"""The contract of rollout engines, on real ones: vLLM (CPU build) and transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import AdaptedModel, apply_plan
from hybrid_rl.cluster.base import worker_environment
from hybrid_rl.components import read_model
from hybrid_rl.config import Config
from hybrid_rl.plan import AdaptationPlan, PlannedModule
from hybrid_rl.rollout import EngineSettings, RolloutEngine
from hybrid_rl.types import Completion, Sampling
from hybrid_rl.weight_sync import encode_update

PROMPTS = [(20, 21, 22), (30, 31, 32, 33, 34), (40,)]
GREEDY = Sampling(n=1, temperature=0.0, top_p=1.0, max_tokens=8, stop=(), seed=0)
SAMPLED = Sampling(n=3, temperature=0.7, top_p=1.0, max_tokens=8, stop=(), seed=0)
SEEDS = [11, 12, 13]
EOS = 1


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request: pytest.FixtureRequest, tiny_model: Path) -> RolloutEngine:
    settings = EngineSettings("engine-x", str(tiny_model), "float32", False, 64, 4, 16, 0.5, 0)
    if request.param == "transformers":
        from hybrid_rl.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(settings)
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "a.json", "eval": "a.json"}})
    os.environ.update(worker_environment(config, gpus=False))
    from hybrid_rl.rollout.vllm_engine import VllmEngine

    return VllmEngine(settings)


def policy(path: Path, seed: int | None) -> AdaptedModel:
    """The model under a plan that treats neighbours of one fused projection differently, moved by `seed`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    full = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.down_proj")
    modules = tuple(
        PlannedModule(c.name, c.component, c.layer, c.shape, c.params, None, None, None, "full")
        if c.name.endswith(full)
        else PlannedModule(c.name, c.component, c.layer, c.shape, c.params, None, 4, 6.0, "lora")
        for c in read_model(model).candidates
    )
    adapted = apply_plan(model, AdaptationPlan("m", "attention-only", {}, 0, modules))
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in [*adapted.full.values(), *adapted.lora_parameters]:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def update_of(adapted: AdaptedModel, version: int):
    lora = {name: (pair.a, pair.b, pair.scaling) for name, pair in adapted.lora.items()}
    return encode_update(adapted.full, lora, version=version, dtype=torch.float32)


@torch.no_grad()
def logprobs_under(adapted: AdaptedModel, prompt: tuple[int, ...], completion: Completion, temperature: float):
    ids = torch.tensor([prompt + completion.token_ids])
    logits = adapted.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def check_agrees(engine: RolloutEngine, adapted: AdaptedModel, version: int) -> None:
    for sampling, temperature in ((GREEDY, 1.0), (SAMPLED, 0.7)):
        groups = engine.generate(PROMPTS, sampling, SEEDS)
        assert [len(g) for g in groups] == [sampling.n] * len(PROMPTS)
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for completion in group:
                assert completion.weight_version == version
                assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= sampling.max_tokens
                assert completion.finish_reason == ("stop" if completion.token_ids[-1] == EOS else "length")
                expected = logprobs_under(adapted, prompt, completion, temperature)
                torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_before_any_update_the_base_model_answers(engine: RolloutEngine, tiny_model: Path):
    assert engine.info() == {"pid": os.getpid(), "version": 0, "engine": "engine-x"}
    check_agrees(engine, policy(tiny_model, None), 0)


def test_after_each_update_the_new_policy_answers_and_the_receipt_says_so(engine: RolloutEngine, tiny_model: Path):
    answers = []
    for version, seed in ((1, 101), (2, 102), (3, 101)):
        adapted = policy(tiny_model, seed)
        sent = update_of(adapted, version)
        receipt = engine.apply_update(sent)
        assert (receipt.engine, receipt.version) == ("engine-x", version)
        assert receipt.digests == sent.digests, "the engine holds, bit for bit, what was sent"
        check_agrees(engine, adapted, version)
        answers.append([[c.token_ids for c in g] for g in engine.generate(PROMPTS, SAMPLED, SEEDS)])
    assert answers[0] != answers[1]
    assert answers[0] == answers[2], "nothing of an update is left behind by the next"


def test_a_seed_decides_the_completions_of_its_prompt_alone(engine: RolloutEngine):
    together = engine.generate(PROMPTS, SAMPLED, SEEDS)
    alone = engine.generate(PROMPTS[1:2], SAMPLED, SEEDS[1:2])
    assert [c.token_ids for c in alone[0]] == [c.token_ids for c in together[1]]
    other = engine.generate(PROMPTS[1:2], SAMPLED, [99])
    assert [c.token_ids for c in other[0]] != [c.token_ids for c in alone[0]]
    assert len({c.token_ids for c in together[0]}) > 1, "the completions of a group differ"


def test_prompts_that_fill_several_batches_are_seeded_too(engine: RolloutEngine):
    """More prompt tokens at once than an engine takes into one batch."""
    prompts = [tuple(2 + (i * j) % 250 for j in range(56)) for i in range(160)]
    sampling = Sampling(n=1, temperature=1.0, top_p=1.0, max_tokens=2, stop=(), seed=0)
    seeds = list(range(160))
    first = engine.generate(prompts, sampling, seeds)
    assert [c.token_ids for (c,) in engine.generate(prompts[-2:], sampling, seeds[-2:])] == [
        c.token_ids for (c,) in first[-2:]
    ]


def test_stop_strings_end_a_completion(engine: RolloutEngine):
    (group,) = engine.generate(PROMPTS[:1], GREEDY, SEEDS[:1])
    text = group[0].text
    stop = next(c for c in text if c.isascii() and c.isprintable())
    sampling = Sampling(n=1, temperature=0.0, top_p=1.0, max_tokens=8, stop=(stop,), seed=0)
    (stopped,) = engine.generate(PROMPTS[:1], sampling, SEEDS[:1])
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].text == text[: text.index(stop)]
    assert len(stopped[0].token_ids) < len(group[0].token_ids)
