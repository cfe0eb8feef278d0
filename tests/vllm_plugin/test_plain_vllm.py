"""Plain vLLM's own server module with our load format, endpoint plugin and worker extension named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from expo_serve.report import DeploymentReport
from expo_serve.vllm_plugin.worker import EXTENSION
from tests.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]
MODULE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


def test_server_module(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = tiny_pair
    extra = json.dumps({"base": str(base), "alpha": "0.5", "alpha_rules": ["embed_tokens=0"]})
    arguments = ["--model", str(aligned), "--load-format", "expo", "--model-loader-extra-config", extra]
    arguments += ["--worker-extension-cls", EXTENSION, "--enforce-eager", "--max-model-len", "64"]
    server = Server(arguments, tmp_path / "log", command=MODULE, VLLM_PLUGINS="expo")
    try:
        server.wait_ready()
        response = server.get("/v1/expo")
        report = DeploymentReport.model_validate_json(response.text)
        assert response.headers["X-Expo-Alpha"] == "0.5"
        assert report.alpha_rules == ["embed_tokens=0"]
        assert report.ranks[0].alphas == {"0.5": report.ranks[0].tensors["extrapolated"] - 1, "0": 1}
        assert {side: source.name for side, source in report.sources.items()} == {"base": "base", "aligned": "aligned"}
        assert all(len(source.fingerprint) == 16 for source in report.sources.values())
        assert str(base.parent) not in json.dumps(report.model_dump()["sources"])
        assert "expo_alpha{" in server.get("/metrics").text
        assert server.text().count("expo: loaded with alpha 0.5 in ") == 1
    finally:
        server.stop()
