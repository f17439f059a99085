"""Floating-point operations of training under a plan, for the model FLOPs utilisation (MFU; arXiv 2204.02311, app. B).

Counted: matrix products of the weights that a token passes (of experts, the chosen share), of attention, of the
matrices beside weights, frozen ones too, and of DoRA's factors with each other. Not counted: state updates of recurrent
mixers, element-wise work (trained vectors that scale), and, as MFU asks, whatever is computed twice (activation
checkpoints, chunked logits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # they import torch, which arithmetic does without
    from hybrid_rl.components import Anatomy
    from hybrid_rl.plan import AdaptationPlan

_PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362}
"""Dense bf16, from the vendor's data sheets; by what the device's name contains, the first that fits."""


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions, by what they grow with."""

    decoder: float
    """Forward, a token: the decoder's weights."""
    head: float
    """Forward, a token whose next one is predicted."""
    attention: float
    """Forward, a pair of a token and one that it sees, itself included."""
    full: float
    """Weight gradients of the fully fine-tuned matrices, a token."""
    head_gradient: float
    """The same of the output head, a predicted token."""
    lora: float
    """Forward and backward of what stands beside weights, a token."""
    norms: float
    """A forward pass, whatever its tokens: the product of DoRA's factors, of which it needs the rows' norms."""

    def training(self, lengths: Sequence[int], predicted: int, passes: int = 1) -> float:
        """Forward and backward over sequences of `lengths` tokens, of which `predicted` enter the loss, in so many
        `passes`.

        Frozen matrices pass the gradient on and have none themselves: four operations a weight and token, not six.
        """
        tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
        passed = 2 * (self.decoder * tokens + self.head * predicted) + 3 * self.attention * pairs
        beside = (self.full + self.lora) * tokens + self.norms * passes
        return passed + beside + self.head_gradient * predicted


def count_flops(anatomy: Anatomy, plan: AdaptationPlan, model_config: Any) -> Flops:
    """From shapes alone; `model_config` is transformers'."""
    config = model_config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts

    def multiplied(component: str, params: int) -> float:
        return 2.0 * params * (active if component == "expert" else 1.0)

    decoder = [w for w in anatomy.weights if len(w.shape) > 1 and w.component not in ("embedding", "lm_head")]
    heads = [w.params for w in anatomy.weights if w.component == "lm_head"]
    heads = heads or [w.params for w in anatomy.weights if w.component == "embedding"][:1]  # tied
    trained = [m for m in plan.modules if m.trains_weight and m.component != "embedding"]
    beside = [(m, *m.multiplied_params) for m in plan.modules]
    width = getattr(config, "num_attention_heads", 0) * (
        getattr(config, "head_dim", None) or config.hidden_size // max(1, getattr(config, "num_attention_heads", 1))
    )
    attention = sum(kind == "attention" for kind in anatomy.mixers.values())
    return Flops(
        decoder=sum(multiplied(w.component, w.params) for w in decoder),
        head=2.0 * sum(heads),
        attention=4.0 * width * attention,  # query times key, and probability times value
        full=sum(multiplied(m.component, m.params) for m in trained if m.component != "lm_head"),
        head_gradient=sum(2.0 * m.params for m in trained if m.component == "lm_head"),
        lora=sum(3 * multiplied(m.component, own) + 2 * multiplied(m.component, frozen) for m, own, frozen in beside),
        norms=sum(2.0 * (m.rank or 0) * m.params for m in plan.named("dora")),
    )


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """What a device could do, if it is a known one and computes in bf16."""
    known = [peak for part, peak in _PEAK_TFLOPS.items() if part in device_name]
    return float(known[0]) if known and dtype == "bfloat16" else None
