"""One rank of the learner: a plain class around a DeepSpeed engine.

Life: `connect` (join the process group, load the base model); if the plan is ranked, `begin_ranking`, `observe` a batch
of rollouts at a time, `finish_ranking`; `build` (apply the plan, start DeepSpeed), then `train`, `export` every step.
Every rank gets the same calls in the same order.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import apply_plan, parameter_groups
from hybrid_rl.algorithms import Tokens, find_loss, kl_T, policy_objective
from hybrid_rl.components import cross_check, read_model
from hybrid_rl.config import Config
from hybrid_rl.flops import count_flops, peak_tflops
from hybrid_rl.learner.assemble import weigh
from hybrid_rl.learner.batching import MicroBatch, collate, micro_batches
from hybrid_rl.learner.engine import TrainingEngine, Update, part_norms
from hybrid_rl.learner.layout import Layout, choose_layout
from hybrid_rl.learner.logprobs import PolicyModel
from hybrid_rl.learner.measures import ALWAYS, Measures
from hybrid_rl.learner.scorer import Scorer
from hybrid_rl.learner.sequence_parallel import SequenceGroup
from hybrid_rl.plan import AdaptationPlan, probe_plan, select_candidates
from hybrid_rl.scoring import Score, ScoreContext
from hybrid_rl.types import StepStats, TrainBatch, TrainSequence, WeightUpdate
from hybrid_rl.weight_sync import digest, encode_update


class LearnerWorker:
    def __init__(self, config: Config, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._world_size = config.learner.world_size

    def connect(self, address: str, port: int) -> dict[str, Any]:
        """Join the process group at `address:port`, load the base model and find out how it may be computed.

        Returns the layout, why it is that one, and why whole logits are made, if they are.
        """
        os.environ.update(
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            RANK=str(self._rank),
            WORLD_SIZE=str(self._world_size),
            LOCAL_RANK="0" if torch.cuda.is_available() else str(self._rank),
            LOCAL_SIZE="1" if torch.cuda.is_available() else str(self._world_size),
        )
        # DeepSpeed would compile this CPU collective on first use, for over a minute; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if not torch.distributed.is_initialized():  # it is where vLLM shares this process
            store = _rendezvous(address, port, self._rank, self._world_size)
            torch.distributed.init_process_group(backend, store=store, rank=self._rank, world_size=self._world_size)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = getattr(torch, self._config.model.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(
            self._config.model.path,
            dtype=torch.float32,  # for bf16, DeepSpeed casts, and keeps fp32 masters of what is trained
            trust_remote_code=self._config.model.trust_remote_code,
            attn_implementation=self._config.model.attention,
        )
        self._model = model.to(self._device)
        _switch_off_dropout(self._model)
        self._anatomy = read_model(self._model, self._config.plan.components)
        if self._config.learner.gradient_checkpointing:  # acts in training mode only
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
            self._model.enable_input_require_grads()
        with self._autocast():
            cross_check(self._model, self._anatomy, self._config.plan.components)
        self._loss = find_loss(self._config.algo.loss)
        halves = self._config.model.attention == "flash_attention_2"  # knows no fp32
        with self._autocast() if halves else nullcontext():
            report = choose_layout(
                self._model, packing=self._config.learner.packing, tolerance=3e-2 if halves else 1e-3
            )
            self._read_policy()
        self._layout: Layout = report.chosen
        size = self._config.learner.sequence_parallel
        self._together = SequenceGroup(self._rank, self._world_size, size) if size > 1 else None
        self._speaks = self._together is None or self._together.rank == 0
        """Whether what this rank sees is counted: ranks of a sequence group see the same."""
        if self._together is not None:
            self._together.check(self._model, self._layout)
        return {"layout": report.chosen, "reason": report.reason, "whole_logits": self._policy.whole_logits}

    def begin_ranking(self, score: Score) -> None:
        """Get ready to gather what `score` looks at. If that is a probe, the model carries its adapter from here on."""
        config = self._config
        self._model.train()
        candidates = select_candidates(self._anatomy, config.plan)
        self._scorer = Scorer(
            self._model,
            candidates,
            score,
            ScoreContext(config.plan, config.lora.rank, config.seed),
            loss=self._ranking_loss,
            tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
            layout=self._layout,
            rank=self._rank,
            world_size=self._world_size,
            all_reduce=deepspeed.comm.all_reduce,
        )
        if score.needs == "updates":
            self._scorer.start_probe(
                probe_plan(self._anatomy, config),
                betas=config.learner.adam_betas,
                max_norm=config.lora.max_grad_norm,
                seed=config.seed,
            )
            assert self._scorer.adapted is not None
            self._adapted = self._scorer.adapted
            self._read_policy()

    def _read_policy(self) -> None:
        """The model as log-probabilities; again whenever adapters were put on or taken off, maybe on its head."""
        sampling, learner = self._config.sampling, self._config.learner
        self._policy = PolicyModel(self._model, temperature=sampling.temperature, chunk_mib=learner.logits_mib)

    def _autocast(self) -> Any:
        """Compute in `model.dtype`: before DeepSpeed takes it over, the model is held in fp32."""
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)

    def observe(self, halves: Sequence[Sequence[TrainSequence]], lr: float) -> None:
        """Gather gradients on two disjoint sets of sequences; with a probe, then take one step of it at rate `lr`."""
        self._scorer.observe(halves, lr)

    def finish_ranking(self) -> tuple[dict[str, float], set[str]]:
        """Every candidate's score, and the names that no gradient reached. The model is as it was before."""
        result = self._scorer.finish()
        del self._scorer
        return result

    def _ranking_loss(self, model: nn.Module, sequences: Sequence[TrainSequence]) -> Tensor:
        """Mean of the run's own loss over sequences, the policy that sampled being the old one: the engine's
        log-probabilities."""
        weighed = weigh(sequences, "sequence_mean_token_mean")
        batch = collate(weighed, self._layout, self._device)
        with self._autocast():
            logprobs_T, _ = self._policy(batch.inputs.input_ids, batch.at_T, batch.targets_T, **batch.inputs.kwargs)
        algo = self._config.algo.model_copy(update={"kl_coef": 0.0, "entropy_coef": 0.0, "mismatch": "none"})
        tokens = self._tokens(batch, logprobs_T, old_T=batch.rollout_logprobs_T)
        return policy_objective(tokens, algo, self._loss).loss

    def build(self, plan_json: str) -> dict[str, Any]:
        """Apply the plan and start DeepSpeed. Returns each optimizer group's parameters and learning rate.

        Raises `RuntimeError` if DeepSpeed dropped a group or changed a trained weight on the way.
        """
        torch.manual_seed(self._config.seed)  # LoRA's random A must be the same on every rank
        plan = AdaptationPlan.from_json(plan_json)
        self._adapted = apply_plan(self._model, plan)
        with self._autocast():
            self._read_policy()
        groups = parameter_groups(self._adapted, plan)
        sizes = {g.name: sum(p.numel() for p in g.parameters) for g in groups}
        rates = {"full": self._config.full.lr, "lora": self._config.lora_lr}
        self._flops = count_flops(self._anatomy, plan, self._model.config)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self._peak = self._config.learner.peak_tflops or peak_tflops(device, self._config.model.dtype)
        before = self._digests()
        self._model.train()
        self._engine = TrainingEngine(self._policy, self._adapted, groups, self._config)
        changed = [name for name, value in self._digests().items() if value != before[name]]
        if changed:
            raise RuntimeError(f"DeepSpeed changed {changed[0]} while it initialised")
        return {g.name: {"params": sizes[g.name], "lr": rates[g.part]} for g in groups}

    def train(self, batch: TrainBatch) -> StepStats:
        """One optimizer step a mini-batch and epoch. Returns metrics of the whole batch, equal on every rank."""
        self._seconds = {"logprob": 0.0, "train": 0.0}
        measures = Measures(self._device, counts=self._speaks)
        shards = [self._shard(m) for m in batch.mini_batches]
        with self._timed("logprob"):
            references = self._reference_logprobs(shards)
            # The first mini-batch trains on the weights that sampled, so its own first pass gives the old ones.
            olds = [None, *([self._logprobs(b) for b in shard] for shard in shards[1:])]
        updates: list[Update] = []
        with self._timed("train"):
            for epoch in range(self._config.batch.epochs):
                for i, shard in enumerate(shards):
                    first = epoch == i == 0
                    old = self._update(shard, olds[i], references[i], batch.lr_scale, measures, updates, first=first)
                    if epoch == 0:
                        olds[i] = old
        for shard, old in zip(shards, olds, strict=True):
            for micro_batch, old_T in zip(shard, old, strict=True):  # type: ignore[arg-type]
                measures.see_rollout(old_T, micro_batch)
        metrics = dict.fromkeys(ALWAYS, 0.0) | measures.metrics(len(updates))
        metrics |= _update_metrics(updates) | self._throughput(batch)
        return StepStats(metrics, self._seconds)

    def divergences(self, sequences: Sequence[TrainSequence]) -> list[float]:
        """Each completion's divergence from the base policy: the sum over its tokens of `algo.kl_estimator`."""
        total_N = torch.zeros(len(sequences), dtype=torch.float64, device=self._device)
        indices = self._indices(sequences)
        shard = [collate([sequences[i] for i in some], self._layout, self._device) for some in indices]
        current = [self._logprobs(b) for b in shard]
        with self._engine.base_policy():
            reference = [self._logprobs(b) for b in shard]
        for some, b, now_T, then_T in zip(indices, shard, current, reference, strict=True):
            where = torch.tensor(some, dtype=torch.long, device=self._device)[b.sequence_T]
            if self._speaks:
                total_N.index_add_(0, where, kl_T(self._config.algo.kl_estimator, now_T, then_T).double())
        deepspeed.comm.all_reduce(total_N)
        return total_N.tolist()

    def export(self, version: int) -> WeightUpdate | None:
        """The weight update of this version from rank 0, `None` from the others."""
        with self._gathered():
            if self._rank != 0:
                return None
            full = dict(self._adapted.full)
            lora = {name: (pair.a, pair.b, pair.scaling) for name, pair in self._adapted.lora.items()}
            return encode_update(full, lora, version=version, dtype=self._dtype)

    def save(self, directory: str) -> None:
        """Write this rank's share of the optimizer and the trained weights under `directory`."""
        self._engine.save(directory)

    def load(self, directory: str) -> None:
        """Read back what `save` wrote, with the same number of ranks and ZeRO stage."""
        self._engine.load(directory)

    def _update(
        self,
        shard: Sequence[MicroBatch],
        olds: Sequence[Tensor] | None,
        references: Sequence[Tensor | None],
        lr_scale: Mapping[str, float],
        measures: Measures,
        updates: list[Update],
        *,
        first: bool,
    ) -> list[Tensor]:
        """One optimizer step. Returns the old log-probabilities, which are this pass's own where none are given."""
        algo = self._config.algo
        result_olds = []
        for i, batch in enumerate(shard):
            logprobs_T, entropy_T = self._forward(batch, entropy="grad" if algo.entropy_coef else True)
            learner_T = logprobs_T.detach() if olds is None else olds[i]
            old_T = batch.rollout_logprobs_T if algo.old_logprobs == "rollout" else learner_T
            tokens = self._tokens(
                batch,
                logprobs_T,
                old_T=old_T,
                entropy_T=entropy_T,
                reference_logprobs_T=references[i],
            )
            result = policy_objective(tokens, algo, self._loss)
            self._engine.backward(result.loss, last=i == len(shard) - 1)
            measures.see_objective(result, logprobs_T, old_T, entropy_T, first)
            result_olds.append(learner_T)
        updates.append(self._engine.step(lr_scale))
        return result_olds

    def _tokens(self, batch: MicroBatch, logprobs_T: Tensor, *, old_T: Tensor, **more: Tensor | None) -> Tokens:
        return Tokens(
            logprobs_T=logprobs_T,
            old_logprobs_T=old_T,
            rollout_logprobs_T=batch.rollout_logprobs_T,
            advantages_T=batch.advantages_T,
            weights_T=batch.weights_T,
            sequence_T=batch.sequence_T,
            sequences=batch.sequences,
            **more,  # type: ignore[arg-type]
        )

    def _forward(self, batch: MicroBatch, entropy: Any) -> tuple[Tensor, Tensor]:
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
        return self._forward(batch, entropy=False)[0]

    def _reference_logprobs(self, shards: Sequence[Sequence[MicroBatch]]) -> list[list[Tensor | None]]:
        algo = self._config.algo
        if not algo.needs_reference or algo.kl_in != "loss":
            return [[None] * len(shard) for shard in shards]
        with self._engine.base_policy():
            return [[self._logprobs(b) for b in shard] for shard in shards]

    def _indices(self, sequences: Sequence[TrainSequence]) -> list[list[int]]:
        """This rank's micro-batches; ranks of a sequence group have the same ones."""
        size = self._config.learner.sequence_parallel
        tokens = self._config.batch.tokens_per_micro_batch * size
        shares = micro_batches([s.length for s in sequences], self._world_size // size, tokens, self._layout)
        return shares[self._rank // size]

    def _shard(self, sequences: Sequence[TrainSequence]) -> list[MicroBatch]:
        indices = self._indices(sequences)
        return [collate([sequences[i] for i in some], self._layout, self._device) for some in indices]

    def _throughput(self, batch: TrainBatch) -> dict[str, float]:
        """Of the training passes, by this rank's clock; the FLOPs are those of all ranks."""
        sequences = [s for m in batch.mini_batches for s in m]
        lengths = [s.length for s in sequences]
        predicted = sum(len(s.completion_ids) for s in sequences)
        epochs, seconds = self._config.batch.epochs, self._seconds["train"]
        tflops = epochs * self._flops.training(lengths, predicted) / seconds / self._world_size / 1e12
        rates = {"throughput/train_tokens": epochs * sum(lengths) / seconds, "throughput/tflops": tflops}
        if self._peak is not None:
            rates["throughput/mfu"] = tflops / self._peak
        return rates

    def _gathered(self) -> Any:
        return self._engine.gathered() if hasattr(self, "_engine") else nullcontext()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - started

    def _digests(self) -> Mapping[str, str]:
        with self._gathered():
            parameters = dict(self._adapted.full)
            for name, pair in self._adapted.lora.items():
                parameters |= {f"{name}.A": pair.a, f"{name}.B": pair.b}
            return {name: digest(p.to(self._dtype)) for name, p in parameters.items()}


def _update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Norms, as means over the step's updates: of the parts, and of the components in them."""
    skipped = sum(not u.applied for u in updates)
    metrics: dict[str, float] = {"policy/updates": len(updates), "faults/skipped_updates": skipped}
    for kind, norms in (("grad", [u.grad_norms for u in updates]), ("update", [u.update_norms for u in updates])):
        for name in norms[0]:
            metrics[f"part/{name}/{kind}_norm"] = sum(n[name] for n in norms) / len(norms)
        for part in part_norms(norms[0]):
            mean = sum(part_norms(n)[part] for n in norms) / len(norms)
            metrics[f"grad_norm/{part}" if kind == "grad" else f"part/{part}/update_norm"] = mean
    return metrics


def _switch_off_dropout(model: nn.Module) -> None:
    """With dropout, the policy that trains would not be the one that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):  # passed to functions by attention modules
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _rendezvous(address: str, port: int, rank: int, world_size: int) -> TCPStore:
    """The store where ranks meet. Rank 0 serves it on `address` alone; torch by itself listens on every interface."""
    serves = rank == 0
    listener = socket.create_server((address, port)) if serves else None
    return TCPStore(
        address,
        port,
        world_size,
        is_master=serves,
        master_listen_fd=listener.detach() if listener else None,  # the store closes it
    )
