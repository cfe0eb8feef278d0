"""The process that serves a reward model: runs vLLM's own serve command with its pooling runner.

``expo_serve.cli.keeper`` starts it and writes one JSON object on its standard input::

    {"arguments": [flag, ...] of vLLM's, the model first, "status_fd": int}

Once vLLM has accepted the flags, it writes one line to ``status_fd``, as :mod:`expo_serve.vllm_plugin.server` does.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from expo_serve import errors
from expo_serve.errors import ExpoError
from expo_serve.vllm_plugin import compat

_STATUS = ("host", "port", "uds", "shutdown_timeout")


def main() -> int:
    """Read the request and serve; returns the exit code."""
    request = json.load(sys.stdin)
    try:
        serve(request)
    except ExpoError as error:
        errors.show(error)
        return error.exit_code
    return 0


def serve(request: dict[str, Any]) -> None:
    """Run vLLM's server until it ends; a wrong flag ends the process, as in vLLM itself.

    Raises:
        CompatError: the installed vLLM lacks a name that expo-serve depends on.
    """
    compat.cli_env_setup()
    command = compat.ServeSubcommand()
    parser = compat.FlexibleArgumentParser(prog="expo-serve")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *request["arguments"], "--runner", "pooling"])
    args.model = args.model_tag
    compat.configure_logging_from_args(args)
    command.validate(args)
    with os.fdopen(request["status_fd"], "w") as status:
        status.write(json.dumps({key: getattr(args, key, None) for key in _STATUS}) + "\n")
    command.cmd(args)


if __name__ == "__main__":
    sys.exit(main())
