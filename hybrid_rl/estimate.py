"""Memory of training and of generating under a plan, from shapes alone.

What a micro-batch's pass holds (`Pass`) and what a sequence's cache takes (`CacheSize`) are counted by `rehearsal.py`;
all else is arithmetic on parameters. Sizes are bytes. Against measured ones: `benchmarks/estimate.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrid_rl.config import Config

if TYPE_CHECKING:  # they import torch, which arithmetic does without
    from hybrid_rl.components import Anatomy
    from hybrid_rl.plan import AdaptationPlan

FP32 = 4
ITEM_SIZE = {"float32": 4, "bfloat16": 2}
MIB, GIB = 2**20, 2**30
BUCKET = 200_000_000
"""Most elements of the buffer in which DeepSpeed gathers gradients on their way."""
LIVE_PARAMETERS = 1_000_000_000
"""Most parameters that ZeRO-3 keeps whole at a time: `stage3_max_live_parameters`, at DeepSpeed's default."""

IMPORTED = {"learner": 415 * MIB, "vllm": 465 * MIB, "transformers": 415 * MIB}
"""Memory of a process that has imported what it works with and done nothing yet, on a CPU."""
RUNTIME = 200 * MIB
"""What a process takes besides once it computes, on a CPU: threads, kernels' own buffers, the allocator's remains."""
CONTEXT = GIB
"""Of a process on a GPU: CUDA's context, NCCL's buffers, and what the allocator cannot use of its own."""

LOADING = "the model while it is read, above the rest"
"""A learner rank reads the whole model in float32 before DeepSpeed takes it over, onto its GPU too: the least that it
takes, whatever ZeRO stage and precision it trains with. This part is what is missing to that."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes over all ranks together, activations and logits apart. ZeRO-1 shares out the optimizer's, ZeRO-2 the
    gradients too, ZeRO-3 also the weights."""

    weights: int
    """The model in the compute precision, with its adapters."""
    gradients: int
    """Of what is trained, in fp32: micro-batches add up in it."""
    masters: int
    """fp32 copies of what is trained."""
    moments: int
    """Adam's two fp32 moments of what is trained."""
    originals: int
    """The base model's weights in the places of those that are trained, where a KL term needs the base policy."""
    payload: int
    """What a complete weight update sends."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments + self.originals


def training_memory(
    anatomy: Anatomy, trainable: int, dtype: str, *, adapters: int = 0, reference: int = 0, sent: int = 0
) -> TrainingMemory:
    """Memory of training `trainable` parameters.

    `adapters`: those of them that stand beside the model's weights. `reference`: parameters of trained weights whose
    original is kept. `sent`: elements of a weight update.
    """
    size = ITEM_SIZE[dtype]
    weights = sum(w.params for w in anatomy.weights) + adapters
    fp32 = trainable * FP32
    return TrainingMemory(weights * size, fp32, fp32, 2 * fp32, reference * size, sent * size)


def planned_memory(config: Config, anatomy: Anatomy, plan: AdaptationPlan) -> TrainingMemory:
    """`training_memory` of a plan under the configuration."""
    totals = plan.totals
    return training_memory(
        anatomy,
        totals["trainable_params"],
        config.model.dtype,
        adapters=totals["adapter_params"],
        reference=plan.weight_params if config.algo.needs_reference else 0,
        sent=plan.sent_params,
    )


@dataclass(frozen=True)
class Pass:
    """What a micro-batch's forward and backward pass holds beside weights and gradients."""

    activations: int
    """What the decoder keeps for its backward pass."""
    working: int
    """What there is besides at the pass's peak: logits with their gradients, or a layer's own."""

    @property
    def peak(self) -> int:
        return self.activations + self.working


@dataclass(frozen=True)
class CacheSize:
    """What a sequence being sampled takes in an engine."""

    per_token: int
    """Keys and values."""
    per_sequence: int
    """States of recurrent layers, whatever the sequence's length."""

    def of(self, tokens: int) -> int:
        return self.per_sequence + self.per_token * tokens


@dataclass(frozen=True)
class ProcessMemory:
    """What one process takes at its peak, by part. Without a GPU all is in the machine's memory: `device` is empty."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    loading: int = 0
    """Bytes of the model as a learner rank reads it."""

    @property
    def device_total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def learner_memory(
    config: Config,
    anatomy: Anatomy,
    plan: AdaptationPlan,
    passed: Pass | None,
    *,
    micro_batches: int,
    gpu: bool,
    first: bool = True,
) -> ProcessMemory:
    """Of rank 0, which has most, since it also sends weights and writes what is trained; of another if not `first`.

    `passed`: `None` leaves activations and logits out, for a lower bound. `micro_batches`: of a rank a mini-batch.
    """
    learner, memory = config.learner, planned_memory(config, anatomy, plan)
    ranks, stage = learner.world_size, learner.zero_stage
    share = -(-memory.moments // ranks)
    parts = {
        "weights": _shared(memory.weights, ranks, stage == 3),
        "fp32 masters": _shared(memory.masters, ranks, True),
        "optimizer moments": share,
        "gradients": _shared(memory.gradients, ranks, stage >= 2),
        "base policy for the KL": _shared(memory.originals, ranks, stage == 3),
    }
    trainable, size = memory.masters // FP32, ITEM_SIZE[config.model.dtype]
    largest = max(_groups(plan).values(), default=0) * FP32 // ranks
    bucket = min(trainable, BUCKET) * size
    peak = passed.peak if passed is not None else 0
    if stage == 3:
        parts["weights gathered"] = min(memory.weights, LIVE_PARAMETERS * size)
    # Gradients of one micro-batch alone come to the bucket as its activations go.
    backward = bucket + (peak if micro_batches > 1 else max(peak - parts["gradients"], 0))
    parts["gradient bucket"] = bucket
    if passed is not None:
        parts["activations"] = passed.activations
        parts["logits and working memory"] = max(backward - bucket - passed.activations, 0)
    payload = memory.payload if first else 0
    copies = {"sync buffers": payload}
    if config.checkpoint.background:
        copies["checkpoint being written"] = share + parts["fp32 masters"] + (memory.masters if first else 0)
    # Two results of Adam's for a group; a bucket of an update, and what it is packed into.
    between = max(2 * largest, 2 * min(payload, config.sync.bucket_mib * MIB) if not gpu else 0)
    parts["optimizer and sync"] = max(0, between - sum(parts[p] for p in _PASS if p in parts))
    whole, itself = sum(w.params for w in anatomy.weights) * FP32, {"the process itself": IMPORTED["learner"] + RUNTIME}
    if not gpu:
        return ProcessMemory(host=_loaded(parts | copies, whole) | itself, loading=whole)
    moved = {"optimizer": _STATE, "all": (*_STATE, "weights")}.get(learner.offload, ())
    host = {p: parts.pop(p) for p in moved}
    if learner.offload != "none":
        del parts["optimizer and sync"]
    device = _loaded(parts, whole) | {"the process itself": CONTEXT}
    return ProcessMemory(device, _loaded(host | copies, whole) | itself, whole)


def _loaded(parts: dict[str, int], whole: int) -> dict[str, int]:
    """Those that are not empty, with what is missing of the `whole` model as it is read."""
    return {p: n for p, n in (parts | {LOADING: max(0, whole - sum(parts.values()))}).items() if n}


_STATE = ("fp32 masters", "optimizer moments", "gradients")
_PASS = ("gradient bucket", "activations", "logits and working memory")
_RESIDENT = ("weights", "fp32 masters", "optimizer moments", "base policy for the KL")


def resident(config: Config, learner: ProcessMemory) -> int:
    """What a learner rank keeps on its GPU while an engine generates there, or starts. DeepSpeed has gradients in
    buffers of its own from the beginning under ZeRO-3, and in bfloat16 under ZeRO-1."""
    kept, stage = [*_RESIDENT], config.learner.zero_stage
    if stage == 3:
        kept += ["gradients", "gradient bucket"]
    elif stage == 1 and config.model.dtype == "bfloat16":
        kept.append("gradients")
    held = sum(learner.device.get(part, 0) for part in kept)
    return max(held, learner.loading) + learner.device["the process itself"]


def engine_memory(
    config: Config,
    anatomy: Anatomy,
    plan: AdaptationPlan,
    cache: CacheSize | None,
    longest: int,
    *,
    gpu: bool,
    gpu_bytes: int | None = None,
) -> ProcessMemory:
    """Of a rollout engine, or of each of its `rollout.tensor_parallel` parts; `longest`: tokens of a sequence.

    The KV cache is what vLLM is given of a GPU of `gpu_bytes` beside the weights, or on a CPU `cpu_kv_cache_gib`. Where
    that is not known, and of transformers, it is what the sequences that are decoded at once may take.
    """
    rollout, size = config.rollout, ITEM_SIZE[config.model.dtype]
    parts = {"weights": sum(w.params for w in anatomy.weights) * size // rollout.tensor_parallel}
    parts["adapter"] = adapter_bytes(plan, size)
    vllm = rollout.engine == "vllm"
    at_once = min(config.batch.num_generations if not vllm else rollout.max_concurrent, config.completions_per_step)
    cached = at_once * cache.of(longest) // rollout.tensor_parallel if cache is not None else 0
    itself = IMPORTED[rollout.engine] + RUNTIME
    if vllm and not gpu:
        cached = rollout.cpu_kv_cache_gib * GIB
    if vllm and gpu and gpu_bytes is not None:
        cached = max(0, int(gpu_bytes * rollout.gpu_memory_utilization) - sum(parts.values()) - CONTEXT)
    parts = {p: n for p, n in {**parts, "KV cache": cached}.items() if n}
    if not gpu:
        return ProcessMemory(host={**parts, "the process itself": itself})
    host = {"the process itself": itself}
    if config.cluster.placement == "colocate":
        host = {"weights while it sleeps": parts["weights"] + parts.get("adapter", 0), **host}
    return ProcessMemory({**parts, "the process itself": CONTEXT}, host)


def adapter_bytes(plan: AdaptationPlan, size: int) -> int:
    """What a complete update holds of factors: an engine keeps as much for a native adapter."""
    whole = sum(m.params for m in plan.sent_as("weight"))
    return (plan.sent_params - whole) * size


def _shared(size: int, ranks: int, partitioned: bool) -> int:
    return -(-size // ranks) if partitioned else size


def _groups(plan: AdaptationPlan) -> Counter[tuple[str, str]]:
    """Trained parameters by part and component: what the optimizer steps together."""
    groups: Counter[tuple[str, str]] = Counter()
    for m in plan.modules:
        groups["full", m.component] += m.params if m.trains_weight else 0
        groups["lora", m.component] += m.adapter_params
    return groups
