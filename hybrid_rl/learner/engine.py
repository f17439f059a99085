"""DeepSpeed's engine with what reinforcement learning asks of it by group of parameters.

Each part (full, lora) has its own learning rate, decay and clip; gradient and update norms are known by component; a
gradient that is not finite skips the update; parts of the policy, or all of it, can be taken out for a while. Where
modules have experts, each update steps the best of them (MoLF).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import deepspeed.comm
import torch
from torch import Tensor, nn

from hybrid_rl.adaptation import PARTS, AdaptedModel, ParameterGroup
from hybrid_rl.adaptation.adapters import AdaLora
from hybrid_rl.adaptation.molf import Fragment, MolfAdamW
from hybrid_rl.config import Config
from hybrid_rl.learner.adalora import RankAllocation
from hybrid_rl.learner.shards import Shards, put_state, take_state
from hybrid_rl.weight_sync import BaseFiles

_ADALORA = "adalora/"
_CHUNK = 2**22
"""Elements of optimizer state looked at together."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    applied: bool
    """False where a gradient was not finite: then nothing was changed."""
    grad_norms: Mapping[str, float]
    """By group, before clipping."""
    update_norms: Mapping[str, float]
    """By group: norm of the change of the fp32 weights."""
    selections: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    """By module that has experts (MoLF), which of them were stepped; empty if the update was not applied."""
    expert_scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By module, the scores that they were chosen by."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """By module with AdaLoRA, the ranks that it has left."""
    budget: int = 0
    """Ranks that AdaLoRA's schedule leaves over all modules."""


class TrainingEngine:
    """Every method is a collective operation."""

    def __init__(
        self, policy: nn.Module, adapted: AdaptedModel, groups: Sequence[ParameterGroup], config: Config
    ) -> None:
        """Start DeepSpeed on `policy`, a module around `adapted.model`.

        Raises `RuntimeError` if DeepSpeed dropped a group, or does not hold one as it should, or if its own optimizer
        is to choose among experts.
        """
        self._config, self._adapted, self._groups = config, adapted, list(groups)
        settings = {"full": config.full, "lora": config.lora}
        self._rates = {"full": config.full.lr, "lora": config.lora_lr}
        self._max_norm = {part: settings[part].max_grad_norm for part in PARTS}
        self._molf = self._molf_adam(settings) if adapted.experts else None
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=policy,
            optimizer=self._molf or self._adam(settings),
            config=_deepspeed_config(config, sum(p.numel() for g in groups for p in g.parameters)),
        )
        self._check(settings)
        self._fragments_held = fragments = self._fragments()
        if self._molf is not None:
            self._molf.bind(self._masters(), fragments)
        adalora = {name: a for name, a in adapted.adapters.items() if isinstance(a, AdaLora)}
        self._allocation = (
            RankAllocation(adalora, fragments, config.adalora, config.updates, self._total) if adalora else None
        )
        # What the base model holds in the places of the full matrices (adapters are switched off instead).
        kept = config.algo.needs_reference
        self._originals = None
        if kept:  # training that starts from an export holds the export's values already
            start = config.plan.start is not None
            self._originals = self._read_originals() if start else [_held(p).clone() for p in adapted.full.values()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the loss; `last` of the micro-batches before a `step`."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; each rank's loss is its share of the whole already.
        self._engine.backward(loss * self._config.learner.world_size, scale_wrt_gas=False)

    def step(self, scale: Mapping[str, float]) -> Update:
        """Clip each part by its own norm, and update; `scale` is the factor of each part's learning rate.

        Raises `RuntimeError` if DeepSpeed skipped an update that should be applied, or applied one that should not.
        """
        if self._allocation is not None:
            self._allocation.regularise(self._master_pieces(), dict(self._gradient_pieces()))
        grad_norms = self._norms(self._gradients())
        finite = all(math.isfinite(norm) for norm in grad_norms.values())
        if finite:
            self._clip(grad_norms)
        else:  # also where only the norm is too large for fp32, which DeepSpeed judges differently by stage
            for tensors in self._gradients():
                for tensor in tensors:
                    tensor.view(-1)[:1] = torch.inf
        for group, parameters in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["lr"] = self._rates[parameters.part] * scale[parameters.part]
        if finite and self._molf is not None:
            self._molf.route(self._flat_gradients(), self._total)
        if finite and self._allocation is not None:
            self._allocation.see_gradients(dict(self._gradient_pieces()))
        self._engine.step()
        if self._optimizer.overflow is finite:
            raise RuntimeError(f"DeepSpeed judged the gradient otherwise than its norms {grad_norms} say")
        if not finite:
            if self._config.learner.offload != "none" and self._config.learner.zero_stage < 3:
                # DeepSpeed would add the next gradients to these.
                self._optimizer.averaged_gradients.clear()
            return self._with_ranks(Update(finite, grad_norms, dict.fromkeys(grad_norms, 0.0)))
        if self._molf is not None:
            norms, routing = self._roots(self._molf.update_squares()), self._molf.routing
            update = Update(finite, grad_norms, norms, routing.selections, routing.scores)
        else:
            update = Update(finite, grad_norms, self._norms(self._updates()))
        if self._allocation is not None and self._allocation.allocate(self._master_pieces()):
            self._forget_whole()
            self._masters_changed()
        return self._with_ranks(update)

    @contextmanager
    def only(self, parts: Collection[str]) -> Iterator[None]:
        """Inside, the policy is the base model with these of its `PARTS`: without `full`, the full matrices have their
        original weights; without `lora`, adapters contribute nothing.

        Weights are exchanged in place, each rank's share of them under ZeRO-3. Without `algo.kl_coef` the originals are
        read from the model's files for as long as they are needed.
        """
        adapters = [] if "lora" in parts else list(self._adapted.adapters.values())
        originals = [] if "full" in parts else self._originals or self._read_originals()
        self._exchange(originals)
        for adapter in adapters:
            adapter.switch(False)
        try:
            yield
        finally:
            self._exchange(originals)
            for adapter in adapters:
                adapter.switch(True)

    def gathered(self, *parameters: nn.Parameter) -> AbstractContextManager[Any]:
        """Context in which these parameters are whole (ZeRO-3 keeps them partitioned)."""
        if self._config.learner.zero_stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list(parameters))

    @torch.no_grad()
    def perturb(self, seed: int, scale: float) -> None:
        """Move every trained weight, its fp32 master included, by `scale` times normal noise of this rank's own."""
        self._forget_whole()
        noise = torch.Generator().manual_seed(seed * self._config.learner.world_size + deepspeed.comm.get_rank())
        for masters in self._masters():
            for master in masters:
                master.add_(scale * torch.randn(master.shape, generator=noise).to(master.device))
        self._masters_changed()

    @torch.no_grad()
    def set_masters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Give the fp32 masters of these trained parameters the values [whole] that the parameters were cast from."""
        self._forget_whole()
        for parameter, fragment in self._fragments().items():
            if parameter in values:
                share = values[parameter].flatten()[fragment.offset :][: fragment.length]
                fragment.master.detach()[fragment.start : fragment.start + fragment.length] = share
        self._masters_changed()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This rank's share of the masters and of the optimizer's state, copied to CPU memory, and further facts: what
        `shards` writes, and the next step depends on."""
        tensors, steps = take_state(self._named_fragments(), self._optimizer.optimizer.state)
        facts: dict[str, Any] = {"steps": steps}
        if self._molf is not None:
            facts["running_means"] = self._molf.running_means
        if self._allocation is not None and deepspeed.comm.get_rank() == 0:  # the same on every rank
            averages, facts["adalora"] = self._allocation.state()
            tensors |= {f"{_ADALORA}{name}": tensor for name, tensor in averages.items()}
        return tensors, facts

    def restore(self, shards: Shards) -> None:
        """Take back what all ranks' `state` was, however many they were and under whatever ZeRO stage.

        Raises `ValueError` if some of it is missing.
        """
        self._forget_whole()
        whole = self._config.learner.optimizer == "deepspeed"
        put_state(shards, self._named_fragments(), self._optimizer.optimizer.state, whole)
        self._masters_changed()
        if self._molf is not None:
            self._molf.running_means = shards.facts[0]["running_means"]
        if self._allocation is not None:
            self._allocation.restore(shards.tensors(0, _ADALORA), shards.facts[0]["adalora"])

    def _named_fragments(self) -> Iterator[tuple[str, Fragment]]:
        """What this rank holds of each trained parameter."""
        names = {parameter: name for name, parameter in self._adapted.model.named_parameters()}
        for parameter, fragment in self._fragments_held.items():
            yield names[parameter], fragment

    def _molf_adam(self, settings: Mapping[str, Any]) -> MolfAdamW:
        learner, molf = self._config.learner, self._config.molf
        if learner.optimizer != "torch":
            raise RuntimeError(
                f"learner.optimizer={learner.optimizer} steps every parameter, but the plan has modules with experts "
                "(molf), of which some are stepped; use learner.optimizer=torch"
            )
        return MolfAdamW(
            self._optimizer_groups(settings),
            self._adapted.experts,
            betas=learner.adam_betas,
            top_k=molf.top_k,
            score=molf.score,
            calibration=molf.calibration,
            lr_factors=molf.lr_factors,
        )

    def _adam(self, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
        groups = self._optimizer_groups(settings)
        options: dict[str, Any] = {"betas": self._config.learner.adam_betas}
        if self._config.learner.optimizer == "torch":
            return torch.optim.AdamW(groups, **options)
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        offloads = self._config.learner.offload != "none"
        return (DeepSpeedCPUAdam if offloads else FusedAdam)(groups, **options)  # type: ignore[return-value]

    def _optimizer_groups(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            {"params": list(g.parameters), "lr": self._rates[g.part], "weight_decay": settings[g.part].weight_decay}
            for g in self._groups
        ]

    def _check(self, settings: Mapping[str, Any]) -> None:
        kept = self._optimizer.param_groups
        if len(kept) != len(self._groups):
            raise RuntimeError(f"DeepSpeed kept {len(kept)} of the groups {[g.name for g in self._groups]}")
        for held, masters, group in zip(kept, self._masters(), self._groups, strict=True):
            wanted = {"lr": self._rates[group.part], "weight_decay": settings[group.part].weight_decay}
            wrong = {name: held[name] for name, value in wanted.items() if held[name] != value}
            if wrong:
                raise RuntimeError(f"DeepSpeed holds {group.name} with {wrong} instead of {wanted}")
            if any(m.dtype != torch.float32 for m in masters):
                raise RuntimeError(f"DeepSpeed holds {group.name} without fp32 masters")
            size = torch.tensor([sum(m.numel() for m in masters)], device=self._engine.device)
            deepspeed.comm.all_reduce(size)
            if int(size) < sum(math.prod(whole_shape(p)) for p in group.parameters):
                raise RuntimeError(f"DeepSpeed holds {int(size)} parameters of {group.name}, which are too few")

    def _per_group(self, tensors: Mapping[int, Any]) -> list[list[Tensor]]:
        """Tensors by group, from ones by group (ZeRO-1, ZeRO-2) or by the sub-groups of ZeRO-3."""
        owner = getattr(self._optimizer, "sub_group_to_group_id", None)
        shards: list[list[Tensor]] = [[] for _ in self._groups]
        for index, found in tensors.items():
            found = [found] if isinstance(found, Tensor) else found
            shards[index if owner is None else owner[index]] += [t for t in found if t is not None]
        return shards

    def _masters(self) -> list[list[Tensor]]:
        """This rank's share of the fp32 weights that the optimizer steps."""
        return self._per_group(self._partitions())

    def _partitions(self) -> dict[int, Tensor]:
        """The same, by group or sub-group."""
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
        return dict(enumerate(next(getattr(self._optimizer, n) for n in names if hasattr(self._optimizer, n))))

    def _gradients(self) -> list[list[Tensor]]:
        """This rank's share of the averaged gradients: there between `backward` and `step`."""
        return self._per_group(self._partition_gradients())

    def _partition_gradients(self) -> dict[int, Any]:
        """The same, by group or sub-group: one tensor or several."""
        if hasattr(self._optimizer, "fp32_groups_gradient_flat_partition"):  # bf16 under ZeRO-1
            return dict(enumerate(self._optimizer.fp32_groups_gradient_flat_partition))
        if self._config.learner.offload != "none":
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # DeepSpeed may still be copying them into CPU memory
            return {i: master.grad for i, master in self._partitions().items() if master.grad is not None}
        return self._optimizer.averaged_gradients

    def _gradient_pieces(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Each master with its gradient, as DeepSpeed will give it to the optimizer: tensors to be put in a row."""
        found = self._partition_gradients()
        for i, master in self._partitions().items():
            yield master, [found[i]] if isinstance(found[i], Tensor) else found[i]

    def _master_pieces(self) -> dict[Tensor, list[Tensor]]:
        """The masters themselves in the same form."""
        return {master: [master] for masters in self._masters() for master in masters}

    def _flat_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each master with its gradient in one piece, one at a time."""
        for master, parts in self._gradient_pieces():
            flat = parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
            yield master, nn.functional.pad(flat, (0, master.numel() - flat.numel()))

    def _fragments(self) -> dict[nn.Parameter, Fragment]:
        """Where in its masters this rank holds its share of each parameter, by their order and sizes.

        What masters have besides, the padding, is set to 0: ZeRO-3 leaves there whatever memory held, and decay would
        count in the norms of updates. Raises `RuntimeError` on every rank if masters have other values in these places
        than a parameter has, or do not have all of it together.
        """
        names = {p: name for name, p in self._adapted.model.named_parameters()}
        parameters = [p for group in self._groups for p in group.parameters]
        found: dict[nn.Parameter, Fragment] = {}
        for group, masters in zip(self._groups, self._masters(), strict=True):
            done = dict.fromkeys(masters, 0)
            for parameter, fragment, values in self._shares(group, masters):
                held, stop = fragment.master.detach(), fragment.start + fragment.length
                if torch.equal(held[fragment.start : stop].to(values), values):
                    held[done[fragment.master] : fragment.start] = 0
                    found[parameter], done[fragment.master] = fragment, stop
            for master, stop in done.items():
                master.detach()[stop:] = 0
        sizes = self._total(torch.tensor([found[p].length if p in found else 0 for p in parameters]))
        for parameter, size in zip(parameters, sizes.tolist(), strict=True):
            if size != (whole := math.prod(whole_shape(parameter))):
                where = "where its order of parameters has them"
                raise RuntimeError(f"DeepSpeed holds {size} of {whole} elements of {names[parameter]} {where}")
        return found

    def _shares(
        self, group: ParameterGroup, masters: Sequence[Tensor]
    ) -> Iterator[tuple[nn.Parameter, Fragment, Tensor]]:
        """Of each parameter of which this rank has a share: where that is in the masters, and the values it is of."""
        rank, index, at = deepspeed.comm.get_rank(), 0, 0
        if self._config.learner.zero_stage < 3:
            # The group's parameters follow one another, the row is padded, and each rank has as much of it.
            at = -rank * masters[0].numel()
            for parameter in group.parameters:
                start, stop = max(at, 0), min(at + parameter.numel(), masters[0].numel())
                if start < stop:
                    values = parameter.detach().flatten()[start - at : stop - at]
                    yield parameter, Fragment(masters[0], start, stop - start, start - at), values
                at += parameter.numel()
            return
        # Each rank has as much of every parameter, which is padded; a master has some parameters' shares in a row.
        for parameter in group.parameters:
            share = _held(parameter).flatten()
            if at == masters[index].numel() and index + 1 < len(masters):
                index, at = index + 1, 0
            length = min(share.numel(), math.prod(whole_shape(parameter)) - rank * share.numel())
            if length > 0:
                yield parameter, Fragment(masters[index], at, length, rank * share.numel()), share[:length]
            at += share.numel()

    def _updates(self) -> Iterator[Iterator[Tensor]]:
        """What AdamW has just taken from the fp32 weights, computed from its state a chunk at a time."""
        for group, masters in zip(self._optimizer.param_groups, self._masters(), strict=True):
            yield (part for master in masters for part in self._update_of(group, master))

    def _update_of(self, group: Mapping[str, Any], master: Tensor) -> Iterator[Tensor]:
        state = self._optimizer.optimizer.state[master]
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        steps = float(state["step"])
        correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
        for m, v, weight in zip(
            *(t.detach().flatten().split(_CHUNK) for t in (state["exp_avg"], state["exp_avg_sq"], master)), strict=True
        ):
            adam = lr * (m / correction1) / ((v / correction2).sqrt() + group["eps"])
            yield adam + lr * decay * (weight + adam) / (1 - lr * decay)  # decay acted on the weight before the step

    def _norms(self, shards: Any) -> dict[str, float]:
        """Norm of each group over all ranks."""
        squares = [
            sum((t.float().square().sum().double() for t in s), torch.zeros((), dtype=torch.float64)) for s in shards
        ]
        return self._roots(squares)

    def _roots(self, squares: Sequence[Tensor]) -> dict[str, float]:
        """Norm of each group, from this rank's squared one."""
        total = self._total(torch.stack([s.to(self._engine.device) for s in squares]))
        return dict(zip((g.name for g in self._groups), total.sqrt().tolist(), strict=True))

    def _total(self, values: Tensor) -> Tensor:
        """Sum over the ranks, on the CPU."""
        values = values.to(self._engine.device)
        deepspeed.comm.all_reduce(values)
        return values.cpu()

    def _clip(self, norms: Mapping[str, float]) -> None:
        """DeepSpeed would clip by the norm of all parts together, and one's gradient would set the other's step."""
        parts = part_norms(norms)
        for tensors, group in zip(self._gradients(), self._groups, strict=True):
            if parts[group.part] > self._max_norm[group.part]:
                for tensor in tensors:
                    tensor.mul_(self._max_norm[group.part] / parts[group.part])

    def _with_ranks(self, update: Update) -> Update:
        if self._allocation is None:
            return update
        return replace(update, ranks=self._allocation.ranks, budget=self._allocation.budget)

    def _masters_changed(self) -> None:
        """Give the parameters what their fp32 masters have been set to."""
        if hasattr(self._optimizer, "update_lp_params"):
            self._optimizer.update_lp_params()
        else:  # ZeRO-3
            for i in range(len(self._optimizer.fp32_partitioned_groups_flat)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(i)

    def _forget_whole(self) -> None:
        """Before shares are changed: ZeRO-3 keeps some parameters whole from one pass to the next, and would compute
        with what they were."""
        if self._config.learner.zero_stage == 3:
            self._optimizer.empty_partition_cache()

    def _read_originals(self) -> list[Tensor]:
        """This rank's share of what the model's files have in the places of the full matrices."""
        files, shares = BaseFiles(self._config.model.path), []
        for name, parameter in self._adapted.full.items():
            held = _held(parameter)
            flat = files.read(name).to(held.dtype).flatten()
            if held.shape != whole_shape(parameter):  # partitioned, and the last rank's share padded
                flat = nn.functional.pad(flat, (0, held.numel() * self._config.learner.world_size - flat.numel()))
                flat = flat.narrow(0, held.numel() * deepspeed.comm.get_rank(), held.numel())
            shares.append(flat.view(held.shape).to(held.device))
        return shares

    @torch.no_grad()
    def _exchange(self, originals: Sequence[Tensor]) -> None:
        self._forget_whole()
        for parameter, original in zip(self._adapted.full.values(), originals, strict=bool(originals)):
            held = _held(parameter)
            current = held.clone()
            held.copy_(original)
            original.copy_(current)


def part_norms(norms: Mapping[str, float]) -> dict[str, float]:
    """Norms of the parts, from those of their groups."""
    parts = {name.partition("/")[0] for name in norms}
    return {p: math.sqrt(sum(n**2 for name, n in norms.items() if name.startswith(f"{p}/"))) for p in sorted(parts)}


def _held(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all of it, or a share under ZeRO-3."""
    return getattr(parameter, "ds_tensor", parameter.data).detach()


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Whole shape, also where ZeRO-3 holds a partition of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _deepspeed_config(config: Config, trained: int) -> dict[str, Any]:
    learner = config.learner
    zero: dict[str, Any] = {
        "stage": learner.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        # A buffer of this many elements is there in every backward pass; the default is 5e8, whatever is trained.
        "reduce_bucket_size": min(trained, 200_000_000),
        "round_robin_gradients": False,
        "stage3_param_persistence_threshold": 0,
    }
    if learner.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if learner.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        # Micro-batches add up in fp32, so that their number does not change the gradient.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }
