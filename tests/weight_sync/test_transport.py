"""The contract of transports, each between real workers of the cluster that makes it."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hybrid_rl.cluster import Cluster, open_cluster
from hybrid_rl.cluster.inline import free_port
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.types import Resources, WorkerHandle, gather
from hybrid_rl.weight_sync import Collective, Meeting, SyncTimeout, Transport

TIMEOUT = 3.0
PAYLOADS = [b"first", bytes(range(256)) * 40_000, b"\0"]
TAKES = Resources(0.1, 0)


class Side:
    """A learner or an engine that only passes bytes on."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def started(self) -> bool:
        return True

    def join(self, meeting: Meeting, rank: int) -> None:
        self._transport.join(meeting, rank)

    def put(self, payloads: list[bytes]) -> list[Any]:
        return [self._transport.put(p, f"part {i}") for i, p in enumerate(payloads)]

    def send(self, tickets: list[Any]) -> None:
        self._transport.send(tickets)

    def get(self, tickets: list[Any]) -> list[bytes]:
        return [self._transport.get(t, f"part {i}") for i, t in enumerate(tickets)]

    def drop(self, ticket: Any) -> None:
        self._transport.drop(ticket)


@dataclass
class Sides:
    cluster: Cluster
    transport: Transport
    learner: WorkerHandle
    engines: list[WorkerHandle]
    kind: str
    epoch: int = 0
    first: int = 0
    """Of its three places in the cluster."""

    def start(self, place: int, name: str) -> WorkerHandle:
        return self.cluster.start(self.first + place, Side, self.transport, name=name, takes=TAKES)

    def meet(self, *engines: WorkerHandle) -> None:
        """As the driver does after engines were started or replaced."""
        if self.transport.sends:
            self.epoch += 1
            members = ("learner", *(e.name for e in engines))
            meeting = Meeting(*self.cluster.endpoint(self.learner), members, self.epoch)
            gather([w.submit("join", meeting, rank) for rank, w in enumerate((self.learner, *engines))])

    def deliver(self, tickets: list[Any], *engines: WorkerHandle) -> list[list[bytes]]:
        pending = [e.submit("get", tickets) for e in engines]
        if self.transport.sends:
            pending.append(self.learner.submit("send", tickets))
        return gather(pending)[: len(engines)]


def settings(backend: str, transport: str, directory: Path | None = None) -> Config:
    tree = {
        "model": {"path": "m"},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval"},
        "learner": {"world_size": 1},
        "rollout": {"engines": 1},
        "cluster": {"backend": backend, "placement": "split"},
        "sync": {"transport": transport, "timeout": TIMEOUT, "directory": directory and str(directory)},
    }
    return parse_config(tree)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Cluster]:
    cluster = open_cluster(settings("ray", "object_store"))
    try:
        cluster.reserve([TAKES] * 9)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module", params=["memory", "object_store", "directory", "nccl"])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    kind, root = request.param, tmp_path_factory.mktemp("sync")
    if kind == "memory":
        config = settings("inline", "object_store")
        cluster = open_cluster(config)
    else:
        config = settings("ray", kind, root if kind == "directory" else None)
        cluster = request.getfixturevalue("ray_cluster")
    found = Sides(cluster, cluster.transport(config), None, [], kind)  # type: ignore[arg-type]
    found.first = ["memory", "object_store", "directory", "nccl"].index(kind) * 3 % 9
    found.learner = found.start(0, "learner")
    found.engines = [found.start(i, f"engine-{i}") for i in (1, 2)]
    gather([side.submit("started") for side in (found.learner, *found.engines)])
    found.meet(*found.engines)
    yield found
    for each in (found.learner, *found.engines):
        each.kill()
    found.transport.close()
    assert not list(root.iterdir()), "nothing is left behind"


def test_every_engine_gets_what_was_put_as_often_as_it_asks(sides: Sides):
    tickets = sides.learner.submit("put", PAYLOADS).result()
    for _ in range(3):
        assert sides.deliver(tickets, *sides.engines) == [PAYLOADS, PAYLOADS]
    assert sides.deliver(tickets[1:2], *sides.engines) == [PAYLOADS[1:2]] * 2
    sides.learner.submit("drop", tickets[0]).result()
    assert sides.deliver(tickets[1:], *sides.engines) == [PAYLOADS[1:]] * 2


def test_what_does_not_come_is_named_in_time(sides: Sides):
    never = {
        "memory": lambda: 10**6,
        "directory": lambda: "10000000.safetensors",
        "nccl": lambda: (10**6, 1),
        "object_store": _without_a_place,
    }
    started = time.monotonic()
    with pytest.raises(SyncTimeout, match="part 0"):
        sides.engines[0].submit("get", [never[sides.kind]()]).result()
    assert time.monotonic() - started < TIMEOUT + 10
    sides.meet(*sides.engines)


@pytest.mark.parametrize("sides", ["object_store", "directory", "nccl"], indirect=True)  # in one process nobody dies
def test_a_replaced_engine_gets_the_updates_before_and_after_it_came(sides: Sides):
    before = sides.learner.submit("put", PAYLOADS[:2]).result()
    assert sides.deliver(before, *sides.engines) == [PAYLOADS[:2]] * 2
    sides.engines[1].kill()
    if sides.transport.sends:
        with pytest.raises(SyncTimeout, match="part 0 was not sent: engine-2 did not ask for it within 3 s"):
            sides.deliver(before, sides.engines[0])
    sides.engines[1] = sides.start(2, "engine-2")
    sides.engines[1].submit("started").result()
    sides.meet(sides.engines[1])
    assert sides.deliver(before, sides.engines[1]) == [PAYLOADS[:2]]
    sides.meet(*sides.engines)
    after = sides.learner.submit("put", PAYLOADS[2:]).result()
    assert sides.deliver(after, *sides.engines) == [PAYLOADS[2:]] * 2


@pytest.mark.parametrize("sides", ["nccl"], indirect=True)  # elsewhere everyone gets what it asks for
def test_members_that_speak_of_different_parts_say_so(sides: Sides):
    tickets = sides.learner.submit("put", PAYLOADS).result()
    pending = [e.submit("get", [t]) for e, t in zip(sides.engines, tickets, strict=False)]
    with pytest.raises(SyncTimeout, match=r"part 0 \(part \d+\) was not sent: engine-2 asked for part \d+"):
        sides.learner.submit("send", tickets[:1]).result()
    for each in pending:
        with pytest.raises(SyncTimeout, match="engine-2 asked"):
            each.result()
    sides.epoch += 1
    names = ("learner", "engine-1", "engine-2")
    meeting = Meeting(*sides.cluster.endpoint(sides.learner), names, sides.epoch)
    with pytest.raises(SyncTimeout, match="engine-2 did not come to the meeting within 3 s"):
        gather([w.submit("join", meeting, rank) for rank, w in enumerate((sides.learner, sides.engines[0]))])
    sides.meet(*sides.engines)
    assert sides.deliver(tickets, *sides.engines) == [PAYLOADS] * 2


@pytest.fixture
def meeting() -> Meeting:
    return Meeting("127.0.0.1", free_port(), ("learner", "engine-1"), 1)


def test_who_did_not_join_sends_and_gets_nothing(meeting: Meeting):
    alone = Collective(0.2, "cpu")
    with pytest.raises(SyncTimeout, match="part 0 was not sent: this process did not join"):
        alone.get((0, 1), "part 0")
    with pytest.raises(SyncTimeout, match="engine-1 did not come to the meeting"):
        alone.join(meeting, 0)
    ticket = alone.put(b"first", "part 0")
    for call in (lambda: alone.send([ticket]), lambda: alone.get(ticket, "part 0")):
        with pytest.raises(SyncTimeout, match=r"^part 0 was not sent: learner did not join$"):
            call()


def test_a_port_that_was_taken_meanwhile_is_a_timeout(meeting: Meeting):
    with socket.create_server((meeting.address, meeting.port)), pytest.raises(SyncTimeout, match=str(meeting.port)):
        Collective(0.2, "cpu").join(meeting, 0)


def test_the_interface_that_the_environment_names_is_used(meeting: Meeting, monkeypatch: pytest.MonkeyPatch):
    members = [Collective(2.0, "cpu") for _ in meeting.members]

    def meet(interface: str) -> list[BaseException | None]:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
        again = replace(meeting, port=free_port())
        with ThreadPoolExecutor() as pool:
            return [p.exception() for p in [pool.submit(m.join, again, i) for i, m in enumerate(members)]]

    assert all(isinstance(e, SyncTimeout) and "no_such" in str(e) for e in meet("no_such"))
    assert meet("lo") == [None, None]


def test_a_broadcast_that_breaks_off_ends_the_group(meeting: Meeting):
    members = [Collective(1.0, "cpu") for _ in meeting.members]
    with ThreadPoolExecutor() as pool:
        deque(pool.map(lambda i: members[i].join(meeting, i), range(2)))
        members[1]._broadcast = lambda buffer, what: None  # type: ignore[method-assign]
        ticket = members[0].put(bytes(10**7), "part 0")
        getting = pool.submit(members[1].get, ticket, "part 0")
        with pytest.raises(SyncTimeout, match="part 0: its way from learner to engine-1 broke off at learner"):
            members[0].send([ticket])
        getting.result()
    with pytest.raises(SyncTimeout, match="learner did not join"):
        members[0].send([ticket])


def _without_a_place() -> Any:
    """The result of a task that Ray cannot place."""
    import ray  # not above: `open_cluster` decides how it is imported

    return ray.remote(lambda: None).options(num_cpus=1000).remote()


@pytest.mark.parametrize("backend", ["inline", "ray"])
def test_what_cannot_work_is_refused(backend: str, tmp_path: Path, request: pytest.FixtureRequest):
    refused = {"directory": r"sync\.directory='.*/gone' is no directory"}
    if backend == "inline":
        cluster = open_cluster(settings("inline", "object_store"))
        refused["nccl"] = "sync.transport=nccl is between processes"
    else:
        cluster = request.getfixturevalue("ray_cluster")
    for transport, message in refused.items():
        directory = tmp_path / "gone" if transport == "directory" else None
        with pytest.raises(ConfigError, match=message):
            cluster.transport(settings(backend, transport, directory))
