"""How the sequences of a micro-batch lie in a forward pass, and which layout a model at hand computes exactly.

Packed, sequences follow one another in a single row and nothing is spent on padding; but a layer that does not keep
them apart leaks one into the next without a word. Which layers do depends on family, kernels and attention
implementation, so nothing goes by names: `choose_layout` runs the model on sequences packed and one at a time.

Sequences of one prompt may share it (`prefixes`): the layout `shared`, which is `segments` where that saves little.

No layout has an attention mask, nor a cache: with either, transformers does not look for sequences in `position_ids`.
Tokens of a causal model never see padding on their right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hybrid_rl.learner.prefixes import SharedRow, place, saved_prefixes
from hybrid_rl.settings import ConfigError

Layout = Literal["shared", "segments", "positions", "padded", "single"]
Packing = Literal["auto", "always", "never"]
PACKED: tuple[Layout, ...] = ("shared", "segments", "positions")
_ANY = 1  # token of a pass without sequences


@dataclass(frozen=True)
class ModelInput:
    """Sequences as a model takes them."""

    input_ids: Tensor
    """[B, L]"""
    kwargs: dict[str, Any]
    """What else the model's forward is given."""
    starts: tuple[int, ...]
    """Where each sequence begins in `input_ids.flatten()`, in the order given."""
    prefixes: tuple[int, ...] = ()
    """How many tokens of each are shared with others; empty if none are."""
    tails: tuple[int, ...] = ()
    """Where those behind them begin."""
    saved: int = 0
    """Tokens that others stand in for."""

    def at(self, sequence: int, token: int) -> int:
        """Where a token of a sequence lies."""
        if self.prefixes and token >= self.prefixes[sequence]:
            return self.tails[sequence] + token - self.prefixes[sequence]
        return self.starts[sequence] + token


def arrange(
    rows: Sequence[Sequence[int]],
    layout: Layout,
    device: torch.device | str = "cpu",
    prefixes: Sequence[int] | None = None,
) -> ModelInput:
    """Lay out sequences of tokens; `prefixes`: how many of each are its prompt, for the layout `shared`.

    No sequences make one token that belongs to none, for a rank with nothing to do.
    """
    if layout == "shared" and prefixes is not None and (saved := saved_prefixes(rows, prefixes)):
        return _share(rows, prefixes, sum(saved), device)
    lengths = [len(row) for row in rows] or [1]
    if layout not in PACKED:
        # Padding repeats a token of the sequence: the embedding of a token made for padding is zero, where the backward
        # pass of some families (Gemma 3n) is not finite.
        ids = torch.tensor([[*row, *[row[-1]] * (max(lengths) - len(row))] for row in rows] or [[_ANY]])
        return ModelInput(ids.to(device), {"use_cache": False}, tuple(range(0, len(rows) * ids.shape[1], ids.shape[1])))
    # Equal lengths side by side: our attention takes them in one call.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ends = list(accumulate((lengths[i] for i in order), initial=0))
    flat = [token for i in order for token in rows[i]] if rows else [_ANY]
    kwargs = _packed_kwargs([lengths[i] for i in order], [0] * len(order), device)
    starts = dict(zip(order, ends, strict=False))
    return ModelInput(torch.tensor([flat], device=device), kwargs, tuple(starts[i] for i in range(len(rows))))


def _share(
    rows: Sequence[Sequence[int]], prefixes: Sequence[int], saved: int, device: torch.device | str
) -> ModelInput:
    placed = place(rows, prefixes, device)
    kwargs = _packed_kwargs(placed.lengths, placed.positions, device) | {"shared_row": placed.row}
    ids = torch.tensor([placed.tokens], device=device)
    return ModelInput(ids, kwargs, placed.starts, tuple(prefixes), placed.tails, saved)


def _packed_kwargs(lengths: list[int], positions: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """What a model is told of pieces in a row; `positions`: of each one's first token in its sequence."""
    bounds = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
    _LENGTHS[bounds] = lengths
    # In numpy: a rehearsal's tensors have no values that a size could depend on.
    counts = np.array(lengths)
    numbers = np.repeat(np.arange(len(lengths)), counts)
    places = np.arange(len(numbers)) + (np.array(positions) - (counts.cumsum() - counts))[numbers]
    return {
        "use_cache": False,
        "position_ids": torch.tensor(places.tolist(), device=device)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        # Convolutions and Mamba-2 scans go by this one, gated delta rules by cu_seq_lens_q too. Without the kernels
        # that know them they raise, or ignore both: then the layout is not for this model.
        "seq_idx": torch.tensor(numbers.tolist(), dtype=torch.int32, device=device)[None],
    }


_SEGMENTS = "hybrid_rl_segments"
_SEGMENTED: tuple[Layout, ...] = ("shared", "segments")
"""Layouts of our attention."""
_LENGTHS = WeakTensorKeyDictionary()  # of a cu_seq_lens: reading it in every layer would wait for the device
# What reaches an attention function without meaning anything to it. All else is refused: `s_aux`, `softcap`, `indices`.
_IDLE = {"position_ids", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "use_cache", "cache_position"}
_IDLE |= {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch"}


def use_segment_attention(model: Any) -> bool:
    """Switch a model with PyTorch's attention to ours, which takes a packed row's sequences one by one.

    It needs no mask of L² elements. False, and the model as it was, if it cannot be switched.
    """
    AttentionInterface.register(_SEGMENTS, _segment_attention)
    AttentionMaskInterface.register(_SEGMENTS, _segment_mask)
    text = model.config.get_text_config()
    if text._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(_SEGMENTS)
    return text._attn_implementation == _SEGMENTS


def _segment_mask(
    *, attention_mask: Tensor | None = None, local_size: int | None = None, use_vmap: bool = False, **_: Any
) -> Tensor | None:
    """In place of a mask, the window's size, for a layer that has one: with PyTorch's attention the mask decides."""
    if attention_mask is not None or use_vmap:
        raise NotImplementedError("segment attention knows causal masks and sliding windows only")
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size, device="cpu")


def _segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sequence_group: Any = None,
    shared_row: SharedRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of [B, H, L, D] -> [B, L, H, D]; of the row's sequences if `cu_seq_lens_q` is given, which are
    made up as `shared_row` says.

    With a `sequence_group`, L are this rank's tokens of the row, and it attends with its share of the heads.
    """
    refused = sorted(name for name, given in kwargs.items() if given is not None and name not in _IDLE)
    if refused:
        raise NotImplementedError(f"segment attention does not know {', '.join(refused)}")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise NotImplementedError("segment attention is causal")
    window = None if attention_mask is None else int(attention_mask)
    if sliding_window != window:
        raise NotImplementedError(f"a layer with sliding_window={sliding_window} got the mask of {window}")

    def attend(q: Tensor, k: Tensor, v: Tensor, band: Tensor | None = None) -> Tensor:
        if band is None and window is not None and q.shape[2] > window:
            band = q.new_ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(1 - window)
        return sdpa_attention_forward(module, q, k, v, band, dropout=dropout, scaling=scaling, is_causal=True)[0]

    if cu_seq_lens_q is None:
        return attend(query, key, value), None
    if shared_row is not None:
        return shared_row.attend(query, key, value, attend, window), None
    if sequence_group is not None:
        # All the row's tokens for some of the heads, in place of the reverse.
        query, key, value = (
            _all_to_all(sequence_group, x.transpose(1, 2), 2, 1).transpose(1, 2) for x in (query, key, value)
        )
    lengths = _LENGTHS.get(cu_seq_lens_q) or cu_seq_lens_q.diff().tolist()
    runs = [(length, len(list(equal))) for length, equal in groupby(lengths)]
    # One `split` of the row: its gradient is put together once, where slices would add up as many rows.
    pieces = zip(*(x[0].split([n * size for n, size in runs], dim=1) for x in (query, key, value)), strict=True)
    rows = [
        [x.unflatten(1, (-1, n)).transpose(0, 1) for x in piece] for (n, _), piece in zip(runs, pieces, strict=True)
    ]
    output = torch.cat([attend(*qkv).flatten(0, 1) for qkv in rows])[None]
    return output if sequence_group is None else _all_to_all(sequence_group, output, 1, 2), None


def _all_to_all(group: Any, x: Tensor, scattered: int, gathered: int) -> Tensor:
    """DeepSpeed's, imported at first use: the driver, which packs sequences too, does without it."""
    from deepspeed.sequence.layer import _SeqAllToAll

    return _SeqAllToAll.apply(group, x, scattered, gathered, 0)


@dataclass(frozen=True)
class LayoutReport:
    """By layout, how far it is from one sequence at a time with the model's own attention; infinite where it raised."""

    errors: dict[str, float]
    """Largest difference of a log-probability, in nats."""
    gradient_errors: dict[str, float]
    """Difference of the gradient in the input embeddings, relative to its norm; the worst sequence's."""
    leaks: dict[str, float]
    """Largest gradient of a sequence's log-probabilities in another's embeddings, relative to that in its own."""
    raised: dict[str, str]
    """What the model raised."""
    chosen: Layout
    reason: str


def choose_layout(
    model: Any,
    *,
    packing: Packing = "auto",
    tolerance: float = 1e-3,
    vocab_size: int | None = None,
    sharing: bool = False,
) -> LayoutReport:
    """Try the layouts on `model`, fastest first, and settle on the first that gives what single sequences give.

    The model is left as it was, but with segment attention if that is the choice. `tolerance` is of log-probabilities;
    gradients, where rounding adds up over layers, may be off by ten times as much. No gradient at all may pass from
    one sequence to another, which tells a small leak from rounding in any precision. With `sharing`, `shared` is tried
    too. Raises `ConfigError` if `packing` is "always" and no packed layout is exact.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    longest = min(getattr(config, name, None) or 2**31 for name in ("max_position_embeddings", "max_seq_len"))
    pad = getattr(config, "pad_token_id", None)
    tokens = torch.tensor([t for t in range(vocab_size or config.vocab_size) if t != pad])
    drawn = [torch.randint(len(tokens), (min(n, longest),), generator=generator) for n in (70, 37, 5, 101, 37)]
    rows = [tokens[indices].tolist() for indices in drawn]
    for row, other, length in ((rows[1], rows[0], 20), (rows[4], rows[3], 30)):
        row[:length] = other[:length]
    prefixes = [min(n, len(row)) for n, row in zip((20, 20, 5, 30, 30), rows, strict=True)]
    weights = [torch.randn(len(row) - 1, generator=generator) for row in rows]
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    original = {key: part._attn_implementation for key, part in parts.items() if part and part._attn_implementation}
    original[""] = model.config._attn_implementation
    packed = PACKED if sharing else PACKED[1:]
    layouts: tuple[Layout, ...] = ("padded",) if packing == "never" else (*packed, "padded")
    errors, gradient_errors, leaks = ({str(layout): math.inf for layout in layouts} for _ in range(3))
    raised: dict[str, str] = {}
    with at_rest(model):
        model.requires_grad_(False)
        singles = [_trial(model, [row], "single", [weight]) for row, weight in zip(rows, weights, strict=True)]
        for layout in layouts:
            try:
                if layout in PACKED and getattr(config, "attention_chunk_size", None):
                    raise NotImplementedError("chunks of attention are counted along the row")
                if layout in _SEGMENTED and not use_segment_attention(model):
                    raise NotImplementedError(f"attention is {config._attn_implementation}, or not to be switched")
                logprobs, gradients, leak = _trial(model, rows, layout, weights, prefixes)
            except Exception as error:  # whatever a model raises in a layout says that it does not work there
                raised[layout] = f"{type(error).__name__}: {error}".partition("\n")[0]
                continue
            finally:
                if layout in _SEGMENTED:
                    model.set_attn_implementation(original)
            leaks[layout] = leak
            absolute = [(x - y[0]).abs().max() for x, (y, _, _) in zip(logprobs, singles, strict=True)]
            expected = (
                _shared_gradients(singles, rows, prefixes) if layout == "shared" else [y[0] for _, y, _ in singles]
            )
            relative = [(x - y).norm() / y.norm() for x, y in zip(gradients, expected, strict=True)]
            # Tensors' maximum is NaN if any is; Python's is not.
            errors[layout], gradient_errors[layout] = (float(torch.stack(x).max()) for x in (absolute, relative))
    chosen: Layout = "single"
    reason = ""
    for layout in layouts:
        error, gradient_error, leak = errors[layout], gradient_errors[layout], leaks[layout]
        numbers = f"log-probabilities off by {error:.1e}, gradients by {gradient_error:.1e}, leak {leak:.1e}"
        reason += f"{'; ' if reason else ''}{layout}: {raised.get(layout, numbers)}"
        if error <= tolerance and gradient_error <= 10 * tolerance and leak == 0:
            chosen = layout
            break
    if packing == "always" and chosen not in PACKED:
        raise ConfigError(f"learner.packing=always: no packed layout keeps sequences of this model apart ({reason})")
    if chosen in _SEGMENTED:
        use_segment_attention(model)
    return LayoutReport(errors, gradient_errors, leaks, raised, chosen, reason)


def _trial(
    model: Any, rows: list[list[int]], layout: Layout, weights: list[Tensor], prefixes: list[int] | None = None
) -> tuple[Any, Any, float]:
    """By row, log-probabilities and the gradient of all rows' weighted sum in its embeddings; the leak between rows."""
    device = next(model.parameters()).device
    given = arrange(rows, layout, device, prefixes)
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1]

    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        logits = model(input_ids=given.input_ids, **given.kwargs).logits.flatten(0, 1)
    finally:
        hook.remove()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    places = [[given.at(i, t) for t in range(len(row))] for i, row in enumerate(rows)]
    logprobs = [
        torch.log_softmax(logits[at[:-1]], -1).gather(-1, torch.tensor(row[1:], device=device)[:, None])[:, 0]
        for at, row in zip(places, rows, strict=True)
    ]
    sums = [weight.to(x) @ x for weight, x in zip(weights, logprobs, strict=True)]
    # Every other sequence of the row: what then reaches those in between has leaked.
    halves = [
        torch.autograd.grad(torch.stack(sums[half::2]).sum(), leaves[0], retain_graph=True)[0].flatten(0, 1)
        for half in range(min(2, len(rows)))
    ]
    total = sum(halves, torch.zeros_like(halves[0]))
    own = [at[given.prefixes[i] :] if given.prefixes else at for i, at in enumerate(places)]
    others = [float(halves[1 - i % 2][at].abs().max()) for i, at in enumerate(own) if at and len(halves) > 1]
    most = max(float(halves[i % 2][at].abs().max()) for i, at in enumerate(places))
    return [x.detach() for x in logprobs], [total[at] for at in places], max(others, default=0.0) / most


def _shared_gradients(singles: list[Any], rows: list[list[int]], prefixes: list[int]) -> list[Tensor]:
    """What each row's embeddings should get, where a prefix stands in for those of all rows that begin with it."""
    found = []
    for row, length, (_, own, _) in zip(rows, prefixes, singles, strict=True):
        alike = [g[0] for r, n, (_, g, _) in zip(rows, prefixes, singles, strict=True) if r[:n] == row[:length]]
        found.append(torch.cat([torch.stack([g[:length] for g in alike]).sum(0), own[0][length:]]))
    return found


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with gradients; afterwards modes, and what is trained, are as before."""
    training = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
