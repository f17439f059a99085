"""What a training step saw of the policy: sums and quantiles over its tokens, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        "policy/mismatch_weight",
        "tokens/dropped_mismatch",
        "tokens/dropped_off_policy",
        "faults/skipped_updates",
    ),
    *("policy/updates", "grad_norm/full", "grad_norm/lora"),
)
"""Metrics of every step, whatever the settings; 0 where nothing was trained."""

NO_UPDATE = StepStats(dict.fromkeys(ALWAYS, 0.0), {})
"""Of a step on which nothing had a gradient, so that nothing was trained."""


_SUMS = (
    *("loss", "passes", "low", "high", "entropy", "kl", "mismatch", "mismatch_weight", "off_policy"),
    *("first_tokens", "first_clipped", "tokens", "padding"),
)


class Measures:
    """Gathers over the micro-batches of a step. What an update saw that was then skipped does not count."""

    def __init__(self, device: torch.device, *, counts: bool = True, ranks: Sequence[int] = ()) -> None:
        """Only ranks that `counts` are heard. `ranks`: those of Matryoshka layers that have metrics of their own."""
        self._device, self._counts, self._ranks = device, counts, tuple(ranks)
        names = (*_SUMS, *(f"{what}_{k}" for k in ranks for what in ("loss", "rollout_kl", "rollout_tokens")))
        self._sums = dict.fromkeys(names, torch.zeros((), dtype=torch.float64, device=device))
        self._values: dict[str, list[Tensor]] = {"log_ratio": [], "rollout_kl": [], "rollout_diff": []}
        self._update: tuple[dict[str, Tensor | float], list[Tensor]] = ({}, [])
        self._updates = 0
        self._diverges = False

    def see_objective(
        self,
        result: Objective,
        logprobs_T: Tensor,
        old_T: Tensor,
        entropy_T: Tensor,
        first: bool,
        rank: int | None = None,
        share: float = 1.0,
    ) -> None:
        """One micro-batch's loss, which counts `share` times and is that of Matryoshka layers at `rank`; `first`:
        before any update, when nothing may be clipped yet."""
        low, high = (0.0 if t is None else t.sum() for t in (result.tokens.low_T, result.tokens.high_T))
        count = logprobs_T.numel()
        seen = {
            "loss": share * result.loss.detach().double(),
            "passes": count,
            "low": low,
            "high": high,
            "entropy": entropy_T.detach().double().sum(),
            "mismatch": result.mismatch_dropped_T.sum(),
            "mismatch_weight": result.mismatch_T.double().sum(),
            "off_policy": result.off_policy_dropped_T.sum(),
            "first_tokens": count if first else 0,
            "first_clipped": low + high if first else 0,
            "kl": 0.0 if result.kl_T is None else result.kl_T.detach().double().sum(),
        }
        if rank in self._ranks:
            seen[f"loss_{rank}"] = result.loss.detach().double()
        sums, ratios = self._update
        for name, value in seen.items():
            sums[name] = sums.get(name, 0.0) + value
        ratios.append(logprobs_T.detach() - old_T)
        self._diverges |= result.kl_T is not None

    def close_update(self, applied: bool) -> None:
        """The micro-batches since the last call were one update."""
        sums, ratios = self._update
        self._update = ({}, [])
        if applied:
            self._updates += 1
            self._add(sums)
            self._keep("log_ratio", ratios)

    def see_batch(self, batch: MicroBatch) -> None:
        """What is trained on, once, however often it is gone through."""
        self._add({"tokens": batch.at_T.numel(), "padding": batch.padding})

    def see_rollout(self, logprobs_T: Tensor, batch: MicroBatch, rank: int | None = None) -> None:
        """How far the learner, with Matryoshka layers at `rank`, is from the engine at the weights that sampled, on the
        same tokens."""
        self._keep("rollout_diff", [(logprobs_T - batch.rollout_logprobs_T).abs()])
        # KL(rollout || learner): the tokens were sampled by the rollout engine.
        divergence_T = kl_T("k3", batch.rollout_logprobs_T, logprobs_T)
        self._keep("rollout_kl", [divergence_T])
        if rank in self._ranks:
            seen = {f"rollout_kl_{rank}": divergence_T.double().sum(), f"rollout_tokens_{rank}": len(divergence_T)}
            self._add(seen)

    def metrics(self) -> dict[str, float]:
        """Of all ranks together, and equal on each."""
        together = torch.stack(list(self._sums.values()))
        torch.distributed.all_reduce(together)
        sums = dict(zip(self._sums, together.tolist(), strict=True))
        passes = max(sums["passes"], 1.0)
        ratios = self._gathered("log_ratio").exp()
        rollout_kl, difference = self._gathered("rollout_kl"), self._gathered("rollout_diff")
        metrics = {
            "policy/loss": sums["loss"] / max(self._updates, 1),
            "policy/entropy": sums["entropy"] / passes,
            "policy/clip_fraction": (sums["low"] + sums["high"]) / passes,
            "policy/clip_fraction_low": sums["low"] / passes,
            "policy/clip_fraction_high": sums["high"] / passes,
            "policy/clip_fraction_first": sums["first_clipped"] / max(sums["first_tokens"], 1.0),
            **{f"policy/ratio_p{int(q * 100):02d}": _quantile(ratios, q) for q in (0.01, 0.5, 0.99)},
            "policy/ratio_max": _quantile(ratios, 1.0),
            "policy/mismatch_weight": sums["mismatch_weight"] / passes,
            "policy/rollout_kl": float(rollout_kl.mean()),
            "policy/rollout_kl_p99": _quantile(rollout_kl, 0.99),
            "policy/rollout_logprob_diff": float(difference.mean()),
            "policy/rollout_logprob_diff_max": _quantile(difference, 1.0),
            "tokens/trained": int(sums["tokens"]),
            "tokens/padding": int(sums["padding"]),
            "tokens/dropped_mismatch": int(sums["mismatch"]),
            "tokens/dropped_off_policy": int(sums["off_policy"]),
        }
        if self._diverges:
            metrics["policy/kl"] = sums["kl"] / passes
        for k in self._ranks:
            metrics[f"matryoshka/loss_{k}"] = sums[f"loss_{k}"] / max(self._updates, 1)
            metrics[f"matryoshka/rollout_kl_{k}"] = sums[f"rollout_kl_{k}"] / max(sums[f"rollout_tokens_{k}"], 1.0)
        return metrics

    def _add(self, values: Mapping[str, Tensor | float]) -> None:
        if self._counts:
            self._sums |= {name: self._sums[name] + value for name, value in values.items()}

    def _keep(self, name: str, values: Sequence[Tensor]) -> None:
        if self._counts:
            self._values[name] += [v.float() for v in values]

    def _gathered(self, name: str) -> Tensor:
        """Every rank's values, one after another."""
        mine = torch.cat([torch.zeros(0, device=self._device), *self._values[name]])
        ranks = torch.distributed.get_world_size()
        sizes = [torch.zeros(1, dtype=torch.long, device=self._device) for _ in range(ranks)]
        torch.distributed.all_gather(sizes, torch.tensor([len(mine)], device=self._device))
        padded = torch.zeros(max(int(size) for size in sizes), device=self._device)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def _quantile(values: Tensor, share: float) -> float:
    """0 of nothing. torch's own takes at most 16 million elements."""
    return float(values.kthvalue(1 + round(share * (len(values) - 1))).values) if len(values) else 0.0
