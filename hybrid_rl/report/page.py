"""The report as one HTML page. Text from a run reaches it only through the template, which escapes it; the page's own
policy forbids scripts and anything from elsewhere besides."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hybrid_rl.charts import CHARTS, Chart
from hybrid_rl.files import write_atomically
from hybrid_rl.plain_text import span, visible
from hybrid_rl.plan import AdaptationPlan, by, treatment_label
from hybrid_rl.redaction import scrub
from hybrid_rl.report import svg
from hybrid_rl.report.contents import Contents, read_contents
from hybrid_rl.report.svg import Series, figure
from hybrid_rl.treatments import TREATMENTS

_HERE = Path(__file__).parent
_MOST_SERIES = 16
_TABLE_ROWS = 40
_LONGEST = 4000
"""Characters of a prompt or completion."""
_LONGEST_SETTINGS = 100_000
_MODULES = 20


@dataclass(frozen=True)
class Drawn:
    """A chart with its legend and its figures."""

    title: str
    unit: str
    picture: Markup
    names: list[str]
    table: list[list[str]]
    """A line a step: the step and each value."""
    left_out: int
    """Metrics that there was no room for."""


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Write the report of the run in `directory` to `out`, or to its `report.html`. Returns where it is.

    Raises `ConfigError` if `directory` holds no run.
    """
    contents = read_contents(directory)
    path = out or contents.run.report
    write_atomically(path, render(contents))
    return path


def render(contents: Contents) -> str:
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = _text
    page = environment.get_template("page.html.j2").render(
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        run=contents,
        name=contents.run.path.resolve().name,
        tiles=_tiles(contents),
        evaluation=_evaluation(contents),
        sections={name: charts for name, listed in CHARTS.items() if (charts := list(_drawn(contents, listed)))},
        times=_times(contents),
        sync=_sync(contents),
        heat_map=svg.heat_map(contents.plan) if contents.plan is not None else None,
        totals=_totals(contents.plan) if contents.plan is not None else [],
        modules=_modules(contents.plan) if contents.plan is not None else [],
        routing={
            expert.replace("expert_", "LoRA expert "): svg.routing_map(contents.plan, expert, stepped)
            for expert, stepped in contents.routing.items()
            if contents.plan is not None
        },
        longest=_LONGEST,
        colours=svg.COLOURS,
        settings=_text(contents.settings, _LONGEST_SETTINGS),
    )
    return scrub(page)


def _text(value: Any, limit: int | None = None) -> str:
    return visible(str(value), limit)


def _drawn(contents: Contents, charts: Iterable[Chart]) -> Iterable[Drawn]:
    names, alone = contents.names(), set()
    for chart in charts:
        all_series = [series for name in chart.among(names) if (series := contents.series(name)).steps]
        all_series = [series for series in all_series if any(series.values)]
        if not all_series:
            continue  # nothing there, or nothing but zeros: no fault occurred, no rank has such a part
        if len(all_series) == 1 and all_series[0].values in alone:
            continue  # a run's only reward is its whole reward
        alone.add(all_series[0].values)
        series = all_series[:_MOST_SERIES]
        if chart.stacked:
            picture = svg.stack(chart.title, series, chart.unit, summed=chart.counts)
        else:
            picture = svg.lines(chart.title, series, chart.unit)
        labels = _labels(chart, series)
        yield Drawn(chart.title, chart.unit, picture, labels, _table(series, chart), len(all_series) - len(series))


def _labels(chart: Chart, series: list[Series]) -> list[str]:
    """Names in the legend, without what they all begin and end with where a pattern stood."""
    names = [visible(each.name, 80) for each in series]
    if len(names) < 2:
        return names
    first = names[0]
    ahead = next((i for i in range(len(first)) if any(n[: i + 1] != first[: i + 1] for n in names)), 0)
    ahead = first[:ahead].rfind("/") + 1
    return [name[ahead:] for name in names]


def _table(series: list[Series], chart: Chart) -> list[list[str]]:
    thin = [
        dict(zip(each.steps, each.values, strict=True))
        for each in (s.thinned(_TABLE_ROWS, summed=chart.counts) for s in series)
    ]
    steps = sorted({step for each in thin for step in each})
    return [
        [f"{step:.0f}", *(figure(each[step], chart.unit) if step in each else "" for each in thin)] for step in steps
    ]


def _tiles(contents: Contents) -> list[tuple[str, str, str]]:
    """Name, figure, remark: what a person wants to know first."""
    rows, tiles = contents.rows, []
    held_out = contents.series("eval/accuracy")
    if held_out.values:
        change = f"{100 * (held_out.values[-1] - held_out.values[0]):+.1f} points since step {held_out.steps[0]:.0f}"
        tiles.append(("held-out accuracy", f"{held_out.values[-1]:.3f}", f"{change}, at step {held_out.steps[-1]:.0f}"))
    tiles.append(("steps", f"{contents.done}", f"of {contents.config.steps}"))
    if (wall := contents.summary.get("wall_seconds")) is not None:
        remark = f"{span(contents.summary['ranking_seconds'])} of it ranking; without start-up"
        tiles.append(("wall time", span(wall), remark))
    if seconds := sum(row["time/step"] for row in rows):
        generated = sum(row["tokens/generated"] for row in rows)
        tiles.append(("sampled tokens/s", f"{generated / seconds:,.0f}", f"{figure(generated)} tokens in all"))
    if contents.plan is not None:
        totals = contents.plan.totals
        share = totals["trainable_params"] / max(1, totals["candidate_params"])
        remark = f"{share:.1%} of the candidate matrices' size"
        tiles.append(("trainable parameters", figure(totals["trainable_params"]), remark))
    if sync := _sync(contents):
        tiles.append(("sent in a sync", f"{sync['share']:.1%}", "of the model's bytes, on average"))
    faults = sum(contents.faults.values())
    kinds = "1 kind" if len(contents.faults) == 1 else f"{len(contents.faults)} kinds"
    tiles.append(("faults survived", f"{faults}", f"{kinds}, below" if faults else "none"))
    return tiles


def _evaluation(contents: Contents) -> list[tuple[str, str, str, str]]:
    """Metric, before, after (or at the last evaluation), change."""
    before = contents.summary.get("eval_before", {})
    measured = [row for row in contents.rows if "eval/accuracy" in row]
    after = contents.summary.get("eval_after") or (measured[-1] if measured else {})
    found = []
    for name, value in before.items():
        if "/ci/" not in name:
            now = after.get(name)
            change = f"{now - value:+.3f}" if now is not None and now != value else ""
            told = "" if now is None else _interval(after, name)
            called = re.sub(r"_at_k$", f"_at_{contents.config.eval.k}", name.removeprefix("eval/"))
            found.append((visible(called), _interval(before, name), told, change))
    return found


def _interval(scores: dict[str, Any], name: str) -> str:
    where, _, metric = name.rpartition("/")
    if metric == "unscored":
        return f"{scores[name]:.0f}"
    low, high = (scores.get(f"{where}/ci/{metric}_{end}") for end in ("low", "high"))
    return f"{scores[name]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def _times(contents: Contents) -> tuple[Markup, list[tuple[str, str, str]]] | None:
    """A bar of where the run's seconds went; by part its seconds and share."""
    (chart,) = (chart for listed in CHARTS.values() for chart in listed if chart.stacked and not chart.counts)
    sums = {name: sum(row.get(name) or 0.0 for row in contents.rows) for name in chart.metrics}
    total = sum(sums.values())
    if not total:
        return None
    parts = {name.removeprefix("time/"): seconds for name, seconds in sums.items()}
    told = [(name, span(s) if s >= 1 else f"{s:.2f} s", f"{s / total:.1%}") for name, s in parts.items()]
    return svg.shares(parts), told


def _sync(contents: Contents) -> dict[str, Any]:
    """Bytes of weight updates over the run, beside those of sending the model each time."""
    rows = [row for row in contents.rows if row.get("sync/full_model_bytes")]
    sent, whole = (sum(row[name] for row in rows) for name in ("sync/bytes", "sync/full_model_bytes"))
    return {"sent": figure(sent, "bytes"), "whole": figure(whole, "bytes"), "share": sent / whole} if whole else {}


def _totals(plan: AdaptationPlan) -> list[tuple[str, str]]:
    there = [t for t in TREATMENTS if any(m.treatment == t for m in plan.modules)]
    counts = ", ".join(f"{plan.totals[f'{t}_modules']} {t}" for t in there)
    scored = plan.method.get("score")
    return [
        ("model", visible(plan.model)),
        ("kind", plan.topology),
        ("ranked by", visible(str(scored)) if scored else "no score"),
        ("matrices", counts),
        ("trainable parameters", f"{plan.totals['trainable_params']:,}"),
        ("plan", plan.hash),
    ]


def _modules(plan: AdaptationPlan) -> list[tuple[str, str, str, str]]:
    return [
        (visible(m.name), by(m.shape), "" if m.score is None else f"{m.score:.3g}", treatment_label(m))
        for m in plan.modules[:_MODULES]
    ]
