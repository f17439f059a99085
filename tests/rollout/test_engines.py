"""The contract of rollout engines, on real ones: vLLM (CPU build) and transformers, LoRA native and merged."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_rl.config import ConfigError
from hybrid_rl.rollout import RolloutEngine
from hybrid_rl.rollout.batch_decoding import Row, Run, next_batch
from hybrid_rl.rollout.engine import run_requests
from hybrid_rl.types import Completion, Request, Sampling
from hybrid_rl.weight_sync import UpdateRefused, lora_names
from hybrid_rl.weight_sync.chain import EngineBroken
from tests.families import build
from tests.weight_sync.engine_side import (
    RANK,
    Learner,
    Memory,
    check_logprobs,
    damage,
    model_of,
    settings_for,
    settings_of,
    started,
    vllm_model,
)

PROMPTS = [(20, 21, 22), (30, 31, 32, 33, 34), (40,)]
LONG = tuple(2 + (7 * i) % 250 for i in range(300))
"""More than two blocks of vLLM's prefix cache on CPU."""
GREEDY = Sampling(n=1, temperature=0.0, top_p=1.0, max_tokens=8, stop=(), seed=0)
SAMPLED = Sampling(n=3, temperature=0.7, top_p=1.0, max_tokens=8, stop=(), seed=0)
LENGTHY = Sampling(n=4, temperature=0.7, top_p=1.0, max_tokens=60, stop=(), seed=0)
FULL = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.down_proj")
EOS = 1


@dataclass
class Setup:
    kind: str
    mode: str
    engine: Any
    learner: Learner
    transport: Memory
    names = 0

    def requests(self, sampling: Sampling, prompts: Sequence[tuple[int, ...]] = PROMPTS, seed: int = 11):
        """New ones, each with a seed of its own."""
        Setup.names += 1
        return [Request(f"{Setup.names}/{i}", p, sampling, seed + 100 * i) for i, p in enumerate(prompts)]

    def ask(self, sampling: Sampling, prompts: Sequence[tuple[int, ...]] = PROMPTS, seed: int = 11):
        return run_requests(self.engine, self.requests(sampling, prompts, seed))

    def anchor(self, seed: int = 0) -> None:
        """Bring the engine to known weights, whatever happened before."""
        self.learner.move(seed)
        self.engine.apply_updates([self.learner.anchor()])

    def begin(self, request: Request, tokens: int = 4) -> None:
        """Give the engine a request and let it sample about `tokens` tokens of it."""
        self.engine.advance([request], (), 0.0)
        for _ in range(tokens - 1):
            self.engine.advance((), (), 0.0)

    def finish(self, name: str) -> tuple[Completion, ...]:
        while True:
            finished = self.engine.advance((), (), 1.0).finished
            if name in finished:
                return finished[name]


@pytest.fixture(scope="module", params=["transformers-native", "transformers-merged", "vllm-native", "vllm-merged"])
def setup(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Setup]:
    kind, _, mode = request.param.partition("-")
    transport = Memory()
    learner = Learner(tiny_model, transport, FULL)
    with started(kind, settings_of(learner, adapter=mode)) as engine:
        yield Setup(kind, mode, engine, learner, transport)


def check_agrees(setup: Setup, version: int) -> None:
    for sampling, temperature in ((GREEDY, 1.0), (SAMPLED, 0.7)):
        groups = setup.ask(sampling)
        assert [len(g) for g in groups] == [sampling.n] * len(PROMPTS)
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for completion in group:
                assert (completion.weight_version, completion.later_versions) == (version, ())
                assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= sampling.max_tokens
                assert completion.finish_reason == ("stop" if completion.token_ids[-1] == EOS else "length")
                check_logprobs(completion, setup.learner.logprobs(prompt, completion.token_ids, temperature))


def test_before_any_update_the_base_model_answers(setup: Setup):
    assert setup.engine.info() == {"pid": os.getpid(), "version": 0, "engine": "engine-x", "adapter": "none"}
    check_agrees(setup, 0)


def test_after_each_update_the_new_policy_answers_and_the_receipt_says_so(setup: Setup):
    for seed, share in ((1, 1.0), (2, 0.01), (3, 0.6), (4, 0.001)):
        setup.learner.move(seed, share)
        update = setup.learner.publish()
        assert (update.base_version is None) == (seed == 1), "one anchor, then what changed"
        receipt = setup.engine.apply_updates([update])
        assert (receipt.engine, receipt.version, receipt.adapter) == ("engine-x", update.version, setup.mode)
        assert receipt.digests == update.digests, "the engine holds, bit for bit, what was sent"
        check_agrees(setup, update.version)
    assert setup.engine.info()["adapter"] == setup.mode


def test_several_updates_at_once_bring_an_engine_to_the_last(setup: Setup):
    setup.learner.publisher.restart()
    updates = []
    for seed in (5, 6, 7):
        setup.learner.move(seed, 0.02)
        updates.append(setup.learner.publish())
    receipt = setup.engine.apply_updates(updates)
    assert (receipt.version, receipt.digests) == (updates[-1].version, updates[-1].digests)
    check_agrees(setup, updates[-1].version)


def test_updates_that_do_not_fit_or_are_damaged_are_refused_and_change_nothing(setup: Setup):
    setup.anchor()
    before = [[c.token_ids for c in g] for g in setup.ask(SAMPLED)]
    held = model_of(setup.engine)
    version = setup.learner.version
    setup.learner.move(8, 0.01)
    second = setup.learner.publish()
    setup.learner.move(9, 0.01)
    third = setup.learner.publish()
    with pytest.raises(UpdateRefused, match=f"difference to version {second.version}, but version {version} is held"):
        setup.engine.apply_updates([third])
    with pytest.raises(UpdateRefused, match="arrived damaged"):
        setup.engine.apply_updates([damage(second, setup.transport, 0)])
    unknown = {**second.digests, "model.layers.9.self_attn.q_proj.weight": "x"}
    with pytest.raises(UpdateRefused, match=r"layers\.9\.self_attn\.q_proj\.weight"):
        setup.engine.apply_updates([replace(second, base_version=None, digests=unknown)])
    assert setup.engine.info()["version"] == version
    after = model_of(setup.engine)
    assert all(torch.equal(held[name], after[name]) for name in held)
    assert [[c.token_ids for c in g] for g in setup.ask(SAMPLED)] == before
    receipt = setup.engine.apply_updates([second, third])
    assert receipt.digests == third.digests


def test_an_update_that_fails_half_way_breaks_the_engine_until_an_anchor(setup: Setup):
    setup.anchor()
    setup.learner.move(10)
    update = setup.learner.anchor()
    assert len(update.buckets) > 1
    with pytest.raises(EngineBroken, match=r"half-way.*arrived damaged"):
        setup.engine.apply_updates([damage(update, setup.transport, 1)])
    with pytest.raises(EngineBroken, match="an anchor is needed"):
        setup.engine.advance(setup.requests(GREEDY), (), 1.0)
    setup.learner.move(11, 0.01)
    delta = setup.learner.publish()
    with pytest.raises(UpdateRefused, match="no version is held"):
        setup.engine.apply_updates([delta])
    assert setup.engine.apply_updates([update, delta]).digests == delta.digests
    check_agrees(setup, delta.version)


@pytest.mark.parametrize("in_flight", ["keep", "recompute"])
def test_an_update_meets_requests_under_way(setup: Setup, in_flight: str):
    setup.anchor()
    old = setup.learner.version
    (request,) = setup.requests(LENGTHY, [LONG])
    setup.begin(request)
    before = Learner(setup.learner.path, setup.transport, FULL)
    before.adapted.model.load_state_dict(setup.learner.adapted.model.state_dict())
    setup.learner.move(12)
    update = setup.learner.publish()
    assert setup.engine.apply_updates([update], in_flight).digests == update.digests
    completions = setup.finish(request.id)
    crossed = [c for c in completions if c.later_versions]
    assert crossed, "some were under way"
    for c in crossed:
        ((at, version),) = c.later_versions
        assert (c.weight_version, version, at) == (old, update.version, 4)
        tail = c.token_ids[at:]
        if in_flight == "recompute":
            expected = setup.learner.logprobs((*LONG, *c.token_ids[:at]), tail, 0.7)
        else:
            cache = before.prefilled([*LONG, *c.token_ids[: at - 1]])
            expected = setup.learner.continued(cache, c.token_ids[at - 1], tail, 0.7)
            other = setup.learner.logprobs((*LONG, *c.token_ids[:at]), tail, 0.7)
            assert (other - expected).abs().max() > 1e-3, "the caches differ"
        check_logprobs(replace(c, logprobs=c.logprobs[at:]), expected)


def test_requests_that_begin_after_an_update_find_nothing_of_the_old_weights(setup: Setup):
    """Neither new ones nor ones that were waiting, though others that share their prompt still run."""
    setup.anchor()
    many = replace(LENGTHY, n=8)
    first, waiting = setup.requests(many, [LONG, LONG])
    setup.begin(first)
    setup.engine.advance([waiting], (), 0.0)
    setup.learner.move(13)
    update = setup.learner.publish()
    setup.engine.apply_updates([update], "keep")
    (new,) = setup.requests(SAMPLED, [LONG])
    setup.engine.advance([new], (), 0.0)
    answers = {}
    while len(answers) < 3:
        answers |= setup.engine.advance((), (), 1.0).finished
    assert any(c.later_versions for c in answers[first.id])
    for c in (*answers[waiting.id], *answers[new.id]):
        assert (c.weight_version, c.later_versions) == (update.version, ())
        check_logprobs(c, setup.learner.logprobs(LONG, c.token_ids, 0.7))


def test_a_request_is_cut_when_its_time_is_up(setup: Setup):
    setup.anchor()
    sampling = replace(LENGTHY, max_seconds=0.05, max_tokens=380, n=4)
    (request,) = setup.requests(sampling, [PROMPTS[0]])
    completions = run_requests(setup.engine, [request])[0]
    cut = [c for c in completions if c.finish_reason == "time"]
    assert cut, "not all ended by themselves"
    for c in completions:
        assert c.finish_reason in ("time", "stop", "length")
        assert (c.token_ids[-1:] == (EOS,)) == (c.finish_reason == "stop")
        assert len(c.token_ids) == len(c.logprobs)
        check_logprobs(c, setup.learner.logprobs(PROMPTS[0], c.token_ids, 0.7))
    check_agrees(setup, setup.learner.version)


def test_what_is_cancelled_is_not_answered(setup: Setup):
    gone, kept = setup.requests(replace(LENGTHY, max_tokens=20), PROMPTS[:2])
    setup.begin(gone, 2)
    progress = setup.engine.advance([kept], [gone.id, "never heard of"], 0.0)
    answers = dict(progress.finished)
    while kept.id not in answers:
        answers |= setup.engine.advance((), (), 1.0).finished
    assert gone.id not in answers
    assert setup.engine.advance((), (), 0.0).finished == {}, "nothing is left to do"


def test_asleep_an_engine_refuses_work_and_goes_on_when_awake(setup: Setup):
    (request,) = setup.requests(LENGTHY, [PROMPTS[0]])
    setup.begin(request)
    setup.engine.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        setup.engine.advance((), (), 0.0)
    setup.engine.wake()
    for c in setup.finish(request.id):
        check_logprobs(c, setup.learner.logprobs(PROMPTS[0], c.token_ids, 0.7))


@pytest.mark.parametrize("syncs", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_after_many_updates_an_engine_holds_what_a_fresh_one_would(setup: Setup, syncs: int, tiny_model: Path):
    fresh = Learner(tiny_model, Memory(), ())
    frozen = {name: t.clone() for name, t in fresh.adapted.model.state_dict().items()}
    setup.learner.publisher.restart()
    for i in range(syncs):
        setup.learner.move(1000 + i, (1.0, 0.3, 0.01, 0.0, 0.001)[i % 5], scale=0.01 * (-1) ** i)
        update = setup.learner.publish()
        assert setup.engine.apply_updates([update]).digests == update.digests
    expected = {name.replace(".base_layer", ""): t for name, t in frozen.items() if ".lora_" not in name}
    merged = setup.learner.merged()
    expected |= merged if setup.mode == "merged" else {n: merged[n] for n in setup.learner.adapted.full}
    if setup.kind == "vllm":
        for fused, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
            for name in [n for n in expected if parts[0] in n and n.endswith(".weight")]:
                rows = [expected.pop(name.replace(parts[0], part)) for part in parts]
                expected[name.replace(parts[0], fused)] = torch.cat(rows)
    held = {name.replace(".base_layer", ""): t for name, t in model_of(setup.engine).items()}
    for name, tensor in expected.items():
        if name in held:  # vLLM has no second name for a tied weight, and pads the vocabulary
            assert torch.equal(held[name][: len(tensor)], tensor), name
    assert len(expected.keys() - held.keys()) <= 1
    if setup.mode == "native":
        sent = setup.learner.tensors()
        for module in setup.learner.lora_modules:
            for name, factor in zip(lora_names(module), native_factors(setup, module), strict=True):
                assert torch.equal(factor, sent[name].detach()), name


def native_factors(setup: Setup, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as the engine's kernels read them."""
    parent, _, leaf = module.rpartition(".")
    if setup.kind == "transformers":
        layer = setup.engine._model.get_submodule(module)
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight
    homes = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
    homes |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    fused, part = homes.get(leaf, (leaf, 0))
    layer = vllm_model(setup.engine).get_submodule(f"{parent}.{fused}")
    return layer.lora_a_stacked[part][0, 0, :RANK], layer.lora_b_stacked[part][0, 0, :, :RANK]


@pytest.mark.parametrize("rank", [RANK, RANK - 1])
def test_an_anchor_of_another_plan_puts_the_base_weights_back(setup: Setup, tiny_model: Path, rank: int):
    """As between probe and plan: other matrices, adapters of another rank, and back."""
    setup.anchor()
    other = Learner(tiny_model, setup.transport, ("layers.0.self_attn.k_proj", "layers.1.mlp.down_proj"), rank=rank)
    other.version = setup.learner.version
    for seed, share in ((14, 1.0), (15, 0.01)):
        other.move(seed, share)
        update = other.publish()
        assert setup.engine.apply_updates([update]).digests == update.digests
        check_agrees(replace(setup, learner=other), update.version)
    setup.learner.version = other.version
    setup.anchor()
    check_agrees(setup, setup.learner.version)
    setup.learner.move(16, 0.01)
    update = setup.learner.publish()
    assert setup.engine.apply_updates([update]).digests == update.digests
    check_agrees(setup, update.version)


def test_a_seed_decides_the_completions_of_its_prompt_alone(setup: Setup):
    together = setup.ask(SAMPLED)
    setup.engine.advance(alone := setup.requests(SAMPLED)[1:2], (), 0.0)
    assert [c.token_ids for c in setup.finish(alone[0].id)] == [c.token_ids for c in together[1]]
    other = setup.ask(SAMPLED, PROMPTS[1:2], seed=99)
    assert [c.token_ids for c in other[0]] != [c.token_ids for c in together[1]]
    assert len({c.token_ids for c in together[0]}) > 1, "the completions of a group differ"


def test_prompts_that_fill_several_batches_are_seeded_too(setup: Setup):
    """More prompt tokens at once than an engine takes into one batch."""
    prompts = [tuple(2 + (i * j) % 250 for j in range(56)) for i in range(160)]
    sampling = Sampling(n=1, temperature=1.0, top_p=1.0, max_tokens=2, stop=(), seed=0)
    requests = setup.requests(sampling, prompts)
    first = run_requests(setup.engine, requests)
    again = run_requests(setup.engine, [replace(r, id=f"again {r.id}") for r in requests[-2:]])
    assert [c.token_ids for (c,) in again] == [c.token_ids for (c,) in first[-2:]]


def test_stop_strings_end_a_completion(setup: Setup):
    (group,) = setup.ask(GREEDY, PROMPTS[:1])
    text = group[0].text
    stop = next(c for c in text if c.isascii() and c.isprintable())
    (stopped,) = setup.ask(replace(GREEDY, stop=(stop,)), PROMPTS[:1])
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].text == text[: text.index(stop)]
    assert len(stopped[0].token_ids) < len(group[0].token_ids)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe", "falcon_h1", "qwen3_5", "mamba2", "lfm2", "gpt2"])
def test_what_is_decoded_together_is_what_the_model_says_of_each(family: str):
    """Caches that can be picked from and others, with sliding windows and recurrent states; rows end at different
    times, a request is cancelled, and the caches are forgotten on the way."""
    model = build(family).eval()
    prompts = [(5, 6, 7), (8, 9, 10), (11, 12, 13, 14), (15, 16, 17)]
    waiting = deque(
        Run(Request(str(i), p, replace(SAMPLED, temperature=(0.7, 1.3)[i % 2]), i), 0.0, [Row() for _ in range(3)],
            torch.Generator().manual_seed(i))
        for i, p in enumerate(prompts)
    )  # fmt: skip
    batches = [next_batch(waiting, model, 64, torch.device("cpu")) for _ in range(2)]
    assert [len(batch.runs) for batch in batches] == [3, 1], "prompts of one length are decoded together"
    runs = [run for batch in batches for run in batch.runs]
    with torch.no_grad():
        for batch in batches:
            for step in range(12):
                for run, row, token, logprob in batch.sample() if batch.runs else ():
                    row.token_ids.append(token)
                    row.logprobs.append(logprob)
                    number = 3 * int(run.request.id) + run.rows.index(row)
                    if len(row.token_ids) > number:
                        row.reason = "length"
                batch.finished()
                if step == 2:
                    batch.drop(["3"])
                if step == 5:
                    batch.forget_cache()
        assert not any(batch.runs for batch in batches)
        for run in runs:
            temperature = run.request.sampling.temperature
            for i, row in enumerate(run.rows):
                expected_length = 1 + 3 * int(run.request.id) + i
                assert len(row.token_ids) == (3 if run.request.id == "3" else expected_length)
                ids = torch.tensor([[*run.request.prompt_ids, *row.token_ids]])
                logits = model(input_ids=ids, use_cache=False).logits[0].float() / temperature
                found = logits.log_softmax(-1)[len(run.request.prompt_ids) - 1 : -1]
                expected = found.gather(-1, ids[0, len(run.request.prompt_ids) :, None])[:, 0]
                torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=2e-4)


def test_a_prompt_is_read_once_and_what_has_ended_is_not_computed(tiny_model: Path):
    with started("transformers", settings_for(tiny_model, Memory(), max_concurrent=64)) as engine:
        read: list[int] = []
        model_of_engine: Any = engine
        hook = model_of_engine._model.register_forward_pre_hook(
            lambda _module, _args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        requests = [Request(str(i), (20 + i, 21, 22), replace(SAMPLED, n=8), i) for i in range(4)]
        completions = [c for group in run_requests(engine, requests) for c in group]
        hook.remove()
    lengths = [len(c.token_ids) for c in completions]
    assert read == [4 * 3, *(sum(n > t for n in lengths) for t in range(1, max(lengths)))]


def test_lora_that_no_engine_can_serve_is_refused_at_the_start(tiny_model: Path):
    settings = settings_for(tiny_model, Memory(), adapter="merged", lora_modules=("model.layers.7.mlp.down_proj",))
    with pytest.raises(ConfigError, match=r"layers\.7\.mlp\.down_proj"), started("transformers", settings):
        pass


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_a_matrix_that_an_engine_does_not_hold_is_refused_at_the_start(tiny_model: Path, kind: str):
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.7.mlp.up_proj.weight")
    settings = settings_for(tiny_model, Memory(), full_names=names)
    message = r"cannot take updates of model\.layers\.7\.mlp\.up_proj\.weight.*leave it out with plan\.exclude"
    with pytest.raises(ConfigError, match=message), started(kind, settings):
        pass


def engine_protocol(engine: Any) -> RolloutEngine:
    """Checked by the type checker."""
    return engine
