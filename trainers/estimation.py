"""`hybrid-rl estimate`: what a run takes, shown and as an object."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid_rl.cluster.survey import cluster_address
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.estimate import GIB
from hybrid_rl.hardware import gpu
from hybrid_rl.tables import gib
from trainers.sizing import Machine, Sizing, gpus_in_words, layout_line, micro_batch, size_up, spread, unfit
from trainers.timing import as_object as time_as_object
from trainers.timing import default_gpu, lengths_of, predict, time_table


def estimate_command(
    config: Config,
    console: Console,
    *,
    gpus: int | None,
    gpu_memory: float | None,
    gpu_name: str | None = None,
    mean_length: int | None = None,
    as_json: bool,
) -> None:
    """Print the sizes and, for GPUs, predicted times. Raises `ConfigError`, after that, for what does not fit.

    `gpu_name`: which GPU times are of, and its memory where `gpu_memory` (GiB) does not say; by default the one here,
    or H100. `mean_length`: tokens of a completion, half of the limit by default.
    """
    lengths = lengths_of(config, mean_length)
    hardware = gpu(gpu_name or default_gpu(), config.model.dtype)
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
    elif gpu_name is not None:
        machine = replace(machine, gpu_bytes=int(hardware.memory_gib * GIB))
    with console.status("running the model on tensors without values"):
        sizing = size_up(config, machine)
    why = unfit(sizing)
    console.print(memory_table(sizing))
    console.print(facts_table(sizing))
    timing = predict(sizing, machine.gpus, hardware, lengths) if machine.gpus else None
    if timing is not None:
        console.print(time_table(timing))
    if as_json:
        times = {"time": time_as_object(timing)} if timing is not None else {}
        print(json.dumps(as_object(sizing) | times | {"fits": why is None, "why": why}))
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
    lengths, micro_batches = micro_batch(config, sizing.longest)
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
    on = gpus_in_words(machine.gpus) + (f" of {gib(machine.gpu_bytes)}" if machine.gpu_bytes else " of unknown memory")
    on = on if machine.gpus else "CPUs"
    if machine.nodes:
        on += f"; the cluster at {cluster_address(config)}"
    elif machine.memory is not None:
        on += f"; this machine has {gib(machine.memory)} of memory"
    table.add_row("runs on", on)
    return table
