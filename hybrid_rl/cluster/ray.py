"""Workers as Ray actors, each in its own place of one placement group."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# It would print what it held back as a repetition at its end, from any thread. Heeded if Ray is not imported yet.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Ray starts its workers at niceness 15, behind whatever else runs; these are the job itself.
os.environ.setdefault("RAY_worker_niceness", "0")

import psutil
import ray
import ray._private.services
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from hybrid_rl.cluster.base import make_transport, worker_environment
from hybrid_rl.cluster.logs import Remains, WorkerLogs
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.logs import log_directory
from hybrid_rl.types import InWorker, Pending, Resources, WorkerDied, WorkerHandle
from hybrid_rl.weight_sync import SyncTimeout, Transport

_PLACEMENT_TIMEOUT = 60.0
_CONNECT_TIMEOUT = 10.0
_FETCH_TIMEOUT = 10.0
"""Seconds that logs of another machine are waited for."""

logger = logging.getLogger(__name__)


class RayCluster:
    """Starts Ray on this machine, or joins `cluster.address`."""

    def __init__(self, config: Config) -> None:
        where: dict[str, Any] = {"include_dashboard": False}
        if "RAY_ADDRESS" not in os.environ:  # else Ray would join what was last started here, if it is there or not
            where["address"] = "local"
        if config.cluster.address is not None:
            where = {"address": config.cluster.address}
            _check_reachable(config.cluster.address)
        self._output = _RayApart.put()
        noise = log_directory() / "driver.log"
        before = noise.stat().st_size
        try:
            with _standard_error(noise), _own_sigterm(), _groups_of_their_own():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **where)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            self._output()
            raise ConfigError(_refused(config.cluster.address, error, noise.read_bytes()[before:])) from None
        wanted = os.environ.get("HYBRID_RL_DEVICE") != "cpu"  # the CPU build cannot use a GPU that is there
        self.has_gpus = wanted and ray.cluster_resources().get("GPU", 0) > 0
        self._environment = worker_environment(config, gpus=self.has_gpus)
        self._logs = WorkerLogs.open(log_directory())
        self._workers: list[str] = []
        self._group: PlacementGroup | None = None
        self._transport: Transport | None = None

    def reserve(self, places: Sequence[Resources]) -> None:
        total = ray.cluster_resources()
        for kind, settings, needed in (
            ("CPU", "learner.cpus, rollout.cpus", sum(w.cpus for w in places)),
            ("GPU", "learner.gpus, rollout.gpus", sum(w.gpus for w in places)),
        ):
            if needed > total.get(kind, 0):
                raise ConfigError(
                    f"the run needs {needed:g} {kind}s for {len(places)} workers, the cluster has "
                    f"{total.get(kind, 0):g}; lower learner.world_size, rollout.engines or {settings}"
                )
        bundles = [{"CPU": w.cpus} | ({"GPU": w.gpus} if w.gpus else {}) for w in places]
        self._group = placement_group(bundles, strategy="PACK")
        if not self._group.wait(_PLACEMENT_TIMEOUT):
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            raise ConfigError(
                f"the cluster could not place {len(places)} workers within {_PLACEMENT_TIMEOUT:g} s; free: {free}, "
                f"needed: {bundles}. Wait for other jobs or lower learner.world_size and rollout.engines"
            )

    def start(self, place: int, worker: type, *args: Any, name: str, takes: Resources) -> WorkerHandle:
        assert self._group is not None, "reserve places first"
        return self._host(
            *(name, worker, args),
            num_cpus=takes.cpus,
            num_gpus=takes.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place),
        )

    def nodes(self) -> list[str]:
        return [node["NodeID"] for node in ray.nodes() if node["Alive"]]

    def start_on(self, node: str, worker: type, *args: Any, name: str, at_once: int) -> WorkerHandle:
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        return self._host(name, worker, args, num_cpus=0, max_concurrency=at_once, scheduling_strategy=where)

    def _host(self, name: str, worker: type, args: Sequence[Any], **options: Any) -> _RayHandle:
        self._workers.append(name)
        host = ray.remote(type(name, (_Host,), {}))  # Ray gives the process the class's name
        options |= {"runtime_env": {"env_vars": self._environment}}
        actor = host.options(**options).remote(self._logs, name, worker, *args)  # type: ignore[attr-defined]
        return _RayHandle(_Known(name, self._logs), actor)

    def endpoint(self, handle: WorkerHandle) -> tuple[str, int]:
        assert isinstance(handle, _RayHandle)
        return handle.endpoint()

    def share(self, value: Any) -> Any:
        return ray.put(value)

    def transport(self, config: Config) -> Transport:
        self._transport = make_transport(config, self, ObjectStore(config.sync.timeout))
        return self._transport

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._fetch_logs()
        if self._group is not None:
            remove_placement_group(self._group)
        with redirect_stdout(_RayLog()):  # if `RAY_DEDUP_LOGS` came too late, it tells what it held back
            ray.shutdown()
        self._output()

    def _fetch_logs(self) -> None:
        """Bring the logs of machines that do not see the driver's directory."""
        if not self._workers:
            return
        here, workers = ray.get_runtime_context().get_node_id(), sorted(set(self._workers))
        try:
            asked = [_on(node, self._logs.unseen, workers) for node in self.nodes() if node != here]
            for found in ray.get(asked, timeout=_FETCH_TIMEOUT):
                self._logs.add(found)
        except (ray.exceptions.RayError, OSError) as error:
            logger.warning("not all workers' logs could be fetched from their machines: %s", _last_line(error))


class ObjectStore(Transport):
    """Ray's object store. Ray frees what no ticket points to any more."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout

    def put(self, payload: bytes, what: str) -> Any:
        return ray.put(payload)

    def get(self, ticket: Any, what: str) -> bytes:
        try:
            return ray.get(ticket, timeout=self._timeout)
        except ray.exceptions.GetTimeoutError:
            raise SyncTimeout(f"{what} did not arrive within {self._timeout:g} s") from None
        except ray.exceptions.ObjectLostError as loss:
            raise SyncTimeout(f"{what} is lost: {_last_line(loss)}") from None


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does at SIGTERM: Ray would end it without a word."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """Start Ray's processes outside this one's group: where SIGTERM goes to all of that (`timeout`, supervisors), what
    has to be saved needs them. They end with this process even if it is killed."""

    class Apart(subprocess.Popen):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named, process_group=0)

    with patch.object(ray._private.services, "ConsolePopen", Apart):
        yield


@contextmanager
def _handlers_errors() -> Iterator[None]:
    """Let through what a signal's handler raises; within Ray's C code, that becomes a `SystemError`."""
    try:
        yield
    except SystemError as error:
        raise error.__cause__ or error from None


@contextmanager
def _standard_error(file: Path) -> Iterator[None]:
    """Have what libraries in C write to standard error appended to a file."""
    kept, log = os.dup(2), os.open(file, os.O_WRONLY | os.O_APPEND)
    sys.stderr.flush()
    os.dup2(log, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(log)


def _refused(address: str | None, error: Exception, noise: bytes) -> str:
    """Why Ray did not start, or let itself be joined, from its exception and what it wrote."""
    if address is None:
        return f"Ray did not start on this machine: {error}; what it wrote is in {log_directory() / 'driver.log'}"
    if isinstance(error, ray.exceptions.AuthenticationError) or b"InvalidAuthToken" in noise:
        return (
            f"cluster.address={address!r} asks for a token that this machine did not give: copy the head's "
            "~/.ray/auth_token to the same place here and set RAY_AUTH_MODE=token, here and before `ray start`"
        )
    return f"cluster.address={address!r}: cannot join a Ray cluster: {error}"


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes for an address where nothing listens."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator:  # "auto" and the like, which Ray looks up
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cluster.address={address!r} cannot be reached ({error}); start Ray there with `ray start --head`, or "
            "leave the setting out to start a cluster on this machine"
        ) from None


class _Host:
    """The actor around a worker, so that workers need not know Ray."""

    def __init__(self, logs: WorkerLogs, name: str, worker: type, *args: Any) -> None:
        logs.take(name)
        # Gloo by itself looks up the machine's name, which often stands for loopback.
        if (interface := _interface(ray.util.get_node_ip_address())) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        self._held: socket.socket | None = None
        self._worker = worker(*args)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._worker, method)(*args, **kwargs)

    def endpoint(self) -> tuple[str, int]:
        """The port is held for this process, which may listen on it with `reuse_port`, until it is asked for another:
        no other program can take it meanwhile."""
        address = ray.util.get_node_ip_address()
        held = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((address, 0))
        self._held = held
        return address, held.getsockname()[1]


def _interface(address: str) -> str | None:
    """Name of the network interface that has an address."""
    each = psutil.net_if_addrs().items()
    return next((name for name, has in each if any(a.address == address for a in has)), None)


class _RayHandle:
    def __init__(self, known: _Known, actor: Any) -> None:
        self.name = known.name
        self._known = known
        self._actor = actor

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> Pending:
        return _RayPending(self._known, self._actor.call.remote(method, *args, **kwargs))

    def endpoint(self) -> tuple[str, int]:
        return _RayPending(self._known, self._actor.endpoint.remote()).result()

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)


class _RayPending:
    def __init__(self, known: _Known, reference: Any) -> None:
        self.name = known.name
        self._known = known
        self._reference = reference

    def result(self, timeout: float | None = None) -> Any:
        try:
            with _handlers_errors():
                return ray.get(self._reference, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            raise WorkerDied(f"{self.name} did not answer within {timeout:g} s", self.name) from None
        except ray.exceptions.RayTaskError as failure:
            # For the user, who has no use for a worker's traceback; and that of its own type, for those who mend it.
            cause = failure.cause if isinstance(failure.cause, Exception) else RuntimeError(_last_line(failure))
            raise cause from InWorker(self.name, _COLOUR.sub("", str(failure)))
        except ray.exceptions.RayError as failure:
            if getattr(failure, "actor_init_failed", False):
                kind, _, reason = (cause := _last_line(failure)).partition(": ")
                if kind.endswith(ConfigError.__name__):
                    raise ConfigError(reason) from None
                raise RuntimeError(f"{self.name} could not start: {cause}") from InWorker(
                    self.name, _COLOUR.sub("", str(failure))
                )
            if isinstance(failure, _LOST):
                raise self._known.death(failure) from None
            # An exception that does not survive the way here.
            raise RuntimeError(_last_line(failure)) from InWorker(self.name, _COLOUR.sub("", str(failure)))

    def ready(self, timeout: float) -> bool:
        with _handlers_errors():
            done, _ = ray.wait([self._reference], timeout=timeout)
        return bool(done)


_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,  # Ray's memory monitor killed the actor
    ray.exceptions.NodeDiedError,
    ray.exceptions.ActorUnschedulableError,  # it was to be on a machine that is gone
)


@dataclass
class _Known:
    """What the driver can find out about a worker that died."""

    name: str
    logs: WorkerLogs
    died: WorkerDied | None = None

    def death(self, failure: ray.exceptions.RayError) -> WorkerDied:
        """Why it died, of all calls that it owed an answer the same."""
        if self.died is None:
            said = str(failure)
            address = _found(r"\bip: (\S+)", said)
            remains = self._remains(address) if address and "node has died" not in said else Remains((), False)
            where = ", ".join(filter(None, [address, (pid := _found(r"\bpid: (\d+)", said)) and f"process {pid}"]))
            what = f"{self.name} ({where})" if where else self.name
            self.died = WorkerDied(f"{what} {_cause_of_death(said, remains)}", self.name, remains.lines)
        return self.died

    def _remains(self, address: str) -> Remains:
        nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == address]
        if not nodes or nodes[0]["NodeID"] == ray.get_runtime_context().get_node_id():
            return self.logs.remains(self.name)
        try:
            return ray.get(_on(nodes[0]["NodeID"], self.logs.remains, self.name), timeout=_FETCH_TIMEOUT)
        except ray.exceptions.RayError as error:
            return Remains((f"(its last lines could not be fetched: {_last_line(error)})",), False)


def _cause_of_death(said: str, remains: Remains) -> str:
    """From what Ray says and what the worker left; Ray does not tell by which signal a process died."""
    if "node has died" in said or "node was" in said:
        return "was lost with its machine"
    if "low on memory" in said:
        return "was killed by Ray: its machine was running out of memory"
    if remains.out_of_memory:
        return "was killed by the kernel: its machine, or the container, was out of memory"
    if (status := _found(r"exit code (\d+)", said)) is not None:
        return f"ended itself with status {status}"
    if any("Segmentation fault" in line or "SIGSEGV" in line for line in remains.lines):
        return "crashed: segmentation fault"
    if any("SIGABRT" in line or "Aborted" in line for line in remains.lines):
        return "crashed: a library aborted it"
    return "was killed from outside (SIGKILL), or ended without a word"


def _found(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found and found[1]


def _on(node: str, function: Callable[..., Any], *args: Any) -> Any:
    """Begin to call a function on a machine, beside all that is reserved there."""
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(_call).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
    return task.remote(function, *args)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_COLOUR = re.compile(r"\x1b\[\d*m")


def _last_line(error: BaseException) -> str:
    """The last line that says something: the exception itself, behind its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _RayLog(io.TextIOBase):
    """What is written to it is logged."""

    def write(self, text: str) -> int:
        if text.strip():
            logging.getLogger("raylet").warning("%s", _COLOUR.sub("", text.strip()))
        return len(text)


class _RayApart:
    """Standard output without what Ray's own threads print of workers' deaths, which is logged instead."""

    def __init__(self, output: TextIO) -> None:
        self._output = output

    @staticmethod
    def put() -> Callable[[], None]:
        """Put in place; returns what undoes it."""
        before = sys.stdout
        apart: Any = _RayApart(before)
        sys.stdout = apart

        def undo() -> None:
            if sys.stdout is apart:
                sys.stdout = before

        return undo

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return _RayLog().write(text)
        return self._output.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)
