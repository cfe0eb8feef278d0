"""Files of torch.save are read as torch reads them, and of any other bytes nothing is run."""

from __future__ import annotations

import ast
import io
import os
import pickle
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config

from expo_serve.checkpoint import pickle_index, pickle_values, pickle_walk, zip_index
from expo_serve.checkpoint.header import read_header
from expo_serve.checkpoint.pickle_index import read_pickle_header
from expo_serve.checkpoint.records import DTYPES, TensorRecord
from expo_serve.errors import CheckpointError
from tests.models.pickled import (
    FLOATS,
    GOOD,
    PICKLE_END,
    PICKLE_START,
    archive,
    named,
    number,
    numbers,
    pickled,
    storage,
    table,
    tensor,
    text,
)

MODULES = (pickle_index, pickle_values, pickle_walk, zip_index)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that each example writes anew."""
    return tmp_path_factory.mktemp("pickle") / "pytorch_model.bin"


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _read(record: TensorRecord) -> bytes:
    with record.file.open("rb") as opened:
        return os.pread(opened.fileno(), record.nbytes, record.offset)


def _saved(file: Path, value: object, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, file, **options)


def _agrees_with_torch(file: Path, inside: str = "") -> dict[str, TensorRecord]:
    """Compare the records and the bytes that they point to with what torch loads, and return the records."""
    found = read_pickle_header(file).tensors
    loaded = torch.load(file, weights_only=True, map_location="cpu")
    loaded = loaded[inside] if inside else loaded
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        record = found[name]
        assert record.name == name
        assert record.file == file
        assert record.shape == tuple(value.shape)
        assert getattr(torch, DTYPES[record.dtype].torch_name) == value.dtype
        assert _read(record) == _bits(value)
    return found


def _refused(file: Path, content: bytes, expected: str) -> None:
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_pickle_header(file)
    assert caught.value.message.startswith(f"{file}: ")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1000


def _random(dtype: str, *shape: int) -> torch.Tensor:
    values = torch.randint(0, 2, (*shape, DTYPES[dtype].itemsize), dtype=torch.uint8)
    if dtype != "BOOL":
        values = torch.randint(0, 256, values.shape, dtype=torch.uint8)
    return values.view(getattr(torch, DTYPES[dtype].torch_name)).reshape(shape)


def test_all_dtypes(file: Path) -> None:
    _saved(file, {dtype: _random(dtype, 3, 5) for dtype in DTYPES})
    found = _agrees_with_torch(file)
    assert {name: record.dtype for name, record in found.items()} == {dtype: dtype for dtype in DTYPES}


def test_state_dict_of_a_module(file: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Embedding(5, 2)).bfloat16()
    _saved(file, module.state_dict())
    assert "1.num_batches_tracked" in _agrees_with_torch(file)


def test_parameters_views_ties_and_odd_shapes(file: Path) -> None:
    whole = torch.arange(24.0)
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.partition_dim = 1  # type: ignore[attr-defined]
    noted = torch.ones(3)
    noted.note = "x"  # type: ignore[attr-defined]
    tensors = {
        "whole": whole,
        "tied": whole,
        "rows": whole.view(4, 6)[1:3],
        "last": whole[23],
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "empty behind the end": whole.view(4, 6)[4:, 6:],
        "empty, strided": torch.empty(4, 0, 3).transpose(0, 2),
        "strides of ones": torch.as_strided(whole, (1, 4, 1), (7, 1, 99)),
        "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "attributed": attributed,
        "noted": noted,
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "count": 3,
        "nothing": None,
        "rate": 0.1,
        "name ü": "x",
        "size": torch.Size([2]),
        "dtype": torch.bfloat16,
        "large": 2**70,
        "tensor ü": torch.ones(1),
    }
    _saved(file, tensors)
    found = _agrees_with_torch(file)
    assert found["whole"].offset == found["tied"].offset == found["rows"].offset - 24


@pytest.mark.parametrize("name", ["state_dict", "model", "module"])
def test_state_dict_beside_other_things(file: Path, name: str) -> None:
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    _saved(file, {"epoch": 3, name: model.state_dict(), "optimizer": optimizer.state_dict(), "args": {"lr": 0.1}})
    assert list(_agrees_with_torch(file, inside=name)) == ["weight", "bias"]


@pytest.mark.parametrize("name", ["data.bin", "x.y.bin", "ü.bin", "-.bin"])
def test_prefix_is_any(tmp_path: Path, name: str) -> None:
    _saved(tmp_path / name, {"a": torch.ones(2)})
    _agrees_with_torch(tmp_path / name)


def test_file_saved_from_memory_and_unaligned(file: Path) -> None:
    memory = io.BytesIO()
    _saved(memory, {"a": torch.arange(5), "b": torch.ones(3)})  # type: ignore[arg-type]
    file.write_bytes(memory.getvalue())
    _agrees_with_torch(file)
    file.write_bytes(archive())
    assert _agrees_with_torch(file)["a"].offset % 4  # as written by other tools: not aligned


def test_file_without_byte_order(file: Path) -> None:
    """As torch wrote it before 2.1."""
    file.write_bytes(archive(byte_order=None))
    _agrees_with_torch(file)


def test_other_options_of_the_writer(file: Path) -> None:
    tensors = {"a": torch.arange(5), "b": torch.ones(3).half(), "c": torch.empty(0)}
    before = config.save.storage_alignment
    try:
        config.save.storage_alignment = 4096
        torch.serialization.set_crc32_options(False)
        _saved(file, tensors)
    finally:
        config.save.storage_alignment = before
        torch.serialization.set_crc32_options(True)
    assert all(record.offset % 4096 == 0 for record in _agrees_with_torch(file).values())


def test_archive_packed_again_without_compression(file: Path) -> None:
    """Tools add entries for folders and leave torch's flags and paddings out."""
    with zipfile.ZipFile(file, "w") as opened:
        for name, content in (("a/", b""), ("a/data.pkl", GOOD), ("a/data/", b""), ("a/data/0", FLOATS)):
            opened.writestr(name, content)
        opened.writestr("a/version", "3\n")
    assert list(_agrees_with_torch(file)) == ["a"]


def test_more_items_than_the_pickler_sets_at_a_time(file: Path) -> None:
    _saved(file, {f"layers.{number}.weight": torch.full((2,), number) for number in range(2500)})
    started = time.monotonic()
    assert len(_agrees_with_torch(file)) == 2500
    assert time.monotonic() - started < 20


def test_zip64_sizes_and_offsets(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20)
    content = archive(table_of_two := pickled(table(a=tensor(), b=tensor((2,), (1,), of=storage("1", 2)))), _TWO)
    assert b"PK\x06\x06" in content
    assert table_of_two in content
    file.write_bytes(content)
    found = read_pickle_header(file).tensors
    assert [_read(record) for record in found.values()] == [FLOATS, b"8 bytes."]


_TWO = {"0": FLOATS, "1": b"8 bytes."}


def test_sizes_behind_the_data(file: Path) -> None:
    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as opened:
        opened.writestr("a/data.pkl", GOOD)
        opened.writestr("a/data/0", FLOATS)
        opened.writestr("a/version", "3\n")
    file.write_bytes(stream.getvalue())
    _agrees_with_torch(file)


def test_digest_tells_layouts_apart_but_not_values(file: Path) -> None:
    digests = []
    for content in (
        archive(),
        archive(entries={"0": bytes(24)}),
        archive(pickled(table(b=tensor()))),
        archive(more=[("archive/x", b"")]),
    ):
        file.write_bytes(content)
        digests.append(read_pickle_header(file).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def _call(name: str, *arguments: bytes) -> bytes:
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def _payloads(folder: str) -> dict[str, bytes]:
    """Pickles that make a folder when they are run."""
    name = text(folder)
    short = b"S'" + folder.encode() + b"'\n"
    return {
        "global 'os.mkdir' is not allowed": named("os.mkdir") + name + b"\x85R",
        "global 'posix.mkdir' is not allowed": table(a=named("posix.mkdir") + name + b"\x85R"),
        "opcode STACK_GLOBAL is not allowed": text("os") + text("mkdir") + b"\x93" + name + b"\x85R",
        "opcode INST is not allowed": b"(" + name + b"ios\nmkdir\n",
        "opcode STRING is not allowed": b"(" + short + b"ios\nmkdir\n",
        "global 'builtins.getattr' is not allowed": _call("builtins.getattr", named("os.path"), text("os"))
        + named("os.mkdir")
        + name
        + b"\x85R\x86",
        "global 'builtins.exec' is not allowed": _call("builtins.exec", text(f"import os; os.mkdir({folder!r})")),
    }


_OPCODE_OBJ = b"(" + named("pathlib.Path") + text("x") + b"o"
_POTENT = list(_payloads("x"))


class _Watch:
    """Notes what the interpreter does while it is armed; such hooks cannot be taken away again."""

    def __init__(self) -> None:
        self.is_armed = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: object) -> None:
        if self.is_armed:
            self.seen.append(event)


@pytest.fixture(scope="module")
def watch() -> _Watch:
    return _Watch()


@pytest.mark.parametrize("expected", _POTENT)
def test_nothing_is_run(file: Path, tmp_path: Path, expected: str, watch: _Watch) -> None:
    marker = tmp_path / "marker"
    payload = pickled(_payloads(str(marker))[expected])
    file.write_bytes(archive(payload))
    watch.seen.clear()
    watch.is_armed = True
    try:
        with pytest.raises(CheckpointError) as caught:
            read_pickle_header(file)
    finally:
        watch.is_armed = False
    assert expected in caught.value.message
    assert set(watch.seen) == {"open"}
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()  # else the test would show nothing


def test_modules_import_no_unpickler_and_look_nothing_up() -> None:
    for module in MODULES:
        assert module.__file__ is not None
        tree = ast.parse(Path(module.__file__).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & {"torch", "pickle", "importlib"}
            if isinstance(node, ast.ImportFrom):
                assert node.module not in {"torch", "pickle", "importlib", "zipfile"}
            if isinstance(node, ast.Name):
                assert node.id not in {"getattr", "eval", "exec", "__import__", "globals", "compile", "setattr"}


_T = tensor()
_ORDERED = named("collections.OrderedDict") + b")R"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (_OPCODE_OBJ, "global 'pathlib.Path' is not allowed"),
        (b"(" + named("torch.Size") + b"o", "opcode OBJ is not allowed"),
        (named("torch.Size") + b")\x81", "opcode NEWOBJ is not allowed"),
        (named("torch.Size") + b")}\x92", "opcode NEWOBJ_EX is not allowed"),
        (b"\x82\x01", "opcode EXT1 is not allowed"),
        (b"\x83\x01\x00", "opcode EXT2 is not allowed"),
        (b"\x84\x01\x00\x00\x00", "opcode EXT4 is not allowed"),
        (b"Pabc\n", "opcode PERSID is not allowed"),
        (b"\x97", "opcode NEXT_BUFFER is not allowed"),
        (b"\xff", "opcode 0xff is not allowed"),
        (b"\x80\x04" + b"}", "byte 2: expected pickle protocol 2, torch.save's own, found 4"),
        (named("numpy.core.multiarray.scalar"), "global 'numpy.core.multiarray.scalar' is not allowed"),
        (named("torch._utils._rebuild_tensor_v4"), "global 'torch._utils._rebuild_tensor_v4' is not allowed"),
        (named("torch.load"), "global 'torch.load' is not allowed"),
        (named("torch.evil\x1b[31m"), "global 'torch.evil\\\\x1b"),
        (b"ctorch.serialization\nos.mkdir\n", "global 'torch.serialization.os.mkdir' is not allowed"),
        (b"c" + b"a" * 1000, "a global's name has no end within 256 bytes"),
        (b"c\xff\n\xff\n", "a text is not UTF-8"),
        (named("torch.FloatStorage") + b")R", "a torch.FloatStorage is called"),
        (named("torch.float8_e5m2") + b")R", "a torch.float8_e5m2 is called"),
        (text("os.system") + b")R", "a str is called"),
        (named("collections.OrderedDict") + b"]\x85R", "OrderedDict takes 0 to 0 arguments, the pickle gives it 1"),
        (named("collections.OrderedDict") + b"]R", "OrderedDict is called with a list"),
        (named("torch._utils._rebuild_tensor_v2") + b")R", "takes 6 to 7 arguments, the pickle gives it 0"),
        (_call("torch._utils._rebuild_parameter", b"K\x01", b"\x89", _ORDERED), "a parameter is made of a int"),
        (_call("torch._utils._rebuild_tensor", b"K\x01" * 4), "a tensor is made of a int"),
        (_T.replace(b"\x89c", b"Nc"), "requires_grad of a tensor must be a bool, found None"),
        (b"}}b", "opcode BUILD sets the state of a dict"),
        (_T + b"}b", "opcode BUILD sets the state of a tensor"),
        (_ORDERED + b"K\x01b", "opcode BUILD sets the state of a dict"),
        (named("torch.Size") + b"}b", "opcode BUILD sets the state of a torch.Size"),
        (b"K\x01K\x02a", "a int is appended to"),
        (b"](K\x01K\x02u", "items of a list are set"),
        (_T + b"(K\x01K\x02u", "items of a tensor are set"),
        (b"}(K\x01u", "a key has no value"),
        (b"}(" + (text("a") + _T) * 2 + b"u", "the name 'a' is there twice"),
        (b"K\x01Q", "expected the description of a storage, found a int"),
        (storage(kind="collections.OrderedDict"), "expected a type of storage, found collections.OrderedDict"),
        (storage(numel=-1), "a storage needs a key, a location and a number of values"),
        (storage(numel=2**200), "a storage needs a key, a location and a number of values"),
        (table(a=_T, b=tensor(of=storage(numel=7))), "storage '0' is described in two ways"),
        (table(a=_T, b=tensor(of=storage(kind="torch.IntStorage"))), "storage '0' is described in two ways"),
        (b"h\x00", "memo number 0 was never set"),
        (b"K\x01r\xff\xff\xff\xff", "memo number 4294967295 is over the limit"),
        (b"q\x00", "an opcode needs a value where none is"),
        (b"K\x01(q\x00", "an opcode needs a value where none is"),
        (b"K\x01(\x85", "an opcode needs a value where none is"),
        (b"t", "an opcode needs a mark where none is"),
        (b"", "an opcode needs a value where none is"),
        (b"K\x01K\x01", "values or bytes are left"),
        (b"K\x01(", "an opcode needs a value where none is"),
        (b"}.", "values or bytes are left"),
        (b"X\xff\xff\xff\x7fabc", "a text has 2147483647 bytes, the limit is 1048576"),
        (b"X\xff\x00\x00\x00abc", "the pickle ends within an opcode"),
        (b"X\x02\x00\x00\x00\xed\xa0", "a text is not UTF-8"),
        (b"(" * 20_000, "more than 10000 values are open at a time"),
        (b"N" * 20_000, "more than 10000 values are open at a time"),
    ],
)
def test_other_pickles_are_refused(file: Path, value: bytes, expected: str) -> None:
    _refused(file, archive(pickled(value)), expected)


@pytest.mark.parametrize("cut", range(len(GOOD)))
def test_cut_pickle_is_refused(file: Path, cut: int) -> None:
    _refused(file, archive(GOOD[:cut]), "data.pkl, byte")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (tensor((3, 2), (1, 3)), r"tensor 'a' does not lie in one piece \(shape \(3, 2\), strides \(1, 3\)"),
        (tensor((6,), (0,)), "does not lie in one piece"),
        (tensor((3,), (2,)), "does not lie in one piece"),
        (tensor((2, 2), (3, 1)), "does not lie in one piece"),
        (tensor((7,), (1,)), r"F32 \[7\] at byte 0 of its storage takes 28 bytes, the storage has 24"),
        (tensor((6,), (1,), 1), r"F32 \[6\] at byte 4 of its storage takes 24 bytes, the storage has 24"),
        (tensor((), (), 6), r"F32 \[\] at byte 24 of its storage takes 4 bytes, the storage has 24"),
        (tensor((-2, 3)), "expected shape of at most 64 numbers of at least 0"),
        (tensor((2, 3), (-3, 1)), "expected strides of at most 64 numbers of at least 0"),
        (tensor((2, 3), (3, 1), -1), "expected one stride a dimension and an offset of at least 0"),
        (tensor((2, 3), (1,)), "expected one stride a dimension"),
        (tensor((2**63,), (1,)), "expected shape of at most 64 numbers"),
        (tensor((2**2000,), (1,)), "expected shape of at most 64 numbers"),
        (tensor((2**40, 2**40), (2**40, 1)), "is too large"),
        (tensor((0, 2**40, 2**40), (2**40, 1, 1)), "is too large"),
        (tensor((1,) * 65, (1,) * 65), "expected shape of at most 64 numbers"),
        (tensor((2**40,), (1,)), "takes 4398046511104 bytes"),
        (tensor(of=storage("1")), "its storage '1' is not in the archive"),
        (tensor(of=storage("../data.pkl")), "its storage '../data.pkl' is not in the archive"),
        (tensor(of=storage(numel=7)), "its storage '0' must have 28 bytes, has 24"),
        (tensor(of=storage(numel=5)), "its storage '0' must have 20 bytes, has 24"),
        (tensor(of=storage(numel=2**62)), "its storage '0' must have 18446744073709551616 bytes"),
        (tensor(of=storage(kind="torch.ComplexFloatStorage")), "torch.ComplexFloatStorage is not supported"),
        (tensor(of=storage(kind="torch.storage.UntypedStorage")), "contradict each other"),
        (tensor(rest=named("torch.float8_e4m3fn")), "contradict each other"),
        (tensor(of=storage(location="meta")), "is a tensor on the meta device"),
        (tensor(rest=table(neg=b"\x88")), "is stored to be conjugated or negated"),
        (_call("torch._utils._rebuild_qtensor", b"K\x01"), "tensor 'a' is a quantised tensor"),
        (
            _call("torch._tensor._rebuild_from_type_v2", named("torch.Tensor"), named("torch.Size"), b")}"),
            "tensor 'a' is a tensor that torch rebuilds in several steps",
        ),
    ],
)
def test_tensors_that_do_not_lie_as_they_say(file: Path, value: bytes, expected: str) -> None:
    _refused(file, archive(pickled(table(a=value))), expected)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), "is a sparse tensor"),
        (lambda: torch.ones(2, device="meta"), "is a tensor on the meta device"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "is a quantised tensor"),
        (lambda: torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage is not supported"),
        (lambda: torch._neg_view(torch.ones(2)), "is stored to be conjugated or negated"),
        (lambda: torch.ones(2, 3).T, "does not lie in one piece"),
        (lambda: torch.ones(1).expand(4), "does not lie in one piece"),
        (lambda: torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last), "does not lie in one piece"),
        (lambda: torch.ones(2, 3).numpy(), "global 'numpy"),
        (lambda: torch.nn.Linear(2, 2), "global 'torch.nn.modules.linear.Linear' is not allowed"),
    ],
)
def test_other_tensors_of_torch_are_refused_by_name(file: Path, make: Callable[[], Any], expected: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _saved(file, {"good": torch.ones(1), "layer.weight": make()})
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_pickle_header(file)
    assert "layer.weight" in caught.value.message or "global" in caught.value.message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"]", "expected a dict of tensors, found list"),
        (_T, "expected a dict of tensors, found tensor"),
        (b"K\x01", "expected a dict of tensors, found int"),
        (b"}", "holds no tensor"),
        (table(a=b"K\x01"), "holds no tensor"),
        (b"}K\x01" + _T + b"s", "the dict of tensors has keys that are no names"),
        (b"}" + text("a") + _T + b"s" + b"K\x01Ns", "the dict of tensors has keys that are no names"),
        (b"}" + b"N" + _T + b"s", "the dict of tensors has keys that are no names"),
        (b"}" + _T + _T + b"s", "the dict of tensors has keys that are no names"),
        (b"}" + text("a\nb") + _T + b"s", r"tensor 'a\\nb': the name contains unprintable characters"),
        (b"}" + text("a\x1b[2J") + _T + b"s", "the name contains unprintable characters"),
        (b"}" + text("a" * 100_000 + "\n") + _T + b"s", "the name contains unprintable characters"),
        (table(a=b"]", b=_T), "'a' is a list, expected a tensor"),
        (table(a=b"}", b=_T), "'a' is a dict, expected a tensor"),
        (table(a=b")", b=_T), "'a' is a tuple, expected a tensor"),
        (table(ema=table(a=_T)), "found one under 'ema'"),
        (table(model=table(a=_T), ema=table(a=_T)), r"found more \('model', 'ema'\)"),
        (table(model=table(a=_T), b=_T), r"found more \('model' and the outer one\)"),
        (table(model=table(model=table(a=_T))), "'model' is a dict, expected a tensor"),
        (table(model=table(a=_T, b=table(a=_T))), "'b' is a dict, expected a tensor"),
    ],
)
def test_values_that_are_no_state_dict(file: Path, value: bytes, expected: str) -> None:
    _refused(file, archive(pickled(value)), expected)


def test_attributes_that_would_replace_the_values_are_refused(file: Path) -> None:
    for state in (table(data=_T), b"(}}t", b"N", table(**{f"a{count}": b"N" for count in range(65)})):
        call = _call("torch._utils._rebuild_parameter_with_state", _T, b"\x89", _ORDERED, state)
        _refused(file, archive(pickled(table(a=call))), "a tensor has attributes of which some are no plain values")


_LEGACY = io.BytesIO()
torch.save({"a": torch.ones(2)}, _LEGACY, _use_new_zipfile_serialization=False)
_GOOD = archive()
_DEFLATED = archive(method=zipfile.ZIP_DEFLATED)


def _changed(position: int, fields: bytes, content: bytes = _GOOD) -> bytes:
    return content[:position] + fields + content[position + len(fields) :]


def _central(name: str, content: bytes = _GOOD) -> int:
    """Where an entry's part of the directory begins."""
    return content.rindex(name.encode()) - 46


def _local(name: str, content: bytes = _GOOD) -> int:
    return content.index(name.encode()) - 30


_END = len(_GOOD) - 22
_DATA = "archive/data/0"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "file is empty"),
        (b"PK", "not a file of torch.save"),
        (b"PK\x03\x04", "file is truncated, or has bytes behind the zip archive"),
        (_LEGACY.getvalue(), "torch's old format"),
        (GOOD, "torch's old format"),
        (bytes(1) * 257 + b"ustar", "torch's old format"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x40\0\0\0\0\0\0\0{" + b" " * 63, "looks like a safetensors file"),
        (b"\x1f\x8b" + bytes(20), "expected a zip archive"),
        (b"junk" + _GOOD, "expected a zip archive"),
        (b"PK\x03\x04" + _GOOD, "bytes stand before the archive or are missing"),
        (_GOOD + b"junk", "file is truncated, or has bytes behind the zip archive"),
        (_GOOD[:-2] + b"\4\0junk", "file is truncated, or has bytes behind the zip archive"),
        (_GOOD[:100] + _GOOD[101:], "bytes stand before the archive or are missing"),
        (_GOOD[:-22], "file is truncated"),
        (_DEFLATED, r"is compressed \(method 8\)"),
        (_changed(_central(_DATA) + 10, b"\x08"), r"is compressed \(method 8\)"),
        (_changed(_central(_DATA) + 8, b"\x01"), "is encrypted"),
        (_changed(_central(_DATA) + 8, b"\x00\x20"), "is encrypted"),
        (_changed(_central(_DATA) + 8, b"\x02"), "has flags 0x0002"),
        (_changed(_central(_DATA) + 34, b"\x01"), "is in another file"),
        (_changed(_central(_DATA) + 38, b"\x10"), "is marked as a folder, but has 24 bytes"),
        (archive(more=[("archive/x/", b"1")]), "is marked as a folder, but has 1 bytes"),
        (_changed(_local(_DATA) + 8, b"\x08"), "its name or its flags differ"),
        (_changed(_local(_DATA) + 6, b"\x01"), "its name or its flags differ"),
        (_changed(_local(_DATA) + 6, b"\x08"), "its name or its flags differ"),
        (_changed(_local(_DATA) + 30, b"ARCHIVE"), "its name or its flags differ"),
        (_changed(_local(_DATA) + 18, b"\x17"), "size or checksum differs"),
        (_changed(_local(_DATA) + 22, b"\x17"), "size or checksum differs"),
        (_changed(_local(_DATA) + 14, b"\0\0\0\0"), "size or checksum differs"),
        (_changed(_local(_DATA) + 18, bytes(8)), "size or checksum differs"),
        (_changed(_local(_DATA) + 18, b"\xff" * 4), "its zip64 field lacks"),
        (_changed(_central(_DATA) + 20, b"\x17"), "expected one size, found 24 and 23"),
        (_changed(_central(_DATA) + 20, b"\xff" * 4), "its zip64 field lacks"),
        (_changed(_central(_DATA) + 20, b"\xf0\xf0\xf0\xf0" * 2), "size or checksum differs|expected to end before"),
        (_changed(_central(_DATA) + 42, b"\x01"), "expected its header at byte"),
        (_changed(_central(_DATA) + 42, b"\xf0" * 4), "expected its header at byte"),
        (_changed(_central(_DATA) + 42, _central(_DATA).to_bytes(4, "little")), "expected its header at byte"),
        (_changed(_local("archive/version") + 28, b"\xff\xff"), "expected to end before the directory"),
        (_changed(_central(_DATA), b"XX"), "zip directory is damaged at entry 2 of 4"),
        (_changed(_central(_DATA) + 32, b"\x01"), "zip directory is damaged at entry 3 of 4"),
        (_changed(_END + 8, b"\x02\0\x02\0"), "zip directory has [0-9]+ bytes, its entries"),
        (_changed(_END + 8, b"\x05\0\x05\0"), "zip directory is damaged at entry 5 of 5"),
        (_changed(_END + 8, b"\x02\0"), "split over several files"),
        (_changed(_END + 4, b"\x01"), "split over several files"),
        (_changed(_END + 16, b"\0"), "bytes stand before the archive or are missing"),
        (_changed(_END + 8, b"\xff" * 4), "has 65535 entries|zip directory is damaged"),
        (archive(more=[("archive/data.PKL", GOOD)]), "is there twice"),
        (archive(more=[("archive/x/data.pkl", GOOD)]), "expected one data.pkl in the zip archive, found"),
        (archive(more=[("other/data.pkl", GOOD)]), "expected one data.pkl in the zip archive, found"),
        (archive(more=[("other/x", GOOD)]), "is not in the folder 'archive'"),
        (archive(prefix=""), "expected data.pkl in a folder"),
        (archive(prefix="a/b/"), "expected data.pkl in a folder"),
        (archive(prefix="/"), "expected data.pkl in a folder"),
        (archive(more=[("archive/data/0", FLOATS)]), "is there twice"),
        (archive(more=[("archive/constants.pkl", b"")]), "is a TorchScript archive"),
        (archive(more=[("archive/code/x.py", b"")]), "is a TorchScript archive"),
        (archive(more=[("archive/" + "n" * 2000, b"")]), "the name has 2008 bytes"),
        (archive(byte_order=b"big"), "expected byte order 'little', found b'big'"),
        (archive(byte_order=b"little" + bytes(100)), "expected byte order 'little'"),
        (archive(byte_order=b""), "expected byte order 'little', found b''"),
    ],
)
def test_other_archives_are_refused(file: Path, content: bytes, expected: str) -> None:
    _refused(file, content, expected)


def test_entry_over_another_is_refused(file: Path) -> None:
    """Two entries that share bytes could be two things at once."""
    inner = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, len("archive/data/1"), 0)
    outer = inner + b"archive/data/1" + bytes(24)
    content = archive(entries={"0": outer, "1": b""})
    central = _central("archive/data/1", content)
    content = _changed(central + 42, (content.index(outer)).to_bytes(4, "little"), content)
    _refused(file, content, "zip entry 'archive/data/1' overlaps the previous one")


@pytest.mark.parametrize("size", [2**32, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("flags", [0, 8])
def test_absurd_zip64_sizes_and_offsets(file: Path, size: int, flags: int) -> None:
    extra = struct.pack("<2H3Q", 1, 24, size, size, 0)
    central = _central("archive/version")
    whole = bytearray(_GOOD)
    whole[_local("archive/version") + 6] = whole[central + 8] = flags
    whole[central + 20 : central + 28] = b"\xff" * 8
    whole[central + 30 : central + 32] = len(extra).to_bytes(2, "little")
    end = whole[_END:]
    end[12:16] = (int.from_bytes(end[12:16], "little") + len(extra)).to_bytes(4, "little")
    _refused(file, bytes(whole[:_END]) + extra + bytes(end), "expected to end before the directory at byte")
    whole[central + 42 : central + 46] = b"\xff" * 4
    extra = struct.pack("<2H3Q", 1, 24, 2, 2, size)
    _refused(file, bytes(whole[:_END]) + extra + bytes(end), "expected its header at byte")


def test_torchscript_is_refused(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), str(file))  # type: ignore[no-untyped-call]
    with pytest.raises(CheckpointError, match=r"TorchScript|is compressed"):
        read_pickle_header(file)


def _laughs(levels: int) -> bytes:
    """A tuple that would have 10 to the power of ``levels`` elements written out."""
    value = b"(" + text("ha") * 10 + b"tq\x00"
    for level in range(1, levels):
        value += b"(" + b"h" + bytes([level - 1])
        value += (b"h" + bytes([level - 1])) * 9 + b"tq" + bytes([level])
    return value


def _in_tuple(value: bytes) -> bytes:
    return b"(" + value + b"t"


_COLLIDING = b"".join(number((2**61 - 1) * count) + b"N" for count in range(1, 4000))


@pytest.mark.parametrize(
    "value",
    [
        _in_tuple(_laughs(100)),
        table(a=_in_tuple(_laughs(100))),
        table(a=tensor(rest=_in_tuple(_laughs(100)))),
        b"}" + _in_tuple(_laughs(100)) + b"Ns",
        b"}" + text("a") + _T + b"s" + _in_tuple(_laughs(100)) + b"Ns",
        _in_tuple(_laughs(100)) + b"Q",
        _in_tuple(_laughs(100)) + b")R",
        named("torch.Size") + _in_tuple(_laughs(100)) + b"R",
        b"}" + b"\x85" * 300_000,
        b"]q\x00" + b"h\x00a" * 300_000,
        b"}q\x00" + text("a") + b"h\x00s",
        b"N" + b"r\x00\x00\x00\x00" * 300_000,
        b"]" + b"}a" * 300_000,
        b"](" + (b"N" * 5000 + b"e(") * 200 + b"e",
        b"}" + (b"(" + _COLLIDING + b"u") * 40,
        b"]" + (text("x" * 2**20) + b"a") * 60,
    ],
)
def test_bombs_cost_little(file: Path, value: bytes) -> None:
    file.write_bytes(archive(pickled(value)))
    tracemalloc.start()
    started = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        read_pickle_header(file)
    seconds, peak = time.thread_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(caught.value.message) < 1000
    assert seconds < 10
    assert peak < 300 * 2**20


@pytest.mark.parametrize(
    ("module", "limit", "value", "expected"),
    [
        (pickle_walk, "MAX_OPCODES", 10, "more than 10 opcodes"),
        (pickle_walk, "MAX_STACK", 5, "more than 5 values"),
        (pickle_walk, "MAX_STRING_BYTES", 3, "the limit is 3"),
        (pickle_index, "MAX_PICKLE_BYTES", 100, "data.pkl has [0-9]+ bytes, the limit is 100"),
        (pickle_index, "MAX_TENSORS", 0, "expected at most 0 tensors"),
        (zip_index, "MAX_ENTRIES", 2, "has 4 entries in"),
        (zip_index, "MAX_DIRECTORY_BYTES", 100, "the limits are 200000 and 100"),
    ],
)
def test_limits(
    file: Path, monkeypatch: pytest.MonkeyPatch, module: Any, limit: str, value: int, expected: str
) -> None:
    monkeypatch.setattr(module, limit, value)
    _refused(file, archive(), expected)


def test_file_that_is_gone_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_pickle_header(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="regular file"):
        read_pickle_header(tmp_path / "pipe")


def test_safetensors_reader_still_refuses_these(file: Path) -> None:
    file.write_bytes(archive())
    with pytest.raises(CheckpointError, match="PyTorch pickle"):
        read_header(file)


def _real() -> bytes:
    memory = io.BytesIO()
    module = torch.nn.Linear(3, 2).bfloat16()
    torch.save(OrderedDict(module.state_dict(), scale=torch.tensor(2.0), fp8=_random("F8_E4M3", 4)), memory)
    return memory.getvalue()


_REAL = _real()


def _is_sound(file: Path, content: bytes) -> None:
    """The answer is one line, or a header of records in the file; where torch loads it too, with the same bits."""
    file.write_bytes(content)
    found: dict[str, TensorRecord] = {}
    refusal = ""
    try:
        found = read_pickle_header(file).tensors
    except CheckpointError as error:
        refusal = error.message
    if refusal:
        assert refusal.startswith(f"{file}: ")
        assert "\n" not in refusal
        return
    assert all(0 <= record.offset <= record.offset + record.nbytes <= len(content) for record in found.values())
    try:
        loaded = torch.load(file, weights_only=True)
    except Exception:  # noqa: BLE001 - of whatever kind
        return
    for name, value in loaded.items():
        if isinstance(value, torch.Tensor):
            assert (found[name].shape, _read(found[name])) == (tuple(value.shape), _bits(value))


@settings(deadline=None, max_examples=300)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(_REAL) - 1), st.integers(0, 255)), max_size=3),
    cut=st.one_of(st.none(), st.integers(0, len(_REAL))),
    tail=st.binary(max_size=3),
)
@example(flips=[], cut=None, tail=b"")
def test_flipped_and_cut_bytes(file: Path, flips: list[tuple[int, int]], cut: int | None, tail: bytes) -> None:
    content = bytearray(_REAL)
    for position, value in flips:
        content[position] = value
    _is_sound(file, bytes(content[:cut]) + tail)


_SINGLE = [b"(", b"N", b"\x88", b")", b"\x85", b"\x86", b"t", b"]", b"a", b"e", b"}", b"s", b"u", b"R", b"b", b"Q"]
_LONGER = [b"K\x01", b"K\x06", b"q\x00", b"h\x00", b"q\x01", b"h\x01", text("a"), text("storage"), numbers((2, 3))]
_NAMED = [named(f"torch.{name}") for name in ("Size", "FloatStorage", "_utils._rebuild_tensor_v2")]
_OPCODE = st.sampled_from([*_SINGLE, *_LONGER, *_NAMED, storage(), _T, _ORDERED])


@settings(deadline=None, max_examples=500)
@given(opcodes=st.lists(_OPCODE, max_size=25))
@example(opcodes=[b"}", text("a"), _T, b"s"])
def test_pickles_of_any_opcodes(file: Path, opcodes: list[bytes]) -> None:
    _is_sound(file, archive(PICKLE_START + b"".join(opcodes) + PICKLE_END))
