"""Rewards that do what a reward must not: what it costs, what is said of it, and what is left of it."""

from __future__ import annotations

import os
import textwrap
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from hybrid_rl.config import RewardConfig, RewardSpec
from hybrid_rl.plugins import processes
from hybrid_rl.reward import RewardHost
from hybrid_rl.types import Outcome
from tests.plugins.lineage import MARK, settle

LIMIT = 1.0
WORKERS = 2
GRACE = 1.0
"""Seconds beyond the limit that a failing completion may take, with all that is done about it."""
BOMB_GRACE = 5.0
"""Those of a fork bomb, whose processes take most of the machine's time until they are dead."""
NAMES = ("a", "bad", "b")
RIGHT = {"a": 1.0, "b": 0.0}
HEAD = """
    import ctypes, os, re, signal, subprocess, sys, threading, time

    def daemon(what):
        # Forks twice and leaves the session, as daemons do.
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                what()
            os._exit(0)
        os.wait()

    class Unprintable(Exception):
        def __str__(self):
            raise RuntimeError("no")

    def bomb(generations, each=lambda: None):
        # 2 ** generations processes if nothing stops it.
        for _ in range(generations):
            if os.fork() == 0:
                each()
        time.sleep(60)
        os._exit(0)

    def raise_later(*_):
        raise RuntimeError("late")

    def write_everywhere(what):
        for descriptor in range(256):
            try:
                os.write(descriptor, what)
            except OSError:
                pass
"""
TELLS = """
    def tells(completion, log_extra):
        log_extra("surroundings", repr([os.getcwd(), sorted(os.environ.items())]))
        return 1.0
"""
TIMEOUT, CRASH, ERROR = "timeout", "crash", "error"
LATE = "took more than reward.timeout=1 s"
SPENT = "used more than reward.memory_mib=256 MiB"
MUTE = "wrote over what its process answers through, or closed it"
EVIL = {
    # name: (what it does, kind of outcome, what its detail says)
    "loops": ("while True: pass", TIMEOUT, LATE),
    "loops_in_c": ('re.match(r"(a+)+$", "a" * 64 + "b")', TIMEOUT, LATE),
    "sleeps": ("time.sleep(3600)", TIMEOUT, LATE),
    "stops": ("os.kill(os.getpid(), signal.SIGSTOP)", TIMEOUT, LATE),
    "stops_its_group": ("os.kill(0, signal.SIGSTOP)", TIMEOUT, LATE),
    "ignores_signals": (
        "for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(n, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        TIMEOUT,
        LATE,
    ),
    "prints_for_ever": ('while True: print("x" * (1 << 20))', TIMEOUT, LATE),
    "holds_half_a_message": ("write_everywhere(b'{\"value\": ')\ntime.sleep(3600)", TIMEOUT, LATE),
    "grows": ("kept = []\nwhile True:\n    kept.append(b'x' * (1 << 20))\n    time.sleep(0.001)", CRASH, SPENT),
    "grows_at_once": ("kept = b'x' * (1 << 30)\ntime.sleep(3600)", CRASH, SPENT),
    "grows_in_a_child": (
        'subprocess.run([sys.executable, "-c", "x = bytes(1) * 0 + b\'x\' * (1 << 29); import time; time.sleep(99)"])',
        CRASH,
        SPENT,
    ),
    "fork_bomb": ("bomb(11)", CRASH, "started more than 63 processes"),
    "fork_bomb_of_daemons": ("bomb(8, os.setsid)", CRASH, "started more than 63 processes"),
    "segfault": (
        "ctypes.string_at(0)",
        CRASH,
        "ended its process with status -11; it printed last: Fatal Python",
    ),
    "exits": ("os._exit(3)", CRASH, "ended its process with status 3"),
    "says_why_and_exits": (
        "print('why', flush=True)\nos._exit(3)",
        CRASH,
        "ended its process with status 3; it printed last: why",
    ),
    "kills_itself": ("os.kill(os.getpid(), signal.SIGKILL)", CRASH, "ended its process with status -9"),
    "closes": ("os.closerange(3, 512)", CRASH, MUTE),
    "closes_all": ("os.closerange(0, 512)", CRASH, MUTE),
    "closes_and_loops": ("os.closerange(0, 512)\nwhile True: pass", CRASH, MUTE),
    "writes_everywhere": ("write_everywhere(b'garbage')", CRASH, MUTE),
    "writes_lines_everywhere": ("write_everywhere(b'5\\n[1]\\n\\xff\\n')", CRASH, MUTE),
    "writes_json_everywhere": ('write_everywhere(b\'{"value": {"score": []}}\\n\')', CRASH, MUTE),
    "raises": ('raise KeyError("boom")', ERROR, "raised KeyError: 'boom'"),
    "raises_much": ('raise ValueError("x" * (50 << 20))', ERROR, "raised ValueError: xxx"),
    "raises_the_unprintable": ("raise Unprintable", ERROR, "raised Unprintable: (its message cannot be read)"),
    "raises_what_no_file_holds": (r'raise ValueError("\ud800\n\0")', ERROR, "raised ValueError: ?"),
    "recurses": ("(f := lambda: f())()", ERROR, "raised RecursionError"),
    "exits_by_exception": ("sys.exit(4)", ERROR, "raised SystemExit: 4"),
    "interrupts": ("raise KeyboardInterrupt", ERROR, "raised KeyboardInterrupt"),
    "interrupts_by_signal": (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)",
        ERROR,
        "raised KeyboardInterrupt",
    ),
    "reads": ("input()", ERROR, "raised EOFError: EOF when reading a line"),
    "returns_nan": ("return float('nan')", ERROR, "returned a number that is not finite: nan"),
    "returns_inf": ("return -float('inf')", ERROR, "returned a number that is not finite: -inf"),
    "returns_text": ("return '1.0'", ERROR, "returned str where a number or None is due"),
    "returns_much": ("return 'x' * (100 << 20)", ERROR, "returned str where a number or None is due"),
    "returns_a_list": ("return [1.0]", ERROR, "returned list where a number or None is due"),
}
HARMLESS = {
    # name: what it does before it returns 0.5
    "prints_much": "for _ in range(10): print('x' * (1 << 20))",
    "prints_bytes": r"os.write(1, b'\xff\xfe')" + r'; print("\ud800", file=sys.stderr)',
    "closes_its_output": "sys.stdout.close(); sys.stderr = None",
    "timer_fires_later": "signal.signal(signal.SIGALRM, raise_later); signal.setitimer(signal.ITIMER_REAL, 0.005)",
    "leaves_an_alarm": "signal.alarm(1)",
    "leaves_a_child": "subprocess.Popen(['sleep', '1000'])",
    "leaves_a_stopped_child": "os.kill(subprocess.Popen(['sleep', '1000']).pid, signal.SIGSTOP)",
    "leaves_a_daemon": "daemon(lambda: time.sleep(1000))",
    "leaves_a_shell": "os.system('sleep 1000 &')",
    "leaves_a_zombie": "os.fork() or os._exit(0)",
    "leaves_a_thread": "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "leaves_many_threads": "[threading.Thread(target=time.sleep, args=(1000,)).start() for _ in range(50)]",
    "leaves_a_thread_that_exits": "threading.Timer(0.1, os._exit, [7]).start()",
    "leaves_a_thread_in_c": "threading.Timer(0.3, re.match, [r'(a+)+$', 'a' * 64 + 'b']).start()",
    "changes_directory": "os.chdir('/')",
    "changes_environment": "os.environ.clear(); os.environ['LEFT'] = 'x'",
}


@dataclass
class Ground:
    """A host with all of the above, and a reward that is good."""

    host: RewardHost
    names: list[str]
    mark: str

    def score(self, name: str) -> tuple[list[Outcome], float]:
        """Outcomes of a group with one bad completion, and seconds."""
        group = {"completions": list(NAMES), "prompts": ["p"] * len(NAMES)}
        started = time.monotonic()
        return self.host.score(self.names.index(name), group), time.monotonic() - started


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    text = textwrap.dedent(HEAD)
    bodies = {name: (body, "1.0") for name, (body, _, _) in EVIL.items()}
    bodies |= {name: (body, "0.5") for name, body in HARMLESS.items()} | {"good": ("pass", "0.5")}
    for name, (body, score) in bodies.items():
        text += f"\ndef {name}(completion):\n    if completion == 'bad':\n{textwrap.indent(body, ' ' * 8)}\n"
        text += f"        return {score}\n    return float(completion == 'a')\n"
    bodies["tells"] = ("", "")
    text += textwrap.dedent(TELLS)
    path = tmp_path_factory.mktemp("hostile") / "hostile.py"
    path.write_text(text)
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        specs = [RewardSpec(plugin=f"{path}:{name}", name=name) for name in bodies]
        host = RewardHost(specs, RewardConfig(timeout=LIMIT, workers=WORKERS, memory_mib=256))
        ground = Ground(host, list(bodies), mark)
        ground.score("good")
        yield ground
        host.close()
    assert not settle(mark, 0)
    path.unlink()


@pytest.mark.parametrize("name", EVIL)
def test_a_bad_completion_costs_itself_and_its_limit(ground: Ground, name: str):
    _, kind, detail = EVIL[name]
    outcomes, seconds = ground.score(name)
    bad = outcomes[1]
    assert (bad.kind, bad.score) == (kind, None)
    assert detail in bad.detail
    assert bad.detail.startswith(name)
    assert len(bad.detail) < 2500
    bad.detail.encode()
    assert {c: o.score for c, o in zip(NAMES, outcomes, strict=True) if c != "bad"} == RIGHT
    assert seconds < LIMIT + (BOMB_GRACE if "bomb" in name else GRACE)
    _assert_nothing_left(ground)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_call_leaves_behind_reaches_no_other(ground: Ground, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "_BEGIN_SECONDS", 0.5)
    for _ in range(2):
        outcomes, _ = ground.score(name)
        assert [o.score for o in outcomes] == [1.0, 0.5, 0.0], [o.detail for o in outcomes]
        # Until the one holds the interpreter, and the other has ended the process.
        time.sleep({"leaves_a_thread_in_c": 0.5, "leaves_a_thread_that_exits": 0.2}.get(name, 0.0))
    _assert_nothing_left(ground)


def test_what_a_call_changes_of_its_process_is_undone(ground: Ground):
    for name in ("changes_directory", "changes_environment", "closes_its_output"):
        before, _ = ground.score("tells")
        ground.score(name)
        after, _ = ground.score("tells")
        assert after[0].extra == before[0].extra


def test_descriptors_of_the_caller_do_not_grow(ground: Ground):
    ground.score("exits")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        outcomes, _ = ground.score("exits")
        assert [o.kind for o in outcomes] == ["score", CRASH, "score"]
    assert len(os.listdir("/proc/self/fd")) <= before
    _assert_nothing_left(ground)


def _assert_nothing_left(ground: Ground) -> None:
    left = settle(ground.mark, 1 + WORKERS)
    assert len(left) <= 1 + WORKERS, left
    assert not [pid for pid, (_, state) in left.items() if state == "Z"]
    outcomes, _ = ground.score("good")
    assert [o.score for o in outcomes] == [1.0, 0.5, 0.0]
