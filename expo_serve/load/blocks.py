"""Encodes and decodes one block of a packed delta. :mod:`~expo_serve.plan.packed_format` describes the format."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from expo_serve import kernels
from expo_serve.kernels.codes import LARGE, SKIP
from expo_serve.plan.packed_format import RAW, SAME, SHUFFLED, SPARSE

LEVEL = 1
"""Higher levels gain nothing (docs/performance.md#packed)."""
Values = npt.NDArray[Any]
TABLE = np.dtype([("base", "<u8"), ("bytes", "<u8"), ("coding", "<u4"), ("parts", "<u4", 3)])
"""An entry of a tensor's table, as :data:`~expo_serve.plan.packed_format.TABLE_ENTRY` describes it."""
_local = threading.local()


class DamagedError(ValueError):
    """A block's bytes do not decode."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a block of changes, decompressed; :mod:`~expo_serve.plan.packed_format` describes them."""

    gaps: Values
    small: Values
    large: Values


@dataclass(frozen=True)
class Coded:
    """A block's bytes: its coding, and up to three parts."""

    coding: int
    parts: tuple[bytes | memoryview, bytes | memoryview, bytes | memoryview] = (b"", b"", b"")


def encode(aligned: Values, base: Values | None) -> Coded:
    """Encode one block, in the smallest coding.

    Args:
        aligned: the values' bits, as signed integers of their width.
        base: those that they are predicted from, or None.
    """
    changes = _changes(aligned, base) if base is not None else None
    if changes == Coded(SAME):
        return changes
    raw = aligned.tobytes()
    if changes and 2 * _size(changes) < len(raw):
        return changes
    whole = [Coded(SHUFFLED, (_compress(_shuffle(aligned)), b"", b"")), Coded(RAW, (raw, b"", b""))]
    return min([*([changes] if changes else []), *whole], key=_size)


def _size(coded: Coded) -> int:
    return sum(len(part) for part in coded.parts)


def _changes(aligned: Values, base: Values) -> Coded:
    changed = aligned != base
    if not changed.any():
        return Coded(SAME)
    steps = _zigzag(_rank(aligned[changed]) - _rank(base[changed])) - 1
    is_large = steps >= LARGE
    small = np.where(is_large, LARGE, steps).astype(np.uint8)
    large = _compress(_shuffle(steps[is_large] + 1)) if is_large.any() else b""
    return Coded(SPARSE, (_compress(_gaps(changed)), _compress(small.tobytes()), large))


def decode(coded: Coded, base: Values | None, count: int, out: Values) -> None:
    """Decode one block.

    Args:
        coded: its bytes.
        base: as for :func:`encode`; may be the memory of ``out``.
        count: values in it.
        out: where the values' bits go.

    Raises:
        DamagedError: they are not what :func:`encode` writes.
    """
    if coded.coding in (SHUFFLED, RAW):
        raw = coded.parts[0] if coded.coding == RAW else decompress(coded.parts[0], out.nbytes)
        if len(raw) != out.nbytes:
            raise DamagedError(f"{len(raw)} bytes for {count} values")
        plain = bytes(raw) if coded.coding == RAW else _unshuffle(bytes(raw), out.itemsize)
        out[:] = np.frombuffer(plain, dtype=out.dtype)
        return
    if base is None or coded.coding not in (SAME, SPARSE):
        raise DamagedError(f"coding {coded.coding}")
    if out is not base:
        out[:] = base
    if coded.coding == SPARSE:
        _apply(decompressed(coded, count, out.itemsize), out)


def decompressed(coded: Coded, count: int, width: int) -> Parts:
    """Decompress the parts of a block of changes, or of none; whether they fit each other is not known yet.

    Args:
        coded: the block's bytes.
        count: values in the block.
        width: bytes of a value.

    Raises:
        DamagedError: a part does not decode.
    """
    if coded.coding == SAME:
        return Parts(np.empty(0, np.uint8), np.empty(0, np.uint8), np.empty(0, f"i{width}"))
    gaps, small = decompress(coded.parts[0], 2 * count), decompress(coded.parts[1], count)
    raw = decompress(coded.parts[2], count * width) if coded.parts[2] else b""
    if len(raw) % width:
        raise DamagedError(f"{len(raw)} bytes of large steps")
    large = np.frombuffer(_unshuffle(raw, width), f"i{width}")
    return Parts(np.frombuffer(gaps, np.uint8), np.frombuffer(small, np.uint8), large)


def _apply(parts: Parts, values: Values) -> None:
    """Change values in place.

    Raises:
        DamagedError: the parts do not fit each other and the values.
    """
    if not _loop_for(values.itemsize)(parts.gaps, parts.small, parts.large, values):
        raise DamagedError(f"{parts.gaps.size} gaps, {parts.small.size} steps, {parts.large.size} large ones")


def _loop_for(width: int) -> Callable[[Values, Values, Values, Values], bool]:
    """Return the function that applies changes to values of this many bytes."""
    loops: dict[int, kernels.Loop] = {2: "sparse.apply16", 4: "sparse.apply32", 8: "sparse.apply64"}
    if width not in loops or not kernels.available(loops[width]):
        return _apply_plain
    from expo_serve.kernels import sparse

    return {2: sparse.apply16, 4: sparse.apply32, 8: sparse.apply64}[width]


def changed_values(parts: Parts, base: Values) -> tuple[Values, Values]:
    """Return the places of the changes, and the values' bits there.

    Raises:
        DamagedError: the parts do not fit each other and the values.
    """
    found = _changed(parts.gaps, parts.small, parts.large, base)
    if found is None:
        raise DamagedError(f"{parts.gaps.size} gaps, {parts.small.size} steps, {parts.large.size} large ones")
    return found


def _apply_plain(gaps: Values, small: Values, large: Values, values: Values) -> bool:
    """Do in NumPy what :func:`~expo_serve.kernels.sparse.apply16` does."""
    found = _changed(gaps, small, large, values)
    if found is None:
        return False
    places, new = found
    values[places] = new
    return True


def _changed(gaps: Values, small: Values, large: Values, values: Values) -> tuple[Values, Values] | None:
    """Return where values change to what; None where the parts do not fit each other and the values."""
    is_change = gaps != SKIP
    places = (np.cumsum(gaps.astype(np.int64) + is_change) - 1)[is_change]
    end = int(gaps.sum(dtype=np.int64)) + places.size
    is_large = small == LARGE
    if places.size != small.size or end > values.size or np.count_nonzero(is_large) != large.size:
        return None
    steps = small.astype(f"u{values.itemsize}")
    steps += 1
    steps[is_large] = large.view(steps.dtype)
    return places, _rank(_rank(values[places]) + _unzigzag(steps))


def _gaps(changed: Values) -> bytes:
    """Encode where the changes are: the unchanged values before each of them, 255 at most in a byte."""
    gaps = np.diff(np.flatnonzero(changed), prepend=-1) - 1
    skips, rests = np.divmod(gaps, SKIP)
    coded = np.full(int(skips.sum()) + len(gaps), SKIP, dtype=np.uint8)
    coded[np.cumsum(skips + 1) - 1] = rests
    return coded.tobytes()


def _rank(bits: Values) -> Values:
    """Map bits to signed integers in the order of the floating-point numbers; its own inverse."""
    width = 8 * bits.itemsize
    ranks: Values = bits ^ ((bits >> (width - 1)) & np.array((1 << (width - 1)) - 1, dtype=bits.dtype))
    return ranks


def _zigzag(steps: Values) -> Values:
    width = 8 * steps.itemsize
    coded: Values = ((steps << 1) ^ (steps >> (width - 1))).view(f"u{steps.itemsize}")
    return coded


def _unzigzag(coded: Values) -> Values:
    one = np.array(1, dtype=coded.dtype)
    steps: Values = ((coded >> one) ^ (~(coded & one) + one)).view(f"i{coded.itemsize}")
    return steps


def _shuffle(values: Values) -> bytes:
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _unshuffle(raw: bytes, width: int) -> bytes:
    return np.frombuffer(raw, np.uint8).reshape(width, -1).T.tobytes() if raw else b""


def _compress(raw: bytes) -> bytes:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=LEVEL)
    compressed: bytes = _local.compressor.compress(raw)
    return compressed


def decompress(raw: bytes | memoryview, limit: int) -> bytes:
    """Decompress one Zstandard frame of at most ``limit`` bytes of content.

    Raises:
        DamagedError: it is none, or has more.
    """
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    try:
        if not 0 <= zstandard.frame_content_size(raw) <= limit:
            raise DamagedError(f"content of another size than {limit}")
        content: bytes = _local.decompressor.decompress(raw)
    except zstandard.ZstdError as error:
        raise DamagedError(str(error)) from None
    return content
