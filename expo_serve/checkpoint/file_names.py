"""The names of files in a checkpoint's or an adapter's folder, as transformers and PEFT write them."""

from __future__ import annotations

INDEX_FILE = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
