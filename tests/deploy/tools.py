"""Where the tools of these tests are, and what a test says when one is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.install import BIN, FOLDER

HELM = str(BIN / "helm")
KUBECTL = str(BIN / "kubectl")
PROMTOOL = str(BIN / "promtool")
PROMETHEUS = str(BIN / "prometheus")
CHECKOV = str(FOLDER / "venv/bin/checkov")
HADOLINT = str(FOLDER / "venv/bin/hadolint")
PYTHON = str(FOLDER / "venv/bin/python")
"""Has kubernetes-validate."""


def need(tool: str) -> str:
    """``tool``, if it is there. Prometheus' two may be missing (a machine without apt): that skips. Others fail."""
    if Path(tool).exists():
        return tool
    name = Path(tool).name
    if tool in (PROMTOOL, PROMETHEUS):
        pytest.skip(f"{name} is neither on PATH nor brought by apt-get: run `make test` where one of them has it")
    pytest.fail(f"{name} is not in .deploy: run `make test` (or `python3.11 -m tests.deploy.install`)")
