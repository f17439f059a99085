"""What is trained, in optimizer groups: by part (full, lora), and within it by component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hybrid_rl.adaptation.apply import AdaptedModel
from hybrid_rl.plan import AdaptationPlan

PARTS = ("full", "lora")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate, a decay and a clip with their part, and have norms of their own."""

    part: str
    """`full` or `lora`."""
    component: str
    parameters: tuple[nn.Parameter, ...]

    @property
    def name(self) -> str:
        return f"{self.part}/{self.component}"


def parameter_groups(adapted: AdaptedModel, plan: AdaptationPlan) -> list[ParameterGroup]:
    """Every trained parameter once, full ones first. Empty groups are not made: DeepSpeed drops them."""
    components = {m.name: m.component for m in plan.modules}
    trained: dict[str, Mapping[str, tuple[nn.Parameter, ...]]] = {
        "full": {name: (adapted.full[name],) for name in adapted.full},
        "lora": {name: tuple(adapter.parameters.values()) for name, adapter in adapted.adapters.items()},
    }
    groups: dict[tuple[str, str], list[nn.Parameter]] = {}
    for part in PARTS:
        for name, parameters in trained[part].items():
            component = components.get(name) or components[name.rpartition(".")[0]]
            groups.setdefault((part, component), []).extend(parameters)
    return [ParameterGroup(part, component, tuple(ps)) for (part, component), ps in groups.items()]
