"""Programs that try to break out of the sandbox, or to outlive it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from rewards import sandbox, sandbox_child
from rewards.sandbox import Call, Check, Result, SandboxUnavailable, run

ROOT = Path(__file__).parents[2]

try:
    run("pass")
except SandboxUnavailable as error:
    pytest.skip(f"no sandbox here: {error}", allow_module_level=True)


def ran(program: str, seconds: float = 5.0, slack: float = 1.5, **settings) -> Result:
    """Run a program; whatever it is, neither a process nor a directory is left, and the limit holds."""
    started, children = time.monotonic(), own_children()
    result = run(textwrap.dedent(program), seconds=seconds, **settings)
    assert time.monotonic() - started < seconds + slack
    assert own_children() == children
    assert not list(Path(tempfile.gettempdir()).glob(f"{sandbox.PREFIX}*"))
    return result


def own_children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_program_reads_its_input_and_prints():
    result = ran("print(input()[::-1]); print(open('/dev/stdin').read().strip())", stdin="abc\nrest\n")
    assert (result.status, result.stdout, result.stderr, result.exit_code) == ("ok", "cba\nabc\nrest\n", "", 0)


@pytest.mark.parametrize(
    ("program", "status", "code"),
    [
        ("import sys; sys.exit(0)", "ok", 0),
        ("import sys; sys.exit(3)", "error", 3),
        ("1/0", "error", 1),
        ("def f(:", "error", 1),
        ("import ctypes; ctypes.string_at(0)", "error", -11),
        ("import os; os.abort()", "error", -6),
        ("input()", "error", 1),
    ],
)
def test_how_it_ended(program: str, status: str, code: int):
    result = ran(program)
    assert (result.status, result.exit_code) == (status, code)


def test_what_programs_need_works():
    result = ran(
        """
        import asyncio, datetime, heapq, json, math, multiprocessing, os, random, re, sqlite3, subprocess, sys, tempfile
        import threading, time, zoneinfo
        from concurrent.futures import ThreadPoolExecutor
        sys.setrecursionlimit(10**6)
        with tempfile.TemporaryDirectory() as d, open(d + "/f", "w+") as f:
            f.write("x"); f.seek(0); assert f.read() == "x"
        open("here", "w").close(); os.rename("here", "there"); assert os.listdir() == ["there"]
        os.makedirs("a/b"); os.rmdir("a/b"); os.remove("there")
        threading.stack_size(64 << 20)
        t = threading.Thread(target=time.sleep, args=(0.01,)); t.start(); t.join()
        with ThreadPoolExecutor(4) as pool: assert list(pool.map(abs, [-1, -2])) == [1, 2]
        async def main(): return await asyncio.gather(asyncio.sleep(0.01, 1), asyncio.to_thread(int, "2"))
        assert asyncio.run(main()) == [1, 2]
        assert zoneinfo.ZoneInfo("Europe/Paris")
        sqlite3.connect("a.db").execute("create table t (x)")
        assert __name__ == "__main__" and random.random() and os.urandom(4)
        print("fine", file=sys.stderr)
        """
    )
    assert (result.status, result.stderr) == ("ok", "fine\n")


def test_sets_have_one_order():
    outputs = {ran("print({str(i) for i in range(99)})").stdout for _ in range(2)}
    assert len(outputs) == 1


def test_packages_are_there_where_wanted():
    program = "import numpy; print(numpy.ones((9, 9)) @ numpy.ones(9))"
    assert "ModuleNotFoundError" in ran(program).stderr
    assert ran(program, packages=True, seconds=20, memory_mib=1024).status == "ok"


FORBIDDEN = {
    "read a file": "open(SECRET)",
    "read by a link": "os.symlink(SECRET, 'link'); open('link')",
    "read by a hard link": "os.link(SECRET, 'link'); open('link')",
    "read through a directory": "os.open('secret', 0, dir_fd=os.open(os.path.dirname(SECRET), os.O_PATH))",
    "read relatively": "os.chdir(os.path.dirname(SECRET)); open(os.path.basename(SECRET))",
    "the accounts": "open('/etc/passwd')",
    "own environment": "open('/proc/self/environ')",
    "another's environment": "open(f'/proc/{PARENT}/environ')",
    "another's memory": "open(f'/proc/{PARENT}/mem', 'rb')",
    "another's directory": "os.open(f'/proc/{PARENT}/cwd', os.O_RDONLY)",
    "list the root": "os.listdir('/')",
    "list home": "os.listdir(os.path.dirname(SECRET))",
    "list processes": "os.listdir('/proc')",
    "list the temporary directory": "os.listdir('..')",
    "write": "open(SECRET, 'w')",
    "append": "open(SECRET, 'a')",
    "truncate": "os.truncate(SECRET, 0)",
    "truncate while reading": "os.open(SECRET, os.O_RDONLY | os.O_TRUNC)",
    "create": "open(os.path.dirname(SECRET) + '/new', 'w')",
    "create beside": "open('../new', 'w')",
    "remove": "os.remove(SECRET)",
    "rename away": "os.rename(SECRET, 'mine')",
    "rename onto": "open('mine', 'w'); os.rename('mine', SECRET)",
    "mode": "os.chmod(SECRET, 0o777)",
    "owner": "os.chown(SECRET, os.getuid(), os.getgid())",
    "times": "os.utime(SECRET)",
    "attributes": "os.setxattr(SECRET, 'user.x', b'1')",
    "write a library": "open(os.__file__, 'a')",
    "make a pipe": "os.mkfifo('pipe')",
    "a file without a name": "os.open('.', os.O_TMPFILE | os.O_RDWR)",
    "allocate": "os.posix_fallocate(os.open('mine', os.O_RDWR | os.O_CREAT), 0, 1 << 20)",
    "shared memory": "from multiprocessing.shared_memory import SharedMemory; SharedMemory(create=True, size=9)",
    "TCP": "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "UDP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect(SECRET)",
    "packet pair": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "urllib": "import urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{PORT}')",
    "fork": "os.fork()",
    "fork a terminal": "os.open('/dev/ptmx', os.O_RDWR)",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "system": "assert os.system('true') == 0, PermissionError()",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "os.execv('/bin/true', ['true'])",
    "exec itself": "os.execv(sys.executable, [sys.executable])",
    "multiprocessing": "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
    "kill the parent": "os.kill(PARENT, 9)",
    "stop the parent": "os.kill(PARENT, 19)",
    "kill everything": "os.kill(-1, 9)",
    "kill its group": "os.killpg(0, 9)",
    "signal a thread": "ctypes_call('tgkill', PARENT, PARENT, 9)",
    "queue a signal": "ctypes_call('sigqueue', PARENT, 9, 0)",
    "signals of a pipe": "import fcntl; fcntl.fcntl(1, fcntl.F_SETOWN, PARENT)",
    "limit the parent": "import resource; resource.prlimit(PARENT, resource.RLIMIT_CPU, (0, 0))",
    "slow the parent": "os.setpriority(os.PRIO_PROCESS, PARENT, 19)",
    "pin the parent": "os.sched_setaffinity(PARENT, [0])",
    "lead a session": "os.setsid()",
    "leave its group": "os.setpgid(0, 0)",
    "other user": "os.setuid(65534); os.setgroups([])",
    "trace": "ctypes_call('ptrace', 16, PARENT, 0, 0)",
    "live on": "ctypes_call('prctl', 1, 0, 0, 0, 0)",
    "mount": "ctypes_call('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
    "change root": "os.chroot('.')",
    "namespaces": "ctypes_call('unshare', 0x10000000)",
    "keys": "ctypes_call('syscall', {'x86_64': 250, 'aarch64': 219}[os.uname().machine], 0, 0)",
    "bpf": "ctypes_call('syscall', {'x86_64': 321, 'aarch64': 280}[os.uname().machine], 0, 0, 0)",
    "memory in no limit": "os.memfd_create('m')",
    "System V memory": "ctypes_call('shmget', 0, 4096, 0o1600)",
    "raise limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
}
NEWER = {"pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_is_forbidden_fails(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program, secret = forbidden_program(what, tmp_path)
    result = ran(program)
    assert (result.status, result.stdout) == ("ok", "denied\n"), result
    assert secret.read_text() == "secret"
    assert list(secret.parent.iterdir()) == [secret]


def forbidden_program(what: str, tmp_path: Path) -> tuple[str, Path]:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    secret = home / "secret"
    secret.write_text("secret")
    program = f"""
import ctypes, os, sys
SECRET, PARENT, PORT = {str(secret)!r}, {os.getpid()}, 9
def ctypes_call(name, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
try:
    {FORBIDDEN[what]}
except PermissionError:
    print("denied")
except Exception as error:
    # Wrapped by a library, or what resource.setrlimit makes of it.
    reason = getattr(error, "reason", None) or error
    told = isinstance(error, AssertionError) or isinstance(reason, PermissionError) or "maximum limit" in str(error)
    print("denied" if told else repr(error))
"""
    return program, secret


@pytest.mark.parametrize("abi", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 7))])
def test_an_older_landlock_leaves_no_gap(abi: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What an ABI does not know yet (truncating, TCP, devices, signals), the filter of system calls denies."""
    older = sandbox._CHILD.replace('abi = called("Landlock", ', f"abi = min({abi}, ").replace(
        "syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)))", "syscall(444, None, ctypes.c_size_t(0), 1))"
    )
    assert older != sandbox._CHILD
    monkeypatch.setattr(sandbox, "_COMPILED", sandbox.marshal.dumps(compile(older, "<string>", "exec")))
    said = {what: ran(forbidden_program(what, tmp_path)[0]) for what in FORBIDDEN}
    assert {what: result for what, result in said.items() if result.stdout != "denied\n"} == {}
    assert (tmp_path / "home" / "secret").read_text() == "secret"


ALLOW, DENY, UNKNOWN, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


@pytest.mark.parametrize(
    ("machine", "number", "arguments", "answer"),
    [
        ("aarch64", 63, (), ALLOW),  # read
        ("aarch64", 210, (), ALLOW),  # shutdown, the last without conditions
        ("aarch64", 56, (0, 0, 0o1001), ALLOW),  # openat
        ("aarch64", 56, (0, 0, 0o1000), DENY),
        ("aarch64", 56, (0, 0, 0o20040002), DENY),  # O_TMPFILE
        ("aarch64", 220, (0x3D0F00,), ALLOW),  # clone, as for a thread
        ("aarch64", 220, (0x3D0B00,), DENY),  # without CLONE_FILES: 64 open files of its own
        ("aarch64", 220, (0x1200011,), DENY),  # as for a fork
        ("aarch64", 220, (0x103D0F00,), DENY),  # CLONE_NEWUSER
        ("aarch64", 129, (77,), ALLOW),  # kill
        ("aarch64", 129, (1,), DENY),
        ("aarch64", 199, (1, 0o2000001), ALLOW),  # socketpair, SOCK_STREAM | SOCK_CLOEXEC
        ("aarch64", 199, (1, 2), DENY),
        ("aarch64", 199, (2, 1), DENY),
        ("aarch64", 206, (0, 0, 0, 1), DENY),  # sendto, MSG_OOB
        ("aarch64", 25, (0, 8), DENY),  # fcntl, F_SETOWN
        *(("aarch64", n, (), DENY) for n in (47, 198, 203, 221, 117, 97, 40, 52, 54, 270)),
        *(("aarch64", n, (), UNKNOWN) for n in (424, 425, 435, 437, 452, 0x40000000)),
        ("x86_64", 0, (), ALLOW),
        ("x86_64", 2, (0, 0o1000), DENY),
        ("x86_64", 2, (0, 0o1102), ALLOW),
        ("x86_64", 257, (0, 0, 0o20200002), DENY),
        *(("x86_64", n, (), DENY) for n in (41, 42, 57, 58, 59, 101, 90, 285, 322)),
        ("x86_64", 0x40000000, (), UNKNOWN),
        ("other", 0, (), KILL),
    ],
)
def test_the_filter_of_system_calls(machine: str, number: int, arguments: tuple[int, ...], answer: int):
    """The program itself, of the machine that this is not too."""
    known = sandbox_child.MACHINES
    program = sandbox_child.seccomp_filter(machine if machine in known else "x86_64", pid=77)
    architecture = known[machine][1] if machine in known else 0x40000003
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    at = value = 0
    while True:
        code, jump_true, jump_false, k = struct.unpack_from("<HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, k)
        elif code == 0x54:
            value &= k
        elif code == 0x06:
            assert k == answer
            return
        else:
            at += jump_true if {0x15: value == k, 0x35: value >= k}[code] else jump_false


def test_newer_system_calls_are_as_if_unknown():
    result = ran(f"""
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        for number in {list(NEWER.values())} + [0x40000000 + 39]:
            assert libc.syscall(number, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 38, number
        """)
    assert result.status == "ok", result


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the 32-bit entry of x86-64")
def test_another_architecture_s_system_calls_kill():
    # mov eax, 20 (getpid); int 0x80; ret
    result = ran("""
        import ctypes, mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(bytes.fromhex("b814000000cd80c3"))
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
        print("through")
        """)
    assert (result.stdout, result.exit_code) == ("", -31)  # SIGSYS


def test_nothing_of_the_parent_is_in_sight(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    inherited = os.open(__file__, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    result = ran("""
        import os
        assert not {"SOME_API_KEY", "USER"} & os.environ.keys(), os.environ
        assert os.environ["HOME"] == os.getcwd()
        for fd in range(3, 64):
            try:
                os.fstat(fd)
            except OSError:
                continue
            print("open", fd)
        """)
    os.close(inherited)
    assert (result.status, result.stdout) == ("ok", ""), result


def test_no_capability_is_left():
    command = [sys.executable, "-c", WATCHED.format(root=str(ROOT))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        status = Path(f"/proc/{int(parent.stdout.readline())}/status").read_text()
        parent.kill()
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(fields[name], 16) == 0, name
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    if os.getuid() == 0:
        assert int(fields["CapBnd"], 16) == 0


WATCHED = """
import sys, time; sys.path.insert(0, {root!r})
from rewards import sandbox
sandbox.run("pass")
sandbox._Watch._look = lambda self: print(self._process.pid, flush=True)
sandbox.run("while True: pass", seconds=30)
"""


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("while True: pass", "timeout"),
        ("import re; re.match(r'(a+)+$', 'a' * 64 + 'b')", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("import os, time; os.close(1); os.close(2); time.sleep(60)", "timeout"),
        (
            "import signal, time\nfor s in set(range(1, 65)) - {9, 19, 32, 33}: signal.signal(s, signal.SIG_IGN)\n"
            "signal.pthread_sigmask(0, range(1, 65))\nwhile True: pass",
            "timeout",
        ),
        ("import atexit, time; atexit.register(time.sleep, 60)", "timeout"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", "timeout"),
        ("import os; os.kill(os.getpid(), 19)", "timeout"),
        ("10 ** 10 ** 9", "timeout"),
        ("x = bytearray(1 << 40)", "memory"),
        ("x = []\nwhile True: x.append(bytes(range(256)) * 4096)", "memory"),
        ("x = 'a'\nwhile True: x += x", "memory"),
        ("import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 20))", "error"),
        ("while True: print('a' * 99999)", "output"),
        ("import os\nwhile True: os.write(2, b'a' * 99999)", "output"),
        ("print('a' * (1 << 26))", "output"),
        (
            "import threading, time; threading.stack_size(1 << 16)\n"
            "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
            "threads",
        ),
        ("import os, itertools\nfor i in itertools.count(): open(str(i), 'w').close()", "disk"),
        ("import os\nwhile True: os.mkdir('d'); os.chdir('d')", "disk"),
        ("import os\nos.mkdir('d', 0o300); os.chdir('d')\nwhile True: os.mkdir('d', 0o300); os.chdir('d')", "disk"),
        ("import itertools\nfor i in itertools.count(): open(str(i), 'wb').write(bytes(16 << 20))", "disk"),
        ("f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))", "error"),
        ("x = [open('/dev/null') for _ in range(99)]", "error"),
        ("import os\nwhile True: os.fork()", "error"),
    ],
)
def test_limits_hold(program: str, status: str):
    result = ran(program, seconds=0.7 if status == "timeout" else 5.0, memory_mib=256)
    assert result.status == status, result.stderr[-300:]
    assert len(result.stdout) <= 64 << 10
    assert len(result.stderr) <= 64 << 10


DELETED = """
import ctypes, os, threading, time
libc = ctypes.CDLL(None)
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p
def hold(files, mib, how):
    for i in range(files):
        name = "x" * 200 + str(i)
        f = os.open(name, os.O_RDWR | os.O_CREAT)
        os.write(f, bytes(mib << 20))
        os.unlink(name)
        if how == "map":
            libc.mmap(None, 4096, 1, 1, f, 0)
            os.close(f)
    time.sleep(0.4)
    print("held")
"""


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("hold(6, 16, 'open')", "disk"),
        ("hold(6, 1, 'map')", "disk"),
        ("threading.Thread(target=hold, args=(6, 1, 'map')).start(); libc.syscall(EXIT, 0)", "disk"),
        ("hold(3, 1, 'map'); hold(3, 16, 'open')", "disk"),
        ("hold(2, 1, 'map'); hold(2, 8, 'open')", "ok"),
    ],
)
def test_deleted_files_that_are_held_count(program: str, status: str):
    leave = f"EXIT = {60 if os.uname().machine == 'x86_64' else 93}\n"
    result = ran(DELETED + leave + program, stdin="x" * (70 << 20) if status == "ok" else "")
    assert result.status == status, result


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 10.0])
def test_many_processors_count_as_time(seconds: float):
    program = "import threading, hashlib\ndef f():\n    while True: hashlib.sha256(bytes(1 << 20))\n"
    assert ran(program + "for _ in range(60): threading.Thread(target=f).start()", seconds=seconds).status == "timeout"


@pytest.mark.parametrize("ending", ["os._exit(1)", "os.kill(os.getpid(), 9)", "1/0"])
def test_it_dies_with_its_parent(ending: str, tmp_path: Path):
    # In the middle of a run: once a program says that it is there, its parent ends.
    parent = f"""
import os, sys, tempfile; sys.path.insert(0, {str(ROOT)!r}); tempfile.tempdir = {str(tmp_path)!r}
from rewards import sandbox
sandbox.run("pass")
def look(self):
    print(self._process.pid, flush=True)
    {ending}
sandbox._Watch._look = look
sandbox.run("while True: pass", seconds=30)
"""
    output = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=20).stdout
    assert gone(int(output))


def gone(pid: int) -> bool:
    """Whether a process has ended, or does within a second. An orphan may stay as a zombie where nobody reaps."""
    for _ in range(20):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_directories_of_killed_runs_are_swept(tmp_path: Path):
    left, young = tmp_path / f"{sandbox.PREFIX}left", tmp_path / f"{sandbox.PREFIX}young"
    for path in (left, young):
        (path / "d").mkdir(parents=True)
    os.utime(left, (0, 0))
    with sandbox._directory() as held:
        os.utime(held, (0, 0))
        sandbox._sweep()
        assert (left.exists(), young.exists(), Path(held).exists()) == (False, True, True)


def test_calls_answer_with_json_and_prints_go_elsewhere():
    result = ran("def f(a, b): print('hello', flush=True); return {'x': (a, b)}", then=Call("f", [1, [2]]))
    assert (result.status, result.stdout, result.stderr) == ("ok", '{"x": [1, [2]]}', "hello\n")
    method = "class Solution:\n    def f(self, a): return a + 1"
    assert ran(method, then=Call("f", [1])).stdout == "2"
    assert "defines no f" in ran("pass", then=Call("f", [])).stderr
    assert ran("def f(): return {1}", then=Call("f", [])).status == "error"
    assert ran("if __name__ == '__main__': 1/0\ndef f(): return 1", then=Call("f", [])).stdout == "1"


PASSES = "assert f(1) == 2"


@pytest.mark.parametrize(
    ("program", "tests", "status"),
    [
        ("f = lambda x: x + 1", PASSES, "ok"),
        ("f = lambda x: x", PASSES, "error"),
        ("f = lambda x: x", "def test_f(): assert f(1) == 2", "error"),
        ("f = lambda x: x + 1", "def test_f(): assert f(1) == 2", "ok"),
        (
            "f = lambda x: x",
            "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)",
            "error",
        ),
        (
            "f = lambda x: x + 1",
            "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)",
            "ok",
        ),
        ("import sys; sys.exit(0)", PASSES, "error"),
        ("import os; os._exit(0)", PASSES, "error"),
        ("def f(x): raise SystemExit(0)", PASSES, "error"),
        ("import os\ndef f(x): os._exit(0)", PASSES, "error"),
        ("import os\ndef f(x): os.write(1, b'+' * 32); os._exit(0)", PASSES, "error"),
        ("import atexit, os; atexit.register(os._exit, 0)\nf = lambda x: x", PASSES, "error"),
        ("import builtins; builtins.AssertionError = None\nf = lambda x: x", PASSES, "error"),
        ("import builtins; builtins.all = lambda x: True\nf = lambda x: x", "assert all([f(1) == 2])", "error"),
        ("import builtins; builtins.exec = builtins.compile = print\nf = lambda x: x", PASSES, "error"),
        ("import sys; sys.excepthook = lambda *a: sys.exit(0)\nf = lambda x: x", PASSES, "error"),
        ("import signal, os; signal.signal(14, lambda *a: os._exit(0)); signal.alarm(1)\ndef f(x):\n    while 1: 0",
         PASSES, "error"),
        ("import threading, os\nthreading.Timer(0.01, os._exit, [0]).start()\ndef f(x):\n    while 1: 0",
         PASSES, "error"),
        ("f = lambda x: f(x)", PASSES, "error"),
        ("set = sorted = lambda x: 0\nf = lambda x: 0", "assert set(f(1)) == set([2])", "error"),
        ("all = lambda g: True; abs = lambda x: 0\nf = lambda x: x", "assert all([f(1) == 2])", "error"),
        ("abs = lambda x: 0\nf = lambda x: x", "def test_f(): assert abs(f(1) - 2) < 1e-6", "error"),
        ("any = lambda g: True\nf = lambda x: x", "from solution import *\nassert any([f(1) == 2])", "error"),
        ("import builtins\n__builtins__ = {**vars(builtins), 'all': any}\nf = lambda x: x",
         "assert all([f(1) == 2, True])", "error"),
        ("def sum(a, b): return a + b\ndef f(x): return sum(x, 1)", PASSES + "\nassert sum([1, 1]) == 2", "ok"),
        ("max = 0\ndef f(x):\n    global max\n    max += x + 1\n    return max", PASSES, "ok"),
        ("check = lambda c: None\nf = lambda x: x", "def check(c): assert c(1) == 2\ncheck(f)", "error"),
    ],
)  # fmt: skip
def test_tests_must_run_to_their_end(program: str, tests: str, status: str):
    assert ran(program, then=Check(tests)).status == status


def test_a_check_gets_its_candidate():
    check = Check("def check(candidate): assert candidate(1) == 2", "f")
    assert ran("f = lambda x: x + 1", then=check).status == "ok"
    assert ran("f = lambda x: x", then=check).status == "error"
    named = Check("assert sum(1, 2) == 3", "sum")
    assert ran("def sum(a, b): return a + b", then=named).status == "ok", "a candidate may have a builtin's name"


def test_the_harness_is_not_in_the_program_s_hands_by_mere_looks():
    """The tests are in no frame above the program's: they are not read yet."""
    program = """
        import sys
        frame, seen = sys._getframe().f_back, []
        while frame:
            seen.append(repr(frame.f_locals))
            frame = frame.f_back
        assert "run_tests" in str(seen) and "mar" + "ker" not in str(seen)
    """
    assert ran(program, then=Check("marker = 1")).status == "ok"


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="runner 'docker' is none of"):
        run("pass", runner="docker")
    with pytest.raises(ValueError, match="must be positive"):
        run("pass", seconds=0)


def test_without_landlock_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    sandbox._check_landlock.cache_clear()
    broken = sandbox._CHILD.replace("syscall(444, None", "syscall(9999, None")
    monkeypatch.setattr(sandbox, "_COMPILED", sandbox.marshal.dumps(compile(broken, "<string>", "exec")))
    with pytest.raises(SandboxUnavailable, match=r"Landlock: Function not implemented.*runner: container"):
        run("pass")
    assert run("print(1)", runner="none").stdout == "1\n"


def test_a_sandbox_that_lets_through_is_refused(monkeypatch: pytest.MonkeyPatch):
    sandbox._check_landlock.cache_clear()
    broken = sandbox._CHILD.replace("    landlock(libc", "    0 and landlock(libc")
    monkeypatch.setattr(sandbox, "_COMPILED", sandbox.marshal.dumps(compile(broken, "<string>", "exec")))
    with pytest.raises(SandboxUnavailable, match="lets a program through"):
        run("pass")


@pytest.fixture
def ordinary_user():
    """Options of `subprocess` for another user, a directory of its own, and an interpreter that it can run."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    user: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}
    check = ["-c", "import sys; assert sys.version_info >= (3, 11)"]
    for python in (os.path.realpath(sys.executable), "/usr/local/bin/python3", "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if subprocess.run([python, *check], capture_output=True, env={}, **user).returncode == 0:
                break
    else:
        pytest.skip("no Python that another user can run")
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        shutil.copytree(ROOT / "rewards", f"{directory}/rewards", ignore=lambda _, names: {*names} - MODULES)
        os.chown(directory, 65534, 65534)
        yield python, Path(directory), user


MODULES = {"__init__.py", "sandbox.py", "sandbox_child.py"}


def test_an_ordinary_user_is_confined_alike(ordinary_user):
    """What it owns too: permissions do not help there."""
    python, directory, user = ordinary_user
    programs = {what: forbidden_program(what, directory)[0] for what in FORBIDDEN}
    for path in (directory / "home", directory / "home" / "secret"):
        os.chown(path, 65534, 65534)
    script = """
import json, sys
from rewards.sandbox import run
print(json.dumps({what: (r := run(p)).stdout + r.stderr for what, p in json.load(sys.stdin).items()}))
"""
    result = subprocess.run(
        [python, "-c", script],
        input=json.dumps(programs),
        cwd=directory,
        capture_output=True,
        text=True,
        env={},
        **user,
    )
    assert result.returncode == 0, result.stderr
    assert {what: said for what, said in json.loads(result.stdout).items() if said != "denied\n"} == {}
    assert (directory / "home" / "secret").read_text() == "secret"


CLIENT = """#!{python}
# Stands in for a client of containers: runs the command after the image here, with the options it understands.
import os, signal, subprocess, sys
log = {log!r}
with open(log, "a") as f:
    print(*sys.argv[1:6], file=f)
if sys.argv[1] == "kill":
    os.killpg(int(open(log + ".pid").read()), signal.SIGKILL)
    sys.exit()
command = sys.argv[sys.argv.index("IMAGE") + 1 :]
command[command.index("python")] = {python!r}
with subprocess.Popen(command, start_new_session=True) as process:
    open(log + ".pid", "w").write(str(process.pid))
sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)
"""


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for docker. Returns where it notes what it is told."""
    path, log = tmp_path / "bin" / "docker", tmp_path / "log"
    path.parent.mkdir()
    path.write_text(CLIENT.format(python=os.path.realpath(sys.executable), log=str(log)))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    return log


def contained(program: str, **settings) -> Result:
    return ran(program, slack=20, runner="container", image="IMAGE", **settings)


def test_the_container_runner(client: Path):
    result = contained("import sys; print(input()); print(sys.stdin.read())", stdin="a\nb")
    assert (result.status, result.stdout) == ("ok", "a\nb\n"), result
    assert contained("def f(x): print(x); return x + 1", then=Call("f", [1])).stdout == "2"
    assert contained("f = lambda x: x + 1", then=Check(PASSES)).status == "ok"
    assert contained("f = lambda x: x", then=Check(PASSES)).status == "error"
    assert contained("import os; os._exit(0)", then=Check(PASSES)).status == "error"
    assert contained("x = bytearray(1 << 40)").status == "memory"
    assert contained("import os; os.kill(os.getpid(), 9)").status == "memory", "as the kernel does it"
    assert "kill" not in client.read_text()


@pytest.mark.parametrize(
    ("program", "status"), [("while True: pass", "timeout"), ("while True: print('a' * 9999)", "output")]
)
def test_a_container_is_killed_by_its_name(client: Path, program: str, status: str):
    assert contained(program, seconds=1.0).status == status
    run_line, kill_line = client.read_text().splitlines()
    assert run_line.startswith("run --rm --interactive --name ")
    assert kill_line == f"kill {run_line.split()[-1]}"
    assert gone(int(Path(f"{client}.pid").read_text()))


def test_what_the_container_is_started_with(client: Path):
    command = sandbox.container_command("NAME", "", sandbox._Limits(5, 512, 64), False)
    text = " ".join(command[: command.index("timeout")])
    for option in (
        *("--network none", "--read-only", "--cap-drop ALL", "--security-opt no-new-privileges", "--pull never"),
        *("--user 65534:65534", "--memory 576m --memory-swap 576m", "--pids-limit 64", "--name NAME"),
        *("--tmpfs /tmp:rw,size=64m,nr_inodes=1000,mode=0700,uid=65534,gid=65534", "--log-driver none"),
    ):
        assert option in text
    assert text.endswith(f" python:{sys.version_info.major}.{sys.version_info.minor}-slim")
    assert not any(option.split("=")[0] in ("--volume", "-v", "--mount", "--privileged") for option in command)


def test_a_container_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    client = tmp_path / "podman"
    client.write_text("#!/bin/sh\necho Cannot connect to the daemon >&2; exit 125")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="Cannot connect to the daemon"):
        run("pass", runner="container")
    client.unlink()
    with pytest.raises(SandboxUnavailable, match="neither docker nor podman is installed"):
        run("pass", runner="container")


@pytest.mark.slow
def test_a_real_container(tmp_path: Path):
    """Needs a daemon that answers and the image."""
    image = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
    client = shutil.which("docker") or shutil.which("podman")
    if client is None or subprocess.run([client, "image", "inspect", image], capture_output=True).returncode:
        pytest.skip(f"no daemon that has {image}")
    settings: dict[str, Any] = {"runner": "container", "seconds": 5}
    assert run("print(input())", stdin="a", **settings).stdout == "a\n"
    assert run("open('f', 'w').write('x'); print(open('f').read())", **settings).stdout == "x\n"
    assert run("while True: pass", **settings).status == "timeout"
    assert run("while True: print('a' * 9999)", **settings).status == "output"
    assert run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", **settings).status == "timeout"
    assert run("import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass", **settings).status == "ok"
    assert run("import socket; socket.create_connection(('1.1.1.1', 53), 2)", **settings).status == "error"
    assert run(f"open({__file__!r})", **settings).status == "error"
    assert run("def f(): return 1", then=Call("f", []), **settings).stdout == "1"
    assert not subprocess.run([client, "ps", "-q", "--filter", f"name={sandbox.PREFIX}"], capture_output=True).stdout
