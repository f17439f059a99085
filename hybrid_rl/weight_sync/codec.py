"""How a trained tensor is written for the engines: whole, or as what changed since they got it last.

Every form is lossless, NaN payloads and negative zeros included: elements are compared and moved as integers. The order
of floating-point numbers gives each a rank among all of its type; a change of up to 127 ranks takes one byte (`steps`),
any other is sent as the new value (`values`). Where few elements changed, a stream of gaps says which (`gaps`).

| form     | parts                              | bytes for n elements, c of them changed, e by more than 127 ranks |
|----------|------------------------------------|-------------------------------------------------------------------|
| dense    | the tensor                         | n x itemsize                                                      |
| stepwise | `steps`, `values`                  | n + e x itemsize; Huffman coding makes it less                    |
| sparse   | `gaps`, `steps`, `values`, `shape` | about 2 c + e x itemsize; likewise, about half of it              |
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

Parts = dict[str, Tensor]
"""Part -> tensor; `""` is the whole tensor."""

_LONG = 255
"""In a stream of gaps: 255 unchanged elements and no changed one after them."""
_ESCAPE = -128
"""In `steps`: the element's new value is the next of `values`."""
_SEPARATOR = "\t"
"""Between a tensor's name and a part's, and the name of all parts together: no parameter name contains one."""
_PROBED = 1024
_INTEGERS = {2: torch.int16, 4: torch.int32}
_PEFT_PREFIX = "base_model.model."


def lora_names(module: str) -> tuple[str, str]:
    """Names in an update of a module's LoRA factors A [rank, in] and B [out, rank]."""
    prefix = f"{_PEFT_PREFIX}{module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def is_factor(name: str) -> bool:
    """Whether a tensor of an update is a LoRA factor."""
    return name.startswith(_PEFT_PREFIX) and ".lora_" in name


def module_of(name: str) -> str:
    """The module that a LoRA factor is of."""
    return name.removeprefix(_PEFT_PREFIX).rpartition(".lora_")[0]


def lora_factors(lora: Mapping[str, tuple[Tensor, Tensor, float]], rank: int) -> dict[str, Tensor]:
    """LoRA triples (A, B, scaling) by module as tensors by name: padded with zeros to one rank, and with the scaling
    folded into B (then fp32), because vLLM's adapter loader knows one rank and no per-module scaling."""
    factors: dict[str, Tensor] = {}
    for module, (a, b, scaling) in lora.items():
        name_a, name_b = lora_names(module)
        factors[name_a] = _pad(a.detach(), rank, dim=0)
        factors[name_b] = _pad(b.detach().float() * scaling, rank, dim=1)
    return factors


def integers(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


def encode_tensor(new: Tensor, old: Tensor | None, *, sparse: bool) -> Parts:
    """`new` in its smallest form, given that the engines hold `old` (same shape, dtype and device).

    Dense without `old` or without `sparse`. The dense form is `new` itself, not a copy.
    """
    if old is None or not sparse or not new.dim() or not new.numel() or _hopeless(new, old):
        return {"": new}
    after, before = integers(new).reshape(-1), integers(old).reshape(-1)
    positions = (after != before).nonzero()[:, 0]
    everywhere = 2 * len(positions) > new.numel()
    if not everywhere:
        after, before = after[positions], before[positions]
    moved = _ranks(after) - _ranks(before)
    far = moved.abs() >= -_ESCAPE
    far |= moved < _ESCAPE  # the smallest integer is its own absolute value
    steps = moved.masked_fill_(far, _ESCAPE).to(torch.int8)
    parts = {"steps": steps.view(new.shape) if everywhere else steps, "values": after[far].view(new.dtype)}
    if not everywhere:
        parts |= {"gaps": _gaps(positions), "shape": torch.tensor(new.shape, dtype=torch.long)}
    return parts if size(parts) < new.nbytes else {"": new}


def size(parts: Mapping[str, Tensor]) -> int:
    """Bytes of an encoded tensor, without names."""
    return sum(part.nbytes for part in parts.values())


def pack(entries: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """Encoded tensors by name as one safetensors file: dense ones as they are, the parts of others Huffman-coded."""
    dense = {name: parts[""].contiguous().cpu() for name, parts in entries.items() if "" in parts}
    parts = {
        f"{name}{_SEPARATOR}{part}": tensor.cpu()
        for name, parts in entries.items()
        if "" not in parts
        for part, tensor in parts.items()
    }
    if parts:
        # Gaps and steps repeat no strings, but few of their values are frequent.
        huffman = zlib.compressobj(level=1, strategy=zlib.Z_HUFFMAN_ONLY)
        coded = huffman.compress(safetensors.torch.save(parts)) + huffman.flush()
        dense[_SEPARATOR] = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
    return safetensors.torch.save(dense)


def unpack(payload: bytes) -> list[Record]:
    """What `pack` packed."""
    dense = safetensors.torch.load(payload)
    coded = dense.pop(_SEPARATOR, None)
    entries: dict[str, Parts] = {name: {"": tensor} for name, tensor in dense.items()}
    if coded is not None:
        for key, tensor in safetensors.torch.load(zlib.decompress(coded.numpy().data)).items():
            name, _, part = key.partition(_SEPARATOR)
            entries.setdefault(name, {})[part] = tensor
    return [Record(name, parts) for name, parts in entries.items()]


@dataclass(frozen=True)
class Record:
    """One tensor of an update."""

    name: str
    parts: Parts

    @property
    def dense(self) -> Tensor | None:
        """The whole tensor, where it was sent whole."""
        return self.parts.get("")

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        if "shape" in self.parts:
            return torch.Size(self.parts["shape"].tolist())
        return self.parts["" if "" in self.parts else "steps"].shape

    @torch.no_grad()
    def write_to(self, held: Tensor, shard: tuple[int, int] | None = None) -> None:
        """Make `held`, which holds the tensor as it was, hold it as it is now, bit for bit; strides are free.

        `shard` (dim, start): `held` is that slice of the tensor, as long as it is. Raises `ValueError` if `held` has
        another shape or type.
        """
        dim, start = shard or (0, 0)
        expected = list(self.shape)
        if shard is not None:
            expected[dim] = min(held.shape[dim], expected[dim] - start)
        dtype = self.parts["" if "" in self.parts else "values"].dtype
        if list(held.shape) != expected or held.dtype != dtype:
            raise ValueError(
                f"{self.name} is {dtype} {expected}{f' in shard {shard}' if shard else ''}, but {held.dtype} "
                f"{list(held.shape)} is held"
            )
        parts = {name: part.to(held.device) for name, part in self.parts.items() if name != "shape"}
        bits = integers(held)

        def own(tensor: Tensor) -> Tensor:
            return tensor if shard is None else tensor.narrow(dim, start, held.shape[dim])

        if "" in parts:
            bits.copy_(own(integers(parts[""])))
            return
        far = parts["steps"] == _ESCAPE
        values = parts["steps"].to(bits.dtype).masked_scatter(far, integers(parts["values"]))
        if "gaps" not in parts:
            bits.copy_(torch.where(own(far), own(values), _ranks(_ranks(bits) + own(values))))
            return
        positions = _positions(parts["gaps"])
        if shard is None and bits.is_contiguous():
            bits, index = bits.view(-1), (positions,)
        else:
            index = torch.unravel_index(positions, self.shape)
        if shard is not None:
            inside = (index[dim] >= start) & (index[dim] < start + held.shape[dim])
            far, values = far[inside], values[inside]
            index = tuple(axis[inside] - (start if i == dim else 0) for i, axis in enumerate(index))
        bits[index] = torch.where(far, values, _ranks(_ranks(bits[index]) + values))


def _hopeless(new: Tensor, old: Tensor) -> bool:
    """Whether some elements, looked at instead of all, all changed so much that no form can be smaller than dense: what
    happens to a large fp32 tensor at every step, and costs little then."""
    if new.element_size() < 4:
        return False
    stride = max(1, new.numel() // _PROBED)
    after, before = (integers(t).reshape(-1)[::stride] for t in (new, old))
    moved = _ranks(after) - _ranks(before)
    return bool(((moved > -_ESCAPE) | (moved < _ESCAPE)).all())


def _ranks(bits: Tensor) -> Tensor:
    """Bits of floating-point numbers as integers in the numbers' order (-0 before 0), and back; a bijection."""
    last = 8 * bits.element_size() - 1
    return bits ^ ((bits >> last) & torch.iinfo(bits.dtype).max)


def _gaps(positions: Tensor) -> Tensor:
    """Increasing positions as uint8: the number of elements between one and the next, in 255s and a rest."""
    gaps = positions.diff(prepend=positions.new_tensor([-1])) - 1
    longs = gaps // _LONG
    stream = positions.new_full((len(gaps) + int(longs.sum()),), _LONG, dtype=torch.uint8)
    stream[(longs + 1).cumsum(0) - 1] = (gaps - longs * _LONG).to(torch.uint8)
    return stream


def _positions(gaps: Tensor) -> Tensor:
    """Inverse of `_gaps`."""
    ends = gaps != _LONG
    return ((gaps.long() + ends).cumsum(0) - 1)[ends]


def _pad(tensor: Tensor, rank: int, *, dim: int) -> Tensor:
    missing = rank - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
