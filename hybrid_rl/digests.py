"""Digests of tensors (xxh3, 128 bits). They detect mistakes, not malice."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """Of a tensor's shape, dtype and bytes."""
    hasher = xxhash.xxh3_128(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().contiguous().cpu().reshape(-1)  # a tensor without dimensions has no other view as bytes
    hasher.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return hasher.hexdigest()


def digest_of_all(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of tensors with their names, in whatever order they come."""
    hasher = xxhash.xxh3_128()
    for line in sorted(f"{name} {digest(tensor)}\n" for name, tensor in tensors):
        hasher.update(line.encode())
    return hasher.hexdigest()
