"""Components, layers and topology of many families on tiny models, against the forward pass and without weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BartForCausalLM, BartForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache

from hybrid_rl.components import Anatomy, UnknownArchitecture, Weight, cross_check, read_model, trace_mixers
from tests.families import FAMILIES, build

A, R, M = "attention", "recurrent", "mlp"
QKVO = "q_proj k_proj v_proj o_proj"
GATED = "gate_proj up_proj down_proj"
MLA = "q_proj kv_a_proj_with_mqa kv_b_proj o_proj"


def under(parent: str, leaves: str) -> set[str]:
    return {f"{parent}.{leaf}" for leaf in leaves.split()}


ATTENTION = {A: under("self_attn", QKVO)}
MLP = {M: under("mlp", GATED)}
FEED_FORWARD = {M: under("feed_forward", GATED)}
MAMBA = {R: under("mamba", "in_proj out_proj")}
MAMBA1 = {R: under("mamba", "in_proj x_proj dt_proj out_proj")}
SHARED_EXPERT = {M: under("mlp.shared_expert", GATED)}
SHARED_EXPERTS = {M: under("mlp.shared_experts", GATED)}
DELTA = {R: under("linear_attn", "in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj")}
PER_LAYER = {"per_layer_input_gate", "per_layer_projection"}
LFM2 = {M: under("feed_forward", "w1 w2 w3")}
LFM2_CONV = {R: under("conv", "in_proj out_proj")}
LFM2_ATTENTION = {A: under("self_attn", "q_proj k_proj v_proj out_proj")}
KIMI = {R: under("self_attn", f"{QKVO} b_proj g_a_proj g_b_proj") | under("self_attn.forget_gate", "f_a_proj f_b_proj")}

# Family -> topology, and per layer the candidates of each component, named from the layer on.
READ: dict[str, tuple[str, list[dict[str, set[str]]]]] = {
    "qwen2": ("attention-only", [ATTENTION | MLP] * 2),
    "qwen3": ("attention-only", [ATTENTION | MLP] * 2),
    "qwen3_moe": ("attention-only", [ATTENTION] * 2),
    "qwen3_next": (
        "sequential-hybrid",
        [{R: under("linear_attn", "in_proj_qkvz in_proj_ba out_proj")} | SHARED_EXPERT] * 3
        + [ATTENTION | SHARED_EXPERT],
    ),
    "qwen3_5": ("sequential-hybrid", [DELTA | MLP] * 3 + [ATTENTION | MLP]),
    "qwen3_5_vl": ("sequential-hybrid", [DELTA | MLP] * 3 + [ATTENTION | MLP]),
    "qwen3_5_moe": ("sequential-hybrid", [DELTA | SHARED_EXPERT] * 3 + [ATTENTION | SHARED_EXPERT]),
    "llama": ("attention-only", [ATTENTION | MLP] * 2),
    "gemma3": ("attention-only", [ATTENTION | MLP] * 2),
    "gpt_oss": ("attention-only", [ATTENTION] * 2),
    "deepseek_v3": (
        "attention-only",
        [
            {A: under("self_attn", "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj")} | kind
            for kind in (MLP, SHARED_EXPERTS)
        ],
    ),
    "falcon_h1": ("parallel-hybrid", [ATTENTION | MAMBA | FEED_FORWARD] * 2),
    "bamba": ("sequential-hybrid", [MAMBA | FEED_FORWARD, ATTENTION | FEED_FORWARD, MAMBA | FEED_FORWARD]),
    "granite_moe_hybrid": (
        "sequential-hybrid",
        [kind | {M: under("shared_mlp", "input_linear output_linear")} for kind in (MAMBA, ATTENTION)],
    ),
    "granite_hybrid_dense": (
        "sequential-hybrid",
        [kind | {M: under("shared_mlp", "input_linear output_linear")} for kind in (MAMBA, ATTENTION)],
    ),
    "zamba2": (
        "mixed-hybrid",
        [
            MAMBA,
            MAMBA,
            {
                A: under("shared_transformer.self_attn", QKVO),
                R: under("mamba_decoder.mamba", "in_proj out_proj"),
                M: under("shared_transformer.feed_forward", "gate_up_proj down_proj")
                | under("shared_transformer.feed_forward.gate_up_proj_adapter_list", "0.0 0.1 1.0 1.1"),
            },
            MAMBA,
            {R: under("mamba_decoder.mamba", "in_proj out_proj")},  # the rest is tied to layer 2
        ],
    ),
    "nemotron_h": (
        "sequential-hybrid",
        [
            {R: under("mixer", "in_proj out_proj")},
            {M: under("mixer.shared_experts", "up_proj down_proj")},
            {A: under("mixer", QKVO)},
            {M: under("mixer", "up_proj down_proj")},
        ],
    ),
    "jamba": ("sequential-hybrid", [MAMBA1 | FEED_FORWARD, MAMBA1, ATTENTION | FEED_FORWARD, MAMBA1]),
    "lfm2": ("sequential-hybrid", [LFM2_CONV | LFM2, LFM2_ATTENTION | LFM2, LFM2_CONV | LFM2]),
    "lfm2_moe": ("sequential-hybrid", [LFM2_CONV | LFM2, LFM2_ATTENTION, LFM2_CONV]),
    "minimax": ("sequential-hybrid", [ATTENTION, {R: under("self_attn", "qkv_proj out_proj output_gate")}]),
    "olmo_hybrid": (
        "sequential-hybrid",
        [{R: under("linear_attn", f"{QKVO} a_proj b_proj g_proj")} | MLP] * 3 + [ATTENTION | MLP],
    ),
    "recurrent_gemma": (
        "sequential-hybrid",
        [{R: under("temporal_block", "linear_y linear_x linear_out"), M: under("mlp_block", GATED)}] * 2
        + [{A: under("temporal_block", QKVO), M: under("mlp_block", GATED)}],
    ),
    "kimi_linear": (
        "sequential-hybrid",
        [KIMI | MLP] + [KIMI | SHARED_EXPERTS] * 3 + [{A: under("self_attn", MLA)} | SHARED_EXPERTS],
    ),
    "zaya": (
        "attention-only",
        [{A: {"self_attn.o_proj"} | under("self_attn.qkv_proj", "q_proj k_proj v_proj_current v_proj_delayed")}] * 2,
    ),
    "mamba2": ("recurrent-only", [{R: under("mixer", "in_proj out_proj")}] * 2),
    "falcon_mamba": ("recurrent-only", [{R: under("mixer", "in_proj x_proj dt_proj out_proj")}] * 2),
    "phi3": (
        "attention-only",
        [{A: under("self_attn", "qkv_proj o_proj"), M: under("mlp", "gate_up_proj down_proj")}] * 2,
    ),
    "gpt2": ("attention-only", [{}] * 2),  # its matrices are no nn.Linear
    "hrm_text": ("attention-only", [{A: under("self_attn", f"{QKVO} gate_proj")} | MLP] * 4),  # two stacks
    "bloom": (
        "attention-only",
        [{A: under("self_attention", "query_key_value dense"), M: under("mlp", "dense_h_to_4h dense_4h_to_h")}] * 2,
    ),
    "cohere2": ("attention-only", [ATTENTION | MLP] * 2),
    "ernie4_5_moe": ("attention-only", [ATTENTION | MLP, ATTENTION | SHARED_EXPERTS]),
    "exaone4": ("attention-only", [ATTENTION | MLP] * 2),
    "falcon": (
        "attention-only",
        [{A: under("self_attention", "query_key_value dense"), M: under("mlp", "dense_h_to_4h dense_4h_to_h")}] * 2,
    ),
    "gemma2": ("attention-only", [ATTENTION | MLP] * 2),
    "gemma3n": (
        "attention-only",
        [
            {A: under("self_attn", leaves), M: MLP[M] | PER_LAYER | under("laurel", "linear_left linear_right")}
            for leaves in (QKVO, QKVO, "q_proj o_proj")  # the last layer uses the keys and values of the one before
        ],
    ),
    "gemma4": ("attention-only", [ATTENTION | {M: MLP[M] | PER_LAYER}] * 2),
    "glm4": ("attention-only", [ATTENTION | {M: under("mlp", "gate_up_proj down_proj")}] * 2),
    "glm4_moe": ("attention-only", [ATTENTION | MLP, ATTENTION | SHARED_EXPERTS]),
    "gpt_neox": (
        "attention-only",
        [{A: under("attention", "query_key_value dense"), M: under("mlp", "dense_h_to_4h dense_4h_to_h")}] * 2,
    ),
    "granite_moe": ("attention-only", [ATTENTION] * 2),
    "hunyuan_moe": ("attention-only", [ATTENTION | {M: under("mlp.shared_mlp", GATED)}] * 2),
    "inkling": ("attention-only", [{A: under("self_attn", f"{QKVO} r_proj")}] * 2),  # convolutions smooth the output
    "jetmoe": ("attention-only", [{A: under("self_attention", "kv_proj experts.router.layer")}] * 2),
    "llama4": ("attention-only", [ATTENTION | {M: under("feed_forward.shared_expert", GATED)}] * 2),
    "longcat_flash": (
        "attention-only",
        [
            {
                A: under("self_attn.0", "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj")
                | under("self_attn.1", "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"),
                M: under("mlps.0", GATED) | under("mlps.1", GATED),
            }
        ]
        * 2,
    ),
    "mamba": ("recurrent-only", [{R: under("mixer", "in_proj x_proj dt_proj out_proj")}] * 2),
    "minimax_m2": ("attention-only", [ATTENTION] * 2),
    "mistral": ("attention-only", [ATTENTION | MLP] * 2),
    "mixtral": ("attention-only", [ATTENTION] * 2),
    "mpt": ("attention-only", [{A: under("attn", "Wqkv out_proj"), M: under("ffn", "up_proj down_proj")}] * 2),
    "olmo2": ("attention-only", [ATTENTION | MLP] * 2),
    "opt": ("attention-only", [{A: under("self_attn", "q_proj k_proj v_proj out_proj"), M: {"fc1", "fc2"}}] * 2),
    "phi": ("attention-only", [{A: under("self_attn", "q_proj k_proj v_proj dense"), M: under("mlp", "fc1 fc2")}] * 2),
    "phi4_multimodal": (
        "attention-only",
        [{A: under("self_attn", "qkv_proj o_proj"), M: under("mlp", "gate_up_proj down_proj")}] * 2,
    ),
    "seed_oss": ("attention-only", [ATTENTION | MLP] * 2),
    "smollm3": ("attention-only", [ATTENTION | MLP] * 2),
    "stablelm": ("attention-only", [ATTENTION | MLP] * 2),
    "starcoder2": ("attention-only", [ATTENTION | {M: under("mlp", "c_fc c_proj")}] * 2),
    "zamba": (
        "mixed-hybrid",
        [
            MAMBA,
            MAMBA,
            {
                A: under("shared_transf.self_attn", QKVO),
                R: under("mamba_decoder.mamba", "in_proj out_proj"),
                M: under("shared_transf.feed_forward", GATED),
            },
            MAMBA,
            MAMBA,
            {R: under("mamba_decoder.mamba", "in_proj out_proj")},
        ],
    ),
}
NO_TRACE_ON_META = {"gpt2", "jetmoe", "longcat_flash"}
"""Families whose forward pass looks at values."""

# Family -> number of weights of each component that is no candidate's, where it tells something.
ELSEWHERE = {
    "qwen3_moe": {"router": 2, "expert": 4, "norm": 9, "embedding": 1, "lm_head": 1},
    "qwen3_next": {"router": 8, "expert": 8, "norm": 14},  # a router and a shared expert's gate per layer
    "qwen3_5_vl": {"other": 21},  # the vision tower
    "gpt_oss": {"router": 4, "expert": 8},
    "deepseek_v3": {"router": 1, "expert": 2},
    "zamba2": {"other": 2},  # the linear between the shared block and the Mamba layer
    "nemotron_h": {"router": 1, "expert": 2},
    "kimi_linear": {"router": 4, "expert": 8},
    "zaya": {"router": 15, "expert": 4, "other": 18},
    "gpt2": {"attention": 8, "mlp": 8, "embedding": 2, "norm": 10},
    "hrm_text": {"other": 1, "embedding": 1, "lm_head": 1},
    "inkling": {"router": 4, "expert": 10, "other": 4},
    "gemma3n": {"other": 19, "embedding": 2},
    "gemma4": {"router": 6, "expert": 4},  # beside the MLP, on the block itself
    "jetmoe": {"router": 2, "expert": 4},
    "longcat_flash": {"router": 2, "expert": 4},
    "phi4_multimodal": {"embedding": 1, "norm": 5, "other": 95},  # towers inside the language model
    "stablelm": {"norm": 22},
}


@pytest.mark.parametrize("family", READ)
def test_family(family: str):
    """Topology, candidates per layer, each parameter once; the forward pass agrees; the same without weights."""
    topology, layers = READ[family]
    model = build(family)
    anatomy = read_model(model)
    assert anatomy.topology == topology
    found: list[dict[str, set[str]]] = [{} for _ in layers]
    for c in anatomy.candidates:
        assert c.layer is not None
        found[c.layer].setdefault(c.component, set()).add(from_layer_on(c.name))
    assert found == layers
    counts = {c: sum(w.component == c for w in anatomy.weights) for c in ELSEWHERE.get(family, {})}
    assert counts == ELSEWHERE.get(family, {})

    parameters = dict(model.named_parameters())
    assert [w.parameter for w in anatomy.weights] == list(parameters)
    assert all(w.shape == tuple(parameters[w.parameter].shape) for w in anatomy.weights)
    assert sum(w.params for w in anatomy.weights) == sum(p.numel() for p in parameters.values())
    assert len({w.name for w in anatomy.weights}) == len(parameters)
    assert not any(w.quantised for w in anatomy.weights)

    assert cross_check(model, anatomy) is True
    bare = build(family, device="meta")
    assert read_model(bare) == anatomy
    assert cross_check(bare, anatomy) is (family not in NO_TRACE_ON_META)


def from_layer_on(name: str) -> str:
    """The part of a name after the first number."""
    parts = name.split(".")
    return ".".join(parts[next(i for i, part in enumerate(parts) if part.isdigit()) + 1 :])


def of(anatomy: Anatomy, name: str) -> Weight:
    return next(w for w in anatomy.weights if w.name == name)


# --- what cannot be read, and overrides ---


class Blend(nn.Module):
    """A mixer that nothing in its structure or code betrays, but for the argument it could keep a state in."""

    def __init__(self, hidden: int):
        super().__init__()
        self.into = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, 1)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, hidden_states: torch.Tensor, past_key_values: Cache | None = None, **_: object):
        mean = self.into(hidden_states).cumsum(1) * self.gate(hidden_states).sigmoid()
        return self.out(self.norm(mean)), None


def blended() -> nn.Module:
    model = build("qwen3")
    for layer in model.model.layers:
        layer.self_attn = Blend(32)
    return model


def test_unknown_mixer_is_refused_until_settled():
    model = blended()
    with pytest.raises(
        UnknownArchitecture, match=r"self_attn \(Blend\) takes a cache.*plan\.components.*layers\.\*\.self_attn"
    ):
        read_model(model)
    for kind, topology in (("attention", "attention-only"), ("recurrent", "recurrent-only")):
        overrides = {"model.layers.*.self_attn": kind}
        anatomy = read_model(model, overrides)
        assert anatomy.topology == topology
        assert anatomy.mixers == {f"model.layers.{i}.self_attn": kind for i in range(2)}
        assert of(anatomy, "model.layers.0.self_attn.into").component == kind
        assert of(anatomy, "model.layers.0.self_attn.norm").component == "norm"
        assert "model.layers.0.self_attn.gate" not in [c.name for c in anatomy.candidates]
        assert cross_check(model, anatomy, overrides)  # no trace, and the override outranks config.layer_types
    with pytest.raises(UnknownArchitecture, match="takes a cache"):
        cross_check(model, anatomy)


@pytest.mark.parametrize(
    ("family", "refused", "overrides", "topology"),
    [
        ("rwkv", "RwkvFeedForward", {"*.feed_forward": "mlp"}, "recurrent-only"),
        ("xlstm", "xLSTMLayer", {"*.mlstm_layer": "recurrent"}, "recurrent-only"),
        ("dbrx", "DbrxFFN", {"*.ffn.experts": "expert", "*.ffn.router": "router"}, "attention-only"),
        ("openai_gpt", "no mixer", {"*.attn": "attention"}, "attention-only"),
    ],
)
def test_families_that_need_an_override(family: str, refused: str, overrides: dict[str, str], topology: str):
    model = build(family)
    with pytest.raises(UnknownArchitecture, match=refused):
        read_model(model)
    anatomy = read_model(model, overrides)
    assert anatomy.topology == topology
    assert set(overrides.values()) <= {w.component for w in anatomy.weights}
    for layer in {w.layer for w in anatomy.weights} - {None}:
        assert {w.component for w in anatomy.weights if w.layer == layer} & {"mlp", "expert"}


def test_override_of_single_weights_and_precedence():
    model = build("qwen3")
    overrides = {"*.0.self_attn.o_proj": "other", "model.norm.weight": "other", "*.mlp": "mlp", "*.1.mlp": "expert"}
    anatomy = read_model(model, overrides)
    assert of(anatomy, "model.layers.0.self_attn.o_proj").component == "other"
    assert of(anatomy, "model.layers.1.self_attn.o_proj").component == "attention"
    assert of(anatomy, "model.norm").component == "other"
    assert of(anatomy, "model.layers.0.mlp.up_proj").component == "mlp"
    assert of(anatomy, "model.layers.1.mlp.up_proj").component == "expert"  # the later pattern
    assert "model.layers.0.self_attn.o_proj" not in [c.name for c in anatomy.candidates]
    assert cross_check(model, anatomy, overrides)


def test_an_override_speaks_for_all_below_it_but_norms():
    anatomy = read_model(build("zaya"), {"*.0.mlp": "mlp"})
    below = {w.name: w.component for w in anatomy.weights if w.name.startswith("model.layers.0.mlp.")}
    assert below.pop("model.layers.0.mlp.gate.router_mlp.norm") == "norm"
    assert set(below.values()) == {"mlp"}
    assert of(anatomy, "model.layers.1.mlp.experts.down_proj").component == "expert"


def test_override_finds_a_mixer_of_the_other_kind_inside_a_mixer():
    anatomy = read_model(build("zaya"), {"*.self_attn.qkv_proj": "recurrent"})
    assert anatomy.topology == "parallel-hybrid"
    assert of(anatomy, "model.layers.0.self_attn.o_proj").component == "attention"
    assert of(anatomy, "model.layers.0.self_attn.qkv_proj.q_proj").component == "recurrent"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.self_attention": "attention"}, "matches no module"),
        ({"*.Self_attn": "attention"}, "matches no module"),
        ({"*.self_attn": "mamba"}, "is no component"),
    ],
)
def test_overrides_that_say_nothing_are_refused(overrides: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        read_model(build("qwen3", device="meta"), overrides)


@pytest.mark.parametrize("kind", ["recurrent", "mlp"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_forward_pass_outranks_an_override(kind: str, device: str):
    model = build("falcon_h1", device)
    overrides = {"*.self_attn": kind}
    with pytest.raises(UnknownArchitecture, match=r"keeps attention state.*plan\.components"):
        cross_check(model, read_model(model, overrides), overrides)


def test_structures_without_what_a_decoder_needs_are_refused():
    model = build("qwen3", device="meta")
    model.model.layers[1].mlp = model.model.layers[1].self_attn = nn.Identity()
    with pytest.raises(UnknownArchitecture, match=r"layers\.1 .* has no mixer and no MLP"):
        read_model(model)
    for layer in model.model.layers:
        layer.self_attn = nn.Identity()
    with pytest.raises(UnknownArchitecture, match=r"model\.layers has no mixer"):
        read_model(model)
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(UnknownArchitecture, match="no list of decoder blocks"):
        read_model(model)


def test_encoder_decoder_models_are_refused():
    config = BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48)
    with torch.device("meta"), pytest.raises(UnknownArchitecture, match="encoder"):
        read_model(BartForConditionalGeneration(config))
    assert issubclass(UnknownArchitecture, ValueError)


# --- the configuration ---


def test_layer_types_are_checked_where_the_trace_is_silent():
    model = build("recurrent_gemma")  # its recurrence keeps its state itself
    assert set(trace_mixers(model)) == {"model.layers.2.temporal_block"}
    anatomy = read_model(model)
    model.config.block_types = ["attention", "recurrent", "attention"]
    with pytest.raises(UnknownArchitecture, match=r"layers\.0\.temporal_block .* declares attention"):
        cross_check(model, anatomy)
    assert cross_check(model, anatomy, {"*.0.temporal_block": "recurrent"})


def test_the_trace_outranks_layer_types_and_without_it_they_count():
    for device in ("cpu", "meta"):
        model = build("gpt2", device)
        anatomy = read_model(model)
        model.config.layers_block_type = ["mamba", "attention"]
        if device == "cpu":
            assert cross_check(model, anatomy)
        else:
            with pytest.raises(UnknownArchitecture, match=r"h\.0\.attn .* read as attention.* declares recurrent"):
                cross_check(model, anatomy)
        model.config.layers_block_type = ["attention", "something new"]
        assert cross_check(model, anatomy) is (device == "cpu")


def test_hybrid_layer_types_describe_a_cache_not_two_mixers():
    model = build("zaya")
    assert set(model.config.layer_types) <= {"hybrid", "hybrid_sliding"}
    assert trace_mixers(model) == {f"model.layers.{i}.self_attn": {"attention", "recurrent"} for i in range(2)}
    assert read_model(model).topology == "attention-only"


def test_a_layer_that_the_configuration_gives_a_mixer_needs_one():
    model = build("qwen3", device="meta")
    overrides = {"*.1.self_attn": "other"}
    anatomy = read_model(model, overrides)
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    assert cross_check(model, anatomy, overrides)
    with pytest.raises(UnknownArchitecture, match=r"declares attention for model\.layers\.1"):
        cross_check(model, anatomy)


# --- the trace ---


def test_trace_names_who_keeps_what():
    assert trace_mixers(build("falcon_h1")) == {
        f"model.layers.{i}.{name}": {kind}
        for i in range(2)
        for name, kind in (("self_attn", "attention"), ("mamba", "recurrent"))
    }
    assert trace_mixers(build("lfm2"))["model.layers.0.conv"] == {"recurrent"}  # a convolution's last inputs
    assert trace_mixers(build("minimax"))["model.layers.1.self_attn"] == {"recurrent"}  # in the model's own cache
    assert trace_mixers(build("openai_gpt")) == {}


@pytest.mark.parametrize("family", ["recurrent_gemma", "minimax", "qwen3_5", "jamba"])
def test_trace_leaves_the_model_as_it_was(family: str):
    model = build(family).train()
    model.model.layers[0].eval()
    methods = {cls: dict(vars(cls)) for cls in (Cache, DynamicCache)}
    tensors = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modules = [(module, {k: v for k, v in vars(module).items() if k[0] != "_"}) for module in model.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    state = torch.get_rng_state()
    trace_mixers(model)
    assert torch.equal(state, torch.get_rng_state())
    assert {cls: dict(vars(cls)) for cls in (Cache, DynamicCache)} == methods
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for module, attributes in modules:
        now = {k: v for k, v in vars(module).items() if k[0] != "_"}
        assert now.keys() == attributes.keys()
        assert all(now[key] is value for key, value in attributes.items())
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == hooks


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_failing_forward_is_an_error_on_real_tensors_and_no_trace_on_meta(error: type[Exception]):
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise error("a kernel wants values")

    for device in ("cpu", "meta"):
        model = build("qwen3", device).train()
        anatomy = read_model(model)
        update = Cache.update
        model.model.layers[1].mlp.forward = fail
        if device == "meta":
            assert cross_check(model, anatomy) is False
        else:
            with pytest.raises(error, match="a kernel wants values"):
                cross_check(model, anatomy)
        assert Cache.update is update
        assert all(module.training and not module._forward_hooks for module in model.modules())


def test_a_mixer_that_does_not_run_is_refused():
    model = build("qwen3")
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    anatomy = read_model(model)
    with pytest.raises(UnknownArchitecture, match=r"layers\.1\.self_attn .* does not run.*'other'"):
        cross_check(model, anatomy)


def test_a_missed_mixer_is_found_by_the_trace():
    model = build("qwen3")
    anatomy = read_model(model)
    half = Anatomy(anatomy.topology, anatomy.weights, {"model.layers.0.self_attn": "attention"})
    with pytest.raises(UnknownArchitecture, match=r"layers\.1\.self_attn .* keeps attention state, but is no mixer"):
        cross_check(model, half)


# --- weights ---


def test_layers_count_on_from_stack_to_stack():
    anatomy = read_model(build("hrm_text", device="meta"))
    layers = {w.name.rsplit(".self_attn")[0]: w.layer for w in anatomy.weights if w.name.endswith("q_proj")}
    stacks = [f"model.{stack}_module.layers.{i}" for stack in "LH" for i in range(2)]
    assert layers == {name: layer for layer, name in enumerate(stacks)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_appear_once_with_all_names(device: str):
    anatomy = read_model(build("zamba2", device))
    q = of(anatomy, "model.layers.2.shared_transformer.self_attn.q_proj")
    assert q.tied == ("model.layers.4.shared_transformer.self_attn.q_proj",)
    assert (q.layer, q.no_lora) == (2, None)
    assert anatomy.mixers[q.tied[0].removesuffix(".q_proj")] == "attention"
    embedding = of(anatomy, "model.embed_tokens")
    assert (embedding.component, embedding.tied, embedding.layer) == ("embedding", ("lm_head",), None)
    assert of(read_model(build("llama", device)), "lm_head").tied == ()
    assert of(read_model(build("llama", device)), "lm_head").component == "lm_head"


def test_an_override_of_a_tied_weights_other_name_counts():
    anatomy = read_model(build("zamba2"), {"model.layers.4.shared_transformer.self_attn.o_proj": "other"})
    assert of(anatomy, "model.layers.2.shared_transformer.self_attn.o_proj").component == "other"


@pytest.mark.parametrize(
    ("family", "name", "slices"),
    [
        ("phi3", "model.layers.0.self_attn.qkv_proj", {"q": 32, "k": 16, "v": 16}),
        ("phi3", "model.layers.0.mlp.gate_up_proj", {"gate": 48, "up": 48}),
        ("phi3", "model.layers.0.self_attn.o_proj", {}),
        ("mpt", "transformer.blocks.0.attn.Wqkv", {"q": 32, "k": 32, "v": 32}),
        ("zamba2", "model.layers.2.shared_transformer.feed_forward.gate_up_proj", {"gate": 48, "up": 48}),
        ("granite_moe_hybrid", "model.layers.0.shared_mlp.input_linear", {"gate": 16, "up": 16}),
        ("granite_moe_hybrid", "model.layers.0.shared_mlp.output_linear", {}),
        ("qwen3_5", "model.layers.0.linear_attn.in_proj_qkv", {"q": 16, "k": 16, "v": 32}),
        ("mamba2", "backbone.layers.0.mixer.in_proj", {"gate": 64, "x": 64, "B": 8, "C": 8, "dt": 8}),
        ("jamba", "model.layers.0.mamba.in_proj", {"x": 64, "gate": 64}),
        # Interleaved head by head, though the sizes would fit.
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", {}),
        ("bloom", "transformer.h.0.self_attention.query_key_value", {}),
        ("minimax", "model.layers.1.self_attn.qkv_proj", {}),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_qkvz", {}),
        ("qwen3_5", "model.layers.3.self_attn.q_proj", {}),
    ],
)
def test_slices_of_fused_linears(family: str, name: str, slices: dict[str, int]):
    weight = of(read_model(build(family, device="meta")), name)
    assert weight.slices == tuple(slices.items())
    assert not slices or sum(slices.values()) == weight.shape[0]


def test_slices_are_the_rows_that_make_the_part():
    """Keys of zero, made by emptying the rows that `slices` gives, reach the attention as zeros."""
    model = build("phi3")
    weight = of(read_model(model), "model.layers.0.self_attn.qkv_proj")
    rows = dict(weight.slices)
    with torch.no_grad():
        model.get_parameter(weight.parameter)[rows["q"] : rows["q"] + rows["k"]] = 0
    cache = model(torch.arange(1, 7).unsqueeze(0), use_cache=True).past_key_values
    assert not cache.layers[0].keys.any()
    assert cache.layers[0].values.any()
    assert cache.layers[1].keys.any()


@pytest.mark.parametrize(
    ("family", "obstacles"),
    [
        ("falcon_h1", {}),  # only a fused kernel for training does, which is kept from being used
        ("nemotron_h", {}),
        ("mamba2", {}),
        ("falcon_mamba", {"mixer.dt_proj": "directly"}),
        ("bamba", {}),
        ("granite_hybrid_dense", {}),
        ("zamba2", {}),
        ("jamba", {"mamba.dt_proj": "directly"}),
        ("qwen3_5", {}),
        ("lfm2", {}),
        ("olmo_hybrid", {}),
        ("kimi_linear", {}),
    ],
)
def test_what_lora_cannot_serve(family: str, obstacles: dict[str, str]):
    found = {from_layer_on(c.name): c.no_lora for c in read_model(build(family)).candidates if c.no_lora}
    assert found.keys() == obstacles.keys()
    for name, reason in obstacles.items():
        assert reason in found[name]


def test_lora_on_a_weight_that_code_uses_directly_does_nothing():
    """Why `no_lora` is right about Jamba's `dt_proj`, and about nothing else in the block."""
    from peft import LoraConfig, get_peft_model

    for leaf, changes in (("dt_proj", False), ("x_proj", True)):
        model = build("jamba").eval()
        tokens = torch.arange(1, 7).unsqueeze(0)
        before = model(tokens).logits
        adapted = get_peft_model(model, LoraConfig(target_modules=[leaf], r=2, init_lora_weights=False))
        assert torch.equal(before, adapted(tokens).logits) is not changes


def test_weights_looked_at_but_not_used_are_no_obstacle():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = nn.Linear(4, 4)
            self.used = nn.Linear(4, 4)
            self.used.weight.data.zero_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.to(self.seen.weight.dtype).to(self.seen.weight.device)
            return self.seen(x) @ self.used.weight

    model = build("qwen3", device="meta")
    model.model.layers[0].mlp.inner = Owner()
    anatomy = read_model(model)
    assert of(anatomy, "model.layers.0.mlp.inner.seen").no_lora is None
    assert "Owner" in str(of(anatomy, "model.layers.0.mlp.inner.used").no_lora)


def test_gates_are_routers_and_leave_no_room_for_lora():
    anatomy = read_model(build("qwen3_5_moe"))
    gate = of(anatomy, "model.layers.0.mlp.shared_expert_gate")
    assert (gate.component, gate.shape, gate.linear) == ("router", (1, 32), True)
    assert gate.no_lora is not None
    assert gate not in anatomy.candidates


def test_shared_experts_as_wide_as_there_are_experts_are_no_router():
    config = FAMILIES["qwen3_next"]()
    config.num_experts = config.shared_expert_intermediate_size = 16
    with torch.device("meta"):
        anatomy = read_model(AutoModelForCausalLM.from_config(config))
    assert of(anatomy, "model.layers.0.mlp.shared_expert.gate_proj").component == "mlp"
    assert of(anatomy, "model.layers.0.mlp.gate").component == "router"


class Mixture(nn.Module):
    def __init__(self, expert: type[nn.Module], config: object):
        super().__init__()
        self.choose = nn.Linear(32, 3, bias=False)
        self.those = nn.ModuleList(expert(config) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.choose(x).softmax(-1)
        return torch.stack([weights[..., i, None] * one(x) for i, one in enumerate(self.those)]).sum(0)


def test_experts_made_of_linears_are_candidates():
    model = build("qwen3")
    mlp = type(model.model.layers[0].mlp)
    for layer in model.model.layers:
        layer.mlp = Mixture(mlp, model.config)
    anatomy = read_model(model)
    assert of(anatomy, "model.layers.0.mlp.choose").component == "router"
    experts = [c for c in anatomy.candidates if c.component == "expert"]
    assert len(experts) == 2 * 3 * 3
    assert cross_check(model, anatomy)
    for layer in model.model.layers:
        layer.mlp.choose = nn.Identity()  # a list of equal modules with nothing to choose between them
    assert not any(w.component == "expert" for w in read_model(model).weights)


class Packed(nn.Module):
    """A linear layer of a quantised kind that is no `nn.Linear`: two 4-bit weights in a byte."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_quantised_linears_keep_their_place_and_shape():
    model = build("qwen3", device="meta")
    plain = read_model(model)
    for layer in model.model.layers:
        q = layer.self_attn.q_proj
        q.weight = nn.Parameter(torch.zeros(q.weight.shape, dtype=torch.int8, device="meta"), requires_grad=False)
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, leaf, Packed(getattr(layer.mlp, leaf)))
    anatomy = read_model(model)
    quantised = ("q_proj", "gate_proj", "up_proj", "down_proj")
    assert all(w.quantised is w.name.endswith(quantised) for w in anatomy.weights)
    assert [(w.name, w.component, w.shape, w.linear) for w in anatomy.weights] == [
        (w.name, w.component, w.shape, w.linear) for w in plain.weights
    ]
    assert sum(w.params for w in anatomy.weights) == sum(w.params for w in plain.weights)


def test_parameters_are_named_as_the_model_names_them():
    anatomy = read_model(build("falcon_h1"))
    assert of(anatomy, "model.layers.0.mamba.A_log").shape == (8,)
    assert of(anatomy, "model.layers.0.mamba.A_log").component == "recurrent"
    conv = of(anatomy, "model.layers.0.mamba.conv1d")
    assert (conv.parameter, conv.linear, conv.component) == ("model.layers.0.mamba.conv1d.weight", False, "recurrent")
    assert of(anatomy, "model.layers.0.mamba.conv1d.bias").component == "recurrent"
    assert of(read_model(build("mamba2")), "backbone.layers.0.mixer.norm").component == "norm"


def test_cross_attention_without_anything_to_attend_to_is_refused():
    config = BartConfig(vocab_size=64, d_model=32, decoder_layers=1, decoder_ffn_dim=48, decoder_attention_heads=4)
    model = BartForCausalLM(config)
    assert not model.config.is_encoder_decoder
    with pytest.raises(UnknownArchitecture, match=r"encoder_attn .* does not run"):
        cross_check(model, read_model(model))
    overrides = {"*.encoder_attn": "other"}
    assert cross_check(model, read_model(model, overrides), overrides)
