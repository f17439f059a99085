"""How a step's seconds grow with the model, the group, the completions and the ranks, against TRL's GRPOTrainer.

    python benchmarks/growth.py [--steps 10] [--only model]

Each row changes one thing of `BASE`; both sides run it one after the other, with the same prompts, reward and LoRA on
every linear layer (ours: a plan without full matrices), from random policies, whose completions mostly run to the
limit. Ours is one process with the transformers engine; with several ranks, Ray actors with as many engines. TRL has as
many data-parallel processes as ranks. Every process has one OpenMP thread. Figures are median seconds of a step,
without the first `WARM_UP`; the last line of output is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from trl_sides import SMALL, Side, run_trl
from trl_step import WARM_UP, run_ours

from hybrid_rl.config import WarmStartConfig

REWARD = '''
def spread(completions, **columns):
    """Differs within nearly every group, so that all of it is trained on."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]
'''
LR = 1e-4


@dataclass(frozen=True)
class Cell:
    """What a row of the table runs."""

    hidden: int = 128
    layers: int = 4
    prompts: int = 8
    group: int = 8
    completion: int = 16
    ranks: int = 1


BASE = Cell()
ROWS = {
    "base": [BASE],
    "model": [replace(BASE, hidden=256, layers=6), replace(BASE, hidden=512, layers=8)],
    "group": [replace(BASE, group=16), replace(BASE, group=32)],
    "completion": [replace(BASE, completion=64), replace(BASE, completion=128)],
    "ranks": [replace(BASE, ranks=2)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", choices=list(ROWS), action="append", help="rows of these kinds alone")
    options = parser.parse_args()
    if options.steps <= WARM_UP + 2:
        parser.error(f"--steps must be more than {WARM_UP + 2}")
    console = Console(soft_wrap=True)
    loads, found = [os.getloadavg()[0]], []
    title = "seconds of a step"
    table = Table(
        "what", "hidden x layers", "prompts x group", "tokens", "ranks", "ours", "TRL", "TRL / ours", title=title
    )
    with tempfile.TemporaryDirectory(prefix="growth_") as scratch:
        cells = [(what, cell) for what in options.only or ROWS for cell in ROWS[what]]
        for number, (what, cell) in enumerate(cells):
            place = Path(scratch) / str(number)
            place.mkdir()
            ours, trl = measure(cell, options.steps, place)
            loads.append(os.getloadavg()[0])
            found.append({"what": what, **asdict(cell), "ours": ours, "trl": trl})
            shape = (f"{cell.hidden} x {cell.layers}", f"{cell.prompts} x {cell.group}", f"{cell.completion}")
            table.add_row(what, *shape, f"{cell.ranks}", f"{ours:.3f}", f"{trl:.3f}", f"{trl / ours:.2f}")
            console.print(f"{what} {' '.join(shape)} {cell.ranks}: ours {ours:.3f}, TRL {trl:.3f}")
    console.print(table)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cores = len(os.sched_getaffinity(0))
    print(json.dumps({"rows": found, "steps": options.steps, "date": date, "cores": cores, "load_averages": loads}))


def measure(cell: Cell, steps: int, place: Path) -> tuple[float, float]:
    """Median seconds of a step: ours, TRL's."""
    from trainers.warm_start import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    shape = WarmStartConfig(hidden_size=cell.hidden, layers=cell.layers, heads=cell.hidden // 32, kv_heads=2)
    build_model(shape, tokenizer).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    (place / "spread.py").write_text(REWARD, encoding="utf-8")
    shared = {
        "model": {"path": str(place / "model")},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "max_prompt_length": 16},
        "sampling": {"max_completion_length": cell.completion},
        "batch": {"prompts": cell.prompts, "num_generations": cell.group},
        "rewards": [{"plugin": f"{place / 'spread.py'}:spread"}],
        "steps": steps,
        "plan": {"score": "random", "budget": {"ratio": 0}},
        "lora": {"rank": 8, "lr": LR},
        "tracking": {"wandb": "disabled"},
    }
    config = place / "config.yaml"
    config.write_text(json.dumps(shared), encoding="utf-8")  # which is YAML too
    several = ("rollout.engine=transformers", f"learner.world_size={cell.ranks}", f"rollout.engines={cell.ranks}")
    layout = SMALL if cell.ranks == 1 else (*several, "sync.adapter=merged")
    ours = run_ours(str(config), steps, layout, place / "ours", 1)
    trl = run_trl(str(config), [], Side(LR, processes=cell.ranks), place / "trl")
    periods = [b - a for a, b in itertools.pairwise(trl.ends)][WARM_UP - 1 :]
    return median(ours.step_seconds), median(periods)


if __name__ == "__main__":
    main()
