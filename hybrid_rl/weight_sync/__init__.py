"""Weights from learner to engines: what the plan trains, nothing else, with receipts for what arrived."""

from hybrid_rl.weight_sync.encode import decode_update, digest, encode_update, lora_names
from hybrid_rl.weight_sync.receipts import SyncMismatch, verify_receipts

__all__ = ["SyncMismatch", "decode_update", "digest", "encode_update", "lora_names", "verify_receipts"]
