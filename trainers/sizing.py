"""Memory of a run, before any of it is there, and the layout of its workers. Reads the model's shapes alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from hybrid_rl.cluster.survey import Node, cluster_address, survey
from hybrid_rl.components import Anatomy
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.estimate import (
    CONTEXT,
    ITEM_SIZE,
    LOADING,
    CacheSize,
    Pass,
    ProcessMemory,
    engine_memory,
    learner_memory,
    resident,
)
from hybrid_rl.machine import host_memory
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import configured_plan, select_candidates
from hybrid_rl.scale import Shape, read_shape
from hybrid_rl.tables import gib
from trainers.base_model import meta_model
from trainers.setup import Task, check_plan, places

COMPARED: Mapping[str, Mapping[str, str]] = {
    "full": {"adaptation": "full"},
    "LoRA": {"adaptation": "lora"},
    "hybrid": {"adaptation": "hybrid"},
    "MoLF": {"adaptation": "molf"},
}
"""Plans that stand side by side: what each has otherwise than the settings; `unit` is of the budget."""


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    gpus: int
    """0: everything runs on CPUs."""
    gpu_bytes: int | None
    """Of each; `None` if it is not known."""
    memory: int | None
    """Bytes that all processes share; `None` if it is not known, or they are on several machines."""
    nodes: Sequence[Node] = ()
    """Those of the cluster that it is; none of this machine."""

    @staticmethod
    def here() -> Machine:
        """This machine, or the container."""
        usable = torch.cuda.is_available() and _uses_gpus()
        count = torch.cuda.device_count() if usable else 0
        size = min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=None)
        return Machine(count, size, host_memory().total)

    @staticmethod
    def of(config: Config) -> Machine:
        """What the run would be on: this machine, or the cluster that it joins, of which Ray does not know the size of
        GPUs. Raises `ConfigError` if that cannot be joined."""
        if cluster_address(config) is None:
            return Machine.here()
        nodes = survey(config)
        return Machine(int(sum(node.gpus for node in nodes)) if _uses_gpus() else 0, None, None, nodes)


def _uses_gpus() -> bool:
    return os.environ.get("HYBRID_RL_DEVICE") != "cpu"


@dataclass(frozen=True)
class Sizes:
    """A run's sizes under one plan, in bytes."""

    trained: int
    """Parameters."""
    learner: ProcessMemory
    """Rank 0."""
    other_rank: ProcessMemory
    """Each of the rest."""
    engine: ProcessMemory
    update: int
    """A complete weight update."""


@dataclass(frozen=True)
class Sizing:
    config: Config
    machine: Machine
    by_plan: Mapping[str, Sizes]
    configured: str
    """Which of `by_plan` the settings ask for."""
    longest: int
    """Tokens of the longest sequence."""
    cache: CacheSize | None
    complete: bool
    """Whether activations and caches are counted too."""
    anatomy: Anatomy
    plan: AdaptationPlan
    """The configured one; before a ranking, the one that stands for it."""
    passed: Pass | None
    """A micro-batch's pass under it."""
    shape: Shape | None
    """What a step's time depends on, under it; `None` where the cache is not known."""

    @property
    def own(self) -> Sizes:
        return self.by_plan[self.configured]

    @property
    def tokens_per_step(self) -> int:
        """At most."""
        return self.config.completions_per_step * self.longest

    def ranks(self, sizes: Sizes) -> int:
        """Memory of all learner ranks, without that of GPUs."""
        return sizes.learner.host_total + (self.config.learner.world_size - 1) * sizes.other_rank.host_total

    def engines(self, sizes: Sizes) -> int:
        """The same of all engines."""
        return self.config.rollout.engines * self.config.rollout.tensor_parallel * sizes.engine.host_total

    def host(self, sizes: Sizes) -> int:
        """The same of all processes."""
        return self.ranks(sizes) + self.engines(sizes)


def size_up(
    config: Config,
    machine: Machine,
    *,
    task: Task | None = None,
    compared: Mapping[str, Mapping[str, str]] = COMPARED,
    rehearse: bool = True,
) -> Sizing:
    """Sizes under the plan that the settings ask for, or that `task` has already, and under those `compared` with it.

    Unless the model's pass is to be `rehearse`d, activations and caches are left out, and the sizes are lower bounds.
    With a `task`, the longest prompt is that of its data.
    """
    model = meta_model(config) if task is None or rehearse else None
    anatomy, given = check_plan(config, model) if task is None else (task.anatomy, task.plan)
    prompts = [] if task is None else [len(prompt.token_ids) for prompt in [*task.train, *task.held_out]]
    longest = max(prompts, default=config.data.max_prompt_length) + config.sampling.max_completion_length
    plans = _plans(config, anatomy, given, compared)
    lengths, micro_batches = micro_batch(config, longest)
    predicted = len(lengths) * config.sampling.max_completion_length // config.learner.sequence_parallel
    cache, found, gpu = None, {}, machine.gpus > 0
    passes: dict[str, Pass | None] = dict.fromkeys(plans)
    if rehearse:
        # Imports DeepSpeed, which a driver can do without.
        from hybrid_rl.rehearsal import rehearse_cache, rehearse_pass

        cache = rehearse_cache(model, getattr(torch, config.model.dtype))
        passes = {label: rehearse_pass(config, model, each, lengths, predicted) for label, each in plans.items()}
    for label, each in plans.items():
        learner, other = (
            learner_memory(config, anatomy, each, passes[label], micro_batches=micro_batches, gpu=gpu, first=first)
            for first in (True, False)
        )
        engine = engine_memory(config, anatomy, each, cache, longest, gpu=gpu, gpu_bytes=machine.gpu_bytes)
        update = each.sent_params * ITEM_SIZE[config.model.dtype]
        found[label] = Sizes(each.totals["trainable_params"], learner, other, engine, update)
    complete = cache is not None and all(passed is not None for passed in passes.values())
    own = next(iter(found))
    shape = None if cache is None or model is None else read_shape(anatomy, plans[own], model.config, cache)
    return Sizing(
        config, machine, found, own, longest, cache, complete, anatomy, plans[own], passes[own], shape
    )  # fmt: skip


def resized(sizing: Sizing, config: Config, gpus: int) -> Sizing:
    """The configured plan's sizes in another layout, on so many GPUs; a pass is taken to hold as much."""
    gpu, machine = gpus > 0, replace(sizing.machine, gpus=gpus)
    micro_batches = micro_batch(config, sizing.longest)[1]
    learner, other = (
        learner_memory(
            config, sizing.anatomy, sizing.plan, sizing.passed, micro_batches=micro_batches, gpu=gpu, first=first
        )
        for first in (True, False)
    )
    engine = engine_memory(
        config, sizing.anatomy, sizing.plan, sizing.cache, sizing.longest, gpu=gpu, gpu_bytes=machine.gpu_bytes
    )
    sizes = replace(sizing.own, learner=learner, other_rank=other, engine=engine)
    return replace(sizing, config=config, machine=machine, by_plan={sizing.configured: sizes})


def _plans(
    config: Config, anatomy: Anatomy, given: AdaptationPlan | None, compared: Mapping[str, Mapping[str, str]]
) -> dict[str, AdaptationPlan]:
    """By label, the configured one first. Before a ranking, a hybrid plan's largest matrices stand for its best."""
    largest = {c.name: float(c.params) for c in select_candidates(anatomy, config.plan)}
    asked: dict[str, str] = {"adaptation": config.adaptation, "unit": config.plan.budget.unit}
    same = (label for label, changes in compared.items() if {**asked, **changes} == asked)
    name = "the plan given" if given is not None else next(same, config.adaptation)
    if given is None and config.adaptation == "hybrid" and config.rest != "lora":
        name = f"hybrid, {config.rest}"
    plans: dict[str, AdaptationPlan] = {name: given or configured_plan(anatomy, config, largest, {})}
    for label, changes in compared.items():
        if label not in plans:
            unit = changes.get("unit", config.plan.budget.unit)
            budget = config.plan.budget.model_copy(update={"unit": unit})
            settings = config.plan.model_copy(update={"rest": "lora", "budget": budget})
            as_if = config.model_copy(update={"adaptation": changes["adaptation"], "plan": settings})
            try:
                plans[label] = configured_plan(anatomy, as_if, largest, {})
            except ConfigError:  # not for this model, as full fine-tuning of a quantised one
                continue
    return plans


def micro_batch(config: Config, longest: int) -> tuple[list[int], int]:
    """Tokens of each sequence of a micro-batch, on one rank, and how many micro-batches a mini-batch has."""
    parallel = config.learner.sequence_parallel
    count = config.completions_per_step * parallel // config.batch.mini_batches // config.learner.world_size
    at_most = max(1, config.batch.tokens_per_micro_batch * parallel // longest)
    micro_batches = -(-count // at_most)
    return [-(-longest // parallel)] * -(-count // micro_batches), micro_batches


def spread(config: Config, gpus: int) -> Config:
    """The same run on so many GPUs. `learner.world_size` and `rollout.engines` stay where the settings give them and
    there are GPUs enough; what is left is shared out, as nearly as may be in the proportion that the settings have.
    Raises `ConfigError` if it cannot be."""
    ranks, engines = config.learner.world_size, config.rollout.engines
    given_ranks, given_engines = (
        name in section.model_fields_set
        for section, name in ((config.learner, "world_size"), (config.rollout, "engines"))
    )
    share = gpus * ranks / (gpus_needed(config, ranks, engines) or 1)

    def preferred(layout: tuple[int, int]) -> tuple[int, float, float]:
        kept = (given_ranks and layout[0] == ranks) + (given_engines and layout[1] == engines)
        return -kept, -gpus_needed(config, *layout), abs(layout[0] - share)

    return laid_out(config, *min(layouts(config, gpus, engines if given_engines else None), key=preferred))


def layouts(config: Config, gpus: int, engines: int | None = None) -> list[tuple[int, int]]:
    """Learner ranks and engines that so many GPUs have room for: with every number of ranks that divides the batch, as
    many engines as are left room for, and if that can be so many, `engines`. Raises `ConfigError` if there are none."""
    parallel, asked = config.learner.sequence_parallel, config.rollout.engines

    def choices(n: int) -> list[int]:
        if config.cluster.placement == "colocate":
            return [n]
        first = gpus_needed(config, n, 1)
        each = gpus_needed(config, n, 2) - first
        room = 1 + int((gpus - first) // each) if each else asked
        return [room] if engines is None else [engines, room]

    fitting = [
        (n, m)
        for n in range(1, max(gpus, config.learner.world_size) + 1)
        if n % parallel == 0 and not config.completions_per_step * parallel % (config.batch.mini_batches * n)
        for m in choices(n)
        if m > 0 and gpus_needed(config, n, m) <= gpus
    ]
    if not fitting:
        raise ConfigError(_too_few(config, gpus))
    return fitting


def laid_out(config: Config, ranks: int, engines: int) -> Config:
    """The same run with so many learner ranks and engines."""
    learner = config.learner.model_copy(update={"world_size": ranks})
    rollout = config.rollout.model_copy(update={"engines": engines})
    return config.model_copy(update={"learner": learner, "rollout": rollout})


def gpus_needed(config: Config, ranks: int, engines: int) -> float:
    """What so many learner ranks and engines reserve where there are GPUs."""
    return sum(place.gpus for place in places(config, True, ranks, engines))


def _too_few(config: Config, gpus: int) -> str:
    parallel, each = config.learner.sequence_parallel, config.rollout.tensor_parallel
    why = (
        f"--gpus {gpus} is too few: learner.sequence_parallel={parallel} and rollout.tensor_parallel={each} need at "
        f"least {math.ceil(gpus_needed(config, parallel, 1))}"
    )
    if config.cluster.placement == "split" and each == 1 and gpus >= parallel:
        why += (
            f"; on {parallel}, ranks and engines share: cluster.placement=colocate, or learner.gpus=0.5 "
            f"rollout.gpus=0.5, with learner.world_size={parallel} rollout.engines={parallel}"
        )
    return why


def layout_line(config: Config, chosen: Config, gpus: int) -> str:
    """What `spread` made of the settings, and why."""
    (ranks, engines), before = ((c.learner.world_size, c.rollout.engines) for c in (chosen, config))
    used = gpus_needed(chosen, ranks, engines)
    line = f"of {gpus_in_words(gpus)} {used:g} {'is' if used == 1 else 'are'} used: "
    line += f"learner.world_size={ranks}, rollout.engines={engines}"
    if before != (ranks, engines):
        line += f" (configured: {before[0]} and {before[1]}; what the settings give stays where it fits)"
    elif used < gpus:
        line += " (as configured)"
    return line


def gpus_in_words(count: int) -> str:
    return f"{count} GPU{'s' if count != 1 else ''}"


def unfit(sizing: Sizing) -> str | None:
    """Why the run does not fit what there is, and which setting to turn; `None` if it does."""
    config, machine, own = sizing.config, sizing.machine, sizing.own
    rollout, learner = config.rollout, config.learner
    if machine.gpus:
        wanted = learner.world_size
        if config.cluster.placement == "split":
            wanted += rollout.engines * rollout.tensor_parallel
        shared = learner.gpus is not None or rollout.gpus is not None
        if wanted > machine.gpus and not shared:
            return (
                f"the run needs {wanted} GPUs, and there {'is' if machine.gpus == 1 else 'are'} {machine.gpus}; lower "
                f"learner.world_size={learner.world_size} or rollout.engines={rollout.engines}, or use "
                "cluster.placement=colocate"
            )
    if machine.gpus and machine.gpu_bytes is not None and (why := _unfit_gpu(sizing, machine.gpu_bytes)) is not None:
        return why
    needed = sizing.host(own)
    if machine.memory is not None and needed > machine.memory:
        fits = [label for label, sizes in sizing.by_plan.items() if sizing.host(sizes) <= machine.memory]
        instead = f"; {fits[0]} would fit" if fits else ""
        engines, ranks = sizing.engines(own), sizing.ranks(own)
        whose, parts = ("an engine", own.engine.host) if engines > ranks else ("a rank", own.learner.host)
        return (
            f"the run needs {gib(needed)} of memory, and this machine has {gib(machine.memory)}: learner.world_size="
            f"{learner.world_size} ranks are {gib(ranks)}, rollout.engines={rollout.engines} {gib(engines)}. Of "
            f"{whose}, {_largest(parts, _ON_HOST)}{instead}"
        )
    return None


def _unfit_gpu(sizing: Sizing, size: int) -> str | None:
    config, own = sizing.config, sizing.own
    share = config.rollout.gpu_memory_utilization
    if own.learner.device_total > size:
        fits = [label for label, sizes in sizing.by_plan.items() if sizes.learner.device_total <= size]
        return (
            f"a learner rank needs {gib(own.learner.device_total)} of GPU memory, and a GPU has {gib(size)}: "
            f"{_largest(own.learner.device, _ON_GPU)}{f'; {fits[0]} would fit' if fits else ''}"
        )
    least = own.engine.device["weights"] + own.engine.device.get("adapter", 0) + CONTEXT
    least += sizing.cache.of(sizing.longest) // config.rollout.tensor_parallel if sizing.cache else 0
    if config.rollout.engine == "vllm" and least > share * size:
        return (
            f"an engine needs {gib(least)} of GPU memory for weights and one sequence, and rollout."
            f"gpu_memory_utilization={share:g} of {gib(size)} is {gib(share * size)}; raise it, or "
            f"rollout.tensor_parallel={config.rollout.tensor_parallel}"
        )
    kept = resident(config, own.learner)
    if config.cluster.placement == "colocate" and kept + share * size > size:
        reads = kept - own.learner.device["the process itself"] == own.learner.loading
        return (
            f"cluster.placement=colocate: an engine takes rollout.gpu_memory_utilization={share:g} of {gib(size)}, "
            f"while the learner {'reads its model into' if reads else 'keeps'} {gib(kept)} of the GPU; lower it to "
            f"{max(0.0, 1 - kept / size):.2f} or less{'' if reads else ', or use learner.offload'}"
        )
    return None


_STATE = ("fp32 masters", "optimizer moments", "gradients", "optimizer and sync")
_SMALLER = "a smaller plan.budget.ratio or lora.rank"
_ANYWHERE = {
    **dict.fromkeys(_STATE, f"{_SMALLER}, or adaptation=lora"),
    "gradient bucket": "a smaller plan.budget.ratio, or adaptation=lora",
    "activations": "a smaller batch.tokens_per_micro_batch, or learner.gradient_checkpointing=true",
    "logits and working memory": "a smaller learner.logits_mib or batch.tokens_per_micro_batch",
    "base policy for the KL": "algo.kl_coef=0",
    "weights gathered": "a smaller model: DeepSpeed keeps up to 1e9 parameters whole",
}
_ON_GPU = _ANYWHERE | {
    **dict.fromkeys(_STATE, f"{_SMALLER}, adaptation=lora, or learner.offload=optimizer"),
    "weights": "learner.zero_stage=3 over more ranks, or model.dtype=bfloat16",
    LOADING: "a GPU with more memory or a smaller model: each rank reads all of it in float32 onto its GPU",
    "the process itself": "a GPU with more memory: CUDA and NCCL take that much",
}
_ON_HOST = _ANYWHERE | {
    "weights": "model.dtype=bfloat16, or fewer learner.world_size or rollout.engines",
    "weights while it sleeps": "fewer rollout.engines, or cluster.placement=split",
    LOADING: "fewer learner.world_size: each rank reads the whole model in float32",
    "sync buffers": _SMALLER,
    "checkpoint being written": "checkpoint.background=false",
    "KV cache": "a smaller rollout.cpu_kv_cache_gib (vLLM on CPU) or rollout.max_concurrent",
    "adapter": "a smaller lora.rank",
    "the process itself": "fewer learner.world_size or rollout.engines",
}


def _largest(parts: Mapping[str, int], knobs: Mapping[str, str]) -> str:
    """The parts that most of it is, and what makes the largest smaller. Where reading the model takes most, nothing
    else helps."""
    order = sorted(parts, key=lambda part: -parts[part])
    shown = ", ".join(f"{part} {gib(parts[part])}" for part in order[:4])
    return f"{shown}. What helps: {knobs[LOADING if LOADING in parts else order[0]]}"
