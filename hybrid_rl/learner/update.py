"""From a batch to optimizer steps: micro-batches, old and reference log-probabilities, losses, what was seen."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hybrid_rl.adaptation import AdaptedModel
from hybrid_rl.adaptation.matryoshka import TrainedRanks
from hybrid_rl.algorithms import find_loss, kl_T, policy_objective
from hybrid_rl.config import Config
from hybrid_rl.flops import Flops
from hybrid_rl.learner.batching import MicroBatch, collate, micro_batches, sampled
from hybrid_rl.learner.engine import TrainingEngine, Update, part_norms
from hybrid_rl.learner.layout import Layout
from hybrid_rl.learner.logprobs import Entropy
from hybrid_rl.learner.measures import ALWAYS, Measures
from hybrid_rl.learner.prefixes import saved_prefixes
from hybrid_rl.learner.sequence_parallel import SequenceGroup
from hybrid_rl.treatments import expert_names
from hybrid_rl.types import StepStats, TrainBatch, TrainSequence

_Passed = dict[tuple[int, int | None], list[Tensor]]
"""Log-probabilities by mini-batch and rank of the Matryoshka layers; a tensor a micro-batch."""
_Planned = tuple[int, dict[int | None, float]]
"""An update's mini-batch, and its `TrainedRanks`."""


class PolicyUpdate:
    """Trains an engine as `algo` says. Every method is a collective operation.

    Matryoshka layers are as they are trained, except while an update is about other ranks of theirs (`TrainedRanks`).
    """

    def __init__(
        self,
        engine: TrainingEngine,
        adapted: AdaptedModel,
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
        self._engine, self._adapted, self._config, self._algo = engine, adapted, config, config.algo
        self._weights = {m for m in adapted.experts if f"{m}.weight" in adapted.full}
        """Modules with experts of which the first is their own weight."""
        self._nested = TrainedRanks(adapted.nestings, config.seed)
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
        compared = self._nested.ranks if self._nested.loss == "per_rank" else ()
        measures = Measures(self._device, counts=self._speaks, ranks=compared)
        shards = [self._shard(m) for m in batch.mini_batches]
        order = [*range(len(shards))] * self._config.batch.epochs
        planned = [(i, self._nested.of(batch.step, n)) for n, i in enumerate(order)]
        with self._timed("logprob"):
            references = self._reference_logprobs(shards)
            olds = self._old_logprobs(shards, planned)
        updates: list[Update] = []
        with self._timed("train"):
            for i, ranks in planned:
                passed = self._backward(shards[i], i, ranks, olds, references[i], measures, first=not updates)
                olds = olds if updates else olds | passed
                updates.append(self._engine.step(batch.lr_scale))
                measures.close_update(updates[-1].applied)
        for micro_batch in (b for shard in shards for b in shard):
            measures.see_batch(micro_batch)
        for (i, rank), old in olds.items():
            for old_T, micro_batch in zip(old, shards[i], strict=True):
                measures.see_rollout(old_T, micro_batch, rank)
        metrics = dict.fromkeys(ALWAYS, 0.0) | measures.metrics()
        metrics |= _update_metrics(updates, self._weights) | self._throughput(batch, shards, planned)
        if self._nested.loss == "sampled":
            metrics["matryoshka/rank"] = _mean([float(k) for _, ranks in planned for k in ranks if k is not None])
        return StepStats(metrics, self._seconds, _stepped(updates), sum(u.applied for u in updates))

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

    def _old_logprobs(self, shards: Sequence[Sequence[MicroBatch]], planned: Sequence[_Planned]) -> _Passed:
        """The policy's before the step's first update, as its updates need them."""
        if self._algo.old_logprobs == "rollout":  # against the engine's, no mini-batch needs the learner's
            return {}
        wanted = dict.fromkeys((i, rank) for i, ranks in planned for rank in ranks)
        # The first update is of the weights that sampled, so its own passes give the old ones.
        first = {(i, rank) for i, ranks in planned[:1] for rank in ranks}
        olds: _Passed = {}
        for i, rank in (key for key in wanted if key not in first):
            with self._adapted.at_rank(rank):
                olds[i, rank] = [self._logprobs(b) for b in shards[i]]
        return olds

    def _backward(
        self,
        shard: Sequence[MicroBatch],
        index: int,
        ranks: Mapping[int | None, float],
        olds: _Passed,
        references: Sequence[Tensor] | None,
        measures: Measures,
        *,
        first: bool,
    ) -> _Passed:
        """Gradient of mini-batch number `index` at `ranks`. Returns these passes' log-probabilities, which are the old
        ones where `olds` has none; `first`: before any update."""
        passed: _Passed = {(index, rank): [] for rank in ranks}
        for rank, share in ranks.items():
            with self._adapted.at_rank(rank):
                for i, batch in enumerate(shard):
                    logprobs_T, entropy_T = self._forward(batch, "grad" if self._algo.entropy_coef else True)
                    passed[index, rank].append(logprobs_T.detach())
                    old_T = olds.get((index, rank), passed[index, rank])[i]
                    if self._algo.old_logprobs == "rollout":
                        old_T = batch.rollout_logprobs_T
                    reference_T = None if references is None else references[i]
                    tokens = batch.tokens(logprobs_T, old_T, reference_logprobs_T=reference_T, entropy_T=entropy_T)
                    result = policy_objective(tokens, self._algo, self._loss)
                    last = rank == list(ranks)[-1] and i == len(shard) - 1
                    self._engine.backward(share * result.loss, last=last)
                    measures.see_objective(result, logprobs_T, old_T, entropy_T, first, rank, share)
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
        return self._shares(sequences)[self._rank // self._config.learner.sequence_parallel]

    def _shares(self, sequences: Sequence[TrainSequence]) -> list[list[list[int]]]:
        size = self._config.learner.sequence_parallel
        tokens = self._config.batch.tokens_per_micro_batch * size
        return micro_batches(
            [s.length for s in sequences],
            self._config.learner.world_size // size,
            tokens,
            self._layout,
            [s.prompt_ids for s in sequences],
        )

    def _shard(self, sequences: Sequence[TrainSequence]) -> list[MicroBatch]:
        indices = self._indices(sequences)
        return [collate([sequences[i] for i in some], self._layout, self._device) for some in indices]

    def _throughput(
        self, batch: TrainBatch, shards: Sequence[Sequence[MicroBatch]], planned: Sequence[_Planned]
    ) -> dict[str, float]:
        """Of the training passes over mini-batches, by this rank's clock; the FLOPs are those of all ranks."""
        sequences = [s for m in batch.mini_batches for s in m]
        lengths = [s.length for s in sequences]
        predicted = sum(len(sampled(s)) for s in sequences)
        times = sum(len(ranks) for _, ranks in planned) / len(shards)
        seconds, world_size = self._seconds["train"], self._config.learner.world_size
        passes = world_size * sum(map(len, shards))
        done = self._flops.training(lengths, predicted, passes)
        if self._layout == "shared":  # prompts that others stand in for are not computed
            of_all = [s for m in batch.mini_batches for s in self._saved(m)]
            done -= self._flops.training(of_all, 0, 0)
        tflops = times * done / seconds / world_size / 1e12
        rates = {"throughput/train_tokens": times * sum(lengths) / seconds, "throughput/tflops": tflops}
        if self._peak is not None:
            rates["throughput/mfu"] = tflops / self._peak
        return rates

    def _saved(self, sequences: Sequence[TrainSequence]) -> list[int]:
        """Of all ranks, lengths of prompts that another sequence's stands in for."""
        saved: list[int] = []
        for some in (indices for share in self._shares(sequences) for indices in share):
            rows = [(*sequences[i].prompt_ids, *sequences[i].completion_ids)[:-1] for i in some]
            saved += saved_prefixes(rows, [len(sequences[i].prompt_ids) for i in some])
        return saved

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - started


def _update_metrics(updates: Sequence[Update], weights: Collection[str]) -> dict[str, float]:
    """Norms, as means over the updates that were applied: of the parts, and of the components in them. `weights`: the
    modules with experts whose first expert is their own weight."""
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
    chosen: dict[str, list[float]] = {}
    for module, selection in ((m, s) for u in kept for m, s in u.selections.items()):
        for name, won in zip(expert_names(len(selection), weight=module in weights), selection, strict=True):
            chosen.setdefault(name, []).append(float(won))
    metrics |= {f"molf/{name}_share": _mean(of_updates) for name, of_updates in sorted(chosen.items())}
    if updates[-1].ranks:
        metrics["adalora/budget"] = updates[-1].budget
        metrics["adalora/mean_rank"] = _mean([float(rank) for rank in updates[-1].ranks.values()])
    return metrics


def _stepped(updates: Sequence[Update]) -> dict[str, tuple[int, ...]]:
    """By module with experts: how many of the updates went to each."""
    modules = dict.fromkeys(name for u in updates for name in u.selections)
    return {
        m: tuple(map(sum, zip(*(u.selections[m] for u in updates if m in u.selections), strict=True))) for m in modules
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
