"""The command's family with ``tests.cli.drain_server`` in the place of vLLM's server, as a process for the tests.

The argument is JSON: the server's request, and ``status_port`` (0 for none) and ``engine_timeout``.
"""

from __future__ import annotations

import json
import sys
import time

from expo_serve import errors
from expo_serve.cli.family import Family, listen
from expo_serve.errors import ExpoError


def main(request: dict[str, object], status_port: int = 0, engine_timeout: float = 0.0) -> int:
    """Run it; returns the exit code, as the command does."""
    listener = listen("127.0.0.1", status_port) if status_port else None
    with Family(time.monotonic(), engine_timeout, listener) as family:
        try:
            family.reporter.enter("start")
            code = family.keep({"module": "tests.cli.drain_server", **request})
        except ExpoError as error:
            errors.show(error)
            family.fail(error)
            return error.exit_code
        if code:
            family.linger()
    return code


if __name__ == "__main__":
    sys.exit(main(**json.loads(sys.argv[1])))
