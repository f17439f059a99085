"""Workers as Ray actors, each in its own place of one placement group."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray starts its workers at niceness 15, behind whatever else runs; these are the job itself.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from hybrid_rl.cluster.base import make_transport, worker_environment
from hybrid_rl.cluster.inline import free_port
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.types import Pending, Resources, WorkerDied, WorkerHandle
from hybrid_rl.weight_sync import SyncTimeout, Transport

_PLACEMENT_TIMEOUT = 60.0
_CONNECT_TIMEOUT = 10.0


class RayCluster:
    """Starts Ray on this machine, or joins `cluster.address`."""

    def __init__(self, config: Config) -> None:
        where: dict[str, Any] = {"include_dashboard": False}
        if config.cluster.address is not None:
            where = {"address": config.cluster.address}
            _check_reachable(config.cluster.address)
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **where)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"cluster.address={config.cluster.address!r}: cannot join a Ray cluster: {error}"
            ) from None
        wanted = os.environ.get("HYBRID_RL_DEVICE") != "cpu"  # the CPU build cannot use a GPU that is there
        self.has_gpus = wanted and ray.cluster_resources().get("GPU", 0) > 0
        self._environment = worker_environment(config, gpus=self.has_gpus)
        if config.cluster.address is None:
            self._environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
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
        options = {
            "num_cpus": takes.cpus,
            "num_gpus": takes.gpus,
            "runtime_env": {"env_vars": self._environment},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place),
        }
        return _RayHandle(name, ray.remote(_Host).options(**options).remote(worker, *args))  # type: ignore[attr-defined]

    def nodes(self) -> list[str]:
        return [node["NodeID"] for node in ray.nodes() if node["Alive"]]

    def start_on(self, node: str, worker: type, *args: Any, name: str, at_once: int) -> WorkerHandle:
        options = {
            "num_cpus": 0,
            "max_concurrency": at_once,
            "runtime_env": {"env_vars": self._environment},
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        return _RayHandle(name, ray.remote(_Host).options(**options).remote(worker, *args))  # type: ignore[attr-defined]

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
        if self._group is not None:
            remove_placement_group(self._group)
        ray.shutdown()


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
            raise SyncTimeout(f"{what} is lost: {_cause(loss)}") from None


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

    def __init__(self, worker: type, *args: Any) -> None:
        self._worker = worker(*args)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._worker, method)(*args, **kwargs)

    def endpoint(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), free_port()


class _RayHandle:
    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> Pending:
        return _RayPending(self.name, self._actor.call.remote(method, *args, **kwargs))

    def endpoint(self) -> tuple[str, int]:
        return _RayPending(self.name, self._actor.endpoint.remote()).result()

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)


class _RayPending:
    def __init__(self, name: str, reference: Any) -> None:
        self.name = name
        self._reference = reference

    def result(self, timeout: float | None = None) -> Any:
        try:
            return ray.get(self._reference, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            raise WorkerDied(f"{self.name} did not answer within {timeout:g} s") from None
        except ray.exceptions.RayActorError as death:
            if death.actor_init_failed:
                kind, _, reason = (cause := _cause(death)).partition(": ")
                if kind.endswith(ConfigError.__name__):
                    raise ConfigError(reason) from None
                raise RuntimeError(f"{self.name} could not start: {cause}") from None
            raise WorkerDied(f"{self.name}: {_cause(death)}") from None
        except _LOST as death:
            raise WorkerDied(f"{self.name}: {_cause(death)}") from None
        except ray.exceptions.RayTaskError as failure:
            if isinstance(failure.cause, ConfigError):  # for the user, who has no use for a worker's traceback
                raise ConfigError(str(failure.cause)) from None
            raise

    def ready(self, timeout: float) -> bool:
        done, _ = ray.wait([self._reference], timeout=timeout)
        return bool(done)


_LOST = (
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,  # Ray's memory monitor killed the actor
)


def _cause(error: BaseException) -> str:
    """The last line that says something: the exception itself, behind its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
