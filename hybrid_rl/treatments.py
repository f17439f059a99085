"""What may be done with a weight, by name, and the settings of each. Imports nothing heavy.

A treatment's name is the same everywhere: in `adaptation`, in `plan.rest` and in a plan. What it makes of a model is in
`hybrid_rl/adaptation/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hybrid_rl.settings import NotNegative, Positive, PositiveInt, Settings

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Treatment:
    """What a treatment trains, and what of it an update carries."""

    name: str
    trains_weight: bool
    """Whether the weight itself is trained (part `full`)."""
    adapter: bool
    """Whether trained tensors stand beside the weight (part `lora`)."""
    sent: Literal["weight", "factors", "nothing"]
    """What engines are sent: the whole weight that it comes to, or the factors of a low-rank difference from the base
    model's, which an engine can serve as a LoRA adapter."""
    ranked: bool = False
    """Whether the adapter has a rank."""
    scaled: bool = False
    """Whether it has an `alpha`."""
    multiple: int = 1
    """Ranks of the factors sent for each of the adapter's own: 2 where the adapter's start is taken away again."""
    counts: float = 2.0
    """How often an adapter counts by default: `alpha` over the rank, or over its root."""


TREATMENTS = {
    t.name: t
    for t in (
        Treatment("full", True, False, "weight"),
        Treatment("frozen", False, False, "nothing"),
        Treatment("lora", False, True, "factors", ranked=True, scaled=True),
        Treatment("rslora", False, True, "factors", ranked=True, scaled=True),
        Treatment("pissa", False, True, "factors", ranked=True, scaled=True, multiple=2),
        Treatment("milora", False, True, "factors", ranked=True, scaled=True, multiple=2),
        Treatment("olora", False, True, "factors", ranked=True, scaled=True, multiple=2),
        Treatment("adalora", False, True, "factors", ranked=True, scaled=True),
        Treatment("dora", False, True, "weight", ranked=True, scaled=True),
        Treatment("vera", False, True, "weight", ranked=True),
        Treatment("randlora", False, True, "weight", ranked=True, scaled=True, counts=20.0),
        Treatment("ia3", False, True, "weight"),
        Treatment("matryoshka", False, True, "factors", ranked=True),
        Treatment("molf", True, True, "weight", ranked=True, scaled=True),
        Treatment("molf_efficient", False, True, "factors", ranked=True, scaled=True),
    )
}
"""By name, in the order in which tables show them."""
ADAPTERS = tuple(name for name, t in TREATMENTS.items() if t.adapter)
"""Those with an adapter: what `plan.rest` may be, besides `frozen`."""
ROUTED = ("molf", "molf_efficient")
"""Those whose optimizer chooses, for each module and step, which experts it steps (arXiv 2605.07111)."""
ADAPTATIONS = ("hybrid", *(name for name in TREATMENTS if name != "frozen"), "lora_matched", "bitfit")
"""What `adaptation` may be."""


def adapter_params(treatment: str, shape: Sequence[int], rank: int, options: Mapping[str, Any]) -> int:
    """Trained parameters that a treatment puts beside a weight of `shape` [..., out, in]."""
    out, inner = shape[-2:] if len(shape) > 1 else (shape[0], 1)
    if treatment in ROUTED:
        return sum(options["ranks"]) * (out + inner)
    if treatment == "vera":
        return rank + out
    if treatment == "randlora":
        bases = math.ceil(min(out, inner) / rank)
        return bases * (rank + min(out, inner))
    if treatment == "ia3":
        return inner if options.get("scales") == "input" else out
    plain = rank * (out + inner) if TREATMENTS[treatment].adapter else 0
    return plain + {"dora": out, "adalora": rank}.get(treatment, 0)


def multiplied_params(treatment: str, shape: Sequence[int], rank: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """Elements of the matrices that a token is multiplied by beside a weight of `shape` [..., out, in]: of those with a
    gradient, and of frozen ones. Vectors, which scale, are in neither."""
    out, inner = shape[-2:] if len(shape) > 1 else (shape[0], 1)
    if not TREATMENTS[treatment].adapter or treatment == "ia3":
        return 0, 0
    if treatment == "randlora":  # of full rank; the smaller matrix is scaled by the trained vectors
        ranks = math.ceil(min(out, inner) / rank) * rank
        return ranks * min(out, inner), ranks * max(out, inner)
    pair = (sum(options["ranks"]) if treatment in ROUTED else rank) * (out + inner)
    return (0, pair) if treatment == "vera" else (pair, (TREATMENTS[treatment].multiple - 1) * pair)


def expert_names(experts: int, *, weight: bool) -> list[str]:
    """What a module's experts are called, in order; `weight`: whether the first is its own weight."""
    lora = [f"expert_{i}" for i in range(1, experts + 1)]
    return ["weight", *lora[:-1]] if weight else lora


class FullConfig(Settings):
    lr: Positive = 1e-6
    """Learning rate of the fully fine-tuned matrices."""
    weight_decay: NotNegative = 0.0
    """AdamW's, of this group."""
    max_grad_norm: Positive = 1.0
    """Clip of this group's gradient norm, on its own."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Its own warm-up; `learner.warmup_steps` by default."""
    schedule: Schedule | None = None
    """Its own course of the learning rate; `learner.schedule` by default."""


class LoraConfig(Settings):
    """Of LoRA and of every other treatment that puts trained tensors beside a weight."""

    lr: Positive | None = None
    """Learning rate of the adapters; 10 x `full.lr` by default, of `molf` `full.lr`."""
    rank: PositiveInt = 16
    """Rank of an adapter."""
    alpha: Positive | None = None
    """Scaling numerator: an adapter counts alpha / rank times, with `rslora` and MoLF alpha / sqrt(rank) times. By
    default it counts twice, with `randlora` 20 times."""
    ranks: dict[str, PositiveInt] = {}
    """Pattern of module names -> rank where it is not `lora.rank`; the last match counts. alpha / rank stays, where
    it is divided by a root alpha does."""
    weight_decay: NotNegative = 0.0
    """AdamW's, of this group."""
    max_grad_norm: Positive = 1.0
    """Clip of this group's gradient norm, on its own."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Its own warm-up; `learner.warmup_steps` by default."""
    schedule: Schedule | None = None
    """Its own course of the learning rate; `learner.schedule` by default."""

    def alpha_at(self, rank: int, *, stabilised: bool = False, counts: float = 2.0) -> float:
        """`alpha` of a module of `rank`, its default resolved; `stabilised`: it is divided by the root of the rank.
        `counts`: how often an adapter counts by default."""
        if stabilised:
            return counts * math.sqrt(rank) if self.alpha is None else self.alpha
        return counts * rank if self.alpha is None else self.alpha * rank / self.rank


class MolfConfig(Settings):
    """MoLF (arXiv 2605.07111): a weight and LoRA pairs, or several LoRA pairs, are all in the forward pass, and each
    optimizer step goes to those with the best scores. The defaults are the authors' (github.com/11785T23/molf)."""

    ranks: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    """Ranks of the LoRA experts; `[lora.rank]` by default, of `molf_efficient` `[lora.rank, 4 x lora.rank]`."""
    rank_stabilised: bool = True
    """A LoRA expert counts `lora.alpha` / sqrt(rank) times, not / rank."""
    score: Literal["epd", "pfn"] = "epd"
    """What experts are compared by, from Adam's moments: the mean decrease of the loss that a step promises, or the
    norm of the step, which does not depend on the LoRA scaling."""
    top_k: PositiveInt = 1
    """Experts of each module that are stepped; the others' moments go on."""
    calibration: Literal["none", "running_mean"] = "none"
    """Divide each expert's score by the running mean of its own. Scores differ by the shapes of the experts, whatever
    the gradient is."""
    lr_factors: list[Positive] = []
    """Factor of each expert's learning rate, in order, the weight itself first where it is one; 1 by default."""
    unwrapped: Literal["train", "freeze"] | None = None
    """What is neither an expert nor the output head: norms, embeddings, biases. `train`: with AdamW at `full.lr`, as
    MoLF does; `freeze`: as `molf_efficient` does."""


class AdaloraConfig(Settings):
    """AdaLoRA (arXiv 2303.10512): adapters of many ranks, of which the least important are taken away during training
    until `lora.rank` a matrix are left on average. Phases are shares of the run's updates."""

    init_rank: PositiveInt | None = None
    """Rank that adapters start with; 1.5 x `lora.rank` by default. Where `lora.ranks` says another, in proportion."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the updates before any rank is taken away (t_i)."""
    final: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the updates after the allocation, which then stays as it is (t_f)."""
    every: PositiveInt = 1
    """Updates between two allocations."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """What one update leaves of the mean of a weight's sensitivity."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """The same of its uncertainty."""
    orth_reg_weight: NotNegative = 0.5
    """Weight of the term that keeps A and B orthogonal, beside the policy's loss; PEFT's default. 0: none."""

    def initial(self, rank: int, of: int) -> int:
        """The rank that an adapter starts with, of which `rank` is wanted; `of`: `lora.rank`."""
        return max(round(rank * (1.5 if self.init_rank is None else self.init_rank / of)), rank + 1)

    def phases(self, updates: int) -> tuple[int, int]:
        """Updates before and after the allocation, of so many.

        Raises `ValueError` if none are left between.
        """
        before, after = round(self.warmup * updates), max(round(self.final * updates), 1)
        if before + after >= updates:
            raise ValueError(
                f"adalora.warmup={self.warmup} and adalora.final={self.final} leave none of {updates} updates to "
                "allocate ranks in; lower them, or make more updates"
            )
        return before, after


class MatryoshkaConfig(Settings):
    """One adapter, every rank (arXiv 2605.07850, github.com/IST-DASLab/MatryoshkaLoRA): y = W x + B P A x."""

    ranks: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    """The nested ranks, whatever `lora.rank`; by default the powers of two up to `lora.rank`, and it."""
    scaling: Literal["none", "rank", "sqrt"] = "sqrt"
    """An adapter of rank k counts 1, 1 / k or 1 / sqrt(k) times; there is no alpha."""
    init: Literal["paper", "peft"] = "paper"
    """Range of A's uniform start: 1 / sqrt(rank) as the paper's code has it, or PEFT's 1 / sqrt(inputs)."""
    loss: Literal["sum", "per_rank", "sampled", "largest"] = "sum"
    """What is trained: the sum of the nested adapters, as in MatryoshkaLoRA; each alone, the losses averaged (as many
    passes as ranks); one drawn for each update (DyLoRA, arXiv 2210.07558); or the largest alone, plain LoRA. With the
    last three, rollouts are sampled at the largest rank."""

    @field_validator("ranks")
    @classmethod
    def _rising(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and value != sorted(set(value)):
            raise ValueError(f"{value} must rise, without repetition")
        return value
