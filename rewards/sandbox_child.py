"""The process of `rewards.sandbox` that confines itself for good and then runs the program.

It is given to a bare interpreter as source text: the standard library only, and little of that, for every run pays for
its start. Its argument is the descriptor to read the job from. It answers on standard output, first with `READY` once
it is confined, then with what the job asks for. If it cannot confine itself it says why on standard error and ends.
"""

from __future__ import annotations

import builtins
import ctypes
import marshal
import os
import resource
import struct
import sys
from types import FunctionType, ModuleType, TracebackType

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing these would double the time of a start
    from collections.abc import Callable
    from typing import Any, NoReturn

READY = b"+"
MEMORY_EXIT = 86
"""Exit code for an uncaught MemoryError."""

# What an interpreter and its extension modules need of the kernel, by machine (`-`: it has no such call). All else is
# denied: whatever reaches other processes, the network, the kernel's settings, or a file's owner, mode and times,
# which Landlock does not guard.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables below, and the audit architecture."""
ALLOWED = """
read 0 63; write 1 64; readv 19 65; writev 20 66; pread64 17 67; pwrite64 18 68; preadv 295 69; pwritev 296 70;
lseek 8 62; close 3 57; dup 32 23; dup2 33 -; dup3 292 24; pipe 22 -; pipe2 293 59; select 23 -; pselect6 270 72;
poll 7 -; ppoll 271 73; epoll_create 213 -; epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -;
epoll_pwait 281 22; eventfd2 290 19; creat 85 -; stat 4 -; fstat 5 80; lstat 6 -; newfstatat 262 79; statx 332 291;
statfs 137 43; fstatfs 138 44; access 21 -; faccessat 269 48; readlink 89 -; readlinkat 267 78; getdents 78 -;
getdents64 217 61; getcwd 79 17; chdir 80 49; fchdir 81 50; rename 82 -; renameat 264 38; renameat2 316 276;
mkdir 83 -; mkdirat 258 34; rmdir 84 -; unlink 87 -; unlinkat 263 35; ftruncate 77 46;
fadvise64 221 223; flock 73 32; fsync 74 82; fdatasync 75 83; sendfile 40 71; copy_file_range 326 285; umask 95 166;
mmap 9 222; munmap 11 215; mprotect 10 226; mremap 25 216; madvise 28 233; msync 26 227; brk 12 214;
membarrier 324 283; rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigpending 127 136;
rt_sigtimedwait 128 137; rt_sigsuspend 130 133; sigaltstack 131 132; pause 34 -; restart_syscall 219 128; alarm 37 -;
getitimer 36 102; setitimer 38 103; timer_create 222 107; timer_settime 223 110; timer_gettime 224 108;
timer_getoverrun 225 109; timer_delete 226 111; nanosleep 35 101; clock_nanosleep 230 115; clock_gettime 228 113;
clock_getres 229 114; gettimeofday 96 169; time 201 -; times 100 153; futex 202 98; set_robust_list 273 99;
get_robust_list 274 100; set_tid_address 218 96; rseq 334 293; arch_prctl 158 -; sched_yield 24 124;
sched_getaffinity 204 123; sched_getparam 143 121; sched_getscheduler 145 120; getcpu 309 168; getpid 39 172;
getppid 110 173; gettid 186 178; getuid 102 174; geteuid 107 175; getgid 104 176; getegid 108 177; getresuid 118 148;
getresgid 120 150; getgroups 115 158; getpgrp 111 -; getpgid 121 155; getsid 124 156; getrlimit 97 163;
getrusage 98 165; getpriority 140 141; uname 63 160; sysinfo 99 179; getrandom 318 278; wait4 61 260; waitid 247 95;
exit 60 93; exit_group 231 94; getsockname 51 204; getpeername 52 205; getsockopt 55 209; shutdown 48 210
"""
ALL = 0xFFFFFFFF
PID = -1
"""Stands for the process's own id."""
# Allowed where, of each listed argument, the bits of a mask have one of some values.
CONDITIONAL: dict[str, list[tuple[int, int, list[int]]]] = {
    # Truncating needs no permission to write before Landlock's ABI 3, so none opens for reading and truncates. Nor
    # O_TMPFILE: a file without a name is in no directory that the parent looks at.
    "open 2 -": [(1, 0o20001003, [0, 1, 2, 3, 0o1001, 0o1002, 0o1003])],
    "openat 257 56": [(2, 0o20001003, [0, 1, 2, 3, 0o1001, 0o1002, 0o1003])],
    # A thread, with the same open files, so that their limit is for all; and no new namespace.
    "clone 56 220": [(0, 0x7E032400, [0x10400])],
    "kill 62 129": [(0, ALL, [PID])],
    "tgkill 234 131": [(0, ALL, [PID])],
    "prlimit64 302 261": [(0, ALL, [0, PID])],
    # Of FIOCLEX, FIONCLEX, FIONBIO, FIONREAD, TCGETS, TIOCGWINSZ none makes a descriptor send signals.
    "ioctl 16 29": [(1, ALL, [0x5451, 0x5450, 0x5421, 0x541B, 0x5401, 0x5413])],
    # Nor of F_DUPFD, F_{GET,SET}{FD,FL,LK}, F_SETLKW, F_DUPFD_CLOEXEC, F_GETPIPE_SZ.
    "fcntl 72 25": [(1, ALL, [0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032])],
    # PR_SET_NAME, PR_GET_NAME, and PR_SET_VMA, with which malloc names its memory.
    "prctl 157 167": [(0, ALL, [15, 16, 0x53564D41])],
    # What asyncio wakes itself with: a connected AF_UNIX stream, on which an address cannot be given.
    "socketpair 53 199": [(0, ALL, [1]), (1, 0xF, [1])],
    # MSG_DONTWAIT and MSG_NOSIGNAL only: MSG_OOB has been a way into the kernel (CVE-2025-38236).
    "sendto 44 206": [(3, ALL & ~0x4040, [0])],
    "recvfrom 45 207": [(3, ALL & ~0x4040, [0])],
}
NEWER = 424
"""First number that is the same on all machines. These calls are answered as by a kernel without them, so that a C
library falls back (clone3, openat2, faccessat2); x86's numbers of the x32 ABI are above it too."""

READ, READ_DIR, WRITE = 1 << 2, 1 << 3, 1 << 1
OWN = READ | READ_DIR | WRITE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8
"""In the program's own directory also: remove directories and files, make directories and regular files. Not: links,
devices, sockets, pipes with names."""
TRUNCATE = 1 << 14


def main() -> None:
    descriptor = int(sys.argv[1])
    job = receive(descriptor)
    try:
        limit(job)
        if job["parent"] is not None:
            die_with(job["parent"])
        if job["confine"]:
            confine(job)
        os.chdir(job["directory"])
    except OSError as error:
        sys.stderr.write(str(error))
        sys.stderr.flush()
        os._exit(1)
    sys.argv[:] = ["program.py"]
    sys.path.extend(job["packages"])
    if job["mode"] == "script":
        if descriptor:
            os.close(descriptor)
        os.write(1, READY)
        sys.exit(run_script(job["program"]))
    if not descriptor:
        descriptor = os.dup(0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # What the program prints goes with its errors: standard output carries the answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    os.write(answers, READY)
    run_function(job, answers) if job["mode"] == "call" else run_tests(job["program"], descriptor, answers)


def receive(descriptor: int) -> Any:
    """Read the next object that the parent sent, and not a byte beyond it."""

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = os.read(descriptor, size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    return marshal.loads(exactly(struct.unpack("<Q", exactly(8))[0]))


def run_script(program: str) -> int:
    """Run the program as a script; returns its exit code, unless it exits by itself."""
    excepthook = sys.excepthook
    try:
        execute(program, "program.py", module("__main__"))
    except SystemExit:
        raise
    except MemoryError:
        os._exit(MEMORY_EXIT)
    except BaseException as error:
        excepthook(type(error), error.with_traceback(own_frames(error)), None)
        return 1
    return 0


def run_function(job: dict[str, Any], answers: int) -> NoReturn:
    """Answer with JSON of what the program's function, or the method of its class Solution, returns."""
    import json

    dumps, name = json.dumps, job["function"]

    def steps() -> None:
        namespace = module("solution")
        execute(job["program"], "program.py", namespace)
        function = namespace.get(name)
        if function is None and hasattr(namespace.get("Solution"), name):
            function = getattr(namespace["Solution"](), name)
        if function is None:
            raise NameError(f"the program defines no {name}")
        write_all(answers, dumps(function(*job["arguments"])).encode())

    finish(steps)


def run_tests(program: str, descriptor: int, answers: int) -> NoReturn:
    """Answer with the token that comes after the tests, once they have run to their end."""
    receive_rest, write, call = receive, write_all, call_tests

    def steps() -> None:
        namespace = module("solution")
        names, own = builtins.__dict__, dict(namespace)
        original = dict(names)
        # The program's functions look up builtins here for ever, and so keep the names that the tests shall not see.
        namespace["__builtins__"] = its_names = dict(names)
        execute(program, "program.py", namespace)
        names.update(original)
        tests, entry_point = receive_rest(descriptor)
        for name in (original.keys() & namespace.keys()) - own.keys() - {entry_point}:
            its_names[name] = namespace.pop(name)
        namespace["__builtins__"] = names
        before = dict(namespace)
        execute(tests, "tests.py", namespace)
        call(
            {name: value for name, value in namespace.items() if before.get(name) is not value}, namespace, entry_point
        )
        write(answers, receive_rest(descriptor))

    finish(steps)


def call_tests(added: dict[str, Any], namespace: dict[str, Any], entry_point: str | None) -> None:
    """Call what the tests define and do not call themselves: `check(candidate)`, test functions, unittest's cases."""
    if entry_point is not None and "check" in added:
        added["check"](namespace[entry_point])
    for name, value in added.items():
        if name.startswith("test") and isinstance(value, FunctionType) and not value.__code__.co_argcount:
            value()
    if "unittest" in sys.modules:
        import unittest

        for value in added.values():
            if isinstance(value, type) and issubclass(value, unittest.TestCase):
                result = unittest.TestResult()
                unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
                if not result.wasSuccessful():
                    raise AssertionError((result.failures + result.errors)[0][1].strip().splitlines()[-1])


def finish(steps: Callable[[], None]) -> NoReturn:
    """Take the steps and end at once; whatever the program left behind (threads, exit handlers) has no say."""
    leave, excepthook, stderr = os._exit, sys.excepthook, sys.stderr
    try:
        steps()
    except MemoryError:
        leave(MEMORY_EXIT)
    except BaseException as error:  # SystemExit too
        excepthook(type(error), error.with_traceback(own_frames(error)), None)
        stderr.flush()
        leave(1)
    leave(0)


def own_frames(error: BaseException) -> TracebackType | None:
    """The traceback from where the program begins: this file is `<string>`."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == "<string>":
        frames = frames.tb_next
    return frames


def module(name: str) -> dict[str, Any]:
    """The names of a new module that is known to `import` by its name."""
    sys.modules[name] = made = ModuleType(name)
    return vars(made)


def execute(source: str, file: str, namespace: dict[str, Any]) -> None:
    exec(compile(source, file, "exec", dont_inherit=True), namespace)


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def limit(job: dict[str, Any]) -> None:
    """Set the limits that the kernel counts. Reaching the first on processor time is a signal that shows."""
    for name, soft, hard in [
        ("AS", job["memory_bytes"], job["memory_bytes"]),
        ("CPU", job["cpu_seconds"], job["cpu_seconds"] + 1),
        ("FSIZE", job["file_bytes"], job["file_bytes"]),
        ("NOFILE", job["open_files"], job["open_files"]),
        ("CORE", 0, 0),
    ]:
        kind = getattr(resource, f"RLIMIT_{name}")
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def die_with(parent: int) -> None:
    """Be killed when the parent's thread that started this process ends, however it does."""
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:
        os._exit(1)


def confine(job: dict[str, Any]) -> None:
    """Give up for good what the program must not do. Raises `OSError` that says what the kernel lacks."""
    libc = ctypes.CDLL(None, use_errno=True)

    def called(what: str, result: int) -> int:
        if result < 0:
            raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")
        return result

    if os.uname().machine not in MACHINES or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(f"no table of system calls for {os.uname().machine}")
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, which fails for one who has none
    called("capset", libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24)))
    called("no_new_privs", libc.prctl(38, 1, 0, 0, 0))
    landlock(libc, called, job["readable"], job["directory"])
    program = seccomp_filter(os.uname().machine, os.getpid())
    memory = ctypes.create_string_buffer(program)
    filters = struct.pack("H6xQ", len(program) // 8, ctypes.addressof(memory))
    called("seccomp", libc.prctl(22, 2, ctypes.c_char_p(filters), 0, 0))


def landlock(libc: Any, called: Callable[[str, int], int], readable: list[str], directory: str) -> None:
    """Allow reading beneath `readable`, and reading and writing beneath `directory`; no other file is opened."""

    def syscall(number: int, *arguments: Any) -> int:
        return libc.syscall(ctypes.c_long(number), *arguments)

    abi = called("Landlock", syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)))
    # File rights by ABI: 1 the first 13; 2 linking and renaming between directories; 3 truncating; 5 ioctl of devices.
    files = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    attributes = struct.pack("<QQQ", files, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = called("Landlock", syscall(444, attributes, ctypes.c_size_t(size), ctypes.c_uint(0)))
    for path, rights in [(p, READ | READ_DIR) for p in readable] + [(os.devnull, READ | WRITE), (directory, OWN)]:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rights |= TRUNCATE & files if rights & WRITE else 0
        if not os.path.isdir(path):
            rights &= READ | WRITE | TRUNCATE
        rule = struct.pack("<Qi", rights, beneath)
        called(f"Landlock, {path}", syscall(445, rules, ctypes.c_int(1), rule, ctypes.c_uint(0)))
        os.close(beneath)
    called("Landlock", syscall(446, rules, ctypes.c_uint(0)))
    os.close(rules)


def seccomp_filter(machine: str, pid: int) -> bytes:
    """The system calls above as a program for the kernel's packet filter, which sees a `struct seccomp_data`."""
    column, architecture = MACHINES[machine]
    load, equal, at_least, bits, answer = 0x20, 0x15, 0x35, 0x54, 0x06  # words at an offset; jumps; and; return
    allow, kill, not_permitted, no_such_call = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026

    def op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, jump_true, jump_false, k)

    program = [op(load, 4), op(equal, architecture, 1, 0), op(answer, kill), op(load, 0)]
    program += [op(at_least, NEWER, 0, 1), op(answer, no_such_call)]
    for call in ALLOWED.split(";"):
        number = call.split()[1 + column]
        if number != "-":
            program += [op(equal, int(number), 0, 1), op(answer, allow)]
    for call, conditions in CONDITIONAL.items():
        number = call.split()[1 + column]
        if number == "-":
            continue
        body: list[bytes] = []
        for argument, mask, values in conditions:
            # The kernel too looks at the low 32 bits alone of these arguments.
            body += [op(load, 16 + 8 * argument), op(bits, mask)]
            body += [op(equal, pid if value == PID else value, len(values) - i) for i, value in enumerate(values)]
            body += [op(answer, not_permitted)]
        program += [op(equal, int(number), 0, len(body) + 1), *body, op(answer, allow)]
    return b"".join([*program, op(answer, not_permitted)])


if __name__ == "__main__":
    main()
