"""Companions and weights are told apart by their names, as public repositories have them."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from expo_serve.checkpoint.companions import is_companion

COMPANIONS = (
    # config, tokenizer, templates, processors
    *("config.json", "generation_config.json", "params.json", "configuration.json", "hf_quant_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "qwen.tiktoken", "spm.model", "source.spm"),
    *("rwkv_vocab_v20230424.txt", "bpe.codes", "vocab.bpe", "tokenizer.model.v3"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "mel_filters.npz"),
    # code
    *("modeling_org.py", "configuration_org.py", "vision/encoder.py", "models/layers/rope.py", "__init__.py"),
    # what is about the model
    *("LICENSE", "NOTICE", "README.md", "USE_POLICY.md", "model.yaml"),
    # sentence-transformers
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"),
    *("1_Dense/model.safetensors", "3_LayerNorm/model.safetensors", "10_Dense/model.safetensors"),
    *("0_Transformer/config.json", "0_Transformer/sentence_bert_config.json", "0_Transformer/vocab.txt"),
    # parts of a model that have a config or tokenizer of their own
    *("tokenizer/tokenizer.json", "vision_tower/config.json", "audio_tokenizer/preprocessor_config.json"),
    *("text_encoder/config.json", "tokenizer/spiece.model", "tokenizer/merges.txt", "processor/config.json"),
)
OTHERS = (
    # weights of the model, in any format
    *("model.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors", "pytorch_model.bin"),
    *("pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "tf_model.h5"),
    *("flax_model.msgpack", "rust_model.ot", "model.gguf", "Model.Q4_K_M.GGUF", "model.onnx", "model.onnx_data"),
    *("model.onnx.data", "weights.npz", "model.q4.npz", "model.ckpt.data-00000-of-00001", "model.ckpt.index"),
    *("model.nemo", "model.safetensors.part1", "model.gguf.part1of2", "model.tar.gz", "checkpoint.zip", "x.pkl"),
    # indexes of shards
    *("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.fp32-00001.index.json"),
    # adapters
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt"),
    *("lora/adapter_config.json", "lora/adapter_model.safetensors", "speech-lora/adapter_model.bin"),
    # states of a training
    *("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json"),
    *("zero_to_fp32.py", "latest", "events.out.tfevents.1.host", "global_step10/mp_rank_00_model_states.pt"),
    *("checkpoint-100/config.json", "checkpoint-100/tokenizer.json", "Checkpoint-5/config.json"),
    *("runs/Jan01/events.out.tfevents.1", "runs/x/config.json", "logs/config.json", "wandb/run/config.json"),
    # data
    *("train.jsonl", "train.parquet", "data/config.json", "tests/test_model.py", "examples/run.py"),
    # other formats of the model
    *("onnx/config.json", "onnx/model.onnx", "onnx-int8/config.json", "ONNX/tokenizer.json", "openvino/config.json"),
    *("openvino/openvino_model.bin", "original/params.json", "original/tokenizer.model", "metal/config.json"),
    *("gguf/config.json", "coreml/fill-mask/config.json", "unet/model.safetensors", "vae/pytorch_model.bin"),
    *("2_Dense/onnx/model.onnx", "speech_tokenizer/model.safetensors", "fp16/model.safetensors.index.json"),
    # the model itself in a folder like a module's; what no module's weights are called
    *("0_Transformer/model.safetensors", "0_Transformer/pytorch_model.bin", "0_CLIPModel/model.safetensors"),
    *("2_Dense/other.safetensors", "2_Dense/deep/model.safetensors", "2_Dense/README.md", "Dense/model.safetensors"),
    # hidden files and folders
    *(".gitattributes", ".git/config", ".cache/huggingface/x.json", "1_Pooling/.hidden.json", "__pycache__/m.py"),
    # what nothing is known to read
    *("figures/plot.png", "figures/numbers.json", "assets/voice.wav", "other/notes.txt", "results/config.json"),
    # what is not inside
    *("/etc/config.json", "../config.json", "a/../../config.json", ""),
)


@pytest.mark.parametrize("name", COMPANIONS)
def test_companion_is_recognised(name: str) -> None:
    assert is_companion(PurePosixPath(name))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_companion_is_recognised(name: str) -> None:
    assert not is_companion(PurePosixPath(name))


def test_no_name_is_in_both_lists() -> None:
    assert not set(COMPANIONS) & set(OTHERS)
