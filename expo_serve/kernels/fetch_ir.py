"""Reading a block of base, its checksum and a look at its values in one compiled call.

Every call of a library gives Python's lock away and has to get it back, which takes the kernel some 50 microseconds
on a virtual machine when another thread holds it: at seven calls a block that was a quarter of the time of two
threads. So the checksum, which stands in the packed format as the xxhash package computes it, is computed here as
well: XXH3 of 64 bits without seed, for inputs longer than 240 bytes
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md#xxh3-algorithm-overview). Where it
differs from what the table says, the block goes the plain way, which asks the package.
"""

from __future__ import annotations

from typing import Any

from expo_serve.kernels.ir import FunctionWriter

LEAST_BYTES = 241
"""Shorter inputs have other rules."""
_PIECE = 1 << 18
_STRIPE, _LANES, _STRIPES = 64, 8, 16
_BLOCK = _STRIPE * _STRIPES
_MASK = (1 << 64) - 1
# The specification's default secret, and its primes.
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6"
    "813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c8"
    "9f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95"
    "160428afd7fbcabb4b407e"
)
_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_START = (_PRIME32[2], *_PRIME64[:4], _PRIME32[1], _PRIME64[4], _PRIME32[0])
_AVALANCHE = 0x165667919E3779F9
_MERGE_AT = 11
_LAST_AT = len(_SECRET) - _STRIPE - 7


def write_fetch(ir: Any, module: Any) -> None:
    """``fetch(file, offset, out, bytes, digest, flags)``: read a block of base onto its place, compute its checksum,
    and say of its values (bf16) what ``look`` says of them. Gives how many bytes came; where all did, the checksum is
    there."""
    _Fetch(ir, module).write()


class _Fetch(FunctionWriter):
    """See :func:`write_fetch`; the module has ``look`` already."""

    def __init__(self, ir: Any, module: Any) -> None:
        word, half, pointer = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
        super().__init__(ir, module, "fetch", word, [half, word, pointer, word, pointer, pointer])
        self.half = half
        self.lanes = ir.VectorType(word, _LANES)

    def write(self) -> None:
        """Piece by piece, so that each is still near when its checksum is taken; then what is left behind the last."""
        builder, half = self.builder, self.half
        file, offset, out, size, digest, found = self.arguments
        self._sums = self.variable(self._vector(_START))
        flags = self.variable(self.ir.Constant(half, 0))
        whole = builder.udiv(builder.sub(size, self.number(1)), self.number(_BLOCK))
        with self.loop(self.number(0), size, self.number(_PIECE)) as start:
            rest = builder.sub(size, start)
            count = builder.select(builder.icmp_unsigned("<", rest, self.number(_PIECE)), rest, self.number(_PIECE))
            place = self._byte(out, start)
            got = self.intrinsic("pread", self.word, file, place, count, builder.add(offset, start))
            with builder.if_then(builder.icmp_unsigned("!=", got, count), likely=False):
                builder.ret(start)
            self._take_blocks(out, start, builder.add(start, count), whole)
            seen = self.intrinsic("look", half, place, builder.lshr(count, self.number(1)))
            builder.store(builder.or_(builder.load(flags), seen), flags)
        self._take_rest(out, size, whole)
        self.store(builder.load(flags), found, self.number(0))
        self.store(self._merged(size), digest, self.number(0))
        builder.ret(size)

    def _take_blocks(self, out: Any, start: Any, end: Any, whole: Any) -> None:
        """Sixteen stripes at a time, then the sums are scrambled; the last block waits for the end."""
        builder = self.builder
        first, after = (builder.udiv(at, self.number(_BLOCK)) for at in (start, end))
        last = builder.select(builder.icmp_unsigned("<", after, whole), after, whole)
        with self.loop(first, last, self.number(1)) as block:
            sums = builder.load(self._sums)
            begin = self._byte(out, builder.mul(block, self.number(_BLOCK)))
            for stripe in range(_STRIPES):
                sums = self._stripe(sums, self._byte(begin, self.number(stripe * _STRIPE)), self._secret(8 * stripe))
            mixed = builder.xor(sums, builder.lshr(sums, self._vector([47] * _LANES)))
            mixed = builder.xor(mixed, self._secret(len(_SECRET) - _STRIPE))
            builder.store(builder.mul(mixed, self._vector([_PRIME32[0]] * _LANES)), self._sums)

    def _take_rest(self, out: Any, size: Any, whole: Any) -> None:
        """The stripes of the last block, and the input's last 64 bytes."""
        builder = self.builder
        begin = builder.mul(whole, self.number(_BLOCK))
        left = builder.sub(builder.sub(size, self.number(1)), begin)
        with self.loop(self.number(0), builder.udiv(left, self.number(_STRIPE)), self.number(1)) as stripe:
            at = builder.add(begin, builder.mul(stripe, self.number(_STRIPE)))
            key = self._secret_at(builder.mul(stripe, self.number(8)))
            builder.store(self._stripe(builder.load(self._sums), self._byte(out, at), key), self._sums)
        last = self._byte(out, builder.sub(size, self.number(_STRIPE)))
        builder.store(self._stripe(builder.load(self._sums), last, self._secret(_LAST_AT)), self._sums)

    def _stripe(self, sums: Any, at: Any, key: Any) -> Any:
        """Each lane gets the neighbour's input, and the product of the halves of its own, mixed with the secret."""
        ir, builder = self.ir, self.builder
        data = self.load(at, self.number(0), self.lanes)
        mixed = builder.xor(data, key)
        low = builder.and_(mixed, self._vector([0xFFFFFFFF] * _LANES))
        product = builder.mul(low, builder.lshr(mixed, self._vector([32] * _LANES)))
        swap = ir.Constant(ir.VectorType(self.half, _LANES), [lane ^ 1 for lane in range(_LANES)])
        swapped = builder.shuffle_vector(data, ir.Constant(self.lanes, ir.Undefined), swap)
        return builder.add(builder.add(sums, swapped), product)

    def _merged(self, size: Any) -> Any:
        """The lanes folded in pairs, and the avalanche."""
        ir, builder = self.ir, self.builder
        sums = builder.load(self._sums)
        total = builder.mul(size, self.number(_PRIME64[0]))
        double = ir.IntType(128)
        for pair in range(_LANES // 2):
            halves = []
            for lane in (2 * pair, 2 * pair + 1):
                at = _MERGE_AT + 8 * lane
                value = builder.extract_element(sums, ir.Constant(self.half, lane))
                key = self.number(int.from_bytes(_SECRET[at : at + 8], "little"))
                halves.append(builder.zext(builder.xor(value, key), double))
            product = builder.mul(*halves)
            high = builder.trunc(builder.lshr(product, ir.Constant(double, 64)), self.word)
            total = builder.add(total, builder.xor(builder.trunc(product, self.word), high))
        total = builder.xor(total, builder.lshr(total, self.number(37)))
        total = builder.mul(total, self.number(_AVALANCHE))
        return builder.xor(total, builder.lshr(total, self.number(32)))

    def _secret(self, at: int) -> Any:
        return self._vector([int.from_bytes(_SECRET[at + 8 * lane : at + 8 * lane + 8], "little") for lane in range(8)])

    def _secret_at(self, at: Any) -> Any:
        ir = self.ir
        if (secret := self.module.globals.get("secret")) is None:
            kind = ir.ArrayType(ir.IntType(8), len(_SECRET))
            secret = ir.GlobalVariable(self.module, kind, "secret")
            secret.global_constant, secret.linkage = True, "private"
            secret.initializer = ir.Constant(kind, bytearray(_SECRET))
        start = self.builder.bitcast(secret, self.pointer)
        return self.load(self._byte(start, at), self.number(0), self.lanes)

    def _byte(self, start: Any, at: Any) -> Any:
        return self.at(start, at, self.ir.IntType(8))

    def _vector(self, values: Any) -> Any:
        return self.ir.Constant(self.lanes, [value & _MASK for value in values])
