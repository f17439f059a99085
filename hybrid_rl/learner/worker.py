"""One rank of the learner: a plain class around a DeepSpeed engine.

Life: `connect` (join the process group, load the base model); if the plan is ranked, `begin_ranking`, `observe` a batch
of rollouts at a time, `finish_ranking`; `build` (apply the plan, start DeepSpeed), then `train`, `export` every step.
Every rank gets the same calls in the same order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import PARTS, WEIGHTS, Start, apply_plan, parameter_groups, read_start, write_weights
from hybrid_rl.algo import AlgoConfig
from hybrid_rl.algorithms import find_loss, policy_objective
from hybrid_rl.components import cross_check, read_model
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.digests import digest, digest_of_all
from hybrid_rl.files import FileFacts, describe, written_atomically
from hybrid_rl.flops import count_flops, peak_tflops
from hybrid_rl.learner.assemble import weigh
from hybrid_rl.learner.batching import collate
from hybrid_rl.learner.engine import TrainingEngine
from hybrid_rl.learner.layout import Layout, choose_layout
from hybrid_rl.learner.logprobs import PolicyModel
from hybrid_rl.learner.scorer import Scorer
from hybrid_rl.learner.sequence_parallel import SequenceGroup
from hybrid_rl.learner.shards import Shards, random_state, restore_random, shard_path, write_shard
from hybrid_rl.learner.update import PolicyUpdate
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import probe_plan, select_candidates
from hybrid_rl.scoring import Score, ScoreContext
from hybrid_rl.types import StepStats, TrainBatch, TrainSequence, WeightUpdate
from hybrid_rl.weight_sync import Meeting, Transport, open_publisher, open_store, served_tensors


class LearnerWorker:
    def __init__(self, config: Config, rank: int, transport: Transport) -> None:
        self._config = config
        self._rank = rank
        self._transport = transport
        self._publisher = open_publisher(config, transport)
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    def connect(self, address: str, port: int) -> dict[str, Any]:
        """Join the process group at `address:port`, load the base model and find out how it may be computed.

        Returns the layout, why it is that one, and why whole logits are made, if they are. Raises `ConfigError` if
        `learner` asks for a layout that the model has not.
        """
        self._join(address, port)
        self._load()
        learner = self._config.learner
        halves = self._config.model.attention == "flash_attention_2"  # knows no fp32
        with self._autocast() if halves else nullcontext():
            report = choose_layout(
                self._model,
                packing=learner.packing,
                tolerance=3e-2 if halves else 1e-3,
                sharing=learner.sequence_parallel == 1,  # whose ranks cut a row anywhere
            )
        self._layout: Layout = report.chosen
        # Scores take a row's tokens for those of its sequences.
        self._ranking_layout: Layout = "segments" if report.chosen == "shared" else report.chosen
        self._read_policy()
        size = learner.sequence_parallel
        self._together = SequenceGroup(self._rank, learner.world_size, size) if size > 1 else None
        if self._together is not None and self._layout != "segments":
            raise ConfigError(
                f"learner.sequence_parallel={size} needs sequences packed for our attention, but this model is trained "
                f"in the layout {self._layout!r} ({report.reason}); use learner.sequence_parallel=1"
            )
        return {"layout": report.chosen, "reason": report.reason, "whole_logits": self._policy.whole_logits}

    def _join(self, address: str, port: int) -> None:
        """Start the process group, torch's and DeepSpeed's."""
        ranks = self._config.learner.world_size
        os.environ.update(
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            RANK=str(self._rank),
            WORLD_SIZE=str(ranks),
            LOCAL_RANK="0" if torch.cuda.is_available() else str(self._rank),
            LOCAL_SIZE="1" if torch.cuda.is_available() else str(ranks),
        )
        # DeepSpeed would compile this CPU collective on first use, for over a minute; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if not torch.distributed.is_initialized():  # it is where vLLM shares this process
            store = open_store(address, port, serves=self._rank == 0, timeout=_JOIN_SECONDS)
            torch.distributed.init_process_group(backend, store=store, rank=self._rank, world_size=ranks)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _load(self) -> None:
        """Load the base model and read its structure."""
        settings = self._config.model
        self._dtype = getattr(torch, settings.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(
            settings.path,
            dtype=torch.float32,  # for bf16, DeepSpeed casts, and keeps fp32 masters of what is trained
            trust_remote_code=settings.trust_remote_code,
            attn_implementation=settings.attention,
        )
        self._model = model.to(self._device)
        _switch_off_dropout(self._model)
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
            ScoreContext(config.plan, config.lora.rank, config.score_seed),
            loss=self._ranking_loss,
            tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
            layout=self._ranking_layout,
            rank=self._rank,
            world_size=config.learner.world_size,
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
            self._publisher.restart()
            self._read_policy()

    def _read_policy(self) -> None:
        """The model as log-probabilities; again whenever adapters were put on or taken off, maybe on its head."""
        sampling, learner = self._config.sampling, self._config.learner
        with self._autocast():
            self._policy = PolicyModel(self._model, temperature=sampling.temperature, chunk_mib=learner.logits_mib)

    def _autocast(self) -> AbstractContextManager[Any]:
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
        """Mean over sequences of GRPO's clipped loss, whatever `algo.loss`, against the engine's log-probabilities.

        Clips as tight as GSPO's would take rounding between engine and learner for a move of the policy.
        """
        weighed = weigh(sequences, "sequence_mean_token_mean")
        batch = collate(weighed, self._ranking_layout, self._device)
        with self._autocast():
            logprobs_T, _ = self._policy(batch.inputs.input_ids, batch.at_T, batch.targets_T, **batch.inputs.kwargs)
        tokens = batch.tokens(logprobs_T, batch.rollout_logprobs_T)
        return policy_objective(tokens, AlgoConfig(), find_loss("clip")).loss

    def base_digest(self) -> str:
        """Of the base model's parameters, as long as it is nothing else."""
        return digest_of_all(self._model.named_parameters())

    def build(self, plan_json: str, start: Start | None = None) -> None:
        """Apply the plan, with the values of `start` if there is one, and start DeepSpeed.

        The fp32 masters are what the model or `start` has, whatever precision is computed in. Raises `ConfigError` if
        `start` is not of the plan, and `RuntimeError` if DeepSpeed dropped a group or changed a trained weight on the
        way.
        """
        torch.manual_seed(self._config.seed)  # LoRA's random A must be the same on every rank
        plan = AdaptationPlan.from_json(plan_json)
        self._adapted = apply_plan(self._model, plan)
        if start is not None:
            try:
                read_start(self._adapted, start)
            except ValueError as error:
                raise ConfigError(f"plan.start={self._config.plan.start!r}: {error}") from None
        self._adapted.compute_in(self._dtype)
        self._publisher.restart()
        self._read_policy()
        groups = parameter_groups(self._adapted, plan)
        before, exact = self._digests(), self._cast_away()
        self._model.train()
        self._engine = TrainingEngine(self._policy, self._adapted, groups, self._config)
        if exact:
            self._engine.set_masters(exact)
        changed = [name for name, value in self._digests().items() if value != before[name]]
        if changed:
            raise RuntimeError(f"DeepSpeed changed {changed[0]} while it initialised")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self._update = PolicyUpdate(
            self._engine,
            self._adapted,
            self._config,
            layout=self._layout,
            together=self._together,
            rank=self._rank,
            device=self._device,
            flops=count_flops(self._anatomy, plan, self._model.config),
            peak_tflops=self._config.learner.peak_tflops or peak_tflops(device, self._config.model.dtype),
        )

    def train(self, batch: TrainBatch) -> StepStats:
        """One optimizer step a mini-batch and epoch. Returns metrics of the whole batch, equal on every rank."""
        return self._update.train(batch)

    def divergences(self, sequences: Sequence[TrainSequence]) -> list[float]:
        """Each completion's divergence from the base policy, summed over its tokens."""
        return self._update.divergences(sequences)

    def logprobs(self, sequences: Sequence[TrainSequence], parts: Collection[str]) -> list[list[float]]:
        """Log-probability of each token that was sampled, by completion, under the policy with these `PARTS` alone."""
        return self._update.logprobs(sequences, parts)

    def export(self, version: int, parts: Collection[str] = PARTS) -> WeightUpdate | None:
        """Publish the policy with these `PARTS` alone. Returns the update on rank 0, `None` on the others."""
        with self._engine.only(parts) if self._built else nullcontext():
            tensors = served_tensors(self._adapted, parts, self._gathered)
            if self._rank != 0:
                deque(tensors, maxlen=0)
                return None
            return self._publisher.publish(tensors, version, self._adapted.sent_rank)

    def join(self, meeting: Meeting) -> None:
        """Meet the engines, for transports that send."""
        if self._rank == 0:
            self._transport.join(meeting, 0)

    def send(self, updates: Sequence[WeightUpdate]) -> None:
        """Send updates to the engines that are fetching them, for transports that send."""
        if self._rank == 0:
            self._transport.send([bucket.ticket for update in updates for bucket in update.buckets])

    def perturb(self, seed: int, scale: float) -> None:
        """Move every trained weight by `scale` times normal noise, as if it had been trained."""
        self._engine.perturb(seed, scale)

    def sees(self, path: str) -> bool:
        """Whether a file of the driver's is there."""
        return Path(path).is_file()

    def begin_save(self, checkpoint: str) -> list[str]:
        """Copy what training depends on into CPU memory, and begin to write it under `LEARNER` of this directory;
        `saved` says when it is there. Rank 0 also writes the trained weights alone (`WEIGHTS`).

        Returns the files, as they are named from there; each appears when it is whole.
        """
        tensors, facts = self._engine.state()
        tensors |= random_state()
        trained = self._adapted.trained.items()
        masters = ((name, cast(Tensor, safe_get_full_fp32_param(p))) for name, p in trained)
        if self._rank == 0:
            facts["publisher"] = self._publisher.cadence
            weights = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in masters}
        else:
            deque(masters, maxlen=0)
            weights = None

        root = Path(checkpoint)
        shard = shard_path(root, self._rank)
        names = [str(shard.relative_to(root)), *([WEIGHTS] if weights is not None else [])]

        def write() -> dict[str, FileFacts]:
            with written_atomically(shard) as aside:
                write_shard(aside, tensors, facts)
            if weights is not None:
                with written_atomically(root / WEIGHTS) as aside:
                    write_weights(weights.items(), aside)
            return {name: describe(root / name) for name in names}

        self._writing = self._writer.submit(write)
        return names

    def saved(self, wait: bool) -> dict[str, FileFacts] | None:
        """The files that `begin_save` wrote, synced; `None` if they are not there yet and `wait` is false.

        Raises `OSError` if they could not be written.
        """
        if not wait and not self._writing.done():
            return None
        try:
            return self._writing.result()
        except SafetensorError as error:  # how safetensors reports the system's own errors
            raise OSError(str(error)) from None

    def load(self, checkpoint: str) -> None:
        """Read back what the ranks wrote, however many they were. Raises `ValueError` if some of it is missing."""
        shards = Shards(Path(checkpoint))
        self._engine.restore(shards)
        self._publisher.resume(shards.facts[0]["publisher"])
        if self._rank < len(shards.facts):
            restore_random(shards, self._rank)

    @property
    def _built(self) -> bool:
        return hasattr(self, "_engine")

    def _gathered(self, *parameters: nn.Parameter) -> AbstractContextManager[Any]:
        return self._engine.gathered(*parameters) if self._built else nullcontext()

    def _cast_away(self) -> dict[nn.Parameter, Tensor]:
        """Trained parameters that lose something where DeepSpeed casts them to `model.dtype`, from which it would also
        make their masters: copies in CPU memory."""
        trained = self._adapted.trained.values()
        return {p: p.detach().cpu().clone() for p in trained if not torch.equal(p, p.detach().to(self._dtype).to(p))}

    def _digests(self) -> dict[str, str]:
        """Of every trained parameter, in the precision that it is computed with."""
        found = {}
        for name, parameter in self._adapted.trained.items():
            with self._gathered(parameter):
                found[name] = digest(parameter.detach().to(self._dtype))
        return found


def _switch_off_dropout(model: nn.Module) -> None:
    """With dropout, the policy that trains would not be the one that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):  # passed to functions by attention modules
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


_JOIN_SECONDS = 300.0
"""Longest that a rank waits for the store where ranks meet."""
