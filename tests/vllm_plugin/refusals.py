"""vLLM's serve command with flags that it refuses, as a process for the tests; started by ``tests.children.ask``.

The request is ``{"base": folder, "aligned": folder, "cases": [[[flag, ...], {variable: value}], ...]}``, the answer
what ``sentence_of`` says about each. A case that vLLM does not refuse would start an engine.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

from expo_serve.config import ExpoConfig, Pinned, Source
from expo_serve.vllm_plugin import compat, server
from expo_serve.vllm_plugin.loader import register_loader
from expo_serve.vllm_plugin.refused import sentence_of
from tests.children import asked, reply


def main(base: str, aligned: str, cases: list[tuple[list[str], dict[str, str]]]) -> None:
    """Answer all cases."""
    server.allow_plugins()
    compat.cli_env_setup()
    register_loader()
    pinned = Pinned(base=Source(name="b", path=base), aligned=Source(name="a", path=aligned))
    config = ExpoConfig(base="b", aligned="a", alpha=0.5, pinned=pinned)
    request = {"config": config.model_dump(mode="json"), "file_options": {}, "served_model_name": "a-expo-0.5"}
    reply([_answer(request, flags, variables) for flags, variables in cases])


def _answer(request: dict[str, Any], flags: list[str], variables: dict[str, str]) -> str | None:
    arguments = ["--port", "0", "--host", "127.0.0.1", *flags]
    with mock.patch.dict(os.environ, variables):
        command, args = server.parse({**request, "arguments": arguments})
        try:
            compat.configure_logging_from_args(args)
            command.validate(args)
            command.cmd(args)
        except Exception as error:  # noqa: BLE001 - whatever it is, the sentence about it is asked for
            return sentence_of(error) or f"not refused: {error!r:.200}"
    return "it served"


if __name__ == "__main__":
    main(**asked())
