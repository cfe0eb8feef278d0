"""Reads by system calls, without coming back to Python between them.

Threads that take turns at the GIL for every read of a megabyte, or for every row of a matrix of which a tensor-parallel
rank takes a part, lose a quarter to three fifths of their time to it.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from expo_serve.kernels.bf16 import Bits, combine
from expo_serve.kernels.compiling import external, helper, loop
from expo_serve.kernels.dither import CHUNK, Words, chunk_of, fill_chunk

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]

pread = external("pread", "int64(int32, intp, intp, int64)")


def _xxh3_addresses() -> dict[str, int]:
    """Find XXH3 in the shared library of the xxhash package; empty if it does not export the functions.

    Where there are two of one kind, the ``_dispatch`` one chooses the vector instructions at run time.
    """
    found = {}
    try:
        spec = find_spec("xxhash._xxhash")
        library = ctypes.CDLL(spec.origin if spec else None)
        for name in ("XXH3_createState", "XXH3_64bits_reset", "XXH3_64bits_update", "XXH3_64bits_digest",
                     "XXH3_freeState"):  # fmt: skip
            function = getattr(library, f"{name}_dispatch", None) or getattr(library, name)
            found[name] = ctypes.cast(function, ctypes.c_void_p).value or 0
    except (AttributeError, ImportError, OSError):
        return {}
    return found


_XXH3 = _xxh3_addresses()
_create = external("XXH3_createState", "intp()", _XXH3.get("XXH3_createState"))
_reset = external("XXH3_64bits_reset", "int32(intp)", _XXH3.get("XXH3_64bits_reset"))
_update = external("XXH3_64bits_update", "int32(intp, intp, intp)", _XXH3.get("XXH3_64bits_update"))
_digest = external("XXH3_64bits_digest", "uint64(intp)", _XXH3.get("XXH3_64bits_digest"))
_free = external("XXH3_freeState", "int32(intp)", _XXH3.get("XXH3_freeState"))


@helper
def _combine_dithered(
    base: Bits, other: Bits, out: Bits, factor: float, from_other: bool, is_delta: bool, key: int, index: int,
    words: Words,
) -> bool:  # fmt: skip
    """Combine a piece in chunks, whose random bits stay in the cache; ``words`` is memory for those of one."""
    done = 0
    while done < out.size:
        count = chunk_of(index + done, out.size - done)
        noise = fill_chunk(words, np.uint64(key), index + done, count)
        end = done + count
        if not combine(base[done:end], other[done:end], out[done:end], factor, from_other, is_delta, noise):
            return False
        done = end
    return True


@loop(
    "int64(int32, int64, int32, int64, uint16[::1], uint16[::1], uint16[::1], float32, boolean, boolean, boolean, "
    "uint64, int64)",
)
def stream(
    base_file: int,
    base_offset: int,
    other_file: int,
    other_offset: int,
    base: Bits,
    other: Bits,
    out: Bits,
    factor: float,
    from_other: bool,
    is_delta: bool,
    is_dithered: bool,
    key: int,
    index: int,
) -> int:
    """Read two operands from their files and combine them, as much at a time as their memory holds.

    Args:
        base_file: descriptor of the file of base.
        base_offset: where its first byte is.
        other_file: descriptor of the file of aligned, or of a delta.
        other_offset: where its first byte is.
        base: memory for a piece of base.
        other: memory for a piece of the other operand, as large.
        out: the results.
        factor: see :func:`~expo_serve.kernels.bf16.combine`, as for those that follow.
        from_other: the same.
        is_delta: the same.
        is_dithered: whether to round dithered.
        key: the tensor's key, for that.
        index: the element of the tensor that the first value is, for that.

    Returns:
        How many values are done: fewer than ``out`` has if a read returned less than was asked for, or a result is not
        finite.
    """
    done = 0
    words = np.empty(CHUNK // 2 + 1, np.uint32)
    while done < out.size:
        count = min(base.size, out.size - done)
        size = 2 * count
        if pread(base_file, base.ctypes.data, size, base_offset + 2 * done) != size:
            break
        if pread(other_file, other.ctypes.data, size, other_offset + 2 * done) != size:
            break
        one, two, to = base[:count], other[:count], out[done : done + count]
        if is_dithered:
            if not _combine_dithered(one, two, to, factor, from_other, is_delta, key, index + done, words):
                break
        elif not combine(one, two, to, factor, from_other, is_delta, one[:0]):
            break
        done += count
    return done


@loop("int64(int32, uint8[::1], int64[::1])")
def gather(file: int, memory: Bytes, offsets: Offsets) -> int:
    """Read extents of one length into memory, one after another.

    Args:
        file: descriptor.
        memory: as many bytes as the extents have together.
        offsets: where in the file each begins.

    Returns:
        How many extents are read: fewer than there are offsets if a read returned less than was asked for.
    """
    size = memory.size // offsets.size
    for i in range(offsets.size):
        if pread(file, memory.ctypes.data + i * size, size, offsets[i]) != size:
            return i
    return offsets.size


@loop("boolean(int32, int64, uint8[::1], int64, uint64)", missing="" if _XXH3 else "xxhash exports no XXH3 functions")
def fetch(file: int, offset: int, memory: Bytes, piece: int, checksum: int) -> bool:
    """Read bytes and compute their checksum while they are in the cache.

    Args:
        file: descriptor.
        offset: where in the file they begin.
        memory: as many bytes as are wanted.
        piece: bytes to read before they are added to the checksum.
        checksum: XXH3 with 64 bits and no seed, which they must have.

    Returns:
        True if all came and have this checksum.
    """
    state = _create()
    if state == 0:
        return False
    _reset(state)
    done = 0
    while done < memory.size:
        count = min(piece, memory.size - done)
        if pread(file, memory.ctypes.data + done, count, offset + done) != count:
            break
        _update(state, memory.ctypes.data + done, count)
        done += count
    found = _digest(state)
    _free(state)
    return done == memory.size and found == checksum
