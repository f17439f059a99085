"""What every weight of a causal language model *is*: its component, layer and shape, and whether LoRA can serve it.

Read from the model's structure, not from a table of architectures, on real or `meta` tensors, before anything is
injected into the model. What is not understood is refused (`UnknownArchitecture`) until an override settles it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args

from torch import nn

from hybrid_rl import module_facts as facts
from hybrid_rl.cache_trace import declared_kinds, trace_mixers, watch_forward

__all__ = ["Anatomy", "Component", "UnknownArchitecture", "Weight", "cross_check", "read_model", "trace_mixers"]

Component = Literal["attention", "recurrent", "mlp", "expert", "router", "embedding", "lm_head", "norm", "other"]
Mixer = Literal["attention", "recurrent"]
Topology = Literal["attention-only", "recurrent-only", "sequential-hybrid", "parallel-hybrid", "mixed-hybrid"]
Modules = Mapping[str, nn.Module]
Settled = Mapping[str, Component]

logger = logging.getLogger(__name__)

_DECAYS = ("decay", "A_log", "dt_bias", "recurrent_param")
"""Parts of the names of parameters and buffers by which a state fades: only a recurrence has one."""


class UnknownArchitecture(ValueError):
    """The model's structure is not one this module can read. The message names the setting that would settle it."""


@dataclass(frozen=True)
class Weight:
    """One trainable tensor."""

    name: str
    """The module's name where the tensor is `<module>.weight`, else the parameter's full name."""
    parameter: str
    """The parameter's full name, the first one if it has several."""
    component: Component
    layer: int | None
    """Decoder block, counted on from one decoder stack to the next; `None` outside them."""
    shape: tuple[int, ...]
    """Of a linear layer (out features, in features), also where the stored tensor is packed."""
    linear: bool
    """Whether it is the matrix of an `nn.Linear` or of a quantised linear layer."""
    slices: tuple[tuple[str, int], ...]
    """Parts of a fused linear and their rows, in row order; empty if not fused, interleaved or not understood."""
    tied: tuple[str, ...]
    """Further names of this very tensor, written as `name` is."""
    no_lora: str | None
    """Why LoRA cannot serve this matrix."""
    quantised: bool
    leads_back: bool = False
    """Whether it is the matrix of an MLP that returns to the hidden size what its other matrices have made of that."""

    @property
    def params(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Anatomy:
    """What `read_model` found."""

    topology: Topology
    weights: tuple[Weight, ...]
    """Every parameter, in the model's order, each once."""
    mixers: Mapping[str, Mixer]
    """Full name -> kind. A module shared by several layers appears under each of its names."""

    @property
    def candidates(self) -> list[Weight]:
        """The matrices a plan may choose from: linear layers of the decoder blocks, except gates and routers."""
        eligible = ("attention", "recurrent", "mlp", "expert")
        linear = [w for w in self.weights if w.linear and w.layer is not None and w.component in eligible]
        return [w for w in linear if w.shape[0] > 1]  # a (1, h) linear is a gate


def read_model(model: nn.Module, overrides: Mapping[str, str] = {}) -> Anatomy:
    """Classify every parameter of the model.

    `overrides` maps patterns (of `fnmatch`, case-sensitive) on full module or parameter names to components. A module
    that matches `attention` or `recurrent` is a mixer of that kind; any other match sets the component of the weights
    in or under it, norms apart. The longest matching name decides; of two patterns on one name the later.

    Raises `UnknownArchitecture` for structures that are not understood, `ValueError` for an override that matches
    nothing or names no component.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = _tensors(model)
    settled = _settle(overrides, [*modules, *(name for names in tensors for name in names)])
    root, blocks, mixers = _decoder(model, modules, settled)
    known: dict[str, Component] = _norms_and_embeddings(root, blocks, modules)
    hidden = getattr(_text_config(model), "hidden_size", None) or _embedding(model).weight.shape[1]
    for block in blocks:
        inside = [name for name in _below(block, modules) if _nearest(name, mixers) is None]
        roles = _feed_forward(block, inside, modules, mixers, hidden)
        _refuse_unread_block(block, inside, modules, mixers, known | roles, settled)
        known |= roles
    known |= {name: "lm_head" for name, module in modules.items() if module is _head(model)}
    known |= {name: "embedding" for name, module in modules.items() if module is _embedding(model)}
    # An override speaks for all below it, but a norm inside a mixer or an MLP stays a norm.
    known = {name: c for name, c in known.items() if c == "norm" or _nearest(name, settled) is None}
    known.update(mixers)
    known.update(settled)

    layers = {block: layer for layer, block in enumerate(blocks)}
    weights = []
    for names in tensors:
        deciding = next((name for name in names if _nearest(name, settled)), names[0])
        nearest = _nearest(deciding, known)
        component = known[nearest] if nearest else "other"
        layer = layers.get(_nearest(names[0], layers) or "")
        weights.append(_weight(model, modules, names, component, layer))
    back = _leading_back(weights, hidden)
    weights = [replace(w, leads_back=True) if w.name in back else w for w in weights]
    return Anatomy(_topology(blocks, mixers), tuple(weights), mixers)


def cross_check(model: nn.Module, anatomy: Anatomy, overrides: Mapping[str, str] = {}) -> bool:
    """Compare the mixers with what a forward pass does to the cache, and with `config.layer_types`.

    The trace outranks the configuration; an override outranks the configuration, but not the trace. A mixer that does
    not touch the cache (it keeps its state on itself, or uses another layer's keys) must agree with the configuration
    where that speaks, and must run. Returns whether the trace could be run: a forward pass that looks at values cannot
    run on `meta` tensors; then all mixers must agree with the configuration.

    Raises `UnknownArchitecture` on a disagreement, and on real tensors whatever the forward pass raises.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    settled = _settle(overrides, [*modules, *(name for names in _tensors(model) for name in names)])
    try:
        traced, ran = watch_forward(model)
    except Exception as error:  # without values, torch raises RuntimeError, and kernels raise what they like
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
        logger.info("%s cannot run on meta tensors, its mixers are not traced: %s", type(model).__name__, error)
        traced, ran = {}, None
    confirmed = set()
    for name, kinds in traced.items():
        mixer = _nearest(name, anatomy.mixers) or next((m for m in anatomy.mixers if _within(m, name)), None)
        seen = f"{' and '.join(sorted(kinds))} state"
        if mixer is None:
            raise UnknownArchitecture(f"{_shown(name, modules)} keeps {seen}, but is no mixer; {_advice(name)}")
        if anatomy.mixers[mixer] not in kinds:
            read = f"{_shown(mixer, modules)} was read as {anatomy.mixers[mixer]}"
            raise UnknownArchitecture(f"{read}, but in a forward pass it keeps {seen}; {_advice(mixer)}")
        confirmed.add(modules[mixer])
    for name in anatomy.mixers:
        if ran is not None and name not in ran:
            raise UnknownArchitecture(
                f"{_shown(name, modules)} does not run in a forward pass; {_advice(name, 'other')}"
            )
    _, blocks, _ = _decoder(model, modules, settled)
    for block, declared in zip(blocks, declared_kinds(_text_config(model), len(blocks)), strict=True):
        if declared is None:
            continue
        wanted = " or ".join(sorted(declared)) or "no mixer"
        mixers = [name for name in anatomy.mixers if _within(name, block)]
        for name in mixers:
            unconfirmed = modules[name] not in confirmed and _nearest(name, settled) is None
            if unconfirmed and anatomy.mixers[name] not in declared:
                read = f"{_shown(name, modules)} was read as {anatomy.mixers[name]}"
                raise UnknownArchitecture(f"{read}, but config.layer_types declares {wanted}; {_advice(name)}")
        if declared and not mixers and not _touched(settled, block):
            raise UnknownArchitecture(f"config.layer_types declares {wanted} for {block}; {_advice(f'{block}.NAME')}")
    return ran is not None


# --- names ---


def _nearest(name: str, among: Collection[str]) -> str | None:
    """The name itself or its nearest ancestor that is `among` these names."""
    while name and name not in among:
        name = name.rpartition(".")[0]
    return name or None


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _below(root: str, modules: Modules) -> list[str]:
    return [name for name in modules if name and (not root or name.startswith(f"{root}."))]


def _touched(settled: Settled, block: str) -> bool:
    """Whether an override concerns the block or something in it."""
    return _nearest(block, settled) is not None or any(_within(name, block) for name in settled)


def _shown(name: str, modules: Modules) -> str:
    return f"{name} ({type(modules[name]).__name__})"


def _advice(name: str, component: Component = "attention") -> str:
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    choice = ", ".join(get_args(Component))
    return f"say what it is in plan.components, for instance {{{pattern!r}: {component!r}}}; choose from {choice}"


def _settle(overrides: Mapping[str, str], names: Collection[str]) -> dict[str, Component]:
    """Name -> component for all names that match a pattern."""
    settled: dict[str, Component] = {}
    for pattern, component in overrides.items():
        if component not in get_args(Component):
            choice = ", ".join(get_args(Component))
            raise ValueError(f"plan.components[{pattern!r}]={component!r} is no component; choose from {choice}")
        matching = [name for name in names if name and fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"plan.components[{pattern!r}] matches no module and no parameter of this model")
        settled |= dict.fromkeys(matching, cast(Component, component))
    return settled


def _tensors(model: nn.Module) -> list[list[str]]:
    """All names of every parameter, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


# --- the decoder and its mixers ---


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def _embedding(model: nn.Module) -> Any:
    return model.get_input_embeddings()  # type: ignore[operator]


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings()  # type: ignore[operator]


def _block_lists(root: str, modules: Modules) -> list[str]:
    """The outermost lists below the root of modules that have parts themselves."""
    lists: list[str] = []
    for name in _below(root, modules):
        module = modules[name]
        if isinstance(module, nn.ModuleList) and _nearest(name, lists) is None and facts.has_parts(module):
            lists.append(name)
    return lists


def _decoder(model: nn.Module, modules: Modules, settled: Settled) -> tuple[str, list[str], dict[str, Mixer]]:
    """The language model's name, its decoder blocks in order, and the mixers in them.

    The language model is the smallest module that holds the input embedding and a list of blocks: towers for other
    modalities beside it stay outside, towers in it lie deeper than its own lists. Each of those lists whose blocks
    contain mixers is a decoder stack.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnknownArchitecture(f"{type(model).__name__} has an encoder: it is no decoder-only language model")
    root = next((name for name, module in modules.items() if module is _embedding(model)), "")
    lists: list[str] = []
    while root and not lists:
        root = root.rpartition(".")[0]
        lists = _block_lists(root, modules)
    if not lists:
        raise UnknownArchitecture(f"{type(model).__name__} has no list of decoder blocks beside its input embedding")
    depth = min(name.count(".") for name in lists)
    stacks = {n: [f"{n}.{i}" for i in range(len(list(modules[n].children())))] for n in lists if n.count(".") == depth}
    mixers = _mixers({block for blocks in stacks.values() for block in blocks}, modules, settled)
    _refuse_unread_mixers(root, stacks.values(), modules, mixers, settled)
    blocks = [block for name, blocks in stacks.items() if any(_within(m, name) for m in mixers) for block in blocks]
    if not blocks:
        advice = _advice(f"{next(iter(stacks))}.0.NAME")
        raise UnknownArchitecture(f"{' and '.join(stacks)} has no mixer that is understood; {advice}")
    return root, blocks, mixers


def _mixers(blocks: Collection[str], modules: Modules, settled: Settled) -> dict[str, Mixer]:
    """Outermost sequence mixers of the blocks. An override may find one inside another, of the other kind."""
    mixers: dict[str, Mixer] = {}
    for name, module in modules.items():  # parents come before children
        if _nearest(name, blocks) in (None, name) or facts.is_leaf(module):
            continue
        outer = _nearest(name, mixers)
        kind = settled.get(name)
        if kind == "attention" or kind == "recurrent":
            if outer is None or mixers[outer] != kind:
                mixers[name] = kind
        elif outer is None and _nearest(name, settled) is None and (kind := _mixer_kind(module)):
            mixers[name] = kind
    return mixers


def _mixer_kind(module: nn.Module) -> Mixer | None:
    own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if any(mark in name for name in own for mark in _DECAYS):
        return "recurrent"
    scaled = any(hasattr(module, name) for name in ("num_key_value_groups", "kv_lora_rank", "scaling"))
    if getattr(module, "is_causal", False) and scaled:
        return "attention"
    if kept := facts.kept_in_cache(type(module)):
        return "attention" if kept == "keys" else "recurrent"
    depthwise = any(isinstance(child, nn.Conv1d) and child.groups > 1 for child in module.children())
    return "recurrent" if depthwise and facts.matrices(module) else None  # without a matrix it only smooths


def _refuse_unread_mixers(
    root: str, stacks: Iterable[Sequence[str]], modules: Modules, mixers: Mapping[str, Mixer], settled: Settled
) -> None:
    """Refuse a module that takes a cache, so mixes positions, but neither is nor holds a mixer that is understood."""
    understood = {*mixers, *settled, *(block for blocks in stacks for block in blocks)}
    unread = [
        name
        for name in _below(root, modules)
        if facts.takes_cache(type(modules[name])) and facts.matrices(modules[name])
        if name not in understood and _nearest(name, mixers) is None and _nearest(name, settled) is None
        if not any(_within(other, name) for other in understood)
    ]
    innermost = [name for name in unread if not any(_within(other, name) for other in unread if other != name)]
    if innermost:
        what = "takes a cache, but is neither attention nor a recurrence that is understood"
        raise UnknownArchitecture(f"{_shown(innermost[0], modules)} {what}; {_advice(innermost[0])}")


def _topology(blocks: Sequence[str], mixers: Mapping[str, Mixer]) -> Topology:
    kinds = [{kind for name, kind in mixers.items() if _within(name, block)} for block in blocks]
    union = set().union(*kinds)
    if len(union) == 1:
        return "attention-only" if union == {"attention"} else "recurrent-only"
    both = [len(kind) == 2 for kind in kinds]
    return "parallel-hybrid" if all(both) else "mixed-hybrid" if any(both) else "sequential-hybrid"


# --- outside the mixers ---


def _norms_and_embeddings(root: str, blocks: Sequence[str], modules: Modules) -> dict[str, Component]:
    """Those of the language model, without towers: parts of it that are no decoder stack but have their own blocks."""
    towers = [name for name in _block_lists(root, modules) if not any(_within(block, name) for block in blocks)]
    prefix = len(root) + 1 if root else 0
    towers = {name[:prefix] + name[prefix:].partition(".")[0] for name in towers}
    known: dict[str, Component] = {}
    for name in _below(root, modules):
        if _nearest(name, towers) is None and (facts.is_norm(modules[name]) or isinstance(modules[name], nn.Embedding)):
            known[name] = "norm" if facts.is_norm(modules[name]) else "embedding"
    return known


def _feed_forward(
    block: str, inside: Sequence[str], modules: Modules, mixers: Mapping[str, Mixer], hidden: int
) -> dict[str, Component]:
    """What the parts of one block outside its mixers are: name -> component, for all below that name.

    Experts are stacks (3-D tensors, or lists of equal modules), and what scores them, beside them, is a router. Else a
    part is an MLP if it leads out of the hidden size and back into it. Others get no entry.
    """
    containers = {block, *(name for name in inside if any(_within(mixer, name) for mixer in mixers))}
    experts: set[str] = set()
    routers: set[str] = set()
    for name in inside:
        count = facts.expert_count(modules[name])
        if not count or name in containers or _nearest(name, experts):
            continue
        parent = name.rpartition(".")[0]
        beside = {n for n in inside if n.rpartition(".")[0] == parent and n not in (name, *containers)}
        scoring = {n for n in beside if facts.scores_experts(modules[n], count, hidden)}
        if isinstance(modules[name], nn.ModuleList) and not scoring:
            continue  # equal modules that nothing chooses from are no experts
        experts.add(name)
        own = modules[parent].named_parameters(recurse=False)
        routers |= scoring | {f"{parent}.{leaf}" for leaf, bias in own if bias.shape == (count,)}
    roles: dict[str, Component] = {}
    for container in containers:
        parts = [n for n in inside if n.rpartition(".")[0] == container and n not in containers]
        loose = [n for n in parts if facts.is_leaf(modules[n]) and facts.matrices(modules[n])]
        if facts.leads_back([shape for name in loose for shape in facts.matrices(modules[name])], hidden):
            roles |= dict.fromkeys(loose, "mlp")
        for part in parts:
            mixture = any(_within(name, part) for name in experts)
            if part not in loose and (mixture or facts.leads_back(facts.matrices(modules[part]), hidden)):
                roles[part] = "mlp"
    gates = [n for n in inside if isinstance(modules[n], nn.Linear) and facts.matrices(modules[n])[0][0] == 1]
    roles |= dict.fromkeys(experts, "expert")
    roles |= dict.fromkeys((*routers, *gates), "router")
    return roles


def _leading_back(weights: Sequence[Weight], hidden: int) -> set[str]:
    """Names of the second layers of MLPs, which may be wider or narrower than they are long. Where an MLP is square,
    every matrix could be it: then the last one."""
    inside: dict[str, list[Weight]] = {}
    for w in weights:
        if w.linear and w.component in ("mlp", "expert"):
            inside.setdefault(w.name.rpartition(".")[0], []).append(w)
    found: set[str] = set()
    for members in inside.values():
        back = [w for w in members if w.shape[0] == hidden and any(s.shape[1] == hidden for s in members if s is not w)]
        found |= {w.name for w in [w for w in back if w.shape[1] != hidden] or back[-1:]}
    return found


def _refuse_unread_block(
    block: str,
    inside: Sequence[str],
    modules: Modules,
    mixers: Mapping[str, Mixer],
    known: Mapping[str, Component],
    settled: Settled,
) -> None:
    """Refuse a block of which neither a mixer nor an MLP is understood, or that has matrices but no MLP among them."""
    if {"mlp", "expert"} & {known.get(name) for name in inside}:
        return
    for name in inside:
        read = _nearest(name, known) or _touched(settled, name) or any(_within(mixer, name) for mixer in mixers)
        if not read and not facts.is_leaf(modules[name]) and facts.matrices(modules[name]):
            raise UnknownArchitecture(f"{_shown(name, modules)} is no MLP that is understood; {_advice(name, 'mlp')}")
    if not any(_within(mixer, block) for mixer in mixers) and not _touched(settled, block):
        raise UnknownArchitecture(f"{_shown(block, modules)} has no mixer and no MLP; {_advice(f'{block}.NAME')}")


# --- one weight ---


def _weight(
    model: nn.Module, modules: Modules, names: Sequence[str], component: Component, layer: int | None
) -> Weight:
    owner, _, leaf = names[0].rpartition(".")
    tensor, module = model.get_parameter(names[0]), modules[owner]
    quantised = not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2  # 8-bit floats come with scales
    shape = facts.linear_shape(module) if leaf == "weight" and (isinstance(module, nn.Linear) or quantised) else None
    short, *tied = [name.removesuffix(".weight") for name in names]
    slices, no_lora = (), None
    if shape is not None:
        parent, _, attribute = owner.rpartition(".")
        slices = facts.fused_parts(modules[parent], attribute, shape[0], _text_config(model), component == "attention")
        no_lora = _no_lora(short, shape, modules)
    return Weight(
        name=short,
        parameter=names[0],
        component=component,
        layer=layer,
        shape=shape or tuple(tensor.shape),
        linear=shape is not None,
        slices=slices,
        tied=tuple(tied),
        no_lora=no_lora,
        quantised=quantised,
    )


def _no_lora(name: str, shape: tuple[int, int], modules: Modules) -> str | None:
    owner, _, path = name.rpartition(".")
    if min(shape) < 2:
        return f"its shape {shape} leaves no room for a low rank"
    while True:
        if facts.bypasses(type(modules[owner]), path) == "always":
            return f"{type(modules[owner]).__name__} computes with its weight directly, past an adapter around it"
        owner, _, attribute = owner.rpartition(".")
        if not attribute or attribute.isdigit():  # code says `self.mixer.out_proj`, but not `self.layers.0`
            return None
        path = f"{attribute}.{path}"
