"""The payload of a weight update: one safetensors blob of everything the plan trains.

Fully fine-tuned matrices carry their Hugging Face name; LoRA factors carry PEFT's, padded with zeros to one rank and
with the scaling folded into B, because vLLM's adapter loader knows one rank and no per-module scaling.
"""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
import torch
import xxhash
from torch import Tensor

from hybrid_rl.types import WeightUpdate


def lora_names(module: str) -> tuple[str, str]:
    """Payload names of a module's LoRA factors A [rank, in] and B [out, rank]."""
    prefix = f"base_model.model.{module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def digest(tensor: Tensor) -> str:
    """Digest (xxh3, 128 bits) of a tensor's shape, dtype and bytes. Detects mistakes, not malice."""
    hasher = xxhash.xxh3_128(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    hasher.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return hasher.hexdigest()


def encode_update(
    full: Mapping[str, Tensor],
    lora: Mapping[str, tuple[Tensor, Tensor, float]],
    *,
    version: int,
    dtype: torch.dtype,
) -> WeightUpdate:
    """Encode full weights by parameter name and LoRA triples (A, B, scaling) by module name, in the engines' `dtype`.

    The update is complete: applied to the base model it gives the policy, whatever updates came before.
    """
    tensors = {name: weight.detach().to(dtype).contiguous() for name, weight in full.items()}
    rank = max((a.shape[0] for a, _, _ in lora.values()), default=0)
    for module, (a, b, scaling) in lora.items():
        name_a, name_b = lora_names(module)
        scaled_b = b.detach().float() * scaling
        tensors[name_a] = _pad(a.detach(), rank, dim=0).to(dtype).contiguous()
        tensors[name_b] = _pad(scaled_b, rank, dim=1).to(dtype).contiguous()
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    return WeightUpdate(version, safetensors.torch.save(tensors), digests, rank)


def decode_update(update: WeightUpdate) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split an update into full matrices and LoRA factors, by payload name."""
    tensors = safetensors.torch.load(update.tensors)
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    return {name: tensor for name, tensor in tensors.items() if name not in lora}, lora


def _pad(tensor: Tensor, rank: int, *, dim: int) -> Tensor:
    missing = rank - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
