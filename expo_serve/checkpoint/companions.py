"""Tells the companion files of a model from its weights by their names alone: config, tokenizer, templates, code.

At the top of a folder everything is a companion but what is known to hold weights, a state of training, an archive or
an adapter: what a model's own code reads cannot be listed. In subfolders it is the other way round, since most of them
hold the model in another format: only what is known to be read is a companion.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".llamafile", ".nemo", ".h5", ".hdf5", ".keras"}
    | {".msgpack", ".onnx", ".onnx_data", ".ot", ".pb", ".tflite", ".mlmodel", ".engine", ".plan", ".distcp"}
    | {".pkl", ".pickle", ".joblib", ".mar"}
)
_ARCHIVES_AND_DATA = frozenset(
    {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".parquet", ".arrow", ".jsonl"}
)
# Of other tools, which store weights under names whose suffix says nothing.
_NO_COMPANION = re.compile(
    r".*\.index\.json"  # of shards
    r"|adapter_config\.json|adapter_model\..*"
    r"|trainer_state\.json|zero_to_fp32\.py|latest|.*\.tfevents\..*"  # states of a training
    r"|(model|weights)[-_.\w]*\.npz"
    r"|.*\.ckpt\.(data-.*|index|meta)|.*\.safetensors\..*|.*\.gguf\..*|.*\.onnx[._]data.*"
)
_OTHER_FOLDER = re.compile(
    r"\..*|__pycache__"
    r"|(onnx|openvino|coreml|gguf|mlx|tflite|tensorrt|trt|flax|tf)([-_.].*)?"  # the model in another format
    r"|original|metal|checkpoints?([-_]\d+)?|global_step\d+|epoch[-_]?\d+|step[-_]?\d+|optimizer"
    r"|runs|logs?|lightning_logs|wandb|mlruns|tensorboard|tmp"
    r"|eval|evals|evaluation|results?|benchmarks?|examples?|demos?|scripts?|tests?|docs?|data|datasets?"
)
_TEXTS = frozenset((".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".py"))
_READ_IN_SUBFOLDERS = re.compile(
    r".*\.(jinja|py|tiktoken|spm)"
    r"|config.*\.json|.*_config\.json|.*process(or|ing).*\.json|chat_template\.json|modules\.json"
    r"|tokenizer.*\.(json|model)|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|tekken\.json|spiece\.model|sentencepiece.*\.model"
)
# Of sentence-transformers: 1_Pooling, 2_Dense. A transformer in such a folder is the model itself.
_MODULE = re.compile(r"\d+_(?P<kind>\w+)")
_MODEL_KINDS = frozenset(("Transformer", "CLIPModel", "MLMTransformer", "WordEmbeddings", "StaticEmbedding"))
_MODULE_WEIGHTS = frozenset(("model.safetensors", "pytorch_model.bin"))


def is_companion(relative_path: PurePosixPath) -> bool:
    """Return whether a file of a model's folder belongs to the model and holds none of its weights.

    Companions are the config, tokenizer, chat templates, processors and code, and with them the modules that
    sentence-transformers keeps in numbered subfolders, whose small weights no checkpoint holds. Weights of the model
    in any format, an adapter's files, the index of shards, states of training, archives and hidden files are none.

    Args:
        relative_path: path of the file in the folder; nothing is read.
    """
    *folders, name = relative_path.parts or ("",)
    if relative_path.is_absolute() or not name or name.startswith(".") or ".." in folders:
        return False
    if any(_OTHER_FOLDER.fullmatch(folder.lower()) for folder in folders):
        return False
    if len(folders) == 1 and (module := _MODULE.fullmatch(folders[0])) and name in _MODULE_WEIGHTS:
        return module["kind"] not in _MODEL_KINDS
    if _is_weights(name):
        return False
    if not folders:
        return True
    if _MODULE.fullmatch(folders[0]):
        return PurePosixPath(name).suffix.lower() in _TEXTS
    return _READ_IN_SUBFOLDERS.fullmatch(name.lower()) is not None


def _is_weights(name: str) -> bool:
    """Return whether a name is that of weights, or of what lies beside them and is not the model's."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in _WEIGHTS or suffix in _ARCHIVES_AND_DATA or _NO_COMPANION.fullmatch(name.lower()) is not None
