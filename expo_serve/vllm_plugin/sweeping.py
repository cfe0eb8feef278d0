"""The server of a sweep: takes another alpha from the command that started it, over a socket that nobody else has.

Protocol, one JSON object a line: the command sends ``{"alpha": number}``; the server answers ``{"report":
DeploymentReport}`` when that alpha is served, or ``{"error": message}``. The end of the socket ends the server, so that
it never outlives the command.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any

from expo_serve import errors
from expo_serve.config import parse_alpha
from expo_serve.errors import UsageError
from expo_serve.report import DeploymentReport
from expo_serve.vllm_plugin import compat

channel: socket.socket | None = None
"""This process's end of the socket; None in a server that is not a sweep's."""

_tasks: set[asyncio.Task[None]] = set()
"""Held: the event loop itself keeps only weak references."""

Switch = Callable[[float], Awaitable[DeploymentReport]]


def begin(descriptor: int) -> None:
    """Make this process the server of a sweep.

    Args:
        descriptor: of its end of the socket.
    """
    global channel
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)  # for vLLM's processes that are not forks
    channel.setblocking(False)


def adapt(args: Namespace, served_model_name: str) -> None:
    """Set and refuse flags of vLLM as weights that change in place demand.

    Args:
        args: vLLM's parsed flags.
        served_model_name: the name that the sweep asks for.

    Raises:
        UsageError: a flag would let answers of one alpha depend on what another computed, or needs several front ends.
    """
    for flag in ("kv_transfer_config", "ec_transfer_config", "kv_offloading_size"):
        if getattr(args, flag, None):
            raise UsageError(
                f"--{flag.replace('_', '-')}: a sweep loads one alpha after another into one engine, and what is "
                "stored outside of it would be taken for another alpha's; leave the flag out"
            )
    if args.served_model_name != [served_model_name] or args.api_key:
        raise UsageError("a sweep sets the served name and the API key itself: leave both flags out")
    if args.logprobs_mode != "raw_logprobs":
        raise UsageError(
            "--logprobs-mode: a sweep compares log-probabilities of answers with those of prompts, which "
            "vLLM gives raw; leave the flag out"
        )
    if args.headless or (args.api_server_count or 1) > 1:
        raise UsageError("a sweep has one API server: leave --headless and --api-server-count out")
    args.api_server_count = 1
    if compat.current_platform.is_cpu() and not args.enforce_eager:
        # A compiled graph holds the packed matrices that it was compiled with.
        args.enforce_eager = True
        errors.warn("on the CPU a sweep runs with --enforce-eager, since vLLM's compiled code keeps the first weights")


def listen(end: socket.socket, switch: Switch) -> None:
    """Take alphas from the command from now on, in a task of the running event loop."""
    task = asyncio.get_running_loop().create_task(_serve(end, switch))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def _serve(end: socket.socket, switch: Switch) -> None:
    reader, writer = await asyncio.open_connection(sock=end)
    try:
        while line := await reader.readline():
            writer.write(json.dumps(await _answer(line, switch)).encode() + b"\n")
            await writer.drain()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


async def _answer(line: bytes, switch: Switch) -> dict[str, Any]:
    try:
        report = await switch(parse_alpha(json.loads(line)["alpha"]))
    except Exception as error:  # noqa: BLE001 - whatever went wrong ends the sweep, which says so
        lines = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {lines[-1] if lines else error!r}"}
    return {"report": report.model_dump(mode="json")}
