"""What could stop a run outside its settings, model and data: room, rights, ports, keys. Checked before it starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hybrid_rl.cluster.base import check_directory
from hybrid_rl.cluster.survey import Node, survey
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.estimate import GIB, planned_memory
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import configured_plan, select_candidates
from hybrid_rl.tracking import check_trackers
from trainers.setup import Task, places
from trainers.sizing import Machine, facts_table, memory_table, size_up, unfit


def check_surroundings(config: Config, task: Task) -> None:
    """Raise `ConfigError` for what this machine or a service cannot give. Takes a fraction of a second; starts nothing.

    What a cluster has is looked at when it is joined.
    """
    check_trackers(config)
    if config.sync.directory is not None:
        check_directory(config)
    _check_run_directory(config, task)
    if config.cluster.address is None and not os.environ.get("RAY_ADDRESS"):
        _check_places(config)
        if (why := unfit(size_up(config, Machine.here(), task=task, side_by_side=False))) is not None:
            raise ConfigError(why)


def dry_run(config: Config, task: Task, console: Console) -> None:
    """Print what the run needs against what there is. Raises `ConfigError`, after that, for what does not fit.

    Joins the cluster at `cluster.address`, if one is given, but starts no worker there.
    """
    sizing = size_up(config, Machine.here(), task=task)
    console.print(memory_table(sizing))
    console.print(facts_table(sizing))
    needed = places(config, sizing.machine.gpus > 0, config.learner.world_size, config.rollout.engines)
    if config.cluster.address is not None:
        nodes = survey(config)
        needed = places(config, any(n.gpus for n in nodes), config.learner.world_size, config.rollout.engines)
        cpus, gpus = sum(place.cpus for place in needed), sum(place.gpus for place in needed)
        console.print(_nodes_table(nodes, cpus, gpus))
        for kind, wanted, there in (
            ("CPUs", cpus, sum(n.cpus for n in nodes)),
            ("GPUs", gpus, sum(n.gpus for n in nodes)),
        ):
            if wanted > there:
                raise ConfigError(_too_few(config, kind, wanted, there, f"the cluster at {config.cluster.address}"))
    if (why := unfit(sizing)) is not None:
        raise ConfigError(why)


def _check_places(config: Config) -> None:
    """That this machine has what the workers reserve of it."""
    if config.cluster.backend == "inline":
        return
    gpus = Machine.here().gpus
    needed = places(config, gpus > 0, config.learner.world_size, config.rollout.engines)
    there = {"CPUs": (sum(p.cpus for p in needed), os.cpu_count() or 1), "GPUs": (sum(p.gpus for p in needed), gpus)}
    for kind, (wanted, has) in there.items():
        if wanted > has:
            raise ConfigError(_too_few(config, kind, wanted, has, "this machine"))


def _too_few(config: Config, kind: str, needed: float, there: float, where: str) -> str:
    each = "cpus" if kind == "CPUs" else "gpus"
    learner, rollout = config.learner, config.rollout
    return (
        f"the run needs {needed:g} {kind} for learner.world_size={learner.world_size} and rollout.engines="
        f"{rollout.engines}, and {where} has {there:g}; lower those, or learner.{each}={getattr(learner, each)} or "
        f"rollout.{each}={getattr(rollout, each)}"
    )


def _check_run_directory(config: Config, task: Task) -> None:
    """That it can be made and written, and that the checkpoints have room."""
    run = Path(config.run.dir or "runs").absolute()
    there = next(path for path in (run, *run.parents) if path.exists())
    name = f"run.dir={config.run.dir!r}" if config.run.dir else f"run.dir (by default in {run})"
    try:
        Path(tempfile.mkdtemp(prefix=".writable_", dir=there)).rmdir()
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be written: {error.strerror} ({there}); give a directory that can, as in run.dir=/data/run1"
        ) from None
    if task.plan is not None:
        plan: AdaptationPlan = task.plan
    else:
        flat = {c.name: float(c.params) for c in select_candidates(task.anatomy, config.plan)}
        plan = configured_plan(task.anatomy, config, flat, {})
    memory, settings = planned_memory(config, task.anatomy, plan), config.checkpoint
    each = memory.masters + memory.moments + memory.masters  # ranks' shares, and the trained weights by themselves
    saves = config.steps // settings.every + 1 if settings.every else 1
    kept = min(settings.keep_last + settings.keep_best + 1, saves)  # and the one being written
    free = shutil.disk_usage(there).free
    if kept * each > free:
        raise ConfigError(
            f"{name}: {kept} checkpoints of {each / GIB:.2f} GiB need {kept * each / GIB:.2f} GiB of disk, and "
            f"{free / GIB:.2f} GiB are free; lower checkpoint.keep_last={settings.keep_last} or checkpoint.keep_best="
            f"{settings.keep_best}, or give another run.dir"
        )


def _nodes_table(nodes: Sequence[Node], cpus: float, gpus: float) -> Table:
    table = Table("machine", title="The cluster", title_justify="left")
    for header in ("CPUs free", "GPUs free", "memory for Ray"):
        table.add_column(header, justify="right")
    for n in nodes:
        memory = f"{n.memory / GIB:.1f} GiB"
        table.add_row(n.address, f"{n.free_cpus:g} of {n.cpus:g}", f"{n.free_gpus:g} of {n.gpus:g}", memory)
    table.add_section()
    table.add_row("this run needs", f"{cpus:g}", f"{gpus:g}", "")
    if cpus > sum(n.free_cpus for n in nodes) or gpus > sum(n.free_gpus for n in nodes):
        table.caption = "[yellow]less is free now: the run would wait for a minute, then give up[/]"
    return table
