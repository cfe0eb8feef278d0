"""Compiled loops: arrays and file descriptors in, flags out. Imports nothing of the package.

The contract of the fast path. Every loop is a shortcut for work that its caller can also do in torch, NumPy or Python.
A loop returns how much it has done, from the beginning on, and stops at whatever is not as it should be: a read that
returned less than was asked for, a value that is not finite, another checksum. It reports no error. The caller does the
rest the plain way, which finds the cause and reports it.

Ask :func:`available` before a loop is called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from expo_serve.kernels import probe
from expo_serve.kernels.bf16 import combine
from expo_serve.kernels.compiling import compile_loop, obstacle

Loop = Callable[..., object]
_lock = threading.Lock()
_found: dict[Loop, str] = {}
"""By loop: why it cannot be used; empty if it can."""


def available(*loops: Loop) -> bool:
    """Return True if these loops can be used. The first call for a loop compiles it, while other threads wait.

    They cannot if numba is missing or cannot compile, if it has no folder for its cache (compiling at every start takes
    longer than what the loops save), if NUMBA_DISABLE_JIT is set, or if a probe finds other bits than those of torch.
    torch does the work then.

    Args:
        loops: functions of this room; by default the one that combines bf16 values.
    """
    found = [_obstacle(loop) for loop in loops or (combine,)]
    return not any(found)


def reason() -> str:
    """Return why loops that were asked for cannot be used, and what to do, in one line; empty if all of them can."""
    found = "; ".join(dict.fromkeys(" ".join(found.split()) for found in _found.values() if found))
    return f"compiled loops are not used, so that the work takes longer: {found}" if found else ""


def _obstacle(loop: Loop) -> str:
    if (found := _found.get(loop)) is None:
        with _lock:
            if (found := _found.get(loop)) is None:
                found = _found[loop] = _prepare(loop)
    return found


def _prepare(loop: Loop) -> str:
    if found := obstacle(loop):
        return found
    try:
        compile_loop(loop)
        is_right = loop is not combine or probe.gives_bits_of_torch()
    except Exception as error:  # noqa: BLE001  # numba and LLVM raise many kinds, and no load may fail by one
        kind = type(error).__name__
        return f"numba cannot compile its loops ({kind}: {error}); set NUMBA_CACHE_DIR to an empty, writable folder"
    return "" if is_right else "they give other bits than torch on this processor; please report it"
