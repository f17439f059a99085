"""How updates are written into an engine's weights, whatever computes the tokens.

`HeldWeights` is one process's part of the weights: it writes tensors into the memory that the kernels read, in place,
and reads them back for the receipt. A LoRA factor is written where the engine multiplies by it (native), or kept here
and merged: the weight is then computed anew from the base model's files at each update, and no rounding accumulates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hybrid_rl.digests import digest
from hybrid_rl.weight_sync.base import BaseFiles
from hybrid_rl.weight_sync.codec import Record, integers, is_factor, lora_names, module_of, unpack


class NotServed(Exception):
    """An engine cannot hold a tensor where updates could write it; the message says which and why."""


class CopiesDiffer(Exception):
    """Places that should hold the same weights do not."""


@dataclass(frozen=True)
class Piece:
    """A slice of one tensor of an update, as an engine holds it: `held` is [start, start + its length) of `dim`."""

    held: Tensor
    dim: int = 0
    start: int = 0

    def of(self, whole: Tensor) -> Tensor:
        """The same slice of `whole`."""
        return whole.narrow(self.dim, self.start, self.held.shape[self.dim])


class Layout(Protocol):
    """Where a model's tensors are in memory. A tensor may be in several pieces, and a piece in several places."""

    rearranges: bool
    """Whether weights may be held in another order than in the model's files; adapters would be, too."""

    def weight(self, name: str, shape: tuple[int, ...] | None) -> list[Piece]:
        """This process's pieces of a tensor of the base model, which has `shape` in the files, or is not in them under
        this name (only where nothing is rearranged). Raises `NotServed`."""
        ...

    def adapts(self, module: str) -> str | None:
        """Why the engine cannot multiply by a LoRA adapter of `module`; `None` if it can."""
        ...

    def open_slots(self, modules: Sequence[str], rank: int) -> Mapping[str, tuple[list[Piece], list[Piece]]]:
        """Make place for adapters of just these modules, all zero, and take any others away. Returns the pieces of A
        [rank, in] and B [out, rank] by module."""
        ...

    def whole(self, pieces: Sequence[Piece]) -> Tensor | None:
        """The tensor that all processes hold together, in one of them; `None` in the others. Raises `CopiesDiffer`."""
        ...


class HeldWeights:
    """What one process of an engine holds of the tensors that updates carry.

    `begin`, `write` for each part, `finish`; nothing is changed before the first `write` or, without any, `finish`.
    """

    def __init__(self, layout: Layout, base: BaseFiles, adapter: str, dtype: torch.dtype) -> None:
        self._layout = layout
        self._base = base
        self._mode = adapter
        self._dtype = dtype
        self._found: dict[str, list[Piece]] = {}
        """Weights of the base model by name."""
        self._places: dict[str, list[Piece]] = {}
        """Full matrices and native factors by name."""
        self._factors: dict[str, Tensor] = {}
        """Factors of merged modules by name."""
        self._merged: dict[str, list[Piece]] = {}
        """Weights with merged factors, by module."""
        self._merged_digests: dict[str, str] = {}
        self._slots: dict[str, tuple[list[Piece], list[Piece]]] = {}
        """Places of native factors A and B by module."""
        self._rank = 0
        self._complete = False
        """Whether the last update was finished."""
        self._anchor = False
        """Whether the update that is being written is complete by itself."""
        self._coming: _Coming | None = None
        self._stale: set[str] = set()
        """Merged modules whose factors have changed."""

    @property
    def adapter(self) -> str:
        """`none`, `native`, `merged` or `mixed`."""
        if self._slots and self._merged:
            return "mixed"
        return "native" if self._slots else "merged" if self._merged else "none"

    def check_lora(self, modules: Iterable[str]) -> None:
        """Raises `NotServed` naming the first of `modules` whose LoRA could not be served."""
        for module in modules:
            self._route(module)

    def check_full(self, names: Iterable[str]) -> None:
        """Raises `NotServed` naming the first of the weights `names` that could not be written."""
        for name in names:
            self._find(name)

    def begin(self, names: Sequence[str], rank: int, anchor: bool) -> None:
        """Get ready for an update of tensors `names`; an `anchor` has each of them whole. Raises `NotServed` if one of
        them cannot be held."""
        self._anchor, self._coming = anchor, None
        if not anchor:
            known = self._places.keys() | self._factors.keys()
            if set(names) != known or rank != self._rank:
                different = sorted(set(names) ^ known) or [f"rank {rank}"]
                raise NotServed(f"what changed is not of what is held ({different[0]}); an anchor is needed")
            return
        if self._complete and set(names) == self._places.keys() | self._factors.keys() and rank == self._rank:
            return  # nothing to be found or made
        modules = sorted({module_of(name) for name in names if is_factor(name)})  # the same in every process
        native = [m for m in modules if not self._route(m)]
        merged = {m: self._find(f"{m}.weight") for m in modules if m not in native}
        full = {name: self._find(name) for name in names if not is_factor(name)}
        for name in self._places.keys() - full.keys():
            if not is_factor(name):
                self._need_files(name)  # its base value will be put back
        self._coming = _Coming(full, merged, native, rank)

    @torch.no_grad()
    def write(self, payload: bytes) -> None:
        """Write one part of an update."""
        self._complete = False
        records = unpack(payload)
        if self._anchor and (partial := [r.name for r in records if r.dense is None]):
            raise ValueError(f"{partial[0]} is a difference, but the update is an anchor")
        self._change_over()
        for record in records:
            self._write(record)

    @torch.no_grad()
    def finish(self) -> None:
        """Complete the update."""
        self._complete = False
        self._change_over()
        for module in sorted(self._stale):
            self._merge(module)
        self._stale = set()
        self._complete = True

    def digests(self) -> dict[str, str]:
        """Digest of every tensor as the kernels read it, in the first of the engine's processes; nothing in the others.

        The factors of a merged module have their digests if the weight is, bit for bit, what was computed from them.
        """
        held: dict[str, str] = {}
        for name, pieces in self._places.items():
            if (found := self._digest(pieces)) is not None:
                held[name] = found
        for module, pieces in self._merged.items():
            if (found := self._digest(pieces)) is not None:
                intact = found == self._merged_digests[module]
                for name in lora_names(module):
                    held[name] = digest(self._factors[name]) if intact else "not merged into the weight"
        return held

    def _digest(self, pieces: Sequence[Piece]) -> str | None:
        try:
            whole = self._layout.whole(pieces)
        except CopiesDiffer:
            return "copies differ"
        return None if whole is None else digest(whole)

    def _route(self, module: str) -> bool:
        """Whether the LoRA of `module` is to be merged. Raises `NotServed`."""
        reason = "" if self._mode == "merged" else self._layout.adapts(module)
        if reason and self._mode == "native":
            raise NotServed(f"{module}: {reason}")
        if reason is not None or self._layout.rearranges:
            self._find(f"{module}.weight")
        if reason is not None:
            self._need_files(f"{module}.weight")
        return reason is not None

    def _find(self, name: str) -> list[Piece]:
        """The pieces of a weight. It is compared with the base model's files before it is first written to, so that
        no form which an engine gave a weight on loading is taken for the checkpoint's."""
        if name not in self._found:
            try:
                base = self._base.read(name)
            except KeyError as error:
                if self._layout.rearranges:
                    raise NotServed(str(error.args[0])) from error
                base = None
            pieces = self._layout.weight(name, None if base is None else tuple(base.shape))
            for piece in pieces:
                if piece.held.dtype != self._dtype:
                    raise NotServed(f"{name}: the engine holds it in {piece.held.dtype}, updates are {self._dtype}")
                if base is None:
                    continue
                own = piece.of(base).to(piece.held)
                if own.shape != piece.held.shape or not torch.equal(integers(own), integers(piece.held)):
                    raise NotServed(f"{name}: the engine holds it in another form than the model's files")
            self._found[name] = pieces
        return self._found[name]

    def _need_files(self, name: str) -> None:
        """Raises `NotServed` if the base model's files have no such weight."""
        try:
            self._base.shape(name)
        except KeyError as error:
            raise NotServed(str(error.args[0])) from error

    def _change_over(self) -> None:
        """Before the first write of an anchor: hold the tensors that it names and no others."""
        if self._coming is None:
            return
        coming, self._coming = self._coming, None
        for name in self._places.keys() - coming.full.keys():
            if not is_factor(name):
                self._restore(name, self._places[name])
        for module in self._merged.keys() - coming.merged.keys():
            if f"{module}.weight" not in coming.full:
                self._restore(f"{module}.weight", self._merged[module])
        self._places = dict(coming.full)
        if self._slots.keys() != set(coming.native) or self._rank != coming.rank:
            self._slots, self._rank = {}, -1  # if it fails, nothing is known of them
            self._slots = dict(self._layout.open_slots(coming.native, coming.rank))
        for module, slots in self._slots.items():
            self._places |= zip(lora_names(module), slots, strict=True)
        self._merged, self._rank = coming.merged, coming.rank
        self._factors, self._stale = {}, set(coming.merged)
        for module in coming.merged:
            out, inner = self._base.shape(f"{module}.weight")
            name_a, name_b = lora_names(module)
            device = coming.merged[module][0].held.device
            self._factors[name_a] = torch.zeros(coming.rank, inner, dtype=self._dtype, device=device)
            self._factors[name_b] = torch.zeros(out, coming.rank, dtype=self._dtype, device=device)

    def _write(self, record: Record) -> None:
        if record.name in self._factors:
            record.write_to(self._factors[record.name])
            self._stale.add(module_of(record.name))
            return
        for piece in self._places[record.name]:
            part = piece.held.shape != record.shape
            record.write_to(piece.held, (piece.dim, piece.start) if part else None)

    def _restore(self, name: str, pieces: list[Piece]) -> None:
        base = self._base.read(name)
        for piece in pieces:
            piece.held.copy_(piece.of(base))

    def _merge(self, module: str) -> None:
        """W = base + B A in fp32, rounded once to the engine's type."""
        a, b = (self._factors[name] for name in lora_names(module))
        base = self._base.read(f"{module}.weight").to(device=a.device, dtype=self._dtype)
        merged = torch.addmm(base.float(), b.float(), a.float()).to(self._dtype)
        self._merged_digests[module] = digest(merged)
        for piece in self._merged[module]:
            piece.held.copy_(piece.of(merged))


@dataclass(frozen=True)
class _Coming:
    """What an anchor makes an engine hold."""

    full: dict[str, list[Piece]]
    merged: dict[str, list[Piece]]
    native: list[str]
    rank: int


def assemble(pieces: Sequence[Piece]) -> Tensor:
    """The tensor that `pieces` make up. Raises `CopiesDiffer` where several hold the same part, but not the same."""
    if len(pieces) == 1:
        return pieces[0].held
    shape = list(pieces[0].held.shape)
    dim = next((p.dim for p in pieces if p.start), 0)
    shape[dim] = max(p.start + p.held.shape[dim] for p in pieces)
    whole = pieces[0].held.new_empty(shape)
    for piece in pieces:
        piece.of(whole).copy_(piece.held)
    if not all(torch.equal(integers(p.of(whole)), integers(p.held)) for p in pieces):
        raise CopiesDiffer
    return whole
