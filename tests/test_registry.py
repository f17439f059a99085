"""Losses and advantages of one's own, and what is said of names that are none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_rl.algo import AlgoConfig
from hybrid_rl.algorithms import find_advantage, find_loss, policy_objective, register_advantage, register_loss
from hybrid_rl.settings import ConfigError
from tests.algorithms import naive

FINDERS: list[tuple[str, Callable[[str], Any]]] = [("algo.loss", find_loss), ("algo.advantage", find_advantage)]
CASE = naive.Case([1.0, -0.5], [[-1.0, -2.0], [-0.5]], *[[[-1.0, -2.0], [-0.5]]] * 4)

MODULE = """
import torch
from hybrid_rl.algorithms import TokenLoss, register_loss

def reinforce(tokens, algo):
    return -tokens.advantages_T * tokens.logprobs_T

def with_default(tokens, algo, scale=1.0):
    return TokenLoss(scale * reinforce(tokens, algo))

def of_sequences(tokens, algo):
    return tokens.sum_N(tokens.logprobs_T)

def of_nothing(tokens, algo):
    pass

def one_parameter(tokens):
    return tokens

def keyword_only(tokens, algo, *, scale):
    return tokens

def halved(rewards_P_G, valid_P_G):
    return rewards_P_G / 2

def too_narrow(rewards_P_G, valid_P_G):
    return rewards_P_G[:, 0]

def infinite(rewards_P_G, valid_P_G):
    return rewards_P_G / 0

number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, which a console script does not look into by itself."""
    (tmp_path / "my_functions.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    for name in ("my_functions", "my_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_functions"


@pytest.mark.parametrize("function", ["reinforce", "with_default"])
def test_a_loss_of_ones_own_is_trained_with(own_module: str, function: str):
    """On policy, all losses have the gradient of REINFORCE."""
    algo = AlgoConfig(loss=f"{own_module}:{function}")
    gradients = []
    for name in (algo.loss, "clip"):
        tokens = CASE.tokens("token_mean")
        found = policy_objective(tokens, algo, find_loss(name))
        gradients.append(torch.autograd.grad(found.loss, tokens.logprobs_T)[0])
        if name == algo.loss:
            assert (found.tokens.low_T, found.tokens.high_T) == (None, None)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("function", "said"), [("of_sequences", r"3 tokens, not torch.Size\(\[2\]\)"), ("of_nothing", "NoneType")]
)
def test_a_loss_of_the_wrong_shape_is_named(own_module: str, function: str, said: str):
    algo = AlgoConfig(loss=f"{own_module}:{function}")
    with pytest.raises(ValueError, match=f"algo.loss=my_functions:{function} must return one loss .*{said}"):
        policy_objective(CASE.tokens("token_mean"), algo, find_loss(algo.loss))


def test_an_advantage_of_ones_own_is_used_and_zero_where_there_is_no_reward(own_module: str):
    found = find_advantage(f"{own_module}:halved")(torch.tensor([[2.0, 3.0]]), torch.tensor([[True, False]]))
    assert found.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("function", ["too_narrow", "infinite"])
def test_advantages_that_cannot_be_trained_with_are_refused(own_module: str, function: str):
    advantage = find_advantage(f"{own_module}:{function}")
    with pytest.raises(ValueError, match=rf"algo.advantage=my_functions:{function} must return finite .* \[1, 2\]"):
        advantage(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize(("setting", "find"), FINDERS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_functions:one_parameter", "is no function of \\("),
        ("my_functions:keyword_only", "is no function of \\("),
        ("my_functions:number", "is no function of \\("),
        ("my_functions:missing", "cannot be loaded: AttributeError"),
        ("my_broken:function", "cannot be loaded: ZeroDivisionError"),
        ("no_such_module:function", "cannot be loaded: ModuleNotFoundError"),
        (":function", "cannot be loaded: ValueError"),
    ],
)
def test_what_cannot_be_called_is_refused(own_module: str, setting: str, find: Any, name: str, said: str):
    with pytest.raises(ConfigError, match=f"^{setting}='{name}' {said}"):
        find(name)


@pytest.mark.parametrize(
    ("find", "name", "said"),
    [
        (
            find_loss,
            "cipso",
            "algo.loss='cipso' is unknown; did you mean cispo\\? Use clip, gspo, .* or module:function",
        ),
        (find_loss, "zzz", "algo.loss='zzz' is unknown. Use clip, gspo, .* or module:function"),
        (find_advantage, "group_centered", "algo.advantage='group_centered' is unknown; did you mean group_centred\\?"),
    ],
)
def test_an_unknown_name_meets_the_nearest_one(find: Any, name: str, said: str):
    with pytest.raises(ConfigError, match=said):
        find(name)


@pytest.mark.parametrize(("group", "find"), [("hybrid_rl.losses", find_loss), ("hybrid_rl.advantages", find_advantage)])
def test_an_installed_package_may_offer_one(own_module: str, tmp_path: Path, monkeypatch: Any, group: str, find: Any):
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\noffered = my_functions:halved\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find("offered").__name__ == "halved"
    with pytest.raises(ConfigError, match="did you mean offered"):
        find("ofered")


@pytest.mark.parametrize(
    ("register", "find", "name"), [(register_loss, find_loss, "clip"), (register_advantage, find_advantage, "rloo")]
)
def test_a_name_is_taken_once(register: Any, find: Any, name: str):
    function = find(name)
    with pytest.raises(ValueError, match=f"{name} is another function already"):
        register(name)(lambda a, b: a)
    assert find(name).__name__ == function.__name__
    register(name)(getattr(function, "__wrapped__", function))  # the same one again, as when a module is run twice
