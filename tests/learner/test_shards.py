"""What a learner saved, any number of ranks under any ZeRO stage takes up exactly; and reading it runs nothing."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_rl.adaptation import WEIGHTS
from hybrid_rl.cluster.inline import Memory
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.assemble import mini_batches
from hybrid_rl.learner.shards import LEARNER, Shards, piece_key, random_state, restore_random, shard_path, write_shard
from tests.learner.processes import hybrid_plan, on_ranks, random_sequences

KINDS = ("master", "exp_avg", "exp_avg_sq")
Layout = tuple[int, int, str]
"""Ranks, ZeRO stage, offload."""
FEW: tuple[list[Layout], ...] = ([(2, 2, "none")], [(2, 2, "none"), (2, 3, "none")], [(1, 1, "none")])
"""Saved by these; taken up by as many ranks, and by others."""
MANY: tuple[list[Layout], ...] = (
    [(2, 2, "none"), (2, 3, "none")],
    [(2, 1, "none"), (2, 2, "none"), (2, 3, "none"), (2, 3, "all"), (2, 2, "optimizer")],
    [(3, 2, "none"), (3, 3, "none")],
)


def _tree(model: Path, layout: Layout) -> dict[str, Any]:
    world, stage, offload = layout
    return {
        "model": {"path": str(model)},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "max_prompt_length": 16},
        "sampling": {"max_completion_length": 16},
        "batch": {"prompts": 12, "num_generations": 2, "tokens_per_micro_batch": 40},
        "full": {"lr": 1e-3, "weight_decay": 0.1},
        "lora": {"lr": 1e-3, "rank": 4},
        "learner": {"world_size": world, "zero_stage": stage, "offload": offload},
    }


def _name(layout: Layout) -> str:
    return "-".join(map(str, layout))


def _worker(rank: int, port: int, model: str, plan: str, layout: Layout) -> Any:
    from hybrid_rl.learner.worker import LearnerWorker

    worker = LearnerWorker(parse_config(_tree(Path(model), layout)), rank, Memory())
    worker.connect("127.0.0.1", port)
    worker.build(plan)
    return worker


def _train(worker: Any, steps: range) -> None:
    scale = {"full": 1.0, "lora": 1.0}
    for step in steps:
        worker.train(mini_batches(random_sequences(step, 12), worker._config, scale, step + 1))


def _save(worker: Any, directory: Path) -> None:
    from hybrid_rl.learner import worker as module

    appeared: list[bool] = []

    def write(path: Path, *what: Any) -> None:
        write_shard(path, *what)
        appeared.append(shard_path(directory, worker._rank).exists())

    with patch.object(module, "write_shard", write):
        names = worker.begin_save(str(directory))
        worker.train(mini_batches(random_sequences(9, 12), worker._config, {"full": 1.0, "lora": 1.0}, 10))
        files = worker.saved(wait=True)  # of what there was when the saving began, not of what was trained since
    assert names == list(files)
    assert appeared == [False], "a file appears when it is whole and on the disk"
    assert all((directory / name).stat().st_size == facts.size for name, facts in files.items())


def _save_all(rank: int, port: int, model: str, plan: str, root: str, layouts: list[Layout]) -> None:
    for layout in layouts:
        directory = Path(root) / _name(layout)
        worker = _worker(rank, port, model, plan, layout)
        _save(worker, directory / "unmoved")  # before any update there are no moments
        worker.load(str(directory / "unmoved"))
        _train(worker, range(3))
        _save(worker, directory / "begun")
        worker.load(str(directory / "begun"))
        _train(worker, range(3, 5))
        _save(worker, directory / "ended")


def _go_on(rank: int, port: int, model: str, plan: str, root: str, layouts: list[Layout], saved: list[Layout]) -> None:
    for layout in layouts:
        worker = _worker(rank, port, model, plan, layout)
        for before in saved:
            directory = Path(root) / _name(before)
            if before == saved[0]:  # into a learner that has done nothing yet
                worker.load(str(directory / "unmoved"))
                _train(worker, range(3))
                _save(worker, directory / f"moved-{_name(layout)}")
            worker.load(str(directory / "begun"))
            _save(worker, directory / f"again-{_name(layout)}")
            worker.load(str(directory / "begun"))
            _train(worker, range(3, 5))
            _save(worker, directory / f"ended-{_name(layout)}")


def everything(directory: Path, names: dict[str, int]) -> dict[str, Tensor]:
    shards = Shards(directory)
    assert shards.kinds >= set(KINDS)
    return {f"{kind} of {name}": shards.read(kind, name, 0, size) for name, size in names.items() for kind in KINDS}


@pytest.mark.parametrize("layouts", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_learner_goes_on_where_another_stopped(tiny_model: Path, tmp_path: Path, layouts: Any):
    plan = hybrid_plan(tiny_model)
    saved, same_ranks, elsewhere = layouts
    given = str(tiny_model), plan.to_json(), str(tmp_path)
    on_ranks(2, _save_all, *given, saved)
    for taken_up in (same_ranks, elsewhere):
        on_ranks(taken_up[0][0], _go_on, *given, taken_up, saved)

    for before in saved:
        directory = tmp_path / _name(before)
        weights = load_file(directory / "begun" / WEIGHTS)
        names = {name: weight.numel() for name, weight in weights.items()}
        begun, ended = everything(directory / "begun", names), everything(directory / "ended", names)
        assert all(torch.equal(begun[f"master of {name}"], weight.flatten()) for name, weight in weights.items())
        assert any(not torch.equal(begun[what], ended[what]) for what in begun)
        for layout in same_ranks + elsewhere:
            again = everything(directory / f"again-{_name(layout)}", names)
            assert all(torch.equal(again[what], begun[what]) for what in begun), (before, layout)
            if layout == before == saved[0]:
                moved = everything(directory / f"moved-{_name(layout)}", names)
                assert all(torch.equal(moved[what], begun[what]) for what in begun)
            found = everything(directory / f"ended-{_name(layout)}", names)
            for what, wanted in ended.items():
                if layout == before:
                    assert torch.equal(found[what], wanted), (what, layout)
                # Adam's step is of the gradient's sign where both moments are tiny: sums rounded otherwise may show.
                torch.testing.assert_close(found[what], wanted, atol=2e-5, rtol=1e-3, msg=f"{what}, {before}, {layout}")
            steps = [facts["steps"] for facts in Shards(directory / f"again-{_name(layout)}").facts]
            assert {count for of_rank in steps for count in of_rank.values()} == {
                count for facts in Shards(directory / "begun").facts for count in facts["steps"].values()
            }


def test_pieces_are_put_together(tmp_path: Path):
    whole = torch.randn(10)
    for rank, (start, stop) in enumerate([(0, 4), (4, 9), (9, 10)]):
        write_shard(shard_path(tmp_path, rank), {piece_key("master", start, "a/b.weight"): whole[start:stop]}, {})
    shards = Shards(tmp_path)
    for start in range(10):
        for stop in range(start + 1, 11):
            assert torch.equal(shards.read("master", "a/b.weight", start, stop - start), whole[start:stop])
    with pytest.raises(ValueError, match=r"the master of a/b\.weight is not saved from element 10 on"):
        shards.read("master", "a/b.weight", 5, 6)
    with pytest.raises(ValueError, match=r"the exp_avg of a/b\.weight is not saved"):
        shards.read("exp_avg", "a/b.weight", 0, 1)
    shard_path(tmp_path, 1).unlink()
    with pytest.raises(ValueError, match="is not saved from element 4 on"):
        Shards(tmp_path).read("master", "a/b.weight", 0, 10)


def test_random_numbers_go_on(tmp_path: Path):
    write_shard(shard_path(tmp_path, 0), random_state(), {})

    def draw() -> tuple[Any, ...]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(())), random.getrandbits(64)

    drawn = draw()
    restore_random(Shards(tmp_path), 0)
    assert draw() == drawn


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_hostile_files_run_nothing(tmp_path: Path):
    mark = tmp_path / "ran"
    shard_path(tmp_path, 0).parent.mkdir()
    for content in (pickle.dumps(_Bomb(mark)), b"", b"\x08" + b"\0" * 7 + b"{}      ", b"\xff" * 64):
        shard_path(tmp_path, 0).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            Shards(tmp_path)
    save_file({"a": torch.zeros(1)}, shard_path(tmp_path, 0), metadata={"facts": json.dumps([]) + "]"})
    with pytest.raises(ValueError, match="cannot be read"):
        Shards(tmp_path)
    torch.save({"x": _Bomb(mark)}, tmp_path / LEARNER / "rank_00000_model_states.pt")
    shard_path(tmp_path, 0).unlink()
    with pytest.raises(ValueError, match="has no learner state"):
        Shards(tmp_path)
    assert not mark.exists()
