"""Compiled loops: arrays and file descriptors in, flags out. Imports nothing of the package.

The contract of the fast path. Every loop is a shortcut for work that its caller can also do in torch, NumPy or Python.
A loop returns how much it has done, from the beginning on, and stops at whatever is not as it should be: a read that
returned less than was asked for, a value that is not finite, another checksum. It reports no error. The caller does the
rest the plain way, which finds the cause and reports it.

Ask :func:`available` first, and import the loop after that, within the function that calls it: the modules of the loops
need numba, which takes a quarter of a second to import.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

Loop = Literal[
    "bf16.combine", "dither.fill", "dither.round_to_bf16", "dither.round_to_fp16",
    "measuring.tally", "measuring.stream",
    "reading.stream", "reading.gather", "reading.fetch",
    "sparse.apply16", "sparse.apply32", "sparse.apply64", "sparse.extrapolate",
    "low_rank.product", "low_rank.stream",
]  # fmt: skip
"""A loop, by its module and name."""
_lock = threading.Lock()
_found: dict[Loop, str] = {}
"""Why a loop cannot be used; empty if it can."""


def available(*loops: Loop) -> bool:
    """Return True if these loops can be used. The first call for a loop compiles it, while other threads wait.

    They cannot if numba is missing or cannot compile, if it has no folder for its cache (compiling at every start takes
    longer than what the loops save), if NUMBA_DISABLE_JIT is set, or if a probe finds other bits than those of torch.
    torch does the work then.

    Args:
        loops: by default the one that combines bf16 values.
    """
    found = [_obstacle(loop) for loop in loops or ("bf16.combine",)]
    return not any(found)


def reason() -> str:
    """Return why loops that were asked for cannot be used, and what to do, in one line; empty if all of them can."""
    found = "; ".join(dict.fromkeys(" ".join(found.split()) for found in list(_found.values()) if found))
    return f"compiled loops are not used, so that the work takes longer: {found}" if found else ""


def _obstacle(loop: Loop) -> str:
    if (found := _found.get(loop)) is None:
        with _lock:
            if (found := _found.get(loop)) is None:
                found = _found[loop] = _prepare(loop)
    return found


def _prepare(name: Loop) -> str:
    try:
        from expo_serve.kernels import compiling

        loop = _loop(name)
    except ImportError as error:  # numba is missing, or does not support the NumPy that is installed
        return f"numba cannot be imported ({error}); install numba"
    try:
        if found := compiling.obstacle(loop):
            return found
        compiling.compile_loop(loop)
        is_right = name != "bf16.combine" or _gives_bits_of_torch()
    except Exception as error:  # noqa: BLE001  # numba and LLVM raise many kinds, and no load may fail by one
        kind = type(error).__name__
        return f"numba cannot compile its loops ({kind}: {error}); set NUMBA_CACHE_DIR to an empty, writable folder"
    return "" if is_right else "they give other bits than torch on this processor; please report it"


def _gives_bits_of_torch() -> bool:
    from expo_serve.kernels import probe  # it imports torch, which no loop needs

    return probe.gives_bits_of_torch()


def _loop(name: Loop) -> Callable[..., object]:
    from expo_serve.kernels import bf16, dither, low_rank, measuring, reading, sparse

    module, _, function = name.partition(".")
    rooms = {
        "bf16": bf16, "dither": dither, "low_rank": low_rank, "measuring": measuring, "reading": reading,
        "sparse": sparse,
    }  # fmt: skip
    loop: Callable[..., object] = getattr(rooms[module], function)
    return loop
