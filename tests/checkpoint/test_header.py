"""The header's checks: whatever the bytes are, the answer is a CheckpointError or what safetensors itself reads."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from expo_serve.checkpoint import header
from expo_serve.checkpoint.header import read_header
from expo_serve.checkpoint.records import DTYPES
from expo_serve.errors import CheckpointError
from tests.models.raw import entry, file_bytes

GOOD = save(
    {"a": torch.arange(6, dtype=torch.int32).view(2, 3), "b.weight": torch.ones(4).bfloat16(), "c": torch.tensor(1.5)},
    metadata={"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that each example writes anew."""
    return tmp_path_factory.mktemp("header") / "model.safetensors"


def test_records_say_where_each_tensor_lies(file: Path) -> None:
    file.write_bytes(GOOD)
    found = read_header(file).tensors
    assert {name: (record.dtype, record.shape) for name, record in found.items()} == {
        "a": ("I32", (2, 3)),
        "b.weight": ("BF16", (4,)),
        "c": ("F32", ()),
    }
    record = found["a"]
    assert (record.numel, record.nbytes, record.file, record.is_float) == (6, 24, file, False)
    assert GOOD[record.offset :][:24] == torch.arange(6, dtype=torch.int32).numpy().tobytes()


def test_digest_tells_layouts_apart_but_not_values(file: Path) -> None:
    digests = []
    for content in (GOOD, GOOD[:-1] + b"\x00", file_bytes({"a": entry("U8", [1], 0, 1)}, b"1")):
        file.write_bytes(content)
        digests.append(read_header(file).digest)
    assert digests[0] == digests[1] != digests[2]


def _by_the_library(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        return {
            name: (found.get_dtype(), tuple(found.get_shape()), _bytes(opened.get_tensor(name)))
            for name, found in slices.items()
        }


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _agrees_with_the_library(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        found = read_header(file).tensors
    except CheckpointError as error:
        refusal = error.message
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith(f"{file}: ")
        assert "\n" not in refusal
        return
    ours = {
        name: (record.dtype, record.shape, content[record.offset : record.offset + record.nbytes])
        for name, record in found.items()
    }
    assert ours == _by_the_library(file)


@settings(deadline=None, max_examples=300)
@given(
    flips=st.lists(st.tuples(st.integers(0, HEADER_END + 2), st.integers(0, 255)), max_size=3),
    cut=st.one_of(st.none(), st.integers(0, len(GOOD))),
    tail=st.binary(max_size=3),
)
@example(flips=[], cut=None, tail=b"")
def test_flipped_and_cut_bytes(file: Path, flips: list[tuple[int, int]], cut: int | None, tail: bytes) -> None:
    content = bytearray(GOOD)
    for position, value in flips:
        content[position] = value
    _agrees_with_the_library(file, bytes(content[:cut]) + tail)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "", "f32"]) | _JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 12), min_size=2, max_size=2) | _JSON,
    }
)


@settings(deadline=None, max_examples=200)
@given(
    content=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), _ENTRY | _JSON, max_size=3),
    data=st.binary(max_size=16),
)
def test_headers_of_any_content(file: Path, content: dict[str, Any], data: bytes) -> None:
    _agrees_with_the_library(file, file_bytes(json.dumps(content), data))


_ONE = json.dumps(entry("U8", [1], 0, 1))


@pytest.mark.parametrize(
    "raw",
    [
        f'{{"a": {_ONE}}}'.encode("utf-16"),
        b"\xef\xbb\xbf" + f'{{"a": {_ONE}}}'.encode(),
        f'{{"\\ud800": {_ONE}}}'.encode(),
        f'{{"a\\nb": {_ONE}}}'.encode(),
        b'{"\xed\xa0\x80": ' + _ONE.encode() + b"}",
        f'{{"__metadata__": {{"format": 1}}, "a": {_ONE}}}'.encode(),
        f'{{"__metadata__": [], "a": {_ONE}}}'.encode(),
        f'{{"a": {{"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}, "b": {_ONE}}}'.encode(),
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"",
        b"null",
    ],
)
def test_odd_json_is_a_checkpoint_error(file: Path, raw: bytes) -> None:
    file.write_bytes(file_bytes(raw, b"1"))
    with pytest.raises(CheckpointError, match=str(file)):
        read_header(file)


@pytest.mark.parametrize(
    "shape", [[2] * 1_000_000, [10**4000] * 2, [2**62, 2**62], [0, 2**62, 4], [True], [-1], [1.0], "2", None]
)
def test_absurd_shape_is_refused_at_once(file: Path, shape: Any) -> None:
    started = time.monotonic()
    file.write_bytes(file_bytes({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}, b"1"))
    with pytest.raises(CheckpointError, match="tensor 'a'"):
        read_header(file)
    assert time.monotonic() - started < 5


def test_more_tensors_than_the_cap_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_TENSORS", 2)
    file.write_bytes(GOOD)
    with pytest.raises(CheckpointError, match="expected at most 2 tensors in the header, found more"):
        read_header(file)


def test_longer_header_than_the_cap_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 10)
    file.write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=f"header length is {HEADER_END - 8} bytes, the limit is 10"):
        read_header(file)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50])
def test_cut_file_whose_length_looks_like_a_pickles_mark_is_called_cut(file: Path, length: int) -> None:
    file.write_bytes(length.to_bytes(8, "little") + b"{")
    with pytest.raises(CheckpointError, match="file is truncated"):
        read_header(file)


def test_file_that_is_gone_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "gone")


def test_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="regular file"):
        read_header(tmp_path / "pipe")


def test_library_agrees_that_the_good_file_is_good(file: Path) -> None:
    """The comparison above would be empty if the library refused all."""
    file.write_bytes(GOOD)
    assert len(_by_the_library(file)) == 3
    file.write_bytes(GOOD[:-1])
    with pytest.raises(SafetensorError):
        _by_the_library(file)
