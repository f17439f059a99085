"""From a configuration to everything a training loop needs: checked input, running workers, a plan.

All checks that need no worker are made before the first one starts, and raise `ConfigError`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_rl.cluster import Cluster, Resources, open_cluster
from hybrid_rl.components import Matrix, UnknownArchitecture, candidate_matrices, topology
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.data import PromptSource, build_prompts, load_rows, load_tokenizer
from hybrid_rl.learner import LearnerGroup
from hybrid_rl.learner.assemble import assemble
from hybrid_rl.plan import AdaptationPlan, build_plan, check_rank
from hybrid_rl.reward import RewardPool
from hybrid_rl.rollout import LARGEST_ADAPTER_RANK, EngineSettings, RolloutPool, sampling_from
from hybrid_rl.scoring import random_scores
from hybrid_rl.types import Prompt, Receipt, WeightUpdate, WorkerHandle
from hybrid_rl.weight_sync import verify_receipts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """The checked input of a run."""

    candidates: list[Matrix]
    topology: str
    model_bytes: int
    """Bytes of the whole model in `model.dtype`: what a sync of everything would send."""
    train: list[Prompt]
    eval: list[Prompt]
    too_long: int
    """Training prompts left out as too long."""
    columns: list[str]
    plan: AdaptationPlan | None
    """The plan given by `plan.path`."""


@dataclass
class Workplace:
    """Running workers."""

    cluster: Cluster
    pool: RolloutPool
    learner: LearnerGroup
    rewards: RewardPool
    _update: WeightUpdate | None = None

    def sync(self, version: int) -> tuple[WeightUpdate, int]:
        """Bring every engine to the learner's weights. Returns the update and how many engines were verified."""
        self._update = self.learner.export(version)
        verified = self.pool.update(self.cluster.share(self._update), version)
        return self._update, verified

    def verify(self, receipts: Sequence[Receipt]) -> int:
        assert self._update is not None
        return verify_receipts(self._update, receipts)


def check_task(config: Config) -> Task:
    """Read the model's structure, the data and the plan; raise `ConfigError` for whatever cannot work."""
    if config.warm_start is not None and not Path(config.model.path).exists():
        raise ConfigError(
            f"model.path={config.model.path!r} does not exist yet; make it with `hybrid-rl warm-start` and this file"
        )
    tokenizer = load_tokenizer(config)
    model = _meta_model(config)
    try:
        everything, kind = candidate_matrices(model), topology(model)
    except UnknownArchitecture as error:
        raise ConfigError(f"model.path={config.model.path!r}: {error}") from None
    plan = AdaptationPlan.load(config.plan.path) if config.plan.path else None
    candidates = everything
    if plan is not None:
        plan.check_against(everything)
    else:
        candidates = [c for c in everything if config.plan.placement in ("all", c.component)]
        if not candidates:
            raise ConfigError(f"plan.placement={config.plan.placement}: this {kind} model has no such matrices")
        if config.adaptation != "full" and config.plan.rest == "lora":
            narrowest = min(candidates, key=lambda c: min(c.shape))
            check_rank(config.lora.rank, narrowest.name, narrowest.shape)
    _check_engine_rank(config, _largest_rank(config, plan))

    data = config.data
    read: dict[str, Any] = {"columns": data.columns, "answer_after": data.answer_after}
    train_rows = load_rows(data.train, setting="data.train", split="train", **read)
    eval_rows = load_rows(data.eval, setting="data.eval", split="test", **read)[: data.eval_size]
    train, too_long = build_prompts(train_rows, data, tokenizer, setting="data.train")
    held_out, _ = build_prompts(eval_rows, data, tokenizer, setting="data.eval")
    _check_length(config, model, train + held_out)
    itemsize = torch.empty((), dtype=getattr(torch, config.model.dtype)).element_size()
    model_bytes = sum(p.numel() for p in model.parameters()) * itemsize
    columns = sorted(set(train_rows[0]) & set(eval_rows[0]))
    return Task(candidates, kind, model_bytes, train, held_out, too_long, columns, plan)


@contextmanager
def open_workplace(config: Config, task: Task) -> Iterator[Workplace]:
    """Start the cluster, the reward processes, the rollout engines and the learner; stop them on leaving."""
    with ExitStack() as stack:
        rewards = RewardPool(config.rewards, config.reward, chat=config.data.chat)
        stack.callback(rewards.close)
        rewards.check(task.columns)
        cluster = open_cluster(config)
        stack.callback(cluster.close)
        ranks = config.learner.world_size
        cluster.reserve(
            [_resources(config.learner, cluster)] * ranks
            + [_resources(config.rollout, cluster)] * config.rollout.engines
        )
        workplace = Workplace(cluster, None, None, rewards)  # type: ignore[arg-type]
        verify = workplace.verify if config.sync.verify else (lambda receipts: 0)
        workplace.pool = RolloutPool(
            lambda i: _start_engine(config, task, cluster, ranks + i, i),
            config.rollout.engines,
            max_restarts=config.rollout.max_restarts,
            timeout=config.rollout.timeout,
            verify=verify,
        )
        workplace.learner = _start_learner(config, cluster)
        workplace.pool.wait_ready()
        yield workplace


def make_plan(config: Config, task: Task, workplace: Workplace) -> AdaptationPlan:
    """The plan given, or one made as the configuration says."""
    if task.plan is not None:
        return task.plan
    ratio = {"hybrid": config.plan.budget.ratio, "lora": 0.0, "full": 1.0}[config.adaptation]
    method: dict[str, Any] = {
        "adaptation": config.adaptation,
        "budget": {"ratio": ratio, "unit": config.plan.budget.unit},
    }
    method |= {"placement": config.plan.placement, "rest": config.plan.rest}
    scores: dict[str, float] = {}
    if 0 < ratio < 1:
        method |= {"score": config.plan.score}
        if config.plan.score == "random":
            scores = random_scores([c.name for c in task.candidates], config.seed)
        else:
            scores, seen = _gradient_scores(config, task, workplace)
            method |= {"score_rank": config.plan.score_rank, **seen}
    return build_plan(
        task.candidates,
        scores,
        model=config.model.path,
        topology=task.topology,
        method=method,
        seed=config.seed,
        ratio=ratio,
        unit=config.plan.budget.unit,
        rest=config.plan.rest,
        rank=config.lora.rank,
        alpha=config.lora_alpha,
    )


def _gradient_scores(config: Config, task: Task, workplace: Workplace) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores from the base policy's own rollouts, on prompts drawn apart from the training order."""
    # No more than there are: a problem in both halves would make noise look like agreement.
    prompts = PromptSource(task.train, seed=config.seed + 1).take(min(config.plan.prompts, len(task.train)))
    seed, n = config.seed + 1, config.batch.num_generations
    sampling = sampling_from(config, n=n, temperature=config.sampling.temperature, seed=seed)
    groups = workplace.rewards.score(prompts, workplace.pool.generate(prompts, sampling)).groups
    halves = [assemble(groups[half::2]) for half in range(2)]
    if not all(half.sequences for half in halves):
        logger.warning(
            "the ranking saw no group with unequal rewards, so every score is 0 and modules are taken in the order of "
            "their names; raise plan.prompts, or give the policy an easier task"
        )
    scores = workplace.learner.score([half.sequences for half in halves])
    seen = {"prompts": len(prompts), "zero_variance_groups": sum(half.zero_variance_groups for half in halves)}
    return {c.name: scores[c.name] for c in task.candidates}, seen


def _largest_rank(config: Config, plan: AdaptationPlan | None) -> int:
    """Largest LoRA rank that a weight update can carry; 0 if it carries no adapter."""
    if plan is not None:
        return max((m.rank or 0 for m in plan.modules), default=0)
    return config.lora.rank if config.adaptation != "full" and config.plan.rest == "lora" else 0


def _check_engine_rank(config: Config, rank: int) -> None:
    if config.rollout.engine == "vllm" and rank > LARGEST_ADAPTER_RANK:
        raise ConfigError(
            f"lora.rank={rank} is more than rollout.engine=vllm serves ({LARGEST_ADAPTER_RANK}); lower it, or use "
            "rollout.engine=transformers"
        )


def _resolved(path: str) -> str:
    """A local path made absolute; a hub name as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _meta_model(config: Config) -> Any:
    """The model without its weights."""
    try:
        model_config = AutoConfig.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a path that is not a model
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path={config.model.path!r} is not a causal language model: {reason}") from None
    local = Path(config.model.path)
    if local.is_dir() and not any(local.glob("*.safetensors")):
        raise ConfigError(f"model.path={config.model.path!r} has no weights (*.safetensors)")
    return model


def _check_length(config: Config, model: Any, prompts: list[Prompt]) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(p.token_ids) for p in prompts) + config.sampling.max_completion_length
    if positions is not None and longest > positions:
        raise ConfigError(
            f"the longest prompt plus sampling.max_completion_length={config.sampling.max_completion_length} is "
            f"{longest} tokens, the model has {positions} positions; lower that, or data.max_prompt_length="
            f"{config.data.max_prompt_length}"
        )


def _resources(settings: Any, cluster: Cluster) -> Resources:
    gpus = settings.gpus if settings.gpus is not None else float(cluster.has_gpus)
    return Resources(settings.cpus, gpus)


def _start_engine(config: Config, task: Task, cluster: Cluster, place: int, index: int) -> WorkerHandle:
    if config.rollout.engine == "vllm":
        from hybrid_rl.rollout.vllm_engine import VllmEngine as Engine
    else:
        from hybrid_rl.rollout.transformers_engine import TransformersEngine as Engine
    longest = max(len(p.token_ids) for p in task.train + task.eval)
    settings = EngineSettings(
        name=f"engine-{index}",
        model_path=_resolved(config.model.path),
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        max_length=longest + config.sampling.max_completion_length,
        adapter_rank=_largest_rank(config, task.plan),
        max_concurrent=config.rollout.max_concurrent,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        seed=config.seed,
    )
    return cluster.start(place, Engine, settings, name=settings.name)


def _start_learner(config: Config, cluster: Cluster) -> LearnerGroup:
    from hybrid_rl.learner.worker import LearnerWorker

    # Workers may start in another directory.
    model = config.model.model_copy(update={"path": _resolved(config.model.path)})
    config = config.model_copy(update={"model": model})
    workers = [
        cluster.start(rank, LearnerWorker, config, rank, name=f"learner-{rank}")
        for rank in range(config.learner.world_size)
    ]
    learner = LearnerGroup(workers)
    learner.connect(*cluster.endpoint(workers[0]))
    return learner
