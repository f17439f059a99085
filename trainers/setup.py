"""From a configuration to everything a training loop needs: checked input, running workers, a plan.

All checks that need no worker are made before the first one starts, and raise `ConfigError`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hybrid_rl.adaptation import PARTS, Start
from hybrid_rl.algorithms import rehearse
from hybrid_rl.answers import Answers
from hybrid_rl.cluster import Cluster, Resources, open_cluster
from hybrid_rl.components import Anatomy, cross_check, read_model
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.cross_checks import check_experts
from hybrid_rl.data import build_prompts, load_rows, load_tokenizer
from hybrid_rl.export import start_plan
from hybrid_rl.learner import LearnerGroup
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import configured_plan, probe_plan, select_candidates
from hybrid_rl.reward import RewardPool
from hybrid_rl.rollout import LARGEST_ADAPTER_RANK, EngineSettings, Episodes, RolloutPool
from hybrid_rl.rollout.environment import Environment
from hybrid_rl.scoring import find_score
from hybrid_rl.treatments import ROUTED, TREATMENTS
from hybrid_rl.types import Prompt, WeightUpdate, WorkerHandle
from hybrid_rl.weight_sync import Transport
from trainers.base_model import check_weights, meta_model
from trainers.courier import MeetingCourier
from trainers.reward_check import check_rewards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """The checked input of a run."""

    anatomy: Anatomy
    model_bytes: int
    """Bytes of the whole model in `model.dtype`: what a sync of everything would send."""
    train: list[Prompt]
    eval: dict[str, list[Prompt]]
    """Held-out prompts by the name of their set, '' where there is one without a name."""
    too_long: int
    """Training prompts left out as too long."""
    columns: list[str]
    """Of training and held-out problems alike."""
    plan: AdaptationPlan | None = None
    """The plan given by `plan.path` or `plan.start`, or a resumed run's own."""
    start: Start | None = None
    """The values of `plan.start`."""
    rewards: Mapping[str, Any] = field(default_factory=dict)
    """Each reward's arguments, defaults included."""

    @property
    def held_out(self) -> list[Prompt]:
        """Those of all sets."""
        return [prompt for prompts in self.eval.values() for prompt in prompts]


@dataclass
class Workplace:
    """Running workers."""

    cluster: Cluster
    transport: Transport
    pool: RolloutPool
    episodes: Episodes
    learner: LearnerGroup
    rewards: RewardPool
    answers: Answers
    colocated: bool

    def sync(self, version: int, in_flight: str = "keep", parts: Sequence[str] = PARTS) -> Synced:
        """Bring every engine to the learner's weights, or to those of `parts` and the base model's for the rest;
        completions under way go on as `in_flight` says."""
        return self.bring(self.learner.export(version, tuple(parts)), in_flight)

    def bring(self, update: WeightUpdate, in_flight: str = "keep") -> Synced:
        """Bring every engine to `update`, whoever published it."""
        return Synced(update, self.pool.update(update, in_flight))

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, the learner computes: engines that share its GPUs release their memory."""
        if not self.colocated:
            yield
            return
        self.pool.sleep()
        try:
            yield
        finally:
            self.pool.wake()


@dataclass(frozen=True)
class Synced:
    """What a weight sync did."""

    update: WeightUpdate
    verified: int
    """Engines whose receipt equals the learner's digests."""


def check_task(config: Config, plan: AdaptationPlan | None = None) -> Task:
    """Read the model's structure, the data and the plan; raise `ConfigError` for whatever cannot work.

    `plan`: a resumed run's own, with which nothing is looked up in `plan.path` or `plan.start`.
    """
    _check_algorithm(config)
    task, model = _read_input(config)
    plan, start = _check_plans(config, model, task.anatomy, plan)
    rewards = check_rewards(config, task.train, f"data.train={config.data.train}")
    for name, prompts in task.eval.items():
        check_rewards(config.judging(name), prompts, f"data.eval={config.data.held_out[name]}")
    return replace(task, plan=plan, start=start, rewards=rewards)


def check_input(config: Config) -> Task:
    """`check_task` without what decides how a policy is trained: for one that is there already. The rewards need the
    columns of the held-out problems alone."""
    task = _read_input(config, trains=False)[0]
    rewards: dict[str, Any] = {}
    for name, prompts in task.eval.items():
        rewards |= check_rewards(config.judging(name), prompts, f"data.eval={config.data.held_out[name]}")
    return replace(task, rewards=rewards)


def _read_input(config: Config, trains: bool = True) -> tuple[Task, Any]:
    """What there is beside a plan, and the model without its weights."""
    model = meta_model(config)
    check_weights(config)
    tokenizer = load_tokenizer(config)
    anatomy = _read_anatomy(config, model)

    data = config.data
    read: dict[str, Any] = {"columns": data.columns, "answer_after": data.answer_after}
    train_rows = load_rows(data.train, setting="data.train", split="train", **read)
    held_out: dict[str, list[Prompt]] = {}
    columns = [set(train_rows[0])] if trains else []
    for name, source in data.held_out.items():
        setting = f"data.eval.{name}" if name else "data.eval"
        rows = load_rows(source, setting=setting, split="test", **read)[: data.eval_size]
        columns.append(set(rows[0]))
        prompts, left_out = build_prompts(rows, data, tokenizer, setting=setting)
        if left_out:
            logger.warning(
                "%s: %d of %d problems are longer than data.max_prompt_length=%d and are not evaluated",
                *(setting, left_out, len(rows), data.max_prompt_length),
            )
        held_out[name] = [replace(p, id=f"{name}/{p.id}") for p in prompts] if len(data.held_out) > 1 else prompts
    train, too_long = build_prompts(train_rows, data, tokenizer, setting="data.train")
    _check_length(config, model, [*train, *(p for prompts in held_out.values() for p in prompts)])
    itemsize = torch.empty((), dtype=getattr(torch, config.model.dtype)).element_size()
    model_bytes = sum(p.numel() for p in model.parameters()) * itemsize
    return Task(anatomy, model_bytes, train, held_out, too_long, sorted(set.intersection(*columns))), model


def _check_algorithm(config: Config) -> None:
    rehearse(config.algo)
    if config.algo.kl_coef and config.algo.kl_in == "loss" and config.algo.kl_estimator == "k1":
        logger.warning("algo.kl_estimator=k1 in the loss has a gradient of mean 0; use k2 or k3, or algo.kl_in=reward")
    on_policy = config.batch.mini_batches == config.batch.epochs == 1 and config.algo.old_logprobs == "learner"
    if on_policy and config.algo.loss.startswith("gspo"):
        logger.warning(
            "every update is on-policy, so that GSPO's clip does nothing; its paper has batch.mini_batches=4"
        )


def check_plan(config: Config, model: Any) -> tuple[Anatomy, AdaptationPlan | None]:
    """What the model consists of, and the plan of `plan.path` or `plan.start` if there is one; everything about plans
    that needs no weights is checked."""
    anatomy = _read_anatomy(config, model)
    return anatomy, _check_plans(config, model, anatomy, None)[0]


def _read_anatomy(config: Config, model: Any) -> Anatomy:
    try:
        anatomy = read_model(model, config.plan.components)
        cross_check(model, anatomy, config.plan.components)
    except ValueError as error:  # not understood, or an override that fits nothing
        raise ConfigError(f"model.path={config.model.path!r}: {error}") from None
    return anatomy


def _check_plans(
    config: Config, model: Any, anatomy: Anatomy, plan: AdaptationPlan | None
) -> tuple[AdaptationPlan | None, Start | None]:
    """The plan and the values to start from, as far as they are given. `plan`: a resumed run's own."""
    start = None
    if plan is None and config.plan.path is not None:
        plan = AdaptationPlan.load(config.plan.path)
    elif plan is None and config.plan.start is not None:
        plan, start = start_plan(config, anatomy)
    if plan is not None:
        plan.check_against(anatomy)
        if config.plan.given is not None:
            _check_given(config, plan)
    else:
        find_score(config.plan.score)
        _check_choices(config, anatomy)
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None and (config.adaptation not in _BESIDE_QUANTISED or config.plan.given is not None):
        raise ConfigError(
            f"model.path={config.model.path!r} is quantised, and what is quantised can neither be fully fine-tuned nor "
            f"taken apart; use the unquantised model, or adaptation={'|'.join(_BESIDE_QUANTISED)}"
        )
    _check_sequence_parallel(config, model, anatomy)
    for each in [plan] if plan is not None else _drafts(anatomy, config):
        check_engine(config, each)
    return plan, start


_BESIDE_QUANTISED = ("lora", "rslora", "matryoshka", "molf_efficient")
"""Treatments that need nothing of a weight but that it is multiplied by."""


def _check_given(config: Config, plan: AdaptationPlan) -> None:
    """Refuse settings that a finished plan cannot be trained with."""
    routed = [m for m in plan.adapted if m.treatment in ROUTED]
    try:
        if routed:
            check_experts(config, {len(m.options["ranks"]) + m.trains_weight for m in routed})
        if any(m.treatment == "adalora" for m in plan.adapted):
            config.adalora.phases(config.updates)
    except ValueError as error:
        raise ConfigError(f"{config.plan.given}: {error}") from None
    if config.lora.lr is None and any(m.treatment == "molf" for m in routed):
        raise ConfigError(
            f"{config.plan.given} has MoLF modules, whose experts are compared by their learning rates; give lora.lr, "
            f"as in lora.lr={config.full.lr:g} (full.lr, as in the paper)"
        )
    ranks = sorted({m.rank for m in plan.adapted if m.rank is not None})
    if ranks and "rank" in config.lora.model_fields_set and config.lora.rank not in ranks:  # recipes carry it along
        given = " and ".join(map(str, ranks))
        logger.warning(
            "lora.rank=%d does nothing: %s has modules of rank %s", config.lora.rank, config.plan.given, given
        )


def _drafts(anatomy: Anatomy, config: Config) -> list[AdaptationPlan]:
    """Plans that between them treat every module in each way that the plan to come, or its probe, may treat it."""
    flat = dict.fromkeys((c.name for c in select_candidates(anatomy, config.plan)), 0.0)
    drafts = [configured_plan(anatomy, config, flat, {})]
    if config.adaptation == "hybrid" and config.rest != "frozen":
        molf = config.molf.model_copy(update={"unwrapped": "freeze"})  # a hybrid plan trains nothing besides
        all_so = config.model_copy(update={"adaptation": config.rest, "molf": molf})
        drafts.append(configured_plan(anatomy, all_so, {}, {}))
    if probes(config):
        drafts.append(probe_plan(anatomy, config))
    return drafts


@contextmanager
def open_workplace(config: Config, task: Task, *, rollouts: bool = True, learner: bool = True) -> Iterator[Workplace]:
    """Start the cluster, the `learner` and, for `rollouts`, the reward processes and the rollout engines; stop them on
    leaving."""
    with ExitStack() as stack:
        ranks, engines = config.learner.world_size if learner else 0, config.rollout.engines if rollouts else 0
        colocated = config.cluster.placement == "colocate"
        workplace = Workplace(None, None, None, None, None, None, None, colocated)  # type: ignore[arg-type]
        answering: dict[str, Any] = {}
        if rollouts and config.rollout.environment is not None:
            environment = Environment(config.rollout.environment, config.reward)
            stack.callback(environment.close)
            environment.check(task.columns)
            answering = {"environment": environment, "max_turns": config.rollout.max_turns}
            answering["tokenizer"] = load_tokenizer(config)
        workplace.cluster = cluster = open_cluster(config)
        stack.callback(cluster.close)
        if rollouts:
            workplace.rewards = RewardPool(config.rewards, config.reward, cluster, chat=config.data.chat)
            stack.callback(workplace.rewards.close)
            # Which problems have what each needs, `check_rewards` has seen.
            first = [prompts[0] for prompts in (task.train, *task.eval.values())]
            workplace.rewards.check(sorted(set().union(*(prompt.columns for prompt in first))))
        workplace.transport = transport = cluster.transport(config)
        cluster.reserve(places(config, cluster.has_gpus, ranks, engines))
        workplace.pool = RolloutPool(
            lambda i: _start_engine(config, task, cluster, transport, _place_of_engine(config, ranks, i), i),
            engines,
            max_restarts=config.rollout.max_restarts,
            timeout=config.rollout.timeout,
            start_timeout=config.rollout.start_timeout,
            max_concurrent=config.rollout.max_concurrent,
            sync_timeout=config.sync.timeout,
            verify=config.sync.verify,
            courier=_courier(config, workplace) if transport.sends else None,
        )
        workplace.episodes = Episodes(workplace.pool, **answering)
        if rollouts:
            workplace.answers = Answers(workplace.episodes, workplace.rewards)
        if learner:
            workplace.learner = _start_learner(config, cluster, transport)
        workplace.pool.wait_ready()
        yield workplace


def _courier(config: Config, workplace: Workplace) -> MeetingCourier:
    return MeetingCourier(
        lambda: workplace.learner,
        lambda: workplace.cluster.endpoint(workplace.learner.first),
        timeout=2 * config.sync.timeout,  # a transport's own limits come first, and say more
    )


def ranks(config: Config) -> bool:
    """Whether the plan is made by a score."""
    return config.adaptation == "hybrid" and config.plan.given is None and 0 < config.plan.budget.ratio < 1


def probes(config: Config) -> bool:
    """Whether a plan is made from a probe, which syncs an adapter of its own."""
    return ranks(config) and find_score(config.plan.score).needs == "updates"


def _check_choices(config: Config, anatomy: Anatomy) -> None:
    """Refuse a LoRA rank that no candidate has."""
    widest = max(select_candidates(anatomy, config.plan), key=lambda c: min(c.shape))
    own = {"matryoshka": config.matryoshka.ranks, **dict.fromkeys(ROUTED, config.molf.ranks)}.get(config.rest)
    if TREATMENTS[config.rest].ranked and own is None and config.lora.rank > min(widest.shape):
        raise ConfigError(
            f"lora.rank={config.lora.rank} is more than any candidate has; use at most {min(widest.shape)}"
        )


def check_engine(config: Config, plan: AdaptationPlan) -> None:
    """Refuse what vLLM cannot be sent; the engines look more closely when they start."""
    if config.rollout.engine != "vllm":
        return
    rank = max((m.sent_rank for m in plan.modules), default=0)
    if rank > LARGEST_ADAPTER_RANK and config.sync.adapter != "merged":
        raise ConfigError(
            f"lora.rank={config.lora.rank} makes adapters of rank {rank}, and rollout.engine=vllm serves at most "
            f"{LARGEST_ADAPTER_RANK}; lower it, or use sync.adapter=merged"
        )
    held = ("attention", "recurrent", "mlp", "norm", "router", "lm_head", "embedding")
    other = [m for m in plan.modules if m.treatment != "frozen" and (m.component not in held or len(m.shape) != 2)]
    whole = {m.name for m in plan.modules if len(m.shape) == 2}
    vectors = [m for m in other if len(m.shape) == 1]
    held_vectors = [m for m in vectors if m.component == "norm" or m.name.removesuffix(".bias") in whole]
    other = [m for m in other if m not in held_vectors]
    if other:
        leave = "set molf.unwrapped=freeze" if config.trains_unwrapped else "leave it out"
        raise ConfigError(
            f"{other[0].name} ({other[0].component}) is trained, but rollout.engine=vllm holds it in another form and "
            f"could not prove what it serves; use rollout.engine=transformers, or {leave}"
        )


def _resolved(path: str) -> str:
    """A local path made absolute; a hub name as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _check_length(config: Config, model: Any, prompts: list[Prompt]) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(p.token_ids) for p in prompts) + config.sampling.max_completion_length
    if positions is not None and longest > positions:
        raise ConfigError(
            f"the longest prompt plus sampling.max_completion_length={config.sampling.max_completion_length} is "
            f"{longest} tokens, the model has {positions} positions; lower that, or data.max_prompt_length="
            f"{config.data.max_prompt_length}"
        )


def _check_sequence_parallel(config: Config, model: Any, anatomy: Anatomy) -> None:
    """Refuse what cannot be cut over ranks."""
    size = config.learner.sequence_parallel
    if size == 1:
        return
    setting = f"learner.sequence_parallel={size}"
    other = next((name for name, kind in anatomy.mixers.items() if kind != "attention"), None)
    if other is not None:
        raise ConfigError(f"{setting}: {other} passes a state from token to token, which cannot be cut; use 1")
    if config.model.attention != "sdpa":
        raise ConfigError(f"{setting} works with model.attention=sdpa, not {config.model.attention}")
    text = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (getattr(text, name, None) or size) % size:
            raise ConfigError(f"{setting} does not divide the model's {name}={getattr(text, name)}")
    longest = config.data.max_prompt_length + config.sampling.max_completion_length
    looks = ranks(config) and find_score(config.plan.score).needs in ("gradients", "updates")
    if looks and longest > config.batch.tokens_per_micro_batch:
        raise ConfigError(
            f"plan.score={config.plan.score} looks at whole sequences on one rank, of up to {longest} tokens with "
            f"batch.tokens_per_micro_batch={config.batch.tokens_per_micro_batch}; make the plan with `hybrid-rl rank` "
            "on shorter completions and give plan.path"
        )


def _learner_resources(config: Config, has_gpus: bool) -> Resources:
    gpus = config.learner.gpus if config.learner.gpus is not None else float(has_gpus)
    return Resources(config.learner.cpus, _shared(config, gpus))


def _engine_resources(config: Config, has_gpus: bool) -> Resources:
    rollout = config.rollout
    gpus = rollout.gpus if rollout.gpus is not None else float(rollout.tensor_parallel * has_gpus)
    return Resources(rollout.cpus, _shared(config, gpus))


def _shared(config: Config, gpus: float) -> float:
    return gpus / 2 if config.cluster.placement == "colocate" else gpus


def places(config: Config, has_gpus: bool, ranks: int, engines: int) -> list[Resources]:
    """What workers reserve: the learner's ranks, then the engines; where they are colocated, each engine with the rank
    of its number."""
    learner, engine = _learner_resources(config, has_gpus), _engine_resources(config, has_gpus)
    if config.cluster.placement == "split":
        return [learner] * ranks + [engine] * engines
    both = Resources(learner.cpus + engine.cpus, learner.gpus + engine.gpus)
    return [both] * engines + [learner] * (ranks - engines)


def _place_of_engine(config: Config, ranks: int, index: int) -> int:
    return index + (ranks if config.cluster.placement == "split" else 0)


def _start_engine(
    config: Config, task: Task, cluster: Cluster, transport: Transport, place: int, index: int
) -> WorkerHandle:
    if config.rollout.engine == "vllm":
        from hybrid_rl.rollout.vllm_engine import VllmEngine as Engine
    else:
        from hybrid_rl.rollout.transformers_engine import TransformersEngine as Engine
    longest = max(len(p.token_ids) for p in task.train + task.held_out)
    plans = [task.plan] if task.plan is not None else _drafts(task.anatomy, config)
    parameters = {weight.name: weight.parameter for weight in task.anatomy.weights}
    settings = EngineSettings(
        name=f"engine-{index}",
        model_path=_resolved(config.model.path),
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        max_length=longest + config.sampling.max_completion_length,
        adapter_rank=max((m.sent_rank for p in plans for m in p.modules), default=0),
        max_concurrent=config.rollout.max_concurrent,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        seed=config.seed,
        transport=transport,
        adapter=config.sync.adapter,
        lora_modules=tuple(dict.fromkeys(m.name for p in plans for m in p.sent_as("factors"))),
        full_names=tuple(dict.fromkeys(parameters[m.name] for p in plans for m in p.sent_as("weight"))),
        tensor_parallel=config.rollout.tensor_parallel,
        sleeps=config.cluster.placement == "colocate",
    )
    return cluster.start(place, Engine, settings, name=settings.name, takes=_engine_resources(config, cluster.has_gpus))


def _start_learner(config: Config, cluster: Cluster, transport: Transport) -> LearnerGroup:
    from hybrid_rl.learner.worker import LearnerWorker

    # Workers may start in another directory.
    model = config.model.model_copy(update={"path": _resolved(config.model.path)})
    config = config.model_copy(update={"model": model})
    takes = _learner_resources(config, cluster.has_gpus)
    workers = [
        cluster.start(rank, LearnerWorker, config, rank, transport, name=f"learner-{rank}", takes=takes)
        for rank in range(config.learner.world_size)
    ]
    learner = LearnerGroup(workers, timeout=config.learner.timeout)
    found = learner.connect(*cluster.endpoint(workers[0]))
    if found["layout"] not in ("shared", "segments", "positions") and config.learner.packing == "auto":
        logger.warning("sequences are padded, not packed: %s", found["reason"])
    if found["whole_logits"] is not None:
        logger.warning("the logits of whole micro-batches are made, since %s", found["whole_logits"])
    return learner
