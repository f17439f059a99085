"""`hybrid-rl reward test`: try a reward on completions before a run does.

Nothing of a run is needed, nor torch: plugins are called as in training, and everything said here is of their outcomes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from hybrid_rl.config import ConfigError, RewardConfig, RewardSpec
from hybrid_rl.plugins import absolute
from hybrid_rl.reward.trial import Row, Trial, Verdict
from hybrid_rl.types import Outcome
from trainers.verdict_tables import (
    Disagreement,
    disagreement_table,
    failure_table,
    histogram,
    metric_table,
    verdict_table,
)

CLOSE = 1e-9
"""Scores nearer than this are the same."""


@dataclass(frozen=True)
class Asked:
    """Which reward, and within which limits."""

    spec: RewardSpec
    settings: RewardConfig

    @staticmethod
    def of(plugin: str, arguments: str | None, settings: RewardConfig, option: str = "--arguments") -> Asked:
        """`arguments`: JSON, as `option` gives it. Raises `ConfigError` if it is no object."""
        try:
            given = json.loads(arguments) if arguments else {}
        except json.JSONDecodeError as error:
            raise ConfigError(f"{option} {arguments!r} is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise ConfigError(f'{option} {arguments!r} must be a JSON object, as in {option} \'{{"which": "first"}}\'')
        return Asked(RewardSpec(plugin=plugin, arguments=given), settings)


def try_reward(
    asked: Asked,
    console: Console,
    *,
    data: Path,
    columns: Mapping[str, str],
    against: Asked | None = None,
    limit: int | None = None,
    chat: bool = False,
    as_json: bool = False,
) -> None:
    """Score the completions of `data` and print what came of it; `columns`: our name -> the file's.

    Raises `ConfigError` for data that cannot be read or lacks what the plugin needs, for a plugin that cannot be
    loaded, and for one that would be compared with itself. One that fails, always or now and then, is no error here: it
    is what this shows.
    """
    if against is not None and _same(asked.spec, against.spec):
        raise ConfigError(f"--against {against.spec.plugin}: that is the plugin itself, with the same arguments")
    rows, messages = read_rows(data, columns)
    rows = rows[:limit]
    several = [asked] if against is None else [asked, against]
    verdicts: dict[str, Verdict] = {}
    for label, each in zip(_labels(several), several, strict=True):
        with open_trial(each, rows, str(data), console, chat=chat or messages) as trial, progress(len(rows)) as done:
            verdicts[label] = trial.score_rows(rows, done)
    for table in _tables(verdicts, rows, data):
        console.print(table)
    (first, verdict), *others = verdicts.items()
    result = {"plugin": asked.spec.plugin, "data": str(data), **summary(verdict, rows)}
    for label, other in others:
        pairs = list(zip(verdict.outcomes, other.outcomes, strict=True))
        differing = disagreements(rows, pairs)
        both = sum(a.score is not None and b.score is not None for a, b in pairs)
        if differing:
            console.print(disagreement_table(differing, first, label, both))
        else:
            console.print(f"{first} and {label} agree on every completion, {both} scored", markup=False)
        result["against"] = {"plugin": several[1].spec.plugin, **summary(other, rows)}
        result["against"] |= {"both_scored": both, "disagreements": len(differing)}
    if as_json:
        print(json.dumps(result))


def _tables(verdicts: Mapping[str, Verdict], rows: Sequence[Row], data: Path) -> Iterator[RenderableType]:
    """The numbers of all, and what each gave."""
    yield verdict_table({label: summary(verdict, rows) for label, verdict in verdicts.items()}, str(data))
    for label, verdict in verdicts.items():
        if verdict.scores:
            yield histogram(verdict.scores, label)
        if verdict.metrics:
            yield metric_table(verdict.metrics, label)
        if any(outcome.failed for outcome in verdict.outcomes):
            yield failure_table(verdict, rows, label)


def _same(a: RewardSpec, b: RewardSpec) -> bool:
    return (absolute(a.plugin), a.arguments) == (absolute(b.plugin), b.arguments)


def _labels(asked: Sequence[Asked]) -> list[str]:
    """What the tables call them; the same plugin with other arguments is another one."""
    names = [each.spec.plugin for each in asked]
    if len(set(names)) == len(names):
        return names
    return [f"{each.spec.plugin} {json.dumps(each.spec.arguments)}" for each in asked]


def summary(verdict: Verdict, rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers of a trial, for programs; seconds and scores that are not there are `None`."""
    scores = verdict.scores
    slowest = max(verdict.calls, key=lambda call: call.seconds, default=None)
    return {
        "n": len(verdict.outcomes),
        "mean": sum(scores) / len(scores) if scores else None,
        "scored": len(scores),
        **{kind: verdict.count(kind) for kind in ("not_applicable", "timeout", "error", "crash")},
        "not_asked": verdict.not_asked,
        "seconds": verdict.seconds,
        "per": "prompt" if verdict.whole_groups else "completion",
        "completions_per_second": len(rows) / verdict.seconds if verdict.seconds else None,
        "p50_seconds": verdict.quantile(0.5) if verdict.calls else None,
        "p99_seconds": verdict.quantile(0.99) if verdict.calls else None,
        "slowest": {"at": rows[slowest.rows[0]].place, "seconds": slowest.seconds} if slowest else None,
        "metrics": verdict.metrics,
    }


def disagreements(rows: Sequence[Row], pairs: Sequence[tuple[Outcome, Outcome]]) -> list[Disagreement]:
    """Rows that two rewards score otherwise, the furthest apart first; then those that only one of them scores."""
    found = []
    for row, (a, b) in zip(rows, pairs, strict=True):
        differ = a.score is not None and b.score is not None and abs(a.score - b.score) > CLOSE
        if differ or (a.score is None) != (b.score is None):
            found.append(Disagreement(row, a, b))
    return sorted(found, key=lambda each: -each.apart)


@contextmanager
def open_trial(asked: Asked, rows: Sequence[Row], source: str, console: Console, *, chat: bool) -> Iterator[Trial]:
    """A trial of a plugin that is loaded and has all it needs. Raises `ConfigError` if it cannot be, or has not."""
    plugin = asked.spec.plugin
    known = set.intersection(*(set(row.columns) for row in rows))
    trial = Trial(asked.spec, asked.settings, chat=chat)
    try:
        try:
            found = trial.examine(known)
        except ValueError as error:
            raise ConfigError(f"plugin {plugin!r} cannot be loaded: {error}") from None
        for name in found.missing:
            first = next(row for row in rows if name not in row.columns)
            raise ConfigError(
                f"plugin {plugin!r} needs the column {name!r}, which {source} has not ({first.place}); it has "
                f"{', '.join(sorted(known)) or 'none'}. Name the right one with --column {name}=THEIRS, or give it in "
                "--arguments"
            )
        _check_given(found.parameters, rows, plugin, source, console)
        yield trial
    finally:
        trial.close()


def _check_given(
    parameters: Mapping[str, bool], rows: Sequence[Row], plugin: str, source: str, console: Console
) -> None:
    """Raises `ConfigError` where a plugin needs what every run has, and this file has not."""
    for name in parameters.keys() & {"prompt", "prompts"}:
        lacking = next((row for row in rows if row.prompt is None), None)
        if parameters[name] and lacking is not None:
            raise ConfigError(
                f"plugin {plugin!r} needs the prompt, which {source} has not ({lacking.place}); name its column with "
                "--column prompt=THEIRS"
            )
    if "completion_ids" in parameters:
        lacking = next((row for row in rows if row.completion_ids is None), None)
        if parameters["completion_ids"] and lacking is not None:
            raise ConfigError(
                f"plugin {plugin!r} needs completion_ids, the completion's token ids, which {source} has not "
                f"({lacking.place}); add the column completion_ids, or tokens, their number, where only that matters"
            )
        if any(isinstance(row.completion_ids, range) for row in rows):
            console.print(
                f"{plugin}: {source} has the number of tokens, not their ids; completion_ids are placeholders of the "
                "right length",
                markup=False,
            )


def read_rows(path: Path, renamed: Mapping[str, str]) -> tuple[list[Row], bool]:
    """The completions in a JSONL file, and whether they are chat messages. Lines in a row with the same prompt are of
    one group.

    Raises `ConfigError`, with the line, for what is no JSON object or has no completion.
    """
    rows: list[Row] = []
    messages = False
    last: Any = None
    for place, record in read_objects(path):
        row, chat = as_row(record, place, renamed, str(path))
        same = (record.get("prompt_id"), row.prompt)
        group = rows[-1].group + (same != last or row.prompt is None) if rows else 0
        rows.append(replace(row, group=group))
        messages, last = messages or chat, same
    if not rows:
        raise ConfigError(f"{path} has no lines")
    return rows, messages


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSONL file, each with its line. Raises `ConfigError` where there is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSONL: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSONL: line {number}: {error}") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{path}, line {number}: a {type(record).__name__}, where an object is due")
        yield f"line {number}", record


def as_row(record: Mapping[str, Any], place: str, renamed: Mapping[str, str], source: str) -> tuple[Row, bool]:
    """A record of a file, or of a run's rollouts, whose columns are those of the run's data; and whether it is of chat
    messages. Its group is 0. Where a record has the number of tokens but not their ids, placeholders stand for them.

    Raises `ConfigError` where there is no completion, or no such column as is `renamed`.
    """
    where, of_run = f"{source}, {place}", isinstance(record.get("columns"), dict)
    given = {**record["columns"], "completion": record.get("completion")} if of_run else dict(record)
    for ours, theirs in renamed.items():
        if theirs not in given:
            raise ConfigError(f"{where}: no column {theirs!r}, which --column has for {ours}; it has {sorted(given)}")
    given |= {ours: given[theirs] for ours, theirs in renamed.items()}
    completion, chat = _text(given.pop("completion", None), "completion", where)
    prompt = None
    if of_run:
        prompt = str(record.get("prompt", given.get("prompt", "")))
    elif given.get("prompt") is not None:
        prompt = given["prompt"] = _text(given["prompt"], "prompt", where)[0]
    ids, count = given.pop("completion_ids", None), record.get("tokens")
    if ids is None and type(count) is int:
        ids = range(count)
    reason = str(given.pop("finish_reason", None) or record.get("finish_reason") or "stop")
    return Row(place, 0, prompt, completion, given, reason, ids), chat


def _text(value: Any, name: str, where: str) -> tuple[str, bool]:
    """The text of a prompt or a completion, and whether it was chat messages, of which the last counts."""
    if isinstance(value, str):
        return value, False
    if isinstance(value, list) and value and isinstance(value[-1], dict) and isinstance(value[-1].get("content"), str):
        return value[-1]["content"], True
    if value is None:
        raise ConfigError(f"{where}: no {name}; name its column with --column {name}=THEIRS")
    raise ConfigError(f"{where}: {name} must be text or chat messages, not {type(value).__name__}")


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal's standard error, which is told how many more are scored; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
