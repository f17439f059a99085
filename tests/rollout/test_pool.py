"""The pool under faults: engines that die, hang, dawdle or hold other weights at any call. They are fakes, to fail on
cue; the same faults of real engines are in tests/trainers."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

from hybrid_rl.rollout import RolloutPool
from hybrid_rl.types import Bucket, Completion, Progress, Receipt, Request, Sampling, WeightUpdate, WorkerDied
from hybrid_rl.weight_sync import SyncMismatch, UpdateRefused

REQUESTS = [Request(f"r{i}", (i,) * (1 + i), Sampling(2, 1.0, 1.0, 4, (), 5), seed=100 + i) for i in range(9)]


def anchor(version: int) -> WeightUpdate:
    return WeightUpdate(version, None, (Bucket("b", 8, "d", ("w",)),), {"w": f"digest-{version}"}, 0)


def delta(version: int) -> WeightUpdate:
    return dataclasses.replace(anchor(version), base_version=version - 1)


class FakeEngine:
    """Answers with prompt, seed and version, a few requests a slice. `at[n]` happens at its n-th call."""

    def __init__(self, index: int, at: dict[int, str]) -> None:
        self.index, self.at, self.name = index, at, f"engine-{index}"
        self.version, self.held, self.calls, self.dead = 0, [], 0, False
        self.got: list[int] = []
        """Lengths of the chains of updates that it was sent."""

    def submit(self, method: str, /, *args: Any) -> Any:
        if self.dead:
            raise WorkerDied(self.name)
        self.calls += 1
        fault = self.at.get(self.calls)
        self.dead = fault == "die"
        if fault in ("die", "hang"):
            return _FakePending(None, self.name, ready=fault == "die")
        late = 0.3 if fault == "late" else 0.0
        try:
            return _FakePending(getattr(self, method)(*args, fault=fault), self.name, after=late)
        except RuntimeError as failure:
            return _FakePending(failure, self.name)

    def kill(self) -> None:
        self.dead = True

    def info(self, fault: str | None) -> dict:
        if fault == "cannot start":
            raise RuntimeError("out of memory")
        return {}

    def apply_updates(self, updates: list[WeightUpdate], in_flight: str, fault: str | None) -> Receipt:
        self.got.append(len(updates))
        if fault == "refuse":
            raise UpdateRefused("a bucket arrived damaged")
        bases = [u.base_version for u in updates]
        assert bases[0] in (None, self.version), "the pool sends what leads on from what the engine holds"
        assert bases[1:] == [u.version for u in updates[:-1]]
        self.version = updates[-1].version
        wrong = fault == "corrupt" or (self.at.get(0) == "always corrupt" and self.version)
        return Receipt(self.name, self.version, {"w": "other"} if wrong else dict(updates[-1].digests), "none")

    def advance(self, requests: list[Request], cancelled: list[str], seconds: float, fault: str | None) -> Progress:
        assert not {r.id for r in requests} & {r.id for r in self.held}
        self.held = [r for r in [*self.held, *requests] if r.id not in cancelled]
        if self.at.get(0) == "slow":
            return Progress({}, self.version)
        done, self.held = self.held[:2], self.held[2:]
        return Progress({r.id: (self.answer(r), self.answer(r)) for r in done}, self.version - (fault == "stale"))

    def answer(self, r: Request) -> Completion:
        return Completion("", (*r.prompt_ids, r.seed), (0.0,) * (len(r.prompt_ids) + 1), "stop", self.version)


class _FakePending:
    def __init__(self, value: Any, name: str, ready: bool = True, after: float = 0.0) -> None:
        self._value, self.name, self._is_ready = value, name, ready
        self._from = time.monotonic() + after

    def result(self, timeout: float | None = None) -> Any:
        if self._value is None:
            raise WorkerDied(f"{self.name} is gone")
        if isinstance(self._value, Exception):
            raise self._value
        return self._value

    def ready(self, timeout: float) -> bool:
        if not self._is_ready:
            time.sleep(timeout)
        elif (left := self._from - time.monotonic()) > 0:
            time.sleep(min(left, timeout))
        return self._is_ready and time.monotonic() >= self._from


def make(
    faults: list[dict[int, str]],
    engines: int = 2,
    max_restarts: int = 5,
    max_concurrent: int = 4,
    verify: bool = True,
) -> tuple[RolloutPool, list[FakeEngine]]:
    """`faults[i]`: of the i-th engine ever started. Call 1 is `info`."""
    started: list[FakeEngine] = []

    def spawn(index: int) -> Any:
        started.append(FakeEngine(index, faults[len(started)] if len(started) < len(faults) else {}))
        return started[-1]

    times = {"timeout": 0.5, "start_timeout": 0.6}
    pool = RolloutPool(spawn, engines, max_restarts=max_restarts, max_concurrent=max_concurrent, verify=verify, **times)
    return pool, started


def answers(pool: RolloutPool, requests: list[Request] = REQUESTS) -> dict[str, tuple[Completion, ...]]:
    pool.submit(requests)
    found: dict[str, tuple[Completion, ...]] = {}
    until = time.monotonic() + 20
    while pool.unfinished:
        assert time.monotonic() < until, "the pool waits for ever"
        pool.poll(0.5)
        new = pool.take_finished()
        assert not new.keys() & found.keys(), "answered twice"
        found |= new
    return found


def expected(version: int) -> dict[str, tuple[Completion, ...]]:
    engine = FakeEngine(0, {})
    engine.version = version
    return {r.id: (engine.answer(r),) * 2 for r in REQUESTS}


def test_requests_are_shared_out_by_tokens_and_every_one_is_answered_once():
    pool, started = make([])
    assert answers(pool) == expected(0)
    assert len(started) == 2
    assert all(e.calls > 1 for e in started)


def test_an_engine_is_given_no_more_than_it_can_take_up_soon():
    pool, started = make([{0: "slow"}], engines=1, max_concurrent=2)
    pool.submit(REQUESTS)
    for _ in range(3):
        pool.poll(0.1)
    assert len(started[0].held) == 2, "two sequences each, of which it decodes two at once and has two waiting"


@pytest.mark.parametrize("fault", ["die", "hang"])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_a_fault_of_any_call_loses_no_request(fault: str, call: int):
    """1: start, 2: first update, 3: second update, then generating."""
    pool, started = make([{call: fault}])
    pool.update(anchor(1))
    pool.update(delta(2))
    assert answers(pool) == expected(2)
    pool.wait_ready()
    assert (pool.restarts, len(started)) == (1, 3)
    assert started[-1].version == 2, "a replacement is brought to the current weights"


@pytest.mark.parametrize("seed", range(20))
def test_random_faults_lose_no_request(seed: int):
    import random

    draw = random.Random(seed)
    faults = [{draw.randrange(1, 9): draw.choice(["die", "hang", "refuse", "corrupt"])} for _ in range(4)]
    pool, _ = make(faults, engines=3, max_restarts=8)
    pool.wait_ready()
    for version in range(1, 4):
        pool.update(anchor(version) if version != 2 else delta(version))
        assert answers(pool) == expected(version)


def test_engines_that_keep_dying_end_the_run():
    pool, _ = make([{2: "die"}] * 50, max_restarts=3)
    with pytest.raises(RuntimeError, match=r"is gone\) and rollout\.max_restarts"):
        answers(pool)


def test_only_what_leads_on_is_sent():
    pool, started = make([{}, {5: "die"}])
    pool.wait_ready()
    for update in (anchor(1), delta(2), delta(3)):
        assert pool.update(update) == 2
    answers(pool)
    pool.wait_ready()
    assert started[0].got == [1, 1, 1]
    assert started[2].got == [3], "a replacement is sent the anchor and all since"
    pool.update(anchor(4))
    assert started[2].got == [3, 1]


@pytest.mark.parametrize("verify", [True, False])
def test_an_engine_that_catches_up_while_others_go_on_serves_what_they_serve(verify: bool):
    """The third engine started takes its chain of updates while two more are published."""
    pool, started = make([{}, {3: "die"}, {2: "late", 3: "late"}], verify=verify)
    pool.wait_ready()
    pool.update(anchor(1))
    for version in (2, 3, 4, 5):
        pool.update(delta(version))
        assert answers(pool, [dataclasses.replace(r, id=f"{version}/{r.id}") for r in REQUESTS[:3]])
        time.sleep(0.15)
    pool.wait_ready()
    assert (pool.restarts, pool.repairs) == (1, 0)
    assert [started[0].version, started[2].version] == [5, 5]
    assert sum(started[2].got) == 5, "no update twice"


def test_an_engine_that_catches_up_within_an_update_is_sent_it_once():
    """The replacement starts and catches up while the update waits for the other engine's slice."""
    pool, started = make([{3: "late"}, {3: "die"}])
    pool.wait_ready()
    pool.update(anchor(1))
    pool.submit(REQUESTS)
    pool.poll(0)  # the first engine is at a slice of 0.3 s, the second dies
    assert pool.update(delta(2)) == 2
    assert started[2].got == [2]
    pool.wait_ready()
    while pool.unfinished:
        pool.poll(0.1)
    assert len(pool.take_finished()) == len(REQUESTS)


@pytest.mark.parametrize("fault", ["corrupt", "refuse"])
def test_an_engine_that_does_not_hold_what_it_was_sent_is_sent_everything_again(fault: str):
    pool, started = make([{3: fault}])
    pool.wait_ready()
    pool.update(anchor(1))
    assert pool.update(delta(2)) == 2
    assert (pool.repairs, started[0].got, started[1].got) == (1, [1, 1, 2], [1, 1])
    assert answers(pool) == expected(2)


def test_what_cannot_be_mended_stops_the_run_and_names_engine_and_tensor():
    pool, _ = make([{}, {0: "always corrupt"}])
    pool.wait_ready()
    with pytest.raises(SyncMismatch, match=r"engine-1 .*holds other bytes for w"):
        pool.update(anchor(1))


def test_an_engine_that_serves_another_version_than_its_receipt_said_stops_the_run():
    pool, _ = make([{}, {3: "stale"}])
    pool.update(anchor(1))
    with pytest.raises(RuntimeError, match="engine-1 answered with weights of version 0, it should have 1"):
        answers(pool)


def test_a_slow_engine_s_requests_are_given_to_an_idle_one(monkeypatch: pytest.MonkeyPatch):
    from hybrid_rl.rollout import pool as module

    monkeypatch.setattr(module, "_BACKUP_SECONDS", 0.05)
    pool, started = make([{0: "slow"}])
    assert answers(pool) == expected(0)
    assert pool.backups > 0
    assert pool.restarts == 0
    pool.poll(0.1)
    assert not started[0].held, "what another has answered is cancelled"


def test_an_update_waits_for_what_is_under_way_where_it_should(monkeypatch: pytest.MonkeyPatch):
    pool, started = make([], engines=1, max_concurrent=3)
    pool.submit(REQUESTS)
    pool.poll(0.1)
    pool.poll(0.1)
    assert started[0].held
    pool.update(anchor(1), "wait")
    assert not started[0].held
    finished = pool.take_finished()
    assert {c.weight_version for group in finished.values() for c in group} == {0}
    assert 0 < len(finished) < len(REQUESTS), "what was queued waits for the new weights"


def test_each_engine_is_asked_beside_its_work():
    pool, started = make([], engines=3)
    pool.wait_ready()
    pool.submit(REQUESTS[:4])
    found = pool.ask_each(REQUESTS[4:6])
    assert found == {i: [(started[i].answer(r),) * 2 for r in REQUESTS[4:6]] for i in range(3)}
    assert answers(pool, REQUESTS[6:]).keys() <= expected(0).keys()


def test_an_engine_that_dies_when_each_is_asked_is_left_out(monkeypatch: pytest.MonkeyPatch):
    from hybrid_rl.rollout import pool as module

    monkeypatch.setattr(module, "_BACKUP_SECONDS", 0.0)
    pool, _ = make([{}, {2: "die"}])
    pool.wait_ready()
    pool.submit(REQUESTS[:2])
    assert pool.ask_each(REQUESTS[4:5]).keys() == {0}
    assert pool.backups == 0, "no other engine answers for it"
    alone, _ = make([{2: "die"}], engines=1)
    alone.wait_ready()
    assert alone.ask_each(REQUESTS[4:5]).keys() == {0}, "its successor is asked"


def test_what_is_urgent_comes_first():
    pool, _ = make([], engines=1, max_concurrent=1)
    pool.wait_ready()
    pool.submit(REQUESTS[:4])
    pool.submit(REQUESTS[4:6], first=True)
    pool.poll(0.1)
    assert list(pool.take_finished()) == ["r4"]


def test_a_replacement_that_does_not_start_is_replaced_and_a_first_engine_is_not():
    failing = {1: "cannot start"}
    pool, started = make([{2: "die"}, {}, failing])
    pool.wait_ready()
    assert answers(pool) == expected(0)
    pool.wait_ready()
    assert (pool.restarts, len(started)) == (2, 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        make([failing])[0].wait_ready()


def test_sleep_and_wake_reach_every_engine(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[int, str]] = []

    def note(name: str) -> Callable[..., int]:
        def called(self: FakeEngine, fault: str | None) -> int:
            calls.append((self.index, name))
            return 0

        return called

    pool, _ = make([])
    for name in ("sleep", "wake"):
        monkeypatch.setattr(FakeEngine, name, note(name), raising=False)
    pool.wait_ready()
    pool.sleep()
    pool.wake()
    assert calls == list(itertools.product(range(2), ["sleep"])) + list(itertools.product(range(2), ["wake"]))
