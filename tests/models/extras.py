"""What stands beside a plain language model: a size that kernels run, a vision tower, heads that draft, an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.build import build_pair, write_checkpoint

# Heads of 32 are the smallest that vLLM's CPU attention computes.
_SERVED = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def build_served_pair(folder: Path, family: str = "llama") -> tuple[Path, Path]:
    """A tiny pair of a ``llama``, ``qwen2`` or ``mixtral`` that an engine on CPU can run."""
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None} if family == "mixtral" else {}
    return build_pair(folder, transformers.AutoConfig.for_model(family, **_SERVED, **more))


def build_multimodal_pair(folder: Path, shard_size: str) -> tuple[Path, Path]:
    """A tiny BLIP-2: tower, connector and language model. Of vLLM's multimodal models it needs no torchvision."""
    torch.manual_seed(7)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = transformers.Blip2Config(
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        qformer_config={**tower, "vocab_size": 64, "encoder_hidden_size": 32, "max_position_embeddings": 64},
        text_config=transformers.OPTConfig(
            **text, vocab_size=256, max_position_embeddings=128, word_embed_proj_dim=64
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=255,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    write_checkpoint(model, folder / "base", torch.bfloat16, shard_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    write_checkpoint(model, folder / "aligned", torch.bfloat16, shard_size)
    return folder / "base", folder / "aligned"


def add_mtp_head(checkpoint: Path, seed: int) -> None:
    """Make a Qwen2 checkpoint one of MiMo, which stores a head for multi-token prediction beside its layers."""
    layer = "model.layers.0."
    tensors = load_file(checkpoint / "model.safetensors")
    like = {name.removeprefix(layer): tensor for name, tensor in tensors.items() if name.startswith(layer)}
    norm = like["input_layernorm.weight"]
    like |= {f"{name}_layernorm.weight": norm for name in ("token", "hidden", "final")}
    like["input_proj.weight"] = norm.new_empty(len(norm), 2 * len(norm))
    tensors |= {f"model.mtp_layers.0.{name}": _random_like(tensor, seed) for name, tensor in like.items()}
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    call_mimo(checkpoint)


def call_mimo(checkpoint: Path, **settings: object) -> None:
    """Give a Qwen2 checkpoint's config the architecture of MiMo, and further settings."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    more = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1, **settings}
    file.write_text(json.dumps({**config, **more}))


def drop_tensor(checkpoint: Path, name: str) -> None:
    """Take one tensor out of a checkpoint."""
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[name]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def write_eagle_head(checkpoint: Path, folder: Path) -> Path:
    """Write an EAGLE head for a Llama checkpoint: one layer of its kind, and a matrix that joins two states."""
    layer = "model.layers.0."
    tensors = load_file(checkpoint / "model.safetensors")
    head = {name.replace(layer, "layers.0."): tensor for name, tensor in tensors.items() if name.startswith(layer)}
    del head["layers.0.input_layernorm.weight"]  # its first layer has none
    embedding = tensors["model.embed_tokens.weight"]
    head["embed_tokens.weight"] = embedding
    head["fc.weight"] = embedding.new_empty(embedding.shape[1], 2 * embedding.shape[1])
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    config.num_hidden_layers = 1
    config.save_pretrained(folder)
    save_file({name: _random_like(tensor, 3) for name, tensor in head.items()}, folder / "model.safetensors")
    return folder


def make_reward_model(checkpoint: Path) -> None:
    """Put a head with one score in the place of the output."""
    kind = transformers.AutoModelForSequenceClassification
    kind.from_pretrained(checkpoint, dtype="auto", num_labels=1).save_pretrained(checkpoint)


def write_adapter(checkpoint: Path, folder: Path, rank: int = 8) -> Path:
    """Write a LoRA adapter for a checkpoint, as peft does after training."""
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(5)
    # Not at zero, where training starts, and large enough that answers change.
    config = peft.LoraConfig(r=rank, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def _random_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tensor.shape, generator=generator) * 0.05).to(tensor.dtype)
