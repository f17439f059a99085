"""Tiny random models of many architectures, on real tensors or on `meta`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

HIDDEN = 32
VOCAB = 64
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DENSE = TOKENS | {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MHA = DENSE | {"num_key_value_heads": 4}
GATED_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}


def _config(kind: str, *options: dict[str, Any], **more: Any) -> Callable[[], PreTrainedConfig]:
    merged: dict[str, Any] = {}
    for option in (*options, more):
        merged |= option
    return lambda: getattr(transformers, kind)(**copy.deepcopy(merged))


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": _config("Qwen2Config", DENSE, tie_word_embeddings=True),
    "qwen3": _config("Qwen3Config", DENSE, head_dim=8),
    "qwen3_moe": _config("Qwen3MoeConfig", DENSE, MOE, head_dim=8, num_experts=4),
    "qwen3_next": _config(
        "Qwen3NextConfig",
        DENSE,
        MOE,
        GATED_DELTA,
        num_hidden_layers=4,
        head_dim=8,
        num_experts=4,
        shared_expert_intermediate_size=16,
    ),
    "qwen3_5": _config("Qwen3_5TextConfig", DENSE, GATED_DELTA, num_hidden_layers=4, head_dim=8),
    "qwen3_5_vl": _config(
        "Qwen3_5Config",
        text_config=DENSE | GATED_DELTA | {"num_hidden_layers": 4, "head_dim": 8},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32},
    ),
    "qwen3_5_moe": _config(
        "Qwen3_5MoeTextConfig",
        _without(DENSE, "intermediate_size"),
        MOE,
        GATED_DELTA,
        num_hidden_layers=4,
        head_dim=8,
        num_experts=4,
        shared_expert_intermediate_size=16,
    ),
    "llama": _config("LlamaConfig", DENSE),
    "gemma3": _config("Gemma3TextConfig", DENSE, head_dim=8, sliding_window=16),
    "gpt_oss": _config("GptOssConfig", DENSE, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _config(
        "DeepseekV3Config",
        MHA,
        MOE,
        MLA,
        q_lora_rank=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "falcon_h1": _config("FalconH1Config", DENSE, MAMBA2, mamba_d_ssm=64),
    "bamba": _config("BambaConfig", DENSE, MAMBA2, num_hidden_layers=3, attn_layer_indices=[1]),
    "granite_moe_hybrid": _config(
        "GraniteMoeHybridConfig",
        DENSE,
        MAMBA2,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
    ),
    "granite_hybrid_dense": _config(
        "GraniteMoeHybridConfig",
        DENSE,
        MAMBA2,
        layer_types=["mamba", "attention"],
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=48,
    ),
    "zamba2": _config(
        "Zamba2Config",
        MHA,
        num_hidden_layers=5,
        layers_block_type=["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=8,
        mamba_d_state=8,
        chunk_size=16,
        num_mem_blocks=1,
    ),
    "nemotron_h": _config(
        "NemotronHConfig",
        _without(DENSE, "num_hidden_layers"),
        layers_block_type=["mamba", "moe", "attention", "mlp"],
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "jamba": _config(
        "JambaConfig",
        DENSE,
        num_hidden_layers=4,
        attn_layer_period=4,
        attn_layer_offset=2,
        num_experts=4,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    "lfm2": _config(
        "Lfm2Config", DENSE, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], block_multiple_of=16
    ),
    "lfm2_moe": _config(
        "Lfm2MoeConfig",
        DENSE,
        MOE,
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
        num_experts=4,
        num_dense_layers=1,
    ),
    "minimax": _config("MiniMaxConfig", DENSE, num_local_experts=4, num_experts_per_tok=2, block_size=16, head_dim=8),
    "olmo_hybrid": _config(
        "OlmoHybridConfig", MHA, num_hidden_layers=4, linear_num_key_heads=4, linear_num_value_heads=4
    ),
    "recurrent_gemma": _config("RecurrentGemmaConfig", DENSE, num_hidden_layers=3, attention_window_size=16),
    "kimi_linear": _config(
        "KimiLinearConfig",
        _without(MHA, "max_position_embeddings"),
        MLA,
        num_hidden_layers=5,
        moe_intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        linear_head_dim=8,
        linear_num_heads=4,
    ),
    "zaya": _config(
        "ZayaConfig",
        _without(DENSE, "intermediate_size"),
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        router_hidden_size=16,
    ),
    "mamba2": _config(
        "Mamba2Config",
        TOKENS,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=16,
    ),
    "falcon_mamba": _config(
        "FalconMambaConfig", TOKENS, vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=8
    ),
    "phi3": _config("Phi3Config", DENSE),
    "gpt2": _config("GPT2Config", TOKENS, vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128),
    "hrm_text": _config("HrmTextConfig", _without(MHA, "num_key_value_heads"), head_dim=8, H_cycles=1, L_cycles=2),
    "bloom": _config("BloomConfig", TOKENS, vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=2, n_head=4),
    "cohere2": _config("Cohere2Config", DENSE),
    "dbrx": _config(
        "DbrxConfig",
        TOKENS,
        vocab_size=VOCAB,
        d_model=HIDDEN,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "ernie4_5_moe": _config("Ernie4_5_MoeConfig", DENSE, moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "exaone4": _config("Exaone4Config", DENSE),
    "falcon": _config("FalconConfig", _without(DENSE, "intermediate_size", "num_key_value_heads"), ffn_hidden_size=48),
    "gemma2": _config("Gemma2Config", DENSE, head_dim=8, sliding_window=16),
    "gemma3n": _config(
        "Gemma3nTextConfig",
        DENSE,
        num_hidden_layers=3,
        intermediate_size=[48] * 3,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_kv_shared_layers=1,
        activation_sparsity_pattern=None,
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        laurel_rank=4,
    ),
    "gemma4": _config(
        "Gemma4TextConfig",
        DENSE,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        num_kv_shared_layers=0,
    ),
    "glm4": _config("Glm4Config", DENSE, head_dim=8),
    "glm4_moe": _config("Glm4MoeConfig", DENSE, MOE, n_routed_experts=4, first_k_dense_replace=1, head_dim=8),
    "gpt_neox": _config("GPTNeoXConfig", _without(DENSE, "num_key_value_heads")),
    "granite_moe": _config("GraniteMoeConfig", DENSE, num_local_experts=4, num_experts_per_tok=2),
    "hunyuan_moe": _config("HunYuanMoEV1Config", DENSE, num_experts=4, moe_topk=2, head_dim=8),
    "inkling": _config("InklingTextConfig", DENSE, head_dim=8, n_routed_experts=4, num_experts_per_tok=2),
    "jetmoe": _config("JetMoeConfig", _without(DENSE, "num_attention_heads"), num_local_experts=4, kv_channels=8),
    "llama4": _config("Llama4TextConfig", DENSE, num_local_experts=4, intermediate_size_mlp=48, head_dim=8),
    "longcat_flash": _config(
        "LongcatFlashConfig",
        _without(MHA, "intermediate_size", "num_hidden_layers"),
        MLA,
        num_layers=2,
        head_dim=4,
        q_lora_rank=8,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
    ),
    "mamba": _config("MambaConfig", TOKENS, vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=8),
    "minimax_m2": _config("MiniMaxM2Config", DENSE, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "mistral": _config("MistralConfig", DENSE),
    "mixtral": _config("MixtralConfig", DENSE, num_local_experts=4, num_experts_per_tok=2),
    "mpt": _config("MptConfig", vocab_size=VOCAB, d_model=HIDDEN, n_heads=4, n_layers=2, max_seq_len=64),
    "olmo2": _config("Olmo2Config", DENSE),
    "openai_gpt": _config("OpenAIGPTConfig", vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64),
    "opt": _config(
        "OPTConfig",
        _without(DENSE, "intermediate_size", "num_key_value_heads"),
        ffn_dim=48,
        word_embed_proj_dim=HIDDEN,
    ),
    "phi": _config("PhiConfig", DENSE),
    "phi4_multimodal": _config(
        "Phi4MultimodalConfig",
        DENSE,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "crop_size": 28,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "nemo_conv_channels": 16,
            "ext_pw_out_channel": 16,
        },
    ),
    "rwkv": _config(
        "RwkvConfig", vocab_size=VOCAB, hidden_size=HIDDEN, attention_hidden_size=HIDDEN, num_hidden_layers=2
    ),
    "seed_oss": _config("SeedOssConfig", DENSE, head_dim=8),
    "smollm3": _config("SmolLM3Config", DENSE),
    "stablelm": _config("StableLmConfig", DENSE, qk_layernorm=True),
    "starcoder2": _config("Starcoder2Config", DENSE),
    "xlstm": _config("xLSTMConfig", TOKENS, vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_heads=4),
    "zamba": _config(
        "ZambaConfig",
        MHA,
        num_hidden_layers=6,
        attn_layer_period=3,
        attn_layer_offset=2,
        attention_hidden_size=64,
        n_mamba_heads=2,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
}
"""Family -> a fresh tiny configuration."""


def build(family: str, device: str = "cpu", *, biases: float = 0.0) -> PreTrainedModel:
    """A tiny model of the family in float32, the same one at each call; on `meta` it has shapes only. `biases`: their
    deviation, which is 0 in new models."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    auto = AutoModelForImageTextToText if family.endswith("_vl") else AutoModelForCausalLM
    with torch.device(device):
        model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters() if biases else ():
            if name.endswith(".bias"):
                parameter.add_(biases * torch.randn_like(parameter))
    return model
