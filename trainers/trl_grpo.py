"""An adaptation plan inside TRL: `HybridGRPOTrainer(plan="plan.json", ...)` is `GRPOTrainer` with what a plan changes.

The model is what `hybrid-rl train` makes of the plan: the same injection, the same parameters. Rewards, generation,
loss and logging are TRL's. What differs is what TRL decides by "is it a `PeftModel`?": which parameters are trained at
which rate, decay and clip; the reference policy, as base weights are trained here; what vLLM is sent; what is saved.
`python -m trainers.trl_grpo` is TRL's `trl grpo` with this trainer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import trl
from accelerate.utils import DistributedType, is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Trainer
from trl.scripts import grpo as trl_script
from trl.scripts.utils import DatasetMixtureConfig, TrlParser
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.model_config import ModelConfig

from hybrid_rl.adaptation import PARTS, WEIGHTS, AdaptedModel, apply_plan, read_weights, write_weights
from hybrid_rl.components import read_model
from hybrid_rl.config import ConfigError
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.treatments import ROUTED

PLAN = "plan.json"
"""Name of the plan's file in what is saved."""
_HALF = (torch.bfloat16, torch.float16)
_DISTRIBUTED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU")
"""One model a process, whole."""
_PASSES = ("sum", "largest")
"""Losses of Matryoshka adapters that are one pass over the policy as it is sampled from."""


class _Planned(Trainer):
    """Comes between TRL's trainer and transformers' in the order of their `__init__`s: TRL has loaded the model, and
    nothing has looked yet for what is trained."""

    adapted: AdaptedModel

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self._apply(model, kwargs["args"])
        super().__init__(*args, model=model, **kwargs)

    def _apply(self, model: Any, args: Any) -> None:
        raise NotImplementedError


class HybridGRPOTrainer(GRPOTrainer, _Planned):
    """TRL's `GRPOTrainer`, training what `plan` says: `full` modules densely, the others by their adapters.

    `args.learning_rate`, `args.weight_decay` and `args.max_grad_norm` are those of the fully fine-tuned weights; the
    adapters have the same decay and clip, and 10 times the rate, unless `lora_lr`, `lora_weight_decay` or
    `lora_max_grad_norm` say otherwise. Each part is clipped by its own norm. Trained weights are kept in fp32: of a
    bfloat16 model these alone, which needs `args.bf16`.

    With `args.beta`, the reference is the model as it was when the trainer was made, from a copy of the full weights
    alone. Processes are data-parallel (`accelerate launch`, `torchrun`). Raises `ConfigError` for what a plan cannot
    be trained with here: other adapters, DeepSpeed and FSDP, treatments with an optimizer or a loss of their own.
    """

    def __init__(
        self,
        *,
        plan: AdaptationPlan | str | Path,
        args: GRPOConfig | None = None,
        lora_lr: float | None = None,
        lora_weight_decay: float | None = None,
        lora_max_grad_norm: float | None = None,
        components: Mapping[str, str] | None = None,
        **of_trl: Any,
    ) -> None:
        """`plan`: or the path of its file. `components`: what modules are where it cannot be read from the model, as
        in `plan.components`. The rest are `GRPOTrainer`'s arguments."""
        self.plan = plan if isinstance(plan, AdaptationPlan) else AdaptationPlan.load(plan, "plan")
        self._components = dict(components or {})
        _check_plan(self.plan)
        _check_arguments(args, of_trl, lora_max_grad_norm)
        beta = 0.0 if args is None else args.beta
        try:
            if args is not None:
                args.beta = 0.0  # else TRL loads a second whole model for the reference policy
            super().__init__(args=args, **of_trl)
        finally:
            if args is not None:
                args.beta = beta
        if self.accelerator.distributed_type not in [DistributedType[name] for name in _DISTRIBUTED]:
            raise ConfigError(
                f"HybridGRPOTrainer trains whole models side by side, not under {self.accelerator.distributed_type}, "
                "which has one clip for all parameters or holds them in parts; launch it without, or use `hybrid-rl "
                "train`, which has ZeRO with a rate and a clip for each part"
            )
        self._lora = {
            "lr": 10 * self.args.learning_rate if lora_lr is None else lora_lr,
            "weight_decay": self.args.weight_decay if lora_weight_decay is None else lora_weight_decay,
        }
        self._max_norm = {
            "full": self.args.max_grad_norm,
            "lora": self.args.max_grad_norm if lora_max_grad_norm is None else lora_max_grad_norm,
        }
        self.beta = beta
        if beta != 0.0:
            self.ref_model = _BasePolicy(self._policy, self.adapted)  # type: ignore[assignment]
        if self.use_vllm:
            # Of what TRL sends, only where it reads names and values from depends on how adapters are put on.
            self.vllm_generation._iter_named_params = self.named_weights  # type: ignore[method-assign]

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters of each part that has any."""
        parts = {"full": list(self.adapted.full.values()), "lora": self.adapted.adapter_parameters}
        return {part: parts[part] for part in PARTS if parts[part]}

    # --- the model ---

    def _apply(self, model: Any, args: GRPOConfig) -> None:
        if is_peft_model(model):
            raise ConfigError(
                "model is a PeftModel, but the plan says what is adapted; pass what its merge_and_unload() gives"
            )
        try:
            anatomy = read_model(model, self._components)
        except ValueError as error:
            raise ConfigError(f"{error}; here, plan.components is the argument `components`") from None
        self.plan.check_against(anatomy)
        self._base_names = dict(model.named_parameters(remove_duplicate=False))
        self._base_buffers = {name for name, _ in model.named_buffers()}
        self._base_dtypes = {id(p): p.dtype for p in self._base_names.values()}
        self._policy, self.adapted = model, apply_plan(model, self.plan)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ConfigError(
                "the plan puts an adapter on the output head, which TRL multiplies by itself, past the adapter; treat "
                "it as full or frozen"
            )
        if any(p.dtype in _HALF for p in self.adapted.trained.values()):
            if not (args.bf16 or args.fp16):
                raise ConfigError(
                    f"the model is {model.dtype}, in which steps of a learning rate like {args.learning_rate:g} are "
                    "rounded away, so that trained weights are kept in float32; set bf16=True, which computes with "
                    "both, or load the model in float32 (model_init_kwargs={'dtype': 'float32'})"
                )
            for parameter in self.adapted.trained.values():
                parameter.data = parameter.data.float()
        options: Any = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and options.get(
            "use_reentrant"
        ):  # without it, no gradient where no input has one
            model.enable_input_require_grads()

    @torch.no_grad()
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy as the plain model that engines and files have: every parameter once, by its name and in its
        precision in the base model, with the adapters merged. One matrix at a time is made."""
        merged = {
            id(adapter.layer.get_base_layer().get_parameter(which)): (adapter, which)
            for adapter in self.adapted.adapters.values()
            for which in adapter.acts_on
        }
        seen: set[int] = set()
        for name, parameter in self._base_names.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                adapter, which = merged.get(id(parameter), (None, ""))
                value = parameter.detach() if adapter is None else adapter.whole()[which]
                yield name, value.to(self._base_dtypes[id(parameter)])

    # --- the update ---

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """`args.optim` over each part, in it what decays apart from what does not, by the Trainer's rule."""
        if self.optimizer is None:
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self._policy)
            if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)) or (
                options.keys() & {"params", "model", "optimizer_dict"}
            ):
                raise ConfigError(
                    f"optim={str(self.args.optim)!r} groups the parameters its own way, but full weights and adapters "
                    "have rates of their own; use adamw_torch or another that takes groups"
                )
            self.optimizer = optimizer(self._groups(), **options)
        return self.optimizer

    def _groups(self) -> list[dict[str, Any]]:
        settings = {
            "full": {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay},
            "lora": self._lora,
        }
        decaying = set(self.get_decay_parameter_names(self._policy))
        decays = {id(p) for name, p in self._policy.named_parameters() if name in decaying}
        groups: list[dict[str, Any]] = []
        for part, parameters in self.parts.items():
            for decayed in (True, False):
                if some := [p for p in parameters if (id(p) in decays) is decayed]:
                    decay = settings[part]["weight_decay"] if decayed else 0.0
                    groups.append({"params": some, "lr": settings[part]["lr"], "weight_decay": decay, "part": part})
        return groups

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Each part by its own norm, which is logged with its rate. Returns the norm of all."""
        self.accelerator.unscale_gradients()
        norms = {
            part: nn.utils.clip_grad_norm_(parameters, self._max_norm[part]) for part, parameters in self.parts.items()
        }
        assert self.optimizer is not None
        rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
        for part, norm in norms.items():
            self._metrics["train"][f"grad_norm/{part}"].append(float(norm))
            self._metrics["train"][f"learning_rate/{part}"].append(rates[part])
        return torch.stack(list(norms.values())).norm()

    # --- what is saved ---

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The plan, and all that it trains in fp32 as `hybrid_rl.adaptation.read_weights` reads it; the tokenizer."""
        directory = Path(output_dir or self.args.output_dir or ".")
        directory.mkdir(parents=True, exist_ok=True)
        self.plan.save(directory / PLAN)
        write_weights(self.adapted.trained.items(), directory / WEIGHTS)
        self.processing_class.save_pretrained(directory)  # type: ignore[union-attr]
        torch.save(self.args, directory / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        directory = Path(resume_from_checkpoint)
        if AdaptationPlan.load(directory / PLAN, "resume_from_checkpoint").hash != self.plan.hash:
            raise ConfigError(
                f"resume_from_checkpoint={str(directory)!r} was trained by another plan; give plan={directory / PLAN}"
            )
        _read(self.adapted, directory)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def save_merged(self, directory: str | Path) -> None:
        """Write the policy as a plain model that `from_pretrained` and vLLM load, adapters merged, in the base model's
        precision; and the tokenizer. To be called on every process; they leave together, unless the process group has
        ended, as it has at the end of TRL's script."""
        if self.args.should_save:
            new: dict[int, Tensor] = {id(self._base_names[name]): value for name, value in self.named_weights()}
            held = self._policy.state_dict()
            state = {name: value for name, value in held.items() if name in self._base_buffers}
            state |= {name: new[id(parameter)] for name, parameter in self._base_names.items()}
            self._policy.save_pretrained(directory, state_dict=state)
            self.processing_class.save_pretrained(directory)  # type: ignore[union-attr]
        if torch.distributed.is_initialized():
            self.accelerator.wait_for_everyone()


class _BasePolicy:
    """The policy as it was when this was made, called as the model is: inside a call, the full weights have the values
    kept here, and adapters contribute nothing. PEFT's `disable_adapter` would leave the trained full weights in."""

    def __init__(self, model: nn.Module, adapted: AdaptedModel) -> None:
        self._model, self._adapted = model, adapted
        self._kept = [(p, p.detach().clone()) for p in adapted.full.values()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._back(), torch.no_grad():
            return self._model(*args, **kwargs)

    @contextmanager
    def _back(self) -> Iterator[None]:
        now = [p.data for p, _ in self._kept]
        try:
            for parameter, value in self._kept:
                parameter.data = value
            for adapter in self._adapted.adapters.values():
                adapter.switch(False)
            yield
        finally:
            for (parameter, _), value in zip(self._kept, now, strict=True):
                parameter.data = value
            for adapter in self._adapted.adapters.values():
                adapter.switch(True)


def load_policy(model: Any, directory: str | Path, components: Mapping[str, str] | None = None) -> AdaptedModel:
    """Make the base model `model` the policy that `save_model` wrote, or a checkpoint has. Raises `ConfigError` if it
    is not the plan's, or the files are damaged."""
    plan = AdaptationPlan.load(Path(directory) / PLAN, "directory")
    plan.check_against(read_model(model, components or {}))
    adapted = apply_plan(model, plan)
    _read(adapted, Path(directory))
    return adapted


def _read(adapted: AdaptedModel, directory: Path) -> None:
    try:
        read_weights(adapted, directory / WEIGHTS)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_plan(plan: AdaptationPlan) -> None:
    """Refuse treatments that are more than parameters and a forward pass."""
    for m in plan.modules:
        why = None
        if m.treatment in ROUTED:
            why = "whose optimizer chooses the experts that it steps"
        elif m.treatment == "adalora":
            why = "whose ranks are taken away between updates"
        elif m.treatment == "matryoshka" and m.options["loss"] not in _PASSES:
            why = f"whose loss={m.options['loss']} is of other ranks than are sampled from"
        if why:
            instead = "matryoshka.loss=sum" if m.treatment == "matryoshka" else "plan.rest=lora"
            raise ConfigError(
                f"the plan treats {m.name} as {m.treatment}, {why}, which TRL's loop does not do; train it with "
                f"`hybrid-rl train`, or rank with {instead}"
            )


def _check_arguments(args: GRPOConfig | None, of_trl: Mapping[str, Any], lora_max_grad_norm: float | None) -> None:
    """Refuse arguments of TRL's that a plan leaves no room for, or that would round or replace what is trained."""
    if of_trl.get("peft_config") is not None:
        raise ConfigError("peft_config is given beside plan, which says what is adapted; leave it out")
    if of_trl.get("quantization_config") is not None:
        raise ConfigError(
            "quantization_config: a quantised weight cannot be trained fully or merged; load the model unquantised "
            "(model_init_kwargs={'dtype': 'bfloat16'}), or use TRL's own trainer with peft_config"
        )
    if any(given is not None for given in of_trl.get("optimizers") or ()):
        raise ConfigError(
            "optimizers: they would not have the adapters, which the trainer makes; use optim, learning_rate, lora_lr"
        )
    if args is None:
        return
    half = args.bf16 or args.fp16
    refused = {
        "sync_ref_model": "the reference is the base policy, of which no second model is kept",
        "bf16_full_eval": "it rounds the trained weights",
        "fp16_full_eval": "it rounds the trained weights",
    } | ({"use_transformers_continuous_batching": "with bf16 it rounds the trained weights"} if half else {})
    for name, why in refused.items():
        if getattr(args, name):
            raise ConfigError(f"{name}=True cannot be had with a plan: {why}; leave it off")
    if args.max_grad_norm <= 0 and lora_max_grad_norm is not None:
        raise ConfigError(
            f"lora_max_grad_norm={lora_max_grad_norm} does nothing with max_grad_norm={args.max_grad_norm}, with which "
            "nothing is clipped; set max_grad_norm=inf to clip the adapters alone"
        )


# --- the script ---


@dataclass
class HybridScriptArguments(trl_script.GRPOScriptArguments):
    """What `python -m trainers.trl_grpo` takes beside the arguments of `trl grpo`."""

    plan: str | None = field(default=None, metadata={"help": "Path of the plan, made by `hybrid-rl rank`."})
    lora_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the adapters; 10 x learning_rate by default."}
    )
    lora_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the adapters; weight_decay by default."}
    )
    lora_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip of the adapters' gradient norm; max_grad_norm by default."}
    )
    merged_dir: str | None = field(
        default=None, metadata={"help": "Where the trained policy is written as a plain model, adapters merged."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`trl grpo` with a plan. Exits with 2 where the input is wrong."""
    parser = TrlParser(
        (HybridScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig),  # type: ignore[arg-type]
        prog="python -m trainers.trl_grpo",
    )
    try:
        script, training, model, data = parser.parse_args_and_config(args=None if argv is None else list(argv))
    except ValueError as error:  # of unknown settings in the file, and of GRPOConfig's own checks
        parser.error(str(error))
    if script.plan is None:
        parser.error("--plan is needed; `hybrid-rl rank` makes one")
    made: list[HybridGRPOTrainer] = []

    def trainer(**arguments: Any) -> HybridGRPOTrainer:
        given = {name: getattr(script, name) for name in ("lora_lr", "lora_weight_decay", "lora_max_grad_norm")}
        made.append(HybridGRPOTrainer(plan=script.plan, **given, **arguments))
        return made[0]

    try:
        # TRL's script imports its trainer when it runs, and has no other place to give it one.
        with patch.object(trl, "GRPOTrainer", trainer):
            trl_script.main(script, training, model, data)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if script.merged_dir is not None:
        made[0].save_merged(script.merged_dir)


if __name__ == "__main__":
    main()
