"""What a training step saw of the policy: sums and quantiles over its tokens, the same on every rank."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed
from torch import Tensor

from hybrid_rl.algorithms import Objective, kl_T
from hybrid_rl.learner.batching import MicroBatch
from hybrid_rl.types import StepStats

ALWAYS = (
    *("policy/loss", "policy/entropy", "policy/clip_fraction", "policy/clip_fraction_low", "policy/clip_fraction_high"),
    *("policy/clip_fraction_first", "policy/ratio_p01", "policy/ratio_p50", "policy/ratio_p99", "policy/ratio_max"),
    *("policy/rollout_kl", "policy/rollout_kl_p99", "policy/rollout_logprob_diff", "policy/rollout_logprob_diff_max"),
    *(
        "tokens/trained",
        "tokens/padding",
        "tokens/dropped_mismatch",
        "tokens/dropped_off_policy",
        "faults/skipped_updates",
    ),
    *("policy/updates", "grad_norm/full", "grad_norm/lora"),
)
"""Metrics of every step, whatever the settings; 0 where nothing was trained."""

NO_UPDATE = StepStats(dict.fromkeys(ALWAYS, 0.0), {})
"""Of a step on which nothing had a gradient, so that nothing was trained."""


class Measures:
    """Gathers over the micro-batches of a step."""

    def __init__(self, device: torch.device, *, counts: bool = True) -> None:
        """Only ranks that `counts` are heard."""
        self._device, self._counts = device, counts
        self._diverges = False
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=device))
        self._values: dict[str, list[Tensor]] = {"log_ratio": [], "rollout_kl": [], "rollout_diff": []}

    def _add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + (value if self._counts else 0.0)

    def _keep(self, name: str, values_T: Tensor) -> None:
        self._values[name].append(values_T.float() if self._counts else values_T[:0].float())

    def see_objective(
        self, result: Objective, logprobs_T: Tensor, old_T: Tensor, entropy_T: Tensor, first: bool
    ) -> None:
        """One micro-batch's loss; `first`: before any update, when nothing may be clipped yet."""
        low, high = (0.0 if t is None else t.sum() for t in (result.tokens.low_T, result.tokens.high_T))
        self._add(loss=result.loss.detach().double(), passes=logprobs_T.numel(), low=low, high=high)
        self._add(entropy=entropy_T.detach().double().sum(), mismatch=result.mismatch_dropped_T.sum())
        self._add(off_policy=result.off_policy_dropped_T.sum())
        if first:
            self._add(first_tokens=logprobs_T.numel(), first_clipped=low + high)
        if result.kl_T is not None:
            self._diverges = True
            self._add(kl=result.kl_T.detach().double().sum())
        self._keep("log_ratio", logprobs_T.detach() - old_T)

    def see_rollout(self, logprobs_T: Tensor, batch: MicroBatch) -> None:
        """How far the learner is from the engine at the weights that sampled, on the same tokens."""
        self._add(tokens=logprobs_T.numel(), padding=batch.padding)
        self._keep("rollout_diff", (logprobs_T - batch.rollout_logprobs_T).abs())
        # KL(rollout || learner): the tokens were sampled by the rollout engine.
        self._keep("rollout_kl", kl_T("k3", batch.rollout_logprobs_T, logprobs_T))

    def metrics(self, mini_batches: int) -> dict[str, float]:
        """Of all ranks together, and equal on each."""
        names = (
            "loss",
            "passes",
            "low",
            "high",
            "entropy",
            "mismatch",
            "off_policy",
            "first_tokens",
            "first_clipped",
            "kl",
        )
        names = (*names, "tokens", "padding")
        together = torch.stack([self._sums[name] for name in names])
        torch.distributed.all_reduce(together)
        sums = dict(zip(names, together.tolist(), strict=True))
        passes = max(sums["passes"], 1.0)
        ratios = _gathered(self._values["log_ratio"], self._device).exp()
        rollout_kl = _gathered(self._values["rollout_kl"], self._device)
        difference = _gathered(self._values["rollout_diff"], self._device)
        metrics = {
            "policy/loss": sums["loss"] / mini_batches,
            "policy/entropy": sums["entropy"] / passes,
            "policy/clip_fraction": (sums["low"] + sums["high"]) / passes,
            "policy/clip_fraction_low": sums["low"] / passes,
            "policy/clip_fraction_high": sums["high"] / passes,
            "policy/clip_fraction_first": sums["first_clipped"] / max(sums["first_tokens"], 1.0),
            **{f"policy/ratio_p{int(q * 100):02d}": _quantile(ratios, q) for q in (0.01, 0.5, 0.99)},
            "policy/ratio_max": float(ratios.max()),
            "policy/rollout_kl": float(rollout_kl.mean()),
            "policy/rollout_kl_p99": _quantile(rollout_kl, 0.99),
            "policy/rollout_logprob_diff": float(difference.mean()),
            "policy/rollout_logprob_diff_max": float(difference.max()),
            "tokens/trained": sums["tokens"],
            "tokens/padding": sums["padding"],
            "tokens/dropped_mismatch": sums["mismatch"],
            "tokens/dropped_off_policy": sums["off_policy"],
        }
        if self._diverges:
            metrics["policy/kl"] = sums["kl"] / passes
        return metrics


def _quantile(values: Tensor, share: float) -> float:
    """torch's own takes at most 16 million elements."""
    return float(values.kthvalue(1 + round(share * (len(values) - 1))).values)


def _gathered(values: list[Tensor], device: torch.device) -> Tensor:
    """Every rank's values, one after another."""
    mine = torch.cat(values) if values else torch.zeros(0, device=device)
    ranks = torch.distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(ranks)]
    torch.distributed.all_gather(sizes, torch.tensor([len(mine)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, device=device)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
