"""How loops become machine code: the only module of this room that decides how numba compiles.

Nothing is compiled at import. :func:`compile_loop` compiles a loop for the signature that its decorator names, and for
no other: a call with other types is an error, not a second compilation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import llvmlite.binding
import numba
from numba import types
from numba.core.sigutils import normalize_signature
from numba.core.typing import signature as make_signature

Function = TypeVar("Function", bound=Callable[..., object])
Scalar = TypeVar("Scalar")
Intrinsic = tuple[object, Callable[..., object]]
"""A numba signature, and the function that writes the LLVM instructions for it."""

_OPTIONS = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
_VERSION = hashlib.sha256(b"".join(file.read_bytes() for file in _SOURCES)).hexdigest()[:12]
_signatures: dict[object, object] = {}
_missing: dict[object, str] = {}
_cache_error = ""


def loop(signature: object, missing: str = "", *, sums: bool = False) -> Callable[[Function], Function]:
    """Mark a function that Python calls. It is compiled by :func:`compile_loop`.

    Compiled loops hold no GIL and check no bounds. They are kept in numba's cache: in ``NUMBA_CACHE_DIR`` if that is
    set, else beside the source, else under the user's home.

    Args:
        signature: a string as numba writes it, or a signature of numba.
        missing: why this loop cannot be compiled here, if that is known already.
        sums: whether sums of floating-point numbers may be taken in any order, so that they are vectorised. Only for
            loops whose results are statistics: the order depends on the processor.
    """

    def decorate(function: Function) -> Function:
        # The name is part of the cache's file names. numba itself looks at the file of a cached function only, and
        # would not see that a function that it calls has changed in another file.
        function.__qualname__ = f"{function.__name__}_{_VERSION}"
        compiled = _with_cache(function, fastmath={"reassoc", "nsz"} if sums else False)
        _signatures[compiled], _missing[compiled] = signature, missing
        return compiled

    return decorate


def _with_cache(function: Function, **options: object) -> Function:
    """Decide about the cache, for all loops: numba raises RuntimeError where it finds no folder to write to."""
    global _cache_error
    try:
        compiled: Function = numba.njit(cache=True, **_OPTIONS, **options)(function)
    except RuntimeError as error:
        _cache_error = str(error)
        compiled = numba.njit(**_OPTIONS, **options)(function)
    return compiled


def helper(function: Function) -> Function:
    """Mark a function that only loops call: it becomes part of them."""
    compiled: Function = numba.njit(**_OPTIONS)(function)
    return compiled


def intrinsic(result: type[Scalar]) -> Callable[[Callable[..., Intrinsic]], Callable[..., Scalar]]:
    """Mark a function that returns LLVM instructions for a call, as :func:`numba.extending.intrinsic` does.

    Args:
        result: what the call returns.
    """

    def decorate(function: Callable[..., Intrinsic]) -> Callable[..., Scalar]:
        made: Callable[..., Scalar] = numba.extending.intrinsic(function)
        return made

    return decorate


def external(name: str, signature: str, address: int | None = None) -> Callable[..., int]:
    """Make a C function callable from loops.

    Args:
        name: the symbol.
        signature: as numba writes it.
        address: where the function is, unless the process's own libraries have the symbol.
    """
    if address:
        llvmlite.binding.add_symbol(name, address)
    arguments, result = normalize_signature(signature)
    made: Callable[..., int] = types.ExternalFunction(name, make_signature(result, *arguments))
    return made


def has_feature(name: str) -> bool:
    """Return True if loops are compiled for a processor with this feature, by LLVM's name."""
    features = numba.config.CPU_FEATURES
    if features is None:
        features = llvmlite.binding.get_host_cpu_features().flatten()
    return f"+{name}" in str(features).split(",")


def obstacle(function: Callable[..., object]) -> str:
    """Return why a loop cannot be compiled in this process, and what to do; empty if nothing is known against it."""
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set; unset it"
    if _cache_error:
        return f"numba has no folder for its cache ({_cache_error}); set NUMBA_CACHE_DIR to a writable folder"
    return _missing[function]


def compile_loop(function: Callable[..., object]) -> None:
    """Compile a loop, or take it from numba's cache, unless that was done.

    Raises:
        Exception: of whatever kind, from numba, LLVM, or reading and writing the cache.
    """
    if not function.signatures:  # type: ignore[attr-defined]
        function.compile(_signatures[function])  # type: ignore[attr-defined]
        function.disable_compile()  # type: ignore[attr-defined]


def _give_a_dict(library: object) -> None:
    """Let llvmlite's library answer ``__dict__`` like other objects.

    It answers every name with a function. vLLM asks all that any module holds for its ``__dict__`` when an engine
    starts, and the second engine of a process failed at this one.
    """
    getattr(library, "_fntab", {}).setdefault("__dict__", {})


_give_a_dict(llvmlite.binding.ffi.lib)
