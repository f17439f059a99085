"""What one process of an engine holds after updates that fail, or are not what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from hybrid_rl.rollout.vllm_engine import _Workers
from hybrid_rl.weight_sync import BaseFiles, digest, encode_tensor, lora_names, pack
from hybrid_rl.weight_sync.apply import HeldWeights, NotServed, Piece, assemble

WEIGHTS = {f"{name}.weight": torch.randn(6, 4) for name in ("a", "b", "c")}
Tensors = dict[str, Tensor]


class Model:
    """Plain tensors; layers multiply by `slots`, which `fails` lets break half-way; `b` has no place for an adapter."""

    rearranges = False

    def __init__(self) -> None:
        self.weights = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
        self.slots: Tensors = {}
        self.copies: list[Tensor] = []
        self.fails = False

    def weight(self, name: str, shape: tuple[int, ...] | None) -> list[Piece]:
        return [Piece(self.weights[name]), *map(Piece, self.copies)]

    def adapts(self, module: str) -> str | None:
        return "no place" if module == "b" else None

    def open_slots(self, modules: Sequence[str], rank: int) -> dict[str, tuple[list[Piece], list[Piece]]]:
        self.slots = {}
        for module in modules:
            a, b = lora_names(module)
            self.slots |= {a: torch.zeros(rank, 4), b: torch.zeros(6, rank)}
            if self.fails:
                raise MemoryError("no memory for slots")
        return {m: tuple([Piece(self.slots[n])] for n in lora_names(m)) for m in modules}  # type: ignore[misc]

    def whole(self, pieces: Sequence[Piece]) -> Tensor:
        return assemble(pieces)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def held(model: Model, tmp_path: Path) -> HeldWeights:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "model.safetensors")
    return HeldWeights(model, BaseFiles(str(tmp_path)), "auto", torch.float32)


def lora(*modules: str, rank: int = 2) -> Tensors:
    shapes = {"A": (rank, 4), "B": (6, rank)}
    return {n: torch.randn(shapes[n[-8]]) for m in modules for n in lora_names(m)}


def update(held: HeldWeights, tensors: Tensors, rank: int = 2, leave_out: str = "") -> dict[str, str]:
    """Send an anchor. Returns the digests that a receipt should have."""
    held.begin(tuple(tensors), rank, anchor=True)
    held.write(pack({name: {"": t} for name, t in tensors.items() if name != leave_out}))
    held.finish()
    return {name: digest(tensor) for name, tensor in tensors.items()}


def check_factors(model: Model, tensors: Tensors) -> None:
    assert model.slots.keys() == tensors.keys()
    assert all(torch.equal(model.slots[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("later", [("a", "c"), ()])
def test_adapters_whose_places_could_not_be_made_are_made_by_the_next_anchor(model, held, later: tuple[str, ...]):
    update(held, before := lora("a", "c"))
    check_factors(model, before)
    model.fails = True
    with pytest.raises(MemoryError):
        update(held, lora("a"))
    model.fails = False
    after = lora(*later)
    assert update(held, after) == held.digests()
    check_factors(model, after)


def test_a_broken_update_of_a_merged_module_is_forgotten_by_an_anchor_without_it(model, held):
    tensors = lora("b")
    held.begin(tuple(tensors), 2, anchor=True)
    held.write(pack({name: {"": t} for name, t in tensors.items()}))  # no `finish`
    full = {"a.weight": torch.randn(6, 4)}
    assert update(held, full, rank=0) == held.digests()
    assert torch.equal(model.weights["b.weight"], WEIGHTS["b.weight"])


def test_a_difference_in_an_anchor_is_an_error_before_anything_is_written(model, held):
    old = WEIGHTS["a.weight"]
    new = old.clone()
    new[1, 1] = 5
    whole = {"b.weight": {"": torch.zeros(6, 4)}}
    held.begin(("b.weight", "a.weight"), 0, anchor=True)
    with pytest.raises(ValueError, match=r"a\.weight is a difference"):
        held.write(pack({**whole, "a.weight": encode_tensor(new, old, sparse=True)}))
    assert all(torch.equal(model.weights[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["c.weight", *lora_names("a"), *lora_names("b")])
def test_a_tensor_that_an_anchor_lacks_shows_in_the_receipt(held, name: str, again: bool):
    if again:
        update(held, {"c.weight": torch.randn(6, 4), **lora("a", "b")})
    expected = update(held, {"c.weight": torch.randn(6, 4), **lora("a", "b")}, leave_out=name)
    assert [n for n, d in held.digests().items() if d != expected[n]] == [name]


def test_copies_that_differ_show_in_the_receipt(model, held):
    model.copies = [WEIGHTS["a.weight"].clone()]
    full = {"a.weight": torch.randn(6, 4)}
    assert update(held, full, rank=0) == held.digests()
    model.copies[0][0, 0] += 1
    assert held.digests() == {"a.weight": "copies differ"}


def test_a_weight_of_another_type_or_form_is_refused(model, held):
    model.weights["a.weight"] = model.weights["a.weight"].bfloat16()
    model.weights["c.weight"] = model.weights["c.weight"] + 1
    held.check_full(["b.weight"])
    with pytest.raises(NotServed, match=r"a\.weight: the engine holds it in torch\.bfloat16"):
        held.check_full(["b.weight", "a.weight"])
    with pytest.raises(NotServed, match=r"c\.weight: the engine holds it in another form"):
        held.check_full(["c.weight"])


def test_the_refusal_of_any_of_several_processes_counts():
    class Processes:
        def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
            return [None, "no place in the second", None]

    with pytest.raises(NotServed, match="no place in the second"):
        _Workers(Processes()).begin(("a.weight",), 0, True)
