"""The wording of vLLM's log and errors that the command line reads.

The keeper finds the root cause of a failure in the output of vLLM's processes, because a failing engine or worker
reports it nowhere else. These are all the strings of vLLM that this depends on; the names of vLLM that the package
imports are listed in :mod:`expo_serve.vllm_plugin.compat`. A test looks for each of them in vLLM's sources.
"""

from __future__ import annotations

import re

PROCESS_NAME_PREFIX = ("VLLM_PROCESS_NAME_PREFIX", "VLLM")
"""Environment variable and default of the prefix in the titles of vLLM's processes: ``VLLM::EngineCore``."""

FATAL = (
    "EngineCore failed to start",
    "WorkerProc failed to start",
    "EngineCore encountered a fatal error",
    "RuntimeError: Engine core initialization failed",
)
"""Lines that begin so are the first report of an engine or worker that has failed."""

ECHOES = (
    "Engine core initialization failed",
    "EngineDeadError",
    "EngineCore encountered an issue",
    "WorkerProc initialization failed",
    "Executor failed",
    "CancelledError",
)
"""Parts of exceptions that only repeat the failure of another process; they are never the root cause."""

_PREFIX = re.compile(
    r"^("
    r"\([\w-]+( pid=\d+)?\) "  # "(EngineCore pid=12) "
    r"|\[rank\d+\]: ?"  # "[rank0]: "
    r"|[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] "  # "ERROR 11-23 10:00:00 [core.py:12] "
    r")*"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Dead|Exit|Interrupt): \S.*")


def without_prefix(line: str) -> str:
    """Return a line of the log without vLLM's prefixes, colours and carriage return."""
    return _PREFIX.sub("", _COLOUR.sub("", line).strip("\r"))


def is_fatal(line: str) -> bool:
    """Return whether a line reports that an engine or worker has failed.

    Only the beginning of the line counts, because a request can put any text into the middle of one.
    """
    return line.startswith(FATAL)


def is_exception(line: str) -> bool:
    """Return whether a line is an exception, and not the echo of another process's failure."""
    return _EXCEPTION.match(line) is not None and not any(echo in line for echo in ECHOES)
