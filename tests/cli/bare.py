"""The real command in environments that lack what most programs take for granted."""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

PATH = "/usr/local/bin:/usr/bin:/bin"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
READ_ONLY = "for mount in / /tmp /var/tmp /dev/shm; do mount -o remount,bind,ro $mount 2>/dev/null; done; exec "
COMMAND = [sys.executable, "-m", "expo_serve"]
ROOT = Path(__file__).parents[2]


class Bare(NamedTuple):
    """An environment."""

    variables: Mapping[str, str] = MappingProxyType({})
    """Beside PATH, which is all that every environment has."""
    redirections: str = ""
    """As a shell writes them: ``2>&-`` closes standard error."""
    namespaces: str = ""
    """Flags of unshare(1)."""
    before: str = ""
    """What a shell does first, in the namespaces."""

    def start(self, *command: str, folder: Path | None = None) -> subprocess.Popen[str]:
        """Start a program in the environment, with pipes for what is open of its output."""
        if self.namespaces:
            need(self.namespaces)
        script = f"{self.before}{shlex.join(command)} {self.redirections}"
        outside = ["unshare", *self.namespaces.split(), "--"] if self.namespaces else []
        return subprocess.Popen(
            [*outside, "sh", "-c", script if self.before else f"exec {script}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": PATH, **self.variables, "PYTHONPATH": str(ROOT)},
            text=True,
            encoding="utf-8",
        )


@functools.cache
def _problem(namespaces: str) -> str:
    try:
        result = subprocess.run(["unshare", *namespaces.split(), "true"], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return result.stderr.strip()


def need(namespaces: str) -> None:
    """Skip the test where such namespaces cannot be had."""
    if problem := _problem(namespaces):
        pytest.skip(f"no namespaces here: {problem}")


UNKNOWN_USER = "--user --map-user=12345 --map-group=12345"
"""One that no file names, as a container's often is."""
PROCESS_1 = "--pid --fork --mount-proc"
ENVIRONMENTS = {
    "ASCII": Bare(ASCII),
    "nothing": Bare(),
    "no home": Bare({"HOME": "/no/such/folder"}),
    "no folder for temporary files": Bare({"TMPDIR": "/no/such/folder", "HOME": "/no/such/folder"}),
    "read-only": Bare(namespaces="--mount", before=READ_ONLY),
    "unknown user": Bare(ASCII, namespaces=UNKNOWN_USER),
    "process 1": Bare(namespaces=PROCESS_1),
    "no input": Bare(redirections="<&-"),
    "no output": Bare(redirections=">&-"),
    "no standard error": Bare(redirections="2>&-"),
    "none of the three": Bare(redirections="<&- >&- 2>&-"),
}
