"""Predicted times: their properties, one worked out by hand, and runs that others published."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3Config

from hybrid_rl.cli import main
from hybrid_rl.components import read_model
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.estimate import CacheSize
from hybrid_rl.flops import Flops
from hybrid_rl.hardware import CPU, GPUS, EngineOverheads, Hardware, Overheads, gpu
from hybrid_rl.plan_building import configured_plan, select_candidates
from hybrid_rl.scale import Lengths, Shape, efficiency, read_shape, rounds, step_time, sync_bytes
from trainers.base_model import meta_model

H100 = gpu("NVIDIA H100 80GB HBM3")
LENGTHS = Lengths(256, 512, 1024)
EIGHT: dict[str, Any] = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {
    "qwen3-8b": Qwen3Config(
        vocab_size=151_936,
        intermediate_size=12_288,
        num_hidden_layers=36,
        head_dim=128,
        tie_word_embeddings=False,
        **EIGHT,
    ),
    "qwen3-4b": Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "qwen3-32b": Qwen3Config(
        vocab_size=151_936,
        hidden_size=5120,
        intermediate_size=25_600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128_256, intermediate_size=14_336, num_hidden_layers=32, tie_word_embeddings=False, **EIGHT
    ),
}  # fmt: skip
BARE = Overheads(
    layer=0, adapter=0, tensor=0, update=0, sync_tensor=0, call=0, reward=0, record=0,
    engines=dict.fromkeys(("vllm", "transformers"), EngineOverheads(0, 0, 0, 0, 0)),
)  # fmt: skip
ROUND_NUMBERS = Hardware(
    name="one of round numbers", peak_tflops=100, matmul_share=0.5, memory_gbs=1000, memory_share=0.5,
    activation_gbs=1e9, link_gbs=100, network_gbs=10, host_gbs=10, encode_gbs=2, apply_gbs=4, hop_seconds=0,
    per_node=8, memory_gib=80, overlaps=True, overheads=BARE,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories with nothing but a configuration."""
    paths = {name: str(tmp_path_factory.mktemp("shapes") / name) for name in SHAPES}
    for name, path in paths.items():
        SHAPES[name].architectures = ["Qwen3ForCausalLM" if "qwen" in name else "LlamaForCausalLM"]
        SHAPES[name].save_pretrained(path)
    return paths


def configured(path: str, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": path, "dtype": "bfloat16"},
        "data": {"train": "none", "eval": "none", "max_prompt_length": 512},
        "sampling": {"max_completion_length": 1024},
        "batch": {"prompts": 64, "num_generations": 8},
        "learner": {"world_size": 4},
        "rollout": {"engines": 4},
    }
    for name, value in changes.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return parse_config(tree)


def shape_of(config: Config) -> Shape:
    model = meta_model(config)
    anatomy = read_model(model)
    sizes = {c.name: float(c.params) for c in select_candidates(anatomy, config.plan)}
    text = model.config
    per_token = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return read_shape(anatomy, configured_plan(anatomy, config, sizes, {}), text, CacheSize(per_token, 0))


@pytest.fixture(scope="module")
def eight(models: dict[str, str]) -> tuple[Config, Shape]:
    config = configured(models["qwen3-8b"])
    return config, shape_of(config)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    updates = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=updates)


def test_arithmetic_needs_no_torch():
    code = "import sys, hybrid_rl.scale; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("field", [f.name for f in fields(Hardware) if f.type == "float" and f.name != "memory_gib"])
@pytest.mark.parametrize("base", [H100, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_faster_device_is_never_slower(eight: tuple[Config, Shape], base: Hardware, field: str, stage: int):
    config, shape = eight
    value = getattr(base, field)
    better = value / 2 if field == "hop_seconds" else min(1.0, value * 1.5) if field.endswith("share") else value * 2
    for more in ({"world_size": 4}, {"world_size": 64}):
        there = changed(config, learner={**more, "zero_stage": stage}, cluster={"placement": "split"})
        before, after = (step_time(there, shape, LENGTHS, h) for h in (base, replace(base, **{field: better})))
        assert after.seconds <= before.seconds
        assert all(after.parts[part] <= before.parts[part] + 1e-12 for part in before.parts)


def test_newer_gpus_are_faster(eight: tuple[Config, Shape]):
    seconds = {name: step_time(*eight, LENGTHS, gpu(name)).seconds for name in GPUS}
    assert seconds["B200"] < seconds["H200"] < seconds["H100"] < seconds["A100"] < seconds["L40S"]


def test_parts_and_causes_add_up(eight: tuple[Config, Shape]):
    config, shape = eight
    for there in (
        config,
        changed(config, cluster={"placement": "colocate"}),
        changed(config, asynchrony={"max_staleness": 1}),
    ):
        time = step_time(there, shape, LENGTHS, H100)
        for part, seconds in time.parts.items():
            assert seconds == pytest.approx(sum(s for c, s in time.causes.items() if c.startswith(f"{part}: ")))
        assert min(time.causes.values()) >= 0
        assert time.samples_per_second * time.seconds == pytest.approx(512)
        assert time.tokens_per_second * time.seconds == pytest.approx(512 * 768)
        assert 0 < time.mfu < H100.matmul_share
        assert time.bottleneck in time.causes
    assert "wake" in step_time(changed(config, cluster={"placement": "colocate"}), shape, LENGTHS, H100).parts


def test_beside_each_other_is_at_most_in_turn(eight: tuple[Config, Shape]):
    config, shape = eight
    for ranks, engines in ((1, 1), (2, 8), (16, 2), (64, 64)):
        layout = {"learner": {"world_size": ranks}, "rollout": {"engines": engines}}
        turns = step_time(changed(config, **layout), shape, LENGTHS, H100)
        beside = step_time(changed(config, **layout, asynchrony={"max_staleness": 1}), shape, LENGTHS, H100)
        assert max(turns.parts["generate"], turns.parts["train"]) < beside.seconds < turns.seconds
        waits = "train" if turns.parts["train"] > turns.parts["generate"] else "generate"
        assert beside.bottleneck.startswith(waits)


def test_more_devices_are_less_efficient(eight: tuple[Config, Shape]):
    config, shape = eight
    times = [
        step_time(changed(config, learner={"world_size": n}, rollout={"engines": n}), shape, LENGTHS, H100)
        for n in (1, 4, 32, 128, 512)
    ]
    best = max(t.samples_per_second / t.devices for t in times)
    found = [efficiency(t, best) for t in times]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1
    assert found[-1] < 0.05  # the longest completion's rounds, which no device shortens
    assert times[-1].bottleneck == "generate: weights read"


def test_lora_is_cheaper_than_full_and_hybrid_between(models: dict[str, str]):
    found = {}
    for adaptation in ("full", "hybrid", "lora"):
        config = configured(models["qwen3-8b"], adaptation=adaptation)
        found[adaptation] = (step_time(config, shape_of(config), LENGTHS, H100), sync_bytes(config, shape_of(config)))
    lora, hybrid, full = (found[a][0].parts for a in ("lora", "hybrid", "full"))
    for part in ("train", "sync"):
        assert lora[part] < hybrid[part] < full[part]
    assert found["lora"][1] < found["hybrid"][1] < found["full"][1]


def test_update_bytes_grow_with_the_full_share(models: dict[str, str]):
    sizes = []
    for ratio in (0.05, 0.1, 0.3, 0.9):
        config = configured(models["qwen3-8b"], plan={"budget": {"ratio": ratio}})
        sizes.append(sync_bytes(config, shape_of(config)))
    assert sizes == sorted(sizes)
    dense = changed(config, sync={"encoding": "dense"})
    assert sync_bytes(dense, shape_of(dense)) == 2 * shape_of(dense).sent


@pytest.mark.parametrize(
    ("ranks", "stage", "sends"),
    [(4, 1, 1 + 1), (4, 2, 3 + 1), (16, 2, 1 + 1), (4, 3, 3)],
)  # fmt: skip
def test_gradient_bytes_of_zero(eight: tuple[Config, Shape], ranks: int, stage: int, sends: int):
    """Only what is trained goes round; under ZeRO-2 and 3 every micro-batch, and the updated weights back but for 3."""
    config, shape = eight
    there = changed(
        config,
        learner={"world_size": ranks, "zero_stage": stage},
        batch={"tokens_per_micro_batch": 512 * 768 // 4 // 3 + 1},
    )
    time = step_time(there, shape, LENGTHS, ROUND_NUMBERS)
    bus = 100e9 if ranks <= 8 else 80e9
    expected = sends * (ranks - 1) / ranks * 2 * shape.trained / bus
    assert time.causes["train: gradients on their way"] == pytest.approx(expected)
    gathered = 3 * 2 * (ranks - 1) / ranks * 2 * shape.params / bus if stage == 3 else 0
    assert time.causes["train: weights gathered"] == pytest.approx(gathered)


def test_one_step_by_hand():
    """A decoder of 1e9 frozen parameters without a head, of which 1e8 are trained; two ranks, one engine."""
    flops = Flops(decoder=2e9, head=0, attention=0, full=2e8, head_gradient=0, lora=0, norms=0)
    shape = Shape(
        flops=flops, lora_forward=0, params=10**9, experts=0, active=1, layers=10, width=1000, vocabulary=0, passed=0,
        adapters=0, adapter_passed=0, trained=10**8, trained_tensors=1, sent=10**8, sent_tensors=1,
        cache=CacheSize(1000, 0),
    )  # fmt: skip
    config = configured(
        "none",
        batch={"prompts": 10, "num_generations": 10, "tokens_per_micro_batch": 10_000},
        learner={"world_size": 2},
        rollout={"engines": 1},
        sync={"encoding": "dense"},
    )
    time = step_time(config, shape, Lengths(100, 300, 400), ROUND_NUMBERS)
    # 100 completions, 400 rounds of 75 tokens; 2e9 B of weights and 75 x 250 x 1000 B of cache at 500 GB/s, more than
    # 75 x 2e9 operations at 50 TFLOP/s; and 10 prompts of 100 tokens.
    decode = 400 * (2e9 + 75 * 250 * 1000) / 500e9
    assert time.parts["generate"] == pytest.approx(decode + 10 * 100 * 2e9 / 50e12)
    # 50 sequences of 400 tokens a rank: two micro-batches; a prompt is computed once for its 10 completions.
    tokens = 50 * 400 - 50 * 100 * 0.9
    arithmetic = tokens * (2e9 + 2e9 + 2e8) / 50e12
    ring = 3 * 0.5 * 2e8 / 100e9
    adam = 0.5e8 * 80 / 1e18
    assert time.parts["train"] == pytest.approx(arithmetic + ring + adam)
    assert time.mfu == pytest.approx(tokens * 4.2e9 / time.parts["train"] / 100e12)
    # 0.2 GB encoded at 2 GB/s, carried at 10, applied at 4.
    assert time.parts["sync"] == pytest.approx(0.1 + 0.02 + 0.05)
    assert time.seconds == pytest.approx(sum(time.parts[p] for p in ("generate", "train", "sync")))
    assert time.devices == 3


def test_rounds_are_a_list_schedule():
    """Played through: whoever ends makes room for the next."""
    lengths = [40] * 30 + [400] * 2
    mean = sum(lengths) / len(lengths)
    for at_once in (1, 4, 8, 32):
        free = [0] * at_once
        for length in lengths:  # the longest last
            free[free.index(min(free))] += length
        assert max(free) <= rounds(len(lengths), at_once, Lengths(1, mean, 400)) + 1e-9 <= 2 * max(free)
    assert rounds(4, 8, Lengths(1, 5, 9)) == 9


def test_kv_cache_and_tensor_parallelism(eight: tuple[Config, Shape]):
    config, shape = eight
    roomy, tight = (step_time(config, shape, LENGTHS, H100, cache_bytes=gb * 1e9) for gb in (60, 4))
    assert tight.parts["generate"] > 1.4 * roomy.parts["generate"]
    cut = step_time(changed(config, rollout={"tensor_parallel": 4}), shape, LENGTHS, H100)
    assert cut.devices == 4 + 16
    assert cut.parts["generate"] < step_time(config, shape, LENGTHS, H100).parts["generate"] < 4 * cut.parts["generate"]


def test_passes_that_the_algorithm_needs(eight: tuple[Config, Shape]):
    config, shape = eight
    assert step_time(config, shape, LENGTHS, H100).parts["logprob"] == 0
    with_kl = step_time(changed(config, algo={"kl_coef": 0.1}), shape, LENGTHS, H100).parts["logprob"]
    in_reward = step_time(changed(config, algo={"kl_coef": 0.1, "kl_in": "reward"}), shape, LENGTHS, H100)
    assert in_reward.parts["logprob"] == pytest.approx(2 * with_kl)
    off_policy = step_time(changed(config, batch={"mini_batches": 4}), shape, LENGTHS, H100)
    assert off_policy.parts["logprob"] == pytest.approx(0.75 * with_kl, rel=0.02)
    again = step_time(changed(config, learner={"gradient_checkpointing": True}), shape, LENGTHS, H100)
    assert 1.2 < again.parts["train"] / step_time(config, shape, LENGTHS, H100).parts["train"] < 1.5


def test_a_published_trainer_at_its_own_mfu(models: dict[str, str]):
    """prime-rl's benchmark page: Qwen3-4B, full, 16k tokens, 8 H100: 26.0 k tokens/s at 13.9 % MFU."""
    config = configured(models["qwen3-4b"], adaptation="full")
    shape, length = shape_of(config), 16_384
    operations = shape.flops.training([length], length) / length
    assert 0.139 * 8 * 989e12 / operations == pytest.approx(26_000, rel=0.15)


@pytest.mark.parametrize(
    ("model", "ranks", "engines", "parallel", "staleness", "tokens", "published"),
    [
        ("llama-3.1-8b", 16, 16, 1, 0, 1060, 97.7),
        ("llama-3.1-8b", 8, 8, 1, 1, 1129, 74.6),
        ("qwen3-32b", 32, 8, 4, 1, 3207, 215),
    ],
)  # fmt: skip
def test_published_steps_are_predicted_to_a_third(
    models: dict[str, str],
    model: str,
    ranks: int,
    engines: int,
    parallel: int,
    staleness: int,
    tokens: int,
    published: float,
):
    """NeMo RL 0.4, GRPO, H100, 2048 samples a step in updates of 512, at most 4096 tokens, mean as given
    (docs.nvidia.com/nemo/rl, performance summary). Its prompts are taken to have 128 tokens."""
    config = configured(
        models[model],
        adaptation="full",
        algo={"kl_coef": 0.01},
        sampling={"max_completion_length": 4096 - 128},
        batch={"num_generations": 32, "mini_batches": 4},
        learner={"world_size": ranks, "zero_stage": 3},
        rollout={"engines": engines, "tensor_parallel": parallel},
        cluster={"placement": "split" if staleness else "colocate"},
        **{"async": {"max_staleness": staleness}},
    )
    lengths = Lengths(128, tokens - 128, 4096 - 128)
    time = step_time(config, shape_of(config), lengths, H100, cache_bytes=40e9 * parallel)
    assert time.seconds == pytest.approx(published, rel=1 / 3)


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="'TPU v5' is no GPU that is known; use one of H100, "):
        gpu("TPU v5")
    for field, value in (("matmul_share", 1.5), ("memory_gbs", 0), ("link_gbs", math.nan)):
        with pytest.raises(ValueError, match=field):
            replace(H100, **{field: value})
    for lengths in ((1, 10, 5), (-1, 5, 5), (1, 0, 5)):
        with pytest.raises(ValueError, match="lengths must"):
            Lengths(*lengths)


def test_the_command(
    tiny_tree: dict, write_config: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    path = str(write_config(tiny_tree))
    assert main(["estimate", path, "--gpus", "12", "--gpu", "A100", "--mean-length", "3", "--json"]) == 0
    out = capsys.readouterr().out
    said = " ".join(out.split())
    assert "by arithmetic alone: nothing was measured" in said
    assert "completions of 3 (--mean-length), the longest 6" in said
    time = json.loads(out.splitlines()[-1])["time"]
    assert (time["predicted"], time["hardware"]) == (True, "A100")
    assert time["configured"]["gpus"] == 12
    assert time["configured"]["learner.world_size"] == 8
    assert {2, 8, 64, 256, 1024} <= {rung["gpus"] for rung in time["ladder"]}
    assert all(0 < rung["efficiency"] <= 1 for rung in (time["configured"], *time["ladder"]))
    assert all(rung["fits"] for rung in time["ladder"])
    assert main(["estimate", path, "--json"]) == 0
    assert "time" not in json.loads(capsys.readouterr().out.splitlines()[-1])  # no GPUs here
    for words, said in (
        (["--gpu", "TPU"], "'TPU' is no GPU that is known"),
        (["--mean-length", "7"], "--mean-length 7 is more than sampling.max_completion_length=6"),
    ):
        assert main(["estimate", path, "--gpus", "4", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_figure_is_of_a_known_unit(tmp_path: Path):
    """Data sheets give TFLOP/s and GB/s: a token of an 8B model takes no less than its weights' way through memory."""
    assert 16e9 / H100.bandwidth == pytest.approx(16 / (3350 * 0.6))
    assert H100.flops == pytest.approx(989e12 / 2)
    assert H100.bus(8) == pytest.approx(0.75 * 450e9)
    assert H100.bus(16) == pytest.approx(8 * 0.75 * 50e9)
    assert H100.collective(8e9, 1) == 0
    assert H100.collective(8e9, 2) == pytest.approx(4e9 / H100.bus(2) + H100.hop_seconds)
