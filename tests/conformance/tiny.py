"""A real model's config made tiny: the same kind of layers in the same order, only narrower and fewer."""

from __future__ import annotations

from typing import Any

VOCABULARY = 256
# Heads of 32, the smallest that vLLM's CPU attention computes.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "embedding_size"), 128),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "dim", "q_lora_rank"), 128),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 256),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_intermediate_size"), 256),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_hidden_dim"), 64),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_attention_groups"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("depth", "encoder_layers", "decoder_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions"), 128),
    "max_target_positions": 128,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 32,
    # 512 and 64: the only latent attention (MLA) that vLLM computes on CPU.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "sliding_window": 64,
    "num_kv_shared_layers": 0,
}
_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "output_attentions")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def shrink(config: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The config with the standard small sizes for every key that it has, in its parts too.

    Lists with one entry a layer keep one layer of each kind. Token ids are moved into the small vocabulary.

    Args:
        config: of the real model, as ``PretrainedConfig.to_dict`` gives it.
        given: keys that get another value; ``part__key`` goes into a part.
    """
    config = {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL}
    layers = _real_layers(config)
    result = dict(config)
    kinds = 2
    for key, value in config.items():
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            own = {name.removeprefix(f"{key}__"): of for name, of in given.items() if name.startswith(f"{key}__")}
            result[key] = shrink(value, **own)
        elif isinstance(value, list) and layers and len(value) == layers:
            kinds = max(kinds, len(_kinds(value)))
    for key, value in config.items():
        if isinstance(value, list) and layers and len(value) == layers:
            result[key] = (_kinds(value) + [value[-1]] * kinds)[:kinds]
        elif key in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            result[key] = kinds if key in _LAYERS else _SIZES[key]
    result = {**result, **{key: value for key, value in given.items() if "__" not in key}}
    return _with_small_ids(result)


def _real_layers(config: dict[str, Any]) -> int:
    return next((config[key] for key in _LAYERS if isinstance(config.get(key), int)), 0)


def _kinds(entries: list[Any]) -> list[Any]:
    """One entry of each kind, in order of appearance; of numbers that are all different (indices, thresholds) two."""
    different = [entry for index, entry in enumerate(entries) if entry not in entries[:index]]
    return different if len(different) <= 4 else different[:2]


def _with_small_ids(config: dict[str, Any]) -> dict[str, Any]:
    """Distinct ids inside the vocabulary for all the special tokens."""
    ids = [key for key in config if isinstance(key, str) and key.endswith(("token_id", "token_index", "_token_ids"))]
    result = dict(config)
    for number, key in enumerate(sorted(ids)):
        if isinstance(config[key], int) and config[key] >= VOCABULARY:
            result[key] = VOCABULARY - 1 - number
        elif isinstance(config[key], list):
            result[key] = [VOCABULARY - 1 - number]
    return result
