"""Where vLLM keeps a model's tensors: fused projections, tensor-parallel shards, LoRA slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.lora.layers import BaseLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import get_packed_modules_mapping

from hybrid_rl.weight_sync.apply import NotServed, Piece, assemble
from hybrid_rl.weight_sync.base import BaseFiles

SLOT = 0
"""Of the one adapter."""


@dataclass(frozen=True)
class _Section:
    """One of the projections that a layer computes at once; all in rows of the weight."""

    rows: int
    """Of all processes together."""
    start: int
    """Where this process's share begins in them."""
    held: int
    """Rows of this process's share."""
    offset: int
    """Where it is in this process's weight."""


class VllmLayout:
    """`Layout` of one vLLM worker; `adapters` is vLLM's LoRA manager, where it has one."""

    rearranges = True

    def __init__(self, model: Any, adapters: Any, base: BaseFiles) -> None:
        self._model = model
        self._adapters = adapters
        self._base = base
        self._packed = get_packed_modules_mapping(model)
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._renames = mapper.get_rename_mapper() if mapper is not None else None
        self._tp = get_tp_group()

    def weight(self, name: str, shape: tuple[int, ...] | None) -> list[Piece]:
        module, _, leaf = name.rpartition(".")
        found = self._locate(module) if leaf in ("weight", "bias") else None
        layer: Any = _unwrapped(found[0]) if found else None
        if found is None or not isinstance(layer, LinearBase | VocabParallelEmbedding):
            return [Piece(self._parameter(name, shape))]
        if leaf == "bias":
            bias: Any = getattr(layer, "bias", None)
            if bias is None:
                raise NotServed(f"{name}: vLLM's {type(layer).__name__} has no bias")
            if isinstance(layer, RowParallelLinear):
                return [Piece(bias.data)]
            sections = self._sections(module, *found)
            return [Piece(bias.data.narrow(0, s.offset, s.held), 0, start) for s, start in sections]
        if module.endswith("kv_b_proj"):
            raise NotServed(f"{name}: vLLM computes multi-head latent attention from other forms of it")
        weight: Any = layer.weight.data
        if isinstance(layer, VocabParallelEmbedding):
            shard = layer.shard_indices
            rows = shard.org_vocab_end_index - shard.org_vocab_start_index
            return [Piece(weight.narrow(0, 0, rows), 0, shard.org_vocab_start_index)]
        if isinstance(layer, RowParallelLinear):
            return [Piece(weight, 1, layer.tp_rank * layer.input_size_per_partition)]
        return [
            Piece(weight.narrow(0, section.offset, section.held), 0, start)
            for section, start in self._sections(module, *found)
        ]

    def adapts(self, module: str) -> str | None:
        if self._adapters is None:
            return "vLLM serves no LoRA here"
        if module == "lm_head" and isinstance(self._adapters.modules.get(module), LogitsProcessorWithLoRA):
            return None
        found = self._locate(module)
        if found is None:
            return f"vLLM's {type(self._model).__name__} has no layer for it"
        layer, _ = found
        if not isinstance(layer, BaseLayerWithLoRA) or isinstance(layer, VocabParallelEmbeddingWithLoRA):
            return f"vLLM has no LoRA for its {type(layer).__name__}"
        return None

    def open_slots(self, modules: Sequence[str], rank: int) -> dict[str, tuple[list[Piece], list[Piece]]]:
        for layer in self._adapters.modules.values() if self._adapters is not None else ():
            layer.reset_lora(SLOT)
        return {module: self._slot(module, rank) for module in modules}

    def whole(self, pieces: Sequence[Piece]) -> Tensor | None:
        """In the first process; the others send theirs."""
        if self._tp.world_size == 1:
            return assemble(pieces)
        described = [(p.held.shape, p.held.dtype, p.dim, p.start) for p in pieces]
        if self._tp.rank_in_group != 0:
            self._tp.send_object(described, 0)
            for piece in pieces:
                self._tp.send(piece.held.contiguous(), 0)
            return None
        everyones = list(pieces)
        for rank in range(1, self._tp.world_size):
            for shape, dtype, dim, start in self._tp.recv_object(rank):
                everyones.append(Piece(self._tp.recv(shape, dtype, rank), dim, start))
        return assemble(everyones)

    def _slot(self, module: str, rank: int) -> tuple[list[Piece], list[Piece]]:
        if module == "lm_head":
            head = self._adapters.modules[module]
            rows = self._base.shape(f"{module}.weight")[0]
            return [Piece(head.lora_a_stacked[SLOT, 0, :rank])], [Piece(head.lora_b_stacked[SLOT, 0, :rows, :rank])]
        found = self._locate(module)
        assert found is not None, "checked by adapts"
        layer, base = found[0], _unwrapped(found[0])
        stacked_a, stacked_b = layer.lora_a_stacked, layer.lora_b_stacked
        if isinstance(base, RowParallelLinear):
            a = Piece(stacked_a[0][SLOT, 0, :rank], 1, layer.tp_rank * layer.input_size)
            return [a], [Piece(stacked_b[0][SLOT, 0, :, :rank])]
        a, b = [], []
        every = list(self._layer_sections(base))
        for section, start in self._sections(module, *found):
            index = every.index(section) if len(stacked_b) == len(every) else 0
            rows = stacked_b[index][SLOT, 0, :, :rank]
            if len(stacked_b) != len(every):
                rows = rows.narrow(0, section.offset, section.held)
            b.append(Piece(rows, 0, start))
            if len(a) < len(stacked_a):
                a.append(Piece(stacked_a[index][SLOT, 0, :rank]))
        return a, b

    def _sections(self, module: str, layer: Any, part: tuple[str, ...]) -> list[tuple[_Section, int]]:
        """The sections of a layer that `module` is, and where each begins in the rows of `module`.

        `part` is empty, or names the modules that the layer fuses, in order, up to and with `module`'s.
        """
        parent = module.rpartition(".")[0]
        skip = sum(self._base.shape(f"{parent}.{leaf}.weight")[0] for leaf in part[:-1])
        own = self._base.shape(f"{module}.weight")[0]
        found, at = [], 0
        for section in self._layer_sections(_unwrapped(layer)):
            if skip <= at < skip + own:
                found.append((section, section.start + at - skip))
            at += section.rows
        if sum(section.rows for section, _ in found) != own:
            raise NotServed(f"{module}: vLLM cuts it in another way than into whole projections")
        return found

    def _layer_sections(self, layer: Any) -> Iterator[_Section]:
        rank, offset = getattr(layer, "tp_rank", 0), 0
        if isinstance(layer, QKVParallelLinear):
            kv_rank, kv_rows = rank // layer.num_kv_head_replicas, layer.num_kv_heads * layer.head_size
            v_rows = layer.num_kv_heads * layer.v_head_size
            q_rows = layer.num_heads * layer.head_size
            shares = [
                (layer.total_num_heads * layer.head_size, rank, q_rows),
                (layer.total_num_kv_heads * layer.head_size, kv_rank, kv_rows),
                (layer.total_num_kv_heads * layer.v_head_size, kv_rank, v_rows),
            ]
        elif isinstance(layer, MergedColumnParallelLinear):
            shares = [(rows, rank, rows // layer.tp_size) for rows in layer.output_sizes]
        elif isinstance(layer, ColumnParallelLinear):
            shares = [(layer.output_size, rank, layer.output_size_per_partition)]
        else:
            shares = [(layer.output_size, 0, layer.output_size)]
        for rows, share, held in shares:
            yield _Section(rows, share * held, held, offset)
            offset += held

    def _parameter(self, name: str, shape: tuple[int, ...] | None) -> Tensor:
        try:
            parameter = self._model.get_parameter(self._renamed(name))
        except AttributeError:
            raise NotServed(f"{name}: vLLM's {type(self._model).__name__} has no parameter of that name") from None
        if parameter.shape != shape:
            raise NotServed(f"{name}: vLLM holds it as {tuple(parameter.shape)}, the model's files as {shape}")
        return parameter.data

    def _locate(self, module: str) -> tuple[Any, tuple[str, ...]] | None:
        """vLLM's layer that computes `module`; where it fuses several modules, their names up to `module`'s."""
        parent, _, leaf = self._renamed(module).rpartition(".")
        prefix = f"{parent}." if parent else ""
        for fused, parts in self._packed.items():
            if leaf in parts and len(parts) > 1 and (layer := self._submodule(prefix + fused)) is not None:
                return layer, tuple(parts[: parts.index(leaf) + 1])
        layer = self._submodule(prefix + leaf)
        return None if layer is None else (layer, ())

    def _submodule(self, name: str) -> Any:
        try:
            return self._model.get_submodule(name)
        except AttributeError:
            return None

    def _renamed(self, name: str) -> str:
        return name if self._renames is None else self._renames.map_name(name) or name


def _unwrapped(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)
