"""Every preset through the whole loop, in one process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hybrid_rl.algo import PRESETS
from hybrid_rl.config import ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.run_directory import read_metrics
from tests.trainers.test_rank import saved
from trainers.grpo import train
from trainers.setup import check_task

LOSSES = '''
"""Written as a user would."""
import torch


def half(tokens, algo):
    return -0.5 * torch.exp(tokens.logprobs_T - tokens.old_logprobs_T) * tokens.advantages_T


def nothing(tokens, algo):
    return -tokens.advantages_T * tokens.logprobs_T * float("nan")


def failing(tokens, algo):
    raise KeyError("columns")


def infinite(rewards, valid):
    return rewards / 0
'''
LENGTH = "def score(completions, **columns):\n    return [float(len(c)) / 10 for c in completions]\n"


@pytest.fixture
def inline(tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The tiny run in this process, two updates a step; a random policy has something to learn."""
    (tmp_path / "length.py").write_text(LENGTH)
    (tmp_path / "my_losses.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    tiny_tree |= {
        "rewards": [{"plugin": "length.py:score"}],
        "plan": {"score": "random"},
        "cluster": {"backend": "inline"},
        "learner": {"world_size": 1},
        "rollout": {"engine": "transformers"},
        "full": {"lr": 1e-3},
    }
    tiny_tree["batch"] |= {"mini_batches": 2}
    return tiny_tree


def _train(tree: dict, **changes: Any) -> list[dict[str, Any]]:
    return read_metrics(train(parse_config({**tree, **changes}), name="run").metrics)


def _check(rows: list[dict[str, Any]], steps: int) -> None:
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert all(row["faults/skipped_updates"] == 0 for row in rows)
    trained = [row for row in rows if row["policy/updates"]]
    assert len(trained) > steps / 2
    assert all(row["policy/clip_fraction_first"] == 0 for row in trained), "before an update the ratio is 1"
    assert all(row["part/full/update_norm"] > 0 and row["part/lora/update_norm"] > 0 for row in trained)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", list(PRESETS))
def test_every_preset_trains_twenty_steps(inline: dict, algorithm: str):
    _check(_train(inline, algorithm=algorithm, steps=20), 20)


def test_reference_resampling_and_own_loss_in_one_run(inline: dict):
    algo = {"loss": "my_losses:half", "kl_coef": 0.01, "kl_in": "reward", "entropy_coef": 0.01}
    algo |= {"zero_variance": "resample", "overlong_buffer": 0.5, "mismatch": "truncate", "advantage": "rloo"}
    rows = _train(inline, algo=algo, steps=3)
    _check(rows, 3)
    assert rows[0]["reward/kl_penalty"] == 0, "before training the policy is the base policy"
    assert rows[2]["reward/kl_penalty"] != 0
    assert all("reward/overlong_penalty" in row for row in rows)


def test_an_update_that_is_not_finite_is_skipped_kept_and_after_some_fatal(inline: dict, tmp_path: Path):
    inline["learner"] |= {"max_skipped_updates": 3}
    with pytest.raises(RuntimeError, match=r"4 updates in a row were skipped .*learner\.max_skipped_updates=3"):
        _train(inline, algo={"loss": "my_losses:nothing"}, steps=5)
    batches = [json.loads((tmp_path / f"run/skipped/step_00000{step}.json").read_text()) for step in (1, 2)]
    assert all(len(sequences) == 8 for batch in batches for sequences in batch)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["faults/skipped_updates"] for row in rows] == [2]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"loss": "clipp"}, ["algo.loss='clipp'", "did you mean clip"]),
        ({"loss": "my_losses.py:half"}, ["algo.loss='my_losses.py:half'", "without .py"]),
        ({"loss": "my_losses:missing"}, ["algo.loss='my_losses:missing'", "missing"]),
        ({"loss": "my_losses:failing"}, ["algo.loss=my_losses:failing", "KeyError"]),
        ({"advantage": "group_normalized"}, ["algo.advantage='group_normalized'", "group_normalised"]),
        ({"advantage": "my_losses:infinite"}, ["algo.advantage=my_losses:infinite", "finite"]),
    ],
)
def test_unknown_losses_and_advantages_are_refused_before_anything_starts(
    inline: dict, changes: dict, parts: list[str]
):
    with pytest.raises(ConfigError) as error:
        check_task(parse_config({**inline, "algo": changes}))
    assert all(part in str(error.value) for part in parts)


def test_sequence_parallelism_is_refused_where_it_cannot_be(inline: dict, tmp_path: Path):
    ray = {"cluster": {"backend": "ray"}, "learner": {"world_size": 2, "sequence_parallel": 2}}
    with pytest.raises(
        ConfigError, match=r"learner\.sequence_parallel=2 does not divide the model's num_key_value_heads=1"
    ):
        check_task(parse_config({**inline, **ray}))
    for family, said in (("falcon_h1", "passes a state from token to token"), ("qwen3", "looks at whole sequences")):
        saved(family, tmp_path / family)
        tree = {**inline, **ray, "model": {"path": str(tmp_path / family)}, "plan": {"score": "grad_norm"}}
        tree["batch"] = {**inline["batch"], "tokens_per_micro_batch": 20}
        with pytest.raises(ConfigError, match=said):
            check_task(parse_config(tree))
