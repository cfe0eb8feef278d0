"""What a load costs in memory, and how one ends when its storage fails: by vLLM's own loading of real models."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from expo_serve import kernels
from expo_serve.errors import CheckpointError
from tests.faults import Read, before_reads, fail_from
from tests.inprocess import worker_config
from tests.load_memory import measure_load
from tests.models import build_pair

pytestmark = pytest.mark.engine
MEBIBYTE = 1 << 20


def test_memory_is_the_models_own(demo_pair: tuple[Path, Path]) -> None:
    """Against plain vLLM's load of one side, each in a process of its own."""
    base, aligned = demo_pair
    plain, expo = measure_load(aligned, None), measure_load(aligned, {"base": str(base), "alpha": 0.5})
    assert expo["anonymous_beyond_weights"] - plain["anonymous_beyond_weights"] <= 64 * MEBIBYTE
    assert expo["peak_resident"] <= 1.05 * plain["peak_resident"]
    assert expo["files_grown"] <= 8 * MEBIBYTE  # libraries, not the 540 MB of checkpoints


def load_expo(base: Path, aligned: Path) -> None:
    """Load as a worker does, but let the error through as it is."""
    from vllm.model_executor.model_loader import get_model_loader

    with worker_config(aligned) as config:
        extra = {"base": str(base), "alpha": 0.5}
        loader = get_model_loader(replace(config.load_config, load_format="expo", model_loader_extra_config=extra))
        loader.load_model(vllm_config=config, model_config=config.model_config)


def threads_left() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("expo-") and name != "expo-compile"]


@pytest.mark.usefixtures("destination")
def test_a_read_error_ends_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = build_pair(tmp_path)
    with monkeypatch.context() as patch:
        before_reads(patch, fail_from(20, OSError(errno.EIO, os.strerror(errno.EIO))))
        patch.setattr(kernels, "available", lambda *_: False)  # its reads are not Python's
        with pytest.raises(CheckpointError, match=r"model.safetensors: tensor '.*' cannot be read: Input/output error"):
            load_expo(base, aligned)
    assert threads_left() == []
    load_expo(base, aligned)


@pytest.mark.usefixtures("destination")
def test_a_file_that_shrinks_while_it_is_loaded_ends_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = build_pair(tmp_path)

    def shrink_later(read: Read) -> None:
        if read.number == 20:
            os.truncate(base / "model.safetensors", 4096)

    with monkeypatch.context() as patch:
        before_reads(patch, shrink_later)
        patch.setattr(kernels, "available", lambda *_: False)
        with pytest.raises(CheckpointError, match=r"base/model.safetensors: tensor '.*' is cut"):
            load_expo(base, aligned)
    assert threads_left() == []
