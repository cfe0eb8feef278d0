"""Changes files of torch.save at random and compares what the pickle index and torch make of them.

python -m loadtests.fuzz_pickle --minutes 60 --seed 1

Each round takes a real file and changes it at one of three levels: bytes anywhere, opcodes and values of the pickle in
an archive that stays whole, or fields of the zip archive's headers. The index must answer in less than a second, with
a CheckpointError of one line or with records that lie in the file; where torch.load(weights_only=True) loads the file
too, its tensors must have the same names, dtypes, shapes and bits. A file that breaks this is kept and ends the run
with exit code 1. torch is only asked about files that the index accepts, which by then are harmless.
"""

from __future__ import annotations

import argparse
import io
import os
import pickletools
import random
import sys
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from expo_serve.checkpoint.header import Header
from expo_serve.checkpoint.pickle_index import WRAPPERS, read_pickle_header
from expo_serve.checkpoint.records import DTYPES, TensorRecord
from expo_serve.errors import CheckpointError
from loadtests.results import RESULTS, WORK, save

MAX_SECONDS = 1.0
_KEPT = 20
_SAVE_EVERY_SECONDS = 300.0
_OTHER_NAMES = (
    "os\nsystem",
    "builtins\neval",
    "collections\nOrderedDict",
    "torch._utils\n_rebuild_tensor",
    "torch._utils\n_rebuild_tensor_v2",
    "torch._utils\n_rebuild_tensor_v3",
    "torch._utils\n_rebuild_parameter",
    "torch._utils\n_rebuild_qtensor",
    "torch\nFloatStorage",
    "torch\nHalfStorage",
    "torch\nByteStorage",
    "torch.storage\nUntypedStorage",
    "torch\nfloat8_e4m3fn",
    "torch\nuint16",
    "torch\nSize",
)
_NUMBERS = (-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 63, 64, 255, 256, 2**31 - 1, 2**31, 2**62, 2**63, 2**64)
_OPCODES = b"().0NKJMGXRQabcehijloqrstu]}\x80\x81\x85\x86\x87\x88\x89\x8a\x93\x94"
_ZIP_SIGNATURES = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08")


def real_files() -> list[bytes]:
    """Files of torch.save: dtypes, parameters, ties, views, empty tensors, wrapped state dicts, another zip writer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).bfloat16()
    whole = torch.randn(24)
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.partition_dim = 0  # type: ignore[attr-defined]
    values: list[object] = [
        model.state_dict(),
        {dtype: torch.ones(2, 3, dtype=torch.uint8).to(getattr(torch, DTYPES[dtype].torch_name)) for dtype in _PLAIN},
        OrderedDict(whole=whole, tied=whole, rows=whole.view(4, 6)[1:3], empty=torch.empty(0, 3), one=torch.tensor(2)),
        {"parameter": attributed, "buffer": torch.nn.Buffer(torch.ones(3)), "count": 3, "size": torch.Size([1])},
        {"state_dict": model.state_dict(), "epoch": 1, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
    ]
    files = []
    for value in values:
        memory = io.BytesIO()
        torch.save(value, memory)
        files.append(memory.getvalue())
    again = _rewritten(files[0], _pickle_of(files[0]))
    with mock.patch.object(zipfile, "ZIP64_LIMIT", 20):  # sizes and offsets in zip64 fields, as of a large file
        return [*files, again, _rewritten(files[0], _pickle_of(files[0]))]


_PLAIN = [name for name, dtype in DTYPES.items() if dtype.kind != "quantised"] + ["F8_E4M3", "F8_E5M2"]


def _pickle_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        return opened.read("archive/data.pkl")


def _rewritten(content: bytes, pickle: bytes) -> bytes:
    """The same archive with another pickle."""
    memory = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as opened, zipfile.ZipFile(memory, "w") as made:
        for entry in opened.infolist():
            is_pickle = entry.filename == "archive/data.pkl"
            made.writestr(zipfile.ZipInfo(entry.filename), pickle if is_pickle else opened.read(entry))
    return memory.getvalue()


def change_bytes(content: bytes, chance: random.Random) -> bytes:
    """Set, cut, insert, repeat or remove a few bytes."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        length = chance.choice((1, 1, 2, 4, 8, 64))
        kind = chance.randrange(10)
        if kind < 6:
            changed[at : at + length] = chance.randbytes(len(changed[at : at + length]))
        elif kind == 6:
            del changed[at : at + length]
        elif kind == 7:
            changed[at:at] = changed[at : at + length]
        elif kind == 8:
            changed[at:at] = chance.randbytes(length)
        else:
            del changed[at:]
    return bytes(changed)


def change_opcodes(content: bytes, chance: random.Random) -> bytes:
    """Change, remove, repeat, swap or insert opcodes of the pickle."""
    pickle = _pickle_of(content)
    starts = [position for _, _, position in pickletools.genops(pickle) if position is not None]
    parts = [pickle[begin:end] for begin, end in zip(starts, [*starts[1:], len(pickle)], strict=True)]
    for _ in range(chance.randint(1, 3)):
        at, other = chance.randrange(len(parts)), chance.randrange(len(parts))
        kind = chance.randrange(8)
        if kind < 3:
            parts[at] = _other_value(parts[at], chance)
        elif kind == 3:
            parts[at] = b""
        elif kind == 4:
            parts[at] = parts[at] * 2
        elif kind == 5:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 6:
            parts[at] = parts[other] + parts[at]
        else:
            parts[at] += bytes([chance.choice(_OPCODES)]) + chance.randbytes(chance.choice((0, 0, 1, 2, 4)))
    return _rewritten(content, b"".join(parts))


def _other_value(part: bytes, chance: random.Random) -> bytes:
    """The opcode with another value: a number, a name, a text, a place in the memo."""
    if part[:1] in (b"K", b"M", b"J", b"\x8a"):
        value = chance.choice(_NUMBERS)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if part[:1] == b"c":
        return b"c" + chance.choice(_OTHER_NAMES).encode() + b"\n"
    if part[:1] == b"X":
        raw = chance.choice((b"0", b"1", b"2", b"storage", b"cpu", b"meta", b"state_dict", b"a\nb", b"\xff", b""))
        return b"X" + len(raw).to_bytes(4, "little") + raw
    if part[:1] in (b"h", b"q"):
        return part[:1] + bytes([chance.randrange(64)])
    return part


def change_zip(content: bytes, chance: random.Random) -> bytes:
    """Set fields behind the signatures of the zip archive's records."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        signature = chance.choice(_ZIP_SIGNATURES)
        places = [at for at in range(len(content)) if content.startswith(signature, at)]
        if not places:
            continue
        width = chance.choice((1, 2, 4, 8))
        at = chance.choice(places) + chance.randrange(0, 56)
        before = int.from_bytes(content[at : at + width], "little")
        value = chance.choice(
            (0, 1, 8, before + 1, before - 1, before * 2, 2 ** (8 * width) - 1, chance.getrandbits(64))
        )
        changed[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")[: max(len(changed) - at, 0)]
    return bytes(changed)


LEVELS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": change_bytes,
    "opcodes": change_opcodes,
    "zip": change_zip,
}


def judge(file: Path) -> tuple[str, str]:
    """Read one file with the index, and with torch if it is accepted.

    Returns:
        The outcome, ``wrong`` if it breaks a promise, and what happened.
    """
    started = time.process_time()
    header: Header | None = None
    try:
        header = read_pickle_header(file)
        outcome = ("accepted", "")
    except CheckpointError as error:
        is_line = error.message.startswith(f"{file}: ") and "\n" not in error.message
        outcome = ("refused", "") if is_line else ("wrong", f"not one line: {error.message!r:.300}")
    except Exception as error:  # noqa: BLE001 - of whatever kind: it is the finding
        outcome = ("wrong", f"raised {type(error).__name__}: {error!s:.300}")
    if (seconds := time.process_time() - started) > MAX_SECONDS:
        return "wrong", f"took {seconds:.1f} s"
    return _compare(file, header) if header else outcome


def _compare(file: Path, header: Header) -> tuple[str, str]:
    size = file.stat().st_size
    for record in header.tensors.values():
        if not 0 <= record.offset <= record.offset + record.nbytes <= size:
            return "wrong", f"{record.name!r:.100} lies outside of the file"
    try:
        loaded = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001 - of whatever kind: torch refuses it
        return "accepted, torch refuses", type(error).__name__
    expected = _tensors(loaded)
    if list(expected) != list(header.tensors):
        return "wrong", f"torch has other names: {list(expected)!r:.200}, the index {list(header.tensors)!r:.200}"
    different = [name for name, record in header.tensors.items() if not _is_same(record, expected[name])]
    return ("wrong", f"torch has other values of {different!r:.200}") if different else ("same as torch", "")


def _tensors(loaded: Any) -> dict[str, torch.Tensor]:
    """The tensors of what torch loaded, of the wrapped dict if there is one."""
    found = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if found:
        return found
    inside = [loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)]
    return next((tensors for one in inside if (tensors := _tensors(one))), {})


def _is_same(record: TensorRecord, tensor: torch.Tensor) -> bool:
    if getattr(torch, DTYPES[record.dtype].torch_name) != tensor.dtype or record.shape != tuple(tensor.shape):
        return False
    with record.file.open("rb") as opened:
        raw = os.pread(opened.fileno(), record.nbytes, record.offset)
    if not record.nbytes:
        return True
    # The bytes as they are: sizes of 1 may have any stride, and a copy makes other bytes of a bool's.
    start = tensor.storage_offset() * tensor.element_size()
    stored = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), start, (record.nbytes,), (1,))
    return tensor.is_contiguous() and raw == stored.numpy().tobytes()


def fuzz(minutes: float, seed: int, folder: Path, note: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Change and judge files until the time is over.

    Args:
        minutes: how long.
        seed: of the changes; the same seed gives the same files in the same order.
        folder: where the changed file lies, and where files that break a promise stay.
        note: is given the figures every few minutes and in the end.
    """
    chance = random.Random(seed)
    files = real_files()
    counts = {level: Counter[str]() for level in LEVELS}
    wrong: list[str] = []
    started = noted = time.monotonic()
    slowest = 0.0
    while (now := time.monotonic()) - started < minutes * 60 and len(wrong) < _KEPT:
        level = chance.choice(list(LEVELS))
        content = LEVELS[level](chance.choice(files), chance)
        file = folder / "changed.bin"
        file.write_bytes(content)
        before = time.process_time()
        outcome, why = judge(file)
        slowest = max(slowest, time.process_time() - before)
        counts[level][outcome] += 1
        if outcome == "wrong":
            wrong.append(f"{level}: {why}")
            (folder / f"wrong-{len(wrong)}.bin").write_bytes(content)
        if now - noted > _SAVE_EVERY_SECONDS:
            noted = now
            note(_figures(counts, wrong, slowest, now - started, seed))
    figures = _figures(counts, wrong, slowest, time.monotonic() - started, seed)
    note(figures)
    return figures


def _figures(
    counts: dict[str, Counter[str]], wrong: list[str], slowest: float, seconds: float, seed: int
) -> dict[str, Any]:
    return {
        "seed": seed,
        "minutes": round(seconds / 60, 2),
        "files": sum(sum(one.values()) for one in counts.values()),
        "outcomes": {level: dict(sorted(one.items())) for level, one in counts.items()},
        "slowest_seconds_with_torch": round(slowest, 3),
        "wrong": wrong,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="default 60")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the changed files; wrong ones stay in it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = options.work / "fuzz_pickle"
    folder.mkdir(parents=True, exist_ok=True)

    def note(figures: dict[str, Any]) -> None:
        save("fuzz_pickle", f"seed {options.seed}", figures, options.results)
        print(figures, flush=True)

    figures = fuzz(options.minutes, options.seed, folder, note)
    sys.exit(1 if figures["wrong"] else 0)


if __name__ == "__main__":
    main()
