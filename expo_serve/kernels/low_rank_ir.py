"""The loops of :mod:`.low_rank` as LLVM's intermediate representation, made for the processor at hand."""

from __future__ import annotations

from typing import Any

from expo_serve.kernels.ir import FunctionWriter

_PANEL = 512
"""Columns: at rank 16 the panel takes 32 KB."""


def source() -> str:
    """A module with the functions ``add``, ``product`` and ``stream``.

    Raises:
        ImportError: llvmlite is not there.
    """
    from llvmlite import binding, ir

    # As many sums as there are registers for: 16 of 64 bytes, or 8 of 32.
    lanes, rows = (32, 8) if binding.get_host_cpu_features().get("avx512f") else (16, 4)
    module = ir.Module("low_rank")
    for name in ("add", "product"):
        _Writer(ir, module, name, lanes, rows).write()
    return f"{module}{_STREAM}"


# stream(file, offset, out, left, left stride, right, right stride, rows, columns, rank, scale, weight, step): rows of
# bf16 are read onto their place and the product is added there, ``step`` of them at a time; gives how many are done.
_STREAM = """
declare i64 @pread(i32, ptr, i64, i64)

define i64 @stream(i32 %file, i64 %offset, ptr %out, ptr %left, i64 %left.stride, ptr %right, i64 %right.stride,
                   i64 %rows, i64 %columns, i64 %rank, float %scale, float %weight, i64 %step) {
entry:
  %none = icmp eq i64 %rows, 0
  br i1 %none, label %finished, label %loop
loop:
  %row = phi i64 [ 0, %entry ], [ %next, %added ]
  %rest = sub i64 %rows, %row
  %is.last = icmp ult i64 %rest, %step
  %count = select i1 %is.last, i64 %rest, i64 %step
  %before = mul i64 %row, %columns
  %values = mul i64 %count, %columns
  %size = shl i64 %values, 1
  %skipped = shl i64 %before, 1
  %at = add i64 %offset, %skipped
  %place = getelementptr i16, ptr %out, i64 %before
  %got = call i64 @pread(i32 %file, ptr %place, i64 %size, i64 %at)
  %whole = icmp eq i64 %got, %size
  br i1 %whole, label %read, label %stopped
read:
  %left.row = mul i64 %row, %left.stride
  %left.at = getelementptr float, ptr %left, i64 %left.row
  %bad = call i1 @add(ptr %place, i64 %columns, ptr %place, i64 %columns, ptr %left.at, i64 %left.stride,
                      ptr %right, i64 %right.stride, i64 %count, i64 %columns, i64 %rank, float %scale, float %weight)
  br i1 %bad, label %stopped, label %added
added:
  %next = add i64 %row, %count
  %more = icmp ult i64 %next, %rows
  br i1 %more, label %loop, label %finished
stopped:
  ret i64 %row
finished:
  ret i64 %rows
}
"""


class _Writer(FunctionWriter):
    """Writes one function: ``add(base, stride, out, stride, left, stride, right, stride, rows, columns, rank, scale,
    weight)``; ``product`` has the same arguments, and stores the scaled product instead of adding it to base.

    Args:
        ir: llvmlite's builder of intermediate representation.
        module: where the function goes.
        name: ``add`` (bf16 in and out) or ``product`` (fp32 out).
        lanes: columns that are computed side by side.
        rows: the same.
    """

    def __init__(self, ir: Any, module: Any, name: str, lanes: int, rows: int) -> None:
        word, real, pointer = ir.IntType(64), ir.FloatType(), ir.IntType(8).as_pointer()
        matrices = [kind for _ in range(4) for kind in (pointer, word)]
        super().__init__(ir, module, name, ir.IntType(1), [*matrices, *[word] * 3, real, real])
        self._lanes, self._rows, self._adds = lanes, rows, name == "add"

    def write(self) -> None:
        """Panels of columns, blocks of rows within, vectors of columns within, the rank within."""
        builder, word = self.builder, self.word
        rows, columns = self.arguments[8], self.arguments[9]
        self._bad = {lanes: self._zeros(lanes) for lanes in (1, self._lanes)}
        zero = self.ir.Constant(word, 0)
        full_rows = builder.sub(rows, builder.urem(rows, self.number(self._rows)))
        with self.loop(zero, columns, self.number(_PANEL)) as panel:
            after = builder.add(panel, self.number(_PANEL))
            end = builder.select(builder.icmp_unsigned("<", after, columns), after, columns)
            with self.loop(zero, full_rows, self.number(self._rows)) as row:
                self._row_block(row, panel, end, self._rows)
            with self.loop(full_rows, rows, self.number(1)) as row:
                self._row_block(row, panel, end, 1)
        builder.ret(self._any_negative())

    def _row_block(self, row: Any, start: Any, end: Any, count: int) -> None:
        builder = self.builder
        lanes = self.number(self._lanes)
        whole = builder.sub(end, builder.urem(builder.sub(end, start), lanes))
        with self.loop(start, whole, lanes) as column:
            self._tile(row, column, count, self._lanes)
        with self.loop(whole, end, self.number(1)) as column:
            self._tile(row, column, count, 1)

    def _tile(self, row: Any, column: Any, count: int, lanes: int) -> None:
        """``count`` rows of ``lanes`` columns: their sums over the rank, then what becomes of them."""
        builder, ir = self.builder, self.ir
        vector = ir.VectorType(self.real, lanes)
        with builder.goto_entry_block():  # only there a place in memory becomes a register
            sums = [builder.alloca(vector) for _ in range(count)]
        for total in sums:
            builder.store(ir.Constant(vector, [0.0] * lanes), total)
        rows = [builder.add(row, self.number(index)) for index in range(count)]
        with self.loop(self.number(0), self.arguments[10], self.number(1)) as place:
            right = builder.load(self._at(6, place, column, vector), align=4)
            for index, total in zip(rows, sums, strict=True):
                left = self._spread(builder.load(self._at(4, index, place, self.real), align=4), lanes)
                builder.store(self._fma(left, right, builder.load(total)), total)
        scale = self._spread(self.arguments[11], lanes)
        for index, total in zip(rows, sums, strict=True):
            step = builder.fmul(builder.load(total), scale)
            if self._adds:
                self._add(step, index, column, lanes)
            else:
                builder.store(step, self._at(2, index, column, vector), align=4)

    def _add(self, step: Any, row: Any, column: Any, lanes: int) -> None:
        """``base + weight * step``, rounded to bf16 as torch does it, to the nearest with ties to even."""
        builder, ir = self.builder, self.ir
        narrow, wide = ir.VectorType(ir.IntType(16), lanes), ir.VectorType(ir.IntType(32), lanes)

        def number(kind: Any, value: int) -> Any:
            return ir.Constant(kind, [value] * lanes)

        bits = builder.zext(builder.load(self._at(0, row, column, narrow), align=2), wide)
        base = builder.bitcast(builder.shl(bits, number(wide, 16)), ir.VectorType(self.real, lanes))
        weight = self._spread(self.arguments[12], lanes)
        value = self._fma(weight, step, base)
        bits = builder.bitcast(value, wide)
        odd = builder.and_(builder.lshr(bits, number(wide, 16)), number(wide, 1))
        rounded = builder.add(builder.add(bits, number(wide, 0x7FFF)), odd)
        halves = builder.bitcast(rounded, ir.VectorType(ir.IntType(16), 2 * lanes))
        upper = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [2 * lane + 1 for lane in range(lanes)])
        result = builder.shuffle_vector(halves, ir.Constant(halves.type, ir.Undefined), upper)
        builder.store(result, self._at(2, row, column, narrow), align=2)
        # See fused.py: the sum sets the sign bit for an exponent of Inf or NaN, and for no other.
        mark = builder.add(builder.and_(result, number(narrow, 0x7F80)), number(narrow, 0x80))
        seen = self._bad[lanes]
        builder.store(builder.or_(builder.load(seen), mark), seen)

    def _zeros(self, lanes: int) -> Any:
        """A place for what was seen in each lane."""
        kind = self.ir.VectorType(self.ir.IntType(16), lanes)
        place = self.builder.alloca(kind)
        self.builder.store(self.ir.Constant(kind, [0] * lanes), place)
        return place

    def _any_negative(self) -> Any:
        builder, ir = self.builder, self.ir
        found = ir.Constant(ir.IntType(16), 0)
        for lanes, place in self._bad.items():
            seen = builder.load(place)
            for lane in range(lanes):
                found = builder.or_(found, builder.extract_element(seen, ir.Constant(ir.IntType(32), lane)))
        return builder.icmp_signed("<", found, ir.Constant(ir.IntType(16), 0))

    def _at(self, matrix: int, row: Any, column: Any, kind: Any) -> Any:
        """The address of an element of a matrix, given by the place of its argument."""
        builder = self.builder
        element = kind.element if hasattr(kind, "element") else kind
        start = builder.bitcast(self.arguments[matrix], element.as_pointer())
        index = builder.add(builder.mul(row, self.arguments[matrix + 1]), column)
        return builder.bitcast(builder.gep(start, [index]), kind.as_pointer())

    def _fma(self, left: Any, right: Any, total: Any) -> Any:
        return self.intrinsic(f"llvm.fma.v{total.type.count}f32", total.type, left, right, total)

    def _spread(self, value: Any, lanes: int) -> Any:
        ir, builder = self.ir, self.builder
        vector = ir.VectorType(self.real, lanes)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)
