"""A deployment of each kind, tiny and real, and which file of it is fuzzed under which flags."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from expo_serve.cli import delta
from tests.models.adapters import factors, write_adapter
from tests.models.raw import CONFIG, INDEX, tiny_tensors, write_index, write_pair, write_raw

ALPHA = ("--alpha", "0.5")
OUTSIDE = "outside"
"""Folder whose files no deployment may open."""
PICKLE_INDEX = "pytorch_model.bin.index.json"
_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
_BPE = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
_TOKENIZER = {"version": "1.0", "added_tokens": [{"id": 3, "content": "<s>"}], "model": {"type": "BPE", **_BPE}}
_SETTINGS = {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ messages }}", "model_max_length": 64}


@dataclass(frozen=True)
class Format:
    """One kind of foreign file."""

    name: str
    file: str
    """The file that is fuzzed, relative to the deployments' folder."""
    flags: tuple[str, ...]
    """The command line of ``expo-serve inspect``."""
    stays_inside: bool = True
    """False where the file itself is the user's and may name any folder."""
    more_seeds: tuple[bytes, ...] = field(default=(), repr=False)
    place: Callable[[Path, bytes], object] = Path.write_bytes

    def put(self, folder: Path, data: bytes) -> None:
        """Put the fuzzed file into its place."""
        self.place(folder / self.file, data)

    def seeds(self, folder: Path) -> list[bytes]:
        """Real files to begin with."""
        file = folder / self.file
        return [*([file.read_bytes()] if file.is_file() else []), *self.more_seeds]


def _pair(side: str) -> tuple[str, ...]:
    return ("--base", "base", "--aligned", side, *ALPHA)


def _delta(side: str) -> tuple[str, ...]:
    return ("--base", "base", "--delta", side, *ALPHA)


def formats() -> dict[str, Format]:
    """All kinds by name; relative paths, so that the working directory must be the deployments' folder."""
    from loadtests.fuzz.layouts import SEEDS, place_layout
    from loadtests.fuzz_pickle import real_files

    kinds = [
        Format("safetensors", "aligned/model.safetensors", _pair("aligned")),
        Format("full delta", "full/model.safetensors", _delta("full")),
        Format("packed delta", "packed/delta.safetensors", _delta("packed")),
        Format("adapter", "adapter/adapter_model.safetensors", _delta("adapter")),
        Format("adapter config", "adapter/adapter_config.json", _delta("adapter")),
        Format("index", f"sharded/{INDEX}", _pair("sharded")),
        Format("config", "aligned/config.json", _pair("aligned")),
        Format("base config", "base/config.json", _delta("adapter")),
        Format("tokenizer", "aligned/tokenizer.json", _pair("aligned")),
        Format("tokenizer config", "aligned/tokenizer_config.json", _pair("aligned")),
        Format("yaml", "flags.yaml", ("--config", "flags.yaml"), stays_inside=False, more_seeds=_YAML),
        Format("pickle", "pickled/pytorch_model.bin", (*_pair("pickled"), "--allow-pickle-index"),
               more_seeds=tuple(real_files())),
        Format("pickle index", f"pickled-shards/{PICKLE_INDEX}", (*_pair("pickled-shards"), "--allow-pickle-index")),
        Format("layout", "layout", _pair("layout"), more_seeds=SEEDS, place=place_layout),
    ]  # fmt: skip
    return {kind.name: kind for kind in kinds}


_YAML = (
    b"base: base\naligned: aligned\nalpha: 0.5\nalpha-rule: ['lm_head|embed_tokens=0', 'layers=1']\nunmatched: copy\n",
    b"base: base\ndelta: adapter\nalpha: -1e-1\nallow: [other-base]\nrounding: nearest\nmax-model-len: 512\n",
    b"pair: zephyr-7b-dpo\nallow-links: [base]\nrounding-seed: 7\nhf-token: false\nmetadata: {a: &x [1, 2], b: *x}\n",
    b"base: base\ndelta: full\ndelta-subfolder: x\nrevision: main\nalpha: 0.5\nserved_model_name: [a, b]\n",
)


def build(folder: Path) -> None:
    """Write every deployment into a folder that is empty."""
    base, aligned = write_pair(folder)
    for side in (base, aligned):
        (side / "tokenizer.json").write_text(json.dumps(_TOKENIZER))
        (side / "tokenizer_config.json").write_text(json.dumps(_SETTINGS))
    names = list(tiny_tensors())
    write_raw(folder / "sharded", shards=[names[:4], names[4:]])
    adapted: dict[str, Any] = {"alpha_pattern": {"layers.0.self_attn.q_proj": 8}, "bias": "none", "use_rslora": False}
    tensors = factors(_MODULES[0], 8, 8) | factors(_MODULES[1], 8, 8)
    write_adapter(folder / "adapter", {**tensors, "lm_head.weight": tiny_tensors(3)["lm_head.weight"]}, **adapted)
    write_raw(folder / "full", {name: 0.01 * tensor for name, tensor in tiny_tensors(2).items()})
    _write_packed(base, aligned, folder / "packed")
    _write_pickles(folder, names)
    (folder / OUTSIDE).mkdir()
    (folder / OUTSIDE / "config.json").write_text(json.dumps(CONFIG))
    save_file(tiny_tensors(4), folder / OUTSIDE / "model.safetensors")


def _write_packed(base: Path, aligned: Path, out: Path) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        if delta.main(["create", "--base", str(base), "--aligned", str(aligned), "--out", str(out)]):
            raise RuntimeError("the packed delta could not be made")


def _write_pickles(folder: Path, names: list[str]) -> None:
    tensors = tiny_tensors(5)
    for side, shards in (("pickled", [names]), ("pickled-shards", [names[:4], names[4:]])):
        write_raw(folder / side)
        (folder / side / "model.safetensors").unlink()
        files = ["pytorch_model.bin"] if len(shards) == 1 else [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
        for file, held in zip(files, shards, strict=True):
            torch.save({name: tensors[name] for name in held}, folder / side / file)
        if len(shards) > 1:
            write_index(folder / side, {name: files[name not in shards[0]] for name in names})
            (folder / side / INDEX).rename(folder / side / PICKLE_INDEX)
