"""The deltas that are measured: what takes a pair's base to an aligned side, in each of the three kinds.

A random adapter of rank 16 (or 8), scaled so that about as many bf16 values change as in the demo's real run; the
aligned side is base with that adapter merged, as `expo-serve delta apply` writes it; from the two come the packed and
the full delta. Everything is removed in the end unless `--keep` is given.

    python -m loadtests.deltas --size 1.1b --keep     make them in .bench/deltas and leave them there
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loadtests.pairs import DEMO, Pair, pair_of, weight_files
from loadtests.results import parser

KINDS = ("lora16", "lora8", "packed", "full")
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_A_SPREAD, _B_SPREAD = 0.02, 6e-5
_ADAPTER_OF_DEMO = Path("deploy/demo/adapter")


@dataclass(frozen=True)
class Deltas:
    """A base, an aligned side, and what leads from one to the other."""

    size: str
    pair: Pair
    folder: Path

    def path(self, kind: str) -> Path:
        """The folder of a delta."""
        is_real = self.size == "demo" and kind == "lora16"
        return _ADAPTER_OF_DEMO if is_real else self.folder / kind

    def nbytes(self, kind: str) -> int:
        """Size of a delta's files with weights."""
        return sum(file.stat().st_size for file in weight_files(self.path(kind)))


@contextmanager
def deltas_of(size: str, work: Path, keep: bool = False) -> Iterator[Deltas]:
    """The deltas of a size, made unless they are there, and removed in the end unless ``keep``."""
    folder = work / "deltas" / size
    there = folder.is_dir()
    with pair_of(size, work, keep) as pair:
        if not there:
            unfinished = folder.with_name(f"{size}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            _make(size, pair, unfinished)
            unfinished.rename(folder)
        # The random pair's own aligned side has four fifths of its values changed, more than any alignment does.
        aligned = pair.aligned if size == "demo" else folder / "aligned"
        try:
            yield Deltas(size, Pair(size, pair.base, aligned), folder)
        finally:
            if not (keep or there):
                shutil.rmtree(folder)


def _make(size: str, pair: Pair, folder: Path) -> None:
    for rank in (16, 8):
        _write_adapter(pair.base, folder / f"lora{rank}", rank)
    aligned = DEMO / "aligned"
    if size != "demo":
        aligned = folder / "aligned"
        _command("apply", "--base", pair.base, "--delta", folder / "lora16", "--out", aligned)
    _command("create", "--base", pair.base, "--aligned", aligned, "--out", folder / "packed")
    # Four fifths of the values changed: a difference that no coding makes small.
    _command("create", "--base", pair.base, "--aligned", pair.aligned, "--out", folder / "dense")
    _write_full(pair.base, aligned, folder / "full")


def _command(action: str, *arguments: str | Path) -> None:
    program = Path(sys.executable).with_name("expo-serve")
    subprocess.run([program, "delta", action, *arguments], check=True, stdout=subprocess.DEVNULL)


def _write_adapter(base: Path, folder: Path, rank: int) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for file in weight_files(base):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                module = name.removesuffix(".weight")
                if module.rsplit(".", 1)[-1] not in _MODULES:
                    continue
                outputs, inputs = opened.get_slice(name).get_shape()
                place = f"base_model.model.{module}"
                a, b = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
                tensors[f"{place}.lora_A.weight"] = (_A_SPREAD * a).bfloat16()
                tensors[f"{place}.lora_B.weight"] = (_B_SPREAD * b).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(_MODULES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _write_full(base: Path, aligned: Path, folder: Path) -> None:
    """``aligned - base`` in bf16, as such deltas were published."""
    folder.mkdir()
    shutil.copy(aligned / "config.json", folder)
    for before, after in zip(weight_files(base), weight_files(aligned), strict=True):
        with safe_open(before, "pt") as one, safe_open(after, "pt") as other:
            steps = {name: other.get_tensor(name) - one.get_tensor(name) for name in other.keys()}  # noqa: SIM118
        save_file(steps, folder / after.name)


def main() -> None:
    """Make the deltas of one size and say how large they are."""
    options = parser(__doc__, size="1.1b", rounds=0).parse_args()
    with deltas_of(options.size, options.work, keep=True) as deltas:
        for kind in (*KINDS, "dense"):
            print(f"{deltas.path(kind)}: {deltas.nbytes(kind) / deltas.pair.side_bytes:.1%} of the checkpoint")


if __name__ == "__main__":
    main()
