"""A study's report as one HTML page. Names of methods and tasks reach it only through the template, which escapes them;
the page's own policy forbids scripts and anything from elsewhere besides."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import hybrid_rl.report
from hybrid_rl.files import write_atomically
from hybrid_rl.plain_text import visible
from hybrid_rl.redaction import scrub
from hybrid_rl.report import svg
from hybrid_rl.report.svg import Mark, Series
from hybrid_rl.study.analysis import PROBLEMS, Analysis, Arm, Comparison
from hybrid_rl.study.statistics import LEVEL
from hybrid_rl.study.tables import ARM_COLUMNS, COMPARISON_COLUMNS, arm_row, between, comparison_row, ranked

_HERE = Path(__file__).parent
_STYLE = Path(hybrid_rl.report.__file__).parent / "style.css"
_METRICS = {
    "accuracy": "share of problems answered right, one greedy answer each",
    "mean_at_k": "share of sampled answers that are right",
}
_ALIKE = 0.02
"""Relative difference in sampled tokens up to which a chart over tokens would show what that over steps does."""
_LONGEST_SETTINGS = 100_000


@dataclass(frozen=True)
class Table:
    """Rows of a heading cell and others; `notes` stand below the headings of their rows."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """What a task's arms reached on one set of held-out problems."""

    name: str
    forest: Markup
    arms: Table
    differences: Markup | None
    comparisons: Table | None


@dataclass(frozen=True)
class Drawn:
    title: str
    unit: str
    picture: Markup
    names: Sequence[str]


def write_study_report(analysis: Analysis, path: Path) -> None:
    """Write the report to `path`, whole or not at all."""
    write_atomically(path, render_study(analysis))


def render_study(analysis: Analysis) -> str:
    """The report as HTML, without secrets of the environment."""
    study, style = analysis.study, _STYLE.read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = _text
    page = environment.get_template("page.html.j2").render(
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        title=study.title or study.dir,
        plain=_plain(analysis),
        settled=[_settled(analysis, c) for c in analysis.comparisons if c.significant],
        unsettled=[_unsettled(analysis, c) for c in analysis.comparisons if not c.significant],
        remarks=analysis.remarks,
        facts=_facts(analysis),
        outcomes=list(_outcomes(analysis)),
        curves=list(_curves(analysis)),
        sweep=_sweep(analysis),
        power=_power(analysis),
        areas=_areas(analysis),
        stability=_stability(analysis),
        effect=f"{100 * study.effect:g}",
        study=study,
        settings=yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        longest=_LONGEST_SETTINGS,
        colours=svg.COLOURS,
    )
    return scrub(page)


def _text(value: Any, limit: int | None = None) -> str:
    return visible(str(value), limit)


def place(analysis: Analysis, task: str, held_out: str) -> str:
    """How a task's set of problems is called: by what there are several of."""
    parts = [task] if len(analysis.study.tasks) > 1 else []
    return ", ".join([*parts, held_out or "held-out"])


def _plain(analysis: Analysis) -> str:
    compared = analysis.comparisons
    if not compared:
        asked = "none of its comparisons has results" if analysis.study.compare else "it claims nothing to be better"
        return f"The study compares nothing: {asked}. What each arm reached is below."
    found = [c for c in compared if c.significant]
    every = "The one comparison is" if len(compared) == 1 else f"Of {len(compared)} comparisons, {len(found)} are"
    if len(compared) == 1 and not found:
        every = "The one comparison is not"
    against = [c for c in found if c.verdict == "worse"]
    text = (
        f"{every} significant at the {100 * (1 - LEVEL):.0f} % level, after Holm's correction for testing all of them."
    )
    if against:
        text += f" {len(against)} of these went against the claim."
    if open_ := len(compared) - len(found):
        text += (
            f" {open_} {'is' if open_ == 1 else 'are'} not settled: these runs do not tell whether the methods differ, "
            "which is no evidence that they are alike."
        )
    return text


def _settled(analysis: Analysis, c: Comparison) -> str:
    where = place(analysis, c.task, c.held_out)
    against = ", against the claim" if c.verdict == "worse" else ""
    return (
        f"{c.better} is {c.verdict} than {c.worse} on {where}{against}: {between(c.difference, 100, '+.1f')} points, "
        f"p {c.adjusted:.2g} after Holm."
    )


def _unsettled(analysis: Analysis, c: Comparison) -> str:
    text = (
        f"{c.better} against {c.worse} on {place(analysis, c.task, c.held_out)}: "
        f"{between(c.difference, 100, '+.1f')} points, p {c.adjusted:.2g} after Holm."
    )
    if c.needed:
        needed = c.needed[c.problems]
        text += (
            f" To find {100 * analysis.study.effect:g} points on {c.problems:,} problems, "
            f"{f'{needed} seeds are' if needed is not None else 'more than 1000 seeds would be'} needed; "
            f"there {'was' if c.seeds == 1 else 'were'} {c.seeds}."
        )
    return text


def _facts(analysis: Analysis) -> list[tuple[str, str]]:
    study = analysis.study
    wanted = len(study.methods) * len(study.tasks) * len(study.seeds)
    facts = [
        ("methods", ", ".join(study.methods)),
        ("pools of methods", "; ".join(f"{name}: {', '.join(of)}" for name, of in study.pools.items())),
        ("tasks", ", ".join(study.tasks)),
        ("seeds", f"{len(study.seeds)}: {', '.join(map(str, study.seeds))}"),
        ("reported on", ", ".join(name or "held-out" for name in study.report_on)),
        ("metric", f"{study.metric}: {_METRICS[study.metric]}"),
        ("rates chosen on", study.choose_on),
        ("base configuration", study.base),
        ("runs with a result", f"{analysis.runs} (methods x tasks x seeds: {wanted})"),
    ]
    facts += [(name, ", ".join(versions)) for name, versions in analysis.versions.items()]
    return [(what, value) for what, value in facts if value]


def _outcomes(analysis: Analysis) -> Iterator[Outcome]:
    study = analysis.study
    for task, arms in analysis.tasks.items():
        for held_out in study.report_on if arms else ():
            best = ranked(arms, held_out)
            name = place(analysis, task, held_out)
            marks = [_mark(arm.name, arm.scores[held_out], between(arm.scores[held_out])) for arm in best]
            compared = [c for c in analysis.comparisons if (c.task, c.held_out) == (task, held_out)]
            differences = [
                _mark(f"{c.better} - {c.worse}", c.difference, between(c.difference, 100, "+.1f"), 100.0, c.significant)
                for c in compared
            ]
            yield Outcome(
                name=name,
                forest=svg.forest(f"{study.metric} on {name}", marks),
                arms=Table(
                    f"Arms, {name}",
                    ARM_COLUMNS,
                    [arm_row(arm, held_out) for arm in best],
                    [arm.also for arm in best],
                ),
                differences=svg.forest(f"Differences on {name}", differences, "points", zero=True)
                if compared
                else None,
                comparisons=Table(
                    f"Comparisons, {name}", COMPARISON_COLUMNS[:-1], [comparison_row(c)[:-1] for c in compared]
                )
                if compared
                else None,
            )


def _mark(name: str, estimate: Any, told: str, scale: float = 1.0, filled: bool = True) -> Mark:
    return Mark(name, scale * estimate.value, scale * estimate.low, scale * estimate.high, told, filled)


def _curves(analysis: Analysis) -> Iterator[Drawn]:
    """Validation scores, as many arms a chart as there are colours."""
    study = analysis.study
    metric = f"{study.choose_on}/{study.metric}"
    for task, arms in analysis.tasks.items():
        shown = [arm for arm in arms if any(metric in point for point in arm.curve)]
        name = place(analysis, task, study.choose_on)
        ends = [_sampled(arm) for arm in shown]
        axes = ["step"] + ["sampled tokens"] * (bool(ends) and max(ends) > (1 + _ALIKE) * min(ends))
        for start in range(0, len(shown), svg.COLOURS):
            part = shown[start : start + svg.COLOURS]
            counted = f", arms {start + 1} to {start + len(part)} of {len(shown)}" if len(shown) > svg.COLOURS else ""
            for along in axes:
                series = [_series(arm, metric, along) for arm in part]
                title = f"{name} by {along}{counted}"
                picture = svg.lines(f"{name}{counted}", series, "", along=along)
                yield Drawn(title, study.metric, picture, [arm.name for arm in part])


def _series(arm: Arm, metric: str, along: str) -> Series:
    """Tokens of the ranking come before the first step."""
    points = [point for point in arm.curve if metric in point]
    ahead = _sampled(arm) - arm.tokens
    steps = [p["step"] if along == "step" else p["tokens"] + ahead for p in points]
    return Series(arm.name, tuple(steps), tuple(p[metric] for p in points))


def _sampled(arm: Arm) -> float:
    """Tokens over the run, the ranking's counted as training steps' are."""
    return arm.tokens * (1 + arm.ranking_steps / arm.steps)


def _sweep(analysis: Analysis) -> Table | None:
    rows = []
    for (task, method), choice in analysis.choices.items():
        for rates, score in choice.tried:
            chosen = rates == choice.rates
            mark = ("chosen, at the end of the grid" if choice.at_edge else "chosen") if chosen else ""
            told = "no run ended" if score is None else f"{score:.3f}"
            rows.append([method, task, _rates(rates), told, mark])
    columns = ("method", "task", "rates", f"mean {analysis.study.choose_on} score", "")
    return Table("Rates tried", columns, rows) if rows else None


def _rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in rates.items())


def _power(analysis: Analysis) -> Table | None:
    rows = [
        [
            f"{c.better} - {c.worse}",
            place(analysis, c.task, c.held_out),
            *(_seeds(c.needed[problems]) for problems in PROBLEMS),
            f"{_seeds(c.needed[c.problems])} ({c.problems:,})",
        ]
        for c in analysis.comparisons
        if c.needed
    ]
    columns = ("difference", "on", *(f"{problems:,}" for problems in PROBLEMS), "as many as here")
    return Table("Seeds needed, by number of problems", columns, rows) if rows else None


def _seeds(needed: int | None) -> str:
    return "over 1000" if needed is None else str(needed)


def _areas(analysis: Analysis) -> Table | None:
    rows = [
        [name, place(analysis, task, held_out), ", ".join(map(str, analysis.study.curves[name].ranks)), between(area)]
        for (task, name, held_out), area in analysis.areas.items()
    ]
    return Table("Areas under scores by rank", ("curve", "on", "ranks", "AURAC"), rows) if rows else None


def _stability(analysis: Analysis) -> Table | None:
    rows = [
        [s.method, s.task, str(s.runs), f"{s.correlation:.2f}", f"{s.lowest:.2f}", f"{s.overlap:.0%}"]
        for s in analysis.stability
    ]
    columns = ("method", "task", "runs", "rank correlation", "lowest of a pair", "chosen in common")
    return Table("Rankings from run to run", columns, rows) if rows else None
