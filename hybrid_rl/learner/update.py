"""From a batch to optimizer steps: micro-batches, old and reference log-probabilities, losses, what was seen."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hybrid_rl.algorithms import find_loss, kl_T, policy_objective
from hybrid_rl.config import Config
from hybrid_rl.flops import Flops
from hybrid_rl.learner.batching import MicroBatch, collate, micro_batches, sampled
from hybrid_rl.learner.engine import TrainingEngine, Update, part_norms
from hybrid_rl.learner.layout import Layout
from hybrid_rl.learner.logprobs import Entropy
from hybrid_rl.learner.measures import ALWAYS, Measures
from hybrid_rl.learner.sequence_parallel import SequenceGroup
from hybrid_rl.types import StepStats, TrainBatch, TrainSequence


class PolicyUpdate:
    """Trains an engine as `algo` says. Every method is a collective operation."""

    def __init__(
        self,
        engine: TrainingEngine,
        config: Config,
        *,
        layout: Layout,
        together: SequenceGroup | None,
        rank: int,
        device: torch.device,
        flops: Flops,
        peak_tflops: float | None,
    ) -> None:
        """`together`: the ranks that share this one's sequences; `peak_tflops`: of a device, if it is known."""
        self._engine, self._config, self._algo = engine, config, config.algo
        self._loss = find_loss(config.algo.loss)
        self._layout: Layout = layout
        self._together, self._rank, self._device = together, rank, device
        self._speaks = together is None or together.rank == 0
        """Whether what this rank sees is counted: ranks of a sequence group see the same."""
        self._flops, self._peak = flops, peak_tflops
        self._seconds: dict[str, float] = {}

    def train(self, batch: TrainBatch) -> StepStats:
        """One optimizer step a mini-batch and epoch. Returns metrics of the whole batch, equal on every rank."""
        self._seconds = {"logprob": 0.0, "train": 0.0}
        measures = Measures(self._device, counts=self._speaks)
        shards = [self._shard(m) for m in batch.mini_batches]
        with self._timed("logprob"):
            references = self._reference_logprobs(shards)
            # The first mini-batch trains on the weights that sampled, so its own first pass gives the old ones. Against
            # the engine's, no mini-batch needs the learner's.
            later = shards[1:] if self._algo.old_logprobs == "learner" else []
            olds: list[list[Tensor] | None] = [None, *([self._logprobs(b) for b in shard] for shard in later)]
            olds += [None] * (len(shards) - len(olds))
        updates: list[Update] = []
        with self._timed("train"):
            for epoch in range(self._config.batch.epochs):
                for i, shard in enumerate(shards):
                    passed = self._backward(shard, olds[i], references[i], measures, first=epoch == i == 0)
                    if i == 0:
                        olds[0] = olds[0] or passed
                    updates.append(self._engine.step(batch.lr_scale))
                    measures.close_update(updates[-1].applied)
        for shard, old in zip(shards, olds, strict=True):
            for i, micro_batch in enumerate(shard):
                measures.see_batch(micro_batch)
                if old is not None:
                    measures.see_rollout(old[i], micro_batch)
        metrics = dict.fromkeys(ALWAYS, 0.0) | measures.metrics()
        return StepStats(metrics | _update_metrics(updates) | self._throughput(batch), self._seconds)

    @torch.no_grad()
    def divergences(self, sequences: Sequence[TrainSequence]) -> list[float]:
        """Each completion's divergence from the base policy: the sum over its tokens of `algo.kl_estimator`."""
        total_N = torch.zeros(len(sequences), dtype=torch.float64, device=self._device)
        indices = self._indices(sequences)
        shard = [collate([sequences[i] for i in some], self._layout, self._device) for some in indices]
        current = [self._logprobs(b) for b in shard]
        with self._engine.only(()):
            reference = [self._logprobs(b) for b in shard]
        for some, b, now_T, then_T in zip(indices, shard, current, reference, strict=True):
            where_T = torch.tensor(some, dtype=torch.long, device=self._device)[b.sequence_T]
            if self._speaks:
                total_N.index_add_(0, where_T, kl_T(self._algo.kl_estimator, now_T, then_T).double())
        torch.distributed.all_reduce(total_N)
        return total_N.tolist()

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[TrainSequence], parts: Collection[str]) -> list[list[float]]:
        """Log-probability of each token that was sampled, by completion, under the policy with these `PARTS` alone."""
        lengths = [len(sampled(s)) for s in sequences]
        starts_N = torch.tensor(lengths, dtype=torch.long).cumsum(0) - torch.tensor(lengths, dtype=torch.long)
        total_T = torch.zeros(sum(lengths), dtype=torch.float64, device=self._device)
        with self._engine.only(parts):
            for some in self._indices(sequences):
                found_T = self._logprobs(collate([sequences[i] for i in some], self._layout, self._device))
                if self._speaks:
                    where = [t for i in some for t in range(int(starts_N[i]), int(starts_N[i]) + lengths[i])]
                    total_T[where] = found_T.double()
        torch.distributed.all_reduce(total_T)
        return [part.tolist() for part in total_T.split(lengths)]

    def _backward(
        self,
        shard: Sequence[MicroBatch],
        olds: Sequence[Tensor] | None,
        references: Sequence[Tensor] | None,
        measures: Measures,
        *,
        first: bool,
    ) -> list[Tensor]:
        """Gradient of a mini-batch. Returns this pass's log-probabilities, which are the old ones where none are given;
        `first`: before any update."""
        passed: list[Tensor] = []
        for i, batch in enumerate(shard):
            logprobs_T, entropy_T = self._forward(batch, "grad" if self._algo.entropy_coef else True)
            passed.append(logprobs_T.detach())
            old_T = passed[i] if olds is None else olds[i]
            if self._algo.old_logprobs == "rollout":
                old_T = batch.rollout_logprobs_T
            reference_T = None if references is None else references[i]
            tokens = batch.tokens(logprobs_T, old_T, reference_logprobs_T=reference_T, entropy_T=entropy_T)
            result = policy_objective(tokens, self._algo, self._loss)
            self._engine.backward(result.loss, last=i == len(shard) - 1)
            measures.see_objective(result, logprobs_T, old_T, entropy_T, first)
        return passed

    def _forward(self, batch: MicroBatch, entropy: Entropy) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the completion tokens at the sampling temperature, and the policy's entropy there."""
        if self._together is None:
            inputs = batch.inputs
            return self._engine(inputs.input_ids, batch.at_T, batch.targets_T, entropy=entropy, **inputs.kwargs)
        cut = self._together.cut(batch)
        targets_T = batch.targets_T[cut.own_T]
        found = self._engine(cut.inputs.input_ids, cut.at_T, targets_T, entropy=entropy, **cut.inputs.kwargs)
        logprobs_T, *entropies = (
            self._together.join(cut.own_T, x_T, len(batch.at_T)) for x_T in (found if entropy else found[:1])
        )
        return logprobs_T, entropies[0] if entropies else logprobs_T.new_empty(0)

    @torch.no_grad()
    def _logprobs(self, batch: MicroBatch) -> Tensor:
        return self._forward(batch, False)[0]

    def _reference_logprobs(self, shards: Sequence[Sequence[MicroBatch]]) -> list[list[Tensor] | None]:
        if not self._algo.needs_reference or self._algo.kl_in != "loss":
            return [None] * len(shards)
        with self._engine.only(()):
            return [[self._logprobs(b) for b in shard] for shard in shards]

    def _indices(self, sequences: Sequence[TrainSequence]) -> list[list[int]]:
        """This rank's micro-batches; ranks of a sequence group have the same ones."""
        size = self._config.learner.sequence_parallel
        tokens = self._config.batch.tokens_per_micro_batch * size
        shares = micro_batches(
            [s.length for s in sequences], self._config.learner.world_size // size, tokens, self._layout
        )
        return shares[self._rank // size]

    def _shard(self, sequences: Sequence[TrainSequence]) -> list[MicroBatch]:
        indices = self._indices(sequences)
        return [collate([sequences[i] for i in some], self._layout, self._device) for some in indices]

    def _throughput(self, batch: TrainBatch) -> dict[str, float]:
        """Of the training passes, by this rank's clock; the FLOPs are those of all ranks."""
        sequences = [s for m in batch.mini_batches for s in m]
        lengths = [s.length for s in sequences]
        predicted = sum(len(sampled(s)) for s in sequences)
        epochs, seconds = self._config.batch.epochs, self._seconds["train"]
        ranks = self._config.learner.world_size
        tflops = epochs * self._flops.training(lengths, predicted) / seconds / ranks / 1e12
        rates = {"throughput/train_tokens": epochs * sum(lengths) / seconds, "throughput/tflops": tflops}
        if self._peak is not None:
            rates["throughput/mfu"] = tflops / self._peak
        return rates

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - started


def _update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Norms, as means over the updates that were applied: of the parts, and of the components in them."""
    applied = [u.applied for u in updates]
    metrics: dict[str, float] = {
        "policy/updates": len(updates),
        "faults/skipped_updates": applied.count(False),
        "faults/skipped_in_a_row": applied[::-1].index(True) if any(applied) else len(applied),
    }
    kept = [u for u in updates if u.applied]
    for name in updates[0].grad_norms:
        metrics[f"part/{name}/grad_norm"] = _mean([u.grad_norms[name] for u in kept])
        metrics[f"part/{name}/update_norm"] = _mean([u.update_norms[name] for u in kept])
    for part in part_norms(updates[0].grad_norms):
        metrics[f"grad_norm/{part}"] = _mean([part_norms(u.grad_norms)[part] for u in kept])
        metrics[f"part/{part}/update_norm"] = _mean([part_norms(u.update_norms)[part] for u in kept])
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
