"""What a person should be told of at once: a short list, each said when it begins and not again until it was over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hybrid_rl.config import Config

NO_COUNTS = frozenset({"faults/skipped_in_a_row"})
"""Metrics under `faults/` that cannot be summed over steps."""
_WINDOW = 10
_NOTHING_LEARNT = 5
_UNSCORED = 0.2


@dataclass(frozen=True)
class Alert:
    name: str
    """Short and always the same, as `reward collapse`."""
    step: int
    text: str
    """One sentence with figures, and what to look at."""


class Alerts:
    """Watches the rows of a run, in order."""

    def __init__(self, config: Config) -> None:
        self._limits = config.tracking.alerts
        self._completions = config.batch.prompts * config.batch.num_generations
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._best = 0.0
        self._idle = self._skipping = 0
        self._standing: set[str] = set()

    def see(self, row: Mapping[str, float | None]) -> list[Alert]:
        """What begins with this step. A metric that is missing or not finite (`None`) says nothing."""
        step = int(row["step"] or 0)
        checks: tuple[tuple[str, Callable[[Mapping[str, float]], str | None]], ...] = (
            ("reward collapse", self._reward),
            ("engines and learner disagree", self._mismatch),
            ("far from the base policy", self._kl),
            ("updates skipped", self._skipped),
            ("nothing to learn from", self._nothing),
            ("rewards fail", self._unscored),
            ("rollout engine lost", self._lost),
        )
        known = {name: value for name, value in row.items() if value is not None}
        said = {name: text for name, check in checks if (text := check(known)) is not None}
        begun = [Alert(name, step, text) for name, text in said.items() if name not in self._standing]
        self._standing = set(said)
        return begun

    def _reward(self, row: Mapping[str, float]) -> str | None:
        if self._limits.reward_drop is None or "reward/mean" not in row:
            return None
        self._recent.append(row["reward/mean"])
        if len(self._recent) < _WINDOW:
            return None
        mean = sum(self._recent) / _WINDOW
        self._best = max(self._best, mean)
        if self._best == 0 or mean >= (1 - self._limits.reward_drop) * self._best:
            return None
        return (
            f"reward/mean is {mean:.3g} over the last {_WINDOW} steps, and was {self._best:.3g} at its best; look at "
            "the latest rollouts, policy/entropy and grad_norm/*"
        )

    def _mismatch(self, row: Mapping[str, float]) -> str | None:
        limit, value = self._limits.rollout_kl, row.get("policy/rollout_kl")
        if limit is None or value is None or value <= limit:
            return None
        return (
            f"policy/rollout_kl is {value:.3g} nats a token, above {limit:g}: what engines sample is not what the "
            "learner trains; look at staleness/*, try sync.gate.every=1 or algo.mismatch"
        )

    def _kl(self, row: Mapping[str, float]) -> str | None:
        limit, value = self._limits.kl, row.get("policy/kl")
        if limit is None or value is None or value <= limit:
            return None
        return f"policy/kl is {value:.3g} nats a token, above {limit:g}; lower the learning rates or raise algo.kl_coef"

    def _skipped(self, row: Mapping[str, float]) -> str | None:
        self._skipping = self._skipping + 1 if row.get("faults/skipped_updates") else 0
        if self._skipping < 2:
            return None
        return "a gradient was not finite, two steps in a row; their batches are in skipped/. Lower full.lr and lora.lr"

    def _nothing(self, row: Mapping[str, float]) -> str | None:
        self._idle = self._idle + 1 if row.get("tokens/trained") == 0 else 0
        if self._idle < _NOTHING_LEARNT:
            return None
        return (
            f"{_NOTHING_LEARNT} steps trained on no token: within each group all completions earned the same; the "
            "tasks are too easy or too hard, or the reward tells nothing apart"
        )

    def _unscored(self, row: Mapping[str, float]) -> str | None:
        share = row.get("reward/unscored", 0.0) / self._completions
        if share <= _UNSCORED:
            return None
        return f"{share:.0%} of the step's completions have no reward; look at reward/*/timeout, error and crash"

    def _lost(self, row: Mapping[str, float]) -> str | None:
        if not (lost := row.get("faults/engine_restarts")):
            return None
        return f"{lost:.0f} replaced; what was under way there was sampled again. Its last words are in logs/"
