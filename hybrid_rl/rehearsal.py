"""A pass of the model on tensors that have shapes but no values: what memory it takes, whatever the architecture.

torch's fake tensors go through the learner's own code, forward and backward, and the bytes of the storages alive are
added up at every operation: exact for what autograd keeps and for every temporary that is a tensor of its own. What
kernels allocate within themselves is not seen.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrid_rl.adaptation import apply_plan
from hybrid_rl.config import Config
from hybrid_rl.estimate import CacheSize, Pass
from hybrid_rl.learner.layout import arrange, use_segment_attention
from hybrid_rl.learner.logprobs import Head, PolicyModel
from hybrid_rl.plan import AdaptationPlan

logger = logging.getLogger(__name__)


class _Alive(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Of what was there before."""
        self._known |= {tensor.untyped_storage()._cdata: 0 for tensor in tensors}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, FakeTensor):
                self._see(tensor.untyped_storage())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def rehearse_pass(
    config: Config, model: Any, plan: AdaptationPlan, lengths: Sequence[int], predicted: int
) -> Pass | None:
    """What the learner's pass over a micro-batch of sequences of `lengths` tokens, `predicted` of them sampled, holds
    under `plan`; `model` is on the meta device. `None`, with a line in the log, for a model that cannot run so."""
    model = copy.deepcopy(model)  # no data is copied
    try:
        adapted = apply_plan(model, plan)
        adapted.cast(getattr(torch, config.model.dtype))
        return _rehearsed(config, model, lengths, predicted)
    except Exception as error:  # kernels raise what they like where there are no values
        logger.warning("activations are not estimated: %s", str(error).partition("\n")[0])
        return None


def _rehearsed(config: Config, model: Any, lengths: Sequence[int], predicted: int) -> Pass:
    if config.learner.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    packs = config.learner.packing != "never" and use_segment_attention(model)
    alive, kept = _Alive(), []
    with FakeTensorMode() as fake:
        _without_values(model, fake)
        model.train()
        head = Head(
            model.get_decoder(), model.get_output_embeddings(), model.config.get_text_config().vocab_size, 1, None
        )
        policy = PolicyModel(model, temperature=1.0, chunk_mib=config.learner.logits_mib, head=head)
        given = arrange([[1] * n for n in lengths], "segments" if packs else "padded")
        at_T = torch.zeros(predicted, dtype=torch.long)
        for parameter in model.parameters():
            if parameter.requires_grad:  # DeepSpeed takes each as it comes
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        alive.ignore([*model.parameters(), *model.buffers()])
        head.decoder.register_forward_hook(lambda *_: kept.append(alive.now))
        with alive:
            entropy = "grad" if config.algo.entropy_coef else True
            found = policy(given.input_ids, at_T, at_T, entropy=entropy, **given.kwargs)
            torch.cat([x for x in found if x.requires_grad]).sum().backward()
    return Pass(min(kept[0], alive.peak), alive.peak - min(kept[0], alive.peak))


def rehearse_cache(model: Any, dtype: torch.dtype) -> CacheSize | None:
    """What a sequence leaves in the model's cache; `model` is on the meta device. `None` if it cannot run so."""
    few, more = 8, 24
    model = copy.deepcopy(model).to(dtype)
    try:
        with FakeTensorMode() as fake:
            _without_values(model, fake)
            model.eval()
            sizes = [_cached(model, tokens) for tokens in (few, more)]
    except Exception as error:  # as above
        logger.warning("the cache is not estimated: %s", str(error).partition("\n")[0])
        return None
    per_token = (sizes[1] - sizes[0]) // (more - few)
    return CacheSize(per_token, max(0, sizes[0] - few * per_token))


@torch.no_grad()
def _cached(model: Any, tokens: int) -> int:
    ids, alive = torch.zeros(1, tokens, dtype=torch.long), _Alive()
    alive.ignore([*model.parameters(), *model.buffers(), ids])
    with alive:
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return alive.now if cache is not None else 0


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _without_values(model: nn.Module, fake: FakeTensorMode) -> None:
    """Put fake tensors of the CPU, which code may ask for their device, in place of the meta ones."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
                if tensor is not None:
                    held[name] = made[tensor]
