"""Compiled loops that walk just the changes of a block: their cost grows with them, not with the values.

For bf16 the loop also extrapolates. Where nothing changed, both sides are base and ``lerp`` gives base itself, but for
-0.0, which becomes 0.0 unless the step from the nearer side is negative: so a first loop, at the speed of the cache,
looks for -0.0 and for what is not finite, and most often that is all that happens to most values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy.typing as npt
import torch

from expo_serve.kernels.bf16 import step_of
from expo_serve.kernels.fetch_ir import LEAST_BYTES
from expo_serve.kernels.native import compiled, once
from expo_serve.kernels.sparse_ir import source

_POINTER, _SIZE = ctypes.c_char_p, ctypes.c_int64
_ADDRESS = ctypes.c_void_p
_PARTS = *(_POINTER, _SIZE) * 3, ctypes.c_float, ctypes.c_bool
_WALK = ctypes.CFUNCTYPE(
    ctypes.c_bool, _ADDRESS, _ADDRESS, _POINTER, _SIZE, _POINTER, _POINTER, ctypes.c_float, ctypes.c_bool
)
_SIGNATURES = {
    "keep16": _WALK,
    "keep32": _WALK,
    "keep64": _WALK,
    "extrapolate": _WALK,
    "look": ctypes.CFUNCTYPE(ctypes.c_int32, _ADDRESS, _SIZE),
    "change": ctypes.CFUNCTYPE(ctypes.c_int32, _ADDRESS, _SIZE, ctypes.c_int32, *_PARTS),
    "load": ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int, _SIZE, _ADDRESS, _SIZE, ctypes.c_uint64, *_PARTS),
    "fits": ctypes.CFUNCTYPE(ctypes.c_bool, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE),
}
_NOT_FINITE = 1
_MINUS_ZERO = 3


@dataclass(frozen=True, slots=True)
class BaseBlock:
    """A block of base: an open file, an offset in it, and the checksum that its bytes must have."""

    file: int
    offset: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a block of changes, decompressed; of one without any, nothing."""

    gaps: bytes = b""
    """How many values lie between the changes; see :mod:`.packed_format`."""
    small: bytes = b""
    """Their steps less one, or 255."""
    large: bytes = b""
    """Steps in the width of the dtype."""


@once
def _functions() -> Mapping[str, Callable[..., int]] | None:
    try:
        return compiled(source(), _SIGNATURES)
    except ImportError:
        return None


def fits(parts: Parts, count: int, width: int) -> bool | None:
    """Whether the parts of a block of so many values fit each other: no walk leaves them then. None without loops."""
    functions = _functions()
    if functions is None:
        return None
    small, large = len(parts.small), len(parts.large) // width
    return bool(functions["fits"](parts.gaps, len(parts.gaps), count, parts.small, small, large))


def patch(width: int) -> Callable[[npt.NDArray[Any], Parts], None] | None:
    """The loop that applies changes to values of so many bytes in place; None where there is none."""
    functions = _functions()
    loop = functions.get(f"keep{8 * width}") if functions else None
    return partial(_patch, loop) if loop else None


def _patch(loop: Callable[..., int], out: npt.NDArray[Any], parts: Parts) -> None:
    address = out.ctypes.data
    loop(address, address, parts.gaps, len(parts.gaps), parts.small, parts.large, 0.0, False)


class Extrapolating:
    """The loops for bf16 that decode and extrapolate at once."""

    def __init__(self, functions: Mapping[str, Callable[..., int]]) -> None:
        self._look, self._walk = functions["look"], functions["extrapolate"]
        self._load, self._change = functions["load"], functions["change"]

    def is_finite(self, values: torch.Tensor) -> bool:
        """Whether all of them are. bf16, contiguous, on the CPU."""
        return not self._look(values.data_ptr(), values.numel()) & _NOT_FINITE

    def load(self, base: BaseBlock, values: torch.Tensor, parts: Parts, weight: float) -> bool:
        """Read base's values onto their place and turn them into the result.

        Args:
            base: where they are.
            values: where they belong: bf16, contiguous, on the CPU.
            parts: what changed.
            weight: 1 + alpha.

        Returns:
            Whether all came, with the checksum that they must have, the parts fit, and all is finite. Where not, the
            values are left as they fell, and plainer ways say what it was. So too for fewer than LEAST_BYTES, whose
            checksum follows other rules.
        """
        if values.nbytes < LEAST_BYTES:
            return False
        step = step_of(weight)[:2]
        place = base.file, base.offset, values.data_ptr(), values.numel(), base.checksum
        found = self._load(*place, *_arguments(parts), *step)
        return self._keeping_zeros(values, parts, *step) if found == _MINUS_ZERO else not found

    def change(self, values: torch.Tensor, parts: Parts, weight: float) -> bool:
        """The same for base's values that are in their place."""
        step = step_of(weight)[:2]
        flags = self._look(values.data_ptr(), values.numel())
        found = self._change(values.data_ptr(), values.numel(), flags, *_arguments(parts), *step)
        return self._keeping_zeros(values, parts, *step) if found == _MINUS_ZERO else not found

    def _keeping_zeros(self, values: torch.Tensor, parts: Parts, step: float, from_aligned: bool) -> bool:
        """Where base holds -0.0: it becomes 0.0 where it does not change."""
        if not fits(parts, values.numel(), 2):
            return False
        base = values.clone()
        values.view(torch.int16).masked_fill_(base.view(torch.int16) == -(2**15), 0)
        changes = parts.gaps, len(parts.gaps), parts.small, parts.large
        return not self._walk(base.data_ptr(), values.data_ptr(), *changes, step, from_aligned)


def _arguments(parts: Parts) -> tuple[bytes, int, bytes, int, bytes, int]:
    """Each part and its length; of large steps there are two bytes each."""
    return parts.gaps, len(parts.gaps), parts.small, len(parts.small), parts.large, len(parts.large) // 2


@once
def extrapolating() -> Extrapolating | None:
    """The loops, or None where torch has to do it: where they cannot be compiled, or a probe shows other bits."""
    functions = _functions()
    loops = Extrapolating(functions) if functions else None
    return loops if loops and _agrees_with_torch(loops) else None


def _agrees_with_torch(loops: Extrapolating) -> bool:
    """Compare with :func:`torch.lerp` on every finite bf16 value, changed by one, by many, and not."""
    keep = patch(2)
    assert keep is not None
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    base = every[every.isfinite()]
    count = base.numel()
    every_other = b"\x01" * (count // 2)
    for gaps, steps in (
        (b"", b""),
        (bytes(count), bytes(count)),
        (every_other, bytes(index % 97 for index in range(count // 2))),
    ):
        parts = Parts(gaps, steps, b"")
        aligned = base.clone()
        keep(aligned.view(torch.int16).numpy(), parts)
        if not all(_same(loops, base, aligned, parts, weight) for weight in (1.5, 0.3, -2.0)):
            return False
    return True


def _same(loops: Extrapolating, base: torch.Tensor, aligned: torch.Tensor, parts: Parts, weight: float) -> bool:
    expected, found = torch.lerp(base, aligned, weight), base.clone()
    is_finite = loops.change(found, parts, weight)
    finite = expected.isfinite() & aligned.isfinite()
    same = torch.equal(found[finite].view(torch.int16), expected[finite].view(torch.int16))
    return same and is_finite == bool(finite.all())
