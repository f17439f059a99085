"""Settings that contradict each other, or would do nothing beside others: refused with both names.

Checks that need the model, the data or the cluster are made by the rooms that own them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_rl.algo import PRESETS, AlgoConfig
from hybrid_rl.reward_settings import EvalConfig
from hybrid_rl.treatments import ROUTED, TREATMENTS, MatryoshkaConfig

if TYPE_CHECKING:
    from hybrid_rl.config import Config


def cross_check(config: Config) -> None:
    """Raises `ValueError` for the first settings that contradict each other, or do nothing beside others."""
    ranks = config.learner.world_size
    if ranks % config.learner.sequence_parallel:
        raise ValueError(
            f"learner.world_size={ranks} is no multiple of learner.sequence_parallel="
            f"{config.learner.sequence_parallel}; make it one"
        )
    ranks //= config.learner.sequence_parallel  # those of a sequence group work on the same completions
    slices = config.batch.mini_batches * ranks
    if config.completions_per_step % slices:
        raise ValueError(
            f"batch.prompts x batch.num_generations = {config.batch.prompts} x {config.batch.num_generations} = "
            f"{config.completions_per_step} completions do not divide among batch.mini_batches x learner.world_size "
            f"= {config.batch.mini_batches} x {ranks} = {slices}; make it a multiple of {slices}"
        )
    if config.cluster.backend == "inline" and config.learner.world_size > 1:
        raise ValueError(
            f"cluster.backend=inline runs everything in one process and cannot hold learner.world_size="
            f"{config.learner.world_size} ranks; set learner.world_size=1 or cluster.backend=ray"
        )
    if config.cluster.backend == "inline" and config.cluster.address is not None:
        raise ValueError(
            f"cluster.backend=inline uses no cluster, but cluster.address={config.cluster.address!r} is given; "
            "drop one of them"
        )
    _check_checkpoints(config)
    _check_rewards(config)
    _check_plan(config)
    _check_algo(config)
    _check_rollout(config)
    if "{prompt}" not in config.data.template:
        raise ValueError(f"data.template={config.data.template!r} does not contain {{prompt}}; add it")
    longest = config.data.max_prompt_length + config.sampling.max_completion_length
    if longest > config.batch.tokens_per_micro_batch * config.learner.sequence_parallel:
        raise ValueError(
            f"batch.tokens_per_micro_batch={config.batch.tokens_per_micro_batch} cannot hold one sequence of "
            f"data.max_prompt_length + sampling.max_completion_length = {longest} tokens; raise it or shorten those"
        )
    if config.learner.sequence_parallel > 1 and config.learner.packing == "never":
        raise ValueError(
            f"learner.sequence_parallel={config.learner.sequence_parallel} cuts packed rows; drop learner.packing=never"
        )


def _check_rewards(config: Config) -> None:
    names = [spec.name for spec in config.rewards]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"rewards: two are called {twice!r}; give each a name of its own, as in name: {twice}_2")
    by_set = config.eval.reward if isinstance(config.eval.reward, dict) else {"": config.eval.reward or names[0]}
    for name in by_set.values():
        if name not in names:
            raise ValueError(f"eval.reward={config.eval.reward!r}: {name!r} is none of the rewards {names}")
    if isinstance(config.eval.reward, dict) and by_set.keys() != config.data.held_out.keys():
        raise ValueError(
            f"eval.reward is for the sets {sorted(by_set)}, and data.eval has {sorted(config.data.held_out)}; give a "
            "reward for each, or the name of one for all"
        )
    if config.rewards[-1].gate is not None:
        raise ValueError(f"rewards: the gate of {names[-1]} does nothing, since no reward comes after it; drop it")
    if not config.eval.k and config.eval.right_from != EvalConfig().right_from:
        raise ValueError(f"eval.right_from={config.eval.right_from:g} does nothing with eval.k=0; drop it")
    if config.algo.reward_aggregation == "normalize_then_sum":
        if config.algo.advantage != AlgoConfig().advantage:
            raise ValueError(
                f"algo.advantage={config.algo.advantage} does nothing with algo.reward_aggregation="
                "normalize_then_sum, which normalises by itself; drop one of them"
            )
        if len(config.rewards) == 1:
            raise ValueError(
                "algo.reward_aggregation=normalize_then_sum is for several rewards, and there is one; drop it"
            )


def _check_checkpoints(config: Config) -> None:
    if config.checkpoint.keep_best and not (config.eval.every and config.checkpoint.every % config.eval.every == 0):
        raise ValueError(
            f"checkpoint.keep_best={config.checkpoint.keep_best} compares checkpoints by what is measured at their "
            f"step, but checkpoint.every={config.checkpoint.every} is no multiple of eval.every={config.eval.every}; "
            "make it one"
        )


def _check_plan(config: Config) -> None:
    """Refuse settings that another one would silently override."""
    default = type(config.plan)()
    changed = {name for name in type(default).model_fields if getattr(config.plan, name) != getattr(default, name)}
    given = config.plan.given
    if config.plan.path is not None and config.plan.start is not None:
        raise ValueError(f"{given} and plan.start={config.plan.start!r} both give a plan; drop one of them")
    if given is not None and config.adaptation != "hybrid":
        raise ValueError(f"adaptation={config.adaptation} makes its own plan, but {given} is given; drop one of them")
    ranking = changed & {"budget", "score", "manual"}
    making = ranking | (changed & {"placement", "include", "exclude", "also_full", "rest"})
    if (config.plan.score == "manual") != bool(config.plan.manual):
        raise ValueError(
            f"plan.score={config.plan.score} with plan.manual={config.plan.manual}; give neither, or both, as in "
            "plan.score=manual 'plan.manual={\"*.q_proj\": 1.0}'"
        )
    if config.batch.prompts < 2 and config.adaptation == "hybrid" and given is None:
        raise ValueError("batch.prompts=1 leaves one of the ranking's two halves empty; use at least 2")
    if given is not None and making:
        raise ValueError(f"{given} gives a finished plan, which plan.{min(making)} cannot change; drop one of them")
    idle = ranking | (changed & {"rest"})
    if config.adaptation == "lora_matched":
        idle -= {"budget"}
        if config.plan.budget != type(config.plan.budget)(ratio=config.plan.budget.ratio) or config.lora.ranks:
            raise ValueError(
                "adaptation=lora_matched has one rank, that of plan.budget.ratio and lora.rank; drop lora.ranks "
                "and the other fields of plan.budget"
            )
    if config.adaptation != "hybrid" and idle:
        raise ValueError(
            f"adaptation={config.adaptation} ranks nothing, so "
            f"plan.{min(idle)}={getattr(config.plan, min(idle))} would do nothing; drop one of them"
        )
    _check_treatments(config)
    if config.learner.offload == "all" and config.learner.zero_stage < 3:
        raise ValueError(
            f"learner.offload=all needs the weights in shares, but learner.zero_stage={config.learner.zero_stage}; "
            "use learner.zero_stage=3, or learner.offload=optimizer"
        )


def _check_treatments(config: Config) -> None:
    """Refuse settings of treatments that are not used, or that a finished plan has settled."""
    given, beside = config.plan.given, f" and plan.rest={config.plan.rest}" if config.adaptation == "hybrid" else ""
    settled = {
        "molf": {"ranks", "rank_stabilised", "unwrapped"},
        "matryoshka": set(MatryoshkaConfig.model_fields),
        "adalora": {"init_rank"},
    }
    for section, fields in settled.items():
        settings = getattr(config, section)
        default = type(settings)()
        changed = {name for name in type(settings).model_fields if getattr(settings, name) != getattr(default, name)}
        if given is not None:
            if changed & fields:
                name = min(changed & fields)
                raise ValueError(f"{given} gives a finished plan, which {section}.{name} cannot change; drop one")
            continue
        used = config.rest in ROUTED if section == "molf" else config.rest == section
        idle = changed & ({"unwrapped"} if config.adaptation not in ROUTED else set()) if used else changed
        if idle:
            raise ValueError(f"{section}.{min(idle)} does nothing with adaptation={config.adaptation}{beside}; drop it")
    treatment = TREATMENTS[config.rest]
    if given is None and treatment.adapter and not treatment.scaled and config.lora.alpha is not None:
        raise ValueError(f"lora.alpha={config.lora.alpha:g} does nothing: {config.rest} has no alpha; drop it")
    own = {"matryoshka": config.matryoshka.ranks, **dict.fromkeys(ROUTED, config.molf.ranks)}.get(config.rest)
    if given is None and own is not None and config.lora.ranks:
        section = "matryoshka" if config.rest == "matryoshka" else "molf"
        raise ValueError(f"{section}.ranks={own} is for every module, so that lora.ranks does nothing; drop one")
    if given is None and config.rest in ROUTED:
        pairs = len(config.molf.ranks or ([1, 4] if config.rest == "molf_efficient" else [1]))
        check_experts(config, {pairs + TREATMENTS[config.rest].trains_weight})
    if given is None and config.rest == "adalora":
        if config.adalora.init_rank is not None and config.adalora.init_rank <= config.lora.rank:
            raise ValueError(
                f"adalora.init_rank={config.adalora.init_rank} leaves nothing to take away down to lora.rank="
                f"{config.lora.rank}; raise one or lower the other"
            )
        config.adalora.phases(config.updates)


def check_experts(config: Config, numbers: set[int]) -> None:
    """Refuse settings of MoLF that do not fit modules with so many experts each. Raises `ValueError`."""
    if config.learner.optimizer == "deepspeed":
        raise ValueError("learner.optimizer=deepspeed steps every expert of MoLF; use learner.optimizer=torch")
    if config.molf.top_k > max(numbers):
        raise ValueError(f"molf.top_k={config.molf.top_k} of {max(numbers)} experts a module; use at most that")
    if config.molf.lr_factors and numbers != {len(config.molf.lr_factors)}:
        raise ValueError(
            f"molf.lr_factors={config.molf.lr_factors} is for {len(config.molf.lr_factors)} experts a module, of which "
            f"there are {' and '.join(map(str, sorted(numbers)))}; give one factor each, or none"
        )


def _check_algo(config: Config) -> None:
    """Refuse settings that do nothing."""
    preset = AlgoConfig(**PRESETS[config.algorithm])
    for name, other in config.algo.idle().items():
        value = getattr(config.algo, name)
        if value != getattr(preset, name):
            beside = getattr(config.algo, other)
            raise ValueError(f"algo.{name}={value} does nothing with algo.{other}={beside}; change one of them")
    limit = config.sampling.max_completion_length
    if config.algo.overlong_buffer and round(config.algo.overlong_buffer * limit) == 0:
        raise ValueError(
            f"algo.overlong_buffer={config.algo.overlong_buffer} of sampling.max_completion_length={limit} is less "
            "than a token; raise it"
        )
    if config.model.attention == "flash_attention_2" and config.model.dtype == "float32":
        raise ValueError(
            "model.attention=flash_attention_2 knows no model.dtype=float32; use bfloat16, or model.attention=sdpa"
        )


def _check_rollout(config: Config) -> None:
    """Refuse placements and ways of sync that cannot be."""
    if (config.sync.transport == "directory") != (config.sync.directory is not None):
        need = "needs sync.directory, one that learner and engines see"
        if config.sync.directory is not None:
            need = f"does not use sync.directory={config.sync.directory!r}; drop one of them"
        raise ValueError(f"sync.transport={config.sync.transport} {need}")
    if config.cluster.placement == "colocate":
        why = None
        if config.rollout.engines != config.learner.world_size:
            why = f"each of rollout.engines={config.rollout.engines} shares a GPU with one of learner.world_size="
            why += f"{config.learner.world_size} ranks; make them equal"
        elif config.rollout.tensor_parallel > 1:
            why = f"rollout.tensor_parallel={config.rollout.tensor_parallel} needs GPUs of its own; use 1"
        elif config.asynchrony.max_staleness:
            why = f"async.max_staleness={config.asynchrony.max_staleness} needs engines that work while the learner "
            why += "does; use 0"
        if why is not None:
            raise ValueError(f"cluster.placement=colocate: {why}, or cluster.placement=split")
    if config.rollout.engine == "transformers" and config.rollout.tensor_parallel > 1:
        raise ValueError(
            f"rollout.tensor_parallel={config.rollout.tensor_parallel} is not for rollout.engine=transformers; use 1"
        )
    if config.asynchrony.in_flight != "keep" and not config.asynchrony.max_staleness:
        raise ValueError(
            f"async.in_flight={config.asynchrony.in_flight} does nothing with async.max_staleness=0: no completion "
            "is under way when weights change; drop it"
        )
    if config.asynchrony.max_staleness and config.cluster.backend == "inline":
        raise ValueError(
            f"async.max_staleness={config.asynchrony.max_staleness} has generation beside training, but "
            "cluster.backend=inline does one thing at a time; drop one of them"
        )
    if config.rollout.environment is None and config.rollout.max_turns != type(config.rollout)().max_turns:
        raise ValueError(f"rollout.max_turns={config.rollout.max_turns} does nothing without rollout.environment")
