"""A plan inside TRL's trainer, against TRL's own trainer, against our learner, and against what is sent and saved.

vLLM is a stand-in (`Engine`) that holds a plain transformers model and generates with what it was sent: TRL's vLLM mode
needs a GPU. TRL's side of it, `VLLMGeneration.sync_weights`, is TRL's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.trainer_callback import TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from hybrid_rl.adaptation import Start
from hybrid_rl.adaptation.delta import write_delta
from hybrid_rl.algo import AlgoConfig
from hybrid_rl.algorithms import find_loss, policy_objective
from hybrid_rl.components import read_model
from hybrid_rl.config import ConfigError, LoraConfig, PlanConfig
from hybrid_rl.config_file import parse_config
from hybrid_rl.data.arithmetic import problems
from hybrid_rl.learner.assemble import weigh
from hybrid_rl.learner.batching import collate
from hybrid_rl.learner.logprobs import PolicyModel
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import build_plan
from hybrid_rl.treatments import AdaloraConfig, MatryoshkaConfig, MolfConfig
from hybrid_rl.types import TrainSequence
from tests.learner.processes import on_ranks
from trainers.trl_grpo import HybridGRPOTrainer, load_policy, main
from trainers.warm_start import build_tokenizer

FAST: dict[str, Any] = {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "bf16": False}
Trained = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen3 whose head is not its embedding."""
    path = tmp_path_factory.mktemp("models") / "untied"
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(shape).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def plan_of(path: Path, ratio: float = 0.3, rest: str = "lora", also_full: tuple[str, ...] = ()) -> AdaptationPlan:
    """The `v_proj` and `up_proj` that fit `ratio` full, `rest` for the others."""
    anatomy = read_model(AutoModelForCausalLM.from_pretrained(path))
    scores = {c.name: float(("v_proj" in c.name) + ("up_proj" in c.name)) for c in anatomy.candidates}
    return build_plan(
        anatomy,
        scores if 0 < ratio < 1 else {},
        model=str(path),
        method={},
        seed=0,
        ratio=ratio,
        settings=PlanConfig(also_full=list(also_full)),
        lora=LoraConfig(rank=4, alpha=8),
        rest=rest,
        molf=MolfConfig(),
        matryoshka=MatryoshkaConfig(ranks=[2, 4]),
        adalora=AdaloraConfig(),
    )


def letters(completions: list[str], **_: Any) -> list[float]:
    """Of a random policy's samples, something to tell them apart by."""
    return [len(set(c)) / 8 + 0.01 * sum(map(ord, c)) % 1 for c in completions]


def arguments(base: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "loss_type": "grpo",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "model_init_kwargs": {"attn_implementation": "eager"},
    } | FAST
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in islice(problems("train"), 32)]
    return {
        "model": str(base),
        "reward_funcs": letters,
        "args": GRPOConfig(**(settings | changes)),
        "train_dataset": Dataset.from_list(rows),
    }


def hybrid(base: Path, out: Path, plan: Any = None, given: Mapping[str, Any] = {}, **changes: Any) -> HybridGRPOTrainer:
    return HybridGRPOTrainer(plan=plan or plan_of(base), **arguments(base, out, **changes), **given)


def trained(trainer: HybridGRPOTrainer) -> Trained:
    return {name: p.detach().clone() for name, p in trainer.adapted.trained.items()}


def numbers(trainer: GRPOTrainer, *names: str) -> list[list[float]]:
    """What was logged at each step."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [[row[name] for name in names] for row in rows]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 34).view(2, 16)).logits


# --- as TRL trains ---


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_a_plan_of_all_weights_trains_as_trl_does(base: Path, tmp_path: Path, beta: float):
    theirs = GRPOTrainer(**arguments(base, tmp_path, beta=beta, weight_decay=0.1))
    theirs.train()  # before the other is made, which seeds anew
    everything = plan_of(base, ratio=1.0, also_full=("*embed*", "lm_head", "*norm*"))
    ours = hybrid(base, tmp_path, everything, beta=beta, weight_decay=0.1)
    assert ours.adapted.trained.keys() == dict(theirs.model.named_parameters()).keys()  # type: ignore[union-attr]
    ours.train()
    names = ("loss", "reward", "grad_norm", "entropy", *(["kl"] if beta else []))
    torch.testing.assert_close(numbers(ours, *names), numbers(theirs, *names), atol=1e-6, rtol=1e-6)
    for name, parameter in theirs.model.named_parameters():  # type: ignore[union-attr]
        torch.testing.assert_close(ours.adapted.trained[name], parameter, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_a_plan_of_adapters_trains_as_trl_with_peft_does(base: Path, tmp_path: Path, beta: float):
    plan = plan_of(base, ratio=0.0)
    targets = [m.name for m in plan.adapted]
    config = PeftLoraConfig(r=4, lora_alpha=8, target_modules=targets)
    theirs = GRPOTrainer(**arguments(base, tmp_path, beta=beta), peft_config=config)
    start = {name: p.detach().clone() for name, p in theirs.model.named_parameters()}  # type: ignore[union-attr]
    theirs.train()  # before the other is made, which seeds anew
    ours = hybrid(base, tmp_path, plan, {"lora_lr": FAST["learning_rate"]}, beta=beta)
    pairs = list(_pairs(ours, dict(theirs.model.named_parameters())))  # type: ignore[union-attr]
    with torch.no_grad():
        for own, value in _pairs(ours, start):
            own.copy_(value)
    ours.train()
    names = ("loss", "reward", "grad_norm", "entropy", *(["kl"] if beta else []))
    torch.testing.assert_close(numbers(ours, *names), numbers(theirs, *names), atol=1e-6, rtol=1e-6)
    for own, other in pairs:
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-6)


def _pairs(ours: HybridGRPOTrainer, held: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Our adapters' parameters and a `PeftModel`'s."""
    for module, adapter in ours.adapted.adapters.items():
        for name, parameter in adapter.parameters.items():
            yield parameter, held[f"base_model.model.{module}.{name}"]


# --- as our learner trains ---


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("grpo", "sequence_mean_token_mean"), ("bnpo", "token_mean"), ("dr_grpo", "constant_length")],
)
def test_loss_and_gradients_are_those_of_our_learner(
    base: Path, tmp_path: Path, loss_type: str, aggregation: str, monkeypatch: pytest.MonkeyPatch
):
    """On the same completions, advantages, old and reference log-probabilities, after an update."""
    same = {"beta": 0.3, "use_bias_correction_kl": False, "temperature": 0.7, "max_steps": 1, "loss_type": loss_type}
    trainer = hybrid(base, tmp_path, **same, learning_rate=1e-3)
    batches = _seen(trainer, monkeypatch)
    trainer.train()
    [inputs] = batches
    width = inputs["completion_mask"].shape[1]
    # Completions of different lengths, by which the losses differ.
    inputs["completion_mask"] *= torch.tensor([[t <= i % width for t in range(width)] for i in range(8)])
    mask, reference = inputs["completion_mask"].bool(), inputs["ref_per_token_logps"]
    inputs["old_per_token_logps"] = old = reference + 0.2 * torch.randn_like(reference)
    loss = trainer._compute_loss(trainer._policy, inputs)
    loss.backward()

    trainer.save_model(str(tmp_path / "saved"))
    again = load_policy(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), tmp_path / "saved")
    algo = AlgoConfig(kl_coef=0.3, clip_high=0.2, aggregation=aggregation)  # type: ignore[arg-type]
    sequences = [TrainSequence(p, c, tuple(0.0 for _ in c), advantage) for p, c, advantage in _sequences(inputs)]
    batch = collate(weigh(sequences, aggregation, trainer.max_completion_length), "padded")
    policy = PolicyModel(again.model, temperature=0.7, chunk_mib=1)
    logprobs_T, _ = policy(batch.inputs.input_ids, batch.at_T, batch.targets_T, **batch.inputs.kwargs)
    tokens = batch.tokens(logprobs_T, old[mask], reference_logprobs_T=reference[mask])
    found = policy_objective(tokens, algo, find_loss(algo.loss)).loss
    found.backward()
    torch.testing.assert_close(loss, found, atol=1e-6, rtol=1e-5)
    assert float(loss.detach().abs()) > 1e-3
    for name, parameter in again.trained.items():
        torch.testing.assert_close(trainer.adapted.trained[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


def _seen(trainer: HybridGRPOTrainer, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Gets the batches of which the loss is taken."""
    batches: list[dict[str, Tensor]] = []
    compute = trainer._compute_loss

    def seeing(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        batches.append(inputs)
        return compute(model, inputs)

    monkeypatch.setattr(trainer, "_compute_loss", seeing)
    return batches


class _Watch(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.after: list[Trained] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.after.append(trained(self.trainer))


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["lora", "matryoshka"])
def test_updates_are_those_of_our_learner(base: Path, tmp_path: Path, rest: str, monkeypatch: pytest.MonkeyPatch):
    """Three steps on the same completions: losses, norms of each part, and weights, which both clips and both rates
    act on."""
    clips = {"full": 0.02, "lora": 0.05}
    plan = plan_of(base, rest=rest)
    watch = _Watch()
    out = arguments(
        base,
        tmp_path,
        beta=0.3,
        use_bias_correction_kl=False,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=clips["full"],
        adam_beta2=0.95,
    )
    trainer = HybridGRPOTrainer(
        plan=plan, lora_lr=5e-3, lora_max_grad_norm=clips["lora"], lora_weight_decay=0.1, callbacks=[watch], **out
    )
    watch.trainer, start = trainer, trained(trainer)
    batches = _seen(trainer, monkeypatch)
    trainer.train()

    tree = {
        "model": {"path": str(base), "attention": "eager"},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "max_prompt_length": 16},
        "sampling": {"max_completion_length": 6},
        "batch": {"prompts": 2, "num_generations": 4},
        "algo": {"kl_coef": 0.3, "clip_high": 0.2},
        "full": {"lr": 1e-3, "max_grad_norm": clips["full"]},
        "lora": {"lr": 5e-3, "max_grad_norm": clips["lora"], "weight_decay": 0.1},
        "learner": {"world_size": 1},
    }
    sequences = [list(_sequences(batch)) for batch in batches]
    full, beside = trainer.adapted.full.keys(), start.keys() - trainer.adapted.full.keys()
    (tmp_path / "start").mkdir()
    write_delta(((n, start[n], start[n]) for n in full), ((n, start[n]) for n in beside), tmp_path / "start")
    measured, weights = on_ranks(1, _learn, tree, plan.to_json(), str(tmp_path / "start"), sequences)
    names = ("loss", "kl", "grad_norm/full", "grad_norm/lora")
    found = [[m[n] for n in ("policy/loss", "policy/kl", *names[2:])] for m in measured]
    for ours, row in zip(found, numbers(trainer, *names), strict=True):
        assert ours[:2] == pytest.approx(row[:2], abs=2e-6)
        assert ours[2:] == pytest.approx(row[2:], rel=1e-3)
        assert ours[2] > clips["full"]
        assert ours[3] > clips["lora"]
    for ours, own in zip(weights, watch.after, strict=True):
        for part in (full, beside):
            moved = math.sqrt(sum(float((own[n] - start[n]).square().sum()) for n in part))
            apart = math.sqrt(sum(float((own[n] - ours[n]).square().sum()) for n in part))
            assert apart < 2e-3 * moved


def _sequences(batch: Mapping[str, Tensor]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float]]:
    for i, advantage in enumerate(batch["advantages"].tolist()):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
        yield tuple(prompt), tuple(completion), advantage


def _learn(rank: int, port: int, tree: dict, plan: str, start: str, batches: list[list[Any]]) -> Any:
    """Our learner's metrics and weights after every batch."""
    from hybrid_rl.cluster.inline import Memory
    from hybrid_rl.learner.assemble import mini_batches
    from hybrid_rl.learner.worker import LearnerWorker

    config = parse_config(tree)
    worker = LearnerWorker(config, rank, Memory())
    worker.connect("127.0.0.1", port)
    worker.build(plan, Start(start, "delta"))
    own = worker._adapted.trained
    metrics, weights = [], []
    for step, batch in enumerate(batches, start=1):
        sequences = [TrainSequence(p, c, tuple(0.0 for _ in c), advantage) for p, c, advantage in batch]
        stats = worker.train(mini_batches(sequences, config, {"full": 1.0, "lora": 1.0}, step))
        metrics.append(stats.metrics)
        weights.append({name: p.detach().clone() for name, p in own.items()})
    return metrics, weights


# --- groups and clips ---


def test_each_part_has_its_rate_decay_and_clip(base: Path, tmp_path: Path):
    plan = plan_of(base, also_full=("*.input_layernorm",))
    given = {"lora_weight_decay": 0.3, "lora_max_grad_norm": 1e9}
    trainer = hybrid(base, tmp_path, plan, given, weight_decay=0.2, max_grad_norm=1e-3, max_steps=1)
    groups = trainer.create_optimizer().param_groups
    assert [(g["part"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("full", 1e-2, 0.2),
        ("full", 1e-2, 0.0),  # norms do not decay, by the Trainer's rule
        ("lora", 1e-1, 0.3),
    ]
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer._policy.parameters() if p.requires_grad)
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    norm = lambda ps: math.sqrt(sum(float(p.grad.square().sum()) for p in ps))  # noqa: E731

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            after.update({part: norm(ps) for part, ps in trainer.parts.items()})

    clip = trainer._clip_grad_norm
    trainer._clip_grad_norm = lambda model: (  # type: ignore[method-assign]
        before.update({part: norm(ps) for part, ps in trainer.parts.items()}),
        clip(model),
    )[1]
    trainer.add_callback(Norms())
    trainer.train()
    assert after["full"] == pytest.approx(1e-3, rel=1e-2)
    assert before["full"] > 2e-3
    assert after["lora"] == before["lora"] > 1e-3, "the full weights' norm does not clip the adapters"
    logged = trainer.state.log_history[0]
    assert logged["grad_norm"] == pytest.approx(math.hypot(before["full"], before["lora"]))
    assert logged["grad_norm/lora"] == pytest.approx(before["lora"])
    assert (logged["learning_rate"], logged["learning_rate/lora"]) == pytest.approx((1e-2, 1e-1))


def test_reentrant_checkpoints_have_gradients(base: Path, tmp_path: Path):
    trainer = hybrid(base, tmp_path, max_steps=2, gradient_checkpointing_kwargs={"use_reentrant": True})
    start = trained(trainer)
    trainer.train()
    assert all(not torch.equal(value, start[name]) for name, value in trained(trainer).items())


HALF_TREATMENTS = ("lora", "rslora", "dora", "pissa", "milora", "olora", "vera", "randlora", "ia3", "matryoshka")


@pytest.mark.parametrize("rest", ["lora", *(pytest.param(t, marks=pytest.mark.slow) for t in HALF_TREATMENTS[1:])])
def test_a_bfloat16_model_is_trained_in_fp32(base: Path, tmp_path: Path, rest: str):
    """At a rate whose steps bfloat16 would round away."""
    options = {"model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 1e-6, "max_steps": 2, "beta": 0.1}
    with pytest.raises(ConfigError, match="rounded away"):
        hybrid(base, tmp_path, plan_of(base, rest=rest), **options)
    trainer = hybrid(base, tmp_path, plan_of(base, rest=rest), bf16=True, **options)
    start = trained(trainer)
    trainer.train()
    # Where an adapter starts as something and its opposite, bfloat16 rounds them on the way.
    assert abs(numbers(trainer, "kl")[0][0]) <= (0 if rest == "lora" else 1e-3)
    for name, value in trained(trainer).items():
        assert value.dtype == torch.float32
        changed = (value != start[name]).float().mean()
        assert changed > 0.5 or name.endswith("lora_A.default.weight") or "matryoshka" in rest, name
    assert {p.dtype for p in trainer._base_names.values() if not p.requires_grad} == {torch.bfloat16}
    assert {value.dtype for _, value in trainer.named_weights()} == {torch.bfloat16}


# --- the reference policy ---


def test_the_reference_is_the_base_policy(base: Path, tmp_path: Path):
    trainer = hybrid(base, tmp_path, beta=0.1)
    start = logits(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"))
    trainer.train()
    kl = [row[0] for row in numbers(trainer, "kl")]
    assert kl[0] == 0, "before the first step the policy is the reference"
    assert min(kl[1:]) > 1e-4
    weights = trained(trainer)
    moved = logits(trainer._policy)
    assert trainer.ref_model is not None
    assert torch.equal(logits(trainer.ref_model), start)
    assert torch.equal(logits(trainer._policy), moved), "the reference leaves no trace"
    assert not torch.allclose(moved, start, atol=1e-2)
    assert all(torch.equal(value, weights[name]) for name, value in trained(trainer).items())


def test_the_reference_leaves_no_trace_when_it_fails(base: Path, tmp_path: Path):
    trainer = hybrid(base, tmp_path, beta=0.1, max_steps=1)
    trainer.train()
    moved = logits(trainer._policy)
    with pytest.raises(ValueError, match="input_ids"):
        trainer.ref_model(no_such_input=1)  # type: ignore[misc]
    assert torch.equal(logits(trainer._policy), moved)


# --- what vLLM is sent ---


class Engine(VLLMGeneration):
    """In place of a vLLM server: takes weights by name as vLLM does, and generates with what it holds."""

    def _init_vllm(self) -> None:
        self.vllm_client = self
        self.held = AutoModelForCausalLM.from_pretrained(self.model.name_or_path, attn_implementation="eager")
        for parameter in self.held.parameters():
            parameter.data.fill_(math.nan)
        self.syncs: list[dict[str, Tensor]] = []
        self.resets = 0

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: list[Any], weights: Iterator[tuple[str, Tensor]]) -> None:
        sent = [(name, value.clone()) for name, value in weights]
        assert [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in sent] == metadata
        assert len(dict(sent)) == len(sent)
        missing, unknown = self.held.load_state_dict(dict(sent), strict=False)
        assert not unknown
        assert set(missing) <= set(self.held._tied_weights_keys or ())
        self.syncs.append(dict(sent))

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts: list[list[int]], *_: Any, **__: Any) -> tuple:  # type: ignore[override]
        completions, scores = [], []
        for ids in prompts:
            start = torch.tensor([ids])
            out = self.held.generate(start, do_sample=True, max_new_tokens=self.max_completion_length, pad_token_id=0)
            chosen = out[0, len(ids) :]
            with torch.no_grad():
                after = self.held(out).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            completions.append(chosen.tolist())
            scores.append([[float(x)] for x in after.gather(1, chosen[:, None])[:, 0]])
        return prompts, completions, scores, [[[t] for t in c] for c in completions]


ENGINE_TREATMENTS = ("lora", "pissa", "dora", "randlora", "matryoshka")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rest", ["lora", *(pytest.param(t, marks=pytest.mark.slow) for t in ENGINE_TREATMENTS[1:])])
def test_engines_are_sent_the_merged_policy(
    base: Path, tiny_model: Path, tmp_path: Path, tied: bool, rest: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    path = tiny_model if tied else base
    trainer = hybrid(path, tmp_path, plan_of(path, rest=rest), use_vllm=True, vllm_mode="server")
    trainer.train()
    engine: Any = trainer.vllm_generation
    assert len(engine.syncs) == engine.resets == 3
    # TRL's own measure of how far the engine's policy is from the trained one, while both move.
    for difference, ratio in numbers(
        trainer, "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/mean"
    ):
        assert difference < 1e-4
        assert ratio == pytest.approx(1, abs=1e-4)
    engine.sync_weights()
    sent, first = engine.syncs[-1], engine.syncs[0]
    plain = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    assert sent.keys() == plain.keys()
    for name, value in sent.items():
        module = name.removesuffix(".weight")
        if name in trainer.adapted.full:
            assert torch.equal(value, trainer.adapted.full[name])
            assert not torch.equal(value, plain[name])
        elif module in trainer.adapted.adapters:
            assert not torch.equal(value, plain[name])
            if rest == "lora":
                held = trainer.adapted.trained
                a, b = (held[f"{module}.lora_{x}.default.weight"] for x in "AB")
                torch.testing.assert_close(value, plain[name] + 2 * b @ a, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(value, plain[name])
    if rest == "lora":
        assert all(torch.equal(value, plain[name]) for name, value in first.items()), "adapters start at nothing"
    torch.testing.assert_close(logits(engine.held), logits(trainer._policy), atol=1e-4, rtol=1e-4)


def test_rollouts_are_sampled_from_the_live_policy(base: Path, tmp_path: Path):
    """TRL's transformers generation: greedy, with full weights and adapters moved, is the merged plain model's."""
    trainer = hybrid(base, tmp_path, generation_kwargs={"do_sample": False})
    trainer.train()
    with torch.no_grad():  # so far that a random model's greedy tokens are others
        for parameter in trainer.adapted.trained.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    prompts = [[11, 12, 13], [14, 15, 16], [27, 30, 31]]
    found, _ = trainer._generate_single_turn(prompts, None, {}, 4)
    trainer.save_merged(tmp_path / "merged")
    for path, same in ((tmp_path / "merged", True), (base, False)):
        model = AutoModelForCausalLM.from_pretrained(path)
        out = [
            model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6)[0, 3:].tolist() for ids in prompts
        ]
        assert (out == found) is same


# --- what is saved ---


@pytest.mark.parametrize("rest", ["lora", *(pytest.param(t, marks=pytest.mark.slow) for t in HALF_TREATMENTS[1:])])
def test_what_is_saved_is_what_was_trained(base: Path, tmp_path: Path, rest: str):
    plan = plan_of(base, rest=rest, also_full=("lm_head", "model.norm"))
    trainer = hybrid(base, tmp_path, plan, max_steps=2)
    trainer.train()
    wanted = logits(trainer._policy)
    assert not torch.allclose(wanted, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)

    trainer.save_model(str(tmp_path / "saved"))
    again = load_policy(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), tmp_path / "saved")
    assert all(torch.equal(again.trained[name], value) for name, value in trained(trainer).items())
    torch.testing.assert_close(logits(again.model), wanted, atol=1e-6, rtol=1e-6)

    trainer.save_merged(tmp_path / "merged")
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(plain), wanted, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("12+34=").input_ids
    torch.testing.assert_close(logits(trainer._policy), wanted, atol=0, rtol=0)


def test_a_tied_head_stays_tied_in_what_is_saved(tiny_model: Path, tmp_path: Path):
    trainer = hybrid(tiny_model, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_merged(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(logits(plain), logits(trainer._policy), atol=1e-4, rtol=1e-4)


def test_training_resumes_where_it_stopped(base: Path, tmp_path: Path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "beta": 0.1, "warmup_steps": 1}
    whole = hybrid(base, tmp_path / "whole", **options)
    whole.train()
    again = hybrid(base, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    names = ("loss", "kl", "grad_norm", "learning_rate/full", "learning_rate/lora")
    torch.testing.assert_close(numbers(again, *names)[-2:], numbers(whole, *names)[-2:], atol=1e-6, rtol=1e-6)
    for name, value in trained(whole).items():
        torch.testing.assert_close(again.adapted.trained[name], value, atol=1e-6, rtol=1e-6)
    other = hybrid(base, tmp_path / "other", plan_of(base, ratio=0.1), **options)
    with pytest.raises(ConfigError, match=r"trained by another plan; give plan=.*plan\.json"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_the_best_checkpoint_is_loaded_at_the_end(base: Path, tmp_path: Path):
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    options = arguments(
        base,
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_num_tokens",
        greater_is_better=False,
        **each,
    )
    watch = _Watch()
    trainer = HybridGRPOTrainer(
        plan=plan_of(base),
        eval_dataset=options["train_dataset"].select(range(2)),
        callbacks=[watch],
        **options,
    )
    watch.trainer = trainer
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-1")
    assert all(torch.equal(value, watch.after[0][name]) for name, value in trained(trainer).items())


# --- what is refused ---


@pytest.mark.parametrize("rest", ["molf", "molf_efficient", "adalora"])
def test_treatments_with_an_optimizer_of_their_own_are_refused(base: Path, tmp_path: Path, rest: str):
    with pytest.raises(ConfigError, match=f"as {rest}, .*`hybrid-rl train`, or rank with plan.rest=lora"):
        hybrid(base, tmp_path, plan_of(base, rest=rest))


def test_matryoshka_losses_at_other_ranks_are_refused(base: Path, tmp_path: Path):
    plan = plan_of(base, rest="matryoshka")
    modules = [replace(m, options={**m.options, "loss": "sampled"}) if m.has_adapter else m for m in plan.modules]
    with pytest.raises(ConfigError, match=r"loss=sampled is of other ranks .* matryoshka\.loss=sum"):
        hybrid(base, tmp_path, replace(plan, modules=tuple(modules)))


def test_an_adapter_that_trl_would_pass_by_is_refused(base: Path, tmp_path: Path):
    head = next(m for m in plan_of(base, also_full=("lm_head",)).modules if m.name == "lm_head")
    plan = plan_of(base)
    adapted = replace(head, treatment="lora", rank=4, alpha=8.0)
    with pytest.raises(ConfigError, match="output head, which TRL multiplies by itself"):
        hybrid(base, tmp_path, replace(plan, modules=(*plan.modules, adapted)))


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"peft_config": PeftLoraConfig()}, "peft_config is given beside plan"),
        ({}, {"quantization_config": object()}, "load the model unquantised"),
        ({}, {"optimizers": (object(), None)}, "would not have the adapters"),
        ({"sync_ref_model": True, "beta": 0.1}, {}, "sync_ref_model=True cannot be had"),
        ({"bf16_full_eval": True}, {}, "rounds the trained weights"),
        ({"use_transformers_continuous_batching": True, "bf16": True}, {}, "rounds the trained weights"),
        ({"max_grad_norm": 0.0}, {"lora_max_grad_norm": 1.0}, "set max_grad_norm=inf"),
    ],
)
def test_arguments_that_a_plan_leaves_no_room_for(base: Path, tmp_path: Path, changes: Any, given: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        hybrid(base, tmp_path, given=given, **changes)


def test_models_and_plans_that_do_not_fit_are_refused(
    base: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match="made for another model"):
        hybrid(base, tmp_path, plan_of(tiny_model))
    with pytest.raises(ConfigError, match=r"plan='.*none\.json' does not exist"):
        hybrid(base, tmp_path, tmp_path / "none.json")
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), PeftLoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="merge_and_unload"):
        HybridGRPOTrainer(plan=plan_of(base), **arguments(base, tmp_path) | {"model": wrapped})
    trainer = hybrid(base, tmp_path)
    # What GaLore and LOMO do, which are not installed.
    monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.AdamW, {"params": []}))
    with pytest.raises(ConfigError, match="groups the parameters its own way"):
        trainer.train()


# --- the script ---


def _files(base: Path, place: Path, **settings: Any) -> Path:
    plan_of(base).save(place / "plan.json")
    (place / "data").mkdir()
    rows = [json.dumps({"prompt": row["prompt"]}) for row in islice(problems("train"), 16)]
    (place / "data" / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    tree = {
        "plan": str(place / "plan.json"),
        "model_name_or_path": str(base),
        "dataset_name": str(place / "data"),
        "reward_funcs": ["think_format_reward"],
        "output_dir": str(place / "out"),
        "dtype": "float32",
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    (place / "trl.yaml").write_text(yaml.safe_dump(tree | settings), encoding="utf-8")
    return place / "trl.yaml"


def test_the_script_takes_trls_arguments_and_a_plan(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "letters.py").write_text(
        "def letters(completions, **_):\n    return [len(set(c)) / 8 for c in completions]\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = _files(base, tmp_path, reward_funcs=["letters.letters"], learning_rate=1e-2)
    main(["--config", str(config), "--lora_lr", "0.02", "--merged_dir", str(tmp_path / "merged"), "--max_steps", "3"])
    policy = load_policy(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(policy.model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)
    assert grpo_trainer.GRPOTrainer is __import__("trl").GRPOTrainer, "TRL is left as it was"


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({"plan": None}, [], "--plan is needed"),
        ({"use_peft": True}, [], "peft_config is given beside plan"),
        ({}, ["--plan", "none.json"], "plan='none.json' does not exist"),
        ({}, ["--lora_rate", "1"], "lora_rate"),
        ({"lora_rate": 1}, [], "lora_rate"),
        ({"num_generations": 1}, [], "num_generations"),
    ],
)
def test_wrong_input_ends_the_script_with_2(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, words: Any, message: str, capsys: Any
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = _files(base, tmp_path, **settings)
    with pytest.raises(SystemExit) as end:
        main(["--config", str(config), *words])
    assert message in capsys.readouterr().err
    assert end.value.code == 2


# --- several processes ---


def _in_parallel(rank: int, port: int, base: str, out: str, plan: str) -> Any:
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    trainer = hybrid(
        Path(base), Path(out), AdaptationPlan.from_json(plan), {"lora_max_grad_norm": 0.05},
        beta=0.1, per_device_train_batch_size=4, max_grad_norm=0.02,
    )  # fmt: skip
    start = trained(trainer)
    trainer.train()
    trainer.save_model(f"{out}/saved")
    trainer.save_merged(f"{out}/merged")
    flat = torch.cat([p.flatten() for p in trained(trainer).values()])
    everyone = trainer.accelerator.gather(flat[None])
    assert trainer.accelerator.num_processes == len(everyone) == 2
    moved = all(not torch.equal(value, start[name]) for name, value in trained(trainer).items())
    return everyone, moved, numbers(trainer, "kl", "grad_norm/full", "grad_norm/lora"), logits(trainer._policy)


@pytest.mark.slow
def test_processes_train_one_policy(base: Path, tmp_path: Path):
    everyone, moved, rows, wanted = on_ranks(2, _in_parallel, str(base), str(tmp_path), plan_of(base).to_json())
    assert torch.equal(everyone[0], everyone[1])
    assert moved
    assert rows[0][0] == 0
    assert rows[2][0] > 0
    again = load_policy(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), tmp_path / "saved")
    torch.testing.assert_close(logits(again.model), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted, atol=1e-4, rtol=1e-4
    )


def _under_deepspeed(rank: int, port: int, base: str, out: str, plan: str) -> str:
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    zero = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    with pytest.raises(ConfigError) as refused:
        hybrid(Path(base), Path(out), AdaptationPlan.from_json(plan), deepspeed=zero)
    return str(refused.value)


@pytest.mark.slow
def test_deepspeed_is_refused(base: Path, tmp_path: Path):
    said = on_ranks(1, _under_deepspeed, str(base), str(tmp_path), plan_of(base).to_json())
    assert "not under DistributedType.DEEPSPEED" in said
    assert "use `hybrid-rl train`" in said
