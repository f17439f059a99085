"""The learner's speed and memory, each against what is usual, as ratios within one run.

    python benchmarks/learner.py [packing|logits|trl|memory|all] [--rounds 3]

packing  tokens/s of a whole learner step (hybrid plan, optimizer included) on ragged sequences: packed, padded by us
         (sorted by length) and padded as is usual (in the order they come, to the longest of the whole batch).
         Goal: 1.8 times the padded ones'.
logits   peak memory above the level before, and time, of log-probabilities and entropies at a vocabulary of 151,936,
         forward and backward: ours, whole logits with `log_softmax`, TRL's `selective_log_softmax`, and TRL's present
         fused head. Goal: 0.2 times the memory of whole logits.
trl      tokens/s of an update with LoRA on every linear layer against TRL's `GRPOTrainer` (its `training_step` on
         inputs in its format, clip, AdamW): the same model, sequences, advantages and old log-probabilities; ragged,
         and at equal lengths, where there is no padding to save. Goal: 1.5 times.
memory   bytes that DeepSpeed holds when it steps, by plan, against `hybrid_rl.estimate`. Goal: hybrid 10 % at 0.2
         times full fine-tuning.

Only real tokens count (prompts and completions, no padding). Every side is a process of its own with one thread; sides
take turns step by step, so that other load on the cores meets all. Figures are medians over rounds after a first step
that is not timed; ratios are of each round, then their median. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from learner_sides import (
    COUNT,
    LARGE_VOCABULARY,
    learner_side,
    logits_side,
    make_model,
    memory_side,
    sequences,
    settings,
    take_turns,
    trl_side,
)
from rich.console import Console
from rich.table import Table

from trainers.warm_start import build_tokenizer

PACKAGES = ("hybrid-rl", "torch", "transformers", "deepspeed", "peft", "trl", "accelerate")


def compare(found: dict[str, list[dict]], value: str, per: float | None = None) -> dict[str, Any]:
    """Medians of `value` (or of `per` over it) by side, and ratios of the first side to each other, round by round."""
    rows = {name: [r[value] if per is None else per / r[value] for r in runs[1:]] for name, runs in found.items()}
    first, *others = rows
    ratios = {other: [a / b for a, b in zip(rows[first], rows[other], strict=True)] for other in others}
    return {"medians": {n: median(v) for n, v in rows.items()}, "ratios": ratios, "each": rows}


def ratio_text(result: dict[str, Any], name: str) -> str:
    ratios = result["ratios"].get(name)
    return "" if ratios is None else f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def spread(found: dict[str, list[dict]], key: str, last: int | None = None) -> float:
    """Largest difference of a figure between sides, over all their steps or the first `last`."""
    columns = zip(*([r[key] for r in runs[:last]] for runs in found.values()), strict=True)
    return max(max(column) - min(column) for column in columns)


def speed(
    console: Console, title: str, sides: dict[str, Any], rounds: int, equal: bool, checks: list
) -> dict[str, Any]:
    data = sequences(equal=equal)
    tokens, longest = sum(s.length for s in data), max(s.length for s in data)
    found = take_turns(sides, rounds)
    result = compare(found, "seconds", per=tokens)
    table = Table("side", "layout", "padding", "trained tokens/s", "first / this (rounds)", title=title)
    for name, runs in found.items():
        padding = runs[0]["tokens_padding"] / (runs[0]["tokens_padding"] + tokens)
        rate, ratio = f"{result['medians'][name]:.0f}", ratio_text(result, name)
        table.add_row(name, runs[0]["layout"], f"{padding:.0%}", rate, ratio)
    differences = {key: spread(found, key, last) for key, last in checks}
    shown = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
    table.caption = f"{COUNT} sequences, {tokens} tokens, mean/max {tokens / COUNT / longest:.2f}; differences: {shown}"
    console.print(table)
    first = {name: {k: v for k, v in runs[0].items() if k != "seconds"} for name, runs in found.items()}
    return {"tokens": tokens, "longest": longest, **result, "differences": differences, "first_step": first}


def packing(console: Console, rounds: int, path: str) -> dict[str, Any]:
    packed, padded = (settings(path, learner={"packing": choice}) for choice in ("always", "never"))
    sides = {
        "packed": (learner_side, (packed, False, False)),
        "padded, sorted by length": (learner_side, (padded, False, False)),
        "padded, as they come": (learner_side, (padded, False, True)),
    }
    checks = [("policy_loss", None), ("policy_entropy", None), ("grad_norm_lora", None)]
    return speed(console, "packing: a learner step, hybrid 10 %", sides, rounds, False, checks)


def trl(console: Console, rounds: int, path: str) -> dict[str, Any]:
    config, results = settings(path, adaptation="lora"), {}
    for name, equal in (("ragged", False), ("equal lengths", True)):
        sides = {"hybrid-rl": (learner_side, (config, equal, False)), "TRL": (trl_side, (config, equal))}
        title = f"trl: an update, LoRA on all linear layers, {name}"
        results[name] = speed(console, title, sides, rounds, equal, [("policy_loss", 1), ("trained", 1)])
    return results


def logits(console: Console, rounds: int, _: str) -> dict[str, Any]:
    kinds = ("hybrid-rl", "log_softmax", "TRL, selective_log_softmax", "TRL, fused head")
    found = take_turns({kind: (logits_side, (kind,)) for kind in kinds}, rounds)
    memory, seconds = compare(found, "bytes"), compare(found, "seconds")
    ours, off = found["hybrid-rl"][0], {}
    columns = ("side", "peak MiB", "ours / this", "seconds", "ours / this", "off by: log-probability, gradient")
    table = Table(*columns, title=f"logits: 2,048 completion tokens, vocabulary {LARGE_VOCABULARY:,}")
    for kind in kinds:
        there = found[kind][0]
        worst = max(abs(a - b) for a, b in zip(ours["logprobs"], there["logprobs"], strict=True))
        gradient = math.dist(ours["gradient"], there["gradient"]) / math.hypot(*ours["gradient"])
        off[kind] = {"logprob": worst, "gradient": gradient, "entropy": abs(ours["entropy"] - there["entropy"])}
        figures = (f"{memory['medians'][kind] / 2**20:.0f}", ratio_text(memory, kind))
        times = (f"{seconds['medians'][kind]:.2f}", ratio_text(seconds, kind))
        table.add_row(kind, *figures, *times, f"{worst:.1e}, {gradient:.1e}")
    console.print(table)
    return {"bytes": memory, "seconds": seconds, "off": off}


def memory(console: Console, _: int, path: str) -> dict[str, Any]:
    wide, kinds = path + "_wide", ("masters", "moments", "gradients")
    make_model(wide, hidden=1024, layers=2, heads=16)
    plans = ("full", "lora", "hybrid")
    configs = {p: settings(wide, adaptation=p, model={"dtype": "bfloat16"}, lora={"rank": 16}) for p in plans}
    found = {k: v[0] for k, v in take_turns({p: (memory_side, (c,)) for p, c in configs.items()}, 0).items()}
    totals = {plan: sum(found[plan]["held"][kind] for kind in kinds) for plan in plans}
    table = Table("plan", "trained", *(f"{k}, MiB" for k in kinds), "sum", "by formula", "/ full", "other", "bucket")
    table.title = "memory: what DeepSpeed holds at a step (bfloat16, ZeRO-2, one rank)"
    table.caption = "bucket: DeepSpeed's buffer for gradients on their way, allocated while a backward pass runs"
    for plan, run in found.items():
        sizes = [run["held"][kind] for kind in kinds]
        row = [f"{size / 2**20:.1f}" for size in (*sizes, totals[plan], sum(run["formula"].values()))]
        rest = [f"{run['held'][kind] / 2**20:.0f}" for kind in ("other", "bucket")]
        table.add_row(plan, f"{run['trained']:,}", *row, f"{totals[plan] / totals['full']:.3f}", *rest)
    console.print(table)
    return {"plans": found, "ratio": {plan: totals[plan] / totals["full"] for plan in plans}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"packing": packing, "logits": logits, "trl": trl, "memory": memory}
    parser.add_argument("part", nargs="?", choices=[*parts, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    console, results, loads = Console(width=130), {}, [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="learner_") as scratch:
        path = str(Path(scratch) / "model")
        make_model(path, hidden=512, layers=4, heads=8)
        build_tokenizer().save_pretrained(path)  # TRL wants one
        for name in parts if options.part == "all" else [options.part]:
            results[name] = parts[name](console, options.rounds, path)
            loads.append(os.getloadavg()[0])
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    about = {
        "rounds": options.rounds,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "load_averages": loads,
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }
    print(json.dumps(results | about))


if __name__ == "__main__":
    main()
