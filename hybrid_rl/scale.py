"""Seconds of a training step on paper: by part, for any number of devices, from shapes and a device's constants.

A roofline (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785) of every pass, what launching it takes, ring
collectives, and the number of rounds that the longest completion takes. Pure arithmetic, without torch. Formulas,
assumptions and how far they were off: docs/scaling.md, `benchmarks/scale.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrid_rl.config import Config
from hybrid_rl.estimate import ITEM_SIZE, CacheSize
from hybrid_rl.flops import Flops, count_flops
from hybrid_rl.hardware import Hardware

if TYPE_CHECKING:  # they import torch, which arithmetic does without
    from hybrid_rl.components import Anatomy
    from hybrid_rl.plan import AdaptationPlan

TOUCHES = 3.0
"""Times that element-wise kernels read or write each element that goes into or comes out of a matrix, forward, counted
on transformers' eager Qwen3: norms in fp32, rotary embeddings, gates, residuals."""
LOGIT_TOUCHES = 5.0
"""The same of a fp32 logit, mean over forward and backward pass: scaled, log-sum-exp, softmax, entropy."""
OPTIMIZER_BYTES = 80.0
"""Read and written a trained parameter and update: AdamW in several kernels, clipping, norms, the cast."""
CHANGED = {"bfloat16": 0.04, "float32": 0.5}
"""Bytes of an update over those of a complete one, `sync.encoding=auto` (bfloat16: benchmarks/RESULTS.md, sync)."""
SLICE = 0.5
"""Seconds that an engine works between two answers: until then an update waits while it generates."""
BUCKET = 200_000_000
"""Elements of a bucket of gradients on their way."""
SHARED = 0.125
"""Share of the tokens from which on a prompt is computed once for the completions of it that lie together."""
PREFILL = 8192
"""Prompt tokens of a round."""


@dataclass(frozen=True)
class Shape:
    """A model under a plan, as far as time depends on it. Sizes in elements."""

    flops: Flops
    lora_forward: float
    """Operations, a token: what stands beside weights."""
    params: int
    experts: int
    """Those of `params` that are in experts."""
    active: float
    """Share of the experts that a token passes."""
    layers: int
    width: int
    """The hidden size."""
    vocabulary: int
    passed: int
    """Elements that go into and come out of the decoder's matrices, a token."""
    adapters: int
    """Matrices with something beside them."""
    adapter_passed: int
    """The same that go into and come out of it, a token."""
    trained: int
    trained_tensors: int
    sent: int
    sent_tensors: int
    cache: CacheSize

    def forward(self, tokens: float, predicted: float, pairs: float) -> float:
        """Operations of a forward pass; `pairs` of a token and one that it sees."""
        return (
            (self.flops.decoder + self.lora_forward) * tokens
            + self.flops.head * predicted
            + self.flops.attention * pairs
        )

    def backward(self, tokens: float, predicted: float, pairs: float, passes: float = 1) -> float:
        """Operations of the backward pass: frozen matrices have no gradient of their own (hybrid_rl/flops.py)."""
        flops = self.flops
        through = flops.decoder * tokens + flops.head * predicted + 2 * flops.attention * pairs
        own = (flops.full + flops.lora - self.lora_forward) * tokens + flops.head_gradient * predicted
        return through + own + flops.norms * passes

    def read(self, batch: float) -> float:
        """Parameters that a round with `batch` tokens reads: of experts, those that some token chooses, if each chooses
        at random."""
        return self.params - self.experts * (1 - self.active) ** batch


def read_shape(anatomy: Anatomy, plan: AdaptationPlan, model_config: Any, cache: CacheSize) -> Shape:
    """From shapes alone; `model_config` is transformers'."""
    text = model_config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    active = (getattr(text, "num_experts_per_tok", None) or experts) / experts
    matrices = [w for w in anatomy.weights if len(w.shape) > 1 and w.component not in ("embedding", "lm_head")]
    passed = sum((active if w.component == "expert" else 1.0) * sum(w.shape[-2:]) for w in matrices)
    beside = [m for m in plan.modules if m.has_adapter]
    trained = [m for m in plan.modules if m.trains_weight]
    factors, whole = plan.sent_as("factors"), plan.sent_as("weight")
    return Shape(
        flops=count_flops(anatomy, plan, model_config),
        lora_forward=sum(2.0 * sum(m.multiplied_params) for m in beside),
        params=sum(w.params for w in anatomy.weights),
        experts=sum(w.params for w in anatomy.weights if w.component == "expert"),
        active=active,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        passed=round(passed),
        adapters=len(beside),
        adapter_passed=sum(sum(m.shape[-2:]) for m in beside),
        trained=plan.totals["trainable_params"],
        trained_tensors=len(trained) + 2 * len(beside),
        sent=plan.sent_params,
        sent_tensors=len(whole) + 2 * len(factors),
        cache=cache,
    )


@dataclass(frozen=True)
class Lengths:
    """Tokens of a step's sequences."""

    prompt: float
    """Mean of the prompts."""
    completion: float
    """Mean of the completions."""
    longest: float
    """The longest completion, or with `rollout.engine=transformers` the mean over batches of the longest of each."""
    prompt_lengths: float = math.inf
    """Different lengths of an engine's prompts: transformers decodes those of one length together. By default no two
    are alike."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for lengths that cannot be."""
        if not self.prompt >= 0 or not 0 < self.completion <= self.longest:
            raise ValueError(f"lengths must be above 0, and the longest completion not below the mean: {self}")

    @property
    def sequence(self) -> float:
        return self.prompt + self.completion

    @property
    def pairs(self) -> float:
        """Pairs of a token and one that it sees, a sequence, were all as long as the mean."""
        return self.sequence * (self.sequence + 1) / 2


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one step."""

    parts: Mapping[str, float]
    """By the names of `time/*`: `generate`, `reward`, `logprob`, `train`, `sync`, `other`; and `wake`, colocated
    engines' sleep and waking."""
    causes: Mapping[str, float]
    """What the parts consist of: `part: cause` -> seconds."""
    seconds: float
    """The step: the parts' sum, or with generation beside training what is left to wait for."""
    overlapped: bool
    completions: int
    tokens: float
    """Prompt and completion tokens."""
    devices: float
    mfu: float
    """Operations of the training passes over what the learner's devices could do in `train` (arXiv 2204.02311)."""

    @property
    def samples_per_second(self) -> float:
        return self.completions / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bottleneck(self) -> str:
        """The largest cause among those that the step waits for."""
        waited = set(self.parts)
        if self.overlapped:
            learns = self.parts["train"] + self.parts["logprob"]
            behind = (
                ("train", "logprob")
                if self.parts["generate"] + self.parts["reward"] > learns
                else ("generate", "reward")
            )
            waited -= set(behind)
        return max((c for c in self.causes if c.partition(":")[0] in waited), key=lambda c: self.causes[c])


def efficiency(time: StepTime, best: float) -> float:
    """Scaling efficiency: samples a second and device over `best`, the most of all that are compared; at most 1."""
    return time.samples_per_second / time.devices / best


def step_time(
    config: Config,
    shape: Shape,
    lengths: Lengths,
    hardware: Hardware,
    *,
    devices: float | None = None,
    cache_bytes: float | None = None,
) -> StepTime:
    """Seconds of a step under the configuration, its layout included.

    `devices`: that the layout takes, by default one a rank and engine part. `cache_bytes`: an engine's KV cache, over
    all its parts; by default it has room for `rollout.max_concurrent` sequences.
    """
    rollout, ranks = config.rollout, config.learner.world_size
    together = config.cluster.placement == "colocate"
    engines = rollout.engines * rollout.tensor_parallel
    devices = devices or (max(ranks, engines) if together else ranks + engines)
    causes = {f"generate: {cause}": s for cause, s in _generate(config, shape, lengths, hardware, cache_bytes).items()}
    generate = sum(causes.values())
    # Judged while others are sampled, two processes a node; what is left are those that end last.
    judges = config.reward.workers * max(1, math.ceil(devices / hardware.per_node))
    judging = config.completions_per_step * hardware.overheads.reward / judges
    causes["reward: judging"] = max(0.0, judging - generate) + hardware.overheads.call
    causes["logprob: passes"] = _logprob(config, shape, lengths, hardware)
    training, operations = _train(config, shape, lengths, hardware)
    causes |= {f"train: {cause}": s for cause, s in training.items()}
    causes |= {f"sync: {cause}": s for cause, s in _sync(config, shape, hardware, devices).items()}
    causes["other: assembling and writing down"] = config.completions_per_step * hardware.overheads.record
    if together and hardware.overlaps:
        # Weights go to the machine's memory and back (vLLM's sleep, level 1).
        causes["wake: weights to memory and back"] = (
            2 * shape.params * ITEM_SIZE[config.model.dtype] / rollout.tensor_parallel / hardware.host_gbs / 1e9
        )
    parts: dict[str, float] = {}
    for cause, seconds in causes.items():
        part = cause.partition(":")[0]
        parts[part] = parts.get(part, 0.0) + seconds
    overlapped = config.asynchrony.max_staleness > 0
    if overlapped:
        sampled, learnt = parts["generate"] + parts["reward"], parts["train"] + parts["logprob"]
        if sampled > learnt:  # else engines have nothing left to do by then
            causes["sync: waiting for a slice to end"] = min(SLICE, parts["generate"]) / 2
            parts["sync"] += causes["sync: waiting for a slice to end"]
        seconds = max(sampled, learnt) + parts["sync"] + parts["other"]
    else:
        seconds = sum(parts.values())
    peak = ranks * hardware.peak_tflops * 1e12
    completions = config.completions_per_step
    return StepTime(
        parts, causes, seconds, overlapped, completions, completions * lengths.sequence, devices,
        operations / (parts["train"] * peak),
    )  # fmt: skip


def rounds(completions: float, at_once: float, lengths: Lengths) -> float:
    """Rounds of decoding that an engine needs: the longest completion's, or with more than it takes `at_once`, all
    tokens shared out and the tail of the last ones (Graham's bound on list scheduling)."""
    if completions <= at_once:
        return lengths.longest
    return completions * lengths.completion / at_once + lengths.longest - lengths.completion


def _generate(
    config: Config, shape: Shape, lengths: Lengths, hardware: Hardware, cache_bytes: float | None
) -> dict[str, float]:
    """Of the engine with most to do."""
    rollout, size, parts = config.rollout, ITEM_SIZE[config.model.dtype], config.rollout.tensor_parallel
    overheads = hardware.overheads.engines[rollout.engine]
    groups = math.ceil(config.batch.prompts / rollout.engines)
    completions = groups * config.batch.num_generations
    context = lengths.prompt + lengths.completion / 2
    room = cache_bytes / shape.cache.of(round(context)) if cache_bytes else math.inf
    at_once = max(1.0, min(rollout.max_concurrent, room))
    if rollout.engine == "transformers":  # one batch after another
        batches = min(groups, max(lengths.prompt_lengths, completions / at_once))
        count, prefills = batches * lengths.longest, batches
    else:
        count, prefills = rounds(completions, at_once, lengths), math.ceil(groups * lengths.prompt / PREFILL)
    batch = completions * lengths.completion / count
    read = groups * lengths.prompt  # once for all of a group's completions
    arithmetic = shape.forward(batch, batch, batch * context) / parts / hardware.flops
    weights = shape.read(batch) * size / parts / hardware.bandwidth
    cache = batch * (shape.cache.per_sequence + shape.cache.per_token * context) / parts / hardware.bandwidth
    if hardware.overlaps:  # the roofline: the larger of the two
        arithmetic, cache = max(0.0, arithmetic - weights - cache), cache
    touched = _touched(shape, batch, batch, size) / parts / hardware.activation_gbs / 1e9
    layers = shape.layers * overheads.layer + shape.adapters * overheads.adapter
    if hardware.overlaps:
        layers = max(0.0, layers - arithmetic - weights - cache - touched)
    scheduler = overheads.round + overheads.sequence * batch
    between = 2 * shape.layers * 2 * hardware.collective(batch * shape.width * size, parts) if parts > 1 else 0.0
    prefill = shape.forward(read, prefills, read * lengths.prompt / 2) / parts / hardware.flops
    prefill += _touched(shape, read, 0, size) / parts / hardware.activation_gbs / 1e9
    return {
        "prompts": prefill,
        "weights read": count * weights,
        "cache read": count * cache,
        "arithmetic": count * (arithmetic + touched),
        "launching layers": (count + prefills) * layers,
        "scheduling": (count + prefills) * scheduler + completions * overheads.request + hardware.overheads.call,
        "tensor parallelism": count * between,
    }


def _touched(shape: Shape, tokens: float, predicted: float, size: int) -> float:
    """Bytes that element-wise kernels of a forward pass read and write."""
    passed = (shape.passed + shape.adapter_passed) * tokens
    return TOUCHES * passed * size + LOGIT_TOUCHES * shape.vocabulary * 4 * predicted


@dataclass(frozen=True)
class _Pass:
    """Of a rank: tokens of an update, by micro-batch."""

    micro_batches: int
    tokens: float
    predicted: float
    pairs: float
    """All micro-batches together."""
    filled: float
    """What ranks have on average over what this one has."""


def _share(config: Config, lengths: Lengths) -> _Pass:
    """The fullest rank's of a mini-batch: sequences are dealt so that none has much more than another, and none has
    less than the longest one."""
    parallel = config.learner.sequence_parallel
    each = config.completions_per_step / config.batch.mini_batches / config.learner.world_size * parallel
    tokens = max(each * lengths.sequence, lengths.prompt + lengths.longest) / parallel
    sequences = tokens / lengths.sequence
    micro_batches = max(1, math.ceil(tokens / config.batch.tokens_per_micro_batch))
    group = min(config.batch.num_generations, max(1.0, each / micro_batches))
    saved = sequences * lengths.prompt * (1 - 1 / group)
    if parallel == 1 and config.learner.packing != "never" and saved > SHARED * tokens:
        tokens -= saved
    filled = each / parallel / sequences
    return _Pass(micro_batches, tokens, sequences * lengths.completion, sequences * lengths.pairs, filled)


def _forward(shape: Shape, share: _Pass, hardware: Hardware, size: int, micro_batches: float) -> dict[str, float]:
    """Seconds of forward passes over a rank's share."""
    arithmetic = shape.forward(share.tokens, share.predicted, share.pairs) / hardware.flops
    touched = _touched(shape, share.tokens, share.predicted, size) / hardware.activation_gbs / 1e9
    launch = micro_batches * (shape.layers * hardware.overheads.layer + shape.adapters * hardware.overheads.adapter)
    if hardware.overlaps:
        launch = max(0.0, launch - arithmetic - touched)
    return {"arithmetic": arithmetic, "element-wise work": touched, "launching kernels": launch}


def _logprob(config: Config, shape: Shape, lengths: Lengths, hardware: Hardware) -> float:
    """Forward passes for old log-probabilities (of all mini-batches but the first, whose own pass gives them) and for
    the base policy's."""
    algo, batch = config.algo, config.batch
    share = _share(config, lengths)
    many = batch.mini_batches > 1 or batch.epochs > 1
    passes = float(batch.mini_batches - 1) if many and algo.old_logprobs == "learner" else 0.0
    if algo.needs_reference:
        passes += batch.mini_batches * (2 if algo.kl_in == "reward" else 1)
    one = sum(_forward(shape, share, hardware, ITEM_SIZE[config.model.dtype], share.micro_batches).values())
    return passes * (one + _gathers(config, shape, hardware, share.micro_batches, 1))


def _gathers(config: Config, shape: Shape, hardware: Hardware, micro_batches: int, times: int) -> float:
    """ZeRO-3 gathers every weight, frozen ones too, `times` a micro-batch, layer by layer."""
    if config.learner.zero_stage < 3:
        return 0.0
    size = shape.params * ITEM_SIZE[config.model.dtype]
    return micro_batches * times * hardware.collective(size, config.learner.world_size, shape.layers)


def _train(config: Config, shape: Shape, lengths: Lengths, hardware: Hardware) -> tuple[dict[str, float], float]:
    """Seconds by cause, and the operations of all ranks that count for the MFU."""
    learner, size, ranks = config.learner, ITEM_SIZE[config.model.dtype], config.learner.world_size
    share, updates = _share(config, lengths), config.batch.mini_batches * config.batch.epochs
    n = share.micro_batches
    ahead = _forward(shape, share, hardware, size, n)
    back = shape.backward(share.tokens, share.predicted, share.pairs, n) / hardware.flops
    again = 1.0 if learner.gradient_checkpointing else 0.0
    chunked = share.predicted / n * shape.vocabulary * 4 > learner.logits_mib * 2**20
    arithmetic = (1 + again) * ahead["arithmetic"] + back
    if chunked and not again:  # the head's products are made again in the backward pass
        arithmetic += shape.flops.head * share.predicted / hardware.flops
    touched = (3 + again) * ahead["element-wise work"]
    tensors = shape.trained_tensors * hardware.overheads.tensor * n
    launch = n * (3 + again) * (shape.layers * hardware.overheads.layer + shape.adapters * hardware.overheads.adapter)
    if hardware.overlaps:
        launch = max(0.0, launch - arithmetic - touched)
    gradients = shape.trained * size
    buckets = max(1, math.ceil(shape.trained / BUCKET))
    sends = 1 if learner.zero_stage == 1 else n  # ZeRO-2 and 3 keep no gradient that is another rank's
    reduced = sends * hardware.collective(gradients, ranks, buckets)
    if learner.zero_stage < 3:  # updated weights come back
        reduced += hardware.collective(gradients, ranks, buckets)
    rate = hardware.activation_gbs if learner.offload == "none" else hardware.host_gbs
    stepped = shape.trained / ranks * OPTIMIZER_BYTES / rate / 1e9 + hardware.overheads.update
    operations = updates * (
        shape.forward(share.tokens, share.predicted, share.pairs)
        + shape.backward(share.tokens, share.predicted, share.pairs, n)
    )
    causes = {
        "arithmetic": arithmetic,
        "element-wise work": touched,
        "launching kernels": launch + tensors,
        "gradients on their way": reduced,
        "weights gathered": _gathers(config, shape, hardware, n, 2),
        "optimizer": stepped,
    }
    found = {cause: updates * seconds for cause, seconds in causes.items()}
    found["optimizer"] += hardware.overheads.call
    return found, operations * ranks * share.filled


def sync_bytes(config: Config, shape: Shape) -> float:
    """Bytes of an update, mean over those between two complete ones and one of them."""
    whole = shape.sent * ITEM_SIZE[config.model.dtype]
    changed = CHANGED[config.model.dtype] if config.sync.encoding == "auto" else 1.0
    every = config.sync.anchor_every
    return whole * (1 + (every - 1) * changed) / every


def _sync(config: Config, shape: Shape, hardware: Hardware, devices: float) -> dict[str, float]:
    """From rank 0 to every engine's receipt: an update is published once, travels to each node, and all engines apply
    it at the same time."""
    size, rollout, transport = ITEM_SIZE[config.model.dtype], config.rollout, config.sync.transport
    whole, sent = shape.sent * size / 1e9, sync_bytes(config, shape) / 1e9
    nodes = max(1, math.ceil(rollout.engines * rollout.tensor_parallel / hardware.per_node))
    other = nodes - (devices <= hardware.per_node)
    if transport == "nccl":  # a broadcast, in a pipeline through all engines
        travels = sent / hardware.bus(1 + rollout.engines * rollout.tensor_parallel) * 1e9
    else:  # each node fetches it from where it is, and its engines read it there
        travels = sent / hardware.host_gbs + max(0, other) * sent / hardware.network_gbs
    gathered = 0.0
    if config.learner.zero_stage == 3:
        gathered = hardware.collective(shape.trained * size, config.learner.world_size, shape.layers)
    return {
        "encoding on rank 0": whole / hardware.encode_gbs + gathered,
        "transport": travels,
        "applying and reading back": whole / rollout.tensor_parallel / hardware.apply_gbs,
        "tensors and calls": shape.sent_tensors * hardware.overheads.sync_tensor + 3 * hardware.overheads.call,
    }
