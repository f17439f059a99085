"""MoLF's optimizer: AdamW that steps, of each module's experts, only those with the best scores (arXiv 2605.07111).

The experts of a module are its own weight and bias, and pairs of LoRA factors, or several such pairs alone. All of them
take part in every forward pass, so that one backward pass gives the exact gradient of each. At each step the moments of
ALL parameters go on; every expert is scored by its moments; the best ones of each module get AdamW's decoupled decay
and bias-corrected step, and the others stay as they are. Parameters of no expert take AdamW's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Score = Literal["epd", "pfn"]
Calibration = Literal["none", "running_mean"]

_EPS = 1e-8
"""Of the scores; AdamW's step has its own."""
_MEMORY = 0.99
"""What one step leaves of an expert's running mean: it is over about the last hundred steps."""
_CHUNK = 2**22
"""Elements looked at together, which bounds the memory of what is computed from them."""


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of one parameter, in the fp32 tensor that is stepped for them."""

    master: Tensor
    start: int
    length: int
    offset: int = 0
    """Place of the first of them in the parameter."""


@dataclass(frozen=True)
class Routing:
    """What one step chose, by module, each of its experts in order."""

    scores: Mapping[str, tuple[float, ...]]
    """As they were compared: calibrated, if they are."""
    selections: Mapping[str, tuple[bool, ...]]
    """Whether the expert was stepped."""


class MolfAdamW(torch.optim.Optimizer):
    """On its own, it is used as any optimizer. A parameter without a gradient counts as one with a gradient of zeros.

    Where masters, which may be shards of several parameters and of parts of them, are stepped in the parameters' place
    (DeepSpeed's ZeRO), `bind` says what they hold. Each step is then `route`, with the gradients of all masters, and
    `step`, at once or group by group, which does not look at `grad`.

    Its state by parameter or master has torch's AdamW's names: `step`, `exp_avg`, `exp_avg_sq`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        experts: Mapping[str, Sequence[Sequence[nn.Parameter]]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        top_k: int = 1,
        score: Score = "epd",
        calibration: Calibration = "none",
        lr_factors: Sequence[float] = (),
    ) -> None:
        """`experts`: by module, in order, the parameters of each; all of them must be among `params`.

        `top_k`: experts of each module that are stepped, all of them where it has fewer. `score`: "epd", the decrease
        of the loss that an expert's step promises, per element (Eq. 10), or "pfn", the root mean square of its step
        before the learning rate (Eq. 11). `calibration`: "running_mean" divides each score by the exponential mean of
        the expert's own scores, this one included, so that all are 1 at the first step. `lr_factors`: of each expert's
        learning rate, by its place in its module; 1 by default. It acts in the score and in the step.

        Raises `ValueError` if these do not fit together.
        """
        if score not in get_args(Score) or calibration not in get_args(Calibration) or top_k < 1:
            raise ValueError(f"score={score!r}, calibration={calibration!r}, top_k={top_k}: no such MoLF")
        most = max((len(of_module) for of_module in experts.values()), default=0)
        if lr_factors and len(lr_factors) != most:
            raise ValueError(f"lr_factors={list(lr_factors)} has not one factor for each of {most} experts")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._top_k, self._score, self._calibration = top_k, score, calibration
        self._modules: dict[str, range] = {}
        """Experts are numbered through all modules."""
        self._expert_of: dict[nn.Parameter, int] = {}
        self._factors: list[float] = []
        elements: list[int] = []
        for module, of_module in experts.items():
            self._modules[module] = range(len(elements), len(elements) + len(of_module))
            for i, parameters in enumerate(of_module):
                if any(p in self._expert_of for p in parameters):
                    raise ValueError(f"expert {i} of {module} has a parameter that another one has")
                self._expert_of.update(dict.fromkeys(parameters, len(elements)))
                self._factors.append(lr_factors[i] if lr_factors else 1.0)
                elements.append(sum(p.numel() for p in parameters))
        if not all(elements):
            raise ValueError("an expert has no elements")
        self._elements_E = torch.tensor(elements, dtype=torch.float64)
        self._means_E = torch.zeros_like(self._elements_E)
        self._scored = 0
        """Steps that `_means_E` is of."""
        self._due: set[Tensor] = set()
        """Masters whose step has been routed and is still to be made."""
        self._won_E = [False] * len(elements)
        self.routing = Routing({}, {})
        """What the last step chose."""
        groups: list[list[Tensor]] = [group["params"] for group in self.param_groups]
        self.bind(groups, {p: Fragment(p, 0, p.numel()) for p in self._expert_of})
        self._routes_itself = True

    def bind(self, masters: Sequence[Sequence[Tensor]], fragments: Mapping[nn.Parameter, Fragment]) -> None:
        """From here on `masters`, fp32, by parameter group, are stepped, of which this process may hold a share;
        `fragments` says where in them it holds elements of the experts' parameters; those of others do not count. What
        none covers belongs to parameters of no expert, or is padding.

        Raises `ValueError` if fragments overlap, or lie outside the masters.
        """
        self._routes_itself = False
        self._group_of = {master: i for i, of_group in enumerate(masters) for master in of_group}
        held: dict[Tensor, list[tuple[int, int, int]]] = {master: [] for master in self._group_of}
        for parameter, expert in self._expert_of.items():
            fragment = fragments.get(parameter)
            if fragment is None:
                continue
            if fragment.master not in held:
                raise ValueError(f"{self._name(expert)} lies in a tensor that is not optimized")
            held[fragment.master].append((fragment.start, fragment.start + fragment.length, expert))
        self._pieces = {master: list(self._gapless(pieces, master.numel())) for master, pieces in held.items()}
        self._squares: list[list[Tensor]] = [[] for _ in masters]

    @torch.no_grad()
    def route(
        self, gradients: Iterable[tuple[Tensor, Tensor]], all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> Routing:
        """Advance all moments, and choose the experts that the next `step` is for.

        `gradients`: of each master once, in any shape that has its elements in its order. `all_reduce`: the sum of a
        float64 tensor on the CPU over the processes that hold shares; called once.

        Raises `RuntimeError` if a master is left out, comes again, is unknown or not fp32, or before the last `step`.
        """
        if self._due:
            raise RuntimeError("route was called again before step")
        sums: list[Tensor] = []
        owners: list[int] = []
        for master, gradient in gradients:
            if master not in self._group_of or master in self._due or master.dtype != torch.float32:
                raise RuntimeError(
                    f"route got a tensor of {master.dtype} and shape {tuple(master.shape)} it cannot use"
                )
            self._due.add(master)
            group = self.param_groups[self._group_of[master]]
            m, v = self._advance(master, gradient, group["betas"])
            for start, stop, expert in self._pieces[master]:
                if expert >= 0:
                    rate = group["lr"] * self._factors[expert] if self._score == "epd" else 1.0
                    sums.append(rate * self._sum(m[start:stop], v[start:stop]))
                    owners.append(expert)
        if len(self._due) != len(self._group_of):
            raise RuntimeError(f"route got gradients of {len(self._due)} of {len(self._group_of)} tensors")
        total_E = torch.zeros_like(self._elements_E)
        if sums:
            # Added up on the CPU, where the order is always the same.
            total_E.index_add_(0, torch.tensor(owners), torch.stack(sums).cpu())
        score_E = all_reduce(total_E) / self._elements_E
        if self._score == "pfn":
            score_E = score_E.sqrt()
        if self._calibration == "running_mean":
            score_E = self._calibrated(score_E)
        self.routing = self._choose(score_E.tolist())
        self._won_E = [won for module in self._modules for won in self.routing.selections[module]]
        self._squares = [[] for _ in self._squares]
        return self.routing

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make the step that was routed, of the parameter groups as they now are; on its own, route first.

        Raises `RuntimeError` where it was not routed, and `NotImplementedError` for a closure.
        """
        if closure is not None:
            raise NotImplementedError("MolfAdamW takes no closure")
        if self._routes_itself and not self._due:
            self.route((p, torch.zeros_like(p) if p.grad is None else p.grad) for p in self._group_of)
        for group in self.param_groups:
            for master in group["params"]:
                if master not in self._due:
                    raise RuntimeError(f"step without route, of a tensor of shape {tuple(master.shape)}")
                self._due.discard(master)
                self._squares[self._group_of[master]] += self._apply(master, group)

    def update_squares(self) -> list[Tensor]:
        """By parameter group, the squared norm of what the last step changed in this process's masters, in float64."""
        zero = torch.zeros((), dtype=torch.float64)
        return [torch.stack(squares).sum() if squares else zero for squares in self._squares]

    @property
    def running_means(self) -> dict[str, Any] | None:
        """Of the scores, by module, and the steps that they are of; `None` where scores are not calibrated. Set, it
        raises `ValueError` if they are not of the same experts, or missing."""
        if self._calibration == "none":
            return None
        means = {module: self._means_E[ids.start : ids.stop].tolist() for module, ids in self._modules.items()}
        return {"steps": self._scored, "means": means}

    @running_means.setter
    def running_means(self, saved: Mapping[str, Any] | None) -> None:
        if self._calibration == "none":
            return
        saved = saved or {"means": {}}
        if {m: len(means) for m, means in saved["means"].items()} != {m: len(i) for m, i in self._modules.items()}:
            raise ValueError(f"the state to load has no calibration={self._calibration!r} of these experts")
        means = [mean for module in self._modules for mean in saved["means"][module]]
        self._means_E, self._scored = torch.tensor(means, dtype=torch.float64), saved["steps"]

    def state_dict(self) -> dict[str, Any]:
        """Of torch's AdamW, and the running means of the scores if they are calibrated."""
        means = self.running_means
        return super().state_dict() | ({} if means is None else {"calibration": means})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises `ValueError` if the state has not the running means of the same experts, and they are needed."""
        self.running_means = state_dict.get("calibration")
        super().load_state_dict(state_dict)

    def _gapless(self, pieces: Sequence[tuple[int, int, int]], size: int) -> Iterator[tuple[int, int, int]]:
        """Start, stop and expert of the pieces of a master, in order, and between them those of no expert (-1)."""
        done = 0
        for start, stop, expert in sorted(pieces):
            if start < done or stop > size:
                raise ValueError(f"{self._name(expert)} lies at {start}:{stop}, across another or the end at {size}")
            if start > done:
                yield done, start, -1
            if stop > start:
                yield start, stop, expert
            done = stop
        if done < size:
            yield done, size, -1

    def _name(self, expert: int) -> str:
        module, ids = next((module, ids) for module, ids in self._modules.items() if expert in ids)
        return f"expert {expert - ids.start} of {module}"

    def _advance(self, master: Tensor, gradient: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Take a gradient into the moments of a master; returns them flat."""
        state = self.state[master]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        state["step"] += 1
        m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        for m_part, v_part, g in zip(*(t.split(_CHUNK) for t in (m, v, gradient.reshape(-1))), strict=True):
            g = g.to(m_part)
            m_part.lerp_(g, 1 - betas[0])
            v_part.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        return m, v

    def _sum(self, m: Tensor, v: Tensor) -> Tensor:
        """What the score adds up over an expert's elements, in float64. Moments are not corrected for their bias."""
        total = torch.zeros((), dtype=torch.float64, device=m.device)
        for m_part, v_part in zip(m.split(_CHUNK), v.split(_CHUNK), strict=True):
            step = m_part / (v_part.sqrt() + _EPS)
            total += (step * (m_part if self._score == "epd" else step)).sum(dtype=torch.float64)
        return total

    def _calibrated(self, score_E: Tensor) -> Tensor:
        """The scores over their running means, which they enter; 0 for an expert whose scores were all 0."""
        self._scored += 1
        # The bias-corrected exponential mean, as a weighted one: at the first step it is exactly the score.
        self._means_E += (score_E - self._means_E) * ((1 - _MEMORY) / (1 - _MEMORY**self._scored))
        return torch.where(self._means_E > 0, score_E / self._means_E, 0.0)

    def _choose(self, score_E: Sequence[float]) -> Routing:
        """The best experts of each module; of equal ones the first, which is the module's own weight if it is one."""
        scores, selections = {}, {}
        for module, ids in self._modules.items():
            best = sorted(ids, key=lambda expert: -score_E[expert])[: self._top_k]
            scores[module] = tuple(score_E[ids.start : ids.stop])
            selections[module] = tuple(expert in best for expert in ids)
        return Routing(scores, selections)

    def _apply(self, master: Tensor, group: Mapping[str, Any]) -> Iterator[Tensor]:
        """Step what of a master is to be stepped; yields the squared norms of the changes."""
        state, (beta1, beta2) = self.state[master], group["betas"]
        steps = float(state["step"])
        correction1, correction2 = 1 - beta1**steps, math.sqrt(1 - beta2**steps)
        flat = [t.detach().view(-1) for t in (state["exp_avg"], state["exp_avg_sq"], master)]
        for start, stop, rate in self._stepped(master, group["lr"]):
            for m, v, weight in zip(*(t[start:stop].split(_CHUNK) for t in flat), strict=True):
                change = m / (v.sqrt() / correction2).add_(group["eps"])
                change.mul_(rate / correction1).add_(weight, alpha=rate * group["weight_decay"])
                weight.sub_(change)
                yield change.square_().sum(dtype=torch.float64)

    def _stepped(self, master: Tensor, lr: float) -> list[tuple[int, int, float]]:
        """Start, stop and learning rate of what of a master is to be stepped; neighbours of one rate together."""
        runs: list[tuple[int, int, float]] = []
        for start, stop, expert in self._pieces[master]:
            if expert < 0 or self._won_E[expert]:
                rate = lr * self._factors[expert] if expert >= 0 else lr
                if runs and runs[-1][1:] == (start, rate):
                    start = runs.pop()[0]
                runs.append((start, stop, rate))
        return runs
