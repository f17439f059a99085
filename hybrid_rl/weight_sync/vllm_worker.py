"""Engine side of the weight sync for vLLM: mixed into vLLM's worker as its `worker_extension_cls`.

Importing this module on a CPU platform changes two things in vLLM (see `_keep_plain_cpu_weights` and
`_multiply_by_one_adapter`), so it is imported by the engine's processes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers import utils as vllm_layer_utils
from vllm.platforms import current_platform

from hybrid_rl.weight_sync.apply import HeldWeights, NotServed
from hybrid_rl.weight_sync.base import BaseFiles
from hybrid_rl.weight_sync.vllm_layout import VllmLayout

ADAPTER_ID = 1


class HybridWeightSync:
    """Methods reached through `LLM.collective_rpc`; `self` is vLLM's worker, one of several with tensor parallelism.

    What cannot be served is returned, not raised: vLLM gives other processes' exceptions without their type.
    """

    model_runner: Any
    vllm_config: Any
    _hybrid_held: HeldWeights

    def start_weight_sync(self, adapter: str) -> None:
        """Get ready to take updates."""
        manager: Any = getattr(self.model_runner, "lora_manager", None)
        adapters = None
        if manager is not None:
            adapters = manager._adapter_manager
            # All zeros, so that requests under way when the first update comes have an adapter too.
            adapters.add_adapter(adapters.create_dummy_lora(ADAPTER_ID, 1, manager.embedding_modules))
            adapters.activate_adapter(ADAPTER_ID)
        model_config = self.vllm_config.model_config
        base = BaseFiles(model_config.model)
        layout = VllmLayout(self.model_runner.model, adapters, base)
        self._hybrid_held = HeldWeights(layout, base, adapter, model_config.dtype)

    def check_lora(self, modules: Sequence[str]) -> str | None:
        """`HeldWeights.check_lora`; returns why not."""
        return _refusal(self._hybrid_held.check_lora, modules)

    def check_full(self, names: Sequence[str]) -> str | None:
        """`HeldWeights.check_full`; returns why not."""
        return _refusal(self._hybrid_held.check_full, names)

    def begin_update(self, names: Sequence[str], rank: int, anchor: bool) -> str | None:
        """`HeldWeights.begin`; returns why not."""
        return _refusal(self._hybrid_held.begin, names, rank, anchor)

    def write_update(self, payload: bytes) -> None:
        """`HeldWeights.write`."""
        self._hybrid_held.write(payload)

    def finish_update(self) -> None:
        """`HeldWeights.finish`."""
        self._hybrid_held.finish()

    def held_digests(self) -> dict[str, str]:
        """`HeldWeights.digests`."""
        return self._hybrid_held.digests()

    def adapter_kind(self) -> str:
        """`HeldWeights.adapter`."""
        return self._hybrid_held.adapter


def _refusal(check: Any, *args: Any) -> str | None:
    try:
        check(*args)
    except NotServed as error:
        return str(error)
    return None


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
