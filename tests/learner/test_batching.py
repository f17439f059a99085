"""Micro-batches: nothing lost, nothing doubled, the budget kept, ranks in step."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_rl.config import Config
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.assemble import assemble, groups_with_signal, lr_scales, mini_batches, reward_metrics
from hybrid_rl.learner.batching import collate, micro_batches
from hybrid_rl.learner.layout import PACKED
from hybrid_rl.types import Completion, Outcome, Prompt, ScoredGroup, TrainSequence
from tests.learner.processes import random_sequences

SCALE = {"full": 1.0, "lora": 1.0}
LAYOUTS = ["shared", "segments", "positions", "padded", "single"]


def _config(**changes: object) -> Config:
    tree = {"model": {"path": "m"}, "data": {"train": "a", "eval": "b"}, "sampling": {"max_completion_length": 10}}
    return parse_config({**tree, **changes})


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 4), st.integers(50, 300), st.sampled_from(LAYOUTS))
def test_every_sequence_is_in_one_micro_batch_within_the_budget(lengths: list[int], ranks: int, tokens: int, layout):
    shares = micro_batches(lengths, ranks, tokens, layout)
    dealt = sorted(i for share in shares for batch in share for i in batch)
    assert dealt == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1, "every rank makes the same number of collective calls"
    packed = layout in PACKED
    for share in shares:
        for batch in share:
            some = [lengths[i] for i in batch]
            assert (sum(some) if packed else max(some, default=0) * len(some)) <= tokens
            assert layout != "single" or len(some) <= 1


@given(st.lists(st.integers(1, 50), min_size=24, max_size=60), st.integers(1, 4))
def test_packed_ranks_get_near_equal_tokens(lengths: list[int], ranks: int):
    loads = [sum(lengths[i] for b in share for i in b) for share in micro_batches(lengths, ranks, 200, "segments")]
    assert max(loads) - min(loads) <= 50


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 4), st.integers(40, 300))
def test_sequences_of_a_prompt_stay_together(sizes: list[int], ranks: int, tokens: int):
    """As far as the budget and the number of ranks allow; and none is lost."""
    prompts = [(p,) * 5 for p, size in enumerate(sizes) for _ in range(size)]
    lengths = [5 + 1 + i % 7 for i in range(len(prompts))]
    shares = micro_batches(lengths, ranks, tokens, "shared", prompts)
    batches = [batch for share in shares for batch in share]
    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    assert len({len(share) for share in shares}) == 1
    assert all(sum(lengths[i] for i in batch) <= tokens for batch in batches)
    if ranks == 1 and max(sizes) * 12 <= tokens:
        assert sum(len({prompts[i] for i in batch}) for batch in batches) == len(sizes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_positions_and_logprobs_are_aligned(layout):
    sequences = [
        TrainSequence((5, 6), (7, 8, 9), (-1.0, -2.0, -3.0), 0.5, 0.1),
        TrainSequence((1, 2, 3), (4,), (-4.0,), -1.0, 0.2),
    ]
    batch = collate(sequences, layout)
    inputs = batch.inputs.input_ids.flatten()
    assert batch.targets_T.tolist() == [7, 8, 9, 4]
    assert inputs[batch.at_T].tolist() == [6, 7, 8, 3], "each is the token before its target"
    assert [inputs[start].item() for start in batch.inputs.starts] == [5, 1]
    assert batch.sequence_T.tolist() == [0, 0, 0, 1]
    assert batch.rollout_logprobs_T.tolist() == [-1, -2, -3, -4]
    assert batch.advantages_T.tolist() == [0.5, 0.5, 0.5, -1]
    assert batch.weights_T.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_tokens_are_read_and_nothing_else(layout):
    plain = random_sequences(3, advantage=1.0)
    some = [s for s in plain if len(s.completion_ids) > 3]
    spans = {id(s): ((1, 2), (3, len(s.completion_ids) - 1))[: 1 + i % 2] for i, s in enumerate(some)}
    mixed = [replace(s, given=spans.get(id(s), ())) for s in plain]
    everything, batch = collate(plain, layout), collate(mixed, layout)
    assert batch.inputs.input_ids.equal(everything.inputs.input_ids)
    assert batch.padding == everything.padding
    tokens = [(s, t) for s in mixed for t in range(len(s.completion_ids))]
    kept = torch.tensor([not any(start <= t < end for start, end in s.given) for s, t in tokens])
    assert 0 < kept.sum() < len(kept)
    for name in ("at_T", "targets_T", "sequence_T", "rollout_logprobs_T", "advantages_T", "weights_T"):
        assert getattr(batch, name).equal(getattr(everything, name)[kept]), name


def test_means_count_sampled_tokens_and_limits_all_tokens():
    completions = (
        Completion("", (1,) * 8, (-1.0,) * 8, "stop", 0, given=((2, 5),)),
        Completion("", (1,) * 4, (-1.0,) * 4, "stop", 0),
    )
    group = ScoredGroup(Prompt("0", "", (1,), {}), completions, (1.0, 0.0), {})
    config = _config(algo={"aggregation": "token_mean", "overlong_buffer": 0.4, "advantage": "raw"})
    data = assemble([group], config)
    assert data.advantages[0] == pytest.approx([0.5, 0.0]), "eight tokens are two into the buffer of the last four"
    assert data.dropped_tokens == {"zero_advantage": 4}
    [[taught]] = mini_batches(data.sequences, config, SCALE, 1).mini_batches
    assert (taught.given, taught.weight) == (((2, 5),), pytest.approx(1 / (5 + 4)))
    assert collate([taught], "padded").weights_T.sum().item() == pytest.approx(5 / 9)
    metrics = reward_metrics([group], data)
    assert (metrics["tokens/generated"], metrics["tokens/given"]) == (9, 3)
    assert (metrics["completions/mean_length"], metrics["completions/mean_turns"]) == (4.5, 1.5)
    assert assemble([group], _config(algo={"zero_variance": "drop"})).dropped_tokens == {}
    none = replace(group, rewards_G=(None, None))
    assert assemble([none], config).dropped_tokens == {"unscored": 9}


def test_rewards_normalised_one_by_one_are_trl_s_advantages():
    """`multi_objective_aggregation="normalize_then_sum"` of TRL 1.16, written out, with scores that do not apply."""
    draw = random.Random(5)
    config = _config(
        algo={"reward_aggregation": "normalize_then_sum"},
        rewards=[{"plugin": "m:a"}, {"plugin": "m:b", "weight": {1: 0.0, 11: 1.0}}, {"plugin": "m:c", "weight": -2.0}],
    )
    weights = torch.tensor([1.0, 0.5, -2.0])  # at step 6
    scores = [[[draw.choice([0.0, 0.5, 1.0, 3.0, None]) for _ in range(4)] for _ in range(5)] for _ in range(3)]
    scores[1][2] = [1.0] * 4  # equal: teaches nothing by itself
    groups = []
    for p in range(5):
        outcomes = {
            f"m:{'abc'[k]}": tuple(Outcome("not_applicable" if s is None else "score", s) for s in scores[k][p])
            for k in range(3)
        }
        none = [all(scores[k][p][g] is None for k in range(3)) for g in range(4)]
        completions = tuple(Completion("", (1,), (-1.0,), "stop", 0) for _ in range(4))
        rewards = tuple(None if n else 1.0 for n in none)
        groups.append(ScoredGroup(Prompt(str(p), "", (1,), {}), completions, rewards, outcomes))
    table = torch.tensor([[[float("nan") if s is None else s for s in row] for row in plugin] for plugin in scores])
    normalised = (table - table.nanmean(dim=2, keepdim=True)) / (_nanstd(table, 2) + 1e-4)
    sums = (normalised * weights[:, None, None]).nansum(dim=0)
    sums[table.isnan().all(dim=0)] = torch.nan
    expected = ((sums - sums.nanmean()) / (_nanstd(sums.flatten(), 0) + 1e-4)).nan_to_num(0.0)
    data = assemble(groups, config, step=6)
    torch.testing.assert_close(torch.tensor(data.advantages), expected, atol=1e-5, rtol=1e-5)
    assert groups_with_signal(groups, config, 6) == [True] * 5, "the sums are all equal, the rewards are not"
    assert groups_with_signal([groups[0]], _config(), 6) == [False], "which here are their sums"


def _several(scores: dict[str, list[float]]) -> ScoredGroup:
    count = len(next(iter(scores.values())))
    completions = tuple(Completion("", (1,) * (2 + 2 * i), (-1.0,) * (2 + 2 * i), "stop", 0) for i in range(count))
    outcomes = {name: tuple(Outcome("score", s) for s in row) for name, row in scores.items()}
    totals = tuple(sum(row[i] for row in scores.values()) for i in range(count))
    return ScoredGroup(Prompt("0", "", (1,), {}), completions, totals, outcomes)


def test_what_teaches_nothing_has_no_advantage_where_rewards_are_normalised_one_by_one():
    algo = {"reward_aggregation": "normalize_then_sum"}
    rewards = [{"plugin": "m:a"}, {"plugin": "m:b", "weight": {1: 1.0, 10: 0.0}}]
    groups = [
        _several({"m:a": [0.0, 1.0, 1.0, 0.0], "m:b": [0.0] * 4}),
        _several({"m:a": [0.3] * 4, "m:b": [0.7] * 4}),
        _several({"m:a": [0.3] * 4, "m:b": [1.0, 0.0, 0.0, 0.0]}),
    ]
    config = _config(algo=algo, rewards=rewards)
    assert groups_with_signal(groups, config, 1) == [True, False, True]
    assert assemble(groups, config, step=1).advantages[1] == [0.0] * 4, "not even by rounding"
    assert groups_with_signal(groups, config, 10) == [True, False, False], "a reward of weight 0 teaches nothing"
    assert assemble(groups, config, step=10).advantages[2] == [0.0] * 4


def test_penalties_keep_their_size_where_rewards_are_normalised_one_by_one():
    """A completion is of 2, 4, 6 and 8 tokens, of which the penalty begins at 6 of 10."""
    groups = [_several({"m:a": [0.0, 1.0, 1.0, 0.0], "m:b": [1.0, 0.0, 1.0, 0.0]})]

    def advantages(penalty: float) -> list[float]:
        algo = {"reward_aggregation": "normalize_then_sum", "overlong_buffer": 0.4, "overlong_penalty": penalty}
        config = _config(algo=algo, rewards=[{"plugin": "m:a"}, {"plugin": "m:b"}])
        return assemble(groups, config, step=1).advantages[0]

    none, small, large = advantages(1e-6), advantages(0.5), advantages(500.0)
    assert none[0] == pytest.approx(none[1], abs=1e-4), "one of two rewards each"
    assert none[3] - small[3] > 0.01
    assert small[3] < none[3]
    assert max(large[:3]) - min(large[:3]) < 0.1 < max(small[:3]) - min(small[:3]), "beside which nothing counts"


def _nanstd(values: torch.Tensor, dim: int) -> torch.Tensor:
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True)
    return (squares / (count - 1)).sqrt()


def test_metrics_say_what_became_of_every_completion():
    outcomes = (
        Outcome("score", 1.0, metrics={"calls": 2.0}),
        Outcome("timeout", None, "took too long"),
        Outcome("not_applicable"),
        Outcome("score", 0.0, metrics={"calls": 4.0}),
    )
    completions = tuple(Completion("", (1,), (-1.0,), "stop", 0) for _ in outcomes)
    group = ScoredGroup(Prompt("0", "", (1,), {}), completions, (1.0, None, None, 0.0), {"mine": outcomes})
    metrics = reward_metrics([group], assemble([group], _config()))
    found = {name.removeprefix("reward/mine/"): metrics[name] for name in metrics if name.startswith("reward/mine/")}
    assert found == {"mean": 0.5, "not_applicable": 1, "timeout": 1, "error": 0, "crash": 0, "calls": 3.0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_micro_batch_has_an_input_and_no_tokens_to_learn_from(layout):
    batch = collate([], layout)
    assert batch.inputs.input_ids.numel() > 0
    assert batch.at_T.numel() == batch.targets_T.numel() == batch.weights_T.numel() == batch.sequences == 0


def _group(rewards: list[float | None], lengths: list[int] | None = None, cut: tuple[int, ...] = ()) -> ScoredGroup:
    completions = tuple(
        Completion("", (1,) * n, (-1.0,) * n, "length" if i in cut else "stop", 0)
        for i, n in enumerate(lengths or [2] * len(rewards))
    )
    return ScoredGroup(Prompt("0", "", (1,), {}), completions, tuple(rewards), {})


GROUPS = [
    _group([1.0, 1.0, 1.0]),
    _group([0.0, 1.0, None]),
    _group([None, None, 1.0]),
    _group([0.0, 1.0, 1.0], [2, 0, 2]),
]


def test_groups_without_signal_are_dropped_and_counted():
    data = assemble(GROUPS, _config(algo={"zero_variance": "drop"}))
    assert data.zero_variance_groups == 2
    assert data.advantages[0] == [0, 0, 0]
    assert data.advantages[1][0] == -data.advantages[1][1] != 0
    assert data.dropped_tokens == {"zero_variance": 8, "unscored": 6}
    metrics = reward_metrics(GROUPS, data)
    assert metrics["reward/unscored"] == 3
    assert metrics["tokens/dropped_zero_variance"] == 8
    assert metrics["tokens/generated"] == 22
    assert assemble([_group([0.0, 0.0])], _config(algo={"zero_variance": "drop"})).sequences == []


def test_groups_without_signal_count_in_the_mean_unless_dropped():
    kept = {}
    for how in ("count", "drop"):
        config = _config(algo={"zero_variance": how})
        [batch] = mini_batches(assemble(GROUPS[:2], config).sequences, config, SCALE, 1).mini_batches
        assert len(batch) == 2, "only what has a gradient is computed"
        kept[how] = batch[0].weight
    assert kept["count"] == pytest.approx(1 / (5 * 2)), "five completions have a reward"
    assert kept["drop"] == pytest.approx(1 / (2 * 2))


def test_what_has_a_gradient_without_an_advantage_is_computed():
    config = _config(algo={"kl_coef": 0.1})
    [batch] = mini_batches(assemble([GROUPS[0]], config).sequences, config, SCALE, 1).mini_batches
    assert [s.advantage for s in batch] == [0, 0, 0]


def test_cut_completions_are_left_out_but_count():
    group = _group([0.0, 1.0, 1.0, 0.0], cut=(1, 3))
    config = _config(algo={"overlong_filter": True})
    data = assemble([group], config)
    assert data.advantages[0][1] == data.advantages[0][3] == 0
    assert data.dropped_tokens == {"overlong": 4}
    [batch] = mini_batches(data.sequences, config, SCALE, 1).mini_batches
    assert [s.weight for s in batch] == pytest.approx([1 / (4 * 2)] * 2)


def test_overlong_and_divergence_penalties_shape_the_rewards():
    config = _config(algo={"overlong_buffer": 0.4, "advantage": "raw", "kl_coef": 0.5, "kl_in": "reward"})
    data = assemble([_group([1.0, 1.0, 0.0], [6, 8, 10])], config, [[0.0, 0.2, 0.4]])
    assert data.advantages[0] == pytest.approx([1.0, 1.0 - 0.5 - 0.1, 0.0 - 1.0 - 0.2])
    assert data.penalties == pytest.approx({"overlong": 0.5, "kl": 0.1})


@given(st.integers(0, 20), st.integers(1, 5))
def test_mini_batches_deal_every_sequence_once(count: int, parts: int):
    sequences = [TrainSequence((1,), (i,), (0.0,), 1.0) for i in range(count)]
    batch = mini_batches(sequences, _config(batch={"mini_batches": parts, "prompts": 60}), SCALE, 1)
    assert sorted(s.completion_ids[0] for m in batch.mini_batches for s in m) == list(range(count))
    assert all(batch.mini_batches)
    assert all(sum(s.weight for s in m) == pytest.approx(1) for m in batch.mini_batches)


def test_learning_rate_schedules():
    def full(step: int, steps: int, **settings: object) -> float:
        return lr_scales(step, _config(steps=steps, **settings))["full"]

    assert [full(s, 10, learner={"warmup_steps": 4}) for s in (1, 2, 4, 5, 10)] == [0.25, 0.5, 1, 1, 1]
    assert [full(s, 4, learner={"schedule": "linear"}) for s in (1, 2, 3, 4)] == [1, 0.75, 0.5, 0.25]
    assert full(3, 4, learner={"schedule": "cosine"}) == pytest.approx(0.5)
    own = _config(steps=4, learner={"schedule": "linear"}, lora={"schedule": "constant", "warmup_steps": 2})
    assert lr_scales(1, own) == {"full": 1, "lora": 0.5}
    assert lr_scales(3, own) == {"full": 0.5, "lora": 1}
