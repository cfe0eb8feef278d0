"""Stacks of vLLM's processes, for the keeper to ask for when one of them hangs."""

from __future__ import annotations

import faulthandler
import signal
import sys
from contextlib import suppress

from expo_serve.state.shared import SharedState

STACK_SIGNAL = signal.SIGUSR2
"""As :mod:`expo_serve.cli.hanging` sends it. Neither vLLM nor torch uses it."""


def show_stacks_on_demand() -> None:
    """Have this process write its Python stacks to standard error when it gets :data:`STACK_SIGNAL`.

    Only below the command: plain vLLM is left as it is. The handler is C code, so it works while something holds the
    GIL.
    """
    stream = sys.__stderr__
    if stream is not None and SharedState.find() is not None and signal.getsignal(STACK_SIGNAL) is signal.SIG_DFL:
        with suppress(ValueError, OSError):  # it is closed, or is no file
            faulthandler.register(STACK_SIGNAL, file=stream, all_threads=True)
