"""The memory of one load in a fresh process, into parameters that nobody has touched: plain vLLM's or ours."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from expo_serve import memory
from tests.children import ask, asked, reply
from tests.inprocess import worker_config


def measure_load(path: Path, extra: dict[str, Any] | None) -> dict[str, int]:
    """Load in another process.

    Args:
        path: the checkpoint, or the aligned side.
        extra: the loader's extra config, for expo; None for plain vLLM.

    Returns:
        Bytes: what anonymous memory grew by beyond the weights, the peak of the resident set, and how much the pages of
        files in it grew.
    """
    found: dict[str, int] = ask(__name__, {"path": str(path), "extra": extra})
    return found


def _file_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


def _main(path: str, extra: dict[str, Any] | None) -> None:
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    with worker_config(path) as config:
        ours = {"load_format": "expo", "model_loader_extra_config": extra} if extra else {}
        loader = get_model_loader(replace(config.load_config, use_tqdm_on_load=False, **ours))
        with set_default_torch_dtype(config.model_config.dtype):
            model = loader.create_model(vllm_config=config, model_config=config.model_config)
        for thread in threading.enumerate():
            if thread.name == "expo-compile":  # its memory is the process's, not the load's
                thread.join()
        memory.reset_peak()
        anonymous, files = memory.anonymous_bytes(), _file_bytes()
        loader.load_weights(model, config.model_config)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        figures = {
            "anonymous_beyond_weights": memory.anonymous_bytes() - anonymous - weights,
            "peak_resident": memory.peak_resident_bytes(),
            "files_grown": _file_bytes() - files,
        }
    reply(figures)


if __name__ == "__main__":
    _main(**asked())
