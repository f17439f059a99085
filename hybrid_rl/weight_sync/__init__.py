"""Weights from learner to engines: what the plan trains, nothing else, with receipts for what arrived."""

from hybrid_rl.digests import digest
from hybrid_rl.weight_sync.base import BaseFiles
from hybrid_rl.weight_sync.codec import Record, encode_tensor, lora_factors, lora_names, pack, unpack
from hybrid_rl.weight_sync.publish import Publisher, open_publisher
from hybrid_rl.weight_sync.receipts import SyncMismatch, verify_receipts
from hybrid_rl.weight_sync.serve import served_tensors
from hybrid_rl.weight_sync.transport import (
    Collective,
    Directory,
    Meeting,
    SyncTimeout,
    Transport,
    UpdateRefused,
    fetch,
    open_store,
)

__all__ = [
    "BaseFiles",
    "Collective",
    "Directory",
    "Meeting",
    "Publisher",
    "Record",
    "SyncMismatch",
    "SyncTimeout",
    "Transport",
    "UpdateRefused",
    "digest",
    "encode_tensor",
    "fetch",
    "lora_factors",
    "lora_names",
    "open_publisher",
    "open_store",
    "pack",
    "served_tensors",
    "unpack",
    "verify_receipts",
]
