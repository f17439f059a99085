"""A learner without training: a model under a plan, moved at random, and published to engines."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import AdaptedModel, apply_plan
from hybrid_rl.cluster.base import worker_environment
from hybrid_rl.components import read_model
from hybrid_rl.config import Config
from hybrid_rl.plan import AdaptationPlan, PlannedModule
from hybrid_rl.rollout import EngineSettings, RolloutEngine
from hybrid_rl.types import Bucket, Completion, WeightUpdate
from hybrid_rl.weight_sync import Publisher, Transport, lora_names, served_tensors

RANK = 4


class Memory(Transport):
    """Tickets are numbers into a list; `damaged` ones arrive with a byte changed, `lost` ones not at all."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.damaged: set[int] = set()

    def put(self, payload: bytes, what: str) -> int:
        self.payloads.append(payload)
        return len(self.payloads) - 1

    def get(self, ticket: int, what: str) -> bytes:
        payload = self.payloads[ticket]
        return payload[:-1] + bytes([payload[-1] ^ 1]) if ticket in self.damaged else payload


class Learner:
    """A plan that treats neighbours of one fused projection differently; `full` lists ends of names, `more` what is
    trained beside layers' matrices."""

    def __init__(
        self,
        path: Path,
        transport: Memory,
        full: Sequence[str],
        dtype: torch.dtype = torch.float32,
        rank: int = RANK,
        more: Sequence[str] = (),
    ) -> None:
        self.transport, self.dtype, self.path, self.rank = transport, dtype, path, rank
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        anatomy = read_model(model)
        modules = tuple(
            PlannedModule(c.name, c.component, c.layer, c.shape, c.params, None, None, None, "full")
            if c.name.endswith(tuple(full))
            else PlannedModule(c.name, c.component, c.layer, c.shape, c.params, None, rank, 6.0, "lora")
            for c in [*anatomy.candidates, *(w for w in anatomy.weights if w.name in more)]
        )
        self.adapted: AdaptedModel = apply_plan(model, AdaptationPlan("m", "attention-only", {}, 0, modules))
        self.publisher = self.new_publisher()
        self.version = 0

    def new_publisher(self, bucket_bytes: int = 2**16) -> Publisher:
        return Publisher(self.transport, dtype=self.dtype, bucket_bytes=bucket_bytes, anchor_every=1000, sparse=True)

    @property
    def lora_modules(self) -> tuple[str, ...]:
        return tuple(self.adapted.adapters)

    @property
    def full_names(self) -> tuple[str, ...]:
        return tuple(self.adapted.full)

    @torch.no_grad()
    def move(self, seed: int, share: float = 1.0, scale: float = 0.1) -> None:
        """Change a `share` of the elements of everything that is trained."""
        torch.manual_seed(seed)
        for parameter in [*self.adapted.full.values(), *self.adapted.adapter_parameters]:
            moved = torch.rand_like(parameter, dtype=torch.float32) < share
            parameter.add_(scale * torch.randn_like(parameter) * moved)

    def tensors(self) -> dict[str, Tensor]:
        return dict(served_tensors(self.adapted))

    def publish(self) -> WeightUpdate:
        self.version += 1
        return self.publisher.publish(self.tensors().items(), self.version, self.rank)

    def anchor(self) -> WeightUpdate:
        """As `publish`, but complete."""
        self.publisher.restart()
        return self.publish()

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """Name -> weight of every trained matrix, LoRA merged into the base as engines define it."""
        tensors = {name: t.detach().to(self.dtype) for name, t in self.tensors().items()}
        modules: dict[str, Any] = dict(self.adapted.model.named_modules())
        found = {name: tensors[name] for name in self.adapted.full}
        for module in self.adapted.adapters:
            a, b = (tensors[n].float() for n in lora_names(module))
            base = modules[module].base_layer.weight
            found[f"{module}.weight"] = torch.addmm(base.float(), b, a).to(self.dtype)
        return found

    @torch.no_grad()
    def logprobs(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
        """Of `tokens` after `prompt`."""
        logits = self.adapted.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits
        return _chosen(logits[0, len(prompt) - 1 : -1] / temperature, tokens)

    @torch.no_grad()
    def prefilled(self, ids: Sequence[int]) -> Any:
        """Keys and values of `ids` under the weights of now."""
        return self.adapted.model(input_ids=torch.tensor([list(ids)]), use_cache=True).past_key_values

    @torch.no_grad()
    def continued(self, cache: Any, last: int, tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
        """Log-probabilities of `tokens` after `cache` and `last`."""
        logits = self.adapted.model(input_ids=torch.tensor([[last, *tokens]]), past_key_values=cache).logits
        return _chosen(logits[0, :-1] / temperature, tokens)


def damage(update: WeightUpdate, transport: Memory, bucket: int) -> WeightUpdate:
    """The same update, with a bucket that arrives damaged."""
    buckets = list(update.buckets)
    ticket = transport.put(transport.payloads[buckets[bucket].ticket], "")
    transport.damaged.add(ticket)
    buckets[bucket] = replace(buckets[bucket], ticket=ticket)
    return replace(update, buckets=tuple[Bucket, ...](buckets))


def settings_for(path: Path, transport: Memory, **changes: Any) -> EngineSettings:
    settings = EngineSettings("engine-x", str(path), "float32", False, 384, RANK, 8, 0.5, 0, transport)
    return replace(settings, **changes)


def settings_of(learner: Learner, **changes: Any) -> EngineSettings:
    """An engine that `learner`'s plan can be served by."""
    trained = {"lora_modules": learner.lora_modules, "full_names": learner.full_names}
    return settings_for(learner.path, learner.transport, **trained, **changes)


@contextmanager
def started(kind: str, settings: EngineSettings) -> Iterator[RolloutEngine]:
    """An engine of a kind, and its memory freed afterwards."""
    if kind == "transformers":
        from hybrid_rl.rollout.transformers_engine import TransformersEngine

        yield TransformersEngine(settings)
        return
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "a.json", "eval": "a.json"}})
    os.environ.update(worker_environment(config, gpus=False))
    from vllm.distributed import cleanup_dist_env_and_memory

    from hybrid_rl.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(settings)
    try:
        yield engine
    finally:
        engine._engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def vllm_model(engine: Any) -> Any:
    """The model in vLLM's worker."""
    return engine._engine.model_executor.driver_worker.worker.model_runner.model


def model_of(engine: Any) -> dict[str, Tensor]:
    """Copies of all tensors that an engine computes with, by the engine's own names."""
    model = engine._model if hasattr(engine, "_model") else vllm_model(engine)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def check_logprobs(completion: Completion, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=tolerance, rtol=0)


def _chosen(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, torch.tensor(list(tokens))[:, None])[:, 0]
