"""The real command over base and an adapter that brings its own tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from expo_serve.report import DeploymentReport
from tests.models.deltas import write_lora
from tests.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_adapter_with_a_tokenizer(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = tiny_pair
    assert not list(base.glob("tokenizer*"))
    adapter = write_lora(base, tmp_path / "adapter")
    for file in aligned.glob("tokenizer*"):
        shutil.copy(file, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/else"}))
    flags = ["--base", str(base), "--delta", str(adapter), "--alpha", "0.5", "--enforce-eager", "--max-model-len", "64"]
    flags += ["--allow", "other-base"]
    server = Server(flags, tmp_path / "log")
    try:
        server.wait_ready()
        body = {"model": "adapter-expo-0.5", "prompt": "Hello", "max_tokens": 2}
        assert server.post("/v1/completions", body).status_code == 200
        report = DeploymentReport.model_validate_json(server.get("/v1/expo").text)
        assert {side: source.name for side, source in report.sources.items()} == {"base": "base", "delta": "adapter"}
        (rank,) = report.ranks
        assert rank.read_bytes["delta"] == (adapter / "adapter_model.safetensors").stat().st_size - header_bytes(
            adapter
        )
        assert rank.unchanged == rank.tensors["copied"]
        metrics = server.get("/metrics").text
        assert 'expo_load_read_bytes{engine="0",rank="0",source="delta"}' in metrics
        assert 'delta="adapter"' in metrics
        assert 'aligned=""' in metrics
        assert report.allowed == ["other-base"]
        assert "trained on 'someone/else', base is 'base'" in server.text()
        assert "(allowed: other-base)" in server.text()
    finally:
        server.stop()


def header_bytes(folder: Path) -> int:
    """Of its file, all but the weights."""
    return 8 + int.from_bytes((folder / "adapter_model.safetensors").read_bytes()[:8], "little")
