"""Throughput of generation beside training (`async.max_staleness=1`) against in turn, where both take as long.

    python benchmarks/overlap.py [--seconds 4] [--steps 8]

Whole runs of a tiny random model: Ray actors, receipts, checkpoints. A delay is put into the engine's and into the
learner's work, so that each takes `--seconds` a step, whatever else the machine does; of perfect overlap, twice the
throughput is to be expected. The first two steps are left out. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid_rl.config import WarmStartConfig
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner import worker
from hybrid_rl.rollout import transformers_engine
from hybrid_rl.run_directory import read_metrics
from hybrid_rl.types import Progress, Request
from trainers.grpo import train
from trainers.warm_start import build_model, build_tokenizer

PROMPTS = 8
WARM_UP = 2
REWARD = "def distinct(completions, **columns):\n    return [len(set(c)) + sum(map(ord, c)) % 7 for c in completions]\n"


def with_delay(seconds: float) -> None:
    """Make each step's generation and each step's training take `seconds` longer, in the actors."""

    class SlowEngine(transformers_engine.TransformersEngine):
        def advance(self, requests: Sequence[Request], cancelled: Sequence[str], slice_seconds: float) -> Progress:
            progress = super().advance(requests, cancelled, slice_seconds)
            trained = [name for name in progress.finished if name.startswith("train") or name.startswith("generate")]
            time.sleep(len(trained) * seconds / PROMPTS)
            return progress

    class SlowLearner(worker.LearnerWorker):
        def train(self, batch: Any) -> Any:
            time.sleep(seconds)
            return super().train(batch)

    transformers_engine.TransformersEngine = SlowEngine  # type: ignore[misc]
    worker.LearnerWorker = SlowLearner  # type: ignore[misc]


def measure(directory: Path, staleness: int, steps: int) -> dict[str, float]:
    """Seconds a step, and what was seen of staleness."""
    tree = {
        "model": {"path": str(directory / "model")},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "eval_size": 2, "max_prompt_length": 16},
        "sampling": {"max_completion_length": 4},
        "steps": steps,
        "batch": {"prompts": PROMPTS, "num_generations": 2},
        "plan": {"score": "random"},
        "learner": {"world_size": 1},
        "rollout": {"engine": "transformers"},
        "sync": {"gate": {"every": 0}},
        "eval": {"k": 0},
        "rewards": [{"plugin": f"{directory / 'reward.py'}:distinct"}],
        "tracking": {"wandb": "disabled"},
        "async": {"max_staleness": staleness},
        "run": {"dir": str(directory / f"staleness_{staleness}")},
    }
    run = train(parse_config(tree), name="overlap")
    rows = read_metrics(run.metrics)[WARM_UP:-1]  # the last one saves and evaluates
    return {
        "seconds_per_step": fmean(row["time/step"] for row in rows),
        "staleness_mean": fmean(row["staleness/mean"] for row in rows),
        "staleness_max": max(row["staleness/max"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    with_delay(options.seconds)
    found: dict[str, Any] = {"seconds": options.seconds, "steps": options.steps}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer = build_tokenizer()
        model = build_model(WarmStartConfig(hidden_size=64, layers=2, heads=2, kv_heads=1), tokenizer)
        for part in (model, tokenizer):
            part.save_pretrained(directory / "model")
        (directory / "reward.py").write_text(REWARD)
        for staleness in (0, 1):
            found[f"staleness_{staleness}"] = measure(directory, staleness, options.steps)
    turns, beside = found["staleness_0"], found["staleness_1"]
    found["speed_up"] = turns["seconds_per_step"] / beside["seconds_per_step"]
    table = Table("", "s a step", "mean staleness", "largest", title="Generation and training", title_justify="left")
    for what, row in (("in turn", turns), ("beside each other", beside)):
        table.add_row(what, f"{row['seconds_per_step']:.2f}", f"{row['staleness_mean']:.2f}", str(row["staleness_max"]))
    console = Console()
    console.print(table)
    console.print(f"{found['speed_up']:.2f} x the throughput (goal 1.8)")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
