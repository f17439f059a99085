"""Episodes of many turns on real engines: vLLM (CPU build) and transformers."""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_rl.cluster.base import worker_environment
from hybrid_rl.cluster.inline import Memory, _InlineHandle
from hybrid_rl.config import Config, RewardConfig
from hybrid_rl.rollout import EngineSettings, Episodes, RolloutPool
from hybrid_rl.rollout.environment import Environment
from hybrid_rl.types import Completion, Prompt, Sampling
from tests.rollout.answering import generate

# Of random tokens, one in four ends a turn.
SAMPLING = Sampling(n=3, temperature=0.7, top_p=1.0, max_tokens=48, stop=tuple(string.ascii_letters), seed=5)
PROMPTS = [Prompt(f"0/{i}", "", tuple(range(20 + i, 25 + i)), {"answer": "42"}) for i in range(4)]
ENVIRONMENT = """
def respond(turns, answer):
    return f"[{turns[-1][-1:]}{answer}]" if len(turns) < 5 else None
"""


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def pool(request: pytest.FixtureRequest, tiny_model: Path) -> RolloutPool:
    settings = EngineSettings("engine-x", str(tiny_model), "float32", False, 64, 0, 16, 0.5, 0, Memory())
    if request.param == "transformers":
        from hybrid_rl.rollout.transformers_engine import TransformersEngine as Engine
    else:
        config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "a.json", "eval": "a.json"}})
        os.environ.update(worker_environment(config, gpus=False))
        from hybrid_rl.rollout.vllm_engine import VllmEngine as Engine
    options = {"max_restarts": 0, "timeout": 60, "start_timeout": 60, "max_concurrent": 16}
    return RolloutPool(lambda i: _InlineHandle("engine-x", Engine(settings)), 1, **options)


@pytest.fixture
def environment(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(ENVIRONMENT)
    started = Environment(f"{path}:respond", RewardConfig(workers=1))
    yield started
    started.close()


def test_turns_go_on_from_the_very_tokens(pool: RolloutPool, environment: Environment, tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)

    def check(prompt: Prompt, completion: Completion) -> None:
        ids, given = completion.token_ids, completion.given
        assert len(ids) == len(completion.logprobs) <= SAMPLING.max_tokens
        for start, end in given:
            last = tokenizer.decode(ids[start - 1])
            assert last == tokenizer.eos_token or any(stop in last for stop in SAMPLING.stop)
            seen = tokenizer.decode(ids[:start], skip_special_tokens=True)
            assert tokenizer.decode(ids[start:end]) in (f"[{seen[-1:]}42]", "[42]"), "it saw the stop string too"
        if given:
            assert completion.text == tokenizer.decode(ids, skip_special_tokens=True)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt.token_ids + ids])).logits[0, len(prompt.token_ids) - 1 : -1]
        every = torch.log_softmax(logits / SAMPLING.temperature, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        for start, end in given:
            every[start:end] = 0
        torch.testing.assert_close(torch.tensor(completion.logprobs), every, atol=1e-4, rtol=0)

    episodes = Episodes(pool, environment=environment, tokenizer=tokenizer, max_turns=8)
    groups = generate(episodes, PROMPTS, SAMPLING)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            check(prompt, completion)
    found = [c for group in groups for c in group]
    assert max(len(c.given) for c in found) == 2, "the environment ends it after the third turn"
    assert {c.finish_reason for c in found if len(c.given) == 2} <= {"stop", "length"}

    episodes.submit(PROMPTS[::-1], SAMPLING, "beside")
    assert sampled(generate(episodes, PROMPTS, SAMPLING)) == sampled(groups), "seeds decide, whatever else is under way"
    while episodes.unfinished("beside"):
        episodes.poll(1.0)
    beside = [group for _, group in episodes.take_next(len(PROMPTS), "beside")]
    assert sampled(beside) == sampled(groups)[::-1]


def sampled(groups: Sequence[Sequence[Completion]]) -> list[list[tuple[Any, ...]]]:
    """Without the log-probabilities, whose rounding depends on what an engine computes together."""
    return [[(c.token_ids, c.given, c.finish_reason) for c in group] for group in groups]
