"""Make a model trainable exactly as its adaptation plan says.

PEFT injects the LoRA layers; the fully fine-tuned matrices are unfrozen in place, without the second copy that PEFT's
`modules_to_save` keeps. Everything else is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from hybrid_rl.plan import AdaptationPlan

_ADAPTER = "default"


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one module's update `scaling * B @ A`."""

    a: nn.Parameter
    """[rank, in]"""
    b: nn.Parameter
    """[out, rank]"""
    scaling: float


@dataclass(frozen=True)
class AdaptedModel:
    """A model with a plan applied, and its trained parameters by module name."""

    model: nn.Module
    full: dict[str, nn.Parameter]
    lora: dict[str, LoraPair]

    @property
    def lora_parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self.lora.values() for parameter in (pair.a, pair.b)]


def apply_plan(model: nn.Module, plan: AdaptationPlan) -> AdaptedModel:
    """Apply `plan` to `model` in place.

    Raises `ValueError` if what PEFT wrapped is not what the plan lists: a plan's names are full module names, and
    nothing may be matched by suffix.
    """
    lora_modules = plan.named("lora")
    if lora_modules:
        ranks = {m.name: m.rank for m in lora_modules}
        alphas = {m.name: m.alpha for m in lora_modules}
        most_common = max(set(ranks.values()), key=list(ranks.values()).count)
        config = LoraConfig(
            target_modules=list(ranks),
            r=most_common,  # type: ignore[arg-type]
            lora_alpha=alphas[lora_modules[0].name],  # type: ignore[arg-type]
            rank_pattern={f"^{name.replace('.', chr(92) + '.')}": rank for name, rank in ranks.items()},
            alpha_pattern={f"^{name.replace('.', chr(92) + '.')}": alpha for name, alpha in alphas.items()},
            lora_dropout=0.0,
        )
        model = inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    modules: dict[str, Any] = dict(model.named_modules())
    wrapped = {name for name, module in modules.items() if isinstance(module, LoraLayer)}
    if wrapped != {m.name for m in lora_modules}:
        raise ValueError(
            f"PEFT wrapped other modules than the plan lists: {sorted(wrapped ^ {m.name for m in lora_modules})}"
        )

    model.requires_grad_(False)
    full = {m.name: modules[m.name].weight for m in plan.named("full")}
    lora = {}
    for planned in lora_modules:
        layer = modules[planned.name]
        lora[planned.name] = LoraPair(
            layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight, layer.scaling[_ADAPTER]
        )
    adapted = AdaptedModel(model, full, lora)
    for parameter in [*full.values(), *adapted.lora_parameters]:
        parameter.requires_grad_(True)
    return adapted
