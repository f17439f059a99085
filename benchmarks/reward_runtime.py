"""The reward runtime: completions a second, what hanging ones cost, and the latency of a group under load.

    python benchmarks/reward_runtime.py [--completions 10000] [--hanging 0.01] [--timeout 1] [--json]

Groups of eight completions of made-up problems (integers, decimals, fractions, radicals, intervals, sets; half of them
wrong; boxed, after `####`, or in a sentence), scored by `rewards.math:accuracy`:

in-process   a quarter of them by a plain loop over math-verify, with its own time limits: what a simple trainer does
in workers   the same calls of math-verify by the runtime with two worker processes: what the runtime itself costs
healthy      all by the runtime and `rewards.math:accuracy`, submitted all at once
hanging      the same with a share of completions on which the reward sleeps or is caught in a regular expression, which
             no thread can interrupt: each costs a worker `--timeout` seconds
paced        submitted at 60 % of the healthy rate: latency of a group from submission to outcome

Goals: 300 completions/s warm; the hanging run within 1.2 times the healthy one plus its limits (hanging completions x
timeout / workers). Runs follow each other in one process; compare the ratios. `--json` prints one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import random
import tempfile
import textwrap
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hybrid_rl.cluster.inline import ThisProcess
from hybrid_rl.config import RewardConfig, RewardSpec
from hybrid_rl.reward import RewardPool
from hybrid_rl.types import Completion, Prompt

PACKAGES = ("hybrid-rl", "math-verify", "sympy", "latex2sympy2_extended")
GROUP, WORKERS = 8, 2
PLUGIN = '''
    """The mathematics reward, which hangs on marked completions."""

    import re
    import time

    from rewards.common import independent, text_of
    from rewards.math import accuracy
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


    def alone(completions, answer, **columns):
        gold = parse(f"\\boxed{{{answer[0]}}}", extraction_config=TARGETS)
        return [float(verify(gold, parse(text, extraction_config=TARGETS))) for text in completions]


    @independent
    def hanging(completions, answer, **columns):
        text = text_of(completions[0])
        if text.startswith("(sleep)"):
            time.sleep(3600)
        if text.startswith("(regex)"):
            re.match(r"(a+)+$", "a" * 64 + "b")
        return accuracy(completions, answer)
'''


def problems(count: int, seed: int) -> list[tuple[str, list[str]]]:
    """Gold answers, each with a group of completions."""
    draw = random.Random(seed)
    return [_problem(draw) for _ in range(count // GROUP)]


def _problem(draw: random.Random) -> tuple[str, list[str]]:
    def one() -> tuple[str, list[str]]:
        a, b = draw.randrange(2, 400), draw.randrange(2, 60)
        return draw.choice(
            [
                (str(a), [str(a), f"{a}.0"]),
                (str(1000 * a), [f"{a},000", f"{a}\\,000"]),
                (f"{a / 4}", [f"{a / 4}", f"\\frac{{{a}}}{{4}}"]),
                (f"\\frac{{{a}}}{{{b}}}", [f"\\dfrac{{{a}}}{{{b}}}", f"\\frac{{{2 * a}}}{{{2 * b}}}", f"{a}/{b}"]),
                (f"{a}\\sqrt{{{b}}}", [f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}"]),
                (f"[{b}, {a + b})", [f"[{b}, {a + b})", f"\\left[{b},{a + b}\\right)"]),
                (f"\\{{{a}, {b}\\}}", [f"\\{{{b}, {a}\\}}", f"\\{{{a},{b}\\}}"]),
            ]
        )

    gold, right = one()
    completions = []
    for _ in range(GROUP):
        said = draw.choice(right) if draw.random() < 0.5 else one()[0]
        reason = " ".join(
            f"Step {i}: {draw.randrange(99)} + {draw.randrange(99)}." for i in range(draw.randrange(3, 30))
        )
        completions.append(
            f"{reason} "
            + draw.choice([f"So \\boxed{{{said}}}.", f"#### {said}", f"The answer is ${said}$.", f"\\boxed{{{said}}}"])
        )
    return gold, completions


def in_process(groups: list[tuple[str, list[str]]]) -> float:
    """Seconds of a loop over math-verify."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    parse("\\boxed{1}", extraction_config=targets)
    started = time.perf_counter()
    for gold, completions in groups:
        parsed = parse(f"\\boxed{{{gold}}}", extraction_config=targets)
        for completion in completions:
            verify(parsed, parse(completion, extraction_config=targets))
    return time.perf_counter() - started


def run(
    pool: RewardPool, groups: list[tuple[str, list[str]]], rate: float | None = None
) -> tuple[float, np.ndarray, dict[str, int]]:
    """Seconds for all, seconds of each group from submission to outcome, and how often each kind of outcome came.
    `rate`: groups submitted a second; all at once by default."""
    asked, ended = [], {}
    started = time.perf_counter()
    for i, (gold, completions) in enumerate(groups):
        if rate is not None:
            time.sleep(max(0.0, started + i / rate - time.perf_counter()))
        prompt = Prompt(str(i), "p", (1,), {"prompt": "p", "answer": gold})
        begun = time.perf_counter()
        future = pool.submit(prompt, [Completion(text, (1,), (0.0,), "stop", 0) for text in completions])
        future.add_done_callback(lambda _, i=i, begun=begun: ended.update({i: time.perf_counter() - begun}))
        asked.append(future)
    kinds: dict[str, int] = {}
    for future in asked:
        for outcome in next(iter(future.result().values())):
            kinds[outcome.kind] = kinds.get(outcome.kind, 0) + 1
    seconds = time.perf_counter() - started
    while len(ended) < len(asked):  # callbacks run after the waiter wakes
        time.sleep(0.001)
    return seconds, np.array(list(ended.values())), kinds


def mark(groups: list[tuple[str, list[str]]], share: float, seed: int) -> tuple[list[tuple[str, list[str]]], int]:
    """The groups with some completions marked to hang, and how many."""
    draw, count, marked = random.Random(seed), 0, []
    for gold, completions in groups:
        hang = [draw.random() < share for _ in completions]
        count += sum(hang)
        marks = [f"({draw.choice(['sleep', 'regex'])}) " if h else "" for h in hang]
        marked.append((gold, [m + c for m, c in zip(marks, completions, strict=True)]))
    return marked, count


def measure(completions: int, hanging: float, timeout: float) -> dict[str, Any]:
    groups = problems(completions, seed=0)
    total = sum(len(c) for _, c in groups)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "hanging.py"
        path.write_text(textwrap.dedent(PLUGIN))
        quarter = groups[: len(groups) // 4]
        with closing(_pool(f"{path}:alone", 60.0)) as pool:
            beside, _, _ = run(pool, quarter)
        in_process(problems(80, seed=1))  # warm, as the workers are
        alone = in_process(quarter)
        with closing(_pool(f"{path}:hanging", timeout)) as pool:
            healthy, _, kinds = run(pool, groups)
            paced, latencies, _ = run(pool, quarter, rate=0.6 * len(groups) / healthy)
            marked, hangs = mark(groups, hanging, seed=2)
            slow, _, slow_kinds = run(pool, marked)
    return {
        "completions": total,
        "workers": WORKERS,
        "timeout": timeout,
        "in_process_seconds": alone,
        "in_workers_seconds": beside,
        "healthy_seconds": healthy,
        "healthy_per_second": total / healthy,
        "in_process_per_second": total / 4 / alone,
        "in_workers_per_second": total / 4 / beside,
        "outcomes": kinds,
        "hanging": hangs,
        "hanging_seconds": slow,
        "limits_seconds": hangs * timeout / WORKERS,
        "allowed_seconds": 1.2 * healthy + hangs * timeout / WORKERS,
        "hanging_outcomes": slow_kinds,
        "paced_seconds": paced,
        "latency_ms": {f"p{q}": 1000 * float(np.percentile(latencies, q)) for q in (50, 90, 99)},
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _pool(plugin: str, timeout: float) -> RewardPool:
    """Warm."""
    pool = RewardPool([RewardSpec(plugin=plugin)], RewardConfig(workers=WORKERS, timeout=timeout), ThisProcess())
    pool.check(["answer", "prompt"])
    run(pool, problems(80, seed=1))
    return pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=10_000)
    parser.add_argument("--hanging", type=float, default=0.01)
    parser.add_argument("--timeout", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.completions, options.hanging, options.timeout)
    if options.json:
        print(json.dumps(found))
        return
    table = Table("run", "seconds", "completions/s", "note", title=f"{found['completions']:,} completions")
    table.add_row(
        "math-verify in process",
        f"{found['in_process_seconds']:.1f}",
        f"{found['in_process_per_second']:.0f}",
        "a quarter of them",
    )
    ratio = found["in_process_seconds"] / found["in_workers_seconds"]
    table.add_row(
        f"math-verify by the runtime, {WORKERS} workers",
        f"{found['in_workers_seconds']:.1f}",
        f"{found['in_workers_per_second']:.0f}",
        f"{ratio:.2f} times as fast",
    )
    table.add_row(
        f"rewards.math by the runtime, {WORKERS} workers",
        f"{found['healthy_seconds']:.1f}",
        f"{found['healthy_per_second']:.0f}",
        "goal 300/s",
    )
    allowed = f"{found['hanging']} hang; allowed {found['allowed_seconds']:.1f} s; outcomes {found['hanging_outcomes']}"
    table.add_row(
        "the same, some hanging",
        f"{found['hanging_seconds']:.1f}",
        f"{found['completions'] / found['hanging_seconds']:.0f}",
        allowed,
    )
    latency = ", ".join(f"{name} {value:.1f} ms" for name, value in found["latency_ms"].items())
    table.add_row("paced at 60 %", f"{found['paced_seconds']:.1f}", "", f"a group of {GROUP}: {latency}")
    Console().print(table)


if __name__ == "__main__":
    main()
