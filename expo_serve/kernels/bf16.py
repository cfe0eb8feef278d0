"""The formula for bf16 in one pass: combine, round once, and notice what is not finite; where it is plain, reading too.

torch does this in two passes (lerp, then a sum that shows whether all is finite) at 7 GB/s of result a core, and that
is what would bound a load from a warm page cache; this loop does 12 (a core of an AMD EPYC with AVX-512, operands in
cache). The bits must be those of :func:`torch.lerp`: where a probe shows others, or where the loop cannot be compiled,
torch itself is used.

:meth:`Fused.stream` also reads what it combines, a piece of each side after the other, without coming back to Python:
two threads that take turns at Python's lock for every piece of 1 MB lose a quarter of their time to it (0.41 s against
0.31 for a pair of 2.3 GB a side). Whatever is not as it should be ends the loop early, and the plain way goes on
from there and says what it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from expo_serve.kernels.native import compiled, once

# The rounding is torch's: to the nearest, ties to even, by adding 0x7fff and the last bit that stays. 0x7f80 is the
# exponent of Inf and NaN: adding 0x0080 to the exponent alone sets the sign bit for no other, and `or` keeps it.
_IR = """
define zeroext i1 @combine(ptr noalias readonly %base, ptr noalias readonly %aligned, ptr noalias %out, i64 %count,
                   float %weight, i1 %from_aligned, i1 %is_delta) {
entry:
  %none = icmp eq i64 %count, 0
  br i1 %none, label %done, label %loop
loop:
  %index = phi i64 [ 0, %entry ], [ %next, %loop ]
  %seen = phi i16 [ 0, %entry ], [ %seen.next, %loop ]
  %base.at = getelementptr inbounds i16, ptr %base, i64 %index
  %aligned.at = getelementptr inbounds i16, ptr %aligned, i64 %index
  %out.at = getelementptr inbounds i16, ptr %out, i64 %index
  %base.bits = load i16, ptr %base.at, align 1
  %aligned.bits = load i16, ptr %aligned.at, align 1
  %base.wide = zext i16 %base.bits to i32
  %aligned.wide = zext i16 %aligned.bits to i32
  %base.high = shl i32 %base.wide, 16
  %aligned.high = shl i32 %aligned.wide, 16
  %b = bitcast i32 %base.high to float
  %a = bitcast i32 %aligned.high to float
  %difference = fsub float %a, %b
  %step = select i1 %is_delta, float %a, float %difference
  %start = select i1 %from_aligned, float %a, float %b
  %value = call float @llvm.fma.f32(float %weight, float %step, float %start)
  %bits = bitcast float %value to i32
  %shifted = lshr i32 %bits, 16
  %odd = and i32 %shifted, 1
  %half = add i32 %bits, 32767
  %rounded = add i32 %half, %odd
  %kept = lshr i32 %rounded, 16
  %result = trunc i32 %kept to i16
  store i16 %result, ptr %out.at, align 1
  %exponent = and i16 %result, 32640
  %mark = add i16 %exponent, 128
  %seen.next = or i16 %seen, %mark
  %next = add nuw i64 %index, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %done
done:
  %all = phi i16 [ 0, %entry ], [ %seen.next, %loop ]
  %bad = icmp slt i16 %all, 0
  ret i1 %bad
}
declare float @llvm.fma.f32(float, float, float)

define i64 @stream(i32 %base.file, i64 %base.offset, i32 %aligned.file, i64 %aligned.offset, ptr %base, ptr %aligned,
                   ptr %out, i64 %bytes, i64 %piece, float %weight, i1 %from_aligned, i1 %is_delta) {
entry:
  br label %loop
loop:
  %done = phi i64 [ 0, %entry ], [ %next, %combined ]
  %left = sub i64 %bytes, %done
  %last = icmp ult i64 %left, %piece
  %size = select i1 %last, i64 %left, i64 %piece
  %base.at = add i64 %base.offset, %done
  %base.got = call i64 @pread(i32 %base.file, ptr %base, i64 %size, i64 %base.at)
  %base.whole = icmp eq i64 %base.got, %size
  br i1 %base.whole, label %read, label %stopped
read:
  %aligned.at = add i64 %aligned.offset, %done
  %aligned.got = call i64 @pread(i32 %aligned.file, ptr %aligned, i64 %size, i64 %aligned.at)
  %aligned.whole = icmp eq i64 %aligned.got, %size
  br i1 %aligned.whole, label %ready, label %stopped
ready:
  %out.at = getelementptr inbounds i8, ptr %out, i64 %done
  %count = lshr i64 %size, 1
  %bad = call zeroext i1 @combine(ptr %base, ptr %aligned, ptr %out.at, i64 %count, float %weight,
                                  i1 %from_aligned, i1 %is_delta)
  br i1 %bad, label %stopped, label %combined
combined:
  %next = add i64 %done, %size
  %more = icmp ult i64 %next, %bytes
  br i1 %more, label %loop, label %finished
stopped:
  ret i64 %done
finished:
  ret i64 %bytes
}
declare i64 @pread(i32, ptr, i64, i64)
"""

STREAM_PIECE_BYTES = 1 << 20
"""Read of each side before it is combined."""
_POINTER, _SIZE, _FILE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_WEIGHT = ctypes.c_float, ctypes.c_bool, ctypes.c_bool
_SIGNATURES = {
    "combine": ctypes.CFUNCTYPE(ctypes.c_bool, _POINTER, _POINTER, _POINTER, _SIZE, *_WEIGHT),
    "stream": ctypes.CFUNCTYPE(_SIZE, _FILE, _SIZE, _FILE, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, *_WEIGHT),
}


@dataclass(frozen=True)
class Place:
    """Where a side's bytes lie: an open file, an offset in it, and memory for a piece of them."""

    file: int
    offset: int
    memory: int


class Fused:
    """The compiled loops. All tensors are bf16, contiguous and on the CPU.

    Args:
        functions: as :func:`compiled` gives them.
    """

    def __init__(self, functions: Mapping[str, Callable[..., int]]) -> None:
        self._combine, self._stream = functions["combine"], functions["stream"]

    def combine(self, base: torch.Tensor, aligned: torch.Tensor, out: torch.Tensor, weight: float) -> bool:
        """Combine values in memory; says whether all of the result is finite.

        Args:
            base: one side.
            aligned: the other, of the same size.
            out: where to.
            weight: 1 + alpha.
        """
        pointers = base.data_ptr(), aligned.data_ptr(), out.data_ptr()
        return not self._combine(*pointers, out.numel(), *step_of(weight))

    def add(self, base: torch.Tensor, delta: torch.Tensor, out: torch.Tensor, weight: float) -> bool:
        """The same with a delta: ``base + weight * delta``."""
        pointers = base.data_ptr(), delta.data_ptr(), out.data_ptr()
        return not self._combine(*pointers, out.numel(), weight, False, True)

    def stream(self, base: Place, other: Place, out: torch.Tensor, weight: float, is_delta: bool = False) -> int:
        """Read both sides of ``out``, which has elements, and combine them.

        Args:
            base: one side.
            other: aligned, or a delta.
            out: where to.
            weight: 1 + alpha.
            is_delta: which of the two ``other`` is.

        Returns:
            How many bytes of ``out`` are done; fewer than it has where a read did not give what was asked, or a
            result was not finite.
        """
        places = base.file, base.offset, other.file, other.offset, base.memory, other.memory
        step = (weight, False, True) if is_delta else step_of(weight)
        return self._stream(*places, out.data_ptr(), out.nbytes, STREAM_PIECE_BYTES, *step)


def step_of(weight: float) -> tuple[float, bool, bool]:
    """How far from which side: torch's lerp starts from the nearer one, so that 0 and 1 give that side's value.

    Returns:
        The factor (fp32), whether to start from aligned, and False: that it is no delta.
    """
    weight = ctypes.c_float(weight).value
    from_aligned = abs(weight) >= 0.5
    return (ctypes.c_float(weight - 1).value if from_aligned else weight), from_aligned, False


@once
def fused() -> Fused | None:
    """The loops, or None where torch has to do it; compiled once in a process."""
    functions = compiled(_IR, _SIGNATURES)
    loops = Fused(functions) if functions else None
    return loops if loops and _agrees_with_torch(loops.combine) else None


def _agrees_with_torch(combine: Callable[..., bool]) -> bool:
    """Compare with :func:`torch.lerp` on every finite bf16 value, with weights of both kinds; also on a few values,
    since vectorised loops do their last ones apart."""
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    aligned = every[every.isfinite()]
    near = (aligned.float() * 1.01).bfloat16()
    sides = [(aligned.flip(0), aligned), (near, aligned), (near[:13], aligned[:13]), (near[5:42], aligned[5:42])]
    return all(_same(combine, *pair, weight) for pair in sides for weight in (1.5, 0.3, -2.0, 9.0, 1.0001))


def _same(combine: Callable[..., bool], base: torch.Tensor, aligned: torch.Tensor, weight: float) -> bool:
    expected, found = torch.lerp(base, aligned, weight), torch.empty_like(aligned)
    is_finite = combine(base, aligned, found, weight)
    finite = expected.isfinite()
    same = torch.equal(found[finite].view(torch.int16), expected[finite].view(torch.int16))
    return same and is_finite == bool(finite.all())
