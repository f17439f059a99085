"""What could stop a run outside its settings, model and data: room, rights, ports, keys. Checked before it starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hybrid_rl.checkpoint import checkpoints
from hybrid_rl.cluster.base import check_directory
from hybrid_rl.cluster.survey import cluster_address
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.estimate import GIB, planned_memory
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import configured_plan, select_candidates
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.tracking import check_trackers
from trainers.estimation import facts_table, memory_table
from trainers.setup import Task, places
from trainers.sizing import Machine, size_up, unfit


def check_surroundings(config: Config, task: Task) -> None:
    """Raise `ConfigError` for what this machine or a service cannot give. Takes a fraction of a second; starts nothing.

    What a cluster has is looked at when it is joined.
    """
    check_trackers(config)
    if config.sync.directory is not None:
        check_directory(config)
    _check_run_directory(config, task)
    if cluster_address(config) is None:
        machine = Machine.here()
        _check_places(config, machine)
        if (why := unfit(size_up(config, machine, task=task, compared={}, rehearse=False))) is not None:
            raise ConfigError(why)


def dry_run(config: Config, task: Task, console: Console) -> None:
    """Print what the run needs against what there is. Raises `ConfigError`, after that, for what does not fit.

    Joins the cluster that the run would join, if any, but starts no worker there.
    """
    machine = Machine.of(config)
    sizing = size_up(config, machine, task=task)
    console.print(memory_table(sizing))
    console.print(facts_table(sizing))
    if machine.nodes:
        console.print(_nodes_table(config, machine))
    _check_places(config, machine)
    if (why := unfit(sizing)) is not None:
        raise ConfigError(why)


def _needed(config: Config, machine: Machine) -> tuple[float, float]:
    """CPUs and GPUs that the workers reserve."""
    wanted = places(config, machine.gpus > 0, config.learner.world_size, config.rollout.engines)
    return sum(place.cpus for place in wanted), sum(place.gpus for place in wanted)


def _check_places(config: Config, machine: Machine) -> None:
    """That there is what the workers reserve."""
    if config.cluster.backend == "inline":
        return
    cpus = sum(node.cpus for node in machine.nodes) if machine.nodes else os.cpu_count() or 1
    where = f"the cluster at {cluster_address(config)}" if machine.nodes else "this machine"
    for kind, wanted, has in zip(("CPUs", "GPUs"), _needed(config, machine), (cpus, machine.gpus), strict=True):
        if wanted > has:
            raise ConfigError(_too_few(config, kind, wanted, has, where))


def _too_few(config: Config, kind: str, needed: float, there: float, where: str) -> str:
    learner, rollout = config.learner, config.rollout
    why = (
        f"the run needs {needed:g} {kind} for learner.world_size={learner.world_size} and rollout.engines="
        f"{rollout.engines}, and {where} has "
    )
    if kind == "CPUs":
        return f"{why}{there:g}; lower those, or learner.cpus (now {learner.cpus}) or rollout.cpus (now {rollout.cpus})"
    given = {"learner.gpus": learner.gpus, "rollout.gpus": rollout.gpus}
    if not there:  # without GPUs nobody reserves one unless the settings say so
        return f"{why}none; leave out {' and '.join(f'{name}={gpus:g}' for name, gpus in given.items() if gpus)}"
    usual = {"learner.gpus": 1, "rollout.gpus": rollout.tensor_parallel}
    now = [f"{name} (now {usual[name] if gpus is None else gpus:g})" for name, gpus in given.items()]
    return f"{why}{there:g}; lower those, or {' or '.join(now)}"


def _check_run_directory(config: Config, task: Task) -> None:
    """That it can be made and written, and that the checkpoints have room."""
    run = Path(config.run.dir or "runs").absolute()
    name = f"run.dir={config.run.dir!r}" if config.run.dir else f"run.dir (by default in {run})"
    try:
        there = next(path for path in (run, *run.parents) if path.exists())
        Path(tempfile.mkdtemp(prefix=".writable_", dir=there)).rmdir()
        saved = [path for each in checkpoints(RunDirectory(run).checkpoints) for path in each.rglob("*")]
        already = sum(path.stat().st_size for path in saved if path.is_file())
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be written: {error.strerror} ({error.filename}); give a directory that can, as in "
            "run.dir=/data/run1"
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
    # What is there already of a run that goes on is deleted in turn, but only once the next is written.
    needed, free = max(each, kept * each - already), shutil.disk_usage(there).free
    if needed > free:
        besides = f" besides the {already / GIB:.2f} GiB that are there" if already else ""
        raise ConfigError(
            f"{name}: {kept} checkpoints of {each / GIB:.2f} GiB need {needed / GIB:.2f} GiB of disk{besides}, and "
            f"{free / GIB:.2f} GiB are free; lower checkpoint.keep_last={settings.keep_last} or checkpoint.keep_best="
            f"{settings.keep_best}, or give another run.dir"
        )


def _nodes_table(config: Config, machine: Machine) -> Table:
    nodes, (cpus, gpus) = machine.nodes, _needed(config, machine)
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
