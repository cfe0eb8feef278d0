"""A file that becomes shorter while it is mapped: a flag instead of the end of the process.

The kernel answers a read of a page that a file no longer has with SIGBUS, and so an error of the storage. Loops
populate a mapping before they read it, which reports both as an error; a file that is cut between the two is the rest.
The handler here puts a page of zeros where the fault was, if that is in a mapping it watches, sets the mapping's flag
and lets the loop go on; whoever mapped the file looks at the flag afterwards and throws the results away. A SIGBUS
anywhere else goes to the handler that was there before.

Linux only, and only where a pointer has 64 bits: elsewhere nothing is mapped.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading
from typing import Any

import numba
import numpy as np
from numba import types

from expo_serve.kernels.compiling import Intrinsic, external, intrinsic

_MOST = 4096
"""Mappings at a time."""
_table = np.zeros((_MOST, 3), np.int64)
"""Of each mapping its first address, one past its last one, and whether a fault was met there."""
_TABLE, _END = _table.ctypes.data, _table.ctypes.data + _table.nbytes
_lock = threading.Lock()
_PAGE, _FIXED = mmap.PAGESIZE, 0x10
_ADDRESS = 16
"""Where in a ``siginfo_t`` of Linux the address of a fault is."""
_map = external("mmap", "intp(intp, intp, int32, int32, int32, int64)")
_set_action = external("sigaction", "int32(int32, intp, intp)")


class _Action(ctypes.Structure):
    """``struct sigaction`` of Linux's C libraries."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_WITH_INFO = 4
"""``SA_SIGINFO``."""
_former = _Action()
_FORMER = ctypes.addressof(_former)


@intrinsic(int)
def _word_at(typing: object, address: object) -> Intrinsic:
    """Load an integer of 64 bits."""
    return types.int64(types.intp), lambda context, builder, signature, values: builder.load(
        builder.inttoptr(values[0], context.get_value_type(types.int64).as_pointer())
    )


@intrinsic(int)
def _set_word(typing: object, address: object, value: object) -> Intrinsic:
    """Store an integer of 64 bits; return 0."""
    return types.intp(types.intp, types.int64), _write_word


def _write_word(context, builder, signature, values):  # type: ignore[no-untyped-def]  # numba's and LLVM's objects
    builder.store(values[1], builder.inttoptr(values[0], context.get_value_type(types.int64).as_pointer()))
    return context.get_constant(types.intp, 0)


def _handle(number: int, info: int, context: int) -> None:
    """Handle SIGBUS, in the thread that met it; calls nothing that a signal handler must not call."""
    address = _word_at(info + _ADDRESS)
    for entry in range(_TABLE, _END, 24):
        if _word_at(entry) <= address < _word_at(entry + 8):
            _set_word(entry + 16, 1)  # before the zeros are there: who reads them finds it set
            page, kind = address - address % _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
            if _map(page, _PAGE, mmap.PROT_READ, kind, -1, 0) == page:
                return
    _set_action(number, _FORMER, 0)


_handler: Any = None


def is_possible() -> bool:
    """Return True if mappings can be watched on this platform."""
    return sys.platform == "linux" and sys.maxsize > 2**32


def install() -> None:
    """Install the handler, also where another one has taken its place since.

    Raises:
        Exception: of whatever kind, if it cannot be compiled.
        OSError: from the system call.
    """
    global _handler
    with _lock:
        if _handler is None:
            _handler = numba.cfunc("void(int32, intp, intp)", error_model="numpy", boundscheck=False)(_handle)
        wanted = _Action(handler=_handler.address, flags=_WITH_INFO)
        found, libc = _Action(), ctypes.CDLL(None, use_errno=True)
        if libc.sigaction(signal.SIGBUS, None, ctypes.byref(found)):
            raise OSError(ctypes.get_errno(), "sigaction")
        if found.handler == wanted.handler:
            return
        ctypes.memmove(ctypes.byref(_former), ctypes.byref(found), ctypes.sizeof(found))
        if libc.sigaction(signal.SIGBUS, ctypes.byref(wanted), None):
            raise OSError(ctypes.get_errno(), "sigaction")


def watch(address: int, size: int) -> int | None:
    """Watch a mapping.

    Args:
        address: its first byte.
        size: in bytes, more than 0.

    Returns:
        Its number; None if there are too many.
    """
    with _lock:
        free = np.flatnonzero(_table[:, 1] == 0)
        if not free.size:
            return None
        number = int(free[0])
        _table[number, 2] = 0
        _table[number, 0] = address
        _table[number, 1] = address + size
        return number


def unwatch(number: int) -> None:
    """Forget a mapping, before it is unmapped."""
    _table[number, :2] = 0


def has_faulted(number: int) -> bool:
    """Return True if a page of this mapping could not be read: it holds zeros since."""
    return bool(_table[number, 2])
