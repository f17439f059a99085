"""Tables and pictures of plans and runs, against plans small enough to count by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hybrid_rl import drawings
from hybrid_rl.drawings import draw_plan, draw_routing
from hybrid_rl.learner.engine import Update
from hybrid_rl.learner.update import _stepped, _update_metrics
from hybrid_rl.plan import AdaptationPlan, PlannedModule
from hybrid_rl.plan_difference import compare_plans
from hybrid_rl.plan_grid import routing_shares
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.tables import difference_table, plan_table, totals_table

MOLF = {"ranks": [2, 4], "rank_stabilised": True}
NESTED = {"ranks": [1, 2, 4], "scaling": "sqrt", "init": "paper", "loss": "sum"}


def module(name: str, treatment: str, rank: int | None = None, **more: Any) -> PlannedModule:
    """A matrix of 8 x 6."""
    known: dict[str, Any] = {"component": "mlp", "layer": 0, "score": None, "alpha": None, **more}
    return PlannedModule(name=name, shape=(8, 6), params=48, rank=rank, treatment=treatment, **known)


def plan_of(*modules: PlannedModule, **method: Any) -> AdaptationPlan:
    return AdaptationPlan("m", "attention-only", method, 0, modules)


MIXED = plan_of(
    module("l.0.up", "molf", 6, alpha=4.0, options=MOLF, score=3.0),
    module("l.0.down", "molf_efficient", 6, alpha=4.0, options=MOLF, score=2.0),
    module("l.0.gate", "matryoshka", 4, options=NESTED),
    module("l.0.norm", "full", extra=True, component="norm"),
)


def shown(table: Table) -> str:
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as captured:
        console.print(table)
    return " ".join(captured.get().split())


def test_tables_know_every_treatment():
    text = shown(plan_table(MIXED))
    assert "molf r=2+4" in text
    assert "molf_efficient r=2+4" in text
    assert "matryoshka r=4" in text
    # 48 of the molf weight, 48 extra, 2 x 6 x (8 + 6) of MoLF's pairs, 4 x (8 + 6) of the nested one
    assert f"{48 + 48 + 168 + 56} trainable parameters" in text
    assert "0 of 3 matrices full (0.0% of their parameters) and 1 more beside the candidates, 0 frozen" in text
    assert "1 molf, 1 molf_efficient" in text
    assert "1 more by plan.also_full" in shown(plan_table(replace(MIXED, method={"also_full": ["*norm"]})))
    table = totals_table(MIXED)
    columns = [str(c.header) for c in table.columns]
    assert columns == [
        *("component", "matrices", "parameters", "full", "frozen", "matryoshka", "molf", "molf_efficient"),
        *("full parameters", "adapter parameters"),
    ]
    rows = list(zip(*(c.cells for c in table.columns), strict=True))
    assert rows == [
        ("mlp", "3", "144", "0", "0", "1", "1", "1", "48 (33.3%)", "224"),
        ("norm", "1", "48", "1", "0", "0", "0", "0", "48 (100.0%)", "0"),
    ]


def test_a_heat_map_says_what_its_outlines_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = _drawn(monkeypatch)
    draw_plan(MIXED, tmp_path / "plan.png")
    assert "weight trained (outlined)" in figures[0].axes[0].get_title()
    assert len(figures[0].axes[0].patches) == 2  # the molf one and the norm


def _drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are made from here on."""
    figures: list[Figure] = []
    subplots = drawings.plt.subplots

    def keep(*args: Any, **options: Any) -> Any:
        made = subplots(*args, **options)
        figures.append(made[0])
        return made

    monkeypatch.setattr(drawings.plt, "subplots", keep)
    return figures


def test_plans_that_differ_by_more_than_rank():
    one = plan_of(
        module("a", "lora", 8, alpha=16.0),
        module("b", "lora", 8, alpha=16.0),
        module("c", "matryoshka", 4, options=NESTED),
        module("d", "molf", 6, alpha=4.0, options=MOLF),
        module("e", "lora", 8, alpha=16.0),
    )
    two = plan_of(
        module("a", "lora", 8, alpha=32.0),
        module("b", "lora", 4, alpha=16.0),
        module("c", "matryoshka", 4, options={**NESTED, "loss": "sampled", "ranks": [2, 4]}),
        module("d", "full"),
        module("e", "lora", 8, alpha=16.0),
    )
    difference = compare_plans(one, two)
    assert difference.moved == (
        ("a", "lora r=8, alpha=16.0", "lora r=8, alpha=32.0"),
        ("b", "lora r=8", "lora r=4"),
        ("c", "matryoshka r=4, ranks=[1, 2, 4], loss=sum", "matryoshka r=4, ranks=[2, 4], loss=sampled"),
        ("d", "molf r=2+4", "full"),
    )
    assert (difference.same_full, difference.full_overlap) == (1, 1.0)
    text = shown(difference_table(difference, "other"))
    assert "4 modules treated otherwise" in text
    assert "weight trained in both: 1 (100% of those trained in either)" in text


def updates() -> list[Update]:
    """Three that stepped two of three experts each (the last of `l.0.down` has no weight), one that was skipped."""
    chosen = (
        {"l.0.up": (True, True, False), "l.0.down": (True, True)},
        {"l.0.up": (True, False, True), "l.0.down": (True, True)},
        {"l.0.up": (True, True, False), "l.0.down": (True, True)},
    )
    made = [Update(True, {"full/mlp": 1.0}, {"full/mlp": 1.0}, selections) for selections in chosen]
    return [*made, Update(False, {"full/mlp": 1.0}, {"full/mlp": 0.0})]


def test_metrics_tell_the_weight_from_the_lora_experts():
    """Also where modules with and without it are mixed."""
    metrics = {k: v for k, v in _update_metrics(updates(), {"l.0.up"}).items() if k.startswith("molf/")}
    assert metrics == {
        "molf/weight_share": 1.0,
        "molf/expert_1_share": pytest.approx((2 + 3) / 6),
        "molf/expert_2_share": pytest.approx((1 + 3) / 6),
    }
    alone = _update_metrics([replace(u, selections={}) for u in updates()], set())
    assert not any(name.startswith("molf/") for name in alone)


def test_routing_is_in_shares_of_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunDirectory(tmp_path)
    assert run.read_routing() == {}
    figures = _drawn(monkeypatch)
    draw_routing(run, MIXED)
    assert not figures
    stepped = _stepped(updates())
    assert stepped == {"l.0.up": (3, 2, 1), "l.0.down": (3, 3)}
    run.write_routing(1, 3, stepped)
    run.write_routing(2, 5, {"l.0.up": (0, 5, 5), "l.0.down": (5, 5)})
    run.write_routing(2, 1, {"l.0.up": (0, 1, 1), "l.0.down": (1, 1)})  # done again after a restart
    with run.routing.open("a") as file:
        file.write('{"step": 3, "upd')  # and then killed
    assert run.read_routing() == {
        1: (3, {"l.0.up": [3, 2, 1], "l.0.down": [3, 3]}),
        2: (1, {"l.0.up": [0, 1, 1], "l.0.down": [1, 1]}),
    }
    shares, steps = routing_shares(run, MIXED)
    assert steps == 2
    assert shares == {
        "l.0.up": {"weight": 0.75, "expert_1": 0.75, "expert_2": 0.5},
        "l.0.down": {"expert_1": 1.0, "expert_2": 1.0},
    }
    draw_routing(run, MIXED)
    assert run.routing_image.stat().st_size > 5000
    panels = [axes for axes in figures[0].axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["weight", "LoRA expert 1", "LoRA expert 2"]
    down, up = (panels[0].get_images()[0].get_array()[0][i] for i in (1, 0))  # type: ignore[index]
    assert sorted([str(down), str(up)]) == ["--", "0.75"]  # the module without a weight is left blank
