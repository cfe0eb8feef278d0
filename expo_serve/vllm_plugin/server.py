"""The process that becomes vLLM's server: runs vLLM's own serve command with the flags that expo-serve sets.

``expo_serve.cli.keeper`` starts it and writes one JSON object on its standard input::

    {"config": ExpoConfig, "arguments": [flag, ...], "file_options": {key: value},
     "served_model_name": str, or null if a flag gives it, "status_fd": int, "state_fd": int,
     "sweep_fd": int, of a sweep's server only}

or ``{"help": topic}`` for a page of vLLM's own help. Once vLLM has accepted the flags and before the engine starts,
this process writes one line to ``status_fd``: ``{"host", "port", "uds", "shutdown_timeout"}``, and with
``--headless`` ``"ranks"``, how many this machine has. ``state_fd`` is the memory that the command's processes share
(:mod:`expo_serve.state.shared`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from shutil import which
from typing import Any, NoReturn

from expo_serve import errors
from expo_serve.config import ExpoConfig
from expo_serve.errors import ExpoError, UsageError
from expo_serve.keys import required_keys
from expo_serve.state.shared import adopt, report_as
from expo_serve.vllm_plugin import compat, sweeping
from expo_serve.vllm_plugin.address import refuse_taken
from expo_serve.vllm_plugin.caches import refuse_shared_stores
from expo_serve.vllm_plugin.plain_vllm import refuse_elastic_experts, refuse_other_front_ends
from expo_serve.vllm_plugin.refused import sentence_of
from expo_serve.vllm_plugin.worker import EXTENSION

_FILTERED_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
    "vllm.io_processor_plugins",
)
_PLUGIN = "expo"
DEFAULT_DRAIN_SECONDS = 5
"""For open requests after a signal: with vLLM's own end it fits into the 10 s that container engines give."""


def main() -> int:
    """Read the request, parse vLLM's flags and serve; returns the exit code."""
    request = json.load(sys.stdin)
    allow_plugins()
    if "state_fd" in request:
        adopt(request["state_fd"])
    try:
        serve(request)
    except ExpoError as error:
        report_as("server").fail(error.reason, error.message)
        errors.show(error)
        return error.exit_code
    return 0


def allow_plugins() -> None:
    """Set ``VLLM_PLUGINS`` to the plugins that vLLM would load anyway, and our endpoint plugin.

    The variable is what enables an endpoint plugin, but it also filters all other groups of plugins.
    """
    given = os.environ.get("VLLM_PLUGINS")
    if given is None:
        names = {plugin.name for group in _FILTERED_GROUPS for plugin in entry_points(group=group)}
    else:
        names = {name for name in given.split(",") if name}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {_PLUGIN}))


def serve(request: dict[str, Any]) -> None:
    """Run vLLM's server until it ends.

    Raises:
        CompatError: the installed vLLM lacks a name that expo-serve depends on.
        UsageError: vLLM refuses its flags, one that expo-serve sets itself was given in another spelling, or an API key
            is empty.
        AddressError: vLLM could not listen where it is told to.
    """
    from expo_serve.vllm_plugin.loader import register_loader

    if warning := compat.version_warning():
        errors.warn(warning)
    compat.cli_env_setup()
    # vLLM only logs that a plugin cannot be loaded; here it raises.
    register_loader()
    command, args = parse(request)
    if "sweep_fd" in request:
        sweeping.begin(request["sweep_fd"])
        sweeping.adapt(args, request["served_model_name"])
    _use_eager_without_compiler(args)
    with _refusals_in_one_line():
        compat.configure_logging_from_args(args)
        command.validate(args)
        refuse_elastic_experts(args.enable_elastic_ep)
        refuse_other_front_ends(args)
        if not args.headless:  # engines for another machine's API server open no port
            refuse_taken(args.host, args.port, args.uds)
        _write_status(request["status_fd"], args)
        args.shutdown_timeout = 0  # the keeper stops vLLM only when the drain, which is ours, is over
        command.cmd(args)


@contextmanager
def _refusals_in_one_line() -> Iterator[None]:
    """Turn an exception of vLLM's about its configuration into one of ours, with vLLM's sentence.

    Raises:
        UsageError: vLLM refuses a flag, or what the flags mean together.
    """
    try:
        yield
    except Exception as error:
        if sentence := sentence_of(error):
            raise UsageError(sentence) from error
        raise


def parse(request: dict[str, Any]) -> tuple[Any, Namespace]:
    """Return vLLM's serve command and its arguments.

    Raises:
        UsageError: vLLM's parser refuses a flag.
    """
    command = compat.ServeSubcommand()
    parser = compat.FlexibleArgumentParser(prog="expo-serve")
    subparser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    subparser.set_defaults(shutdown_timeout=DEFAULT_DRAIN_SECONDS)
    subparser.error = parser.error = _refuse  # else it prints and exits
    if "help" in request:
        parser.parse_args(["serve", f"--help={request['help']}"])
    config = ExpoConfig.model_validate(request["config"])
    ours = our_arguments(config, request["served_model_name"])
    from_file = flatten(request["file_options"], set(subparser._option_string_actions))
    args = parser.parse_args(["serve", *ours, *from_file, *request["arguments"]])
    args.model = args.model_tag
    args.hf_overrides = with_overrides(args.hf_overrides, config)
    _check_ours(args, config)
    required_keys(args.api_key, os.environ)
    refuse_shared_stores(args.kv_transfer_config, args.ec_transfer_config)
    return command, args


def _refuse(message: str) -> NoReturn:
    raise UsageError(message)


def our_arguments(config: ExpoConfig, served_model_name: str | None) -> list[str]:
    """Return the arguments of vLLM that expo-serve sets itself; the model comes first."""
    assert config.pinned is not None
    return [
        config.pinned.deployed.path,
        *_companion_flags(config.pinned.tokenizer),
        *(["--served-model-name", served_model_name] if served_model_name else []),
        "--model-loader-extra-config", config.model_dump_json(exclude_defaults=True),
        "--worker-extension-cls", EXTENSION,
        "--load-format", "expo",
    ]  # fmt: skip


def _companion_flags(folder: str | None) -> list[str]:
    """Return flags for the tokenizer and the generation config of a delta; the user's own flags follow and win."""
    if folder is None:
        return []
    has_config = Path(folder, "generation_config.json").is_file()
    return ["--tokenizer", folder, *(["--generation-config", folder] if has_config else [])]


def flatten(options: dict[str, Any], known: set[str]) -> list[str]:
    """Turn the keys of a ``--config`` file into flags, by vLLM's own rules (``load_config_file``).

    Args:
        options: content of the file, without the keys of expo-serve.
        known: vLLM's flags, to find the ``--no-`` form for a value of false.
    """
    flags: list[str] = []
    for key, value in options.items():
        flag, negation = f"--{key}", f"--no-{key}".replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is False:
            flags += [negation] if negation in known else []
        elif isinstance(value, list):
            flags += [flag, *(str(item) for item in value)] if value else []
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def with_overrides(given: Any, config: ExpoConfig) -> Any:
    """Return the value of ``--hf-overrides``: the user's own, and the keys that a delta changes (a larger vocabulary).

    The user's keys win.
    """
    overrides = config.pinned.overrides if config.pinned else {}
    given = json.loads(given) if isinstance(given, str) else given
    return {**overrides, **(given or {})} if overrides else given


def _check_ours(args: Namespace, config: ExpoConfig) -> None:
    """Refuse values of the flags that expo-serve sets: vLLM's parser accepts abbreviations and dotted keys too."""
    assert config.pinned is not None
    extra = args.model_loader_extra_config
    extra = json.loads(extra) if isinstance(extra, str) else extra
    expected = json.loads(config.model_dump_json(exclude_defaults=True))
    for flag, found, wanted in (
        ("--model", args.model, config.pinned.deployed.path),
        ("--load-format", args.load_format, "expo"),
        ("--worker-extension-cls", args.worker_extension_cls, EXTENSION),
        ("--model-loader-extra-config", extra, expected),
    ):
        if found != wanted:
            raise UsageError(f"{flag} is set by expo-serve; leave it out (found {found!r})")


def _use_eager_without_compiler(args: Namespace) -> None:
    if not compat.current_platform.is_cpu() or not (problem := compiler_problem()):
        return
    # vLLM compiles a few functions in any case, such as that for log-probabilities of prompts: a request for these
    # would end the engine. Its processes take this from the environment.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    if not args.enforce_eager:
        args.enforce_eager = True
        errors.warn(f"{problem}: vLLM cannot compile the model on CPU, running with --enforce-eager (slower)")


def compiler_problem() -> str | None:
    """Return the reason why vLLM's compilation on CPU cannot work, in a few words; None if it can."""
    compiler = os.environ.get("CXX") or "g++"
    if which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    if which("lscpu") is None:
        return "no lscpu"
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <Python.h>\n#include <cmath>\nint probe() { return int(std::floor(0.5)); }\n")
            flags = ["-shared", "-fPIC", "-fopenmp", f"-I{sysconfig.get_path('include')}"]
            command = [compiler, *flags, str(source), "-o", str(source.with_suffix(".so"))]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
    except subprocess.CalledProcessError as error:
        if b"Python.h" in error.stderr:
            return "no headers of Python (Python.h)"
        return f"the C++ compiler ({compiler}) does not work"
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler ({compiler}) does not work ({type(error).__name__})"
    return None


def ranks_here(args: Namespace) -> int:
    """Return how many ranks a machine has on which no API server runs: all machines have as many."""
    ranks = args.tensor_parallel_size * args.pipeline_parallel_size * args.prefill_context_parallel_size
    if args.nnodes > 1:
        return int(ranks * args.data_parallel_size // args.nnodes)
    return int(ranks * (args.data_parallel_size_local or 1))


def _write_status(status_fd: int, args: Namespace) -> None:
    status = {key: getattr(args, key, None) for key in ("host", "port", "uds", "shutdown_timeout")}
    if args.headless:
        status["ranks"] = ranks_here(args)
    with os.fdopen(status_fd, "w") as status_file:
        status_file.write(json.dumps(status) + "\n")


if __name__ == "__main__":
    sys.exit(main())
