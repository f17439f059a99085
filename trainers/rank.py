"""`hybrid-rl rank`: make a plan before the run, look at it, compare it with another."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.drawings import draw_plan
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import select_candidates
from hybrid_rl.plan_difference import compare_plans
from hybrid_rl.scoring import find_score
from hybrid_rl.screen import Bar
from hybrid_rl.tables import candidates_table, difference_table, plan_table, totals_table
from trainers.base_model import meta_model
from trainers.estimation import memory_table
from trainers.ranking import make_plan
from trainers.setup import check_plan, check_task, open_workplace
from trainers.sizing import Machine, size_up


def rank_modules(config: Config, console: Console | None = None) -> AdaptationPlan:
    """Rank the modules of `config.model` as `config.plan` says, and spend the budget.

    Starts the workers that the score needs and stops them again. Raises `ConfigError` before that for what cannot work.
    """
    if config.plan.given is not None:
        raise ConfigError(f"{config.plan.given} gives a finished plan, so there is nothing to rank; drop it")
    needs = find_score(config.plan.score).needs
    task = check_task(config)
    with Bar(console or Console(quiet=True)) as bar:
        if needs == "structure" or config.adaptation != "hybrid":
            return make_plan(config, task, None)
        bar.show("starting workers", 0, 1)
        with open_workplace(config, task, rollouts=needs != "weights") as workplace:
            return make_plan(config, task, workplace, bar.show)


def rank_command(config: Config, console: Console, *, out: Path, plot: Path | None, compare: Path | None) -> None:
    """Rank, save `out` and its heat map (beside it unless `plot` says where), print the tables."""
    other = AdaptationPlan.load(compare, "--compare") if compare else None
    image = plot or out.with_suffix(".png")
    for option, path in (("--out", out), ("--plot", image)):
        if not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: the directory {path.parent} does not exist")
    plan = rank_modules(config, console)
    plan.save(out)
    draw_plan(plan, image)
    console.print(plan_table(plan), totals_table(plan))
    if other is not None:
        console.print(difference_table(compare_plans(other, plan), str(compare)))
    console.print(f"plan      {out}\nheat map  {image}")


COMPARED = {
    "full": {"adaptation": "full"},
    "LoRA": {"adaptation": "lora"},
    "hybrid, by params": {"adaptation": "hybrid", "unit": "params"},
    "hybrid, by modules": {"adaptation": "hybrid", "unit": "modules"},
}
"""What a ranking would be spent on."""


def rank_dry_run(config: Config, console: Console) -> None:
    """Print what would be ranked, the budget and the memory it takes. Reads no weights and no data."""
    anatomy, _ = check_plan(config, meta_model(config))
    kinds = len(find_score(config.plan.score).kinds)
    console.print(candidates_table(config, anatomy, select_candidates(anatomy, config.plan), kinds))
    console.print(memory_table(size_up(config, Machine.of(config), compared=COMPARED, rehearse=False)))
