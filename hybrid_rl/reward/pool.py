"""Rewards in killable processes on every node: a plugin can hang, crash or raise, and the run goes on.

A prompt's completions are scored as soon as they are there, by whichever node has the least to do; no more calls are
under way than there are processes, and what is said of a group never depends on the others or on the order.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from hybrid_rl.config import RewardConfig, RewardSpec
from hybrid_rl.plugins import absolute
from hybrid_rl.plugins.processes import GIVE_UP_AFTER
from hybrid_rl.reward.combine import Examples, Scored, combine
from hybrid_rl.reward.given import given, wants_chat
from hybrid_rl.reward.host import RewardHost
from hybrid_rl.types import Completion, Outcome, Prompt, RewardFailed, WorkerDied, WorkerHandle

logger = logging.getLogger(__name__)
Verdicts = Mapping[str, tuple[Outcome, ...]]
"""Reward -> what became of each completion of a group."""
_MAX_RESTARTS = 3
"""Times that reward processes of a node are started again, before their death ends the run."""
_CHECK_SECONDS = 600.0
_CLOSE_SECONDS = 10.0


class Nodes(Protocol):
    """Where rewards can be computed; a `Cluster` is one."""

    def nodes(self) -> list[str]:
        """Names of the machines there are."""
        ...

    def start_on(self, node: str, worker: type, *args: Any, name: str, at_once: int) -> WorkerHandle:
        """Construct `worker(*args)` on one of them; it takes `at_once` calls at a time and reserves nothing."""
        ...


class RewardPool:
    """Scores completions with the plugins of all rewards."""

    def __init__(
        self, specs: Sequence[RewardSpec], settings: RewardConfig, nodes: Nodes, *, chat: bool = False
    ) -> None:
        """`chat`: completions and prompts are handed to the plugins as chat messages, as TRL does."""
        self.specs = list(specs)
        self._settings, self._chat, self._nodes = settings, chat, nodes
        self._names = list(nodes.nodes())
        self._hosts = {node: self._start(node) for node in self._names}
        self._under_way = dict.fromkeys(self._hosts, 0)
        self._restarts = 0
        self._closed = False
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(settings.workers * len(self._hosts), thread_name_prefix="reward")
        self._examples = Examples()
        self._without_answer = {spec.name: 0 for spec in specs}
        """Prompts in a row on which a reward failed."""
        self._proven: set[str] = set()
        """Rewards that have answered."""

    def check(self, columns: Sequence[str]) -> None:
        """Import every plugin, on every node. Raises `ConfigError` if one is missing or wants a column that is not."""
        pending = [host.submit("check", list(columns)) for host in self._hosts.values()]
        for each in pending:
            each.result(_CHECK_SECONDS)

    def submit(self, prompt: Prompt, completions: Sequence[Completion], only: str | None = None) -> Future[Verdicts]:
        """Begin to score the completions of a prompt: with all rewards, as their gates allow, or with `only` one."""
        specs = [(k, spec) for k, spec in enumerate(self.specs) if only in (None, spec.name)]
        return self._threads.submit(self._judge, specs, prompt, list(completions))

    def score(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Completion]],
        *,
        step: int = 1,
        only: str | None = None,
    ) -> Scored:
        """Score all completions of some prompts. Raises `RewardFailed` as `combine` does."""
        judged = [self.submit(prompt, group, only) for prompt, group in zip(prompts, groups, strict=True)]
        return self.combine(prompts, groups, [each.result() for each in judged], step)

    def combine(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Completion]],
        verdicts: Sequence[Verdicts],
        step: int,
    ) -> Scored:
        """What the completions earn at `step`. Raises `RewardFailed` as `reward.combine` does."""
        return combine(prompts, groups, verdicts, self.specs, step, self._proven)

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            hosts = list(self._hosts.values())
        with ThreadPoolExecutor(max(1, len(hosts))) as threads:  # all nodes at once
            list(threads.map(_close, hosts))
        self._threads.shutdown(wait=True)

    def _start(self, node: str) -> WorkerHandle:
        specs = [spec.model_copy(update={"plugin": absolute(spec.plugin)}) for spec in self.specs]
        workers = self._settings.workers
        if node not in self._names:
            self._names.append(node)
        name = f"rewards-{self._names.index(node)}"
        # One more than work: `check` and `close` need not wait.
        return self._nodes.start_on(
            node, RewardHost, specs, self._settings, [os.getcwd()], name=name, at_once=workers + 1
        )

    def _judge(
        self, specs: Sequence[tuple[int, RewardSpec]], prompt: Prompt, completions: list[Completion]
    ) -> Verdicts:
        """All rewards of one group, in turn. A completion that does not pass a gate scores 0 behind it, unasked: were
        it not applicable, normalising the rewards one by one would make it the equal of its group's mean."""
        verdicts: dict[str, tuple[Outcome, ...]] = {}
        settled: dict[int, Outcome] = {
            j: Outcome("not_applicable", None, "its environment failed")
            for j, completion in enumerate(completions)
            if completion.finish_reason == "environment"
        }
        for k, spec in specs:
            if not spec.asks_about(prompt.columns):
                verdicts[spec.name] = (Outcome("not_applicable", None, "not for this problem"),) * len(completions)
                continue
            row = dict(settled)
            asked = [j for j in range(len(completions)) if j not in settled]
            if asked:
                answers = self._ask(k, prompt, [completions[j] for j in asked])
                row |= zip(asked, answers, strict=True)
                self._see(spec, [completions[j] for j in asked], answers)
            for j in asked:
                score = row[j].score
                if spec.gate is not None and row[j].failed:
                    settled[j] = Outcome("not_applicable", None, f"the gate {spec.name} failed")
                elif spec.gate is not None and score is not None and score < spec.gate:
                    settled[j] = Outcome("score", 0.0, f"below the gate of {spec.name}")
            verdicts[spec.name] = tuple(row[j] for j in range(len(completions)))
        return verdicts

    def _ask(self, k: int, prompt: Prompt, completions: list[Completion]) -> list[Outcome]:
        """What one reward says, from the node with the least to do. A node that dies is asked again, or another."""
        group = self._group(self.specs[k], prompt, completions)
        while True:
            with self._lock:
                node = min(self._hosts, key=lambda name: self._under_way[name])
                host = self._hosts[node]
                self._under_way[node] += 1
            try:
                return host.submit("score", k, group).result()
            except WorkerDied as death:
                self._replace(node, host, death)
            finally:
                with self._lock:
                    self._under_way[node] -= 1

    def _replace(self, node: str, dead: WorkerHandle, death: WorkerDied) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the rewards were stopped") from None
            if self._hosts.get(node) is not dead:  # another thread was faster
                return
            self._restarts += 1
            if self._restarts > _MAX_RESTARTS * len(self._names):
                raise RewardFailed(f"the reward processes died too often; the last time: {death}") from death
            there = self._nodes.nodes()
            logger.warning("%s: starting reward processes anew", death)
            if not there:
                raise RuntimeError(f"no node is left to start reward processes on; the last one: {death}") from death
            if node in there or len(self._hosts) == 1:
                if node not in there:
                    node = there[0]
                    self._under_way.setdefault(node, 0)
                    self._hosts.clear()
                self._hosts[node] = self._start(node)
            else:
                del self._hosts[node]

    def _see(self, spec: RewardSpec, completions: Sequence[Completion], outcomes: Sequence[Outcome]) -> None:
        """Raises `RewardFailed` for a reward that answers no more."""
        with self._lock:
            if self._closed:  # what was stopped says nothing of the reward
                return
            self._examples.see(spec.name, completions, outcomes)
            failed = all(outcome.failed for outcome in outcomes)
            count = self._without_answer[spec.name] + 1 if failed else 0
            self._without_answer[spec.name] = count
            if not failed:
                self._proven.add(spec.name)
        if count >= GIVE_UP_AFTER:
            raise RewardFailed(f"{spec.name} failed on {count} prompts in a row; the last time: {outcomes[-1].detail}")

    def _group(self, spec: RewardSpec, prompt: Prompt, completions: Sequence[Completion]) -> dict[str, list[Any]]:
        return given(
            [prompt.columns] * len(completions),
            [prompt.text] * len(completions),
            [completion.text for completion in completions],
            [completion.finish_reason for completion in completions],
            [completion.token_ids for completion in completions],
            chat=wants_chat(spec.plugin, self._chat),
        )


def _close(host: WorkerHandle) -> None:
    try:
        host.submit("close").result(_CLOSE_SECONDS)
    except Exception as error:  # it is gone, or is killed next
        logger.debug("closing %s: %s", host.name, error)
    host.kill()
