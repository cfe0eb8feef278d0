"""The keeper with ``tests.cli.log_server`` in the place of vLLM's server, as a process for the tests.

It waits a shorter time than usual for a reader that stalls. With the argument ``broken`` it fails once it serves.
"""

from __future__ import annotations

import sys

from expo_serve import errors
from expo_serve.cli import keeper, log_tail

WAIT_SECONDS = 0.4


class LogKeeper(keeper.Keeper):
    """Watches a server that logs a lot."""

    module = "tests.cli.log_server"


class BrokenKeeper(LogKeeper):
    """Fails while the server runs."""

    def _step(self) -> int | None:
        if self._serving:
            raise ZeroDivisionError("of this test")
        return super()._step()


if __name__ == "__main__":
    log_tail._STALLED_SECONDS = errors._READER_SECONDS = WAIT_SECONDS
    sys.exit(keeper.main(BrokenKeeper if sys.argv[1:] == ["broken"] else LogKeeper))
