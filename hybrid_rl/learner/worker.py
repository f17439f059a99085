"""One rank of the learner: a plain class around a DeepSpeed engine.

Life: `connect` (join the process group, load the base model); if the plan is ranked, `begin_ranking`, `observe` a batch
of rollouts at a time, `finish_ranking`; `build` (apply the plan, start DeepSpeed), then `train`, `export` every step.
Every rank gets the same calls in the same order.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import apply_plan
from hybrid_rl.algorithms import clipped_policy_loss, k3_divergence
from hybrid_rl.components import cross_check, read_model
from hybrid_rl.config import Config
from hybrid_rl.learner.batching import PaddedBatch, micro_batches, pad
from hybrid_rl.learner.scorer import Scorer
from hybrid_rl.plan import AdaptationPlan, probe_plan, select_candidates
from hybrid_rl.scoring import Score, ScoreContext
from hybrid_rl.types import StepStats, TrainBatch, TrainSequence, WeightUpdate
from hybrid_rl.weight_sync import digest, encode_update


class LearnerWorker:
    def __init__(self, config: Config, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._world_size = config.learner.world_size

    def connect(self, address: str, port: int) -> None:
        """Join the process group at `address:port` and load the base model."""
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
        self._anatomy = read_model(self._model, self._config.plan.components)
        if self._config.learner.gradient_checkpointing:  # acts in training mode only
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
            self._model.enable_input_require_grads()
        with self._autocast():
            cross_check(self._model, self._anatomy, self._config.plan.components)

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
        """The run's own loss, the policy that sampled being the old one: the engine's log-probabilities."""
        padded = pad(sequences, self._device)
        with self._autocast():
            logprobs = self._logprobs(model, padded)
        return self._policy_loss(logprobs, padded.rollout_logprobs_N_T, padded, len(sequences)).loss

    def build(self, plan_json: str) -> dict[str, Any]:
        """Apply the plan and start DeepSpeed. Returns each optimizer group's name, parameters and learning rate.

        Raises `RuntimeError` if DeepSpeed dropped a group or changed a trained weight on the way.
        """
        torch.manual_seed(self._config.seed)  # LoRA's random A must be the same on every rank
        self._adapted = apply_plan(self._model, AdaptationPlan.from_json(plan_json))
        config = self._config
        settings = {"full": config.full, "lora": config.lora}
        rates = {"full": config.full.lr, "lora": config.lora_lr}
        parameters = {"full": list(self._adapted.full.values()), "lora": self._adapted.lora_parameters}
        self._group_names = [name for name in ("full", "lora") if parameters[name]]
        self._base_lr = [rates[name] for name in self._group_names]
        self._max_norm = [settings[name].max_grad_norm for name in self._group_names]
        groups = [
            {"params": parameters[name], "lr": rates[name], "weight_decay": settings[name].weight_decay}
            for name in self._group_names
        ]
        before = self._digests()
        self._model.train()
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self._adapted.model,
            optimizer=torch.optim.AdamW(groups, betas=config.learner.adam_betas),
            config=self._deepspeed_config(),
        )
        if len(self._optimizer.param_groups) != len(self._group_names):
            raise RuntimeError(f"DeepSpeed kept {len(self._optimizer.param_groups)} of the groups {self._group_names}")
        changed = [name for name, value in self._digests().items() if value != before[name]]
        if changed:
            raise RuntimeError(f"DeepSpeed changed {changed[0]} while it initialised")
        sizes = {name: sum(math.prod(_shape(p)) for p in parameters[name]) for name in self._group_names}
        return {name: {"params": sizes[name], "lr": rates[name]} for name in self._group_names}

    def train(self, batch: TrainBatch) -> StepStats:
        """One optimizer step a mini-batch. Returns metrics of the whole batch, equal on every rank."""
        self._seconds = {"logprob": 0.0, "train": 0.0}
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self._device)
        self._worst = torch.zeros(1, dtype=torch.float64, device=self._device)
        norms: list[dict[str, float]] = []
        # With one mini-batch the policy that trains is the one that sampled; its log-probabilities are the old ones.
        shards = [list(self._padded(m, self._world_size, self._rank)) for m in batch.mini_batches]
        olds = [self._old_logprobs(shard) if len(shards) > 1 else None for shard in shards]
        for shard, old, sequences in zip(shards, olds, batch.mini_batches, strict=True):
            norms.append(self._optimizer_step(shard, old, len(sequences), batch.lr_scale))
        deepspeed.comm.all_reduce(self._sums)
        deepspeed.comm.all_reduce(self._worst, op=deepspeed.comm.ReduceOp.MAX)
        sums = dict(zip(_SUMS, self._sums.tolist(), strict=True))
        tokens = max(sums["tokens"], 1.0)
        metrics = {
            "policy/loss": sums["loss"] / len(shards),
            "policy/clip_fraction": sums["clipped"] / tokens,
            "policy/rollout_kl": sums["rollout_kl"] / tokens,
            "policy/rollout_logprob_diff": sums["rollout_diff"] / tokens,
            "policy/rollout_logprob_diff_max": float(self._worst),
            "tokens/trained": sums["tokens"],
        }
        for name in ("full", "lora"):
            metrics[f"grad_norm/{name}"] = sum(n.get(name, 0.0) for n in norms) / len(norms)
        return StepStats(metrics, self._seconds)

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
        self._engine.save_checkpoint(directory, tag=_TAG, exclude_frozen_parameters=True)

    def load(self, directory: str) -> None:
        """Read back what `save` wrote, with the same number of ranks and ZeRO stage."""
        path, _ = self._engine.load_checkpoint(directory, tag=_TAG, load_module_strict=False)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint under {directory}")

    def _optimizer_step(
        self, shard: list[PaddedBatch], old: list[Tensor] | None, sequences: int, lr_scale: float
    ) -> dict[str, float]:
        started = time.perf_counter()
        for i, padded in enumerate(shard):
            self._engine.set_gradient_accumulation_boundary(i == len(shard) - 1)
            logprobs = self._logprobs(self._engine, padded)
            result = self._policy_loss(logprobs, logprobs.detach() if old is None else old[i], padded, sequences)
            # DeepSpeed averages gradients over ranks; each rank's loss is already its share of the whole.
            self._engine.backward(result.loss * self._world_size, scale_wrt_gas=False)
            if old is None:
                self._compare_with_rollout(logprobs.detach(), padded)
            self._sums[_SUMS.index("loss")] += result.loss.detach()
            self._sums[_SUMS.index("clipped")] += result.clipped_tokens
        norms = self._clip_groups()
        for group, base in zip(self._optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * lr_scale
        self._engine.step()
        self._seconds["train"] += time.perf_counter() - started
        return norms

    def _old_logprobs(self, shard: list[PaddedBatch]) -> list[Tensor]:
        started = time.perf_counter()
        with torch.no_grad():
            old = [self._logprobs(self._engine, padded) for padded in shard]
        for logprobs, padded in zip(old, shard, strict=True):
            self._compare_with_rollout(logprobs, padded)
        self._seconds["logprob"] += time.perf_counter() - started
        return old

    def _logprobs(self, model: Any, padded: PaddedBatch) -> Tensor:
        """Log-probabilities of the targets at the sampling temperature, [N, T] in fp32."""
        output = model(input_ids=padded.input_ids_N_L, use_cache=False, logits_to_keep=padded.columns_T)
        logits = output.logits.float() / self._config.sampling.temperature
        chosen = logits.gather(-1, padded.targets_N_T[..., None])[..., 0]
        return chosen - torch.logsumexp(logits, dim=-1)

    def _policy_loss(self, logprobs: Tensor, old: Tensor, padded: PaddedBatch, sequences: int) -> Any:
        weights = torch.full_like(padded.advantages_N, 1 / sequences)
        return clipped_policy_loss(
            logprobs,
            old,
            padded.advantages_N,
            padded.mask_N_T,
            clip_low=self._config.algo.clip_low,
            clip_high=self._config.algo.clip_high,
            weights_N=weights,
        )

    def _compare_with_rollout(self, logprobs: Tensor, padded: PaddedBatch) -> None:
        """Count how far the learner's log-probabilities are from the engine's, on the same tokens."""
        difference = (logprobs - padded.rollout_logprobs_N_T).abs() * padded.mask_N_T
        self._sums[_SUMS.index("tokens")] += padded.mask_N_T.sum()
        self._sums[_SUMS.index("rollout_diff")] += difference.sum()
        # KL(rollout || learner): the tokens were sampled by the rollout engine.
        self._sums[_SUMS.index("rollout_kl")] += k3_divergence(padded.rollout_logprobs_N_T, logprobs, padded.mask_N_T)
        self._worst = torch.maximum(self._worst, difference.max().double())

    def _padded(self, sequences: Sequence[TrainSequence], ranks: int, rank: int) -> list[PaddedBatch]:
        lengths = [len(s.prompt_ids) + len(s.completion_ids) for s in sequences]
        shares = micro_batches(lengths, ranks, self._config.batch.tokens_per_micro_batch)
        return [pad([sequences[i] for i in indices], self._device) for indices in shares[rank]]

    def _clip_groups(self) -> dict[str, float]:
        """Clip each optimizer group's gradient by its own norm, over all ranks. Returns the norms before clipping.

        DeepSpeed clips by the norm over all groups together, with which one group's gradient would set the other's step
        size. The averaged gradient shards are there between `backward` and `step`, in one list a ZeRO-1/2 group or
        ZeRO-3 sub-group.
        """
        owner = getattr(self._optimizer, "sub_group_to_group_id", None)
        shards: list[list[Tensor]] = [[] for _ in self._group_names]
        for index, tensors in self._optimizer.averaged_gradients.items():
            shards[index if owner is None else owner[index]] += [t for t in tensors if t is not None]
        squares = torch.stack([sum((t.float().square().sum() for t in s), self._zero()) for s in shards])
        deepspeed.comm.all_reduce(squares)
        norms = squares.sqrt().tolist()
        if not all(math.isfinite(norm) for norm in norms):
            raise RuntimeError(
                f"the gradient is not finite: norms by group {dict(zip(self._group_names, norms, strict=True))}"
            )
        for tensors, norm, limit in zip(shards, norms, self._max_norm, strict=True):
            if norm > limit:
                for tensor in tensors:
                    tensor.mul_(limit / norm)
        return dict(zip(self._group_names, norms, strict=True))

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self._device)

    def _gathered(self) -> Any:
        """Context in which the trained parameters are whole (ZeRO-3 keeps them partitioned)."""
        if self._config.learner.zero_stage < 3 or not hasattr(self, "_engine"):
            return nullcontext()
        return deepspeed.zero.GatheredParameters([*self._adapted.full.values(), *self._adapted.lora_parameters])

    def _digests(self) -> Mapping[str, str]:
        with self._gathered():
            parameters = dict(self._adapted.full)
            for name, pair in self._adapted.lora.items():
                parameters |= {f"{name}.A": pair.a, f"{name}.B": pair.b}
            return {name: digest(p.to(self._dtype)) for name, p in parameters.items()}

    def _deepspeed_config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            "bf16": {"enabled": self._dtype == torch.bfloat16},
            # Micro-batches add up in fp32, so that their number does not change the gradient.
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {
                "stage": self._config.learner.zero_stage,
                "contiguous_gradients": True,
                "overlap_comm": False,
                "round_robin_gradients": False,
                "stage3_param_persistence_threshold": 0,
            },
        }


_TAG = "state"
_SUMS = ("loss", "clipped", "tokens", "rollout_kl", "rollout_diff")


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


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Whole shape, also where ZeRO-3 holds a partition of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
