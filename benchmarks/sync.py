"""Weight sync: what it sends, how long it takes, and what the receipts cost.

    python benchmarks/sync.py [bytes|speed|all] [--steps 20] [--json]

bytes  bytes of an update as a share of the whole bf16 model, at Qwen3-0.6B's shapes (28 layers, hidden 1024, 16 heads
       and 8 key-value heads of 128, MLP 3072, embedding 151,936): random weights of deviation 0.02, 10 % of the
       candidates' parameters full, LoRA of rank 8 on every other linear layer, fp32 masters, AdamW at 1e-6 (full) and
       1e-5 (LoRA). Gradients are random: `independent` ones at each step, and `constant` ones, with which AdamW moves
       every weight by its whole learning rate in one direction at every step: no training changes more. Mean over the
       steps after the first update, which is an anchor. Goal: 0.7 % of the model, encoded in 0.5 s by one thread.
speed  seconds from the learner's tensors to an engine's receipt, at a 100 M model and in this process: our sync into
       the transformers engine, against the usual one: merge the adapter, send every weight, load it. Both by the same
       transport (files in memory); rounds alternate. Goal: 5 times. And the receipts' share of our sync: digests on
       both sides and their comparison. Goal: 5 %.

Times are CPU seconds of one thread, and the files are in memory, so that little is waited for. `--json` prints one JSON
object instead of the tables.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from hybrid_rl.rollout.engine import EngineSettings
from hybrid_rl.rollout.transformers_engine import TransformersEngine
from hybrid_rl.weight_sync import Directory, Publisher, digest, lora_factors, pack, unpack, verify_receipts
from trainers.warm_start import build_tokenizer

PACKAGES = ("hybrid-rl", "torch", "transformers", "safetensors", "xxhash")
LARGE = {"hidden": 1024, "layers": 28, "heads": 16, "kv_heads": 8, "mlp": 3072, "vocabulary": 151_936}
SMALL = {"hidden": 768, "layers": 12, "heads": 6, "kv_heads": 3, "mlp": 2048, "vocabulary": 32_000}
HEAD, RANK, SCALING, BUDGET, STD = 128, 8, 2.0, 0.1, 0.02
FULL_LR, LORA_LR = 1e-6, 1e-5


def linear_shapes(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int) -> dict[str, tuple]:
    """Shape [out, in] of every linear layer, by module name."""
    of_layer = {
        "self_attn.q_proj": (heads * HEAD, hidden),
        "self_attn.k_proj": (kv_heads * HEAD, hidden),
        "self_attn.v_proj": (kv_heads * HEAD, hidden),
        "self_attn.o_proj": (hidden, heads * HEAD),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in of_layer.items()}


class Policy:
    """Trained tensors of a hybrid plan: fp32 masters that AdamW moves by made-up gradients, and their bf16 copies."""

    def __init__(self, shapes: dict[str, tuple], constant: bool) -> None:
        left, self._full, self._lora = BUDGET * sum(a * b for a, b in shapes.values()), {}, {}
        for name, (rows, columns) in sorted(shapes.items(), key=lambda item: hash_of(item[0])):  # spread over layers
            if rows * columns <= left:
                left -= rows * columns
                self._full[f"{name}.weight"] = STD * torch.randn(rows, columns)
            else:  # as PEFT begins: A uniform, B zero
                a = (torch.rand(RANK, columns) * 2 - 1) / columns**0.5
                self._lora[name] = a, torch.zeros(rows, RANK)
        factors = [f for pair in self._lora.values() for f in pair]
        groups = [{"params": list(self._full.values()), "lr": FULL_LR}, {"params": factors, "lr": LORA_LR}]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self._constant = constant
        self.publish_copies()

    def step(self) -> None:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None or not self._constant:
                    p.grad = torch.randn_like(p)
        self._optimizer.step()
        self.publish_copies()

    def publish_copies(self) -> None:
        """What a learner computes with."""
        self.full = {name: p.bfloat16() for name, p in self._full.items()}
        self.lora = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in self._lora.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.full.items()
        for name, (a, b) in self.lora.items():
            yield from lora_factors({name: (a, b, SCALING)}, RANK).items()


def hash_of(name: str) -> str:
    return digest(torch.frombuffer(bytearray(name.encode()), dtype=torch.uint8))


def publisher(transport: Directory, anchor_every: int = 50) -> Publisher:
    return Publisher(transport, dtype=torch.bfloat16, bucket_bytes=256 * 2**20, anchor_every=anchor_every, sparse=True)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of this process's one thread, which other load on the cores does not change much, and the result."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def bytes_sent(console: Console, steps: int, scratch: Path) -> dict[str, Any]:
    shapes = linear_shapes(**LARGE)
    linear = sum(a * b for a, b in shapes.values())
    model = 2 * (linear + LARGE["vocabulary"] * LARGE["hidden"])  # the norms are 0.1 MB
    table = Table("gradients", "kind", "MB", "of the model", "of what is trained", "seconds to publish (largest)")
    table.title = f"bytes: Qwen3-0.6B's shapes, {model / 1e6:,.0f} MB in bf16; AdamW at {FULL_LR:g} and {LORA_LR:g}"
    results: dict[str, Any] = {"model_bytes": model, "linear": linear}
    for gradients in ("independent", "constant"):
        policy, transport = Policy(shapes, gradients == "constant"), Directory(scratch, 10)
        source = publisher(transport, anchor_every=steps + 2)
        anchor_seconds, anchor = timed(lambda p=policy, s=source: s.publish(p.tensors(), 0, RANK))
        sizes, seconds = [], []
        for version in range(1, steps + 1):
            policy.step()
            took, update = timed(lambda v=version, p=policy, s=source: s.publish(p.tensors(), v, RANK))
            assert update.base_version == version - 1
            sizes.append(update.bytes)
            seconds.append(took)
        transport.close()
        full = sum(t.numel() for t in policy.full.values())
        delta = sum(sizes) / steps
        rows = {
            "anchor": (anchor.bytes, [anchor_seconds]),
            "update": (delta, seconds),
            "mean of 50, one an anchor": ((anchor.bytes + 49 * delta) / 50, []),
        }
        for kind, (size, took) in rows.items():
            shown = f"{sum(took) / len(took):.2f} ({max(took):.2f})" if took else ""
            shares = f"{size / model:.2%}", f"{size / anchor.bytes:.1%}"
            table.add_row(gradients, kind, f"{size / 1e6:.2f}", *shares, shown)
        results[gradients] = {
            "anchor_bytes": anchor.bytes, "anchor_seconds": anchor_seconds, "update_bytes": sizes, "seconds": seconds,
            "update_share": delta / model, "full_share": full / linear, "lora_modules": len(policy.lora),
        }  # fmt: skip
    table.caption = f"full: {full:,} parameters, {full / linear:.1%} of the candidates'; {steps} updates"
    console.print(table)
    return results


def make_model(path: Path) -> Any:
    torch.manual_seed(0)
    s = SMALL
    config = Qwen3Config(
        vocab_size=s["vocabulary"], hidden_size=s["hidden"], intermediate_size=s["mlp"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"], head_dim=HEAD, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return model


def speed(console: Console, rounds: int, scratch: Path) -> dict[str, Any]:
    path = scratch / "model"
    base = make_model(path)
    weights = base.state_dict()
    transport = Directory(scratch, 10)
    policy, source = Policy(linear_shapes(**SMALL), constant=True), publisher(transport)
    engine = TransformersEngine(
        EngineSettings(
            "engine-0", str(path), "bfloat16", False, 64, RANK, 16, 0.5, 0, transport, lora_modules=tuple(policy.lora)
        )
    )
    held = {name: t.clone() for name, t in weights.items() if name != "lm_head.weight"}

    def ours(version: int) -> dict[str, float]:
        export, update = timed(lambda: source.publish(policy.tensors(), version, RANK))
        applied, receipt = timed(lambda: engine.apply_updates([update]))
        verify, _ = timed(lambda: verify_receipts(update, [receipt]))
        tensors = {name: t.bfloat16() for name, t in policy.tensors()}
        digests, _ = timed(lambda: [digest(t) for t in tensors.values()])
        receipts = 2 * digests + verify
        return {"seconds": export + applied + verify, "export": export, "apply": applied, "receipts": receipts} | {
            "bytes": update.bytes
        }

    def usual(_: int) -> dict[str, float]:
        def send() -> list[Any]:
            merged = {**held_base, **policy.full}
            for name, (a, b) in policy.lora.items():
                weight = weights[f"{name}.weight"]
                merged[f"{name}.weight"] = torch.addmm(weight, b, a, alpha=SCALING)
            return [transport.put(pack({name: {"": t} for name, t in merged.items()}), "everything")]

        def load(tickets: list[Any]) -> int:
            count = 0
            for ticket in tickets:
                payload = transport.get(ticket, "everything")
                count += len(payload)
                for record in unpack(payload):
                    record.write_to(held[record.name])
                transport.drop(ticket)
            return count

        export, tickets = timed(send)
        applied, count = timed(lambda: load(tickets))
        return {"seconds": export + applied, "export": export, "apply": applied, "receipts": 0.0, "bytes": count}

    held_base = {name: weights[name] for name in held}
    found: dict[str, list[dict[str, float]]] = {"hybrid-rl": [], "everything, merged": []}
    for version in range(rounds + 1):
        for name, side in (("hybrid-rl", ours), ("everything, merged", usual)):
            result = side(version)
            if version:  # the first is an anchor, and warms up
                found[name].append(result)
        policy.step()
    transport.close()
    parameters = sum(t.numel() for t in held.values())
    table = Table(
        "side", "seconds", "export", "apply", "MB", "receipts' share", title=f"speed: {parameters:,} parameters"
    )
    medians = {name: {k: median(r[k] for r in rows) for k in rows[0]} for name, rows in found.items()}
    for name, row in medians.items():
        share = f"{row['receipts'] / row['seconds']:.1%}" if row["receipts"] else ""
        table.add_row(
            name, *(f"{row[k]:.3f}" for k in ("seconds", "export", "apply")), f"{row['bytes'] / 1e6:.1f}", share
        )
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(*found.values(), strict=True)]
    table.caption = f"{median(ratios):.1f} times faster ({min(ratios):.1f} to {max(ratios):.1f} in {rounds} rounds)"
    console.print(table)
    return {"parameters": parameters, "rounds": found, "ratios": ratios, "medians": medians}


def alone(part: Callable[..., dict[str, Any]], quiet: bool, steps: int, scratch: Path) -> dict[str, Any]:
    """In a process of its own, whose heap no other part has made large: memory that is there already is faster."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, part, quiet, steps, scratch).result()


def _run(part: Callable[..., dict[str, Any]], quiet: bool, steps: int, scratch: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        return part(Console(width=120, quiet=quiet), steps, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"bytes": bytes_sent, "speed": speed}
    parser.add_argument("part", nargs="?", choices=[*parts, "all"], default="all")
    parser.add_argument("--steps", type=int, default=20, help="updates, or rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object, no tables")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        for name in parts if options.part == "all" else [options.part]:
            results[name] = alone(parts[name], options.json, options.steps, Path(scratch))
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    results |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
