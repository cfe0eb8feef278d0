"""Load tests run as people run them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_for_minutes(module: str, name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run one of both as people do; returns the figures that it kept."""
    work = tempfile.mkdtemp(prefix="run-", dir="/tmp")  # a test's own folder is too long for the sockets in it
    places = ["--work", work, "--results", str(folder)]
    command = [sys.executable, "-m", module, *arguments, *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    shutil.rmtree(work)
    figures: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())["demo"]
    assert figures["machine"]
    return figures
