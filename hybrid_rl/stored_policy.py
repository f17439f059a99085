"""A policy without a learner: the base model with a plan applied and trained weights from a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import WEIGHTS, AdaptedModel, apply_plan, read_weights
from hybrid_rl.checkpoint import STATE, TrainerState, damage, latest_whole, load_state
from hybrid_rl.config import ConfigError, ModelConfig
from hybrid_rl.digests import digest_of_all
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import RunDirectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredPolicy:
    """A run's checkpoint, and the plan that it was trained by."""

    run: RunDirectory
    plan: AdaptationPlan
    state: TrainerState
    checkpoint: Path
    given: str
    """The option that names it, for error messages."""

    def load(self, model: ModelConfig) -> AdaptedModel:
        """The policy in fp32 on the CPU. Raises `ConfigError` if its weights are damaged or not of its plan, or `model`
        is not its base model."""
        base = load_base(model)
        self.check_base(base, model.path)
        return self.restore(apply_plan(base, self.plan))

    def check_base(self, base: Any, model_path: str) -> None:
        """Refuse another base model than the run's, by a digest of its parameters."""
        if not self.state.base:
            logger.warning(
                "%s was saved without a digest of its base model; that model.path=%r is it is taken on trust",
                self.checkpoint,
                model_path,
            )
        elif digest_of_all(base.named_parameters()) != self.state.base:
            raise ConfigError(
                f"{self.given}: model.path={model_path!r} is not the base model that it was trained from: the weights "
                f"differ; use {self.plan.model!r} as it was"
            )

    def restore(self, adapted: AdaptedModel) -> AdaptedModel:
        """Set the trained parameters to the checkpoint's."""
        try:
            read_weights(adapted, self.checkpoint / WEIGHTS)
        except ValueError as error:
            raise ConfigError(f"{self.given}: {error}") from None
        return adapted


def find_policy(directory: Path, given: str, run: Path | None = None) -> StoredPolicy:
    """What is stored in `directory`: a checkpoint, or a run, whose last whole one is taken.

    `given`: what error messages call it. `run`: the run of the checkpoint, where it is not the directory two above.
    Raises `ConfigError` if there is none, or its plan was changed since.
    """
    step = directory
    if not (directory / STATE).is_file():
        found = latest_whole(directory / "checkpoints", [WEIGHTS])
        if found is None:
            raise ConfigError(
                f"{given} is neither a finished checkpoint (<run>/checkpoints/step_*) nor a run that has one"
            )
        step, problems = found
        for problem in problems:
            logger.warning("%s; %s is taken", problem, step.name)
    elif (problem := damage(directory, [WEIGHTS])) is not None:
        raise ConfigError(f"{given}: {problem}; take another checkpoint")
    step = step.resolve()
    of = RunDirectory(run or step.parent.parent)
    plan = AdaptationPlan.load(of.plan, f"{given}, whose plan")
    state = load_state(step)
    if state.plan_hash != plan.hash:
        raise ConfigError(f"{given}: {of.plan} was changed since {step.name} was saved; restore it")
    return StoredPolicy(of, plan, state, step, given)


def check_ranks(plan: AdaptationPlan, ranks: Sequence[int], given: str) -> None:
    """Refuse ranks that the Matryoshka adapters of a plan have not; `given`: the option that asks for them."""
    largest = max((m.rank or 0 for m in plan.named("matryoshka")), default=0)
    if not largest:
        raise ConfigError(
            f"{given}: the policy has no matryoshka modules, which alone are an adapter at every rank; it takes a run "
            "with adaptation=matryoshka, its checkpoint, or a delta export of it"
        )
    if not all(1 <= rank <= largest for rank in ranks):
        raise ConfigError(f"{given}: the policy's matryoshka adapters have ranks from 1 to {largest}")


def load_base(model: ModelConfig) -> Any:
    """The base model in fp32 on the CPU. Raises `ConfigError` if its files cannot be read."""
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(
            model.path, dtype=torch.float32, trust_remote_code=model.trust_remote_code
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path={model.path!r} cannot be loaded: {reason}") from None
    return base.eval()
