"""What is said when, on rows made up for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hybrid_rl.config_file import parse_config
from hybrid_rl.tracking import Alerts


def said(tree: dict, name: str, values: Sequence[float | None], **limits: float | None) -> list[tuple[int, str]]:
    """Step and name of each alert, of a run in which one metric takes these values; the batch has 16 completions."""
    alerts = Alerts(parse_config({**tree, "tracking": {"wandb": "disabled", "alerts": limits}}))
    return [(a.step, a.name) for i, v in enumerate(values, 1) for a in alerts.see({"step": i, name: v})]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("reward/mean", [0.8] * 10 + [0.0] * 5, []),  # a mean over ten steps is still half
        ("reward/mean", [0.8] * 10 + [0.0] * 9, [(16, "reward collapse")]),
        (
            "reward/mean",
            [0.8] * 10 + [0.0] * 9 + [0.8] * 10 + [0.0] * 9,
            [(16, "reward collapse"), (35, "reward collapse")],
        ),
        ("reward/mean", [-1.0] * 30, []),
        (
            "policy/rollout_kl",
            [0.05, 0.2, 0.3, 0.05, 0.2],
            [(2, "engines and learner disagree"), (5, "engines and learner disagree")],
        ),
        ("policy/rollout_kl", [None, 0.2], [(2, "engines and learner disagree")]),
        ("policy/kl", [0.5, 1.5, 2.0], [(2, "far from the base policy")]),
        ("faults/skipped_updates", [1, 0, 1, 2, 1, 0], [(4, "updates skipped")]),
        ("tokens/trained", [0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0], [(10, "nothing to learn from")]),
        ("reward/unscored", [3, 4], [(2, "rewards fail")]),
        ("faults/engine_restarts", [0, 1, 1, 0, 2], [(2, "rollout engine lost"), (5, "rollout engine lost")]),
    ],
)
def test_each_alert_is_said_when_it_begins(tiny_tree: dict, name: str, values: list, expected: list):
    assert said(tiny_tree, name, values) == expected


def test_limits_are_settings_and_null_says_nothing(tiny_tree: dict):
    assert said(tiny_tree, "policy/kl", [0.5], kl=0.4) == [(1, "far from the base policy")]
    assert said(tiny_tree, "policy/kl", [9.0], kl=None) == []
    assert said(tiny_tree, "policy/rollout_kl", [9.0], rollout_kl=None) == []
    assert said(tiny_tree, "reward/mean", [1.0] * 10 + [0.0] * 20, reward_drop=None) == []
