"""What my_reward gives for what."""

from pathlib import Path

import pytest

from hybrid_rl.plugins import load_plugin

my_reward = load_plugin(f"{Path(__file__).with_name('my_reward.py')}:my_reward")  # as a run loads it


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("17 + 25 = 42", "42", 1.0),
        ("42, or rather 41", "42", 0.0),
        ("I do not know.", "42", 0.0),
        ("42", "forty-two", None),
    ],
)
def test_scores(completion: str, answer: str, score: float | None):
    assert my_reward(completion, answer) == score


def test_chat_messages_score_as_their_text():
    assert my_reward([{"role": "assistant", "content": "42"}], "42") == 1.0
