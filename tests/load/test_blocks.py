"""One block of a packed delta: the same bits come back, and damaged bytes are an error of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expo_serve import kernels
from expo_serve.load import blocks
from expo_serve.load.blocks import Coded, DamagedError, decode, encode
from expo_serve.plan.packed_format import RAW, SAME, SHUFFLED, SPARSE

Values = npt.NDArray[np.signedinteger]
DTYPES = [np.dtype(name) for name in ("int8", "int16", "int32", "int64")]
SIZES = [0, 1, 2, 7, 8, 9, 63, 64, 65, 127, 1001, 4096]
SHARES = [0.0, 0.002, 0.2, 1.0]
STEPS = ("near", "edge", "far")
# Of each width: 0.0, -0.0, the smallest subnormal, the largest of bf16 and fp16, infinity and NaN of both, all ones.
_SPECIAL_16 = [0, 0x8000, 1, 0x8001, 0x7F7F, 0xFF7F, 0x7BFF, 0xFBFF, 0x7F80, 0x7C00, 0x7FFF, 0xFFFF, 0x007F, 0x03FF]


@pytest.fixture(scope="module", params=["compiled", "numpy"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways of each test: with the compiled loops, and as where they cannot be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(kernels, "available", lambda *_: False)
        yield request.param


def test_this_machine_has_the_loops() -> None:
    """Half of what is below would say nothing without them."""
    assert kernels.available("sparse.apply16", "sparse.apply32", "sparse.apply64"), kernels.reason()


def special(dtype: np.dtype[np.signedinteger]) -> Values:
    """Values at the ends of their ranges."""
    width = 8 * dtype.itemsize
    patterns = [pattern << (width - 16) if width >= 16 else pattern >> 8 for pattern in _SPECIAL_16]
    ends = [
        0,
        1,
        2,
        (1 << width) - 1,
        (1 << width) - 2,
        1 << (width - 1),
        (1 << (width - 1)) + 1,
        (1 << (width - 1)) - 1,
    ]
    return np.array([*patterns, *ends], dtype=f"u{dtype.itemsize}").view(dtype)


def draw_values(dtype: np.dtype[np.signedinteger], size: int, seed: int) -> Values:
    """Random bits, every third one a special value."""
    generator = np.random.default_rng(seed)
    values: Values = np.frombuffer(generator.bytes(size * dtype.itemsize), dtype=dtype).copy()
    chosen = generator.random(size) < 0.3
    values[chosen] = generator.choice(special(dtype), int(chosen.sum()))
    return values


def changed_from(base: Values, share: float, steps: str, seed: int) -> Values:
    """Some of base's values moved on: by a few, by what just fits a byte or does not, or to anything."""
    generator = np.random.default_rng(seed + 1)
    chosen = generator.random(base.size) < share
    ranges = {"near": (-3, 4), "edge": (-129, 130)}
    moved = draw_values(base.dtype, base.size, seed + 2)
    if steps in ranges:
        moved = base + generator.integers(*ranges[steps], base.size).astype(np.int64).astype(base.dtype)
    return np.where(chosen, moved, base)


def decoded(coded: Coded, base: Values | None, like: Values) -> Values:
    """Into memory that holds something else before."""
    out = np.full_like(like, 77)
    decode(coded, base, like.size, out)
    return out


@settings(deadline=None, max_examples=150)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from(SIZES),
    share=st.sampled_from(SHARES),
    steps=st.sampled_from(STEPS),
    seed=st.integers(0, 2**31),
)
@example(dtype=DTYPES[1], size=4096, share=1.0, steps="far", seed=0)
def test_decoding_gives_back_the_bits(
    way: str, dtype: np.dtype[np.signedinteger], size: int, share: float, steps: str, seed: int
) -> None:
    base = draw_values(dtype, size, seed)
    aligned = changed_from(base, share, steps, seed)
    kept = base.copy()
    coded = encode(aligned, base)
    assert np.array_equal(decoded(coded, base, aligned), aligned)
    assert np.array_equal(base, kept), "base was written to"
    decode(coded, base, size, base)
    assert np.array_equal(base, aligned), "in base's own memory"


@settings(deadline=None, max_examples=60)
@given(dtype=st.sampled_from(DTYPES), size=st.sampled_from(SIZES), seed=st.integers(0, 2**31))
def test_without_a_base_too(way: str, dtype: np.dtype[np.signedinteger], size: int, seed: int) -> None:
    aligned = draw_values(dtype, size, seed)
    coded = encode(aligned, None)
    assert coded.coding in (SHUFFLED, RAW)
    assert np.array_equal(decoded(coded, None, aligned), aligned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_special_value_becomes_every_other(way: str, dtype: np.dtype[np.signedinteger]) -> None:
    base, aligned = (part.reshape(-1) for part in np.meshgrid(special(dtype), special(dtype)))
    parts = _as_changes(aligned, base)
    assert np.array_equal(decoded(parts, base, aligned), aligned)


def _as_changes(aligned: Values, base: Values) -> Coded:
    """Coded as changes, although all of it would be smaller whole."""
    coded = blocks._changes(aligned, base)
    assert coded.coding == SPARSE
    return coded


def test_the_smallest_coding_is_taken() -> None:
    base = draw_values(DTYPES[1], 4096, 1)
    small = np.zeros(4096, np.int16)
    assert encode(base, base) == Coded(SAME)
    assert encode(changed_from(base, 0.1, "near", 1), base).coding == SPARSE
    assert encode(draw_values(DTYPES[1], 4096, 9), base).coding in (SHUFFLED, RAW)
    assert encode(small, None).coding == SHUFFLED
    assert encode(np.frombuffer(np.random.default_rng(1).bytes(64), np.int16), None).coding == RAW


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_block_takes_more_than_its_values(dtype: np.dtype[np.signedinteger]) -> None:
    for seed in range(20):
        aligned, base = draw_values(dtype, 333, seed), draw_values(dtype, 333, seed + 1)
        assert sum(map(len, encode(aligned, base).parts)) <= aligned.nbytes


SIZE = 1001
BASE = draw_values(DTYPES[1], SIZE, 5)
GOOD = _as_changes(changed_from(BASE, 0.2, "far", 5), BASE)
WHOLE = encode(np.zeros(SIZE, np.int16), None)
RAW_BLOCK = Coded(RAW, (BASE.tobytes(), b"", b""))
OTHERS = [0, 1, SIZE - 1, SIZE + 1, 2 * SIZE]
DAMAGES: dict[str, Callable[[], Coded]] = {
    "unknown coding": lambda: Coded(4, GOOD.parts),
    "huge coding": lambda: Coded(2**32 - 1, GOOD.parts),
    "no parts": lambda: Coded(SPARSE),
    "no bits": lambda: Coded(SPARSE, (b"", *GOOD.parts[1:])),
    "no steps": lambda: Coded(SPARSE, (GOOD.parts[0], b"", GOOD.parts[2])),
    "no large steps": lambda: Coded(SPARSE, (*GOOD.parts[:2], b"")),
    "bits and steps swapped": lambda: Coded(SPARSE, (GOOD.parts[1], GOOD.parts[0], GOOD.parts[2])),
    "steps and large ones swapped": lambda: Coded(SPARSE, (GOOD.parts[0], GOOD.parts[2], GOOD.parts[1])),
    "one step too few": lambda: _steps(lambda small: small[:-1]),
    "one step too many": lambda: _steps(lambda small: small + b"\0"),
    "one more large step announced": lambda: _steps(lambda small: small.replace(_first_small(small), b"\xff", 1)),
    "one less large step announced": lambda: _steps(lambda small: small.replace(b"\xff", b"\0", 1)),
    "one large step too many": lambda: _large(lambda large: large + b"\0\0"),
    "half a large step": lambda: _large(lambda large: large[:-1]),
    "one place too many": lambda: _places(lambda places: places + b"\0"),
    "one place too few": lambda: _places(lambda places: places[:-1]),
    "no place": lambda: _places(lambda places: b""),
    "places behind the last value": lambda: Coded(SPARSE, _with_places_behind()),
    "whole, a value too few": lambda: Coded(SHUFFLED, (blocks._compress(bytes(2 * SIZE - 2)), b"", b"")),
    "whole, half a value too few": lambda: Coded(SHUFFLED, (blocks._compress(bytes(2 * SIZE - 1)), b"", b"")),
    "whole, too many": lambda: Coded(SHUFFLED, (blocks._compress(bytes(2 * SIZE + 2)), b"", b"")),
    "whole, a bomb": lambda: Coded(SHUFFLED, (blocks._compress(bytes(1 << 24)), b"", b"")),
    "whole, nothing": lambda: Coded(SHUFFLED),
    "whole, no frame": lambda: Coded(SHUFFLED, RAW_BLOCK.parts),
    "raw, a byte too few": lambda: Coded(RAW, (RAW_BLOCK.parts[0][:-1], b"", b"")),
    "raw, nothing": lambda: Coded(RAW),
}


def _steps(change: Callable[[bytes], bytes]) -> Coded:
    return Coded(SPARSE, (GOOD.parts[0], _recompressed(GOOD.parts[1], change), GOOD.parts[2]))


def _large(change: Callable[[bytes], bytes]) -> Coded:
    return Coded(SPARSE, (*GOOD.parts[:2], _recompressed(GOOD.parts[2], change)))


def _places(change: Callable[[bytes], bytes]) -> Coded:
    return Coded(SPARSE, (_recompressed(GOOD.parts[0], change), *GOOD.parts[1:]))


def _recompressed(part: bytes | memoryview, change: Callable[[bytes], bytes]) -> bytes:
    return blocks._compress(change(blocks.decompress(part, 1 << 20)))


def _first_small(small: bytes) -> bytes:
    return bytes([next(step for step in small if step != 255)])


def _with_places_behind() -> tuple[bytes, bytes, bytes | memoryview]:
    """Places and steps fit each other, but not the block."""
    places = _recompressed(GOOD.parts[0], lambda raw: raw + b"\xfe" * 5)
    return places, _recompressed(GOOD.parts[1], lambda raw: raw + b"\0" * 5), GOOD.parts[2]


@pytest.mark.parametrize("make", DAMAGES.values(), ids=DAMAGES)
def test_damaged_block_is_refused(way: str, make: Callable[[], Coded]) -> None:
    with pytest.raises(DamagedError):
        decoded(make(), BASE, BASE)


@pytest.mark.parametrize("coding", [SAME, SPARSE])
def test_block_that_needs_a_base_is_refused_without_one(coding: int) -> None:
    with pytest.raises(DamagedError):
        decoded(Coded(coding, GOOD.parts), None, BASE)


@pytest.mark.parametrize(
    ("coded", "size"),
    [*((GOOD, size) for size in (0, 1, 63, 900)), *((whole, size) for whole in (WHOLE, RAW_BLOCK) for size in OTHERS)],
)
def test_block_of_another_number_of_values_is_refused(way: str, coded: Coded, size: int) -> None:
    like = np.zeros(size, np.int16)
    with pytest.raises(DamagedError):
        decoded(coded, like, like)


@pytest.mark.parametrize("coded", [GOOD, WHOLE, RAW_BLOCK], ids=["changes", "shuffled", "raw"])
def test_every_cut_is_refused(coded: Coded) -> None:
    for number, part in enumerate(coded.parts):
        for end in range(0, len(part), 1 + len(part) // 50):
            parts = list(coded.parts)
            parts[number] = part[:end]
            with pytest.raises(DamagedError):
                decoded(Coded(coded.coding, (parts[0], parts[1], parts[2])), BASE, BASE)


_FRAME = st.lists(st.sampled_from([0, 1, 2, 254, 255]), max_size=40).map(lambda raw: blocks._compress(bytes(raw)))


@settings(deadline=None, max_examples=300)
@given(
    coding=st.integers(0, 4),
    parts=st.tuples(*[st.just(b"") | _FRAME | st.binary(max_size=40) for _ in range(3)]),
    size=st.sampled_from([0, 1, 8, 20, 64, 300]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_bytes_give_the_same_both_ways_or_are_refused(
    coding: int, parts: tuple[bytes, bytes, bytes], size: int, dtype: np.dtype[np.signedinteger]
) -> None:
    coded = Coded(coding, parts)
    compiled = _values_or_refusal(coded, size, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "available", lambda *_: False)
        assert compiled == _values_or_refusal(coded, size, dtype)


def _values_or_refusal(coded: Coded, size: int, dtype: np.dtype[np.signedinteger]) -> bytes:
    """In the midst of memory that nobody else may write to."""
    around = np.full(size + 128, 77, dtype)
    try:
        decode(coded, np.zeros(size, dtype), size, around[64 : 64 + size])
    except DamagedError:
        return b"refused"
    finally:
        assert (np.delete(around, slice(64, 64 + size)) == 77).all()
    return around.tobytes()
