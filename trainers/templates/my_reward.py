"""A reward for one task."""

import re
from typing import Any

from rewards.common import text_of

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def my_reward(completion: Any, answer: str) -> float | None:
    """1.0 where the last number of the completion is `answer`, 0.0 where another or none is.

    `None` where `answer` is no number: this reward does not apply there, and others count alone.
    """
    # `answer` is a column of the data; name those that you need, and `prompt` for the question.
    if not _NUMBER.fullmatch(answer.strip()):
        return None
    # With data.chat a completion is a list of chat messages, else text; text_of takes both.
    found = _NUMBER.findall(text_of(completion))
    return float(bool(found) and float(found[-1]) == float(answer))


# What it raises is counted, and the completion left out of training: do not return 0.0 for what could not be judged.
#
# A reward may have other forms; what it is given follows from the names of its parameters (docs/rewards.md).
#
# All completions of a prompt at once, for rewards that compare them:
#     def my_reward(completions, answer, **columns) -> list[float | None]
#     my_reward.independent = False  # else, after an exception, each is given to it once more, alone
# The completions of a prompt beside each other, for what waits on something:
#     async def my_reward(completion, answer) -> float | None
# Something made once a process and closed at the end; `arguments` of the settings go to __init__:
#     class MyReward:  def setup(self), def __call__(self, completion, answer), def close(self)
#
# With the parameter log_extra, log_extra("extracted", text) is kept beside the score in the run's rollouts; with
# log_metric, log_metric("digits", 3) becomes the metric reward/<name>/digits, a mean over completions.
