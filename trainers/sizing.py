"""`hybrid-rl estimate`: what a run takes, before any of it is there. Reads the model's shapes alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hybrid_rl.cluster.survey import Node, cluster_address, survey
from hybrid_rl.components import Anatomy
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.estimate import (
    CONTEXT,
    GIB,
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
    lengths, micro_batches = _micro_batch(config, longest)
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
    return Sizing(config, machine, found, next(iter(found)), longest, cache, complete)


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


def _micro_batch(config: Config, longest: int) -> tuple[list[int], int]:
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
    parallel, ranks, engines = config.learner.sequence_parallel, config.learner.world_size, config.rollout.engines
    given_ranks, given_engines = (
        name in section.model_fields_set
        for section, name in ((config.learner, "world_size"), (config.rollout, "engines"))
    )
    share = gpus * ranks / (gpus_needed(config, ranks, engines) or 1)

    def choices(n: int) -> list[int]:
        """Engines beside `n` ranks: as many as there is room for, or those given."""
        if config.cluster.placement == "colocate":
            return [n]
        first = gpus_needed(config, n, 1)
        each = gpus_needed(config, n, 2) - first
        room = 1 + int((gpus - first) // each) if each else engines
        return [engines, room] if given_engines else [room]

    def preferred(layout: tuple[int, int]) -> tuple[int, float, float]:
        kept = (given_ranks and layout[0] == ranks) + (given_engines and layout[1] == engines)
        return -kept, -gpus_needed(config, *layout), abs(layout[0] - share)

    fitting = [
        (n, m)
        for n in range(1, max(gpus, ranks) + 1)
        if n % parallel == 0 and not config.completions_per_step * parallel % (config.batch.mini_batches * n)
        for m in choices(n)
        if m > 0 and gpus_needed(config, n, m) <= gpus
    ]
    if not fitting:
        raise ConfigError(_too_few(config, gpus))
    world_size, rest = min(fitting, key=preferred)
    learner = config.learner.model_copy(update={"world_size": world_size})
    rollout = config.rollout.model_copy(update={"engines": rest})
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
    line = f"of {_gpus(gpus)} {used:g} {'is' if used == 1 else 'are'} used: "
    line += f"learner.world_size={ranks}, rollout.engines={engines}"
    if before != (ranks, engines):
        line += f" (configured: {before[0]} and {before[1]}; what the settings give stays where it fits)"
    elif used < gpus:
        line += " (as configured)"
    return line


def _gpus(count: int) -> str:
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


def estimate_command(
    config: Config, console: Console, *, gpus: int | None, gpu_memory: float | None, as_json: bool
) -> None:
    """Print the sizes. Raises `ConfigError`, after that, for what does not fit."""
    if gpus is not None:
        chosen, machine = spread(config, gpus), Machine(gpus, Machine.here().gpu_bytes, None)
        console.print(layout_line(config, chosen, gpus), soft_wrap=True)
        config = chosen
    else:
        machine = Machine.of(config)
    if gpu_memory is not None:
        if not machine.gpus:
            raise ConfigError(f"--gpu-memory {gpu_memory:g} is of GPUs, of which there are none here; give --gpus too")
        machine = replace(machine, gpu_bytes=int(gpu_memory * GIB))
    with console.status("running the model on tensors without values"):
        sizing = size_up(config, machine)
    why = unfit(sizing)
    console.print(memory_table(sizing))
    console.print(facts_table(sizing))
    if as_json:
        print(json.dumps(as_object(sizing) | {"fits": why is None, "why": why}))
    if why is not None:
        raise ConfigError(why)


def as_object(sizing: Sizing) -> dict[str, Any]:
    config, machine = sizing.config, sizing.machine
    plans = {
        label: {
            "trained_parameters": s.trained,
            "learner": {"device": s.learner.device, "host": s.learner.host},
            "engine": {"device": s.engine.device, "host": s.engine.host},
            "host_bytes": sizing.host(s),
            "sync_bytes": s.update,
        }
        for label, s in sizing.by_plan.items()
    }
    return {
        "configured": sizing.configured,
        "gpus": machine.gpus,
        "gpu_bytes": machine.gpu_bytes,
        "memory_bytes": machine.memory,
        "learner.world_size": config.learner.world_size,
        "rollout.engines": config.rollout.engines,
        "longest_sequence": sizing.longest,
        "tokens_per_step": sizing.tokens_per_step,
        "complete": sizing.complete,
        "plans": plans,
    }


def memory_table(sizing: Sizing) -> Table:
    """Memory by part and plan."""
    table = Table(title_justify="left", title=f"Memory of each process at its peak ({sizing.config.model.dtype})")
    table.add_column("")
    for label in sizing.by_plan:
        mark = " (configured)" if label == sizing.configured else ""
        table.add_column(label + mark, justify="right", style="bold" if mark else "")
    every = list(sizing.by_plan.values())
    gpu = sizing.machine.gpus > 0
    each = (
        f", each of {sizing.config.rollout.tensor_parallel} parts" if sizing.config.rollout.tensor_parallel > 1 else ""
    )
    where = [("learner rank", "learner", side) for side in (["device", "host"] if gpu else ["host"])]
    where += [
        (f"{sizing.config.rollout.engine} engine{each}", "engine", side)
        for side in (["device", "host"] if gpu else ["host"])
    ]
    for title, process, side in where:
        columns = [getattr(getattr(sizes, process), side) for sizes in every]
        at = {"device": ", on its GPU", "host": ", in the machine's memory" if gpu else ""}[side]
        table.add_row(f"[bold]{title}{at}", *(f"[bold]{gib(sum(column.values()))}" for column in columns))
        for part in dict.fromkeys(part for column in columns for part in column):
            table.add_row(f"  {part}", *(gib(column[part]) if part in column else "-" for column in columns))
        table.add_section()
    table.add_row("all processes, the machine's memory", *(gib(sizing.host(sizes)) for sizes in every))
    table.add_row("weight update, complete", *(gib(sizes.update) for sizes in every))
    table.add_row("trained parameters", *(f"{sizes.trained:,}" for sizes in every))
    table.caption = "hybrids with the largest matrices full, an upper bound"
    if not sizing.complete:
        table.caption += "; [yellow]activations or caches are not counted, a lower bound[/]"
        return table
    table.caption += "; sequences as long as they may be"
    if not gpu:
        table.caption += (
            ". On CPUs, up to 1.6 times as much was measured, since glibc keeps what is freed; to stay within 10 %, "
            "export MALLOC_MMAP_THRESHOLD_=1048576 where the run (on a cluster, Ray) is started: no launcher sets it"
        )
    return table


def facts_table(sizing: Sizing) -> Table:
    """What a step is, and what there is to run it on."""
    config, machine = sizing.config, sizing.machine
    table = Table(show_header=False, title="A step", title_justify="left")
    lengths, micro_batches = _micro_batch(config, sizing.longest)
    sampled = config.completions_per_step * config.sampling.max_completion_length
    table.add_row("sequences", f"{config.completions_per_step:,} of up to {sizing.longest:,} tokens")
    table.add_row(
        "tokens",
        f"up to {sizing.tokens_per_step:,}, {sampled:,} of them sampled",
    )
    table.add_row(
        "micro-batches", f"{micro_batches * config.batch.mini_batches} a rank, of up to {sum(lengths):,} tokens"
    )
    if sizing.cache is not None:
        held = sizing.own.engine.device.get("KV cache") or sizing.own.engine.host.get("KV cache", 0)
        at_once = (
            held * (config.rollout.tensor_parallel if machine.gpus else 1) // max(1, sizing.cache.of(sizing.longest))
        )
        table.add_row(
            "an engine's KV cache",
            f"{gib(held)}: {at_once:,} sequences of that length ({sizing.cache.per_token:,} bytes a token)",
        )
    ranks, engines = config.learner.world_size, config.rollout.engines
    table.add_row(
        "workers",
        f"learner.world_size={ranks}, rollout.engines={engines}, cluster.placement={config.cluster.placement}",
    )
    on = _gpus(machine.gpus) + (f" of {gib(machine.gpu_bytes)}" if machine.gpu_bytes else " of unknown memory")
    on = on if machine.gpus else "CPUs"
    if machine.nodes:
        on += f"; the cluster at {cluster_address(config)}"
    elif machine.memory is not None:
        on += f"; this machine has {gib(machine.memory)} of memory"
    table.add_row("runs on", on)
    return table
