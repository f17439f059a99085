"""`hybrid-rl eval`: how well a policy does on the held-out problems, without training it.

The policy is the base model, a checkpoint's or an export's. It is loaded here and sent to the rollout engines as the
learner would send it, receipts and all; there is no learner.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hybrid_rl.adaptation import AdaptedModel
from hybrid_rl.components import Anatomy
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.drawings import draw_ranks
from hybrid_rl.evaluate import Evaluated, aurac, evaluate
from hybrid_rl.export import open_export
from hybrid_rl.files import write_atomically
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.redaction import json_lines
from hybrid_rl.rollout import sampling_from
from hybrid_rl.run_directory import record
from hybrid_rl.screen import Bar
from hybrid_rl.stored_policy import check_ranks, find_policy
from hybrid_rl.tables import evaluation_table
from hybrid_rl.weight_sync import open_publisher, served_tensors
from trainers.setup import Task, check_engine, check_input, open_workplace


@dataclass(frozen=True)
class Evaluation:
    """What was found, and of what."""

    scores: Mapping[str, float]
    """Of the policy as it is trained: `accuracy` and the rest, as `evaluate` has them."""
    ranks: Mapping[int, Mapping[str, float]]
    """The same with every Matryoshka layer at one rank alone, by that rank."""
    aurac: Mapping[str, float]
    """Of the accuracies by rank: `linear` in the rank, and by its `log2`; empty without ranks."""
    problems: int
    """Held-out ones, each answered in full by every policy above."""
    verified_engines: int
    """Receipts that were the sent policy's, over all weight updates."""
    source: Mapping[str, Any]
    """`model`, and where the rest of the policy comes from, if there is any: `checkpoint` or `export`, its `format` and
    `rank`, `step`, the model that it was `trained_from`, `plan_hash`."""
    answers: Mapping[str, Any]
    """How answers were sampled and scored."""
    directory: Path | None = None
    """The run or export that the policy comes from."""
    found: Evaluated | None = None
    """Of the policy as it is trained: every answer with its scores."""
    scored: Mapping[int, Mapping[str, Mapping[str, Sequence[float]]]] = field(default_factory=dict)
    """By rank, set and metric: the score of every problem."""

    def tree(self) -> dict[str, Any]:
        """As it is written to JSON."""
        ranks = [{"rank": k, **scores} for k, scores in self.ranks.items()]
        rest = {"ranks": ranks, "aurac": dict(self.aurac), "problems": self.problems}
        rest |= {"verified_engines": self.verified_engines, **self.source, "answers": dict(self.answers)}
        return {**self.scores, **rest}


@dataclass(frozen=True)
class _Policy:
    """What is to be evaluated."""

    config: Config
    """The given one, with the policy's base model and no plan."""
    load: Callable[[], AdaptedModel] | None = None
    """`None`: the base model alone."""
    plan: Callable[[Anatomy], AdaptationPlan] | None = None
    """Of what `load` gives, for the base model's structure."""
    given: str = ""
    """The option that names it."""
    directory: Path | None = None
    """The run or export."""
    source: Mapping[str, Any] = field(default_factory=dict)


def evaluate_policy(
    config: Config,
    console: Console | None = None,
    *,
    checkpoint: Path | None = None,
    export: Path | None = None,
    ranks: Sequence[int] = (),
) -> Evaluation:
    """Evaluate the base model, or the policy in `checkpoint` or `export`, on `data.eval`; with `ranks`, also with every
    Matryoshka layer of it at each of these ranks alone.

    `checkpoint`: a checkpoint's directory, or a run's for its last one. Raises `ConfigError` before any worker starts
    for what cannot be evaluated.
    """
    policy = _find(config, checkpoint, export)
    config = policy.config.judging(*policy.config.data.held_out)
    task = check_input(config)
    plan = _check_plan(policy, task)
    ranks = _checked(ranks, plan)
    adapted = policy.load() if policy.load is not None else None
    found: dict[int | None, dict[str, float]] = {}
    scored: dict[int, Mapping[str, Mapping[str, Sequence[float]]]] = {}
    verified, answers = 0, None
    with Bar(console or Console(quiet=True)) as bar:
        bar.show("starting engines", 0, 1)
        with open_workplace(config, replace(task, plan=plan), learner=False) as workplace:
            publisher = open_publisher(config, workplace.transport)
            for version, k in enumerate((None, *ranks), start=1):
                what = "evaluating" if k is None else f"evaluating rank {k}"
                bar.show(what, version - 1, 1 + len(ranks))
                if adapted is not None:
                    with adapted.at_rank(k):
                        update = publisher.publish(served_tensors(adapted), version, adapted.sent_rank)
                    verified += workplace.bring(update).verified
                evaluated = evaluate(workplace.answers, task.eval, config)
                found[k] = {name.removeprefix("eval/"): value for name, value in evaluated.metrics.items()}
                answers = answers or evaluated
                if k is not None:
                    scored[k] = evaluated.problems
    by_rank = {k: found[k] for k in ranks}
    accuracies = [scores["accuracy"] for scores in by_rank.values()]
    return Evaluation(
        scores=found[None],
        ranks=by_rank,
        aurac={form: aurac(ranks, accuracies, log=form == "log2") for form in (("linear", "log2") if ranks else ())},
        problems=len(task.held_out),
        verified_engines=verified,
        source={"model": config.model.path, **policy.source} | ({"plan_hash": plan.hash} if adapted else {}),
        answers=_answers(config, task),
        directory=policy.directory,
        found=answers,
        scored=scored,
    )


def eval_command(
    config: Config,
    console: Console,
    *,
    checkpoint: Path | None,
    export: Path | None,
    ranks: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Evaluate and print a table; with `ranks`, write `eval_ranks.json` and its curve, to `out` or else beside the
    policy; without, `eval.json` to `out` alone. `out` also gets every answer, in `eval_answers.jsonl`."""
    numbers = _numbers(ranks) if ranks is not None else ()
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be made: {error}") from None
    result = evaluate_policy(config, console, checkpoint=checkpoint, export=export, ranks=numbers)
    directory = out or (result.directory if numbers else None)
    if directory is not None:
        written = directory / ("eval_ranks.json" if numbers else "eval.json")
        write_atomically(written, json.dumps(result.tree(), indent=1) + "\n")
    if out is not None and result.found is not None:
        lines = json_lines(
            {"greedy": greedy, **record(group, i)}
            for greedy, groups in ((True, result.found.greedy), (False, result.found.sampled))
            for group in groups
            for i in range(len(group.completions))
        )
        write_atomically(out / "eval_answers.jsonl", "\n".join(lines) + "\n")
    console.print(evaluation_table(result.scores, result.ranks, result.aurac, result.problems))
    if directory is not None:
        console.print(f"results  {written}")
        if numbers:
            draw_ranks(result.scores, result.ranks, result.aurac, written.with_suffix(".png"))
            console.print(f"curve    {written.with_suffix('.png')}")
    if out is not None:
        console.print(f"answers  {out / 'eval_answers.jsonl'}")
    if as_json:
        print(json.dumps(result.tree()))


def _find(config: Config, checkpoint: Path | None, export: Path | None) -> _Policy:
    """Raises `ConfigError` where there is no policy, or one that could not be sent."""
    if checkpoint is not None and export is not None:
        raise ConfigError(f"--checkpoint {checkpoint} and --export {export} are two policies; give one")
    config = config.model_copy(update={"plan": config.plan.model_copy(update={"path": None, "start": None})})
    policy = _Policy(config)
    if checkpoint is not None:
        policy = _in_checkpoint(config, checkpoint)
    elif export is not None:
        policy = _in_export(config, export)
    if policy.load is not None and config.sync.transport == "nccl":
        raise ConfigError(
            "sync.transport=nccl is between a learner and its engines, and here is no learner; add "
            "sync.transport=object_store"
        )
    return policy


def _in_checkpoint(config: Config, directory: Path) -> _Policy:
    stored = find_policy(directory, f"--checkpoint {directory}")
    source = {"checkpoint": str(stored.checkpoint), "step": stored.state.step, "trained_from": stored.plan.model}
    return _Policy(
        config,
        lambda: _cast(stored.load(config.model), config),
        lambda anatomy: stored.plan,
        stored.given,
        stored.run.path,
        source,
    )


def _in_export(config: Config, directory: Path) -> _Policy:
    exported = open_export(directory, "--export")
    base = exported.manifest.get("base", {})
    source = {"export": str(directory), "format": exported.format, "step": exported.manifest.get("step")}
    source |= {"trained_from": base.get("model"), "rank": exported.manifest.get("rank")}
    components = exported.components or config.plan.components
    config = config.model_copy(update={"plan": config.plan.model_copy(update={"components": components})})
    if exported.format == "merged":
        model = config.model.model_copy(update={"path": str(directory)})
        return _Policy(config.model_copy(update={"model": model}), directory=directory, source=source)
    return _Policy(
        config,
        lambda: _cast(exported.load(config.model, components), config),
        lambda anatomy: exported.trained_plan(anatomy, config.model.path),
        f"--export {directory}",
        directory,
        source,
    )


def _cast(adapted: AdaptedModel, config: Config) -> AdaptedModel:
    """To `model.dtype`, in which a learner has what it sends: scaling folded in sooner would round otherwise."""
    adapted.cast(getattr(torch, config.model.dtype))
    return adapted


def _check_plan(policy: _Policy, task: Task) -> AdaptationPlan:
    """The plan of what engines will be sent; it lists nothing for the base model alone. Raises `ConfigError` if it is
    of another model, or not for these engines."""
    if policy.plan is None:
        return AdaptationPlan(policy.config.model.path, task.anatomy.topology, {}, policy.config.seed, ())
    try:
        plan = policy.plan(task.anatomy)
        plan.check_against(task.anatomy)
    except ConfigError as error:
        raise ConfigError(f"{policy.given}, for model.path={policy.config.model.path!r}: {error}") from None
    check_engine(policy.config, plan)
    return plan


def _checked(ranks: Sequence[int], plan: AdaptationPlan) -> tuple[int, ...]:
    """Sorted. Raises `ConfigError` for ranks that the policy has not."""
    if not ranks:
        return ()
    check_ranks(plan, ranks, f"--ranks {','.join(map(str, ranks))}")
    return tuple(sorted(set(ranks)))


def _numbers(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--ranks {text!r} is no list of ranks; give positive numbers, as in --ranks 1,2,4,8")
    return tuple(int(word) for word in words)


def _answers(config: Config, task: Task) -> dict[str, Any]:
    """What decides the answers besides the policy, and what scores them."""
    sampling = asdict(sampling_from(config, n=config.eval.k, temperature=config.sampling.temperature))
    rollout, data = config.rollout, config.data
    rewards = {spec.name: {"plugin": spec.plugin, "arguments": task.rewards[spec.name]} for spec in config.rewards}
    how: dict[str, Any] = {"rewards": rewards, "right_from": config.eval.right_from, "data": data.eval}
    how |= {"eval_size": data.eval_size, "answer_after": data.answer_after}
    how |= {"template": data.template, "chat": data.chat}
    how["versions"] = {name: importlib.metadata.version(name) for name in ("hybrid-rl", "math-verify", "transformers")}
    how |= {"engine": rollout.engine, "dtype": config.model.dtype, "environment": rollout.environment}
    how |= {"max_turns": rollout.max_turns} if rollout.environment is not None else {}
    return {"greedy": {**sampling, "n": 1, "temperature": 0.0}, "sampled": sampling if config.eval.k else None, **how}
