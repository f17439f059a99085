"""Rewards of whole groups: who is asked about what, what counts, and what stops a run."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid_rl.cluster import open_cluster
from hybrid_rl.cluster.inline import ThisProcess
from hybrid_rl.config import Config, ConfigError, RewardConfig, RewardSpec
from hybrid_rl.plugins.processes import GIVE_UP_AFTER
from hybrid_rl.reward import RewardHost, RewardPool
from hybrid_rl.types import Completion, Pending, Prompt, ScoredGroup, WorkerDied, WorkerHandle

PLUGINS = """
    import os, random, time

    def right(completions, answer, **columns):
        return [float(c == a) for c, a in zip(completions, answer)]

    def ones(completions):
        if "sleeps" in completions:
            time.sleep(60)
        return [1.0] * len(completions)

    def asked(completion, log_extra):
        log_extra("asked", True)
        return 1.0

    def raises(completions, **columns):
        if "bad" in completions:
            raise KeyError("boom")
        return [1.0] * len(completions)

    def hangs(completions):
        if "bad" in completions:
            time.sleep(3600)
        return [1.0] * len(completions)

    def always_raises(completions, **columns):
        raise RuntimeError("broken plugin")

    def not_applicable(completions, **columns):
        return [None if c == "bad" else 0.5 for c in completions]

    def takes_its_time(completions, log_extra):
        time.sleep(random.random() / 20)
        if "bad" in completions:
            os._exit(1)
        log_extra("said", completions)
        return [float(len(c)) for c in completions]

    def pid(completion):
        return float(os.getpid())
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(textwrap.dedent(PLUGINS))
    return str(path)


def completion(text: str) -> Completion:
    return Completion(text, (1,), (0.0,), "stop", 0)


PROMPTS = [Prompt(str(i), "p", (1,), {"prompt": "p", "answer": "a", "kind": "odd" if i else "even"}) for i in range(2)]
GROUPS = [[completion("a"), completion("bad"), completion("b")], [completion("a"), completion("c"), completion("a")]]


def score(plugin: str, *specs: dict[str, Any], step: int = 1):
    """`specs`: settings of the rewards, and their functions as `f`, which they are called by default."""
    rewards = [RewardSpec(**{"plugin": f"{plugin}:{s['f']}", "name": s["f"]} | _without_f(s)) for s in specs]
    pool = RewardPool(rewards, RewardConfig(timeout=2.0), ThisProcess())
    try:
        pool.check(["answer", "prompt", "kind"])
        return pool.score(PROMPTS, GROUPS, step=step)
    finally:
        pool.close()


def _without_f(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name != "f"}


def totals(scored: Any) -> list[tuple[float | None, ...]]:
    return [group.rewards_G for group in scored.groups]


def test_rewards_are_summed_by_their_weights_at_the_step(plugin: str):
    specs = [{"f": "right", "weight": {0: 1.0, 10: 0.0}}, {"f": "ones", "weight": 0.5}]
    result = score(plugin, *specs, step=5)
    assert totals(result) == [(1.0, 0.5, 0.5), (1.0, 0.5, 1.0)]
    assert result.groups[0].scores("right") == (1.0, 0.0, 0.0), "scores are unweighted"
    assert sum(result.faults.values()) == 0


def test_a_reward_is_called_what_it_is_named(plugin: str):
    result = score(plugin, {"f": "right", "name": "mine"}, {"f": "right", "name": "yours", "weight": -1.0})
    assert list(result.groups[0].outcomes) == ["mine", "yours"]
    assert totals(result) == [(0.0,) * 3] * 2


def test_a_failure_is_dropped_or_counts_as_zero_or_stops_the_run(plugin: str):
    ones = {"f": "ones", "weight": 0.5}
    result = score(plugin, {"f": "raises"}, ones)
    assert totals(result) == [(1.5, None, 1.5), (1.5, 1.5, 1.5)]
    assert dict(result.faults) == {"timeout": 0, "error": 1, "crash": 0}
    result = score(plugin, {"f": "raises", "on_failure": "zero"}, ones)
    assert totals(result) == [(1.5, 0.5, 1.5), (1.5, 1.5, 1.5)]
    assert result.faults["error"] == 1, "counted either way"
    with pytest.raises(RuntimeError, match=r"raises raised KeyError: 'boom' \(on_failure of raises is stop\)"):
        score(plugin, {"f": "raises", "on_failure": "stop"}, ones)


def test_what_is_not_applicable_is_no_fault(plugin: str):
    result = score(plugin, {"f": "not_applicable"})
    assert totals(result)[0] == (0.5, None, 0.5)
    assert sum(result.faults.values()) == 0


def test_a_gate_keeps_later_rewards_from_being_asked(plugin: str):
    first, second = score(plugin, {"f": "right", "gate": 1.0}, {"f": "asked"}).groups
    assert first.scores("asked") == (1.0, 0.0, 0.0), "behind the gate"
    assert [bool(o.extra) for o in first.outcomes["asked"]] == [True, False, False]
    assert first.outcomes["asked"][1].detail == "below the gate of right"
    assert first.rewards_G == (2.0, 0.0, 0.0)
    assert second.scores("asked") == (1.0, 0.0, 1.0)
    (first, _) = score(plugin, {"f": "raises", "gate": 0.0, "on_failure": "zero"}, {"f": "asked"}).groups
    assert first.scores("asked") == (1.0, None, 1.0), "what failed did not pass"


def test_a_reward_is_asked_about_its_own_problems(plugin: str):
    result = score(plugin, {"f": "asked", "when": {"kind": "odd"}}, {"f": "ones", "when": {"kind": ["even", "odd"]}})
    assert totals(result) == [(1.0,) * 3, (2.0,) * 3]
    assert [o.detail for o in result.groups[0].outcomes["asked"]] == ["not for this problem"] * 3
    assert totals(score(plugin, {"f": "asked", "when": {"kind": "neither"}})) == [(None,) * 3] * 2


def test_a_column_that_a_reward_needs_must_be_there(plugin: str):
    pool = RewardPool([RewardSpec(plugin=f"{plugin}:right")], RewardConfig(), ThisProcess())
    try:
        with pytest.raises(ConfigError, match="needs the column 'answer'; the data has \\['prompt'\\]"):
            pool.check(["prompt"])
    finally:
        pool.close()


def test_a_reward_that_always_fails_stops_the_run_with_its_error(plugin: str):
    with pytest.raises(RuntimeError, match=r"always_raises failed on every completion.*RuntimeError: broken plugin"):
        score(plugin, {"f": "ones"}, {"f": "always_raises"})


def test_a_reward_that_stops_answering_stops_the_run(plugin: str):
    pool = RewardPool([RewardSpec(plugin=f"{plugin}:raises", name="raises")], RewardConfig(), ThisProcess())
    bad = [completion("bad")] * 2
    try:
        for prompts in (1, GIVE_UP_AFTER - 1):
            pool.score(PROMPTS[:1], GROUPS[:1])
            assert totals(pool.score(PROMPTS[:1] * prompts, [bad] * prompts)) == [(None, None)] * prompts
        with pytest.raises(RuntimeError, match=f"raises failed on {GIVE_UP_AFTER} prompts in a row.*KeyError: 'boom'"):
            pool.score(PROMPTS[:1], [bad])
    finally:
        pool.close()


def test_a_reward_that_always_hangs_does_not_hold_the_run_for_hours(plugin: str):
    pool = RewardPool([RewardSpec(plugin=f"{plugin}:hangs")], RewardConfig(timeout=0.2), ThisProcess())
    started = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match=r"took more than reward\.timeout"):
            pool.score(PROMPTS, [[completion("bad")] * 8] * 2)
    finally:
        pool.close()
    assert time.monotonic() - started < 4 / 2 * (1 + 4) * (0.2 + 0.5) + 5.0, (
        "of each group, the whole and four by itself"
    )


def test_a_completion_whose_environment_failed_has_no_reward(plugin: str):
    cut = dataclasses.replace(completion("a"), finish_reason="environment")
    pool = RewardPool([RewardSpec(plugin=f"{plugin}:right", name="right")], RewardConfig(), ThisProcess())
    try:
        (group,) = pool.score(PROMPTS[:1], [[cut, completion("a")]]).groups
        assert pool.score(PROMPTS[:1], [[cut, cut]]).groups[0].rewards_G == (None, None)
    finally:
        pool.close()
    assert group.rewards_G == (None, 1.0)
    assert group.scores("right") == (None, 1.0), "and counts as unscored in an evaluation too"


def test_outcomes_do_not_depend_on_what_finishes_first(plugin: str):
    specs = [RewardSpec(plugin=f"{plugin}:{name}", name=name) for name in ("takes_its_time", "raises", "right")]
    generator = random.Random(0)
    texts = [[generator.choice(["a", "bb", "ccc", "bad"]) for _ in range(3)] for _ in range(12)]
    groups = [[completion(text) for text in row] for row in texts]
    prompts = [dataclasses.replace(PROMPTS[0], id=str(i)) for i in range(12)]
    found: list[list[ScoredGroup]] = []
    for workers in (1, 3):
        pool = RewardPool(specs, RewardConfig(workers=workers), ThisProcess())
        try:
            found.append(pool.score(prompts, groups).groups)
        finally:
            pool.close()
    assert found[0] == found[1]
    assert [g.prompt for g in found[0]] == prompts
    assert [g.scores("takes_its_time") for g in found[0]] == [
        tuple(None if text == "bad" else float(len(text)) for text in row) for row in texts
    ]


class Mortal(ThisProcess):
    """Nodes whose reward processes die when told."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.dead, self.started = names, set[str](), list[str]()

    def nodes(self) -> list[str]:
        return self.names

    def start_on(self, node: str, worker: type, *args: Any, name: str, at_once: int) -> WorkerHandle:
        self.started.append(node)
        self.dead.discard(name)
        return _Mortal(super().start_on(node, worker, *args, name=name, at_once=at_once), self)


class _Mortal:
    def __init__(self, handle: WorkerHandle, nodes: Mortal) -> None:
        self.name, self._handle, self._nodes = handle.name, handle, nodes

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> Pending:
        if self.name in self._nodes.dead and method == "score":
            raise WorkerDied(f"{self.name} died")
        return self._handle.submit(method, *args, **kwargs)

    def kill(self) -> None:
        self._handle.kill()


@pytest.fixture
def mortal(plugin: str) -> Iterator[tuple[RewardPool, Mortal]]:
    nodes = Mortal(["one", "two"])
    pool = RewardPool([RewardSpec(plugin=f"{plugin}:ones", name="ones")], RewardConfig(workers=1), nodes)
    yield pool, nodes
    pool.close()


def test_processes_that_die_are_started_again_and_a_lost_node_is_done_without(mortal: tuple[RewardPool, Mortal]):
    pool, nodes = mortal
    expected = [(1.0,) * 3] * 4
    assert totals(pool.score(PROMPTS * 2, GROUPS * 2)) == expected
    nodes.dead.add("rewards-0")
    assert totals(pool.score(PROMPTS * 2, GROUPS * 2)) == expected
    assert nodes.started == ["one", "two", "one"]
    nodes.dead.add("rewards-0")
    nodes.names = ["two"]
    assert totals(pool.score(PROMPTS * 2, GROUPS * 2)) == expected
    assert nodes.started == ["one", "two", "one"]


def test_rewards_without_a_node_end_the_run(mortal: tuple[RewardPool, Mortal]):
    pool, nodes = mortal
    nodes.dead |= {"rewards-0", "rewards-1"}
    nodes.names = []
    with pytest.raises(RuntimeError, match="no node is left to start reward processes on"):
        pool.score(PROMPTS, GROUPS)


def test_all_nodes_are_closed_at_once_and_what_was_stopped_blames_no_reward(
    mortal: tuple[RewardPool, Mortal], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    pool, _ = mortal
    monkeypatch.setattr(RewardHost, "close", _slowly(RewardHost.close))
    under_way = [pool.submit(PROMPTS[0], [completion("sleeps")]) for _ in range(2)]
    time.sleep(1.0)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 3.5
    assert [each.result()["ones"][0].kind for each in under_way] == ["crash"] * 2
    assert "was stopped" not in caplog.text


def _slowly(close: Any) -> Any:
    def closing(host: RewardHost) -> None:
        time.sleep(1.0)
        close(host)

    return closing


def test_processes_that_die_again_and_again_end_the_run(mortal: tuple[RewardPool, Mortal], monkeypatch):
    pool, nodes = mortal
    nodes.names = ["one"]
    monkeypatch.setattr(_Mortal, "submit", _dies)
    with pytest.raises(RuntimeError, match=r"the reward processes died too often; the last time: .* died"):
        pool.score(PROMPTS, GROUPS)


def _dies(self: _Mortal, method: str, *args: Any) -> Pending:
    raise WorkerDied(f"{self.name} died")


@pytest.mark.slow
def test_on_ray_processes_that_die_are_started_again(plugin: str, tiny_config: Config):
    cluster = open_cluster(tiny_config)
    try:
        pool = RewardPool([RewardSpec(plugin=f"{plugin}:pid", name="pid")], RewardConfig(workers=1), cluster)
        pool.check([])
        (group,) = pool.score(PROMPTS[:1], GROUPS[:1]).groups
        (worker,) = {int(pid) for pid in group.scores("pid") if pid is not None}
        nursery = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        host = int(Path(f"/proc/{nursery}/stat").read_text().rpartition(")")[2].split()[1])
        assert host != os.getpid()
        os.kill(host, signal.SIGKILL)
        (group,) = pool.score(PROMPTS[:1], GROUPS[:1]).groups
        assert group.scores("pid")[0] not in (None, float(worker))
        pool.close()
        until = time.monotonic() + 5.0
        while Path(f"/proc/{nursery}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not Path(f"/proc/{worker}").exists()
        assert not Path(f"/proc/{nursery}").exists()
    finally:
        cluster.close()
