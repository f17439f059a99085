"""Generation beside training: the engines work on the next steps' prompts while the learner trains.

A step's prompts may start once the weights are at most `async.max_staleness` updates behind those that the step trains.
So no more than `max_staleness + 1` steps' prompts are open at a time: nothing queues up without bound. Groups are used
in the order in which their prompts were drawn, whichever finished first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from hybrid_rl.checkpoint import Waiting
from hybrid_rl.config import Config
from hybrid_rl.data import PromptSource
from hybrid_rl.step_clock import StepClock
from hybrid_rl.types import Completion, Pending, ScoredGroup
from trainers.setup import Workplace
from trainers.step import Rollouts, complete, draws, groups_wanted, training_sampling

_POLL_SECONDS = 0.05
_TAG = "train"


class Overlapped:
    """A `RolloutSource` that is at most `async.max_staleness` updates ahead. With 0 it does what `InTurn` does."""

    def __init__(
        self,
        config: Config,
        workplace: Workplace,
        prompts: PromptSource,
        steps: int,
        waiting: Mapping[str, tuple[Completion, ...]] = {},
    ) -> None:
        """`steps`: how many are left; no prompt is drawn that none of them uses. `waiting`: completions by prompt's id,
        that are there already."""
        self._ready = dict(waiting)
        self._config, self._prompts = config, prompts
        self._workplace, self._answers = workplace, workplace.answers
        self._most_open = (config.asynchrony.max_staleness + 1) * config.batch.prompts
        self._open = 0
        """Prompts that were drawn, of which the engines do not have the update yet."""
        self._left = steps * config.batch.prompts
        """Prompts to draw yet."""
        self._in_step = 0
        """Those of them that the step under way trains on."""
        self.position = prompts.position

    def next(self, step: int, clock: StepClock) -> Rollouts:
        faults: Counter[str] = Counter()
        groups: list[ScoredGroup] = []
        for left in reversed(range(draws(self._config))):
            wanted = groups_wanted(self._config, groups, step)
            with clock.time("generate"):
                self._work()
                while not (answered := self._answers.take_next(wanted, _TAG)):
                    self._work()
            with clock.time("reward"):
                while not all(each.verdicts.done() for each in answered):
                    self._work()
                scored = self._answers.scored(answered, step)
            groups += scored.groups
            faults.update(scored.faults)
            self.position += len(scored.groups)
            missing = groups_wanted(self._config, groups, step)
            self._open -= missing  # what is drawn again has left the step
            self._left += missing if left else 0
            self._in_step = self._config.batch.prompts - missing
            if not missing:
                break
        return complete(self._config, self._workplace, groups, faults, clock)

    def during(self, training: Pending) -> None:
        while not training.ready(0):
            self._work()
            if not self._answers.unfinished(_TAG):
                training.ready(_POLL_SECONDS)

    def synced(self) -> None:
        self._open -= self._in_step

    def waiting(self) -> Waiting:
        return self._answers.ended(_TAG)

    def close(self) -> None:
        """Nothing: what is under way ends with the engines."""

    def _work(self) -> None:
        """See to the engines once: draw prompts, and take answers, which are scored meanwhile."""
        room = min(self._most_open - self._open, self._left)
        if room > 0:
            self._open += room
            self._left -= room
            drawn = self._prompts.take(room)
            ready = {p.id: self._ready.pop(p.id) for p in drawn if p.id in self._ready}
            self._answers.submit(drawn, training_sampling(self._config), _TAG, ready=ready)
        self._answers.poll(_POLL_SECONDS)
