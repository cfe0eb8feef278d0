"""How long loading a pair takes, against plain vLLM's load of the aligned side alone.

Both loaders fill the same model, in this process, in turn, from a warm page cache, into parameters that were
touched before, with one torch thread as vLLM's CPU worker has. The ratio is what counts; machines are noisy.

    python -m loadtests.load_time [--rounds 7] [--size demo|0.5b|1.1b] [--out loadtests/results/load_time.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from loadtests.machine import describe
from tests.inprocess import worker_config

DEMO = Path(".demo")
ALPHA = 0.5
_SHAPES = {
    "0.5b": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 18},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
}


@contextmanager
def pair_of(size: str) -> Iterator[tuple[Path, Path]]:
    """The demo's pair, or a random Llama-shaped one in bf16 that is removed in the end."""
    if size == "demo":
        yield DEMO / "base", DEMO / "aligned"
        return
    config = transformers.LlamaConfig(
        **_SHAPES[size], num_attention_heads=16, num_key_value_heads=16, vocab_size=32000, tie_word_embeddings=False
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    with tempfile.TemporaryDirectory(prefix="expo-load-time-") as folder:
        for seed, side in enumerate(("base", "aligned")):
            torch.manual_seed(seed)
            tensors = {name: torch.randn(tensor.shape).to(torch.bfloat16) for name, tensor in shapes.items()}
            config.save_pretrained(Path(folder, side))
            save_file(tensors, Path(folder, side, "model.safetensors"), metadata={"format": "pt"})
        yield Path(folder, "base"), Path(folder, "aligned")


def measure(base: Path, aligned: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each load, plain and expo in turn; the first round of both only warms up."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"plain": [], "expo": []}
    with worker_config(aligned) as config:
        with set_default_torch_dtype(config.model_config.dtype):
            loader = get_model_loader(config.load_config)
            model = loader.create_model(vllm_config=config, model_config=config.model_config)
        extra = {"base": str(base), "alpha": ALPHA}
        formats = {
            "plain": replace(config.load_config, use_tqdm_on_load=False),
            "expo": replace(config.load_config, load_format="expo", model_loader_extra_config=extra),
        }
        for index in range(rounds + 1):
            for name, load_config in formats.items():
                started = time.perf_counter()
                get_model_loader(load_config).load_weights(model, config.model_config)
                if index:
                    seconds[name].append(time.perf_counter() - started)
        size = sum(parameter.nbytes for parameter in model.parameters())
    return {"weight_bytes": size, "seconds": seconds, **_summary(seconds)}


def _summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    ratios = [expo / plain for plain, expo in zip(seconds["plain"], seconds["expo"], strict=True)]
    return {
        "plain_median_seconds": statistics.median(seconds["plain"]),
        "expo_median_seconds": statistics.median(seconds["expo"]),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main() -> None:
    """Measure one size, print the figures, add them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=("demo", *_SHAPES), default="demo")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/load_time.json"))
    options = parser.parse_args()
    with pair_of(options.size) as (base, aligned):
        figures = measure(base, aligned, options.rounds)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results[options.size] = {"machine": describe(), **figures}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print({key: round(value, 3) for key, value in figures.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
