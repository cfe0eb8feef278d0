"""The keeper of a reward model's server: :mod:`expo_serve.cli.keeper` for another process, and the same protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

from expo_serve.cli import processes
from expo_serve.cli.keeper import Keeper

_MODULE = "expo_serve.vllm_plugin.pooling"


class PoolingKeeper(Keeper):
    """One run of a pooling server, from start to exit code."""

    def _start(self) -> None:
        self._status_pipe, write_end = os.pipe()
        self._server = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(write_end,),
        )
        os.close(write_end)
        os.set_blocking(self._status_pipe, False)
        for output, target in ((self._server.stdout, 1), (self._server.stderr, 2)):
            assert output is not None
            self._log.follow(output.fileno(), target)
        assert self._server.stdin is not None
        with self._server.stdin as pipe:
            pipe.write(json.dumps({**self._request, "status_fd": write_end}).encode())


def main() -> int:
    """Read the request and run the server; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # not SIG_IGN: vLLM's processes would inherit it
    processes.adopt_orphans()
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)  # what follows is for the keeper
        if not byte:
            return 1
        line += byte
    return PoolingKeeper(json.loads(line)).run()


if __name__ == "__main__":
    sys.exit(main())
