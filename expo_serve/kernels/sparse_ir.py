"""The loops of :mod:`.patch` as LLVM's intermediate representation.

A walk takes 4096 bytes of gaps at a time: the places of the changes into an array, without a branch; then their
steps, the old values, the new ones and the stores, each in a loop of its own, so that the arithmetic runs in vectors.
"""

from __future__ import annotations

from typing import Any

from expo_serve.kernels.fetch_ir import write_fetch
from expo_serve.kernels.ir import FunctionWriter

_CHUNK = 4096
LARGE = 255
"""Of a step: it stands among the large ones."""
SKIP = 255
"""Of a gap: so many values, and no change behind them."""


def source() -> str:
    """A module with ``fits``, ``look``, ``change``, ``load``, ``keep16``, ``keep32`` and ``keep64``.

    Raises:
        ImportError: llvmlite is not there.
    """
    from llvmlite import ir

    module = ir.Module("patch")
    _write_fits(ir, module)
    _write_look(ir, module)
    write_fetch(ir, module)
    for width in (16, 32, 64):
        _Walk(ir, module, f"keep{width}", width).write()
    _Walk(ir, module, "extrapolate", 16).write()
    return f"{module}{_CHANGE}"


# change(values, count, flags, gaps, bytes, small, changes, large, large ones, weight, from aligned): see that the
# parts fit, and walk base's values, of which `look` has given the flags, in place. Gives 0; 1 where something is not
# finite; 2 where the parts do not fit; 3, with nothing changed yet, where a -0.0 would not stay. load(file, offset,
# values, count, digest, ...): the same for values that it reads before. Gives 4 where not all of them came, and 5
# where they have another checksum.
_CHANGE = """
define i32 @change(ptr %values, i64 %count, i32 %flags, ptr %gaps, i64 %bytes, ptr %small, i64 %changes, ptr %large,
                   i64 %many, float %weight, i1 %from_aligned) {
entry:
  %bad = and i32 %flags, 1
  %is.bad = icmp ne i32 %bad, 0
  br i1 %is.bad, label %not.finite, label %finite
finite:
  %zeros = icmp ne i32 %flags, 0
  %bits = bitcast float %weight to i32
  %plus = icmp sge i32 %bits, 0
  %lost = and i1 %zeros, %plus
  br i1 %lost, label %minus.zero, label %plain
plain:
  %fit = call i1 @fits(ptr %gaps, i64 %bytes, i64 %count, ptr %small, i64 %changes, i64 %many)
  br i1 %fit, label %walk, label %damaged
walk:
  %over = call i1 @extrapolate(ptr %values, ptr %values, ptr %gaps, i64 %bytes, ptr %small, ptr %large,
                               float %weight, i1 %from_aligned)
  br i1 %over, label %not.finite, label %done
done:
  ret i32 0
not.finite:
  ret i32 1
damaged:
  ret i32 2
minus.zero:
  ret i32 3
}

define i32 @load(i32 %file, i64 %offset, ptr %values, i64 %count, i64 %digest, ptr %gaps, i64 %bytes, ptr %small,
                 i64 %changes, ptr %large, i64 %many, float %weight, i1 %from_aligned) {
entry:
  %found = alloca i64
  %seen = alloca i32
  %size = shl i64 %count, 1
  %got = call i64 @fetch(i32 %file, i64 %offset, ptr %values, i64 %size, ptr %found, ptr %seen)
  %whole = icmp eq i64 %got, %size
  br i1 %whole, label %came, label %short
came:
  %sum = load i64, ptr %found
  %same = icmp eq i64 %sum, %digest
  br i1 %same, label %sound, label %other
sound:
  %flags = load i32, ptr %seen
  %result = call i32 @change(ptr %values, i64 %count, i32 %flags, ptr %gaps, i64 %bytes, ptr %small, i64 %changes,
                             ptr %large, i64 %many, float %weight, i1 %from_aligned)
  ret i32 %result
short:
  ret i32 4
other:
  ret i32 5
}
"""


def _write_fits(ir: Any, module: Any) -> None:
    """``fits(gaps, bytes, values, small, changes, large)``: whether there are as many steps as gaps that end in a
    change, the last change lies among the values, and as many steps say that they are large as there are large ones."""
    word, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
    writer = FunctionWriter(ir, module, "fits", ir.IntType(1), [pointer, word, word, pointer, word, word])
    builder = writer.builder
    gaps, size, values, small, changes, large = writer.arguments
    count, place, many = (writer.variable(writer.number(0)) for _ in range(3))
    with writer.loop(writer.number(0), size, writer.number(1)) as index:
        gap, is_change = _gap(writer, gaps, index)
        builder.store(builder.add(builder.load(count), is_change), count)
        builder.store(builder.add(builder.load(place), builder.add(gap, is_change)), place)
    with writer.loop(writer.number(0), changes, writer.number(1)) as index:
        step = writer.load(small, index, ir.IntType(8))
        is_large = builder.zext(builder.icmp_unsigned("==", step, ir.Constant(ir.IntType(8), LARGE)), word)
        builder.store(builder.add(builder.load(many), is_large), many)
    same = builder.icmp_unsigned("==", builder.load(count), changes)
    same = builder.and_(same, builder.icmp_unsigned("==", builder.load(many), large))
    builder.ret(builder.and_(same, builder.icmp_unsigned("<=", builder.load(place), values)))


def _gap(writer: FunctionWriter, gaps: Any, index: Any) -> tuple[Any, Any]:
    """How many values a byte of gaps leaves out, and 1 where a change follows, else 0."""
    ir, builder = writer.ir, writer.builder
    gap = writer.load(gaps, index, ir.IntType(8))
    is_change = builder.icmp_unsigned("!=", gap, ir.Constant(ir.IntType(8), SKIP))
    return builder.zext(gap, writer.word), builder.zext(is_change, writer.word)


def _write_look(ir: Any, module: Any) -> None:
    """``look(values, count)`` of bf16: bit 0 where one is not finite, bit 1 where one is -0.0."""
    word, pointer, half = ir.IntType(64), ir.IntType(8).as_pointer(), ir.IntType(16)
    writer = FunctionWriter(ir, module, "look", ir.IntType(32), [pointer, word])
    builder = writer.builder
    values, count = writer.arguments
    zero = ir.Constant(half, 0)
    seen, zeros = writer.variable(zero), writer.variable(zero)
    with writer.loop(writer.number(0), count, writer.number(1)) as index:
        value = writer.load(values, index, half)
        builder.store(builder.or_(builder.load(seen), _mark(writer, value)), seen)
        is_zero = builder.zext(builder.icmp_unsigned("==", value, ir.Constant(half, 0x8000)), half)
        builder.store(builder.or_(builder.load(zeros), is_zero), zeros)
    bad = builder.lshr(builder.load(seen), ir.Constant(half, 15))
    both = builder.or_(bad, builder.shl(builder.load(zeros), ir.Constant(half, 1)))
    builder.ret(builder.zext(both, ir.IntType(32)))


def _mark(writer: FunctionWriter, value: Any) -> Any:
    """See fused.py: the sum sets the sign bit for an exponent of Inf or NaN, and for no other."""
    ir, builder = writer.ir, writer.builder
    exponent = builder.and_(value, ir.Constant(value.type, 0x7F80))
    return builder.add(exponent, ir.Constant(value.type, 0x80))


class _Walk(FunctionWriter):
    """``(base, out, gaps, bytes, small, large, weight, from_aligned)``: change the values that the gaps lead to.
    ``keep`` gives the changed values themselves, ``extrapolate`` (bf16) goes on from base through them, and says
    whether one that came or went is not finite."""

    def __init__(self, ir: Any, module: Any, name: str, width: int) -> None:
        word, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
        kinds = [pointer, pointer, pointer, word, pointer, pointer, ir.FloatType(), ir.IntType(1)]
        super().__init__(ir, module, name, ir.IntType(1), kinds)
        self.value = ir.IntType(width)
        self._extrapolates = name == "extrapolate"

    def write(self) -> None:
        """Chunk by chunk."""
        ir, builder = self.ir, self.builder
        base, out, gaps, size, small, large, _, _ = self.arguments
        places, steps = self.array(ir.IntType(32), _CHUNK), self.array(self.value, _CHUNK)
        olds = self.array(self.value, _CHUNK)
        self._seen = self.variable(ir.Constant(ir.IntType(16), 0))
        self._place = self.variable(self.number(0))
        done, used = self.variable(self.number(0)), self.variable(self.number(0))
        one = self.number(1)
        with self.loop(self.number(0), size, self.number(_CHUNK)) as first:
            count = self._find(gaps, first, size, places)
            self._read_steps(self.at(small, builder.load(done), ir.IntType(8)), large, used, count, steps)
            with self.loop(self.number(0), count, one) as index:
                place = builder.zext(self.load(places, index, ir.IntType(32)), self.word)
                self.store(self.load(base, place, self.value), olds, index)
            with self.loop(self.number(0), count, one) as index:
                new = self._changed(self.load(olds, index, self.value), self.load(steps, index, self.value))
                self.store(new, steps, index)
            with self.loop(self.number(0), count, one) as index:
                place = builder.zext(self.load(places, index, ir.IntType(32)), self.word)
                self.store(self.load(steps, index, self.value), out, place)
            builder.store(builder.add(builder.load(done), count), done)
        builder.ret(builder.icmp_signed("<", builder.load(self._seen), ir.Constant(ir.IntType(16), 0)))

    def _find(self, gaps: Any, first: Any, size: Any, places: Any) -> Any:
        """The places of the changes that a chunk of gaps leads to; how many."""
        builder = self.builder
        after = builder.add(first, self.number(_CHUNK))
        end = builder.select(builder.icmp_unsigned("<", after, size), after, size)
        count = self.variable(self.number(0))
        builder.store(self.number(0), count)
        with self.loop(first, end, self.number(1)) as index:
            gap, is_change = _gap(self, gaps, index)
            place = builder.add(builder.load(self._place), gap)
            self.store(builder.trunc(place, self.ir.IntType(32)), places, builder.load(count))
            builder.store(builder.add(builder.load(count), is_change), count)
            builder.store(builder.add(place, is_change), self._place)
        return builder.load(count)

    def _read_steps(self, small: Any, large: Any, used: Any, count: Any, steps: Any) -> None:
        """Zigzag-coded steps in the width of the values; those that say so come from among the large ones."""
        ir, builder, byte = self.ir, self.builder, self.ir.IntType(8)
        any_large = self.variable(ir.Constant(byte, 0))
        builder.store(ir.Constant(byte, 0), any_large)
        is_large = ir.Constant(byte, LARGE)
        with self.loop(self.number(0), count, self.number(1)) as index:
            step = self.load(small, index, byte)
            found = builder.zext(builder.icmp_unsigned("==", step, is_large), byte)
            builder.store(builder.or_(builder.load(any_large), found), any_large)
            self.store(builder.add(builder.zext(step, self.value), ir.Constant(self.value, 1)), steps, index)
        with (
            builder.if_then(builder.icmp_unsigned("!=", builder.load(any_large), ir.Constant(byte, 0)), likely=False),
            self.loop(self.number(0), count, self.number(1)) as index,
            builder.if_then(builder.icmp_unsigned("==", self.load(small, index, byte), is_large), likely=False),
        ):
            at = builder.load(used)
            self.store(self.load(large, at, self.value), steps, index)
            builder.store(builder.add(at, self.number(1)), used)

    def _changed(self, old: Any, step: Any) -> Any:
        """One step further on the scale of ranks; extrapolated, where that is what the walk does."""
        builder, one = self.builder, self.ir.Constant(self.value, 1)
        sign = builder.sub(self.ir.Constant(self.value, 0), builder.and_(step, one))
        difference = builder.xor(builder.lshr(step, one), sign)
        new = self._rank(builder.add(self._rank(old), difference))
        if not self._extrapolates:
            return new
        result = self._lerp(old, new)
        marks = builder.or_(_mark(self, result), _mark(self, new))
        builder.store(builder.or_(builder.load(self._seen), marks), self._seen)
        return result

    def _rank(self, bits: Any) -> Any:
        builder, width = self.builder, self.value.width
        sign = builder.ashr(bits, self.ir.Constant(self.value, width - 1))
        return builder.xor(bits, builder.and_(sign, self.ir.Constant(self.value, (1 << (width - 1)) - 1)))

    def _lerp(self, old: Any, new: Any) -> Any:
        """The arithmetic of fused.py, rounding included."""
        ir, builder = self.ir, self.builder
        weight, from_aligned = self.arguments[6], self.arguments[7]
        base, aligned = self._float(old), self._float(new)
        start = builder.select(from_aligned, aligned, base)
        value = self.intrinsic("llvm.fma.f32", self.real, weight, builder.fsub(aligned, base), start)
        wide = ir.IntType(32)
        bits = builder.bitcast(value, wide)
        odd = builder.and_(builder.lshr(bits, ir.Constant(wide, 16)), ir.Constant(wide, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(wide, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, ir.Constant(wide, 16)), self.value)

    def _float(self, half: Any) -> Any:
        wide = self.ir.IntType(32)
        return self.builder.bitcast(
            self.builder.shl(self.builder.zext(half, wide), self.ir.Constant(wide, 16)), self.real
        )
