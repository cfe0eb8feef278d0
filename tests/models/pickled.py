"""PyTorch ``.bin`` files written by hand, down to the opcodes of their pickle and the fields of their zip archive."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Mapping, Sequence

PICKLE_START, PICKLE_END = b"\x80\x02", b"."


def text(value: str | bytes) -> bytes:
    """The opcode of a text."""
    raw = value if isinstance(value, bytes) else value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    """The opcode of an integer of any size."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: Sequence[int]) -> bytes:
    """The opcodes of a tuple of integers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def named(name: str) -> bytes:
    """The opcode that imports a name: ``os.system``."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(key: str = "0", numel: int = 6, kind: str = "torch.FloatStorage", location: str = "cpu") -> bytes:
    """The opcodes of a storage."""
    return b"(" + text("storage") + named(kind) + text(key) + text(location) + number(numel) + b"tQ"


def tensor(
    shape: Sequence[int] = (2, 3),
    stride: Sequence[int] = (3, 1),
    offset: int = 0,
    of: bytes | None = None,
    rest: bytes = b"",
) -> bytes:
    """The opcodes of a tensor: a view of a storage; ``rest`` are the arguments after the hooks."""
    view = (storage() if of is None else of) + number(offset) + numbers(shape) + numbers(stride)
    hooks = named("collections.OrderedDict") + b")R"
    version = "3" if b"torch\nfloat8" in rest else "2"
    return named(f"torch._utils._rebuild_tensor_v{version}") + b"(" + view + b"\x89" + hooks + rest + b"tR"


def table(**items: bytes) -> bytes:
    """The opcodes of a dict."""
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def pickled(value: bytes) -> bytes:
    """A pickle of one value."""
    return PICKLE_START + value + PICKLE_END


FLOATS = bytes(range(24))
"""The content of the storage that ``tensor`` takes by default."""
GOOD = pickled(table(a=tensor()))


def archive(
    pickle: bytes = GOOD,
    entries: Mapping[str, bytes] | None = None,
    *,
    prefix: str = "archive/",
    more: Sequence[tuple[str, bytes]] = (),
    method: int = zipfile.ZIP_STORED,
    byte_order: bytes | None = b"little",
) -> bytes:
    """The bytes of a file: ``entries`` are the storages by their keys, ``more`` are other entries by their names."""
    contents = [("data.pkl", pickle)]
    contents += [(f"data/{key}", content) for key, content in ({"0": FLOATS} if entries is None else entries).items()]
    contents += [("byteorder", byte_order)] if byte_order is not None else []
    contents += [("version", b"3\n")]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in [(prefix + name, content) for name, content in contents] + list(more):
            opened.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()
