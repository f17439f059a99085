"""Runs Python that nobody has read, in a process of its own that can reach nothing but its input and a directory.

`run` starts a bare interpreter on `rewards.sandbox_child`, which confines itself and then runs the program; it enforces
what a process cannot enforce on itself (time, output, threads, disk) and leaves no process and no file behind. What the
sandbox keeps out, and what it does not, is in docs/rewards-code.md.
"""

from __future__ import annotations

import fcntl
import logging
import marshal
import math
import os
import secrets
import selectors
import shutil
import signal
import site
import stat
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from rewards import sandbox_child

logger = logging.getLogger(__name__)
Status = Literal["ok", "error", "timeout", "memory", "output", "threads", "disk"]
Runner = Literal["landlock", "container", "none"]
MAX_THREADS = 64
MAX_OPEN_FILES = 64
MAX_FILES = 1000
"""Files and directories that a program may have at a time."""
MAX_DEPTH = 32
"""Of its directories."""
FILE_MIB = 16
"""Largest file."""
DISK_MIB = 64
"""All files together."""
TICK = 0.05
"""Seconds between looks at the threads and the files."""
START_SECONDS = 30.0
"""Longest that a process may take until it is confined; a container, until it runs."""
SWEEP_SECONDS = 5.0
"""Age from which a directory that nobody has locked is left over."""
PREFIX = "hybrid-rl-code-"
_CHILD = Path(sandbox_child.__file__).read_text(encoding="utf-8")
_COMPILED = marshal.dumps(compile(_CHILD, "<string>", "exec"))
"""For the same interpreter: compiling is a third of its start."""


class SandboxUnavailable(RuntimeError):
    """The runner cannot work here; the message says why and what to do."""


@dataclass(frozen=True)
class Call:
    """Call a function of the program, or a method of its class `Solution`."""

    function: str
    arguments: list[Any]
    """Plain values, as from JSON."""


@dataclass(frozen=True)
class Check:
    """Run code after the program, among its names."""

    tests: str
    entry_point: str | None = None
    """Name of the program's function to give to the `check` that the tests define."""


@dataclass(frozen=True)
class Result:
    """What came of a program."""

    stdout: str
    """With `Call`, JSON of what the function returned, and with `Check` nothing: what is printed goes to `stderr`."""
    stderr: str
    status: Status
    """`ok`: it ran to its end, and so did the tests. `error`: it did not. Otherwise the limit that it hit."""
    exit_code: int | None
    """As of `subprocess`: negative for a signal. `None` where the parent ended it."""
    seconds: float
    """From when the process was ready to run the program."""


def run(
    program: str,
    *,
    stdin: str = "",
    then: Call | Check | None = None,
    seconds: float = 5.0,
    memory_mib: int = 512,
    output_kib: int = 64,
    packages: bool = False,
    runner: Runner = "landlock",
    image: str = "",
) -> Result:
    """Run a program as a script with `stdin`; or, with `then`, as a module, and then call or check it.

    `seconds` is wall-clock time, `memory_mib` address space, `output_kib` the most that standard output and standard
    error may each hold. With `packages` the program can import this interpreter's installed packages, else the standard
    library alone. `runner`: `landlock` confines a process by the kernel's Landlock and seccomp; `container` starts one
    of `image` with docker or podman; `none` confines nothing.

    Raises `SandboxUnavailable` where the runner cannot work, whatever the program is, and `ValueError` for a setting
    that makes no sense.
    """
    if runner not in get_args(Runner):
        raise ValueError(f"runner {runner!r} is none of {', '.join(get_args(Runner))}")
    if min(seconds, memory_mib, output_kib) <= 0:
        raise ValueError(f"seconds {seconds}, memory_mib {memory_mib} and output_kib {output_kib} must be positive")
    if runner == "landlock":
        _check_landlock()
    limits = _Limits(seconds, memory_mib, output_kib)
    return _run(program, stdin, then, limits, packages=packages, runner=runner, image=image)


@dataclass(frozen=True)
class _Limits:
    seconds: float
    memory_mib: int
    output_kib: int


def _run(
    program: str,
    stdin: str,
    then: Call | Check | None,
    limits: _Limits,
    *,
    packages: bool = False,
    runner: Runner = "landlock",
    image: str = "",
) -> Result:
    contained, token = runner == "container", secrets.token_hex(16)
    with _directory() as directory:
        job: dict[str, Any] = {
            "program": program,
            "mode": "script" if then is None else "call" if isinstance(then, Call) else "check",
            "confine": runner == "landlock",
            "parent": None if contained else os.getpid(),
            "directory": "/tmp" if contained else directory,
            "readable": _readable(packages),
            "packages": site.getsitepackages() if packages and not contained else [],
            "memory_bytes": limits.memory_mib << 20,
            "cpu_seconds": math.ceil(limits.seconds) + 1,
            "file_bytes": FILE_MIB << 20,
            "open_files": MAX_OPEN_FILES,
        }
        sent: list[Any] = [job]
        if isinstance(then, Call):
            job |= {"function": then.function, "arguments": then.arguments}
        elif then is not None:
            # Not in the job: the program runs before these are read.
            sent += [(then.tests, then.entry_point), token.encode()]
        messages = b"".join(_message(thing) for thing in sent)
        text = stdin.encode(errors="replace")
        if contained:
            name = f"{PREFIX}{secrets.token_hex(8)}"
            command = container_command(name, image, limits, packages)
            with _sealed(messages + text) as given:
                result = _outcome(_start(command, stdin=given), limits, end=[command[0], "kill", name])
        else:
            with _sealed(_COMPILED + messages) as jobs, _sealed(text) as given:
                load = f"import marshal, os; exec(marshal.loads(os.read({jobs}, {len(_COMPILED)})))"
                # The hash seed is read only without -E: a set's order must not decide a reward.
                command = [_interpreter(), "-P", "-s", "-B", "-S", "-c", load, str(jobs)]
                environment = _environment(directory)
                process = _start(command, stdin=given, pass_fds=(jobs,), cwd=directory, env=environment)
                result = _outcome(process, limits, directory)
    if isinstance(then, Check):
        ended_early = result.status == "ok" and result.stdout != token
        return replace(result, stdout="", status="error" if ended_early else result.status)
    return result


def container_command(name: str, image: str, limits: _Limits, packages: bool) -> list[str]:
    """The command that runs `rewards.sandbox_child` in a container; its standard input is the job and the program's.

    Raises `SandboxUnavailable` without a client of containers.
    """
    client = shutil.which("docker") or shutil.which("podman")
    if client is None:
        raise SandboxUnavailable("runner container: neither docker nor podman is installed")
    files = f"rw,size={DISK_MIB}m,nr_inodes={MAX_FILES},mode=0700,uid=65534,gid=65534"
    memory = f"{limits.memory_mib + DISK_MIB}m"  # the address space is limited itself; this also holds its files
    return [
        *(client, "run", "--rm", "--interactive", "--name", name, "--pull", "never", "--log-driver", "none"),
        *("--network", "none", "--read-only", "--tmpfs", f"/tmp:{files}", "--workdir", "/tmp"),
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65534:65534"),
        *("--memory", memory, "--memory-swap", memory, "--pids-limit", str(MAX_THREADS)),
        *("--env", "HOME=/tmp", "--env", "PYTHONHASHSEED=0", "--env", "PYTHONUTF8=1"),
        image or f"python:{sys.version_info.major}.{sys.version_info.minor}-slim",
        # Ends the container even where this process was killed.
        *("timeout", "-s", "KILL", str(math.ceil(limits.seconds + START_SECONDS))),
        *("python", "-P", "-s", "-B", *([] if packages else ["-S"]), "-c", _CHILD, "0"),
    ]


def _start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    return subprocess.Popen[bytes](command, start_new_session=True, **output, **options)


def _outcome(
    process: subprocess.Popen[bytes], limits: _Limits, directory: str | None = None, end: list[str] | None = None
) -> Result:
    """Watch a process to its end, which it meets here at the latest. `end`: a command that ends what it started."""
    watch = _Watch(process, limits, directory)
    hit: Status | None = "timeout"
    try:
        hit = watch.until_over()
    finally:
        over_at = time.monotonic()
        # Not waited for yet, so the id is still its own.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        # Only now: a daemon may not end what still waits for a client that does not read.
        if end is not None and hit is not None:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(end, check=False, capture_output=True, timeout=START_SECONDS)
        watch.close()
    stdout, stderr = (data.decode(errors="replace") for data in (watch.stdout, watch.stderr))
    if watch.ready_at is None:
        reason = f"it took more than {START_SECONDS:g} s" if hit else stderr.strip() or f"exit code {code}"
        raise SandboxUnavailable(f"the process did not start the program: {reason}")
    return Result(stdout, stderr, hit or _status(code), None if hit else code, over_at - watch.ready_at)


def _status(code: int) -> Status:
    signalled = -code if code < 0 else code - 128  # a container's code is a shell's
    if code == sandbox_child.MEMORY_EXIT or signalled == signal.SIGKILL:
        return "memory"
    if signalled == signal.SIGXCPU:
        return "timeout"
    return "ok" if code == 0 else "error"


class _Watch:
    """Collects a process's output until it ends or hits a limit."""

    def __init__(self, process: subprocess.Popen[bytes], limits: _Limits, directory: str | None) -> None:
        self._process, self._seconds, self._directory = process, limits.seconds, directory
        self._output_bytes = limits.output_kib << 10
        self._selector = selectors.DefaultSelector()
        self._stdout, self._stderr = bytearray(), bytearray()
        for stream, data in ((process.stdout, self._stdout), (process.stderr, self._stderr)):
            assert stream is not None
            self._selector.register(stream, selectors.EVENT_READ, data)
        self.ready_at: float | None = None
        """Monotonic time of the process's first byte, which says that the program's time begins."""

    @property
    def stdout(self) -> bytes:
        return bytes(self._stdout[1 : self._output_bytes + 1])

    @property
    def stderr(self) -> bytes:
        return bytes(self._stderr[: self._output_bytes])

    def until_over(self) -> Status | None:
        """Returns the limit that was hit, `None` where the process ended by itself."""
        started = looked = time.monotonic()
        pause = 0.0005
        while True:
            now = time.monotonic()
            if self.ready_at is None:
                if now - started > START_SECONDS:
                    return "timeout"
            elif now - self.ready_at > self._seconds:
                return "timeout"
            elif now - looked > TICK:
                if hit := self._look():
                    return hit
                looked = time.monotonic()
            if not self._selector.get_map():
                if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return None
                time.sleep(pause)
                pause = min(2 * pause, TICK)
                continue
            for key, _ in self._selector.select(TICK):
                part = os.read(key.fd, 1 << 16)
                key.data.extend(part)
                if not part:
                    self._selector.unregister(key.fileobj)
                if self.ready_at is None and self._stdout.startswith(sandbox_child.READY):
                    self.ready_at = time.monotonic()
                if len(key.data) > self._output_bytes + 1:
                    return "output"

    def _look(self) -> Status | None:
        with suppress(OSError):
            text = Path(f"/proc/{self._process.pid}/stat").read_text(errors="replace")
            if int(text.rpartition(")")[2].split()[17]) > MAX_THREADS:
                return "threads"
        if self._directory is None:
            return None
        held = _held_bytes(self._process.pid, os.path.realpath(self._directory))
        return "disk" if _over_disk(self._directory, held) else None

    def close(self) -> None:
        self._selector.close()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


def _held_bytes(pid: int, directory: str) -> int:
    """Bytes in files that a process has deleted but holds: open ones, and mapped ones, each counted as the largest that
    there may be, as its size cannot be read."""
    for thread in _entries(f"/proc/{pid}/task"):  # the first may have ended before the others
        with suppress(OSError):
            lines = Path(f"{thread}/maps").read_bytes().splitlines()
            if not lines:
                continue
            prefix = f" {directory}/".encode()
            mapped = {line.split()[4] for line in lines if prefix in line and line.endswith(b" (deleted)")}
            return (len(mapped) * FILE_MIB << 20) + sum(map(_deleted_bytes, _entries(f"{thread}/fd")))
    return 0


def _deleted_bytes(descriptor: str) -> int:
    with suppress(OSError):
        found = os.stat(descriptor)
        if found.st_nlink or not stat.S_ISREG(found.st_mode):
            return 0
        with suppress(OSError):  # of a name that is too long
            if os.readlink(descriptor).startswith("/memfd:"):  # its input
                return 0
        return found.st_blocks * 512
    return 0


def _entries(directory: str) -> list[str]:
    with suppress(OSError):
        return [f"{directory}/{name}" for name in os.listdir(directory)]
    return []


def _over_disk(directory: str, held: int) -> bool:
    """Whether the program has more files, or more in them and `held`, than it may. One that hides them has."""
    files, size, left = 0, held, [(directory, 0)]
    while left:
        path, depth = left.pop()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    files += 1
                    with suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if files > MAX_FILES or depth > MAX_DEPTH:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        left.append((entry.path, depth + 1))
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return size > DISK_MIB << 20


@lru_cache(maxsize=1)
def _check_landlock() -> None:
    """Raise `SandboxUnavailable` unless the kernel confines a program for real. Also clears up after killed runs."""
    _sweep()
    advice = (
        "It needs Linux 5.13 or later with Landlock enabled (lsm=landlock,...) and seccomp, on x86_64 or aarch64. Run "
        "programs in containers with arguments: {runner: container}, or, at your own risk and without any protection, "
        "with {runner: none}"
    )
    if sys.platform != "linux":
        raise SandboxUnavailable(f"runner landlock: this is {sys.platform}. {advice}")
    try:
        with tempfile.NamedTemporaryFile(prefix=PREFIX) as outside:
            program = _PROBE.format(path=outside.name, parent=os.getpid())
            result = _run(program, "", None, _Limits(START_SECONDS, 512, 64))
    except SandboxUnavailable as error:
        raise SandboxUnavailable(f"runner landlock: {error}. {advice}") from None
    if (result.status, result.stdout) != ("ok", "confined\n"):
        raise SandboxUnavailable(f"runner landlock: it lets a program through: {result}. {advice}")


_PROBE = """
import os, socket
tries = dict(
    read=lambda: open({path!r}), write=lambda: open({path!r}, "w"), list=lambda: os.listdir("/"),
    environment=lambda: open("/proc/{parent}/environ"), socket=socket.socket, fork=os.fork,
    signal=lambda: os.kill({parent}, 0), execute=lambda: os.execv("/bin/true", ["true"]),
    mode=lambda: os.chmod({path!r}, 0o600),
)
for name, attempt in tries.items():
    try:
        attempt()
    except PermissionError:
        continue
    print(name, flush=True)
print("confined")
"""


@lru_cache(maxsize=2)
def _readable(packages: bool) -> list[str]:
    """What a program may read beside its own directory: the interpreter, the system's libraries, the time zones."""
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]
    data = ["/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/urandom", "/dev/zero"]
    return libraries + data + (site.getsitepackages() if packages else [])


def _interpreter() -> str:
    """Not the virtual environment's, which reads its configuration at each start."""
    return getattr(sys, "_base_executable", None) or sys.executable


def _environment(directory: str) -> dict[str, str]:
    given = {
        **{"HOME": directory, "TMPDIR": directory, "PATH": "", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        # Address space is what is limited: no arena of malloc nor thread of a BLAS shall reserve it.
        **{"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    }
    if "LD_LIBRARY_PATH" in os.environ:  # the interpreter itself may need it
        given["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return given


def _message(thing: Any) -> bytes:
    data = marshal.dumps(thing, 4)  # 4: the last version that every supported interpreter reads
    return struct.pack("<Q", len(data)) + data


@contextmanager
def _sealed(data: bytes):
    """Descriptor of a file in memory that cannot be changed. Not a pipe: nobody needs to feed it."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _directory():
    """A directory for one run. Its lock tells a run under way from one whose process was killed."""
    path = tempfile.mkdtemp(prefix=PREFIX)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        _remove(path)
        os.close(lock)


def _sweep() -> None:
    """Remove the directories of runs whose process was killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                found = os.fstat(lock)
                # Another user can put anything under such a name, but not replace a directory that is ours.
                if found.st_uid == os.getuid() and time.time() - found.st_mtime > SWEEP_SECONDS:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(str(path))
            finally:
                os.close(lock)


def _remove(top: str) -> None:
    """Remove a directory that a program has filled: its directories may be closed to their owner, or nested deeper than
    a path or a recursion can go. So each is opened, and what it holds is moved up."""
    try:
        while directories := _empty(top, top):
            for path in directories:
                _empty(path, top)
                os.rmdir(path)
        os.rmdir(top)
    except OSError as error:
        logger.warning("%s of a sandboxed program could not be removed: %s", top, error)


def _empty(directory: str, top: str) -> list[str]:
    """Delete a directory's files. Its directories are made accessible and moved into `top`; returns their paths."""
    with os.scandir(directory) as entries:
        found = list(entries)
    moved: list[str] = []
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            os.chmod(entry.path, 0o700)
            moved.append(f"{top}/{secrets.token_hex(8)}")
            os.rename(entry.path, moved[-1])
        else:
            os.unlink(entry.path)
    return moved
