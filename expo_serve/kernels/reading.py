"""Reads by system calls, and of mapped files, without coming back to Python between them.

Threads that take turns at the GIL for every read of a megabyte, or for every row of a matrix of which a tensor-parallel
rank takes a part, lose a quarter to three fifths of their time to it.
"""

from __future__ import annotations

import ctypes
import mmap
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
from numba import carray, from_dtype, types

from expo_serve.kernels.bf16 import Bits, combine_dithered, combine_nearest
from expo_serve.kernels.compiling import Intrinsic, external, helper, intrinsic, loop
from expo_serve.kernels.dither import CHUNK, chunk_of
from expo_serve.kernels.non_temporal import fence, store

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
Blocks = npt.NDArray[np.void]
"""Records of :data:`BLOCK`."""

pread = external("pread", "int64(int32, intp, intp, int64)")
madvise = external("madvise", "int32(intp, intp, int32)")


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


_POPULATE_READ = 22
"""``MADV_POPULATE_READ`` of Linux 5.14."""
_PAGE = mmap.PAGESIZE


@helper
def read_values(file: int, offset: int, to: Bits) -> bool:
    """Read values from a file; return False if not all came."""
    return pread(file, to.ctypes.data, 2 * to.size, offset) == 2 * to.size


@helper
def populate(values: Bits) -> bool:
    """Map the pages of these values, ahead of their use; return False where one cannot be read."""
    first = values.ctypes.data
    start = first - first % _PAGE
    return madvise(start, first + 2 * values.size - start, _POPULATE_READ) == 0


@helper
def _combine(
    base: Bits, other: Bits, out: Bits, factor: float, from_other: bool, is_delta: bool, is_dithered: bool, key: int,
    index: int, results: Bits,
) -> bool:  # fmt: skip
    """Combine a piece in chunks; their results go past the cache, unless ``results``, memory for them, is empty."""
    done = 0
    while done < out.size:
        end = done + chunk_of(index + done, out.size - done)
        one, two, to = base[done:end], other[done:end], out[done:end]
        part = results[: end - done] if results.size else to
        if is_dithered:
            is_finite = combine_dithered(one, two, part, factor, from_other, is_delta, key, index + done)
        else:
            is_finite = combine_nearest(one, two, part, factor, from_other, is_delta)
        if not is_finite:
            return False
        if results.size:
            store(part, to)
        done = end
    return True


BLOCK = np.dtype(
    [
        ("base_file", np.int32), ("other_file", np.int32), ("base_offset", np.int64), ("other_offset", np.int64),
        ("base", np.int64), ("other", np.int64), ("out", np.int64), ("size", np.int64), ("done", np.int64),
        ("index", np.int64), ("key", np.uint64), ("factor", np.float32), ("from_other", np.bool_),
        ("is_delta", np.bool_), ("is_dithered", np.bool_),
    ],
    align=True,
)  # fmt: skip
"""One block of :func:`stream`: of base and of aligned (or of a delta) the descriptor, the offset of the first byte and,
where files are mapped, its address; the address of the results, how many there are, and how many of them are done; the
element of the tensor that the first one is, and the tensor's key for dithered rounding; for the three that follow
:func:`~expo_serve.kernels.bf16.combine`; and whether to round dithered."""


@intrinsic(int)
def _pointer(typing: object, address: object) -> Intrinsic:
    """Make a pointer to 16-bit values of an address."""
    kind = types.CPointer(types.uint16)
    return kind(types.intp), lambda context, builder, signature, values: builder.inttoptr(
        values[0], context.get_value_type(kind)
    )


@helper
def _values_at(address: int, size: int) -> Bits:
    """Return what is in memory as an array."""
    values: Bits = carray(_pointer(address), (size,))
    return values


@loop(types.void(types.Array(from_dtype(BLOCK), 1, "C"), types.int64, types.int64, types.int64, types.boolean,
                 types.boolean))  # fmt: skip
def stream(
    blocks: Blocks, base_memory: int, other_memory: int, piece: int, is_mapped: bool, is_non_temporal: bool
) -> None:
    """Read two operands of each block from their files and combine them, piece by piece.

    Sets ``done`` of each block: it is less than ``size`` if a read returned less than was asked for, if a page cannot
    be mapped, or if a result is not finite.

    Args:
        blocks: of :data:`BLOCK`.
        base_memory: address of memory for a piece of base, if files are not mapped.
        other_memory: the same for the other operand.
        piece: values at a time.
        is_mapped: whether the files are mapped.
        is_non_temporal: whether results are stored past the cache.
    """
    results = np.empty(CHUNK if is_non_temporal else 0, np.uint16)
    for i in range(blocks.size):
        block = blocks[i]
        done = 0
        while done < block.size:
            count = min(piece, block.size - done)
            base = _values_at(block.base + 2 * done if is_mapped else base_memory, count)
            other = _values_at(block.other + 2 * done if is_mapped else other_memory, count)
            if is_mapped:
                is_there = populate(base) and populate(other)
            else:
                is_there = read_values(block.base_file, block.base_offset + 2 * done, base)
                is_there = is_there and read_values(block.other_file, block.other_offset + 2 * done, other)
            if not is_there or not _combine(
                base, other, _values_at(block.out + 2 * done, count), block.factor, block.from_other, block.is_delta,
                block.is_dithered, block.key, block.index + done, results,
            ):  # fmt: skip
                break
            done += count
        block.done = done
    if is_non_temporal:
        fence()


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
