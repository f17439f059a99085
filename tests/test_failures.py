"""What ends a run is said in one screen: cause, place, what to try, and where all of it is."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hybrid_rl import logs
from hybrid_rl.failures import explain
from hybrid_rl.logs import log_directory, log_to
from hybrid_rl.types import InWorker, RewardFailed, WorkerDied, follows, gather


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """A run's `driver.log`."""
    path = log_to(tmp_path / "run" / "logs")
    yield path
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logs._DriverLog)]:
        root.removeHandler(handler)
        handler.close()


def in_worker(error: Exception, worker: str, file: str = "/home/user/rewards.py") -> Exception:
    library = '  File "/usr/lib/python3.11/site-packages/torch/nn/linear.py", line 3, in forward\n'
    error.__cause__ = InWorker(worker, f'  File "{file}", line 12, in f\n{library}{type(error).__name__}')
    return error


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            in_worker(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "learner-1"),
            ["the GPU's memory is full. learner-1: CUDA out of memory", "batch.tokens_per_micro_batch"],
        ),
        (
            in_worker(ValueError("No available memory for the cache blocks."), "engine-0"),
            ["the GPU's memory is full", "rollout.gpu_memory_utilization"],
        ),
        (
            in_worker(MemoryError(), "learner-0"),
            ["memory (RAM) is full. learner-0: MemoryError\n", "learner.logits_mib"],
        ),
        (
            in_worker(RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"), "rewards-0"),
            ["memory (RAM) is full", "reward.memory_mib"],
        ),
        (
            WorkerDied(
                "engine-2 (10.0.0.7, process 7) was killed by Ray: its machine was running out of memory", "engine-2"
            ),
            ["memory (RAM) is full. engine-2 (10.0.0.7, process 7)", "rollout.max_concurrent"],
        ),
        (
            in_worker(RuntimeError("CUDA driver version is insufficient for CUDA runtime version"), "engine-0"),
            ["do not fit together", "nvidia-smi"],
        ),
        (
            in_worker(RuntimeError("CUDA error: an illegal memory access was encountered"), "learner-0"),
            ["the GPU reported an error", "CUDA_LAUNCH_BLOCKING=1"],
        ),
        (OSError(28, "No space left on device"), ["the disk is full. OSError", "checkpoint.keep_last"]),
        (OSError(98, "Address already in use"), ["a port is taken", "start it again"]),
        (
            in_worker(OSError("/m does not appear to have a file named config.json"), "engine-1"),
            ["the model could not be loaded. engine-1", "model.path"],
        ),
        (
            in_worker(RuntimeError("[gloo] Connection closed by peer [10.0.0.8]:4000"), "learner-0"),
            ["workers lost their connection to one another", "GLOO_SOCKET_IFNAME"],
        ),
        (
            WorkerDied("learner-0 (10.0.0.8, process 4) was lost with its machine", "learner-0"),
            ["a machine was lost. learner-0", "ray status"],
        ),
        (WorkerDied("learner-0 did not answer within 20 s", "learner-0"), ["a worker hung", "learner.timeout"]),
        (
            WorkerDied("learner-1 (h, process 4) was killed from outside", "learner-1", ["last", "words: bad_alloc"]),
            ["memory (RAM) is full", "\n  learner-1 | last\n  learner-1 | words: bad_alloc\n"],
        ),
        (in_worker(KeyError("boo"), "learner-1"), ["learner-1: KeyError: 'boo'\n  at /home/user/rewards.py:12\n"]),
        (RewardFailed("mine failed on 20 prompts in a row"), ["mine failed on 20 prompts in a row\n", "reward test"]),
    ],
)
def test_the_cause_leads_and_what_to_try_follows(log: Path, error: Exception, parts: list[str]):
    screen = explain(error)
    for part in parts:
        assert part in screen
    assert len(screen.splitlines()) < 20
    assert "Traceback" not in screen
    assert type(error).__name__ in log.read_text(), "the whole of it is in the log"
    own = re.search(r"Log: (\S+?)(;|$)", screen)
    assert own is not None
    worker = next(
        (w for w in ("learner-0", "learner-1", "engine-0", "engine-1", "rewards-0") if f"{w}:" in screen), None
    )
    assert worker is None or own[1] == str(log.with_name(f"{worker}.log"))


def test_an_unknown_error_names_the_innermost_line_that_is_no_library_s(log: Path):
    def fails() -> None:
        int("x")

    with pytest.raises(ValueError, match="invalid literal") as failed:
        fails()
    screen = explain(failed.value)
    assert screen.startswith("ValueError: invalid literal for int()")
    assert re.search(r"\n  at tests/test_failures.py:\d+\nLog: ", screen)
    assert "Traceback (most recent call last)" in log.read_text()


def test_a_run_with_a_checkpoint_is_told_how_to_go_on(log: Path):
    run = log.parent.parent
    assert "--resume" not in explain(RuntimeError("x"))
    (run / "checkpoints" / "step_000005").mkdir(parents=True)
    assert f"hybrid-rl train {run}/config.yaml run.dir={run} --resume" in explain(RuntimeError("x"))


def test_the_terminal_shows_our_warnings_and_the_log_all(log: Path, capsys: pytest.CaptureFixture[str]):
    logging.getLogger("hybrid_rl.rollout.pool").warning("engine 1 is slow")
    logging.getLogger("some.library").warning("noise")
    assert capsys.readouterr().err == "engine 1 is slow\n"
    assert "WARNING some.library: noise" in log.read_text()
    assert "engine 1 is slow" in log.read_text()


def test_without_a_run_logs_are_somewhere(log: Path):
    log.unlink()
    assert log_directory() != log.parent
    assert (log_directory() / "driver.log").exists()
    assert log_directory() == log_directory()


class Call:
    """A worker's call that ends after some looks at it."""

    def __init__(self, name: str, looks: int, end: Callable[[], object]) -> None:
        self.name, self._looks, self._end = name, looks, end

    def ready(self, timeout: float) -> bool:
        self._looks -= 1
        return self._looks < 0

    def result(self, timeout: float | None = None) -> object:
        return self._end()


def raises(error: Exception) -> Callable[[], object]:
    def end() -> object:
        raise error

    return end


def test_what_follows_from_another_worker_s_death_does_not_lead():
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    death = WorkerDied("learner-1 was killed by the kernel", "learner-1")
    assert follows(lost)
    assert not follows(death)
    with pytest.raises(WorkerDied, match="learner-1 was killed"):
        gather([Call("learner-0", 0, raises(lost)), Call("learner-1", 40, raises(death))])


def test_a_lost_connection_leads_where_nothing_else_comes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hybrid_rl.types._NOTICE_SECONDS", 0.1)
    lost = RuntimeError("NCCL error: ncclRemoteError: remote process exited or there was a network error")
    with pytest.raises(RuntimeError, match="ncclRemoteError"):
        gather([Call("learner-0", 0, raises(lost)), Call("learner-1", 10_000, raises(lost))])
