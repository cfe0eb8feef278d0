"""What the tests of refused addresses share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from expo_serve.errors import AddressError
from expo_serve.vllm_plugin.address import refuse_taken

NOBODY = 65534


def refusal(host: str | None, port: int, uds: str | None = None) -> str:
    """The line that an address is refused with."""
    with pytest.raises(AddressError) as caught:
        refuse_taken(host, port, uds)
    line = str(caught.value)
    assert "\n" not in line
    return line


@contextmanager
def process(code: str, *arguments: str) -> Iterator[int]:
    """Another process, which has said that it is ready."""
    command = [
        sys.executable,
        "-c",
        f"import socket, sys, time\n{code}\nprint(flush=True)\ntime.sleep(600)",
        *arguments,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid
        child.kill()


def as_nobody(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code as a user without rights; only root can become one."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user without rights")
    before = f"import os, sys; from expo_serve.vllm_plugin.address import refuse_taken; os.setuid({NOBODY})\n"
    command = [sys.executable, "-c", before + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
