"""A step's work, counted in a real run in one process: what is done must not grow without a reason.

`counted_work.json` has, by measure, how much there should be and why. More than a tenth above it fails, and so does a
tenth below: then the file no longer says what is so, and would let work come back unseen.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hybrid_rl.cluster import inline
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner import update
from hybrid_rl.learner.logprobs import PolicyModel
from hybrid_rl.rollout.batch_decoding import Batch
from hybrid_rl.run_directory import read_metrics
from trainers import grpo
from trainers.record import Recorder

LIMITS: dict[str, tuple[float, str]] = json.loads(Path(__file__).with_name("counted_work.json").read_text())
SLACK = 0.1
STEPS = 3
REWARD = '''
def spread(completions, **columns):
    """Never the same for a whole group, so that every completion trains."""
    return [float(i) for i, _ in enumerate(completions)]
'''


def test_a_step_does_no_more_work_than_is_written_down(
    tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "spread.py").write_text(REWARD)
    tiny_tree |= {
        "steps": STEPS,
        "rewards": [{"plugin": f"{tmp_path / 'spread.py'}:spread"}],
        "cluster": {"backend": "inline"},
        "learner": {"world_size": 1},
        "rollout": {"engine": "transformers", "engines": 1},
        "eval": {"every": 0, "k": 0},
        "checkpoint": {"every": 0},
        "plan": {"score": "random"},
    }
    config = parse_config(tiny_tree)
    counted = _count(monkeypatch)
    run = grpo.train(config, name="counted")
    rows = read_metrics(run.metrics)
    assert len(rows) == STEPS
    done = {name: _share(counted, *of) for name, of in MEASURES.items()}
    done["bytes sent, of those trained"] = sum(row["sync/bytes"] for row in rows) / counted["trained bytes"]
    done["optimizer steps, a step"] = sum(row["policy/updates"] for row in rows) / STEPS
    assert done.keys() == LIMITS.keys()
    for name, (limit, why) in LIMITS.items():
        assert done[name] <= limit * (1 + SLACK), f"{name}: {done[name]:.3f}, it should be {limit}, since {why}"
        assert done[name] >= limit * (1 - SLACK), f"{name}: {done[name]:.3f}; lower its limit of {limit}"


MEASURES = {
    "learner tokens, of those needed": ("learner tokens", "learner tokens needed"),
    "learner passes, an update": ("learner passes", "updates"),
    "rollout tokens, of those needed": ("rollout tokens", "rollout tokens needed"),
    "prompt tokens read, of those there are": ("prompt tokens read", "prompt tokens"),
    "rollout passes, a token of the longest completion": ("rollout passes", "longest completions"),
    "worker calls, a step": ("worker calls", "updates"),
    "reward calls, a prompt": ("reward calls", "prompts"),
}
"""What is counted, and what it is a share of."""


def _share(counted: Counter[str], part: str, whole: str) -> float:
    assert counted[whole] > 0, whole
    return counted[part] / counted[whole]


def _count(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count calls of what does the work, in the loop and but for evaluations and checkpoints."""
    counted: Counter[str] = Counter()
    counts = [False]

    def around(owner: Any, name: str, count: Any) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **named: Any) -> Any:
            result = original(*args, **named)
            if counts[0]:
                count(result, *args, **named)
            return result

        monkeypatch.setattr(owner, name, counting)

    def learner_pass(_result: Any, _model: Any, input_ids: Any, *_: Any, **__: Any) -> None:
        counted.update({"learner passes": 1, "learner tokens": input_ids.numel()})

    def trained(_result: Any, policy_update: Any, batch: Any) -> None:
        counted["updates"] += len(batch.mini_batches)
        tensors = policy_update._adapted.trained.values()
        counted["trained bytes"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        for mini_batch in batch.mini_batches:
            # Nothing is predicted from a completion's last token.
            counted["learner tokens needed"] += sum(len(prompt) for prompt in {s.prompt_ids for s in mini_batch})
            counted["learner tokens needed"] += sum(len(s.completion_ids) - 1 for s in mini_batch)

    def rollout_pass(_result: Any, _batch: Any, ids: Any, **how: Any) -> None:
        tokens = 1 if "next_sequence_length" in how else ids.shape[1]
        counted.update({"rollout passes": 1, "rollout tokens": len(ids) * tokens})
        counted["prompt tokens read"] += len(ids) * (tokens if tokens > 1 else 0)

    def rolled_out(result: Any, *_: Any) -> None:
        groups = result.groups
        completions = [c for group in groups for c in group.completions]
        counted["prompts"] += len(groups)
        counted["prompt tokens"] += sum(len(group.prompt.token_ids) for group in groups)
        counted["rollout tokens needed"] += sum(len(group.prompt.token_ids) for group in groups)
        counted["rollout tokens needed"] += sum(len(c.token_ids) - 1 for c in completions)
        counted["longest completions"] += max(len(c.token_ids) for c in completions)

    around(PolicyModel, "forward", learner_pass)
    around(update.PolicyUpdate, "train", trained)
    around(Batch, "_forward", rollout_pass)
    around(grpo.InTurn, "next", rolled_out)
    around(inline._InlineHandle, "submit", lambda *_, **__: counted.update({"worker calls": 1}))
    around(inline._ThreadedHandle, "submit", lambda *_, **__: counted.update({"reward calls": 1}))
    loop_of, write_of = grpo._loop, Recorder.write

    def loop(*args: Any) -> None:
        counts[0] = True
        loop_of(*args)
        counts[0] = False

    def write(*args: Any) -> None:
        counts[0] = False
        write_of(*args)
        counts[0] = True

    monkeypatch.setattr(grpo, "_loop", loop)
    monkeypatch.setattr(Recorder, "write", write)
    return counted
