"""Micro-batches: nothing lost, nothing doubled, the budget kept, ranks in step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_rl.config import LearnerConfig
from hybrid_rl.learner.assemble import assemble, lr_scale, mini_batches
from hybrid_rl.learner.batching import micro_batches, pad
from hybrid_rl.types import Completion, Prompt, ScoredGroup, TrainSequence


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 4), st.integers(50, 300))
def test_every_sequence_is_in_one_micro_batch_within_the_budget(lengths: list[int], ranks: int, tokens: int):
    shares = micro_batches(lengths, ranks, tokens)
    dealt = sorted(i for share in shares for batch in share for i in batch)
    assert dealt == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1, "every rank makes the same number of collective calls"
    counts = [sum(map(len, share)) for share in shares]
    assert max(counts) - min(counts) <= 1
    for share in shares:
        for batch in share:
            assert max((lengths[i] for i in batch), default=0) * len(batch) <= tokens


def test_padding_keeps_targets_masks_and_logprobs_aligned():
    batch = pad(
        [TrainSequence((5, 6), (7, 8, 9), (-1.0, -2.0, -3.0), 0.5), TrainSequence((1, 2, 3), (4,), (-4.0,), -1.0)]
    )
    assert batch.input_ids_N_L.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert batch.columns_T.tolist() == [1, 2, 3]
    assert batch.targets_N_T.tolist() == [[7, 8, 9], [3, 4, 0]]
    assert batch.mask_N_T.tolist() == [[1, 1, 1], [0, 1, 0]]
    assert batch.rollout_logprobs_N_T.tolist() == [[-1, -2, -3], [0, -4, 0]]


def test_an_empty_micro_batch_has_no_tokens_to_learn_from():
    batch = pad([])
    assert batch.mask_N_T.numel() > 0
    assert batch.mask_N_T.sum() == 0


def _group(rewards: list[float | None], lengths: list[int] | None = None) -> ScoredGroup:
    completions = tuple(Completion("", (1,) * n, (-1.0,) * n, "stop", 0) for n in (lengths or [2] * len(rewards)))
    return ScoredGroup(Prompt("0", "", (1,), {}), completions, tuple(rewards), {"r": tuple(rewards)})


def test_groups_without_signal_are_dropped_and_counted():
    groups = [
        _group([1.0, 1.0, 1.0]),
        _group([0.0, 1.0, None]),
        _group([None, None, 1.0]),
        _group([0.0, 1.0, 1.0], [2, 0, 2]),
    ]
    data = assemble(groups)
    assert data.zero_variance_groups == 2
    assert data.unscored == 1
    assert len(data.sequences) == 4, "two of the second group, and the two of the last that have tokens"
    assert data.advantages[0] == [0, 0, 0]
    assert data.advantages[1][0] == -data.advantages[1][1] != 0
    assert assemble([_group([0.0, 0.0])]).sequences == []


@given(st.integers(0, 20), st.integers(1, 5))
def test_mini_batches_deal_every_sequence_once(count: int, parts: int):
    sequences = [TrainSequence((1,), (i,), (0.0,), 0.0) for i in range(count)]
    batch = mini_batches(sequences, parts, 1.0)
    assert sorted(s.completion_ids[0] for m in batch.mini_batches for s in m) == list(range(count))
    assert all(batch.mini_batches)


def test_learning_rate_schedules():
    constant = LearnerConfig(warmup_steps=4)
    assert [lr_scale(s, 10, constant) for s in (1, 2, 4, 5, 10)] == [0.25, 0.5, 1, 1, 1]
    linear = LearnerConfig(schedule="linear")
    assert [lr_scale(s, 4, linear) for s in (1, 2, 3, 4)] == [1, 0.75, 0.5, 0.25]
    assert lr_scale(3, 4, LearnerConfig(schedule="cosine")) == pytest.approx(0.5)
