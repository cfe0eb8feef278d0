"""The formula for bf16 in one pass: combine, round once, and notice what is not finite.

torch does this in two passes (lerp, then a sum that shows whether all is finite) at 7 GB/s of result a core, and that
is what would bound a load from a warm page cache; this loop does 12 (two AVX-512 cores of an AMD EPYC, operands in
cache). The bits must be those of :func:`torch.lerp`: where a probe shows others, or where the loop cannot be compiled,
torch itself is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from expo_serve.weights.native import compiled, once

# The rounding is torch's: to the nearest, ties to even, by adding 0x7fff and the last bit that stays. 0x7f80 is the
# exponent of Inf and NaN: adding 0x0080 to the exponent alone sets the sign bit for no other, and `or` keeps it.
_IR = """
define i1 @combine(ptr noalias readonly %base, ptr noalias readonly %aligned, ptr noalias %out, i64 %count,
                   float %weight, i1 %from_aligned) {
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
  %step = fsub float %a, %b
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
"""

Combine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], bool]
"""Takes base, aligned, where to (contiguous bf16 tensors of one size on the CPU) and 1 + alpha; says whether all of
the result is finite."""

_POINTER = ctypes.c_void_p
_SIGNATURE = ctypes.CFUNCTYPE(
    ctypes.c_bool, _POINTER, _POINTER, _POINTER, ctypes.c_int64, ctypes.c_float, ctypes.c_bool
)


@once
def fused() -> Combine | None:
    """The compiled loop, or None where torch has to do it; compiled once in a process."""
    loop = compiled(_IR, "combine", _SIGNATURE)
    if loop is None:
        return None

    def combine(base: torch.Tensor, aligned: torch.Tensor, out: torch.Tensor, weight: float) -> bool:
        # torch's lerp starts from the nearer side, so that weights 0 and 1 give that side's value.
        weight = ctypes.c_float(weight).value
        from_aligned = abs(weight) >= 0.5
        step = ctypes.c_float(weight - 1).value if from_aligned else weight
        return not loop(base.data_ptr(), aligned.data_ptr(), out.data_ptr(), out.numel(), step, from_aligned)

    return combine if _agrees_with_torch(combine) else None


def _agrees_with_torch(combine: Combine) -> bool:
    """Compare with :func:`torch.lerp` on every finite bf16 value, with weights of both kinds; also on a few values,
    since vectorised loops do their last ones apart."""
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    aligned = every[every.isfinite()]
    near = (aligned.float() * 1.01).bfloat16()
    sides = [(aligned.flip(0), aligned), (near, aligned), (near[:13], aligned[:13]), (near[5:42], aligned[5:42])]
    return all(_same(combine, *pair, weight) for pair in sides for weight in (1.5, 0.3, -2.0, 9.0, 1.0001))


def _same(combine: Combine, base: torch.Tensor, aligned: torch.Tensor, weight: float) -> bool:
    expected, found = torch.lerp(base, aligned, weight), torch.empty_like(aligned)
    is_finite = combine(base, aligned, found, weight)
    finite = expected.isfinite()
    same = torch.equal(found[finite].view(torch.int16), expected[finite].view(torch.int16))
    return same and is_finite == bool(finite.all())
