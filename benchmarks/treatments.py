"""The quick start with each treatment: held-out accuracy before and after, what is trained, sent and spent.

    python benchmarks/treatments.py [--treatments molf,matryoshka] [--seeds 0] [--out DIR]

Whole runs of `configs/quickstart.yaml`, one after another (Ray, vLLM engines, DeepSpeed ranks), that differ in
`adaptation` alone, with the learning rates of the file: nobody's has been searched for, so that the table shows that a
treatment learns, not which is best. Runs that are there already under `--out` are not made again. The last line of
output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import read_metrics

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
TREATMENTS = "hybrid,lora,full,molf,molf_efficient,matryoshka,dora"


def run(treatment: str, seed: int, out: Path) -> dict[str, Any]:
    """One run's figures."""
    directory = out / f"{treatment}-{seed}"
    if not (directory / "summary.json").exists() or "eval_after" not in _summary(directory):
        overrides = [f"adaptation={treatment}", f"seed={seed}", f"run.dir={directory}", "tracking.wandb=disabled"]
        subprocess.run([sys.executable, "-m", "hybrid_rl.cli", "train", str(CONFIG), *overrides], check=True)
    summary, rows = _summary(directory), read_metrics(directory / "metrics.jsonl")
    return {
        "treatment": treatment,
        "seed": seed,
        "before": summary["eval_before"]["eval/accuracy"],
        "after": summary["eval_after"]["eval/accuracy"],
        "trained": AdaptationPlan.load(directory / "plan.json").totals["trainable_params"],
        "bytes": fmean(row["sync/bytes"] for row in rows),
        "verified": all(row["sync/verified_engines"] == 2 for row in rows),
        "step": fmean(row["time/step"] - row["time/eval"] - row["time/checkpoint"] for row in rows[2:]),
        "share": rows[-1].get("molf/weight_share"),
    }


def _summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--treatments", default=TREATMENTS)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path, default=Path("runs/treatments"))
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    found = [
        run(treatment, int(seed), options.out)
        for treatment in options.treatments.split(",")
        for seed in options.seeds.split(",")
    ]
    base = fmean(r["step"] for r in found if r["treatment"] == found[0]["treatment"])
    table = Table("treatment", "seed", "before", "after", "points", "trained", "KB a step", "verified", "step, ratio")
    for r in found:
        points = 100 * (r["after"] - r["before"])
        table.add_row(
            *(r["treatment"], str(r["seed"]), f"{r['before']:.3f}", f"{r['after']:.3f}", f"{points:+.1f}"),
            *(f"{r['trained']:,}", f"{r['bytes'] / 1e3:.0f}", str(r["verified"]), f"{r['step'] / base:.2f}"),
        )
    console.print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
