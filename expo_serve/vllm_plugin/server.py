"""The process that becomes vLLM's server: vLLM's own serve command, with our flags set.

It is started by ``expo_serve.cli.keeper``, which writes one JSON object on its standard input::

    {"config": ExpoConfig, "arguments": [flag, ...], "file_options": {key: value},
     "served_model_name": str or null when a flag gives it, "status_fd": int}

or ``{"help": topic}`` for a page of vLLM's own help;

and reads one line from ``status_fd``: ``{"host", "port", "uds", "shutdown_timeout"}``, written when
vLLM's flags were understood and the engine is about to start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path
from shutil import which
from typing import Any

from expo_serve.config import ExpoConfig
from expo_serve.errors import ExpoError, UsageError
from expo_serve.vllm_plugin import compat
from expo_serve.vllm_plugin.worker import EXTENSION

_FILTERED_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
    "vllm.io_processor_plugins",
)
_PLUGIN = "expo"


def main() -> int:
    """Read the request, parse vLLM's flags, serve. Returns the exit code."""
    request = json.load(sys.stdin)
    allow_plugins()
    try:
        serve(request)
    except ExpoError as error:
        if os.environ.get("EXPO_DEBUG") == "1":
            traceback.print_exception(error)
        for line in error.detail_lines():
            print(f"  {line}", file=sys.stderr)
        print(f"expo-serve: error: {error.message}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def allow_plugins() -> None:
    """Name the plugins that vLLM may load: all that it loads by itself, and our endpoint plugin.

    ``VLLM_PLUGINS`` opens endpoint plugins and filters all the other groups at once.
    """
    given = os.environ.get("VLLM_PLUGINS")
    if given is None:
        names = {plugin.name for group in _FILTERED_GROUPS for plugin in entry_points(group=group)}
    else:
        names = {name for name in given.split(",") if name}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {_PLUGIN}))


def serve(request: dict[str, Any]) -> None:
    """Executor vLLM's server until it ends.

    Raises:
        CompatError: the installed vLLM lacks a name that we build on.
        UsageError: a flag of vLLM that is ours to set was given under another spelling.
    """
    from expo_serve.vllm_plugin.loader import register_loader

    if warning := compat.version_warning():
        warn(warning)
    compat.cli_env_setup()
    # vLLM only logs a plugin that fails to load; here it is an error.
    register_loader()
    command, args = parse(request)
    _use_eager_without_compiler(args)
    compat.configure_logging_from_args(args)
    command.validate(args)
    _tell(request["status_fd"], args)
    command.cmd(args)


def parse(request: dict[str, Any]) -> tuple[Any, Namespace]:
    """vLLM's serve command and its arguments; a mistake in vLLM's flags ends the process as vLLM does."""
    command = compat.ServeSubcommand()
    parser = compat.FlexibleArgumentParser(prog="expo-serve")
    subparser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    if "help" in request:
        parser.parse_args(["serve", f"--help={request['help']}"])
    config = ExpoConfig.model_validate(request["config"])
    ours = our_arguments(config, request["served_model_name"])
    from_file = flatten(request["file_options"], set(subparser._option_string_actions))
    args = parser.parse_args(["serve", *ours, *from_file, *request["arguments"]])
    args.model = args.model_tag
    args.hf_overrides = with_overrides(args.hf_overrides, config)
    _check_ours(args, config)
    return command, args


def our_arguments(config: ExpoConfig, served_model_name: str | None) -> list[str]:
    """The flags of vLLM that are ours to set; the model comes first."""
    assert config.pinned is not None
    return [
        config.pinned.deployed.path,
        *_side_files(config.pinned.tokenizer),
        *(["--served-model-name", served_model_name] if served_model_name else []),
        "--model-loader-extra-config", config.model_dump_json(exclude_defaults=True),
        "--worker-extension-cls", EXTENSION,
        "--load-format", "expo",
    ]  # fmt: skip


def _side_files(folder: str | None) -> list[str]:
    """The tokenizer of a delta, and its generation config if it has one. A flag of the user's comes later and wins."""
    if folder is None:
        return []
    has_config = Path(folder, "generation_config.json").is_file()
    return ["--tokenizer", folder, *(["--generation-config", folder] if has_config else [])]


def flatten(options: dict[str, Any], known: set[str]) -> list[str]:
    """The keys of a ``--config`` file as flags, by vLLM's own rules (``load_config_file``).

    Args:
        options: what the file says, our keys taken out.
        known: vLLM's flags, to find the ``--no-`` form of a key that is false.
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
    """``--hf-overrides``, with what a delta needs the config to say (a vocabulary that has grown) under the user's
    own."""
    overrides = config.pinned.overrides if config.pinned else {}
    given = json.loads(given) if isinstance(given, str) else given
    return {**overrides, **(given or {})} if overrides else given


def _check_ours(args: Namespace, config: ExpoConfig) -> None:
    """vLLM's parser knows abbreviations and dotted keys; none of them may change what is ours."""
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
    if args.enforce_eager or not compat.current_platform.is_cpu():
        return
    if problem := compiler_problem():
        args.enforce_eager = True
        warn(f"{problem}: vLLM cannot compile the model on CPU, running with --enforce-eager (slower)")


def compiler_problem() -> str | None:
    """What keeps vLLM's CPU compilation from working, in a few words; None when nothing does."""
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


def warn(message: str) -> None:
    """One warning line, before vLLM's logging is set up."""
    print(f"expo-serve: warning: {message}", file=sys.stderr, flush=True)


def _tell(status_fd: int, args: Namespace) -> None:
    status = {key: getattr(args, key, None) for key in ("host", "port", "uds", "shutdown_timeout")}
    with os.fdopen(status_fd, "w") as status_file:
        status_file.write(json.dumps(status) + "\n")


if __name__ == "__main__":
    sys.exit(main())
