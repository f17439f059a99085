"""Engine side of the weight sync for vLLM: mixed into vLLM's worker as its `worker_extension_cls`.

Importing this module on a CPU platform changes two things in vLLM (see `_keep_plain_cpu_weights` and
`_multiply_by_one_adapter`), so it is imported by the engine's process alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers import utils as vllm_layer_utils
from vllm.platforms import current_platform

from hybrid_rl.types import WeightUpdate
from hybrid_rl.weight_sync.encode import decode_update, digest

ADAPTER_ID = 1


class HybridWeightSync:
    """Methods reached through `LLM.collective_rpc`; `self` is vLLM's worker (one process, no tensor parallelism)."""

    model_runner: Any
    vllm_config: Any
    device: torch.device

    def apply_weight_update(self, update: WeightUpdate) -> dict[str, str]:
        """Load full matrices in place and replace the adapter. Returns the digests of what the kernels now read."""
        full, lora = decode_update(update)
        with set_current_vllm_config(self.vllm_config):
            if full:
                self.model_runner.model.load_weights(iter(full.items()))
        if lora:
            self._replace_adapter(lora, update.adapter_rank)
        held = {name: self._held_full(name) for name in full}
        held |= {name: self._held_lora(name, update.adapter_rank) for name in lora}
        return {name: digest(tensor) for name, tensor in held.items()}

    def _replace_adapter(self, tensors: dict[str, Tensor], rank: int) -> None:
        worker_manager = self.model_runner.lora_manager
        manager = worker_manager._adapter_manager
        # The scaling is folded into B, so alpha = r makes vLLM's own scaling 1.
        helper = PEFTHelper.from_dict({"r": rank, "lora_alpha": rank, "target_modules": []})
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        model = worker_manager._lora_model_cls.from_lora_tensors(
            lora_model_id=ADAPTER_ID,
            tensors=tensors,
            peft_helper=helper,
            device=str(self.device),
            dtype=worker_manager.lora_config.lora_dtype,
            model_vocab_size=worker_manager.vocab_size,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
        manager.remove_adapter(ADAPTER_ID)
        if not manager.add_adapter(model) or not manager.activate_adapter(ADAPTER_ID):
            raise RuntimeError("vLLM did not accept the adapter")

    def _held_full(self, name: str) -> Tensor:
        layer, part = self._locate(name.removesuffix(".weight"))
        weight = getattr(layer, "base_layer", layer).weight
        if part is None:
            return weight
        sizes = getattr(layer, "base_layer", layer).output_sizes
        return weight.narrow(0, sum(sizes[:part]), sizes[part])

    def _held_lora(self, name: str, rank: int) -> Tensor:
        module, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        layer, part = self._locate(module)
        slot = self.model_runner.lora_manager._adapter_manager.lora_index_to_id.index(ADAPTER_ID)
        if factor == "lora_A":
            return layer.lora_a_stacked[part or 0][slot, 0, :rank]
        return layer.lora_b_stacked[part or 0][slot, 0, :, :rank]

    def _locate(self, module: str) -> tuple[Any, int | None]:
        """vLLM's layer that computes `module`, and the module's place in it where vLLM fuses several into one."""
        model = self.model_runner.model
        parent, _, leaf = module.rpartition(".")
        for candidate, part in self._homes(leaf):
            try:
                return model.get_submodule(f"{parent}.{candidate}"), part
            except AttributeError:
                continue
        raise KeyError(f"vLLM's {type(model).__name__} has no layer for {module}")

    def _homes(self, leaf: str) -> Iterator[tuple[str, int | None]]:
        for fused, parts in (getattr(self.model_runner.model, "packed_modules_mapping", None) or {}).items():
            if leaf in parts and len(parts) > 1:
                yield fused, parts.index(leaf)
        yield leaf, None


def _keep_plain_cpu_weights() -> None:
    """Make vLLM's CPU linear layers compute from `layer.weight`.

    vLLM's CPU build repacks each weight into an opaque kernel handle when the model is loaded and empties the
    parameter, so that no part of it can be loaded again; its own reload path rewrites whole fused groups only. There
    is no setting for this. The dispatcher is replaced, before the model is loaded, by vLLM's own fallback: a plain
    `F.linear`.
    """

    def plain(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    vllm_layer_utils.dispatch_cpu_unquantized_gemm = plain  # type: ignore[assignment]


def _multiply_by_one_adapter() -> None:
    """Make vLLM's CPU LoRA a pair of matrix products.

    Its CPU kernels copy the adapter once a token, to serve many adapters in one batch. There is one here, in slot 0,
    and every request of a batch uses it or none does; a copy a token more than doubled the time of generation. The
    platform names the class that does the arithmetic; it is made to name this one.
    """
    current_platform.get_punica_wrapper = lambda: f"{__name__}.{OneAdapterWrapper.__name__}"  # type: ignore[method-assign]


class OneAdapterWrapper(PunicaWrapperCPU):
    """vLLM's CPU LoRA arithmetic for `max_loras=1`."""

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """`y[:, slice_i] += scale * x @ A_i^T @ B_i^T`.

        Shapes: y [T, out], x [T, in], A_i [1, 1, rank, in], B_i [1, 1, out_i, rank].
        """
        if self.no_lora:
            return
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        start = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            y[:, start : start + size].addmm_(x @ a[0, 0].T, b[0, 0].T, alpha=scale)
            start += size


if current_platform.is_cpu():
    _keep_plain_cpu_weights()
    _multiply_by_one_adapter()
