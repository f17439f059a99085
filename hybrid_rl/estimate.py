"""Memory of training under a plan, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_rl.components import Anatomy

FP32 = 4
ITEM_SIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes over all ranks together, activations and logits apart. ZeRO-1 shares out the optimizer's, ZeRO-2 the
    gradients too, ZeRO-3 also the weights."""

    weights: int
    """The model in the compute precision."""
    gradients: int
    """Of what is trained, in fp32: micro-batches add up in it."""
    masters: int
    """fp32 copies of what is trained."""
    moments: int
    """Adam's two fp32 moments of what is trained."""
    payload: int
    """What a step's weight update sends."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments


def training_memory(anatomy: Anatomy, trainable: int, dtype: str) -> TrainingMemory:
    """Memory of training `trainable` parameters of the model, LoRA's own included."""
    size = ITEM_SIZE[dtype]
    weights = sum(w.params for w in anatomy.weights)
    return TrainingMemory(weights * size, trainable * FP32, trainable * FP32, 2 * trainable * FP32, trainable * size)
