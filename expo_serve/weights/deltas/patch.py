"""Compiled loops that walk just the changes of a block: its cost grows with them, not with the values.

For bf16 the loop also extrapolates. Where nothing changed, both sides are base and ``lerp`` gives base itself, but for
-0.0, which becomes 0.0 unless the step from the nearer side is negative: so a first loop, at the speed of the cache, looks
for -0.0 and for what is not finite, and most often that is all that happens to most values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy.typing as npt
import torch

from expo_serve.weights.fused import step_of
from expo_serve.weights.native import compiled, once

# %w is the width of a value in bits, %last its highest bit, %top the largest positive number, %bytes the width in bytes.
_WALK = """
define i1 @NAME(ptr %base, ptr %out, ptr %bits, i64 %words, ptr %small, ptr %large, float %weight, i1 %from_aligned) {
entry:
  %nothing = icmp eq i64 %words, 0
  br i1 %nothing, label %done, label %word
word:
  %index = phi i64 [ 0, %entry ], [ %index.next, %word.done ]
  %small.word = phi ptr [ %small, %entry ], [ %small.then, %word.done ]
  %large.word = phi ptr [ %large, %entry ], [ %large.then, %word.done ]
  %seen.word = phi i16 [ 0, %entry ], [ %seen.then, %word.done ]
  %bits.at = getelementptr inbounds i64, ptr %bits, i64 %index
  %marks = load i64, ptr %bits.at, align 1
  %first = shl i64 %index, 6
  %empty = icmp eq i64 %marks, 0
  br i1 %empty, label %word.done, label %change
change:
  %left = phi i64 [ %marks, %word ], [ %left.next, %stored ]
  %small.at = phi ptr [ %small.word, %word ], [ %small.next, %stored ]
  %large.at = phi ptr [ %large.word, %word ], [ %large.next, %stored ]
  %seen = phi i16 [ %seen.word, %word ], [ %seen.next, %stored ]
  %bit = call i64 @llvm.cttz.i64(i64 %left, i1 true)
  %less = sub i64 %left, 1
  %left.next = and i64 %left, %less
  %place = add i64 %first, %bit
  %byte = load i8, ptr %small.at, align 1
  %small.next = getelementptr inbounds i8, ptr %small.at, i64 1
  %is.large = icmp eq i8 %byte, -1
  br i1 %is.large, label %from.large, label %from.small
from.small:
  %wide = zext i8 %byte to iWIDTH
  %step.small = add iWIDTH %wide, 1
  br label %step
from.large:
  %step.large = load iWIDTH, ptr %large.at, align 1
  %large.after = getelementptr inbounds iWIDTH, ptr %large.at, i64 1
  br label %step
step:
  %zigzag = phi iWIDTH [ %step.small, %from.small ], [ %step.large, %from.large ]
  %large.next = phi ptr [ %large.at, %from.small ], [ %large.after, %from.large ]
  %half = lshr iWIDTH %zigzag, 1
  %odd = and iWIDTH %zigzag, 1
  %sign = sub iWIDTH 0, %odd
  %difference = xor iWIDTH %half, %sign
  %base.at = getelementptr inbounds iWIDTH, ptr %base, i64 %place
  %out.at = getelementptr inbounds iWIDTH, ptr %out, i64 %place
  %old = load iWIDTH, ptr %base.at, align 1
  %old.sign = ashr iWIDTH %old, LAST
  %old.flip = and iWIDTH %old.sign, TOP
  %old.rank = xor iWIDTH %old, %old.flip
  %rank = add iWIDTH %old.rank, %difference
  %rank.sign = ashr iWIDTH %rank, LAST
  %rank.flip = and iWIDTH %rank.sign, TOP
  %new = xor iWIDTH %rank, %rank.flip
STORE
stored:
  %more = icmp ne i64 %left.next, 0
  br i1 %more, label %change, label %word.done
word.done:
  %small.then = phi ptr [ %small.word, %word ], [ %small.next, %stored ]
  %large.then = phi ptr [ %large.word, %word ], [ %large.next, %stored ]
  %seen.then = phi i16 [ %seen.word, %word ], [ %seen.next, %stored ]
  %index.next = add nuw i64 %index, 1
  %again = icmp ult i64 %index.next, %words
  br i1 %again, label %word, label %done
done:
  %all = phi i16 [ 0, %entry ], [ %seen.then, %word.done ]
  %bad = icmp slt i16 %all, 0
  ret i1 %bad
}
"""
_KEEP = """
  store iWIDTH %new, ptr %out.at, align 1
  %seen.next = add i16 %seen, 0
  br label %stored
"""
# The arithmetic of fused.py, for one value.
_EXTRAPOLATE = """
  %old.wide = zext i16 %old to i32
  %new.wide = zext i16 %new to i32
  %old.high = shl i32 %old.wide, 16
  %new.high = shl i32 %new.wide, 16
  %b = bitcast i32 %old.high to float
  %a = bitcast i32 %new.high to float
  %apart = fsub float %a, %b
  %start = select i1 %from_aligned, float %a, float %b
  %value = call float @llvm.fma.f32(float %weight, float %apart, float %start)
  %value.bits = bitcast float %value to i32
  %shifted = lshr i32 %value.bits, 16
  %last.kept = and i32 %shifted, 1
  %half.added = add i32 %value.bits, 32767
  %rounded = add i32 %half.added, %last.kept
  %kept = lshr i32 %rounded, 16
  %result = trunc i32 %kept to i16
  store i16 %result, ptr %out.at, align 1
  %exponent = and i16 %result, 32640
  %mark = add i16 %exponent, 128
  %new.exponent = and i16 %new, 32640
  %new.mark = add i16 %new.exponent, 128
  %marks.both = or i16 %mark, %new.mark
  %seen.next = or i16 %seen, %marks.both
  br label %stored
"""
_LOOK = """
declare i64 @llvm.cttz.i64(i64, i1)
declare float @llvm.fma.f32(float, float, float)

define i32 @look(ptr %values, i64 %count) {
entry:
  %none = icmp eq i64 %count, 0
  br i1 %none, label %done, label %loop
loop:
  %index = phi i64 [ 0, %entry ], [ %next, %loop ]
  %seen = phi i16 [ 0, %entry ], [ %seen.next, %loop ]
  %zeros = phi i16 [ 0, %entry ], [ %zeros.next, %loop ]
  %at = getelementptr inbounds i16, ptr %values, i64 %index
  %value = load i16, ptr %at, align 1
  %exponent = and i16 %value, 32640
  %mark = add i16 %exponent, 128
  %seen.next = or i16 %seen, %mark
  %is.zero = icmp eq i16 %value, -32768
  %zero = zext i1 %is.zero to i16
  %zeros.next = or i16 %zeros, %zero
  %next = add nuw i64 %index, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %done
done:
  %seen.all = phi i16 [ 0, %entry ], [ %seen.next, %loop ]
  %zeros.all = phi i16 [ 0, %entry ], [ %zeros.next, %loop ]
  %bad = lshr i16 %seen.all, 15
  %twice = shl i16 %zeros.all, 1
  %both = or i16 %bad, %twice
  %flags = zext i16 %both to i32
  ret i32 %flags
}
"""
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_WALK_SIGNATURE = ctypes.CFUNCTYPE(
    ctypes.c_bool, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, ctypes.c_float, ctypes.c_bool
)
_SIGNATURES = {
    "keep16": _WALK_SIGNATURE,
    "keep32": _WALK_SIGNATURE,
    "keep64": _WALK_SIGNATURE,
    "extrapolate": _WALK_SIGNATURE,
    "look": ctypes.CFUNCTYPE(ctypes.c_int32, _POINTER, _SIZE),
}
_NOT_FINITE, _HAS_MINUS_ZERO = 1, 2
_WORD_BYTES = 8


def _walk(name: str, width: int, store: str) -> str:
    top = (1 << (width - 1)) - 1
    text = _WALK.replace("STORE", store).replace("NAME", name)
    return text.replace("WIDTH", str(width)).replace("LAST", str(width - 1)).replace("TOP", str(top))


@once
def _functions() -> Mapping[str, Callable[..., int]] | None:
    loops = [_walk(f"keep{width}", width, _KEEP) for width in (16, 32, 64)]
    return compiled("".join([_LOOK, *loops, _walk("extrapolate", 16, _EXTRAPOLATE)]), _SIGNATURES)


def _padded(bits: bytes) -> tuple[bytes, int]:
    """Whole words of bits, and how many."""
    words = -(-len(bits) // _WORD_BYTES)
    return bits.ljust(words * _WORD_BYTES, b"\0"), words


def patch(width: int) -> Callable[[npt.NDArray[Any], bytes, bytes, bytes], None] | None:
    """The loop that applies changes to values of so many bytes in place; None where there is none."""
    functions = _functions()
    loop = functions.get(f"keep{8 * width}") if functions else None
    return partial(_patch, loop) if loop else None


def _patch(loop: Callable[..., int], out: npt.NDArray[Any], bits: bytes, small: bytes, large: bytes) -> None:
    marks, words = _padded(bits)
    address = out.ctypes.data
    loop(address, address, marks, words, small, large, 0.0, False)


class Extrapolating:
    """The loops for bf16 that decode and extrapolate at once."""

    def __init__(self, functions: Mapping[str, Callable[..., int]]) -> None:
        self._look, self._walk = functions["look"], functions["extrapolate"]

    def is_finite(self, values: torch.Tensor) -> bool:
        """Whether all of them are. bf16, contiguous, on the CPU."""
        return not self._look(values.data_ptr(), values.numel()) & _NOT_FINITE

    def __call__(self, values: torch.Tensor, bits: bytes, small: bytes, large: bytes, weight: float) -> bool:
        """Turn base's values into the result; says whether all is finite. Where not, they are left as they fell.

        Args:
            values: base's, bf16, contiguous, on the CPU; the result takes their place.
            bits: which of them changed, as :class:`~expo_serve.weights.deltas.blocks.Changes` has checked; empty where
                none did.
            small: their steps less one.
            large: steps that do not fit a byte.
            weight: 1 + alpha.
        """
        flags = self._look(values.data_ptr(), values.numel())
        if flags & _NOT_FINITE:
            return False
        step, from_aligned, _ = step_of(weight)
        base = values
        if flags & _HAS_MINUS_ZERO and step >= 0:
            base = values.clone()
            values.view(torch.int16).masked_fill_(base.view(torch.int16) == -(2**15), 0)
        marks, words = _padded(bits)
        return not self._walk(base.data_ptr(), values.data_ptr(), marks, words, small, large, step, from_aligned)


@once
def extrapolating() -> Extrapolating | None:
    """The loops, or None where torch has to do it: where they cannot be compiled, or a probe shows other bits."""
    functions = _functions()
    loops = Extrapolating(functions) if functions else None
    return loops if loops and _agrees_with_torch(loops) else None


def _agrees_with_torch(loops: Extrapolating) -> bool:
    """Compare with :func:`torch.lerp` on every finite bf16 value, changed by one, by many, and not."""
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    base = every[every.isfinite()]
    count = base.numel()
    for steps in (b"", bytes(count), bytes(index % 97 for index in range(count))):
        bits = b"\xff" * (count // 8) if steps else b""
        aligned = base.clone()
        if steps:
            functions = _functions()
            assert functions is not None
            _patch(functions["keep16"], aligned.view(torch.int16).numpy(), bits, steps, b"")
        for weight in (1.5, 0.3, -2.0):
            if not _same(loops, base, aligned, (bits, steps), weight):
                return False
    return True


def _same(
    loops: Extrapolating, base: torch.Tensor, aligned: torch.Tensor, changes: tuple[bytes, bytes], weight: float
) -> bool:
    expected, found = torch.lerp(base, aligned, weight), base.clone()
    is_finite = loops(found, *changes, b"", weight)
    finite = expected.isfinite() & aligned.isfinite()
    same = torch.equal(found[finite].view(torch.int16), expected[finite].view(torch.int16))
    return same and is_finite == bool(finite.all())
