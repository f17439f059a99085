"""`hybrid-rl estimate`: what a run takes, before any of it is there. Reads the model's shapes alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from hybrid_rl.components import Anatomy
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.estimate import (
    CONTEXT,
    GIB,
    ITEM_SIZE,
    CacheSize,
    ProcessMemory,
    engine_memory,
    learner_memory,
    resident,
)
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import configured_plan, select_candidates
from hybrid_rl.rehearsal import rehearse_cache, rehearse_pass
from trainers.setup import Task, check_plan, meta_model

COMPARED = {"full": "full", "LoRA": "lora", "hybrid": "hybrid", "MoLF": "molf"}
"""Plans that stand side by side, and their `adaptation`."""


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    gpus: int
    """0: everything runs on CPUs."""
    gpu_bytes: int | None
    """Of each; `None` if it is not known."""
    memory: int
    """Bytes of this machine."""
    assumed: bool = False
    """Whether it is the one asked about, not the one there is."""

    @staticmethod
    def here() -> Machine:
        usable = torch.cuda.is_available() and os.environ.get("HYBRID_RL_DEVICE") != "cpu"
        count = torch.cuda.device_count() if usable else 0
        size = min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=None)
        return Machine(count, size, psutil.virtual_memory().total)


@dataclass(frozen=True)
class Sizes:
    """A run's sizes under one plan, in bytes."""

    trained: int
    """Parameters."""
    learner: ProcessMemory
    """Rank 0."""
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

    def host(self, sizes: Sizes) -> int:
        """Memory of all processes together."""
        learner, engine = sizes.learner.host_total, sizes.engine.host_total * self.config.rollout.tensor_parallel
        return self.config.learner.world_size * learner + self.config.rollout.engines * engine


def size_up(
    config: Config,
    machine: Machine,
    *,
    task: Task | None = None,
    side_by_side: bool = True,
) -> Sizing:
    """Sizes under the plan that the settings ask for, or that `task` has already, and `side_by_side` with other plans.

    Alone, nothing is rehearsed: activations and caches are left out, and the sizes are lower bounds. With a `task`, the
    longest prompt is that of its data.
    """
    model = meta_model(config) if task is None or side_by_side else None
    anatomy, given = check_plan(config, model) if task is None else (task.anatomy, task.plan)
    prompts = [] if task is None else [len(prompt.token_ids) for prompt in [*task.train, *task.held_out]]
    longest = max(prompts, default=config.data.max_prompt_length) + config.sampling.max_completion_length
    plans = _plans(config, anatomy, given, side_by_side)
    lengths, micro_batches = _micro_batch(config, longest)
    predicted = len(lengths) * config.sampling.max_completion_length // config.learner.sequence_parallel
    cache = rehearse_cache(model, getattr(torch, config.model.dtype)) if side_by_side else None
    found, complete = {}, cache is not None
    for label, each in plans.items():
        passed = rehearse_pass(config, model, each, lengths, predicted) if side_by_side else None
        complete &= passed is not None
        gpu = machine.gpus > 0
        learner = learner_memory(config, anatomy, each, passed, micro_batches=micro_batches, gpu=gpu)
        engine = engine_memory(config, anatomy, each, cache, longest, gpu=gpu, gpu_bytes=machine.gpu_bytes)
        update = each.sent_params * ITEM_SIZE[config.model.dtype]
        found[label] = Sizes(each.totals["trainable_params"], learner, engine, update)
    return Sizing(config, machine, found, next(iter(found)), longest, cache, complete)


def _plans(
    config: Config, anatomy: Anatomy, given: AdaptationPlan | None, side_by_side: bool
) -> dict[str, AdaptationPlan]:
    """By label, the configured one first. Before a ranking, a hybrid plan's largest matrices stand for its best."""
    largest = {c.name: float(c.params) for c in select_candidates(anatomy, config.plan)}
    labels = {adaptation: label for label, adaptation in COMPARED.items()}
    name = str(labels.get(config.adaptation, config.adaptation))
    if config.adaptation == "hybrid" and config.rest != "lora":
        name = f"hybrid, {config.plan.rest}"
    name = "the plan given" if given is not None else name
    plans: dict[str, AdaptationPlan] = {name: given or configured_plan(anatomy, config, largest, {})}
    for label, adaptation in COMPARED.items() if side_by_side else ():
        if label not in plans:
            settings = config.plan.model_copy(update={"rest": "lora"})
            as_if = config.model_copy(update={"adaptation": adaptation, "plan": settings})
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
    """The same run on so many GPUs: learner ranks and engines in the proportion that the settings have. Raises
    `ConfigError` if it cannot be."""
    each, ranks, engines = config.rollout.tensor_parallel, config.learner.world_size, config.rollout.engines
    parallel = config.learner.sequence_parallel

    def divides(n: int) -> bool:
        return n % parallel == 0 and not config.completions_per_step * parallel % (config.batch.mini_batches * n)

    most = gpus if config.cluster.placement == "colocate" else gpus - each
    share = gpus if config.cluster.placement == "colocate" else gpus * ranks / (ranks + engines * each)
    fitting = [n for n in range(1, most + 1) if divides(n)]
    if not fitting:
        raise ConfigError(
            f"--gpus {gpus} is too few: learner.sequence_parallel={parallel} and rollout.tensor_parallel={each} need "
            f"at least {parallel + (each if config.cluster.placement == 'split' else 0)}"
        )
    world_size = min(fitting, key=lambda n: abs(n - share))
    rest = world_size if config.cluster.placement == "colocate" else (gpus - world_size) // each
    learner = config.learner.model_copy(update={"world_size": world_size})
    rollout = config.rollout.model_copy(update={"engines": rest})
    return config.model_copy(update={"learner": learner, "rollout": rollout})


def unfit(sizing: Sizing) -> str | None:
    """Why the run does not fit what there is, and which setting to turn; `None` if it does."""
    config, machine, own = sizing.config, sizing.machine, sizing.own
    rollout, learner = config.rollout, config.learner
    if machine.gpus:
        wanted = learner.world_size
        if config.cluster.placement == "split":
            wanted += rollout.engines * rollout.tensor_parallel
        shared = learner.gpus is not None or rollout.gpus is not None
        if wanted > machine.gpus and not shared and config.cluster.address is None:
            return (
                f"the run needs {wanted} GPUs, and there are {machine.gpus}; lower learner.world_size="
                f"{learner.world_size} or rollout.engines={rollout.engines}, or use cluster.placement=colocate"
            )
    if machine.gpus and machine.gpu_bytes is not None and (why := _unfit_gpu(sizing, machine.gpu_bytes)) is not None:
        return why
    needed = sizing.host(own)
    if config.cluster.address is None and not machine.assumed and needed > machine.memory:
        fits = [label for label, sizes in sizing.by_plan.items() if sizing.host(sizes) <= machine.memory]
        instead = f"; {fits[0]} would fit" if fits else ""
        engines = rollout.engines * rollout.tensor_parallel * own.engine.host_total
        ranks = learner.world_size * own.learner.host_total
        whose, parts = ("an engine", own.engine.host) if engines > ranks else ("a rank", own.learner.host)
        return (
            f"the run needs {_gib(needed)} of memory, and this machine has {_gib(machine.memory)}: learner.world_size="
            f"{learner.world_size} ranks are {_gib(ranks)}, rollout.engines={rollout.engines} {_gib(engines)}. Of "
            f"{whose}, {_largest(parts)}{instead}"
        )
    return None


def _unfit_gpu(sizing: Sizing, size: int) -> str | None:
    config, own = sizing.config, sizing.own
    share = config.rollout.gpu_memory_utilization
    if own.learner.device_total > size:
        fits = [label for label, sizes in sizing.by_plan.items() if sizes.learner.device_total <= size]
        return (
            f"a learner rank needs {_gib(own.learner.device_total)} of GPU memory, and a GPU has {_gib(size)}: "
            f"{_largest(own.learner.device)}{f'; {fits[0]} would fit' if fits else ''}"
        )
    least = own.engine.device["weights"] + own.engine.device.get("adapter", 0) + CONTEXT
    least += sizing.cache.of(sizing.longest) // config.rollout.tensor_parallel if sizing.cache else 0
    if config.rollout.engine == "vllm" and least > share * size:
        return (
            f"an engine needs {_gib(least)} of GPU memory for weights and one sequence, and rollout."
            f"gpu_memory_utilization={share:g} of {_gib(size)} is {_gib(share * size)}; raise it, or "
            f"rollout.tensor_parallel={config.rollout.tensor_parallel}"
        )
    if config.cluster.placement == "colocate" and (kept := resident(own.learner)) + share * size > size:
        return (
            f"cluster.placement=colocate: an engine takes rollout.gpu_memory_utilization={share:g} of {_gib(size)}, "
            f"while the learner keeps {_gib(kept)} of the GPU; lower it to {max(0.0, 1 - kept / size):.2f} or less, or "
            "use learner.offload"
        )
    return None


_KNOBS = {
    "weights": "learner.zero_stage=3 over more ranks, or model.dtype=bfloat16",
    "fp32 masters": "a smaller plan.budget.ratio or lora.rank, adaptation=lora, or learner.offload=optimizer",
    "gradient bucket": "a smaller plan.budget.ratio, or adaptation=lora",
    "activations": "a smaller batch.tokens_per_micro_batch, or learner.gradient_checkpointing=true",
    "logits and working memory": "a smaller learner.logits_mib or batch.tokens_per_micro_batch",
    "base policy for the KL": "algo.kl_coef=0",
    "weights gathered": "a smaller model: DeepSpeed keeps up to 1e9 parameters whole",
    "sync buffers": "a smaller plan.budget.ratio or lora.rank",
    "checkpoint being written": "checkpoint.background=false",
    "KV cache": "a smaller rollout.cpu_kv_cache_gib (vLLM on CPU) or rollout.max_concurrent",
    "adapter": "a smaller lora.rank",
    "the process itself": "fewer learner.world_size or rollout.engines",
    "the model while it is read": "fewer ranks on a machine",
}
_KNOBS |= dict.fromkeys(("optimizer moments", "gradients", "optimizer and sync"), _KNOBS["fp32 masters"])


def _largest(parts: Mapping[str, int]) -> str:
    """The parts that most of it is, and what makes the largest smaller."""
    order = sorted(parts, key=lambda part: -parts[part])
    shown = ", ".join(f"{part} {_gib(parts[part])}" for part in order[:4])
    return f"{shown}. What helps: {_KNOBS[order[0]]}"


def estimate_command(
    config: Config, console: Console, *, gpus: int | None, gpu_memory: float | None, as_json: bool
) -> None:
    """Print the sizes. Raises `ConfigError`, after that, for what does not fit."""
    machine = Machine.here()
    if gpus is not None:
        config = spread(config, gpus)
        machine = Machine(gpus, machine.gpu_bytes, machine.memory, assumed=True)
    if gpu_memory is not None:
        if not machine.gpus:
            raise ConfigError(f"--gpu-memory {gpu_memory:g} is of GPUs, of which there are none here; give --gpus too")
        machine = Machine(machine.gpus, int(gpu_memory * GIB), machine.memory, machine.assumed)
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
        table.add_row(f"[bold]{title}{at}", *(f"[bold]{_gib(sum(column.values()))}" for column in columns))
        for part in dict.fromkeys(part for column in columns for part in column):
            table.add_row(f"  {part}", *(_gib(column[part]) if part in column else "-" for column in columns))
        table.add_section()
    table.add_row("all processes, the machine's memory", *(_gib(sizing.host(sizes)) for sizes in every))
    table.add_row("weight update, complete", *(_gib(sizes.update) for sizes in every))
    table.add_row("trained parameters", *(f"{sizes.trained:,}" for sizes in every))
    table.caption = "hybrids with the largest matrices full, an upper bound; sequences as long as they may be"
    if not gpu:
        table.caption += "; glibc keeps freed memory besides, unless MALLOC_MMAP_THRESHOLD_=1048576 is set"
    if not sizing.complete:
        table.caption = "[yellow]this model cannot run without values: activations or caches are not counted[/]"
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
            f"{_gib(held)}: {at_once:,} sequences of that length ({sizing.cache.per_token:,} bytes a token)",
        )
    ranks, engines = config.learner.world_size, config.rollout.engines
    table.add_row(
        "workers",
        f"learner.world_size={ranks}, rollout.engines={engines}, cluster.placement={config.cluster.placement}",
    )
    on = f"{machine.gpus} GPUs" + (f" of {_gib(machine.gpu_bytes)}" if machine.gpu_bytes else " of unknown memory")
    table.add_row("runs on", on if machine.gpus else f"CPUs; this machine has {_gib(machine.memory)} of memory")
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 8 else f"{size / 2**20:.1f} MiB"
