"""A checkpoint is whole or not there, whenever the process is killed; damage is found; disk trouble costs no step."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import xxhash

from hybrid_rl.adaptation import WEIGHTS
from hybrid_rl.checkpoint import (
    BEGUN,
    PLAN,
    STATE,
    Checkpoints,
    TrainerState,
    checkpoints,
    damage,
    latest_whole,
    load_state,
    load_waiting,
    recover,
    write_state,
)
from hybrid_rl.config import CheckpointConfig, ConfigError
from hybrid_rl.files import FileFacts, sync_and_describe, write_atomically
from hybrid_rl.learner.shards import LEARNER
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.types import Completion

NAMES = (f"{LEARNER}/rank_00000.safetensors", f"{LEARNER}/rank_00001.safetensors", WEIGHTS)
PLAN_0 = AdaptationPlan("tiny", "attention-only", {}, 0, ())


class Learner:
    """Writes as the ranks would. `at_once`: whether the files are there before anybody waits."""

    def __init__(self, at_once: bool = True, fails: bool = False) -> None:
        self.at_once, self.fails = at_once, fails
        self.directory = Path()

    def begin_save(self, checkpoint: str) -> list[str]:
        self.directory = Path(checkpoint)
        return list(NAMES)

    def saved(self, wait: bool) -> Mapping[str, FileFacts] | None:
        if not (wait or self.at_once):
            return None
        if self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.write(*NAMES)
        return {name: sync_and_describe(self.directory / name) for name in NAMES}

    def write(self, *names: str) -> None:
        (self.directory / LEARNER).mkdir(exist_ok=True)
        for name in names:
            write_atomically(self.directory / name, f"{name} of {self.directory.name[:20]}")


def state(step: int, accuracy: float | None = None) -> TrainerState:
    row = {"step": step} | ({} if accuracy is None else {"eval/accuracy": accuracy})
    return TrainerState(step, 4 * step, PLAN_0.hash, row=row)


def save(root: Path, *states: TrainerState, learner: Learner | None = None, **settings: int) -> Checkpoints:
    saving = Checkpoints(root, CheckpointConfig(background=False, **settings), learner or Learner())  # type: ignore[arg-type]
    for each in states:
        saving.begin(each, PLAN_0)
    return saving


def names(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoints(root)]


def test_checkpoints_are_rotated_and_read_back(tmp_path: Path):
    save(tmp_path, state(2), state(4), state(10), keep_last=2)
    assert names(tmp_path) == [4, 10]
    path = tmp_path / "step_000010"
    assert load_state(path) == state(10)
    assert {p.name for p in path.iterdir()} == {LEARNER, PLAN, STATE, WEIGHTS}
    assert AdaptationPlan.load(path / PLAN) == PLAN_0
    save(tmp_path, state(10), keep_last=2)
    assert names(tmp_path) == [4, 10]


def test_the_best_are_kept_beside_the_latest(tmp_path: Path):
    scores = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.8, 5: 0.1, 6: None}
    save(tmp_path, *(state(step, score) for step, score in scores.items()), keep_last=1, keep_best=2)
    assert names(tmp_path) == [2, 4, 6]


def test_training_goes_on_while_files_are_written(tmp_path: Path):
    learner = Learner(at_once=False)
    saving = Checkpoints(tmp_path, CheckpointConfig(), learner)
    saving.begin(state(1), PLAN_0)
    saving.poll()
    assert (names(tmp_path), saving.last) == ([], None)
    learner.at_once = True
    saving.poll()
    assert (names(tmp_path), saving.last) == ([1], 1)
    learner.at_once = False
    saving.begin(state(2), PLAN_0)
    saving.begin(state(3), PLAN_0)  # waits for the one before
    assert names(tmp_path) == [1, 2]
    saving.finish()
    assert names(tmp_path) == [2, 3]


def test_rollouts_that_wait_come_back_exactly(tmp_path: Path):
    done = Completion("a", (3, 4), (-0.1, -1e-9 / 3), "stop", 6, ((1, 7),), ((0, 1),))
    saving = Checkpoints(tmp_path, CheckpointConfig(background=False), Learner())
    saving.begin(state(1), PLAN_0, [("0/5", (done, done))])
    assert load_waiting(tmp_path / "step_000001") == {"0/5": (done, done)}


def test_a_full_disk_costs_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    learner = Learner()
    saving = save(tmp_path, state(1), learner=learner)
    learner.fails = True
    saving.begin(state(2), PLAN_0)
    assert (saving.failed, saving.last, names(tmp_path)) == (1, 1, [1])
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"], "nothing half written is left"
    (record,) = caplog.records
    assert "step 2 could not be saved" in record.getMessage()
    assert "No space left on device; training goes on, a resumed run would begin after step 1" in record.message
    learner.fails = False
    saving.begin(state(3), PLAN_0)
    assert names(tmp_path) == [1, 3]


def test_files_that_other_hosts_wrote_elsewhere_are_noticed(tmp_path: Path):
    class Elsewhere(Learner):
        def saved(self, wait: bool) -> Mapping[str, FileFacts]:
            return {NAMES[0]: FileFacts(3, "0")}

    with pytest.raises(RuntimeError, match=r"put run.dir on a shared file system"):
        save(tmp_path, state(1), learner=Elsewhere())
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("name", [WEIGHTS, PLAN, f"{LEARNER}/rank_00001.safetensors", STATE])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_is_found_and_the_checkpoint_before_is_taken(tmp_path: Path, name: str, how: str):
    save(tmp_path, state(1), state(2))
    path = tmp_path / "step_000002" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if how == "flip" else content[: len(content) // 2])
    if how == "gone":
        path.unlink()
    found = latest_whole(tmp_path)
    assert found is not None
    assert found[0].name == "step_000001"
    assert [name in problem for problem in found[1]] == ([] if (how, name) == ("gone", STATE) else [True])
    (tmp_path / "step_000001" / WEIGHTS).unlink()
    if name != STATE:
        with pytest.raises(ConfigError, match=r"no checkpoint is whole: .*; .*step_000001"):
            latest_whole(tmp_path)


def test_what_is_done_again_after_damage_replaces_it(tmp_path: Path):
    """Later checkpoints, whole or damaged, are of steps that are done again: they push nothing out."""
    save(tmp_path, state(10), state(20), state(30), keep_last=3)
    for step in (20, 30):
        (tmp_path / f"step_{step:06d}" / WEIGHTS).write_text("damaged")
    save(tmp_path, state(15), keep_last=2)
    assert names(tmp_path) == [10, 15]
    found = latest_whole(tmp_path)
    assert found is not None
    assert found[0].name == "step_000015"


def test_other_directories_are_no_checkpoints(tmp_path: Path):
    save(tmp_path, state(1, 0.5), state(2, 0.1), keep_last=2, keep_best=1)
    (tmp_path / "step_best").symlink_to("step_000001")
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000001.keep")
    (tmp_path / "step_000001" / STATE).write_text("{")  # unreadable: it has no accuracy to be kept for
    save(tmp_path, state(3, 0.2), keep_last=1, keep_best=1)
    assert names(tmp_path) == [3]
    assert (tmp_path / "step_000001.keep").is_dir()


def test_what_cannot_be_deleted_stops_no_saving(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere, state(1))
    root = tmp_path / "checkpoints"
    root.mkdir()
    (root / "step_000001").symlink_to(elsewhere / "step_000001")
    (root / ".old_step_000000").write_text("no directory")
    assert save(root, state(2), state(3), keep_last=1).failed == 0
    assert names(root) == [3]
    assert "could not be deleted" in caplog.text
    assert load_state(elsewhere / "step_000001") == state(1), "what a link leads to stays"


def begun(root: Path, at: TrainerState, *written: str) -> Path:
    """A save whose driver has gone, when ranks had written these files."""
    learner = Learner(at_once=False)
    Checkpoints(root, CheckpointConfig(), learner).begin(at, PLAN_0)
    learner.write(*written)
    return learner.directory


def test_what_ranks_wrote_whole_outlives_the_driver(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Ranks write in the background, and one may die, or the driver, before all that is there gets its name."""
    save(tmp_path, state(1))
    begun(tmp_path, state(2), *NAMES)
    begun(tmp_path, state(3), *NAMES[:2])
    recover(tmp_path)
    assert names(tmp_path) == [1, 2]
    path = tmp_path / "step_000002"
    assert (load_state(path), damage(path)) == (state(2), None)
    assert {p.name for p in path.iterdir()} == {LEARNER, PLAN, STATE, WEIGHTS}
    assert {p.name for p in tmp_path.iterdir()} == {"step_000001", "step_000002"}
    assert "step_000003 was not written to its end" in caplog.text


@pytest.mark.parametrize("way", ["link/checkpoints", "real/../real/checkpoints"])
def test_the_way_to_a_run_may_have_links(tmp_path: Path, way: str):
    (tmp_path / "real" / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    root = tmp_path / way
    save(root, state(1))
    begun(root, state(2), *NAMES)
    recover(root)
    assert latest_whole(root) == (root / "step_000002", [])


def test_what_was_written_again_replaces_what_is_damaged(tmp_path: Path):
    save(tmp_path, state(1), state(2))
    begun(tmp_path, state(1), *NAMES)  # which is whole: this was an earlier try
    (tmp_path / "step_000002" / WEIGHTS).write_text("damaged")
    begun(tmp_path, state(2), *NAMES)
    recover(tmp_path)
    assert latest_whole(tmp_path) == (tmp_path / "step_000002", [])
    assert names(tmp_path) == [1, 2]


@pytest.mark.parametrize("how", ["step", "plan", "outside", "link", "pipe"])
def test_what_was_begun_and_is_not_what_it_says_is_deleted(tmp_path: Path, how: str):
    save(tmp_path, state(1))
    aside = begun(tmp_path, state(2), *NAMES)
    tree = json.loads((aside / BEGUN).read_text())
    if how == "plan":
        (aside / PLAN).unlink()
    elif how == "link":
        shutil.rmtree(aside / LEARNER)
        (aside / LEARNER).symlink_to(tmp_path / "step_000001" / LEARNER)
    elif how == "pipe":
        (aside / WEIGHTS).unlink()
        os.mkfifo(aside / WEIGHTS)
    else:
        tree |= {"step": 1} if how == "step" else {"awaited": [f"{'../' * 20}dev/zero"]}
        del tree["digest"]
        digest = xxhash.xxh3_128(json.dumps(tree, sort_keys=True).encode()).hexdigest()
        (aside / BEGUN).write_text(json.dumps({**tree, "digest": digest}))
    recover(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step_000001"}
    assert damage(tmp_path / "step_000001") is None


def test_what_cannot_be_told_is_not_deleted(tmp_path: Path):
    save(tmp_path, state(1))
    aside = begun(tmp_path, state(2), *NAMES)
    (aside / BEGUN).write_text((aside / BEGUN).read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(ConfigError, match=r"has format 3, .*; mend that, or delete \S+/\.writing_step_000002_"):
        recover(tmp_path)
    assert aside.is_dir()


@pytest.mark.parametrize("name", ["/dev/zero", "../step_000001/weights.safetensors"])
def test_a_state_that_names_files_elsewhere_is_damaged(tmp_path: Path, name: str):
    save(tmp_path, state(1), state(2))
    path = tmp_path / "step_000002"
    write_state(path, state(2), {name: FileFacts(1, "0")})
    assert damage(path) == f"{path / STATE} names {name}, which is not in it"
    (path / STATE).write_text("[" * 100_000)
    assert "cannot be read" in str(damage(path))


def test_another_format_is_named(tmp_path: Path):
    save(tmp_path, state(1))
    path = tmp_path / "step_000001" / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.raises(ConfigError, match="has format 9, and this version reads 2"):
        load_state(path.parent)


def _killed(root: Path, at: str, nth: int) -> None:
    """Save step 2 in a process that is gone at the `nth` call of `at`."""
    left = [nth]

    def leave(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        return original(*args, **kwargs) if left[0] else os._exit(9)

    if at == "fsync":
        original = os.fsync
        os.fsync = leave  # type: ignore[assignment]
    else:
        original = getattr(Path, at)
        setattr(Path, at, leave)
    save(root, state(2), keep_last=3)


@pytest.mark.parametrize(("at", "calls"), [("fsync", 18), ("rename", 7), ("unlink", 2)])
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path, at: str, calls: int):
    """At every one of its calls; from the one on after which all files are there, that is the new one."""
    found = []
    for nth in itertools.count(1):
        root = tmp_path / str(nth)
        save(root, state(1), keep_last=3)
        process = multiprocessing.get_context("fork").Process(target=_killed, args=(root, at, nth))
        process.start()
        process.join()
        whole = latest_whole(root)
        assert whole is not None
        assert whole[1] == [], "nothing that is half written has a name"
        recover(root)
        whole = latest_whole(root)
        assert whole is not None
        assert whole[1] == []
        assert {path.name for path in root.iterdir()} == {f"step_{step:06d}" for step in names(root)}
        found.append(load_state(whole[0]).step)
        save(root, state(2), keep_last=3)
        assert names(root) == [1, 2]
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
    assert len(found) == calls + 1
    assert found == sorted(found)
    assert set(found) == ({1, 2} if at != "unlink" else {2})
