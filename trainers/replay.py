"""`hybrid-rl reward replay`: what another reward would have said of the completions that a run has kept."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_rl.config import Config, ConfigError, RewardSpec
from hybrid_rl.files import write_atomically
from hybrid_rl.plugins import absolute
from hybrid_rl.reward.trial import Row, Verdict
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.types import Outcome
from trainers.authoring import CLOSE, Asked, as_row, open_trial, progress, read_objects, summary
from trainers.verdict_tables import Change, changes_table, failure_table, replay_table

_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True)
class Kept:
    """A completion of a run, and what its reward was."""

    step: int
    row: Row
    prompt_id: str
    saved: float | None
    """What is compared with: the sum, or the one reward that is replaced, unweighted."""
    total: float | None
    """The weighted sum of the run's rewards."""
    scores: Mapping[str, float | None]
    """By reward, unweighted."""
    failures: Mapping[str, str]


def replay_reward(
    asked: Asked,
    config: Config,
    run: RunDirectory,
    console: Console,
    *,
    steps: str | None = None,
    instead_of: str | None = None,
    columns: Mapping[str, str],
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Score a run's rollouts again and print, by step, how the new scores stand to the saved ones.

    `steps`: `A-B`, or one number. `instead_of`: which of the run's rewards the new one would replace; by default the
    one of the same plugin, or the only one; else it would replace them all. `out`: where each completion's scores go.
    Raises `ConfigError` for a run without rollouts, where `out` cannot be written, and as `open_trial` does.
    """
    if out is not None:
        _check_writable(out)
    replaced = _replaced(asked.spec, config, instead_of)
    kept = read_rollouts(run, _span(steps), replaced.name if replaced else None, columns)
    rows = [each.row for each in kept]
    with open_trial(asked, rows, str(run.rollouts), console, chat=config.data.chat) as trial:
        verdict = _score(trial.score_rows, kept, config, replaced)
    result = summary(verdict, rows) | {"plugin": asked.spec.plugin, "run": str(run.path)}
    result["compared_with"] = replaced.name if replaced else "reward"
    by_step: dict[int, list[int]] = {}
    for i, each in enumerate(kept):
        by_step.setdefault(each.step, []).append(i)
    result["steps"] = [
        {"step": step, **_compare(kept, verdict.outcomes, members, config, replaced)}
        for step, members in by_step.items()
    ]
    overall = _compare(kept, verdict.outcomes, range(len(kept)), config, replaced)
    result["overall"] = overall
    console.print(replay_table(result["steps"], overall, asked.spec.plugin, result["compared_with"], str(run.path)))
    if changes := _changes(kept, verdict.outcomes):
        console.print(changes_table(changes, asked.spec.plugin))
    if any(outcome.failed for outcome in verdict.outcomes):
        console.print(failure_table(verdict, rows, asked.spec.plugin))
    if out is not None:
        lines = [_line(each, outcome) for each, outcome in zip(kept, verdict.outcomes, strict=True)]
        write_atomically(out, "\n".join(lines) + "\n")
        console.print(f"scores  {out}", markup=False, highlight=False)
    if as_json:
        print(json.dumps(result))


def _check_writable(out: Path) -> None:
    """Raises `ConfigError` where no such file could be written once all is scored."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; name a file")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the directory {out.parent} does not exist")
    try:
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}"):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None


def read_rollouts(
    run: RunDirectory, span: tuple[int, int] | None, replaced: str | None, columns: Mapping[str, str]
) -> list[Kept]:
    """A run's completions of the steps `span`, all by default. Raises `ConfigError` where there are none."""
    found = {int(m[1]): path for path in run.rollouts.glob("*.jsonl") if (m := _STEP_FILE.fullmatch(path.name))}
    if not found:
        raise ConfigError(f"run {run.path} has kept no rollouts ({run.rollouts})")
    chosen = [step for step in sorted(found) if span is None or span[0] <= step <= span[1]]
    if not chosen:
        raise ConfigError(f"--steps: run {run.path} has rollouts of the steps {min(found)} to {max(found)} alone")
    kept: list[Kept] = []
    last: Any = None
    for step in chosen:
        for place, record in read_objects(found[step]):
            row, _ = as_row(record, f"step {step}, {place}", columns, str(found[step]))
            same = (step, record.get("prompt_id"), row.prompt)
            group = kept[-1].row.group + (same != last) if kept else 0
            last = same
            scores, total = dict(record.get("rewards") or {}), record.get("reward")
            if replaced is not None and replaced not in scores:
                raise ConfigError(
                    f"{found[step]}, {place}: no score of the reward {replaced!r}; it has {sorted(scores)}"
                )
            saved = total if replaced is None else scores[replaced]
            failures = dict(record.get("failures") or {})
            row = replace(row, group=group)
            kept.append(Kept(step, row, str(record.get("prompt_id", "")), saved, total, scores, failures))
    if not kept:
        raise ConfigError(f"run {run.path}: the rollouts of the chosen steps are empty")
    return kept


def _span(steps: str | None) -> tuple[int, int] | None:
    """Raises `ConfigError` for what is no span of steps."""
    if steps is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", steps)
    if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
        raise ConfigError(f"--steps {steps!r} is no span of steps; give A-B, as in --steps 10-20, or one number")
    return int(match[1]), int(match[2] or match[1])


def _replaced(spec: RewardSpec, config: Config, name: str | None) -> RewardSpec | None:
    """The run's reward that the new one stands in for; `None` for all of them together."""
    if name is not None:
        found = next((each for each in config.rewards if each.name == name), None)
        if found is None:
            known = ", ".join(each.name for each in config.rewards)
            raise ConfigError(f"--instead-of {name!r} is none of the run's rewards; it has {known}")
        return found
    alike = [each for each in config.rewards if absolute(each.plugin) == absolute(spec.plugin)]
    if len(alike) == 1:
        return alike[0]
    return config.rewards[0] if len(config.rewards) == 1 else None


def _score(score: Callable[..., Verdict], kept: Sequence[Kept], config: Config, replaced: RewardSpec | None) -> Verdict:
    """Outcomes of all completions; a reward that takes another's place is asked about what that one was asked about."""
    asked = [i for i, each in enumerate(kept) if _was_asked(each, config, replaced)]
    with progress(len(asked)) as done:
        verdict = score([kept[i].row for i in asked], done)
    outcomes = [Outcome("not_applicable", None, "the run did not ask about it")] * len(kept)
    for i, outcome in zip(asked, verdict.outcomes, strict=True):
        outcomes[i] = outcome
    calls = [replace(call, rows=tuple(asked[i] for i in call.rows)) for call in verdict.calls]
    return replace(verdict, outcomes=outcomes, calls=calls)


def _was_asked(each: Kept, config: Config, replaced: RewardSpec | None) -> bool:
    """Whether `when` of the reward that is replaced, and the gates before it, let the completion through."""
    if replaced is None:
        return True
    for spec in config.rewards:
        if spec.name == replaced.name:
            return spec.asks_about(each.row.columns)
        score = each.scores.get(spec.name)
        if spec.gate is not None and (spec.name in each.failures or (score is not None and score < spec.gate)):
            return False
    raise AssertionError(replaced.name)


def _compare(
    kept: Sequence[Kept],
    outcomes: Sequence[Outcome],
    members: Sequence[int],
    config: Config,
    replaced: RewardSpec | None,
) -> dict[str, Any]:
    """How the new scores of some completions stand to the saved ones, and what that makes of their groups."""
    pairs = [(kept[i].saved, outcomes[i].score) for i in members]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    one = sum((a is None) != (b is None) for a, b in pairs)
    groups: dict[int, list[tuple[float | None, float | None]]] = {}
    for i in members:
        rewards = kept[i].total, _total(kept[i], outcomes[i], config, replaced)
        groups.setdefault(kept[i].row.group, []).append(rewards)
    effects = [_effect(group) for group in groups.values()]
    return {
        "n": len(members),
        "saved_mean": _mean([a for a, _ in pairs if a is not None]),
        "mean": _mean([b for _, b in pairs if b is not None]),
        "disagreements": sum(abs(a - b) > CLOSE for a, b in both) + one,
        "scored_by_one": one,
        "correlation": _correlation(both),
        "failed": sum(outcomes[i].failed for i in members),
        "groups": len(groups),
        "best_changes": effects.count("best_changes"),
        "gain_signal": effects.count("gain_signal"),
        "lose_signal": effects.count("lose_signal"),
    }


def _total(each: Kept, outcome: Outcome, config: Config, replaced: RewardSpec | None) -> float | None:
    """What a completion would have earned, before penalties: `outcome` in place of what was replaced."""
    if replaced is None:
        return outcome.score
    terms: list[float] = []
    for spec in config.rewards:
        new = spec.name == replaced.name
        score = outcome.score if new else each.scores.get(spec.name)
        if outcome.failed if new else spec.name in each.failures:
            if spec.on_failure != "zero":
                return None
            score = 0.0
        if score is not None:
            terms.append(spec.weight_at(each.step) * score)
    return sum(terms) if terms else None


def _effect(group: Sequence[tuple[float | None, float | None]]) -> str:
    """What the new rewards make of a group: it gains or loses a difference to learn from, or another completion is the
    best."""
    (before, best_before), (after, best_after) = (_signal([pair[side] for pair in group]) for side in (0, 1))
    if before != after:
        return "gain_signal" if after else "lose_signal"
    return "best_changes" if after and not best_before & best_after else ""


def _signal(rewards: Sequence[float | None]) -> tuple[bool, set[int]]:
    """Whether there are at least two rewards, not all equal; and which are the largest."""
    present = {i: reward for i, reward in enumerate(rewards) if reward is not None}
    if not present:
        return False, set()
    most = max(present.values())
    return most - min(present.values()) > CLOSE, {i for i, r in present.items() if most - r <= CLOSE}


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's; `None` where either side does not vary."""
    try:
        return statistics.correlation([a for a, _ in pairs], [b for _, b in pairs])
    except statistics.StatisticsError:
        return None


def _changes(kept: Sequence[Kept], outcomes: Sequence[Outcome]) -> list[Change]:
    """Completions whose score changed, the most changed first."""
    found = [
        Change(each.row, each.saved, outcome)
        for each, outcome in zip(kept, outcomes, strict=True)
        if each.saved is not None and outcome.score is not None and abs(each.saved - outcome.score) > CLOSE
    ]
    return sorted(found, key=lambda change: -change.size)


def _line(each: Kept, outcome: Outcome) -> str:
    """A completion's scores as `--out` has them."""
    record = {"step": each.step, "prompt_id": each.prompt_id, "completion": each.row.completion}
    record |= {"saved": each.saved, "score": outcome.score, "outcome": outcome.kind, "detail": outcome.detail}
    return json.dumps(record | {"extra": dict(outcome.extra), "columns": dict(each.row.columns)}, default=str)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
