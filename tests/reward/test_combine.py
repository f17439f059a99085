"""Totals from what each reward said, against a recomputation, and what stops a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_rl.config import RewardSpec
from hybrid_rl.reward.combine import Scored, combine
from hybrid_rl.types import FAILURES, Completion, Outcome, Prompt

FAIL = ("drop", "zero")
NUMBERS = st.floats(-1e6, 1e6)
WEIGHTS = NUMBERS | st.dictionaries(st.integers(0, 100), NUMBERS, min_size=1, max_size=4)
OUTCOMES = (
    NUMBERS.map(lambda score: Outcome("score", score))
    | st.just(Outcome("not_applicable"))
    | st.sampled_from(FAILURES).map(lambda kind: Outcome(kind, None, "why"))
)


def combined(rows: list[list[list[Outcome]]], specs: list[RewardSpec], step: int = 1, **more: Any) -> Scored:
    """`rows`: by prompt, reward and completion."""
    prompts = [Prompt(str(i), "p", (1,), {}) for i in range(len(rows))]
    completions = [[Completion("c", (1,), (0.0,), "stop", 0)] * len(row[0]) for row in rows]
    outcomes = [{s.name: tuple(o) for s, o in zip(specs, row, strict=True)} for row in rows]
    return combine(prompts, completions, outcomes, specs, step, **more)


def weight_at(weight: Any, step: int) -> float:
    """By the definition: the straight line through the two nearest named steps, level beyond the outermost."""
    if not isinstance(weight, dict):
        return weight
    before = [s for s in weight if s <= step]
    after = [s for s in weight if s >= step]
    if not before or not after:
        return weight[min(weight) if not before else max(weight)]
    low, high = max(before), min(after)
    share = 0.0 if low == high else (step - low) / (high - low)
    return (1 - share) * weight[low] + share * weight[high]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 120))
def test_totals_are_the_weighted_sums_of_what_applies(data: st.DataObject, step: int):
    specs = [
        RewardSpec(plugin="m:f", name=str(i), weight=data.draw(WEIGHTS), on_failure=data.draw(st.sampled_from(FAIL)))
        for i in range(data.draw(st.integers(1, 4)))
    ]
    size = data.draw(st.integers(1, 4))
    group = st.lists(st.lists(OUTCOMES, min_size=size, max_size=size), min_size=len(specs), max_size=len(specs))
    rows = data.draw(st.lists(group, min_size=1, max_size=3))
    scored = combined(rows, specs, step, proven=[spec.name for spec in specs])
    failures = [o.kind for row in rows for outcomes in row for o in outcomes if o.kind in FAILURES]
    assert scored.faults == {kind: failures.count(kind) for kind in FAILURES}
    for row, result in zip(rows, scored.groups, strict=True):
        for j, total in enumerate(result.rewards_G):
            said = [(spec, outcomes[j]) for spec, outcomes in zip(specs, row, strict=True)]
            failed = [spec for spec, outcome in said if outcome.kind in FAILURES]
            terms = [
                weight_at(spec.weight, step) * o.score for spec, o in said if o.kind == "score" and o.score is not None
            ]
            if any(spec.on_failure == "drop" for spec in failed) or not (terms or failed):
                assert total is None
            else:
                assert total is not None
                assert math.isclose(total, math.fsum(terms), rel_tol=1e-9, abs_tol=1e-3)


GOOD, NONE, LATE = Outcome("score", 1.0), Outcome("not_applicable"), Outcome("timeout", None, "m:f took too long")


def test_a_failure_stops_the_run_where_it_is_to():
    specs = [RewardSpec(plugin="m:f", on_failure="stop")]
    assert combined([[[GOOD, NONE]]], specs).groups[0].rewards_G == (1.0, None)
    with pytest.raises(RuntimeError, match=r"m:f took too long \(on_failure of m:f is stop\)"):
        combined([[[GOOD, LATE]]], specs)


@pytest.mark.parametrize("on_failure", FAIL)
def test_a_reward_that_failed_on_everything_stops_the_run_unless_it_ever_answered(on_failure: str):
    specs = [RewardSpec(plugin="m:f", on_failure=on_failure), RewardSpec(plugin="m:g")]  # type: ignore[arg-type]
    rows = [[[LATE, LATE], [GOOD, GOOD]]] * 2
    with pytest.raises(RuntimeError, match="m:f failed on every completion; the last time: m:f took too long"):
        combined(rows, specs)
    assert combined(rows, specs, proven=["m:f"]).faults["timeout"] == 4
    for other in (GOOD, NONE):
        assert combined([[[LATE, other], [GOOD, GOOD]]], specs).faults["timeout"] == 1
