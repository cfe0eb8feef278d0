"""Sizes of the families that need more than a word: keys that vLLM reads and transformers' own config lacks."""

from __future__ import annotations

from typing import Any

Sizes = dict[str, Any]

GLOBAL_HEADS: Sizes = {"per_layer_config": {"1": {"head_dim": 32}}}
TEXT_GLOBAL_HEADS: Sizes = {"text_config__per_layer_config": {"1": {"head_dim": 32}}}
SIGMOID_ROUTER: Sizes = {
    "score_func": "sigmoid",
    "route_norm": True,
    "route_scale": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
EXPERTS: Sizes = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
}
BAILING: Sizes = {**EXPERTS, "embedding_dropout": 0.0, "use_bias": False, "use_qkv_bias": False}
CHATGLM: Sizes = {"original_rope": True, "kv_channels": 32, "multi_query_group_num": 2, "tie_word_embeddings": False}
DBRX: Sizes = {"attn_config__rope_theta": 1e4, "attn_config__kv_n_heads": 2, "ffn_config__ffn_hidden_size": 128}
DEEPSEEK: Sizes = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
MLA: Sizes = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
BAILING_HYBRID: Sizes = {**BAILING, **MLA, "layer_group_size": 2}
EXAONE: Sizes = {"num_layers": 2, "layer_norm_epsilon": 1e-6, "activation_function": "silu"}
GEMMA4_VISION: Sizes = {
    **TEXT_GLOBAL_HEADS,
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
}
FALCON_NEW: Sizes = {"ffn_hidden_size": 512, "new_decoder_architecture": True}
HY_V3: Sizes = {"first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True, "qk_norm": True}
LFM2: Sizes = {
    "block_dim": 128,
    "conv_dim": 128,
    "layer_types": ["conv", "full_attention"],
    "num_hidden_layers": 2,
}
LFM2_VL: Sizes = {f"text_config__{key}": size for key, size in LFM2.items()}
LFM2_VL["vision_config__vision_use_head"] = False
LONGCAT: Sizes = {
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "zero_expert_type": "identity",
    "zero_expert_num": 0,
}
MIMO_V2: Sizes = {
    "hybrid_layer_pattern": [0, 1],
    "layernorm_epsilon": 1e-5,
    "moe_layer_freq": [0, 1],
    "sliding_window_size": 64,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 32,
}
MINICPM: Sizes = {"scale_emb": 1, "dim_model_base": 64, "scale_depth": 1.4, "num_experts": 0}
MINIMAX_M2: Sizes = {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True}
NEMOTRON_H: Sizes = {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3}
NOMIC: Sizes = {
    "activation_function": "swiglu",
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "qkv_proj_bias": False,
    "rotary_emb_scale_base": None,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "layer_norm_epsilon": 1e-5,
    "n_inner": 256,
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 2,
}
PLAMO3: Sizes = {
    "interleaved_sliding_window": [None, 64],
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_local_theta": 1e4,
    "rope_theta": 1e4,
    "sliding_window": 64,
}
SOLAR: Sizes = {"bskcn_1": [], "bskcn_2": [], "bskcn_3": [], "bskcn_4": [], "bskcn_tv": [0.9, 0.8]}
ZAMBA2: Sizes = {
    "attention_hidden_size": 256,
    "attention_head_dim": 64,
    "num_key_value_heads": 4,
    "n_mamba_heads": 8,
    "mamba_headdim": 32,
    "hybrid_layer_ids": [1],
}
