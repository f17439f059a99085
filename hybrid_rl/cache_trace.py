"""Which module keeps which state between tokens: seen in the cache of one short forward pass, and as configured.

Attention keeps keys and values, a recurrence keeps a state, a short convolution its last inputs: who writes what into
the cache says what a module is, whatever it is called.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.cache_utils import Cache

TOKENS = 6

_WRITES = {"update": "keys", "update_recurrent_state": "state", "update_conv_state": "inputs"}


def trace_mixers(model: nn.Module) -> dict[str, set[str]]:
    """The modules that write into the cache in a forward pass: full name -> {"attention", "recurrent"}.

    See `watch_forward`, which also tells which modules ran.
    """
    return watch_forward(model)[0]


def watch_forward(model: nn.Module) -> tuple[dict[str, set[str]], set[str]]:
    """Run `TOKENS` tokens; return which modules wrote what into the cache, and the names of all modules that ran.

    A convolution's last inputs count as recurrent, unless the module also keeps keys and values: then the convolution
    is part of the attention. A convolution without any matrix beside it does not appear; neither does a module that
    keeps its state on itself. Of nested modules the outermost appears, of a module with several names the first.

    The model is left as it was. An error of its forward pass is passed on; on the `meta` device data-dependent control
    flow is one.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model = copy.deepcopy(model).bfloat16()  # copies no data; on meta, experts run in no other dtype
    wrote: dict[nn.Module, set[str]] = defaultdict(set)
    with _unchanged(model), _running(model) as (stack, ran), _watched(lambda what: wrote[stack[-1]].add(what)):
        model.eval()
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        tokens = torch.arange(1, TOKENS + 1, device=embedding.weight.device).unsqueeze(0)
        with torch.no_grad():
            model(input_ids=tokens, use_cache=True)
    outermost: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if module in wrote and not (wrote[module] == {"inputs"} and not _has_matrix(module)):
            outer = next((known for known in outermost if name.startswith(f"{known}.")), name)
            outermost[outer] = outermost.get(outer, set()) | wrote[module]
    names = {name for name, module in model.named_modules(remove_duplicate=False) if module in ran}
    return {name: _kinds(what) for name, what in outermost.items()}, names


def declared_kinds(config: Any, layers: int) -> list[set[str] | None]:
    """The kinds of mixers that the configuration's layer types allow in each layer; `None` where they say nothing.

    `hybrid` says how a layer's cache is shaped: keys and some further state, not that two mixers run side by side.
    """
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    allowed: dict[str, set[str]] = {kind: set() for kind in ("moe", "mlp", "dense", "sparse")}
    allowed |= {kind: {"recurrent"} for kind in ("linear_attention", "mamba", "recurrent", "conv")}
    allowed |= {kind: {"attention"} for kind in types if "attention" in kind and kind not in allowed}
    allowed |= {kind: {"attention", "recurrent"} for kind in types if kind.startswith("hybrid")}
    return [allowed.get(kind) for kind in types] if len(types) == layers else [None] * layers


def _kinds(wrote: set[str]) -> set[str]:
    kinds = {"attention"} if "keys" in wrote else set()
    return kinds | {"recurrent"} if "state" in wrote or not kinds else kinds


def _has_matrix(module: nn.Module) -> bool:
    return any(
        parameter.ndim == 2
        for child in module.modules()
        if not isinstance(child, _ConvNd)
        for parameter in child.parameters(recurse=False)
    )


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back the attributes and buffers of all modules: the training mode, and states that a module keeps itself."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def _running(model: nn.Module) -> Iterator[tuple[list[nn.Module], set[nn.Module]]]:
    """The modules whose `forward` is running now, innermost last, and all whose `forward` has started."""
    stack: list[nn.Module] = []
    ran: set[nn.Module] = set()
    handles = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(module)
        ran.add(module)

    def leave(*_: Any) -> None:
        stack.pop()

    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield stack, ran
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched(note: Callable[[str], None]) -> Iterator[None]:
    """Call `note` at every write into any cache. Caches that a model defines itself are watched too: what their further
    methods write is taken for a recurrent state."""
    originals = []
    for cls in _subclasses(Cache):
        own = vars(cls) if cls.__module__ != Cache.__module__ else ()
        writes = {method: "state" for method in own if method.startswith(("set_", "update_"))} | _WRITES
        for method in writes.keys() & vars(cls).keys():
            originals.append((cls, method, vars(cls)[method]))
            setattr(cls, method, _noting(vars(cls)[method], writes[method], note))
    try:
        yield
    finally:
        for cls, method, original in originals:
            setattr(cls, method, original)


def _noting(method: Callable[..., Any], what: str, note: Callable[[str], None]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        note(what)
        return method(*args, **kwargs)

    return noting


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(sub) for sub in cls.__subclasses__()))
