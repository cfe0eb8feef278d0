"""Runs what a rendered container would run, on this machine: its own command, arguments and environment."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.deploy.chart import Object

# The project's commands stand where the image has them: first.
_PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
_REFERENCE = re.compile(r"\$(?:\$|\(([^)]*)\))")

Secrets = dict[tuple[str, str], str]
"""Name and key of a secret to its value."""


class Container:
    """One container of a pod.

    Args:
        spec: as rendered.
        folder: scratch volumes become folders in it, and paths on them in the environment move there. A volume that is
            mounted at a folder of this machine (the weights' in these tests) is that folder.
        secrets: what the cluster has of them.
        entrypoint: the image's, for a container without a command.
    """

    def __init__(self, spec: Object, folder: Path, secrets: Secrets, entrypoint: Sequence[str] = ()) -> None:
        self.home = folder / "home"
        self._volumes = {Path(mount["mountPath"]): folder for mount in spec["volumeMounts"]}
        for path in self._volumes:
            self._volumes[path] = path if path.is_relative_to(folder) else folder / str(path).strip("/")
        for path in (self.home, *self._volumes.values()):
            path.mkdir(parents=True, exist_ok=True)
        self.environment = {"PATH": _PATH}
        for one in spec.get("env", []):
            self.environment[one["name"]] = self._value(one, secrets)
        self.entrypoint = list(spec.get("command", entrypoint))
        self.args = [expand(word, self.environment) for word in spec.get("args", [])]

    def run(self, *, before: Sequence[str] = (), args: Sequence[str] | None = None) -> subprocess.CompletedProcess[str]:
        """To its end. ``before`` are words in front of the command, ``args`` others than its own."""
        process = self.start(before=before, args=args)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *, before: Sequence[str] = (), args: Sequence[str] | None = None) -> subprocess.Popen[str]:
        """In a process group of its own."""
        return subprocess.Popen(
            [*before, *self.entrypoint, *(self.args if args is None else args)],
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def _value(self, one: Object, secrets: Secrets) -> str:
        if "valueFrom" in one:
            reference = one["valueFrom"]["secretKeyRef"]
            return secrets[reference["name"], reference["key"]]
        value: str = one["value"]
        # The innermost: /tmp is a volume too, and the tests' folders lie there.
        path = max((path for path in self._volumes if Path(value).is_relative_to(path)), key=_depth, default=None)
        return str(self._volumes[path] / Path(value).relative_to(path)) if path else value


def _depth(path: Path) -> int:
    return len(path.parts)


def expand(word: str, environment: dict[str, str]) -> str:
    """As the kubelet does with a container's words: ``$(NAME)`` of a known name is its value, and ``$$`` is ``$``."""

    def replace(match: re.Match[str]) -> str:
        if match[1] is None:
            return "$"
        return environment.get(match[1], match[0])

    return _REFERENCE.sub(replace, word)
