"""A causal LM as log-probabilities of given tokens. Its logits exist for one chunk of tokens at a time.

At a vocabulary of 150,000 tokens the logits of a micro-batch, their gradient and their softmax take more memory than
all else. Here the head runs over chunks of the positions that are asked for, and again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from deepspeed.runtime.zero.partition_parameters import register_external_parameter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybrid_rl.learner.layout import at_rest

Entropy = Literal[False, True, "grad"]


@dataclass(frozen=True)
class Head:
    """How a model gets from hidden states to logits: `scale · module(h)`, bent to `cap · tanh(· / cap)` if capped."""

    decoder: nn.Module
    module: nn.Module
    vocab_size: int
    scale: float
    cap: float | None

    def finish(self, logits: Tensor, scale: float = 1.0) -> Tensor:
        """What the model does to its head's output, and `scale`; in fp32 or better."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.cap is not None:
            return torch.tanh(logits * (self.scale / self.cap)) * (self.cap * scale)
        return logits if self.scale * scale == 1.0 else logits * (self.scale * scale)


def read_head(model: Any) -> Head | str:
    """The head of `model` with real weights, or why it cannot be told from the outside.

    Families scale or cap their logits in their own ways. The model is run on a few tokens with known values in place
    of its head's output, which shows what it does to them; what comes of that must then give the model's own logits.
    """
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Module):
        return "it has no output head"
    known = min(50, model.get_input_embeddings().num_embeddings)
    ids = torch.randint(min(2, known - 1), known, (2, 8), generator=torch.Generator().manual_seed(0)).to(model.device)
    seen: list[Tensor] = []

    def ramp(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        steps = torch.linspace(-25, 25, output.shape[-1], dtype=torch.float64, device=output.device)
        seen.extend((args[0].detach(), 1e-3 * torch.sinh(steps)))
        return seen[1].expand_as(output)

    with at_rest(model):
        hook = module.register_forward_hook(ramp)
        try:
            bent = model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        if not seen or bent.requires_grad:
            return "its logits are not made from the head's by constants"
        x, y = seen[1], bent[0, 0].double()
        middle = len(x) // 2 + 1
        scale, cap = float(y[middle] / x[middle]), None
        scale = 1.0 if abs(scale - 1) < 1e-6 else scale
        if not torch.allclose(y, scale * x, rtol=1e-5):
            cap = float(y[-1])
            if not torch.allclose(y, cap * torch.tanh(x * (scale / cap)), rtol=1e-5, atol=1e-6 * abs(cap)):
                return "what it does to its logits is neither a scale nor a soft cap"
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            for decoder in (model.base_model, model.get_decoder(), getattr(model, "model", model)):
                if decoder is model or (hidden := decoder(input_ids=ids, use_cache=False)[0]).shape != seen[0].shape:
                    continue
                head = Head(decoder, module, logits.shape[-1], scale, cap)
                error = head.finish(module(hidden)) - logits
                if error.abs().max() <= 8 * torch.finfo(logits.dtype).eps * logits.abs().max():
                    return head
    return "its decoder's output, through the head, does not give its logits"


class PolicyModel(nn.Module):
    """What DeepSpeed wraps: token ids in, log-probabilities of the tokens asked for out."""

    def __init__(self, model: Any, *, temperature: float, chunk_mib: int, head: Head | str | None = None) -> None:
        """`head`: what `read_head` says, which is asked where it is not given."""
        super().__init__()
        self.model = model
        head = head or read_head(model)
        self.whole_logits: str | None = None if isinstance(head, Head) else head
        """Why the logits of a whole micro-batch are made; `None` if they are not."""
        self._scale = 1 / temperature
        if isinstance(head, Head):
            self._chunks = _Chunks(head, self._scale, max(1, chunk_mib * 2**20 // (4 * head.vocab_size)))

    def forward(
        self, input_ids: Tensor, at_T: Tensor, targets_T: Tensor, entropy: Entropy = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of `targets_T` at the temperature, and the entropy of what they were drawn from; >= fp32.

        `at_T` are the positions in the flattened [B, L] whose next token is meant; `kwargs` go to the model. The
        entropy is empty unless asked for, and has a gradient if it is "grad". With no positions the results are empty,
        but a backward pass through them goes through every layer, as other ranks' does.
        """
        if (count := len(at_T)) == 0:
            at_T = targets_T = at_T.new_zeros(1)
        if self.whole_logits is not None:
            logits = self.model(input_ids=input_ids, **kwargs).logits.flatten(0, 1).index_select(0, at_T)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self._scale
            logprobs, entropies = _measure(logits, targets_T, entropy)
        else:
            hidden = self._chunks.head.decoder(input_ids=input_ids, **kwargs)[0].flatten(0, 1).index_select(0, at_T)
            logprobs, entropies = self._chunks(hidden, targets_T, entropy)
        return logprobs[:count], entropies[:count]


class _Chunks(nn.Module):
    """The head over chunks of positions, as one module: ZeRO-3 gathers the head's weights once for all chunks."""

    def __init__(self, head: Head, scale: float, tokens: int) -> None:
        super().__init__()
        self.head = head  # a dataclass, not a submodule: its parameters are the model's
        self._scale = scale
        self._tokens = tokens
        for parameter in head.module.parameters():
            register_external_parameter(self, parameter)

    def forward(self, hidden_T: Tensor, targets_T: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor]:
        count = -(-len(hidden_T) // self._tokens)
        if list(self.head.module.children()) and any(hasattr(p, "ds_id") for p in self.head.module.parameters()):
            # The modules of a LoRA head call ZeRO-3's hooks in every chunk; ranks must have as many of them.
            most = torch.tensor(count, device=hidden_T.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            count = int(most)
        pieces = zip(hidden_T.tensor_split(count), targets_T.tensor_split(count), strict=True)
        if count == 1 or not torch.is_grad_enabled():
            done = [self._chunk(hidden, targets, entropy) for hidden, targets in pieces]
        else:
            options: Any = {"use_reentrant": False, "preserve_rng_state": False}
            done = [checkpoint(self._chunk, hidden, targets, entropy, **options) for hidden, targets in pieces]
        logprobs, entropies = zip(*done, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk(self, hidden: Tensor, targets: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor]:
        # Past the head's hooks: ZeRO-3 has gathered the weights for this module, and ranks differ in their chunks.
        return _measure(self.head.finish(self.head.module.forward(hidden), self._scale), targets, entropy)


def _measure(logits: Tensor, targets: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor]:
    total = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - total
    if not entropy:
        return logprobs, logprobs.new_empty(0)
    if entropy != "grad":
        logits, total = logits.detach(), total.detach()
    # H = log Z - E[logit]
    return logprobs, total - torch.einsum("tv,tv->t", torch.softmax(logits, -1), logits)
