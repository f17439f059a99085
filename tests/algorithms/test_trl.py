"""TRL's own code on the same tensors: `GRPOTrainer._compute_loss` as it is, and passages of
`_generate_and_score_completions`, cut out by their first and last lines because they are not functions."""

from __future__ import annotations

import inspect
import random
import textwrap
from collections import defaultdict
from functools import cache
from types import CodeType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer

from hybrid_rl.algo import AlgoConfig
from hybrid_rl.algorithms import Tokens, find_advantage, find_loss, policy_objective
from tests.algorithms import naive

CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6}

PER_SEQUENCE = {"aggregation": "sequence_mean_token_mean"}
PER_TOKEN = {"aggregation": "token_mean"}
CONSTANT = {"aggregation": "constant_length"}
KL = {"kl_coef": 0.3}
TIS = {"mismatch": "truncate", "mismatch_min": 0.8, "mismatch_max": 1.2}
MIS = {"mismatch": "mask", "mismatch_min": 0.6, "mismatch_max": 1.5}
SEQUENCE = {"mismatch_level": "sequence"}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": (PER_SEQUENCE, {"loss_type": "grpo"}),
    "grpo, kl": (PER_SEQUENCE | KL, {"loss_type": "grpo"}),
    "grpo, delta": (PER_SEQUENCE | {"dual_clip": 1.3}, {"loss_type": "grpo"}),
    "grpo, off-policy mask": (PER_SEQUENCE | {"off_policy_mask": 0.05}, {"loss_type": "grpo"}),
    "bnpo": (PER_TOKEN, {"loss_type": "bnpo"}),
    "bnpo, entropy": (PER_TOKEN | {"entropy_coef": 0.2}, {"loss_type": "bnpo"}),
    "dr_grpo": (CONSTANT, {"loss_type": "dr_grpo"}),
    "dapo": (PER_TOKEN | {"clip_high": 0.28}, {"loss_type": "dapo"}),
    "cispo": (PER_TOKEN | {"loss": "cispo"}, {"loss_type": "cispo"}),
    "cispo, kl": (PER_TOKEN | {"loss": "cispo"} | KL, {"loss_type": "cispo"}),
    "sapo": (PER_SEQUENCE | {"loss": "sapo"}, {"loss_type": "sapo"}),
    "gspo": (PER_SEQUENCE | {"loss": "gspo"}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "gspo, delta": (
        PER_SEQUENCE | {"loss": "gspo", "dual_clip": 1.21},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "luspo": (
        {"loss": "gspo", "aggregation": "sequence_mean_token_sum"},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    ),
    "token_truncate": (PER_SEQUENCE | TIS, {"loss_type": "grpo"}),
    "token_mask": (PER_SEQUENCE | MIS, {"loss_type": "grpo"}),
    "sequence_truncate": (PER_SEQUENCE | TIS | SEQUENCE, {"loss_type": "grpo"}),
    "sequence_mask": (PER_SEQUENCE | MIS | SEQUENCE, {"loss_type": "grpo"}),
    "all at once": (
        PER_TOKEN | KL | MIS | {"dual_clip": 1.3, "off_policy_mask": 0.05, "entropy_coef": 0.2},
        {"loss_type": "dapo"},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_trl(variant: str):
    ours, theirs = VARIANTS[variant]
    rng = random.Random(variant)
    for _ in range(150):
        algo = AlgoConfig(**({"clip_high": 0.2, "sapo_temperature_positive": 1.4} | ours))
        # TRL takes the mismatch from what it takes for old log-probabilities; ours may be told others.
        case = naive.random_case(rng, sequences=5)
        tokens = case.tokens(algo.aggregation)
        found = policy_objective(tokens, algo, find_loss(algo.loss))
        logprobs_N_T = _padded(case.logprobs).requires_grad_()
        loss, metrics = _trl_loss(case, algo, logprobs_N_T, **theirs)
        torch.testing.assert_close(found.loss, loss, **CLOSE)
        (gradient_T,) = torch.autograd.grad(found.loss, tokens.logprobs_T)
        (gradient_N_T,) = torch.autograd.grad(loss, logprobs_N_T)
        torch.testing.assert_close(gradient_T, gradient_N_T[_mask(case).bool()], **CLOSE)
        _compare_metrics(found.tokens, found.kl_T, tokens, algo, metrics)


def _compare_metrics(token_loss: Any, kl_T: Tensor | None, tokens: Tokens, algo: AlgoConfig, metrics: Any) -> None:
    count = len(tokens.logprobs_T)
    if algo.loss == "clip" and count:
        assert metrics["clip_ratio/low_mean"] == [pytest.approx(token_loss.low_T.double().mean().item())]
        if algo.dual_clip is None:  # TRL does not count where this acts
            assert metrics["clip_ratio/high_mean"] == [pytest.approx(token_loss.high_T.double().mean().item())]
    if algo.kl_coef > 0 and count:
        assert kl_T is not None
        assert metrics["kl"] == [pytest.approx(kl_T.mean().item())]


def _trl_loss(case: naive.Case, algo: AlgoConfig, logprobs_N_T: Tensor, **theirs: Any) -> tuple[Tensor, Any]:
    mask_N_T = _mask(case)
    corrected = algo.mismatch != "none"
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs_N_T, _padded(case.entropy), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=algo.dual_clip,
            use_bias_correction_kl=False,
            sapo_temperature_pos=algo.sapo_temperature_positive,
            sapo_temperature_neg=algo.sapo_temperature_negative,
            steps_per_generation=1,
        ),
        importance_sampling_level="token",
        epsilon_low=algo.clip_low,
        epsilon_high=1 + algo.clip_high if algo.loss == "cispo" else algo.clip_high,
        beta=algo.kl_coef,
        entropy_coef=algo.entropy_coef,
        _entropy_bonus_enabled=algo.entropy_coef > 0,
        use_adaptive_entropy=False,
        off_policy_mask_threshold=algo.off_policy_mask,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        vllm_importance_sampling_mode=f"{algo.mismatch_level}_{algo.mismatch}",
        vllm_importance_sampling_clip_min=algo.mismatch_min,
        vllm_importance_sampling_clip_max=algo.mismatch_max,
        max_completion_length=naive.MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    vars(trainer).update(theirs)
    prompts_N_1 = torch.zeros(len(mask_N_T), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompts_N_1,
        "prompt_mask": prompts_N_1,
        "completion_ids": torch.zeros_like(mask_N_T),
        "completion_mask": mask_N_T,
        "advantages": torch.tensor(case.advantages, dtype=torch.float64),
        "old_per_token_logps": _padded(case.old),
        "sampling_per_token_logps": _padded(case.rollout),
        "ref_per_token_logps": _padded(case.reference),
        "num_items_in_batch": mask_N_T.sum(),
    }
    if corrected:
        names = {
            "self": trainer,
            "completion_mask": mask_N_T,
            "tool_mask": None,
            "old_per_token_logps": _padded(case.old),
            "sampling_per_token_logps": _padded(case.rollout),
        }
        _run_passage("mask = completion_mask if tool_mask is None", "# Compute the per-token log prob", names)
        inputs["importance_sampling_ratio"] = names["vllm_importance_sampling_ratio"]
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "scale"), [("group_normalised", "group"), ("group_centred", "none"), ("batch_normalised", "batch")]
)
def test_advantages_are_those_of_trl(name: str, scale: str):
    rng = random.Random(name)
    for _ in range(300):
        prompts, group = rng.randint(1, 4), rng.randint(2, 5)
        rewards = torch.tensor([rng.choice([0, 0.1, 1, rng.gauss(0, 2)]) for _ in range(prompts * group)]).double()
        valid = torch.tensor([rng.random() < 0.8 for _ in range(prompts * group)])
        names = {
            "self": SimpleNamespace(
                multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=torch.ones(1)
            ),
            "rewards_per_func": rewards.masked_fill(~valid, torch.nan)[:, None],
            "unscorable_mask": ~valid,
            "num_generations": group,
            "device": "cpu",
        }
        _run_passage("if self.multi_objective_aggregation == ", "# Slice to keep only the local part", names)
        found = find_advantage(name)(rewards.view(prompts, group), valid.view(prompts, group))
        torch.testing.assert_close(found.flatten(), names["advantages"], **CLOSE)


def _run_passage(first: str, end: str, names: dict[str, Any]) -> None:
    exec(_passage(first, end), {**vars(grpo_trainer), **names}, names)


@cache
def _passage(first: str, end: str) -> CodeType:
    """What lies in TRL's method from the line that starts with `first` up to the one that starts with `end`."""
    lines = inspect.getsource(GRPOTrainer._generate_and_score_completions).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    stop = next(i for i, line in enumerate(lines) if i > start and line.strip().startswith(end))
    return compile(textwrap.dedent("\n".join(lines[start:stop])), "TRL", "exec")


def _padded(rows: naive.Rows) -> Tensor:
    """[N, T]; what is not there is far from harmless, so that it shows if a mask is forgotten."""
    width = max(2, *(len(row) for row in rows))  # TRL takes a width of 1 for one value a sequence
    return torch.tensor([[*row, *[-0.7] * (width - len(row))] for row in rows], dtype=torch.float64)


def _mask(case: naive.Case) -> Tensor:
    width = max(2, *(len(row) for row in case.old))
    return torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in case.old])
