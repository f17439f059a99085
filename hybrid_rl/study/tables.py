"""What a study found, as text: Markdown, CSV, and tables for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from hybrid_rl.report.svg import figure
from hybrid_rl.study.analysis import PROBLEMS, Analysis, Arm, Comparison
from hybrid_rl.study.statistics import Estimate

_EDGE = " (edge)"
ARM_COLUMNS = (
    "arm",
    "seeds",
    "score",
    "of the gain",
    "trained",
    "optimizer",
    "synced",
    "tokens",
    "steps",
    "s",
    "rates",
)
COMPARISON_COLUMNS = ("better?", "than", "points", "p", "p, Holm", "seeds won", "verdict", "seeds needed")


def between(estimate: Estimate, scale: float = 1.0, form: str = ".3f") -> str:
    """`0.600 [0.580, 0.620]`"""
    value, low, high = (format(scale * x, form) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def arm_row(arm: Arm, held_out: str) -> list[str]:
    """By `ARM_COLUMNS`."""
    share = arm.recovered.get(held_out)
    return [
        arm.name,
        str(len(arm.seeds)),
        between(arm.scores[held_out]),
        f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]" if share is not None else "",
        f"{arm.trained:,.0f}",
        figure(arm.optimizer_bytes, "bytes"),
        figure(arm.synced_bytes, "bytes"),
        figure(arm.tokens * (1 + arm.ranking_steps / arm.steps)),
        f"{arm.steps:.0f}" + (f" + {arm.ranking_steps:.0f}" if arm.ranking_steps else ""),
        f"{arm.seconds:.0f}",
        arm.rates + _EDGE * arm.at_edge,
    ]


def comparison_row(found: Comparison) -> list[str]:
    """By `COMPARISON_COLUMNS`; the last is for as many problems as GSM8K has."""
    needed = found.needed.get(1319)
    return [
        found.better,
        found.worse,
        between(found.difference, 100, "+.1f"),
        f"{found.p:.2g}",
        f"{found.adjusted:.2g}",
        f"{found.wins} of {found.seeds}",
        found.verdict,
        "" if not found.needed else "over 1000" if needed is None else str(needed),
    ]


def markdown(analysis: Analysis) -> str:
    """All tables, with what they mean."""
    study = analysis.study
    parts = [f"# {study.title or study.dir}", *said(analysis)]
    for task, arms in analysis.tasks.items():
        for held_out in study.report_on:
            parts.append(f"## {task}, {held_out}: {study.metric} over {len(study.seeds)} seeds, 95 % intervals")
            parts.append(_markdown(ARM_COLUMNS, [arm_row(arm, held_out) for arm in ranked(arms, held_out)]))
            compared = [c for c in analysis.comparisons if (c.task, c.held_out) == (task, held_out)]
            if compared:
                parts.append(_markdown(COMPARISON_COLUMNS, [comparison_row(c) for c in compared]))
            areas = {n: e for (t, n, h), e in analysis.areas.items() if (t, h) == (task, held_out)}
            if areas:
                parts.append(_markdown(("AURAC", "area"), [[name, between(e)] for name, e in areas.items()]))
    if analysis.stability:
        title = (
            "## Rankings: rank correlation between runs, and share of the chosen matrices that two runs have in common"
        )
        parts.append(title)
        rows = [
            [s.task, s.method, f"{s.runs}", f"{s.correlation:.2f}", f"{s.lowest:.2f}", f"{s.overlap:.0%}"]
            for s in analysis.stability
        ]
        parts.append(_markdown(("task", "method", "runs", "mean", "lowest", "in common"), rows))
    needed = [c for c in analysis.comparisons if c.needed]
    if needed:
        parts.append(f"## Seeds needed to find {100 * study.effect:g} points, in 80 % of studies, by problems")
        columns = ("difference", *(f"{m:,}" for m in PROBLEMS))
        parts.append(
            _markdown(
                columns,
                [[f"{c.better} - {c.worse}", *(str(c.needed[m] or "over 1000") for m in PROBLEMS)] for c in needed],
            )
        )
    return "\n\n".join(parts) + "\n"


def said(analysis: Analysis) -> list[str]:
    """In words: what was found, what was not, and what to keep in mind."""
    found = [c for c in analysis.comparisons if c.significant]
    open_ = [c for c in analysis.comparisons if not c.significant]
    lines = []
    for c in found:
        other = f"{c.worse} on {c.task}, {c.held_out}"
        lines.append(f"- **{c.better} is {c.verdict} than {other}**: {between(c.difference, 100, '+.1f')} points.")
    for c in open_:
        lines.append(
            f"- Not settled: {c.better} against {c.worse} on {c.task}, {c.held_out}: "
            f"{between(c.difference, 100, '+.1f')} points, p {c.adjusted:.2g} after Holm's correction."
        )
    lines += [f"- Note: {remark}." for remark in analysis.remarks]
    return ["\n".join(lines)] if lines else []


def ranked(arms: Sequence[Arm], held_out: str) -> list[Arm]:
    """The best first."""
    return sorted(arms, key=lambda arm: -arm.scores[held_out].value)


def arms_csv(analysis: Analysis) -> str:
    """A line an arm, task and set, in plain numbers: bytes, tokens, seconds."""
    columns = ("task", "set", "arm", "seeds", "mean", "low", "high", "recovered", "recovered_low", "recovered_high")
    more = ("trained", "optimizer_bytes", "synced_bytes", "tokens", "steps", "ranking_steps", "seconds")
    rows = []
    for task, arms in analysis.tasks.items():
        for held_out in analysis.study.report_on:
            for arm in arms:
                e, r = arm.scores[held_out], arm.recovered.get(held_out)
                share = (r.value, r.low, r.high) if r is not None else ("", "", "")
                rest = [getattr(arm, name) for name in more]
                rows.append(
                    [task, held_out, arm.name, len(arm.seeds), e.value, e.low, e.high, *share, *rest, arm.rates]
                )
    return _csv([*columns, *more, "rates"], rows)


def comparisons_csv(analysis: Analysis) -> str:
    """A line a comparison; differences in shares, not points."""
    columns = ("task", "set", "better", "worse", "difference", "low", "high", "p", "p_holm", "wins", "seeds", "verdict")
    rows = [
        (
            c.task,
            c.held_out,
            c.better,
            c.worse,
            c.difference.value,
            c.difference.low,
            c.difference.high,
            c.p,
            c.adjusted,
            c.wins,
            c.seeds,
            c.verdict,
        )
        for c in analysis.comparisons
    ]
    return _csv(columns, rows)


def terminal_tables(analysis: Analysis) -> list[Table]:
    tables = []
    for task, arms in analysis.tasks.items():
        for held_out in analysis.study.report_on:
            title = f"{task}, {held_out}: {analysis.study.metric}, 95 % intervals"
            shown = ("arm", "seeds", "score", "of the gain", "trained", "synced", "s", "rates")
            places = [ARM_COLUMNS.index(name) for name in shown]
            rows = [[row[i] for i in places] for row in (arm_row(arm, held_out) for arm in ranked(arms, held_out))]
            tables.append(_terminal(title, shown, rows))
            compared = [c for c in analysis.comparisons if (c.task, c.held_out) == (task, held_out)]
            if compared:
                tables.append(
                    _terminal("Comparisons", COMPARISON_COLUMNS[:-1], [comparison_row(c)[:-1] for c in compared])
                )
    return tables


def _terminal(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
