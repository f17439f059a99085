"""Ranking on the learner: gradients of the candidates on the policy's own rollouts, at the start and along a probe.

The probe trains LoRA on every candidate, on-policy, and is taken away again; every parameter is digested before and
after. Ranks take turns at micro-batches whose composition depends on the settings alone, and add up what they gathered,
so that one rank and many give the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from hybrid_rl.adaptation import AdaptedModel, apply_plan, remove_adapters
from hybrid_rl.components import Weight
from hybrid_rl.learner.batching import micro_batches
from hybrid_rl.learner.layout import Layout
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.scoring import Collector, Evidence, Score, ScoreContext
from hybrid_rl.types import TrainSequence
from hybrid_rl.weight_sync import digest

LEAST_MICRO_BATCHES = 8
"""Micro-batches that each half of the base policy's sequences is dealt to at least, for their second moments."""
CALIBRATE_EVERY = 4
"""One in so many micro-batches is passed through twice, to know the second moments before they are used."""

Loss = Callable[[nn.Module, Sequence[TrainSequence]], Tensor]
"""Mean loss of the sequences under the model."""


@dataclass(frozen=True)
class _MicroBatch:
    half: int
    sequences: list[TrainSequence]
    share_of_half: float
    share_of_all: float


class Scorer:
    """Use: `start_probe` if the score needs updates; `observe` a batch of rollouts at a time; `finish`."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Sequence[Weight],
        score: Score,
        context: ScoreContext,
        *,
        loss: Loss,
        tokens_per_micro_batch: int,
        layout: Layout,
        rank: int = 0,
        world_size: int = 1,
        all_reduce: Callable[[Tensor], object] = lambda tensor: None,
    ) -> None:
        self._model, self._candidates = model, list(candidates)
        self._score, self._context = score, context
        self._loss, self._tokens = loss, tokens_per_micro_batch
        self._layout: Layout = layout
        self._rank, self._world_size, self._all_reduce = rank, world_size, all_reduce
        self._required = {name for name, p in model.named_parameters() if p.requires_grad}
        model.requires_grad_(False)
        self._weights = {w.name: model.get_parameter(w.parameter) for w in candidates if not w.quantised}
        self._before = self._digests()  # of the whole model: nothing at all may move
        self._collector = (
            Collector(self._weights, score.kinds, context.rank, all_reduce=all_reduce) if score.kinds else None
        )
        self.adapted: AdaptedModel | None = None
        """The model with the probe's adapter, while there is one."""

    def start_probe(self, plan: AdaptationPlan, *, betas: tuple[float, float], max_norm: float, seed: int) -> None:
        """Put the probe's adapter on the model: `plan` gives LoRA to every candidate that can have it."""
        torch.manual_seed(seed)  # LoRA's random A must be the same on every rank
        self.adapted = apply_plan(self._model, plan)
        self._optimizer = torch.optim.AdamW(self.adapted.adapter_parameters, betas=betas, weight_decay=0.0)
        self._max_norm = max_norm

    def observe(self, halves: Sequence[Sequence[TrainSequence]], lr: float = 0.0) -> None:
        """Gather gradients on two disjoint sets of sequences; with a probe, then take one step of it at rate `lr`.

        Sets without sequences add nothing.
        """
        assert self._collector is not None
        batches = self._deal(halves)
        if not batches:  # nothing was learnt from, so nothing is learnt
            return
        mine = batches[self._rank :: self._world_size]
        with self._collector.watching():
            if not self._collector.calibrated:
                every = 1 if self.adapted else CALIBRATE_EVERY  # pairs, so that both halves have a say
                first = [batch for i, batch in enumerate(batches) if i // 2 % every == 0]
                for batch in first[self._rank :: self._world_size]:
                    self._backward(batch)
                self._model.zero_grad(set_to_none=True)
                self._collector.finish_step()
            for batch in mine:
                self._backward(batch)
            self._collector.finish_step()
        if self.adapted is not None:
            self._step(lr)

    def finish(self) -> tuple[dict[str, float], set[str]]:
        """Every candidate's score, and the names that no gradient reached.

        The model is as it was before: raises `RuntimeError` if a weight changed.
        """
        if self.adapted is not None:
            remove_adapters(self._model)
            self.adapted = None
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in self._required)
        moved = [name for name, value in self._digests().items() if value != self._before[name]]
        if moved:
            raise RuntimeError(f"ranking changed {moved[0]}; it must not change any weight")
        scored = [w for w in self._candidates if w.name in self._weights]
        unreached: set[str] = set()
        if self._collector is None:
            evidence = [Evidence(w, base=self._weights[w.name].detach()) for w in scored]
        else:
            evidence, unreached = self._collector.evidence(scored)
        scores = self._score(evidence, self._context)
        return {w.name: scores.get(w.name, 0.0) for w in self._candidates}, unreached

    def _deal(self, halves: Sequence[Sequence[TrainSequence]]) -> list[_MicroBatch]:
        """Micro-batches of both halves in turn, the same ones for any number of ranks."""
        total = sum(len(half) for half in halves)
        dealt: list[list[_MicroBatch]] = []
        for half, sequences in enumerate(halves):
            lengths = [s.length for s in sequences]
            tokens = self._tokens
            if self.adapted is None and lengths:
                tokens = min(tokens, max(max(lengths), sum(lengths) // LEAST_MICRO_BATCHES))
            batches = micro_batches(lengths, 1, tokens, self._layout)[0] if lengths else []
            dealt.append(
                [_MicroBatch(half, [sequences[i] for i in b], len(b) / len(sequences), len(b) / total) for b in batches]
            )
        return [batch for pair in zip_longest(*dealt) for batch in pair if batch is not None]

    def _backward(self, batch: _MicroBatch) -> None:
        assert self._collector is not None
        with self._collector.micro_batch(batch.half, batch.share_of_half, scale=1 / batch.share_of_all):
            (self._loss(self._model, batch.sequences) * batch.share_of_all).backward()

    def _step(self, lr: float) -> None:
        assert self.adapted is not None
        parameters = self.adapted.adapter_parameters
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        together = torch.cat([g.flatten() for g in gradients])  # one message
        self._all_reduce(together)
        for parameter, part in zip(parameters, together.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(self.adapted.adapter_parameters, self._max_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _digests(self) -> dict[str, str]:
        return {name: digest(parameter) for name, parameter in self._model.named_parameters()}
