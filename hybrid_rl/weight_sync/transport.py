"""How the encoded bytes of an update get from the learner to the engines."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from hybrid_rl.files import sync_path
from hybrid_rl.types import Bucket

_POLL_SECONDS = 0.01
_GRACE_SECONDS = 5.0
"""Longer that engines wait than the learner, who then tells them which of them was missing."""


class SyncTimeout(RuntimeError):
    """A part of an update did not arrive in time; the message names what, where, and the limit."""


class UpdateRefused(RuntimeError):
    """An engine did not take an update on, and serves what it served before; the message says why."""


@dataclass(frozen=True)
class Meeting:
    """Where the members of a transport that sends find each other. A new one is needed when a member was replaced, and
    after a `SyncTimeout`."""

    address: str
    port: int
    """On the learner's machine, where nothing listens yet."""
    members: tuple[str, ...]
    """Names by rank; rank 0 is the learner."""
    epoch: int
    """Different for each."""


class Transport(Protocol):
    """Picklable; the learner and every engine process hold one of the same kind."""

    sends: bool = False
    """Whether engines get bytes only while the learner runs `send`, after all have run `join`; else whenever they ask,
    and nobody needs either."""

    def join(self, meeting: Meeting, rank: int) -> None:
        """Everyone: meet the other members. Raises `SyncTimeout` naming who did not come."""

    def put(self, payload: bytes, what: str) -> Any:
        """Learner: keep `payload` ready. Returns the ticket by which an engine gets it; `what` says what it is."""
        ...

    def send(self, tickets: Sequence[Any]) -> None:
        """Learner: give every member these, while each of them asks for them in this order.

        Raises `SyncTimeout` naming what did not get through, and to whom.
        """

    def get(self, ticket: Any, what: str) -> bytes:
        """Engine: the bytes of a ticket. Raises `SyncTimeout` naming `what`."""
        ...

    def drop(self, ticket: Any) -> None:
        """Learner: nobody will ask for this one again."""

    def close(self) -> None:
        """Driver: nobody will ask for anything again."""


def fetch(transport: Transport, bucket: Bucket, version: int) -> bytes:
    """An engine's way to a part of update `version`, for `unpack`. Raises `SyncTimeout`, and `UpdateRefused` if the
    part is damaged."""
    what = contents(bucket.tensors, version)
    payload = transport.get(bucket.ticket, what)
    if digest_bytes(payload) != bucket.digest:
        raise UpdateRefused(f"{what} arrived damaged ({len(payload)} of {bucket.bytes} bytes)")
    return payload


def digest_bytes(payload: bytes) -> str:
    """Digest (xxh3, 128 bits) of encoded bytes."""
    return xxhash.xxh3_128_hexdigest(payload)


def contents(tensors: Sequence[str], version: int) -> str:
    """What a part of update `version` holds, for messages."""
    more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
    return f"{tensors[0]}{more} of version {version}"


class Directory(Transport):
    """Files in a directory that learner and engines see."""

    def __init__(self, root: Path, timeout: float) -> None:
        """Engines wait for a file for `timeout` seconds. The files are in a directory of their own under `root`."""
        self._path = root.resolve() / f"sync_{uuid.uuid4().hex[:12]}"
        self._timeout = timeout
        self._numbers = itertools.count()

    def put(self, payload: bytes, what: str) -> str:
        self._path.mkdir(exist_ok=True)
        name = f"{next(self._numbers):08d}.safetensors"
        aside = self._path / f".writing_{name}"
        aside.write_bytes(payload)
        sync_path(aside)
        aside.rename(self._path / name)
        sync_path(self._path)
        return name

    def get(self, ticket: str, what: str) -> bytes:
        path, deadline = self._path / ticket, time.monotonic() + self._timeout
        while True:
            try:
                return path.read_bytes()
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    raise SyncTimeout(f"{what}: {path} did not appear within {self._timeout:g} s") from None
                time.sleep(_POLL_SECONDS)

    def drop(self, ticket: str) -> None:
        (self._path / ticket).unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


class Collective(Transport):
    """Broadcasts, by NCCL between GPUs or gloo between CPUs, in a process group of its own.

    A broadcast begins once every member has said that it is there: who is missing is known by name, and nobody enters
    a collective that cannot end.
    """

    sends = True

    def __init__(self, timeout: float, device: str) -> None:
        """Each part may take `timeout` seconds; bytes travel in memory of `device` (`cuda`, `cpu`)."""
        self._timeout, self._device = timeout, torch.device(device)
        self._numbers = itertools.count()
        self._payloads: dict[int, tuple[bytes, str]] = {}
        self._members: tuple[str, ...] = ()
        self._rank = self._round = 0
        self._store: Any = None
        self._group: Any = None

    def join(self, meeting: Meeting, rank: int) -> None:
        self._leave()
        self._store, self._members, self._rank, self._round = None, meeting.members, rank, 0
        limit = self._timeout + (_GRACE_SECONDS if rank else 0.0)
        where = f"{meeting.members[0]} at {meeting.address}:{meeting.port}"
        try:
            store = open_store(meeting.address, meeting.port, serves=rank == 0, timeout=limit)
        except (RuntimeError, OSError) as error:  # the latter: another process listens there by now
            raise SyncTimeout(f"{self._me} does not reach {where} within {limit:g} s: {error}") from None
        self._store = PrefixStore(str(meeting.epoch), store)
        self._meet(None, str(meeting.epoch))
        try:
            self._group = self._make_group(meeting)
        except RuntimeError as error:
            raise SyncTimeout(f"{self._me} met {where}, but cannot make a group: {error}") from None

    def put(self, payload: bytes, what: str) -> tuple[int, int]:
        number = next(self._numbers)
        self._payloads[number] = payload, what
        return number, len(payload)

    def send(self, tickets: Sequence[tuple[int, int]]) -> None:
        for number, _ in tickets:
            payload, what = self._payloads[number]
            self._ensure_joined(what)
            self._meet(what, str(number))
            buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self._device)
            self._broadcast(buffer, what)

    def get(self, ticket: tuple[int, int], what: str) -> bytes:
        number, size = ticket
        self._ensure_joined(what)
        self._meet(what, str(number))
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._broadcast(buffer, what)
        return buffer.cpu().numpy().tobytes()

    def drop(self, ticket: tuple[int, int]) -> None:
        self._payloads.pop(ticket[0], None)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.abort()  # a member may be gone, and the group's end would wait for it
        self._group = None

    def _ensure_joined(self, what: str) -> None:
        if self._group is None:
            raise SyncTimeout(f"{what} was not sent: {self._me} did not join")

    @property
    def _me(self) -> str:
        return self._members[self._rank] if self._members else "this process"

    def _make_group(self, meeting: Meeting) -> Any:
        # Waiting ends sooner, with a message; at the group's own limit, NCCL's watchdog ends the process.
        limit = timedelta(seconds=2 * self._timeout + _GRACE_SECONDS)
        if self._device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL  # pyright: ignore[reportPrivateImportUsage]

            options: Any = ProcessGroupNCCL.Options()
            options._timeout = limit
            return ProcessGroupNCCL(self._store, self._rank, len(meeting.members), options)
        from torch.distributed import ProcessGroupGloo  # pyright: ignore[reportPrivateImportUsage]

        options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._timeout = limit
        if interfaces := os.environ.get("GLOO_SOCKET_IFNAME"):
            options._devices = [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]
        elif meeting.address in ("127.0.0.1", "localhost", "::1"):
            options._devices = [ProcessGroupGloo.create_device(hostname=meeting.address)]
        else:
            options._devices = [ProcessGroupGloo.create_default_device()]
        return ProcessGroupGloo(self._store, self._rank, len(meeting.members), options)

    def _meet(self, what: str | None, subject: str) -> None:
        """Wait until every member is at the same point, and speaks of the same `subject`; `what` is sent there."""
        here, go = f"{self._round}/here", f"{self._round}/go"
        self._round += 1
        if self._rank:
            self._store.set(f"{here}/{self._rank}", subject)
            if not self._wait(go, self._timeout + _GRACE_SECONDS):
                learner, wanted = self._members[0], what or "the meeting"
                raise SyncTimeout(
                    f"{self._me} waited more than {self._timeout:g} s for {learner} to begin with {wanted}"
                )
            problem = self._store.get(go).decode()
        else:
            deadline = time.monotonic() + self._timeout
            waited = {rank: self._wait(f"{here}/{rank}", deadline - time.monotonic()) for rank in self._others}
            missing = [self._members[rank] for rank, came in waited.items() if not came]
            asked = {self._members[r]: self._store.get(f"{here}/{r}").decode() for r in self._others if waited[r]}
            strays = [name for name, other in asked.items() if other != subject]
            problem = ""
            if missing and what is None:
                problem = f"{', '.join(missing)} did not come to the meeting within {self._timeout:g} s"
            elif missing:
                problem = f"{what} was not sent: {', '.join(missing)} did not ask for it within {self._timeout:g} s"
            elif strays:
                problem = f"{what} (part {subject}) was not sent: {strays[0]} asked for part {asked[strays[0]]}"
            self._store.set(go, problem)
            for rank in self._others:  # the store is as small after a thousand updates as after one
                self._store.delete_key(f"{here}/{rank}")
            if self._round > 1:  # whoever is here has read that one
                self._store.delete_key(f"{self._round - 2}/go")
        if problem:
            raise SyncTimeout(problem)

    @property
    def _others(self) -> range:
        return range(1, len(self._members))

    def _wait(self, key: str, seconds: float) -> bool:
        try:
            self._store.wait([key], timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError:
            return False
        return True

    def _broadcast(self, buffer: Tensor, what: str) -> None:
        limit = timedelta(seconds=self._timeout)
        try:
            self._group.broadcast(buffer, 0, limit).wait(limit)
        except RuntimeError as error:
            self._leave()
            raise SyncTimeout(
                f"{what}: its way from {self._members[0]} to {', '.join(self._members[1:])} broke off at "
                f"{self._me}: {error}"
            ) from None


def open_store(address: str, port: int, *, serves: bool, timeout: float) -> TCPStore:
    """The store where processes meet. Who serves it listens on `address` alone; torch by itself listens everywhere.
    The port may be one that `Cluster.endpoint` holds for this process.

    Raises `RuntimeError` if nothing listens there within `timeout` seconds.
    """
    listener = socket.create_server((address, port), reuse_port=True) if serves else None
    return TCPStore(
        address,
        port,
        is_master=serves,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener else None,  # the store closes it
    )
