"""`hybrid-rl eval` measures what the run measured, and any rank of a Matryoshka policy; nothing else gets a worker."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hybrid_rl.adaptation import WEIGHTS, apply_plan
from hybrid_rl.adaptation.matryoshka import TrainedRanks
from hybrid_rl.checkpoint import checkpoints, load_state, write_state
from hybrid_rl.cli import main
from hybrid_rl.config import ConfigError, WarmStartConfig
from hybrid_rl.config_file import load_config, parse_config
from hybrid_rl.evaluate import aurac
from hybrid_rl.export import FORMATS, export_run
from hybrid_rl.files import describe
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import RunDirectory, read_metrics
from trainers.base_model import meta_model
from trainers.evaluation import evaluate_policy
from trainers.grpo import train

PLUGIN = '''
def variety(completions, **columns):
    """Never the same for a whole group, and other for nearly every policy."""
    return [len(set(c)) / 16 + (sum(map(ord, c)) % 97) * 0.001 for c in completions]
'''


def tree_of(model: Path, where: Path, **changes: Any) -> dict[str, Any]:
    """Two steps of Matryoshka on the tiny model, in this process; `where` gets the reward and the run."""
    plugin = where / "variety.py"
    plugin.write_text(PLUGIN)
    tree = {
        "model": {"path": str(model)},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "eval_size": 8, "max_prompt_length": 16},
        "sampling": {"max_completion_length": 6},
        "rewards": [{"plugin": f"{plugin}:variety"}],
        "steps": 2,
        "batch": {"prompts": 4, "num_generations": 4},
        "adaptation": "matryoshka",
        "matryoshka": {"loss": "sampled"},
        "lora": {"rank": 4, "lr": 0.05},
        "learner": {"world_size": 1},
        "rollout": {"engine": "transformers"},
        "cluster": {"backend": "inline"},
        "checkpoint": {"every": 1},
        "eval": {"k": 2, "every": 1},
        "tracking": {"wandb": "disabled"},
        "run": {"dir": str(where / "run")},
    }
    return {**tree, **changes}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train(parse_config(tree_of(tiny_model, tmp_path_factory.mktemp("evaluated"))), name="evaluated")


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting any worker fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a worker was started")

    monkeypatch.setattr("hybrid_rl.cluster.inline.InlineCluster.start", refuse)


def without_prefix(metrics: Any) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in metrics.items() if name.startswith("eval/")}


def test_a_policy_scores_as_it_did_in_its_run(run: RunDirectory):
    """The base model as before the run, each checkpoint as when it was saved."""
    config, summary, rows = load_config(run.config, []), run.read_summary(), read_metrics(run.metrics)
    before, after = without_prefix(summary["eval_before"]), without_prefix(summary["eval_after"])
    assert before != after
    base = evaluate_policy(config)
    assert base.scores == before
    assert (base.problems, base.verified_engines, base.ranks, base.aurac) == (8, 0, {}, {})
    first = evaluate_policy(config, checkpoint=run.checkpoints / "step_000001")
    assert first.scores == without_prefix(rows[0])
    assert first.source["step"] == first.verified_engines == 1
    # What was drawn goes by the number of the step, so that a resumed run draws the same.
    plan = AdaptationPlan.load(run.plan)
    nestings = apply_plan(meta_model(config), plan).nestings
    drawn = [next(iter(TrainedRanks(nestings, config.seed).of(step, 0))) for step in (1, 2)]
    assert [row["matryoshka/rank"] for row in rows] == drawn


def test_ranks_are_evaluated_drawn_and_written(run: RunDirectory, capsys: pytest.CaptureFixture, tmp_path: Path):
    arguments = ["eval", str(run.config), "--checkpoint", str(run.path), "--ranks", "4,1,2", "--json"]
    assert main(arguments) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads((run.path / "eval_ranks.json").read_text()) == result
    assert (run.path / "eval_ranks.png").read_bytes().startswith(b"\x89PNG")
    assert any("as trained" in line for line in printed)
    after = without_prefix(run.read_summary()["eval_after"])
    assert {"accuracy", "mean_at_k", "truncated", "unscored", "stopped", "pass_at_2"} <= after.keys()
    assert {name: result[name] for name in after} == after
    assert [each["rank"] for each in result["ranks"]] == [1, 2, 4]
    # What is trained by ranks drawn is, as a whole, the largest.
    assert {name: result["ranks"][-1][name] for name in after} == after
    accuracies = [each["accuracy"] for each in result["ranks"]]
    assert len(set(accuracies)) == 3, "each rank is a policy of its own"
    assert result["aurac"] == {
        "linear": aurac([1, 2, 4], accuracies, log=False),
        "log2": aurac([1, 2, 4], accuracies, log=True),
    }
    assert result["plan_hash"] == run.read_summary()["plan_hash"]
    assert result["checkpoint"].endswith("checkpoints/step_000002")
    assert (result["problems"], result["verified_engines"], result["step"]) == (8, 4, 2)
    assert result["answers"]["greedy"]["temperature"] == 0
    assert result["answers"]["sampled"]["n"] == 2
    assert result["answers"]["greedy"]["stop"] == []

    other = load_config(run.config, ["eval.k=0"])
    alone = evaluate_policy(other, checkpoint=run.path, ranks=(2,))
    assert "mean_at_k" not in alone.scores
    assert alone.ranks[2]["accuracy"] == alone.aurac["linear"] == alone.aurac["log2"] == accuracies[1]


def test_how_the_settings_would_train_is_not_looked_at(run: RunDirectory):
    """The policy has a plan of its own."""
    config = load_config(run.config, ["adaptation=lora", "matryoshka={}", "lora.rank=1000", "eval.k=0"])
    scores = evaluate_policy(config, checkpoint=run.path).scores
    assert scores["accuracy"] == without_prefix(run.read_summary()["eval_after"])["accuracy"]
    for given in ("plan.path=nowhere.json", "plan.start=nowhere"):
        config = load_config(run.config, ["adaptation=hybrid", "matryoshka={}", given, "eval.k=0"])
        assert evaluate_policy(config, checkpoint=run.path).scores == scores


def test_an_edited_base_model_is_refused(run: RunDirectory, tmp_path: Path):
    """Of the same shapes, so that nothing but its weights tells."""
    config = load_config(run.config, [])
    other = tmp_path / "other"
    shutil.copytree(config.model.path, other)
    tensors = load_file(other / "model.safetensors")
    save_file({n: t * 1.01 for n, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    config = load_config(run.config, [f"model.path={other}"])
    with pytest.raises(ConfigError, match="is not the base model that it was trained from"):
        evaluate_policy(config, checkpoint=run.path)


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_scores_as_its_run_did(run: RunDirectory, tmp_path: Path, to: str):
    out = tmp_path / to
    export_run(run.path, to, out)
    config, after = load_config(run.config, []), without_prefix(run.read_summary()["eval_after"])
    result = evaluate_policy(config, export=out, ranks=(2,) if to == "delta" else ())
    assert result.scores == after
    assert (result.source["format"], result.source["step"]) == (to, 2)
    assert result.verified_engines == {"merged": 0, "peft": 1, "delta": 2}[to]
    assert result.directory == out
    if to == "delta":
        assert result.ranks[2]["accuracy"] != after["accuracy"]
    else:
        with pytest.raises(ConfigError, match=r"--ranks 2: the policy has no matryoshka modules"):
            evaluate_policy(config, export=out, ranks=(2,))


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--checkpoint", "{empty}"], ["--checkpoint", "neither a finished checkpoint", "nor a run"]),
        (["--checkpoint", "{run}", "--ranks", "1,8"], ["--ranks 1,8", "ranks from 1 to 4"]),
        (["--checkpoint", "{run}", "--ranks", "1,x"], ["--ranks '1,x' is no list of ranks"]),
        (["--checkpoint", "{run}", "--ranks", "0,1"], ["--ranks '0,1' is no list of ranks"]),
        (["--checkpoint", "{lora}", "--ranks", "1"], ["has no matryoshka modules", "adaptation=matryoshka"]),
        (["--ranks", "1"], ["--ranks 1", "has no matryoshka modules"]),
        (["--checkpoint", "{run}", "--out", "{run}/config.yaml/none"], ["--out", "cannot be made"]),
        (["--checkpoint", "{run}", "model.path={other}"], ["--checkpoint", "made for another model"]),
        (["--export", "{empty}"], ["--export", "is no export"]),
        (["--checkpoint", "{edited}"], ["plan.json was changed since step_000002 was saved"]),
        (["--checkpoint", "{run}", "sync.transport=nccl"], ["sync.transport=nccl", "sync.transport=object_store"]),
        (["--checkpoint", "{bare}"], ["no checkpoint is whole", "weights.safetensors is not what was written"]),
        (["--checkpoint", "{refitted}"], ["--checkpoint", "weights.safetensors is not of this plan"]),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], parts: list[str]
):
    places = {"run": run.path, "empty": tmp_path / "empty", "other": tmp_path / "other"}
    places["empty"].mkdir()
    if "{other}" in options[-1]:
        other_model(places["other"])
    makers: dict[str, Callable[[Path], None]] = {"lora": as_lora, "edited": edited, "refitted": refitted, "bare": bare}
    for name, change in makers.items():
        places[name] = tmp_path / name
        if any(name in option for option in options):
            shutil.copytree(run.path, places[name])
            change(places[name])
    assert main(["eval", str(run.config), *(option.format(**places) for option in options)]) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert "Traceback" not in error


def other_model(path: Path) -> None:
    from trainers.warm_start import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(WarmStartConfig(hidden_size=32, layers=2, heads=2, kv_heads=1), tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)


def edited(run: Path) -> None:
    tree = json.loads((run / "plan.json").read_text())
    tree["modules"][0] |= {"treatment": "frozen", "rank": None, "options": {}}
    (run / "plan.json").write_text(json.dumps(tree))


def as_lora(run: Path) -> None:
    """A run whose plan has no rank to choose."""
    tree = json.loads((run / "plan.json").read_text())
    for module in tree["modules"]:
        module |= {"treatment": "lora", "alpha": 8.0, "options": {}}
    (run / "plan.json").write_text(json.dumps(tree))
    claim(run)


def refitted(run: Path) -> None:
    """A plan that was edited, and a checkpoint that claims to be of it."""
    edited(run)
    claim(run)


def claim(run: Path) -> None:
    plan = AdaptationPlan.load(run / "plan.json")
    for checkpoint in checkpoints(run / "checkpoints"):
        state = replace(load_state(checkpoint), plan_hash=plan.hash)
        write_state(checkpoint, state, {WEIGHTS: describe(checkpoint / WEIGHTS)})


def bare(run: Path) -> None:
    for weights in run.glob("checkpoints/*/weights.safetensors"):
        weights.unlink()


@pytest.mark.slow
def test_matryoshka_under_zero_3_on_vllm(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Two ranks, one vLLM engine, everything through Ray: trained, synced with receipts, evaluated by rank."""
    tree = tree_of(tiny_model, tmp_path, steps=3, matryoshka={"loss": "sum"}, cluster={"backend": "ray"})
    tree |= {"learner": {"world_size": 2, "zero_stage": 3}, "rollout": {"engine": "vllm"}}
    trained = train(parse_config(tree), name="matryoshka")
    for row in read_metrics(trained.metrics):
        assert row["sync/verified_engines"] == 1
        assert row["policy/rollout_logprob_diff_max"] < 1e-4
        assert row["grad_norm/lora"] > 0
    assert main(["eval", str(trained.config), "--checkpoint", str(trained.path), "--ranks", "1,2,4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    after = without_prefix(trained.read_summary()["eval_after"])
    assert {name: result[name] for name in after} == pytest.approx(after, abs=1e-9)
    assert result["verified_engines"] == 4
    assert len(result["ranks"]) == 3


def test_several_data_sets_and_every_answer_are_written(
    run: RunDirectory, capsys: pytest.CaptureFixture, tmp_path: Path
):
    sets = "data.eval={easy: arithmetic@eval, hard: arithmetic@train}"
    arguments = ["eval", str(run.config), "--out", str(tmp_path), "--json", sets, "data.eval_size=3"]
    assert main([*arguments, "eval.right_from=0.1", 'sampling.stop=["7"]']) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads((tmp_path / "eval.json").read_text()) == result
    assert result["problems"] == 6
    assert result["accuracy"] == pytest.approx((result["easy/accuracy"] + result["hard/accuracy"]) / 2)
    assert all(any(name in line for line in printed) for name in ("easy", "hard", "stopped", "pass@2"))
    answers = [json.loads(line) for line in (tmp_path / "eval_answers.jsonl").read_text().splitlines()]
    greedy, sampled = answers[:6], answers[6:]
    assert [a["prompt_id"] for a in greedy] == [f"{name}/{i}" for name in ("easy", "hard") for i in range(3)]
    assert len(sampled) == 2 * 6
    scores = [a["reward"] for a in greedy]
    assert result["accuracy"] == pytest.approx(sum(scores) / 6)
    assert result["stopped"] == pytest.approx(sum(a["finish_reason"] == "stop" for a in greedy) / 6)
    assert result["answers"]["greedy"]["stop"] == ["7"]
    assert result["answers"]["right_from"] == 0.1
    (judge,) = result["answers"]["rewards"].values()
    assert judge["plugin"].endswith("variety.py:variety")
    assert [a["greedy"] for a in answers] == [True] * 6 + [False] * 12
    assert result["answers"]["data"] == {"easy": "arithmetic@eval", "hard": "arithmetic@train"}


def test_a_set_may_have_a_reward_of_its_own(run: RunDirectory, tmp_path: Path):
    """What the others need is not asked for, nor is the training set's."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "1+1=", "answer": "2", "kind": "sum"}\n')
    (tmp_path / "two.jsonl").write_text('{"prompt": "1-1=", "kind": "difference", "extra": "x"}\n')
    (tmp_path / "mine.py").write_text(
        "def half(completions, marks='?'):\n    return [0.5] * len(completions)\n"
        "def one(completions, kind, extra):\n    return [1.0] * len(completions)\n"
        "def unused(completions, nowhere):\n    return [9.0] * len(completions)\n"
    )
    rewards = [
        {"plugin": f"{tmp_path}/mine.py:unused", "name": "unused"},
        {"plugin": f"{tmp_path}/mine.py:half", "name": "half", "gate": 0.1, "when": {"kind": "sum"}},
        {"plugin": f"{tmp_path}/mine.py:one", "name": "one", "when": {"kind": ["difference"]}},
    ]
    tree = load_config(run.config, []).model_dump(mode="json", by_alias=True)
    tree |= {"rewards": rewards, "run": {}}
    tree["data"] |= {"eval": {"a": str(tmp_path / "one.jsonl"), "b": str(tmp_path / "two.jsonl")}}
    tree["eval"] = {"k": 0, "reward": {"a": "half", "b": "one"}}
    found = evaluate_policy(parse_config(tree))
    assert (found.scores["a/accuracy"], found.scores["b/accuracy"], found.scores["accuracy"]) == (0.5, 1.0, 0.75)
    assert found.answers["rewards"]["half"]["arguments"] == {"marks": "?"}
    tree["eval"] = {"k": 0, "reward": "half"}
    with pytest.raises(
        ConfigError, match=r"half is for no problem of data\.eval=.*two\.jsonl.*and kind is 'difference'"
    ):
        evaluate_policy(parse_config(tree))
    tree["eval"] = {"k": 0, "reward": {"a": "half"}}
    with pytest.raises(ConfigError, match="give a reward for each"):
        parse_config(tree)


def test_a_reward_that_stops_a_run_is_said_in_one_screen(
    run: RunDirectory, capsys: pytest.CaptureFixture, tmp_path: Path
):
    (tmp_path / "chatty.py").write_text("def chatty(completions):\n    return [c[0]['content'] for c in completions]\n")
    assert main(["eval", str(run.config), f"rewards=[{{plugin: {tmp_path}/chatty.py:chatty}}]", "eval.k=0"]) == 1
    said = capsys.readouterr().err
    assert "chatty failed on" in said
    assert "TypeError: string indices must be integers" in said
    assert "`hybrid-rl reward test`" in said
