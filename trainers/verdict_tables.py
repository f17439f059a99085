"""Rewards on the terminal: their numbers, their scores, what failed and why, and where two of them differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

from hybrid_rl.reward.trial import Row, Verdict
from hybrid_rl.types import Outcome

T = TypeVar("T")
EXCERPT = 60
_SHOWN = 6
_BINS = 10
_WIDTH = 40


@dataclass(frozen=True)
class Disagreement:
    """A completion that two rewards score otherwise."""

    row: Row
    ours: Outcome
    theirs: Outcome

    @property
    def apart(self) -> float:
        """Difference of the scores; -1 where one has none."""
        a, b = self.ours.score, self.theirs.score
        return -1.0 if a is None or b is None else abs(a - b)


@dataclass(frozen=True)
class Change:
    """A completion of a run that is scored otherwise now."""

    row: Row
    saved: float
    new: Outcome

    @property
    def size(self) -> float:
        return abs(self.saved - (self.new.score or 0.0))


def verdict_table(summaries: Mapping[str, Mapping[str, Any]], source: str) -> Table:
    """What came of each plugin's trial on `source`, by the names that `--json` has."""
    table = Table("", title=_plain(f"Rewards on {source}"))
    for label in summaries:
        table.add_column(_plain(label), justify="right", overflow="fold")
    for name in ("n", "mean", "scored", "not_applicable", "timeout", "error", "crash"):
        table.add_row(name.replace("_", " "), *(_number(s[name]) for s in summaries.values()))
    table.add_row("seconds", *(f"{s['seconds']:.2f}" for s in summaries.values()))
    table.add_row("completions a second", *(_number(s["completions_per_second"]) for s in summaries.values()))
    table.add_row("a call is of", *(f"one {s['per']}" for s in summaries.values()))
    table.add_row("p50", *(_time(s["p50_seconds"]) for s in summaries.values()))
    table.add_row("p99", *(_time(s["p99_seconds"]) for s in summaries.values()))
    slow = [s["slowest"] for s in summaries.values()]
    table.add_row("slowest", *(f"{_time(s['seconds'])}, {s['at']}" if s else "-" for s in slow))
    captions = [_caption(label, s) for label, s in summaries.items()]
    table.caption = _plain("\n".join(filter(None, captions)))
    return table


def _caption(label: str, numbers: Mapping[str, Any]) -> str:
    """What it would have meant in training."""
    failed = sum(numbers[kind] for kind in ("timeout", "error", "crash"))
    if not failed:
        return ""
    late = numbers["not_asked"]
    said = f"{label} failed on {failed} of {numbers['n']} completions"
    said += f" ({late} were not tried: it had never ended in time before)" if late else ""
    if numbers["scored"] or numbers["not_applicable"]:
        return said + "; by default training leaves them out and counts them under faults/reward_*"
    return said + "; a run would stop with this cause"


def histogram(scores: Sequence[float], label: str) -> Table:
    """How often each score was given; by range, where there are many."""
    values = Counter(scores)
    bins: list[tuple[str, int]]
    if len(values) <= _BINS:
        bins = [(f"{value:g}", count) for value, count in sorted(values.items())]
    else:
        low, width = min(scores), (max(scores) - min(scores)) / _BINS
        counts = Counter(min(_BINS - 1, int((score - low) / width)) for score in scores)
        bins = [(f"{low + i * width:.3g} to {low + (i + 1) * width:.3g}", counts[i]) for i in range(_BINS)]
    table = Table("score", title=_plain(f"Scores of {label}"))
    table.add_column("completions", justify="right")
    table.add_column("", min_width=_WIDTH)
    most = max(count for _, count in bins)
    for name, count in bins:
        table.add_row(name, str(count), "█" * math.ceil(_WIDTH * count / most))
    return table


def metric_table(metrics: Mapping[str, float], label: str) -> Table:
    """Means of what the plugin measured itself."""
    table = Table("metric", title=_plain(f"Measured by {label}"))
    table.add_column("mean", justify="right")
    for name, value in metrics.items():
        table.add_row(_plain(f"reward/{label}/{name}"), f"{value:.4g}")
    return table


def failure_table(verdict: Verdict, rows: Sequence[Row], label: str) -> Table:
    """Why calls failed: each cause once, with the first completion it happened on."""
    first: dict[tuple[str, str], Row] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row, outcome in zip(rows, verdict.outcomes, strict=True):
        if outcome.failed:
            cause = outcome.kind, outcome.detail
            first.setdefault(cause, row)
            counts[cause] += 1
    table = Table("", "times", title=_plain(f"Failures of {label}"))
    for header in ("cause", "first at", "on"):
        table.add_column(header, overflow="fold")
    for (kind, detail), count in counts.most_common(_SHOWN):
        row = first[kind, detail]
        table.add_row(kind, str(count), _plain(detail), _plain(row.place), _plain(excerpt(row.completion)))
    if len(counts) > _SHOWN:
        table.caption = f"and {len(counts) - _SHOWN} other causes"
    return table


def disagreement_table(differing: Sequence[Disagreement], ours: str, theirs: str, both: int) -> Table:
    """How often two plugins differ, and the largest differences; `both`: completions that both score."""
    table = Table("at", title=_plain(f"Where {ours} and {theirs} differ"))
    answers = any("answer" in each.row.columns for each in differing[:_SHOWN])
    for header in (ours, theirs, *(["answer"] if answers else []), "completion"):
        table.add_column(_plain(header), overflow="fold")
    for each in _distinct(differing, lambda each: each.row):
        cells = [outcome_label(each.ours), outcome_label(each.theirs)]
        cells += [excerpt(str(each.row.columns.get("answer", "")))] if answers else []
        table.add_row(*(_plain(cell) for cell in (each.row.place, *cells, excerpt(each.row.completion))))
    apart = sum(each.apart >= 0 for each in differing)
    table.caption = (
        f"{apart} of the {both} completions that both score; {len(differing) - apart} that only one of them scores"
    )
    return table


def replay_table(
    steps: Sequence[Mapping[str, Any]], overall: Mapping[str, Any], plugin: str, compared: str, run: str
) -> Table:
    """By step, how a plugin's scores stand to the saved ones of `compared`, and what that makes of the groups."""
    table = Table("step", title=_plain(f"{plugin} on the rollouts of {run}"))
    for header in ("saved", "new", "differ", "corr.", "failed", "groups", "best", "signal"):
        table.add_column(header, justify="right")
    for row in [*steps, {"step": "all", **overall}]:
        counts = (str(row[name]) for name in ("failed", "groups", "best_changes"))
        table.add_row(
            str(row["step"]),
            *(_number(row[name]) for name in ("saved_mean", "mean", "disagreements")),
            "-" if row["correlation"] is None else f"{row['correlation']:.3f}",
            *counts,
            f"+{row['gain_signal']} -{row['lose_signal']}",
            end_section=row is steps[-1],
        )
    table.caption = _plain(
        f"saved: mean of {compared}; differ: completions with another score, or with a score from one alone; corr.: "
        "Pearson's correlation; best: groups whose best completion would be another; signal: groups that would have a "
        "difference to learn from and had none (+), and the reverse (-)"
    )
    return table


def changes_table(changes: Sequence[Change], plugin: str) -> Table:
    """The completions whose scores changed most."""
    table = Table("at", title=_plain(f"Largest changes by {plugin}"))
    answers = any("answer" in each.row.columns for each in changes[:_SHOWN])
    for header in ("saved", "new", *(["answer"] if answers else []), "completion"):
        table.add_column(header, overflow="fold")
    for each in _distinct(changes, lambda each: each.row):
        cells = [_number(each.saved), outcome_label(each.new)]
        cells += [excerpt(str(each.row.columns.get("answer", "")))] if answers else []
        table.add_row(*(_plain(cell) for cell in (each.row.place, *cells, excerpt(each.row.completion))))
    table.caption = f"of {len(changes)} completions with another score"
    return table


def _distinct(found: Sequence[T], row: Callable[[T], Row]) -> list[T]:
    """The first few that are of different completions: a policy repeats itself."""
    seen = {}
    for each in found:
        seen.setdefault((row(each).prompt, row(each).completion), each)
    return list(seen.values())[:_SHOWN]


def outcome_label(outcome: Outcome) -> str:
    """The score, with what the plugin read where it noted that; else why there is none."""
    if outcome.score is None:
        return outcome.kind.replace("_", " ")
    read = outcome.extra.get("extracted")
    return f"{outcome.score:g}" + (f" (read {excerpt(str(read))})" if read is not None else "")


def excerpt(text: str) -> str:
    """The end of a text, where answers stand, in one line."""
    return repr(text if len(text) <= EXCERPT else "..." + text[-EXCERPT:])


def _plain(text: str) -> Text:
    """Not to be read as markup."""
    return Text(text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.2f} s"
