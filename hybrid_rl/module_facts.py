"""Facts about single modules, from the shapes of their tensors and from the source of their class.

Some facts show in no tensor: that a kernel multiplies by a layer's weight itself, or that the output of a fused linear
is cut into contiguous parts. The class's source has them. Where there is no source to read, nothing is claimed.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

_LIBRARY = re.compile(r"builtins$|torch\.|transformers\.(?!models\.)")
"""Modules whose classes know no layer of a model by name, or only wrap it."""
_RESHAPES = "view|reshape|unflatten"
_CACHE_ARGUMENTS = {"past_key_values", "past_key_value", "layer_past", "cache_params", "state"}


# --- shapes ---


def is_leaf(module: nn.Module) -> bool:
    """A layer, no part that is made of layers."""
    known = isinstance(module, (nn.Linear, Conv1D, nn.Embedding, _ConvNd))
    return known or is_norm(module) or linear_shape(module) is not None


def is_norm(module: nn.Module) -> bool:
    """A module with a scale, at most a shift, and an epsilon against division by zero."""
    own = {name for name, _ in module.named_parameters()}
    return bool(own) and own <= {"weight", "bias"} and any("eps" in name for name in vars(module))


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, also of one whose tensor is packed."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None


def matrices(module: nn.Module) -> list[tuple[int, int]]:
    """(out, in) of all matrices in a module, embeddings and norms apart."""
    found = []
    for child in module.modules():
        if not isinstance(child, nn.Embedding) and not is_norm(child):
            for parameter in child.parameters(recurse=False):
                if parameter.ndim == 2:
                    rows, columns = linear_shape(child) or parameter.shape
                    found.append((columns, rows) if isinstance(child, Conv1D) else (rows, columns))
    return found


def leads_back(shapes: Sequence[tuple[int, int]], hidden: int) -> bool:
    """Whether one of these matrices reads the hidden size and another one returns it, as in an MLP."""
    return any(a is not b and a[1] == hidden == b[0] for a in shapes for b in shapes)


def has_parts(modules: Iterable[nn.Module]) -> bool:
    return any(True for module in modules for _ in module.children())


def expert_count(module: nn.Module) -> int:
    """How many experts this module could hold, as 3-D tensors or as a list of equal modules; 0 if it is no stack."""
    stacked = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3 and not isinstance(module, _ConvNd)]
    if not stacked and isinstance(module, nn.ModuleList) and len(module) > 1 and has_parts(module):
        shapes = [[p.shape for p in child.parameters()] for child in module]
        return len(module) if shapes[0] and all(s == shapes[0] for s in shapes) else 0
    return stacked[0] if stacked else 0


def scores_experts(module: nn.Module, count: int, hidden: int) -> bool:
    """Whether a module beside `count` experts chooses among them: it does not lead back to the hidden size."""
    outputs = {rows for rows, _ in matrices(module)}
    return bool(outputs) and hidden not in outputs and (count in outputs or hasattr(module, "top_k"))


# --- code ---


def bypasses(cls: type, attribute: str) -> Literal["always", "training"] | None:
    """Whether methods of the class compute with `self.<attribute>.weight` instead of calling the layer.

    An adapter around the layer would be bypassed; `training`: only in training mode, in blocks that ask for
    `self.training`. To look at the weight's dtype, device or shape is no computation.
    """
    pattern = rf"\bself\.{re.escape(attribute)}\.weight\b(?!\.(dtype|device|shape)\b)"
    if re.search(pattern, _source(cls)) is None:
        return None
    return "always" if re.search(pattern, _outside_training(cls)) else "training"


@cache
def _outside_training(cls: type) -> str:
    """The source of a class without the blocks that run in training mode alone."""
    try:
        tree = ast.parse(_source(cls))
    except SyntaxError:
        return _source(cls)
    return ast.unparse(_DropTraining().visit(tree))


class _DropTraining(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        asks = ast.unparse(node.test).split(" and ")
        return node.orelse or ast.Pass() if "self.training" in asks else node


@cache
def kept_in_cache(cls: type) -> Literal["keys", "state"] | None:
    """What methods of the class write into a cache: keys and values or a recurrent state; `None` if neither or both."""
    keys = re.search(r"\b\w*(past|cache)\w*\.update\(", _source(cls)) is not None
    state = ".update_recurrent_state(" in _source(cls)
    return None if keys == state else "keys" if keys else "state"


@cache
def takes_cache(cls: type) -> bool:
    """Whether `forward` has an argument for a cache: such a module mixes positions or holds one that does."""
    forward: Any = cls.forward  # type: ignore[attr-defined]
    return bool(_CACHE_ARGUMENTS & inspect.signature(forward).parameters.keys())


def fused_parts(owner: nn.Module, leaf: str, rows: int, config: Any, attention: bool) -> tuple[tuple[str, int], ...]:
    """The parts into which the owner's code cuts the output of its linear `leaf`, with their rows, in row order.

    Rows come from the sizes of the owner, for attention from the configured heads. Empty if the sizes do not add up to
    `rows`, or the layout is not a known one: (q, k, v), (gate, up), (x, gate), (gate, x, B, C, dt).
    """
    names = _contiguous_parts(type(owner), leaf)

    def size(attribute: str) -> int:
        return getattr(owner, attribute, 0)

    layout: dict[str, int] = {}
    if [name[0] for name in names] == ["q", "k", "v"]:
        layout = {"q": size("key_dim"), "k": size("key_dim"), "v": size("value_dim")}
        if attention:
            heads = config.num_attention_heads
            width = size("head_dim") or config.hidden_size // heads
            groups = getattr(config, "num_key_value_heads", None) or heads
            layout = {"q": heads * width, "k": groups * width, "v": groups * width}
    elif len(names) == 2 and "gate" in names:
        siblings = [child for name, child in owner.named_children() if isinstance(child, nn.Linear) and name != leaf]
        half = next((child.in_features for child in siblings if 2 * child.in_features == rows), 0)
        layout = {name if name == "gate" else "x" if takes_cache(type(owner)) else "up": half for name in names}
    elif len(names) == 3 and names[0] == "gate" and names[2] == "dt":
        inner, state = size("intermediate_size"), size("n_groups") * size("ssm_state_size")
        layout = {"gate": inner, "x": inner, "B": state, "C": state, "dt": size("num_heads")}
    return tuple(layout.items()) if all(layout.values()) and sum(layout.values()) == rows else ()


@cache
def _contiguous_parts(cls: type, attribute: str) -> tuple[str, ...]:
    """What the code calls the parts of the linear's output; empty if it is not cut, or reshaped before: interleaved."""
    result = re.search(rf"(\w+) = self\.{re.escape(attribute)}\(", _source(cls))
    if result is None:
        return ()
    whole, code = result[1], _after_call(_source(cls)[result.end() :])
    if re.search(rf"\A[^\n]*\.({_RESHAPES})\(|\b{whole}\.({_RESHAPES})\(", code):
        return ()
    cut = re.search(rf"([\w, ]+) = (?:{whole}\.(?:split|chunk)\(|torch\.(?:split|chunk)\(\s*{whole}\b)", code)
    if cut is None:
        return tuple(re.findall(rf"(\w+) = {whole}\[\.\.\., ", code))
    names = tuple(name.strip() for name in cut[1].split(","))
    if len(names) == 1 and re.search(rf"act\w*\({names[0]}\[0\]\) \* {names[0]}\[1\]", code):
        return "gate", "up"
    return names


def _after_call(code: str) -> str:
    """What follows the parenthesis that closes a call, given the code after the one that opens it."""
    depth = 1
    for position, character in enumerate(code):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return code[position + 1 :]
    return ""


@cache
def _source(cls: type) -> str:
    """The source of a model's class and its bases, without constructors; empty where there is none to read."""
    own = [c for c in cls.__mro__ if not _LIBRARY.match(c.__module__)]
    try:
        source = "".join(inspect.getsource(c) for c in own)
        constructors = [inspect.getsource(vars(c)["__init__"]) for c in own if "__init__" in vars(c)]
    except (OSError, TypeError):
        return ""
    for constructor in constructors:
        source = source.replace(constructor, "")
    return source
