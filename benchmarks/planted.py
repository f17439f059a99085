"""Which scores find matrices that are known to need a full-rank repair?

    python benchmarks/planted.py --seeds 12
    python benchmarks/planted.py --seeds 6 --curve

A random transformer is the teacher. The student is the teacher with full-rank noise in a known set of matrices, and
with noise of low rank and the same norm in a set of decoys that LoRA could repair. The task: 4 random tokens in, the
teacher's most likely next token out, reward 1 if right. Every score ranks the student's matrices; shown is the area
under the ROC curve of the planted ones against the decoys and against all others (0.5 is chance).

Designs: `mixed` plants v_proj and o_proj of one layer and a random MLP matrix, decoys alike in another layer; `mlp` and
`vo` plant within one kind of module and count only that, so that a rule by kind says nothing. The run
to rank for is 400 steps of 256 prompts x 16 samples; the probe is the product's default, given as a share of its steps.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import random
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from hybrid_rl.components import Anatomy, read_model
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.scorer import Scorer
from hybrid_rl.plan_building import probe_plan
from hybrid_rl.scoring import Score, ScoreContext, find_score, score_names
from trainers.planted import MLP, PROMPT_LENGTH, VO, damage, draw_sets, last_logits, make_teacher
from trainers.ranking import probe_schedule

VOCABULARY, SAMPLES, CLIP = 32, 16, 0.2
RUN_STEPS, RUN_PROMPTS = 400, 256
GRADIENT_PROMPTS = 1024
LORA_RANK, LORA_LR = 4, 5e-3
"""Of the run to rank for: the rate with which LoRA learns this task best."""
PROBE_SCORES = ("update_tail_split_by_type", "update_tail_split", "update_tail")


@dataclass(frozen=True)
class Case:
    """One planted problem."""

    seed: int
    hidden: int
    layers: int
    noise: str
    """Of the planted matrices: `gaussian`, or `orthogonal`, with all singular values equal."""
    decoy_rank: int
    design: str
    strength: float = 0.8
    """Frobenius norm of the noise, relative to the matrix's."""


@dataclass(frozen=True)
class Group:
    """One prompt and its samples: what the scorer deals out as a sequence."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """One token a sample."""
    rollout_logprobs: tuple[float, ...]
    advantages: tuple[float, ...]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


class Problem:
    """Teacher, student, and the sets planted in it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.teacher = make_teacher(case.seed, VOCABULARY, case.hidden, case.layers)
        self.student = copy.deepcopy(self.teacher)
        self.anatomy: Anatomy = read_model(self.student)
        self.names = [w.name for w in self.anatomy.candidates]
        self.planted, self.decoys, self.pool = _design(case, self.names)
        self.clean = [name for name in self.pool if name not in {*self.planted, *self.decoys}]
        generator = torch.Generator().manual_seed(900 + case.seed)
        damage(self.student, self.planted, case.strength, case.noise, 0, generator)
        damage(self.student, self.decoys, case.strength, "low rank", case.decoy_rank, generator)

    @torch.no_grad()
    def rollouts(self, policy: nn.Module, prompts: int, generator: torch.Generator) -> list[Group]:
        """Samples of the policy on fresh prompts; groups whose rewards are all equal are dropped."""
        ids = torch.randint(VOCABULARY, (prompts, PROMPT_LENGTH), generator=generator)
        gold = last_logits(self.teacher, ids).argmax(-1, keepdim=True)
        logprobs = last_logits(policy, ids).log_softmax(-1)
        actions = torch.multinomial(logprobs.exp(), SAMPLES, replacement=True, generator=generator)
        rewards = (actions == gold).float()
        advantages = rewards - rewards.mean(dim=1, keepdim=True)
        rows = zip(
            ids.tolist(), actions.tolist(), logprobs.gather(1, actions).tolist(), advantages.tolist(), strict=True
        )
        return [Group(tuple(i), tuple(a), tuple(p), tuple(v)) for i, a, p, v in rows if any(v)]

    def auc(self, scores: Mapping[str, float]) -> tuple[float, float]:
        """Planted against decoys, planted against all others of the pool."""
        return _auc(scores, self.planted, self.decoys), _auc(scores, self.planted, self.decoys + self.clean)


def loss(model: nn.Module, groups: Sequence[Any]) -> Tensor:
    """The clipped surrogate, mean over samples; the policy that sampled is the old one."""
    logprobs = last_logits(model, torch.tensor([g.prompt_ids for g in groups])).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor([g.completion_ids for g in groups]))
    ratio = (chosen - torch.tensor([g.rollout_logprobs for g in groups])).exp()
    advantages = torch.tensor([g.advantages for g in groups])
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


def gradient_scores(problem: Problem, score_rank: int) -> dict[str, dict[str, float]]:
    """Every registered score that needs no probe."""
    generator = torch.Generator().manual_seed(70_000 + problem.case.seed)
    halves = [problem.rollouts(problem.student, GRADIENT_PROMPTS // 2, generator) for _ in range(2)]
    found = {}
    for name in score_names():
        score = find_score(name)
        if score.needs == "updates" or name == "manual":
            continue
        scorer, _ = _scorer(problem, score, score_rank)
        if score.needs == "gradients":
            scorer.observe(halves)  # type: ignore[arg-type]
        found[name], _ = scorer.finish()
    return found


def probe_scores(problem: Problem, share: float, score_rank: int, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The scores of the product's probe, as it is configured by default, on `share` of the run's steps."""
    generator = torch.Generator().manual_seed(80_000 + problem.case.seed)
    scorer, config = _scorer(problem, _together(names), score_rank)
    scorer.start_probe(probe_plan(problem.anatomy, config), betas=(0.9, 0.95), max_norm=1.0, seed=problem.case.seed)
    steps, parts = round(share * RUN_STEPS), config.plan.probe.mini_batches
    for step in range(steps):
        groups = problem.rollouts(problem.student, RUN_PROMPTS, generator)
        for part in range(parts):
            lr = config.probe_lr * probe_schedule(step * parts + part, steps * parts)
            scorer.observe([groups[half::2][part::parts] for half in range(2)], lr)  # type: ignore[misc]
    packed, _ = scorer.finish()
    return {name: {m: values[i] for m, values in packed.items()} for i, name in enumerate(names)}  # type: ignore[index]


def full_probe_scores(problem: Problem, share: float, score_rank: int) -> dict[str, float]:
    """The reference: two probes that train every matrix fully with Adam on halves of `share` of the run's prompts."""
    from hybrid_rl.scoring.gradient import shared_tail
    from hybrid_rl.scoring.view import SketchSizes, View

    steps = round(share * RUN_STEPS / 2)
    views: dict[str, list[View]] = defaultdict(list)
    for half in range(2):
        policy = copy.deepcopy(problem.student)
        weights = {name: policy.get_submodule(name).weight for name in problem.names}
        for weight in weights.values():
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        generator = torch.Generator().manual_seed(90_000 + 2 * problem.case.seed + half)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 10)
            optimizer.zero_grad()
            loss(policy, problem.rollouts(policy, RUN_PROMPTS, generator)).backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
        for name, weight in weights.items():
            view = View(name, tuple(weight.shape), SketchSizes.for_rank(score_rank), "cpu")
            view.add(weight.detach() - problem.student.get_submodule(name).weight)
            views[name].append(view)
    return {n: shared_tail((a, b), score_rank) / (a.shape[0] * a.shape[1]) for n, (a, b) in views.items()}


def _scorer(problem: Problem, score: Score, score_rank: int) -> tuple[Scorer, Any]:
    plan = {"score_rank": score_rank, "exclude": ["lm_head"] if "lm_head" in problem.names else []}
    tree = {"model": {"path": "planted"}, "data": {"train": "none", "eval": "none"}, "seed": problem.case.seed}
    config = parse_config({**tree, "plan": plan, "lora": {"rank": LORA_RANK, "lr": LORA_LR}})
    context = ScoreContext(config.plan, LORA_RANK, problem.case.seed)
    scorer = Scorer(
        problem.student,
        problem.anatomy.candidates,
        score,
        context,
        loss=loss,
        tokens_per_micro_batch=10**9,
        layout="padded",
    )
    return scorer, config


def _together(names: Sequence[str]) -> Score:
    """Several scores of one probe at once; each module's score is a tuple."""
    parts = [find_score(name).function for name in names]

    class Several(Score):
        def __call__(self, modules: Any, context: ScoreContext) -> Any:
            columns = zip(*(part(modules, context) for part in parts), strict=True)
            return {m.weight.name: values for m, values in zip(modules, columns, strict=True)}

    return Several("several", "updates", parts[0], ("direction",))


def _design(case: Case, names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Planted, decoys, and the modules that count."""
    if case.design == "mixed":
        return *draw_sets(case.seed, case.layers, names), list(names)
    draw = random.Random(4000 + case.seed)
    draw.sample(range(case.layers), case.layers)  # as for `mixed`, so that a seed stays the case that it was
    pool = [n for n in names if n.rpartition(".")[2] in (MLP if case.design == "mlp" else VO)]
    shuffled, third = draw.sample(pool, len(pool)), len(pool) // 3
    return shuffled[:third], shuffled[third : 2 * third], pool


def _auc(scores: Mapping[str, float], positive: Sequence[str], negative: Sequence[str]) -> float:
    wins = [(scores[p] > scores[n]) + 0.5 * (scores[p] == scores[n]) for p in positive for n in negative]
    return sum(wins) / len(wins)


def _vo_first(names: Sequence[str]) -> dict[str, float]:
    leaves = {name: name.rpartition(".")[2] for name in names}
    return {n: 2.0 if leaf in VO else 1.0 if leaf in MLP else 0.0 for n, leaf in leaves.items()}


def measure(job: tuple[Case, tuple[float, ...], float | None, int]) -> list[dict[str, Any]]:
    """All rows of one case: score, share, AUCs, seconds."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    case, shares, reference, score_rank = job
    problem = Problem(case)
    rows: list[dict[str, Any]] = []

    def add(score: str, values: Mapping[str, float], seconds: float, share: float | None = None) -> None:
        decoys, everything = problem.auc(values)
        rows.append({**vars(case), "score": score, "share": share, "decoys": decoys, "all": everything, "s": seconds})

    def timed(call: Callable[[], Any]) -> tuple[Any, float]:
        started = time.perf_counter()
        return call(), time.perf_counter() - started

    if len(shares) == 1:
        found, seconds = timed(lambda: gradient_scores(problem, score_rank))
        for name, values in found.items():
            add(name, values, seconds / len(found))
        add("rule: v and o first, then MLP", _vo_first(problem.names), 0.0)
    for share in shares:
        found, seconds = timed(lambda s=share: probe_scores(problem, s, score_rank, PROBE_SCORES))
        for name in PROBE_SCORES:
            add(name, found[name], seconds, share)
    if reference:
        values, seconds = timed(lambda: full_probe_scores(problem, reference, score_rank))
        add("two full Adam probes", values, seconds, reference)
    return rows


def cases(first: int, seeds: int, designs: Sequence[str]) -> list[Case]:
    sizes = [(64, 3), (96, 4)]
    result = []
    for seed, (hidden, layers), design in itertools.product(range(first, first + seeds), sizes, designs):
        noise = ("gaussian", "orthogonal")[seed // 3 % 2]  # six seeds see every pair of noise and decoy rank
        result.append(Case(seed, hidden, layers, noise, (1, 2, 4)[seed % 3], design))
    return result


def summary(rows: Sequence[Mapping[str, Any]], title: str, console: Console) -> None:
    table = Table(
        "score", "share of the run", "cases", "planted / decoys", "planted / all", "sd of cases", "s", title=title
    )
    keys = dict.fromkeys((r["score"], r["share"]) for r in rows)
    means = {k: statistics.mean(r["all"] for r in rows if (r["score"], r["share"]) == k) for k in keys}
    for key in sorted(keys, key=lambda k: -means[k]):
        group = [r for r in rows if (r["score"], r["share"]) == key]
        decoys, everything = ([r[c] for r in group] for c in ("decoys", "all"))
        spread = f"{statistics.pstdev(decoys):.2f}, {statistics.pstdev(everything):.2f}"
        share = "-" if key[1] is None else f"{key[1]:.1%}"
        seconds = statistics.median(r["s"] for r in group)
        table.add_row(
            key[0],
            share,
            str(len(group)),
            f"{statistics.mean(decoys):.3f}",
            f"{statistics.mean(everything):.3f}",
            spread,
            f"{seconds:.1f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--first-seed", type=int, default=1000, help="seeds below 100 were used to develop the default")
    parser.add_argument("--designs", default="mixed,mlp,vo")
    parser.add_argument("--share", type=float, default=0.08, help="probe's share of the run's prompts")
    parser.add_argument("--curve", action="store_true", help="several shares instead of every score")
    parser.add_argument("--reference", type=float, help="also two full Adam probes on this share of the run's prompts")
    parser.add_argument("--score-rank", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", help="file for all rows")
    options = parser.parse_args()
    shares = (0.04, 0.08, 0.16) if options.curve else (options.share,)
    jobs = [
        (case, shares, options.reference, options.score_rank)
        for case in cases(options.first_seed, options.seeds, options.designs.split(","))
    ]
    console = Console(width=140)
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for result in track(pool.imap_unordered(measure, jobs), total=len(jobs), console=console):
            rows += result
    for design in options.designs.split(","):
        summary([r for r in rows if r["design"] == design], f"design {design}", console)
    for label, values in (("hidden", (64, 96)), ("noise", ("gaussian", "orthogonal")), ("decoy_rank", (1, 2, 4))):
        for value in values:
            chosen = [r for r in rows if r[label] == value and r["design"] == "mixed" and r["share"] is not None]
            if chosen:
                summary(chosen, f"mixed, {label} {value}", console)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main()
