"""The modules of deploy/gpu, which are run as scripts and import each other as such."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from tests.deploy.chart import ROOT

GPU = ROOT / "deploy/gpu"


def _modules(*names: str) -> list[Any]:
    sys.path.insert(0, str(GPU))
    try:
        return [import_module(name) for name in names]
    finally:
        sys.path.remove(str(GPU))


kit, fatbin = _modules("kit", "fatbin")
