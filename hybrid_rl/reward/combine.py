"""From what each reward said of a completion to what it earned."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from hybrid_rl.config import RewardSpec
from hybrid_rl.types import FAILURES, Completion, Outcome, Prompt, RewardFailed, ScoredGroup

logger = logging.getLogger(__name__)
_EXCERPT = 80


@dataclass(frozen=True)
class Scored:
    """Groups with their rewards, and what went wrong on the way."""

    groups: list[ScoredGroup]
    faults: Mapping[str, int]
    """`timeout`, `error`, `crash` -> completions without a score for that reason."""


def combine(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    outcomes: Sequence[Mapping[str, Sequence[Outcome]]],
    specs: Sequence[RewardSpec],
    step: int,
    proven: Collection[str] = (),
) -> Scored:
    """Sum the rewards by their weights at `step`. A completion on which a reward failed earns nothing, is not trained
    on, or stops the run, as `on_failure` of that reward says.

    Raises `RewardFailed` where it says `stop`, and if a reward failed on every completion; but not if it is `proven`,
    having answered on others.
    """
    asked = [spec for spec in specs if all(spec.name in row for row in outcomes)]
    faults: Counter[str] = Counter(dict.fromkeys(FAILURES, 0))
    for spec in asked:
        found = [outcome for row in outcomes for outcome in row[spec.name]]
        failed = [outcome for outcome in found if outcome.failed]
        faults.update(outcome.kind for outcome in failed)
        if failed and spec.on_failure == "stop":
            raise RewardFailed(f"rewards: {failed[0].detail} (on_failure of {spec.name} is stop)")
        if failed and len(failed) == len(found) and spec.name not in proven:
            raise RewardFailed(f"{spec.name} failed on every completion; the last time: {failed[-1].detail}")
    groups = [
        ScoredGroup(
            prompt,
            tuple(group),
            tuple(_total({s.name: row[s.name][j] for s in asked}, asked, step) for j in range(len(group))),
            {s.name: tuple(row[s.name]) for s in asked},
        )
        for prompt, group, row in zip(prompts, completions, outcomes, strict=True)
    ]
    return Scored(groups, dict(faults))


def _total(outcomes: Mapping[str, Outcome], specs: Sequence[RewardSpec], step: int) -> float | None:
    """Weighted sum over the rewards that apply; `None` where none does, or where one failed that is to `drop` it."""
    terms = []
    for spec in specs:
        outcome = outcomes[spec.name]
        if outcome.failed and spec.on_failure == "drop":
            return None
        if outcome.failed:
            terms.append(0.0)
        elif outcome.score is not None:
            terms.append(spec.weight_at(step) * outcome.score)
    return sum(terms) if terms else None


class Examples:
    """Says each kind of failure of each reward in the log once, with the completion it happened on."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def see(self, name: str, completions: Sequence[Completion], outcomes: Sequence[Outcome]) -> None:
        for completion, outcome in zip(completions, outcomes, strict=True):
            if outcome.failed and (name, outcome.kind) not in self._said:
                self._said.add((name, outcome.kind))
                text = completion.text if len(completion.text) <= _EXCERPT else completion.text[:_EXCERPT] + "..."
                logger.warning(
                    "reward %s: %s (on %r); further ones are counted as reward/%s/%s",
                    name,
                    outcome.detail,
                    text,
                    name,
                    outcome.kind,
                )
