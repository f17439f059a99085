"""Memory that a learner rank takes against what `hybrid-rl estimate` says, on a CPU.

    python benchmarks/estimate.py [--sizes 30M 120M 350M] [--plans full lora hybrid] [--threshold BYTES]

Random Qwen3 models; a rank in a process of its own with one thread: load, check layouts, apply the plan, export, two
steps of two micro-batches, each with its export. Measured is the process's largest resident memory (VmHWM) above what
it had once it had imported everything; compared is the estimate without that part. `--threshold` is glibc's
MALLOC_MMAP_THRESHOLD_ in that process: as soon as a large block is freed, glibc raises its own threshold to up to
32 MiB, keeps blocks below it for itself, and the memory in use no longer says what is needed. 0: glibc as it is.
The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from learner_sides import make_model, peak_memory, reset_peak, settings
from rich.console import Console
from rich.table import Table

SIZES = {
    "30M": {"hidden": 384, "layers": 10, "heads": 6},
    "120M": {"hidden": 768, "layers": 14, "heads": 12},
    "350M": {"hidden": 1024, "layers": 25, "heads": 16},
}
VOCABULARY, LENGTH, TOKENS = 32_000, 256, 1024
"""Tokens of a sequence, and of a micro-batch."""
MICRO_BATCHES = 2


def configured(path: str, adaptation: str) -> Any:
    return settings(
        path,
        adaptation=adaptation,
        batch={"tokens_per_micro_batch": TOKENS},
        data={"train": "none", "eval": "none", "max_prompt_length": LENGTH // 2},
        sampling={"max_completion_length": LENGTH // 2},
        checkpoint={"background": False},  # nothing is saved here
        algo={"old_logprobs": "learner"},
    )


def draft(config: Any, anatomy: Any) -> Any:
    from hybrid_rl.plan_building import configured_plan, select_candidates

    sizes = {c.name: float(c.params) for c in select_candidates(anatomy, config.plan)}
    return configured_plan(anatomy, config, sizes, {})


def measured(path: str, adaptation: str) -> dict[str, float]:
    """Peaks by phase, in this process."""
    import torch

    torch.set_num_threads(1)
    from hybrid_rl.cluster.inline import Memory, free_port
    from hybrid_rl.learner.assemble import mini_batches
    from hybrid_rl.learner.worker import LearnerWorker
    from hybrid_rl.types import TrainSequence

    class Sent(Memory):
        """What is put is on its way: into Ray's object store, it would be."""

        def put(self, payload: bytes, what: str) -> int:
            return 0

    config, draw, found = configured(path, adaptation), random.Random(0), {}
    before = peak_memory()

    def phase(name: str, action: Any) -> None:
        reset_peak()
        action()
        found[name] = max(found.get(name, 0), peak_memory() - before)

    worker = LearnerWorker(config, 0, Sent())
    phase("connect", lambda: worker.connect("127.0.0.1", free_port()))
    plan = draft(config, worker._anatomy)
    phase("build", lambda: worker.build(plan.to_json()))
    half = LENGTH // 2

    def tokens() -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(half))

    data = [
        TrainSequence(tokens(), tokens(), (-10.0,) * half, draw.gauss(0, 1))
        for _ in range(MICRO_BATCHES * TOKENS // LENGTH)
    ]
    for step in range(2):
        phase("export", lambda step=step: worker.export(step))
        phase("train", lambda: worker.train(mini_batches(data, config, {"full": 1.0, "lora": 1.0}, 1)))
    return found


def estimated(path: str, adaptation: str) -> dict[str, int]:
    """The estimate's parts, but for the memory of imports."""
    from hybrid_rl.components import read_model
    from hybrid_rl.estimate import IMPORTED, learner_memory
    from hybrid_rl.rehearsal import rehearse_pass
    from trainers.base_model import meta_model

    config = configured(path, adaptation)
    model = meta_model(config)
    anatomy = read_model(model)
    plan = draft(config, anatomy)
    passed = rehearse_pass(config, model, plan, [LENGTH - 1] * (TOKENS // LENGTH), TOKENS // 2)
    parts = learner_memory(config, anatomy, plan, passed, micro_batches=MICRO_BATCHES, gpu=False).host
    return parts | {"the process itself": parts["the process itself"] - IMPORTED["learner"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--plans", nargs="+", default=["full", "lora", "hybrid"])
    parser.add_argument("--threshold", type=int, default=2**20)
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "PLAN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(*options.measure)))
        return
    console, rows = Console(width=140), []
    table = Table("model", "plan", "estimate, MiB", "measured, MiB", "estimate / measured", "peak in", "largest parts")
    with tempfile.TemporaryDirectory(prefix="estimate_") as scratch:
        for size in options.sizes:
            path = str(Path(scratch) / size)
            make_model(path, **SIZES[size], vocab_size=VOCABULARY)
            for plan in options.plans:
                parts = estimated(path, plan)
                environment = {"MALLOC_MMAP_THRESHOLD_": str(options.threshold)} if options.threshold else {}
                done = subprocess.run(
                    [sys.executable, __file__, "--measure", path, plan],
                    env=os.environ | environment, capture_output=True, text=True, check=True,
                )  # fmt: skip
                phases = json.loads(done.stdout.splitlines()[-1])
                peak = max(phases, key=lambda name: phases[name])
                estimate, found = sum(parts.values()), phases[peak]
                largest = sorted(parts, key=lambda p: -parts[p])[:4]
                shown = ", ".join(f"{p} {parts[p] / 2**20:.0f}" for p in largest)
                ratio = estimate / found
                table.add_row(
                    size, plan, f"{estimate / 2**20:.0f}", f"{found / 2**20:.0f}", f"{ratio:.3f}", peak, shown
                )
                rows.append({"size": size, "plan": plan, "parts": parts, "phases": phases, "ratio": ratio})
    console.print(table)
    print(json.dumps({"threshold": options.threshold, "rows": rows}))


if __name__ == "__main__":
    main()
