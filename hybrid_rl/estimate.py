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
    originals: int
    """The base model's weights in the places of those that are trained, where a KL term needs the base policy."""
    payload: int
    """What a complete weight update sends."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments + self.originals


def training_memory(
    anatomy: Anatomy, trainable: int, dtype: str, *, reference: int = 0, sent: int = 0
) -> TrainingMemory:
    """Memory of training `trainable` parameters, those of adapters included.

    `reference`: parameters of trained weights whose original is kept. `sent`: elements of a weight update.
    """
    size = ITEM_SIZE[dtype]
    weights = sum(w.params for w in anatomy.weights)
    fp32 = trainable * FP32
    return TrainingMemory(weights * size, fp32, fp32, 2 * fp32, reference * size, sent * size)
