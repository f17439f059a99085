"""Losses, corrections and aggregations against loops over numbers (`naive.py`), differences, and themselves."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid_rl.algo import PRESETS, AlgoConfig
from hybrid_rl.algorithms import Tokens, find_loss, kl_T, policy_objective, token_weights
from tests.algorithms import naive

LOSSES = ["clip", "gspo", "gspo_token", "cispo", "sapo"]
MISMATCHES = [("none", "token")] + [(m, o) for m in ("truncate", "mask") for o in ("token", "sequence", "geometric")]
CLOSE: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9}


def _objective(tokens: Tokens, algo: AlgoConfig):
    return policy_objective(tokens, algo, find_loss(algo.loss))


def _gradient(tokens: Tokens, algo: AlgoConfig) -> Tensor:
    return torch.autograd.grad(_objective(tokens, algo).loss, tokens.logprobs_T)[0]


def _count(flags_T: Tensor | None) -> int:
    return 0 if flags_T is None else int(flags_T.sum())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("mismatch", "level"), MISMATCHES)
def test_equals_a_loop_over_tokens(loss: str, mismatch: str, level: str):
    """7 x 5 x 200 cases: at least 1,000 of each loss, aggregation, estimator of the divergence and correction."""
    rng = random.Random(f"{loss} {mismatch} {level}")
    for _ in range(200):
        algo = naive.random_algo(rng, loss=loss, mismatch=mismatch, mismatch_level=level)
        case = naive.random_case(rng)
        tokens = case.tokens(algo.aggregation)
        found = _objective(tokens, algo)
        counts = naive.Counts()
        assert found.loss.item() == pytest.approx(complex(naive.objective(case, algo, counts)).real, rel=1e-9, abs=1e-9)
        assert (
            naive.Counts(
                _count(found.tokens.low_T),
                _count(found.tokens.high_T),
                _count(found.mismatch_dropped_T),
                _count(found.off_policy_dropped_T),
            )
            == counts
        )
        found.loss.backward()
        assert tokens.logprobs_T.grad is not None
        expected_T = torch.tensor(naive.gradient(case, algo), dtype=torch.float64)
        torch.testing.assert_close(tokens.logprobs_T.grad, expected_T, **CLOSE)
        if algo.entropy_coef > 0:
            expected_T = torch.tensor(naive.gradient(case, algo, "entropy"), dtype=torch.float64)
            torch.testing.assert_close(tokens.entropy_T.grad, expected_T, **CLOSE)  # type: ignore[union-attr]


def test_every_branch_is_among_the_random_cases():
    """The comparison above says nothing of what never happens in it."""
    rng = random.Random(0)
    total = naive.Counts()
    for _ in range(1000):
        naive.objective(naive.random_case(rng), naive.random_algo(rng), total)
    assert min(dataclasses.astuple(total)) > 50


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_finite_differences(loss: str):
    """Central differences of the loop, with what carries no gradient held fixed. No kink of these cases is within h."""
    rng = random.Random(loss)
    for _ in range(100):
        algo, case = naive.random_algo(rng, loss=loss), naive.random_case(rng)
        expected_T = torch.tensor(naive.differences(case, algo, h=1e-6), dtype=torch.float64)
        torch.testing.assert_close(_gradient(case.tokens(algo.aggregation), algo), expected_T, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("loss", ["clip", "gspo", "sapo"])
def test_losses_without_frozen_parts_pass_gradcheck(loss: str):
    rng = random.Random(loss)
    for _ in range(10):
        algo, tokens = (
            naive.random_algo(rng, loss=loss, off_policy_mask=None),
            naive.random_case(rng, 3).tokens("token_mean"),
        )

        def value(logprobs_T: Tensor, tokens: Tokens = tokens, algo: AlgoConfig = algo) -> Tensor:
            return _objective(dataclasses.replace(tokens, logprobs_T=logprobs_T), algo).loss

        assert torch.autograd.gradcheck(value, (tokens.logprobs_T,))


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_any_split_into_micro_batches_gives_the_whole(seed: int, parts: int):
    rng = random.Random(seed)
    algo = naive.random_algo(rng)
    tokens = naive.random_case(rng, sequences=rng.randint(1, 7)).tokens(algo.aggregation)
    owner_N = torch.tensor([rng.randrange(parts) for _ in range(tokens.sequences)])
    pieces = [_objective(_select(tokens, owner_N == part), algo) for part in range(parts)]
    total, whole = torch.stack([piece.loss for piece in pieces]).sum(), _objective(tokens, algo)
    torch.testing.assert_close(total, whole.loss, atol=1e-12, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(x, tokens.logprobs_T)[0] for x in (total, whole.loss))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert sum(_count(piece.tokens.high_T) for piece in pieces) == _count(whole.tokens.high_T)


def _select(tokens: Tokens, chosen_N: Tensor) -> Tokens:
    """Some sequences as a micro-batch of their own."""
    chosen_T = chosen_N[tokens.sequence_T]
    fields = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens) if f.name.endswith("_T")}
    rows = {name: None if x_T is None else x_T[chosen_T] for name, x_T in fields.items()}
    rows["sequence_T"] = (chosen_N.cumsum(0) - 1)[tokens.sequence_T][chosen_T]
    return Tokens(sequences=int(chosen_N.sum()), **rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("mismatch", "level"), MISMATCHES)
@pytest.mark.parametrize("sequences", [0, 3])
def test_no_tokens_are_a_loss_of_zero(dtype: torch.dtype, loss: str, mismatch: str, level: str, sequences: int):
    """A rank may have none, and must still take part in the backward pass."""
    rng = random.Random(0)
    algo = naive.random_algo(
        rng, loss=loss, mismatch=mismatch, mismatch_level=level, kl_coef=0.1, entropy_coef=0.1, off_policy_mask=0.1
    )
    tokens = _select(naive.random_case(rng, 3).tokens("token_mean", dtype), torch.zeros(3, dtype=torch.bool))
    parameter = torch.ones((), dtype=dtype, requires_grad=True)
    tokens = dataclasses.replace(tokens, logprobs_T=tokens.logprobs_T * parameter, sequences=sequences)
    found = _objective(tokens, algo).loss
    assert found.dtype == dtype
    assert found.item() == 0
    found.backward()
    assert float(parameter.grad) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", LOSSES)
def test_single_precision_follows_double(loss: str):
    rng = random.Random(loss)
    for _ in range(50):
        algo, case = naive.random_algo(rng, loss=loss, mismatch="none"), naive.random_case(rng)
        double, single = (case.tokens(algo.aggregation, dtype) for dtype in (torch.float64, torch.float32))
        gradient_T = _gradient(single, algo)
        assert gradient_T.dtype == torch.float32
        torch.testing.assert_close(gradient_T.double(), _gradient(double, algo), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_all_losses_have_the_gradient_of_reinforce(loss: str):
    """At ratio 1 it is -weight * advantage, whatever the bounds and the sharpness."""
    rng = random.Random(loss)
    for _ in range(20):
        algo = naive.random_algo(rng, loss=loss, mismatch="none", kl_coef=0, off_policy_mask=None)
        case = naive.random_case(rng, 4)
        tokens = dataclasses.replace(case, old=case.logprobs).tokens(algo.aggregation)
        torch.testing.assert_close(_gradient(tokens, algo), -tokens.weights_T * tokens.advantages_T, **CLOSE)


def test_gspo_token_is_gspo_where_a_sequence_has_one_advantage():
    """Value and gradient (arXiv 2507.18071, section 4.3)."""
    rng = random.Random(0)
    for _ in range(100):
        algo = naive.random_algo(rng, loss="gspo", mismatch="none", aggregation="sequence_mean_token_mean")
        tokens = naive.random_case(rng, 4).tokens(algo.aggregation)
        other = algo.model_copy(update={"loss": "gspo_token"})
        torch.testing.assert_close(_objective(tokens, algo).loss, _objective(tokens, other).loss, **CLOSE)
        torch.testing.assert_close(_gradient(tokens, algo), _gradient(tokens, other), **CLOSE)


def test_what_is_measured_carries_no_gradient():
    rng = random.Random(0)
    tokens = naive.random_case(rng, 4).tokens("token_mean")
    found = _objective(tokens, naive.random_algo(rng, kl_coef=0.1, kl_in="loss"))
    assert found.loss.requires_grad
    assert found.kl_T is not None
    assert not found.kl_T.requires_grad
    assert not found.tokens.loss_T.requires_grad


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence_equals_its_formula(estimator: str):
    rng = random.Random(estimator)
    for _ in range(1000):
        new, reference = rng.gauss(-1, 1), rng.gauss(-1, 1)
        found = kl_T(estimator, *torch.tensor([[new], [reference]], dtype=torch.float64))
        assert float(found) == pytest.approx(naive.divergence(estimator, new, reference).real, rel=1e-9, abs=1e-12)


def test_k3_does_not_cancel_near_zero():
    """In single precision, exp(x) - x - 1 of x = 1e-4 is 0 or off by a factor of more than ten."""
    found = kl_T("k3", torch.zeros(1), torch.full((1,), 1e-4))
    assert float(found) == pytest.approx(5e-9, rel=0.01)


def test_k3_averages_to_the_divergence():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    exact = float((policy.exp() * (policy - reference)).sum())
    for estimator in ("k1", "k3"):
        assert float(kl_T(estimator, policy[drawn], reference[drawn]).mean()) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("aggregation", ["sequence_mean_token_mean", "token_mean", "sequence_mean_token_sum"])
def test_weights_of_whole_numbers_are_in_single_precision_and_finite(aggregation: str):
    weights_N = token_weights(torch.tensor([0, 3, 5]), aggregation, 7)
    assert weights_N.dtype == torch.float32
    third = {
        "sequence_mean_token_mean": [1 / 9, 1 / 15],
        "token_mean": [1 / 8] * 2,
        "sequence_mean_token_sum": [1 / 3] * 2,
    }
    assert weights_N.tolist() == pytest.approx([0, *third[aggregation]])
    assert token_weights(torch.zeros(2, dtype=torch.long), aggregation, 7).tolist() == [0, 0]


def test_sums_and_means_of_sequences_without_tokens_are_zero():
    case = naive.Case([1.0] * 3, *[[[], [-1.0, -2.0], []]] * 5)
    tokens = case.tokens("token_mean")
    assert tokens.sum_N(tokens.old_logprobs_T).tolist() == [0, -3, 0]
    assert tokens.mean_N(tokens.old_logprobs_T).tolist() == [0, -1.5, 0]
    assert tokens.spread_T(torch.arange(3)).tolist() == [1, 1]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_name_what_there_is(preset: str):
    assert callable(find_loss(AlgoConfig(**PRESETS[preset]).loss))
