"""The log-probability gate: do the engines compute what the learner computes?

Receipts prove that the bytes arrived. The gate proves that the engines use them: every engine samples a few completions
of held-out prompts, and the learner says how likely each token is under its own weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from hybrid_rl.config import Config
from hybrid_rl.rollout.pool import prompt_seed
from hybrid_rl.types import Prompt, Request, Sampling, TrainSequence
from trainers.setup import Workplace

logger = logging.getLogger(__name__)

VARIANTS: dict[str, tuple[str, ...]] = {
    "both parts": ("full", "lora"),
    "full part only": ("full",),
    "adapter only": ("lora",),
    "neither": (),
}
"""What the policy is made of besides the base model."""
_LIMITS = {"float32": 1e-3, "bfloat16": 0.05}
"""Default of `sync.gate.mean`, in nats. Kernels differ by less than 1e-5 in float32 and some 0.02 in bfloat16; wrong
weights show as 0.1 and more."""


class GateFailed(RuntimeError):
    """Engines and learner do not compute the same policy."""


class Gate:
    def __init__(self, config: Config, workplace: Workplace, prompts: Sequence[Prompt]) -> None:
        gate, sampling = config.sync.gate, config.sampling
        self._workplace, self._every = workplace, gate.every
        self.limit = _LIMITS[config.model.dtype] if gate.mean is None else gate.mean
        tokens = min(gate.max_tokens, sampling.max_completion_length)
        # Of the whole distribution: the learner knows no nucleus, and a stop string changes no probability.
        how = Sampling(1, sampling.temperature, 1.0, tokens, (), config.seed)
        self._requests = [
            Request(f"gate/{p.id}", p.token_ids, how, prompt_seed(config.seed, f"gate/{p.id}"))
            for p in prompts[: gate.prompts]
        ]
        self._checked = 0

    def check(self, step: int) -> dict[str, float]:
        """Every so many steps: compare. Returns `sync/logprob_diff` and `sync/logprob_diff_p99`, in nats, over the
        tokens of all engines; nothing in the steps between.

        Raises `GateFailed`, saying which part differs on which engine.
        """
        if not self._every or step % self._every:
            return {}
        differences = self.differences(VARIANTS["both parts"], step)
        together = torch.cat(list(differences.values()))
        wrong = [engine for engine, values in differences.items() if not float(values.mean()) <= self.limit]
        if wrong:  # also where it is no number
            raise GateFailed(self._explain(step, wrong[0]))
        return {
            "sync/logprob_diff": float(together.mean()),
            "sync/logprob_diff_p99": float(together.quantile(0.99)),
        }

    def differences(self, parts: Sequence[str], step: int) -> dict[int, torch.Tensor]:
        """By engine: |engine's - learner's log-probability| of each token it sampled, where both have `parts`. What is
        sampled is decided by the step, so that a resumed run samples the same."""
        self._checked += 1
        requests = [Request(f"{r.id}#{self._checked}", r.prompt_ids, r.sampling, r.seed + step) for r in self._requests]
        answers = self._workplace.pool.ask_each(requests)
        sampled = [
            (engine, TrainSequence(request.prompt_ids, c.token_ids, c.logprobs, 0.0))
            for engine, groups in answers.items()
            for request, (c,) in zip(requests, groups, strict=True)
        ]
        shared = self._workplace.cluster.share([sequence for _, sequence in sampled])
        with self._workplace.learning():
            logprobs = self._workplace.learner.logprobs(shared, tuple(parts))
        found: dict[int, list[torch.Tensor]] = {engine: [] for engine in answers}
        for (engine, sequence), values in zip(sampled, logprobs, strict=True):
            found[engine].append((torch.tensor(values) - torch.tensor(sequence.rollout_logprobs)).abs())
        return {engine: torch.cat(values) for engine, values in found.items()}

    def bisect(self, version: int) -> dict[str, dict[int, float]]:
        """Mean difference by what the policy is made of, and engine. The engines hold the whole policy afterwards."""
        found = {}
        for what, parts in VARIANTS.items():
            self._workplace.sync(version, parts=parts)
            found[what] = {engine: float(values.mean()) for engine, values in self.differences(parts, version).items()}
        self._workplace.sync(version)
        return found

    def _explain(self, step: int, engine: int) -> str:
        means = {what: by_engine.get(engine, float("nan")) for what, by_engine in self.bisect(step).items()}
        wrong = [what for what, mean in means.items() if not mean <= self.limit]
        if "neither" in wrong:
            cause = (
                "already the base model is computed otherwise: look at model.dtype, and at what the engine makes of it"
            )
        elif not wrong:
            cause = "sending it again has mended it: the engine had lost what its receipt said"
        elif "full part only" in wrong and "adapter only" in wrong:
            cause = "both the full part and the adapter are served wrongly"
        elif len(wrong) == 1:
            cause = "each part alone is right, together they are not"
        else:
            cause = f"it is in the {'full part' if 'full part only' in wrong else 'adapter'}"
        table = ", ".join(f"{what} {mean:.2g}" for what, mean in means.items())
        return (
            f"after step {step}, engine {engine} and the learner differ by more than sync.gate.mean={self.limit:g} "
            f"nats a token: {cause}. Mean difference with {table}. `hybrid-rl doctor sync` shows more"
        )
