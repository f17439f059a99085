"""From an exception that ended a run to one screen: what happened where, what to try, and where all of it is."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hybrid_rl.logs import keep_logs, log_directory
from hybrid_rl.redaction import scrub
from hybrid_rl.types import InWorker, RewardFailed, WorkerDied

_MESSAGE_CHARACTERS = 1200
"""Longest that an exception's own words are shown; all are in the log."""
_MESSAGE_LINES = 12
_ROOMS = ("learner", "engine", "rewards")
"""What names of workers begin with."""


@dataclass(frozen=True)
class Cause:
    """A kind of failure, told by what was said of it."""

    pattern: re.Pattern[str]
    name: str
    advice: Mapping[str, str]
    """By what the worker's name begins with; '' for any other."""


def _cause(pattern: str, name: str, advice: str, **special: str) -> Cause:
    return Cause(re.compile(pattern, re.IGNORECASE), name, MappingProxyType({"": advice, **special}))


_LESS_RAM = "start fewer workers on a machine (learner.world_size, rollout.engines), or give it more memory"
CAUSES = (
    _cause(
        r"no space left on device|disk quota exceeded",
        "the disk is full",
        "make room, or lower checkpoint.keep_last",
    ),
    _cause(
        r"address already in use|EADDRINUSE",
        "a port is taken",
        "start it again: another program took the port in that moment",
    ),
    _cause(
        r"driver version is insufficient|no kernel image is available|driver/library version mismatch|"
        r"forward compatibility was attempted|unsupported toolchain|libcuda\.so|compiled with CUDA .* but",
        "the GPU's driver and this build of torch do not fit together",
        "compare `nvidia-smi` with `python -c 'import torch; print(torch.version.cuda)'`, and update the driver",
    ),
    _cause(
        r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError: CUDA|CUBLAS_STATUS_ALLOC_FAILED|"
        r"no available memory for the cache blocks|free memory on device|larger than the available KV cache",
        "the GPU's memory is full",
        "lower batch.tokens_per_micro_batch or rollout.gpu_memory_utilization",
        learner="lower batch.tokens_per_micro_batch or learner.logits_mib, raise learner.zero_stage or set "
        "learner.gradient_checkpointing=true or learner.offload=optimizer; `hybrid-rl estimate` shows what takes it",
        engine="lower rollout.gpu_memory_utilization if something shares the GPU, else raise it or "
        "rollout.tensor_parallel, or lower rollout.max_concurrent",
    ),
    _cause(
        r"MemoryError|cannot allocate memory|can't allocate memory|not enough memory|out of memory|bad_alloc|"
        r"low on memory",
        "memory (RAM) is full",
        _LESS_RAM,
        learner=f"lower batch.tokens_per_micro_batch or learner.logits_mib; or {_LESS_RAM}",
        engine=f"lower rollout.max_concurrent or rollout.cpu_kv_cache_gib; or {_LESS_RAM}",
        rewards=f"lower reward.workers or reward.memory_mib; or {_LESS_RAM}",
    ),
    _cause(
        r"CUDA error|device-side assert|CUDA driver error|illegal memory access|uncorrectable ECC|CUBLAS_STATUS|"
        r"cudaError|GPU has fallen off|\bXid\b",
        "the GPU reported an error",
        "CUDA_LAUNCH_BLOCKING=1 names the operation; on that machine, `nvidia-smi -q` and `dmesg` tell of the hardware",
    ),
    _cause(
        r"SafetensorError|deserializing header|size mismatch for|does not appear to have a file named|"
        r"Unrecognized configuration class|is not a valid model identifier|Can't load (the )?(model|tokenizer)",
        "the model could not be loaded",
        "check model.path on that machine: every machine needs all of its files, and the same ones",
    ),
    _cause(
        r"was lost with its machine",
        "a machine was lost",
        "see with `ray status` which machines are left; go on once it is back",
    ),
    _cause(
        r"did not answer within|no answer for",
        "a worker hung",
        "see the end of its log; raise learner.timeout or rollout.timeout if it was only slow",
    ),
    _cause(
        r"Segmentation fault|SIGSEGV|SIGABRT|SIGILL|illegal instruction|a library aborted",
        "a library crashed",
        "its log names the function; a reinstalled or older version of that library may help",
    ),
    _cause(
        r"killed from outside",
        "a worker disappeared",
        "mostly that is the kernel short of memory (see `dmesg`), a job's time limit, or a hand that killed it",
    ),
    _cause(
        r"NCCL|gloo|c10d|TCPStore|DistBackendError|closed by peer|reset by peer|Connection refused",
        "workers lost their connection to one another",
        "check that the machines reach each other at their Ray addresses on all ports; set before `ray start`, "
        "NCCL_DEBUG=INFO shows what is tried, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the interface",
    ),
    _cause(
        r"Read-only file system|Permission denied",
        "a file cannot be written",
        "choose a run.dir that can be written to",
    ),
)
"""The first that fits is taken."""


def explain(error: BaseException) -> str:
    """One screen about what ended the run. The whole traceback goes to the driver's log, which is kept."""
    log = log_directory() / "driver.log"
    keep_logs()
    logging.getLogger("failure").error("the run failed", exc_info=error)  # not ours: not shown
    fact = _read(error)
    told = "" if isinstance(error, RewardFailed) else "\n".join([fact.said, *fact.lines])
    cause = next((each for each in CAUSES if each.pattern.search(told)), None)
    room = next((room for room in _ROOMS if fact.worker.startswith(room)), "")
    screen = [fact.said if cause is None else f"{cause.name}. {fact.said}"]
    screen += [f"  at {fact.where}"] if fact.where else []
    screen += [f"  {fact.worker} | {line}" for line in fact.lines]
    if isinstance(error, RewardFailed):
        screen.append("Try: the reward by itself, `hybrid-rl reward test` or, on what a run sampled, `reward replay`")
    elif cause is not None:
        screen.append(f"Try: {cause.advice.get(room, cause.advice[''])}")
    own = log.with_name(f"{fact.worker}.log") if fact.worker else log
    screen.append(f"Log: {_near(own)}" + (f"; with the whole traceback: {_near(log)}" if own != log else ""))
    if any(log.parent.parent.glob("checkpoints/step_*")):
        run = _near(log.parent.parent)
        screen.append(f"Go on from the last checkpoint: hybrid-rl train {run}/config.yaml run.dir={run} --resume")
    return scrub("\n".join(screen))


@dataclass(frozen=True)
class _Facts:
    worker: str
    """Whose failure it was; '' for the driver's."""
    said: str
    lines: tuple[str, ...] = ()
    """The last of a worker that died."""
    where: str = ""
    """`file:line` in the project's or the user's code."""


def _read(error: BaseException) -> _Facts:
    # Our own errors are whole sentences.
    ours = type(error) is RuntimeError or type(error).__module__.startswith(("hybrid_rl", "trainers"))
    said = _short(str(error) if ours else f"{type(error).__name__}: {error}".removesuffix(": "))
    for each in _chain(error):
        if isinstance(each, WorkerDied):
            return _Facts(each.worker, said, each.lines)
        if isinstance(each, InWorker):
            named = said if each.worker in said else f"{each.worker}: {said}"
            return _Facts(each.worker, named, where=_innermost(each.traceback))
    return _Facts("", said, where=_innermost("".join(traceback.format_exception(error))))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _short(message: str) -> str:
    """Without what torch appends of its C++ frames."""
    lines = message.partition("Exception raised from ")[0].strip().splitlines()
    more = " ..." if len(lines) > _MESSAGE_LINES or len(message) > _MESSAGE_CHARACTERS else ""
    return "\n".join(lines[:_MESSAGE_LINES])[:_MESSAGE_CHARACTERS] + more


def _innermost(text: str) -> str:
    """Of a traceback, the innermost `file:line` that no library has."""
    frames = re.findall(r'File "([^"<]+)", line (\d+)', text)
    own = [(file, line) for file, line in frames if not re.search(r"/(site|dist)-packages/|/lib/python3", file)]
    if not own:
        return ""
    return f"{_near(Path(own[-1][0]))}:{own[-1][1]}"


def _near(path: Path) -> Path:
    """As it is called from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
