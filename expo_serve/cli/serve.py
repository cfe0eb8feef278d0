"""``expo-serve``: check everything, then run vLLM's server and watch it.

Four processes take part: this one, which has the process id that the user knows; the status process, which answers on
the status port; the keeper, which starts vLLM, watches it, and ends all of it if this process dies; and vLLM's server
with its own children.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from expo_serve import errors
from expo_serve.cli.family import Family, listen
from expo_serve.cli.key_flag import refuse_unusable_keys
from expo_serve.cli.options import Options, add_source_flags, read_options
from expo_serve.cli.parser import Parser
from expo_serve.cli.running import add_running_flags, host_of, read_running
from expo_serve.config import ExpoConfig
from expo_serve.errors import ExpoError, SourceError, UsageError

_EPILOG = """\
All flags of `vllm serve` are accepted too, with the same meaning.
  expo-serve --help=all        all of vLLM's flags
  expo-serve --help=port       flags with "port" in their name (also --help=ModelConfig, ...)

Other commands (see expo-serve COMMAND --help):
  expo-serve inspect           show what a load would do; reads headers only
  expo-serve merge --out DIR   write the extrapolated checkpoint
  expo-serve sweep             which alpha? Measure one after another in one engine
  expo-serve delta create      pack the difference of two checkpoints (also: verify, apply)
  expo-serve probe --alpha X   check that a running server serves this alpha, for readiness probes
  expo-serve pairs             published pairs and their alphas

Exit codes: 0 success, also after SIGTERM while serving; 2 the command line or the pair is wrong; 1 loading or
serving failed; 128+n ended by signal n before serving.
"""
_CHANGES_WEIGHTS = "opens routes that change weights, but alpha is pinned for a server"
_REFUSED_VARIABLES = {
    "VLLM_SERVER_DEV_MODE": _CHANGES_WEIGHTS,
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": _CHANGES_WEIGHTS,
    "VLLM_USE_RUST_FRONTEND": "starts a front end without /v1/expo, the drain and the checks of keys and alpha",
}


def main(arguments: list[str], started: float) -> int:
    """Serve; returns the exit code.

    Args:
        arguments: the command line without the program's name.
        started: CLOCK_MONOTONIC at the start of the command, in seconds.
    """
    if topic := next((item for item in arguments if item.startswith("--help=")), None):
        return _vllm_help(topic.removeprefix("--help="))
    options = _read(arguments)
    running = read_running(options)
    refuse_variables()
    refuse_unusable_keys(options)
    listener = None if running.status_port is None else listen(host_of(options), running.status_port)
    with Family(started, running.engine_timeout, listener) as family:
        code = _serve(family, options, started)
        if code:
            family.linger()
    return code


def parser() -> Parser:
    """Return the parser of the command; vLLM's flags are not in it."""
    parser = Parser(
        prog="expo-serve",
        description="Serve aligned + alpha * (aligned - base) with vLLM; the weights are computed during the load.",
        epilog=_EPILOG,
    )
    add_source_flags(parser)
    add_running_flags(parser)
    return parser


def _read(arguments: list[str]) -> Options:
    if arguments and not arguments[0].startswith("-"):
        raise UsageError(f"unexpected {arguments[0]!r}: name the models with --base and --aligned or --delta")
    return read_options(parser(), arguments)


def refuse_variables() -> None:
    """Refuse variables of vLLM's that let clients change weights, or go around what this server promises.

    Raises:
        UsageError: names the variable.
    """
    for name, reason in _REFUSED_VARIABLES.items():
        if os.environ.get(name, "").strip().lower() not in ("", "0", "false"):
            raise UsageError(f"{name} {reason}; unset it")


def _serve(family: Family, options: Options, started: float) -> int:
    """Check the sources, and serve them until the end; returns the exit code."""
    try:
        family.reporter.update(alpha=options.config.alpha_text)
        family.reporter.enter("resolve")
        with family.reaping():
            request = _request(resolve(options, started, family.warn), options)
        family.reporter.update(names=[request["served_model_name"]] if request["served_model_name"] else None)
        family.reporter.enter("start")
        code = family.keep(request)
    except ExpoError as error:
        errors.show(error)
        family.fail(error)
        return error.exit_code
    if code:
        family.reporter.enter("failed")
    return code


def resolve(options: Options, started: float, warn: Callable[[str], None] = errors.warn) -> ExpoConfig:
    """Find, check and pin the sources, and say what is to be known about them.

    Args:
        options: the command line.
        started: CLOCK_MONOTONIC at the start of the command, in seconds.
        warn: is told of each warning.

    Raises:
        ExpoError: the sources would not be served.
    """
    from expo_serve.plan.prepare import pin, prepare
    from expo_serve.plan.tokenizers import tokenizer_problem

    check_vllm()
    plan = prepare(options.config, options.hub)
    for warning in plan.warnings:
        warn(warning)
    problem = tokenizer_problem(plan)
    if problem and not _names_tokenizer(options):
        raise SourceError(f"{problem}, or name another with --tokenizer, or serve without one: --skip-tokenizer-init")
    return pin(options.config, plan, started, on_terminal=sys.stderr.isatty())


def _names_tokenizer(options: Options) -> bool:
    """Return whether a flag of vLLM replaces the tokenizer, or does without one."""
    flags = {argument.split("=")[0].replace("_", "-").removeprefix("--") for argument in options.arguments}
    return not {"tokenizer", "skip-tokenizer-init"}.isdisjoint(
        flags | {key.replace("_", "-") for key in options.file_options}
    )


def check_vllm() -> None:
    """Require vLLM to be installed.

    Raises:
        ExpoError: it is not.
    """
    if find_spec("vllm") is None:
        raise ExpoError("vLLM is not installed: pip install '.[cuda]' (or [cpu], see the README)")


def _request(config: ExpoConfig, options: Options) -> dict[str, Any]:
    """Return the request for ``expo_serve.vllm_plugin.server``, which documents the keys."""
    assert config.pinned is not None
    given = any(item.split("=")[0].replace("_", "-") == "--served-model-name" for item in options.arguments)
    given = given or "served-model-name" in options.file_options
    return {
        "config": config.model_dump(mode="json"),
        "arguments": options.arguments,
        "file_options": options.file_options,
        "served_model_name": None if given else f"{config.pinned.named_after.short_name}-expo-{config.alpha_text}",
    }


def _vllm_help(topic: str) -> int:
    check_vllm()
    command = [sys.executable, "-m", "expo_serve.vllm_plugin.server"]
    return subprocess.run(command, input=json.dumps({"help": topic}), text=True, check=False).returncode
