"""Packed deltas whose checksums are right and whose words are not: whoever makes such a file can sign it, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expo_serve.config import Source
from expo_serve.errors import CheckpointError, ExpoError
from expo_serve.load.blocks import TABLE
from expo_serve.plan.delta import open_delta
from expo_serve.plan.packed_format import checksum
from tests.models.packs import (
    ALPHA,
    EMBED,
    IDS,
    NEW,
    SAME,
    SMALL_BLOCK,
    UP,
    Pack,
    assert_same_outcomes,
    outcomes,
)

KEYS = ("expo_delta", "files", "block", "base", "tensors")
METADATA = "__metadata__"
Change = Callable[[dict[str, Any]], None]


def signed_anew(file: Path, change: Change) -> None:
    """Change what the header says, with checksums that are right."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    metadata = header[METADATA]
    texts = b"".join(metadata[key].encode(errors="surrogatepass") + b"\0" for key in KEYS)
    metadata["checksum"] = f"{checksum(texts):016x}"
    content = json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content + raw[end:])


def _metadata(key: str, text: str) -> Change:
    return lambda header: header[METADATA].update({key: text})


def _tensor(name: str, **values: Any) -> Change:
    def change(header: dict[str, Any]) -> None:
        described = json.loads(header[METADATA]["tensors"])
        described[name].update(values)
        header[METADATA]["tensors"] = json.dumps(described)

    return change


def test_signing_anew_alone_changes_nothing(damaged: Pack) -> None:
    """Else all of the refusals below might be for that."""
    signed_anew(damaged.file, lambda header: None)
    assert_same_outcomes(outcomes(damaged.by_delta(ALPHA)), outcomes(damaged.by_pair(ALPHA)))


@pytest.mark.parametrize("version", ["2", "0", "", "1.0", "9" * 1000])
def test_other_version_is_named(damaged: Pack, version: str) -> None:
    signed_anew(damaged.file, _metadata("expo_delta", version))
    with pytest.raises(
        CheckpointError, match=rf"{damaged.file}: packed delta of format version '{version[:30]}"
    ) as caught:
        damaged.by_delta(ALPHA)
    assert "this expo-serve reads version 1" in caught.value.message
    assert len(caught.value.message) < 500


FOREIGN: dict[str, Change] = {
    "no tensors": _metadata("tensors", "{}"),
    "tensors a list": _metadata("tensors", "[]"),
    "tensors a number": _metadata("tensors", "1"),
    "tensors not JSON": _metadata("tensors", "{"),
    "tensors nested": _metadata("tensors", "[" * 100_000),
    "half a character": _metadata("base", json.dumps({"name": "x", "revision": None}) + "\ud800"),
    "no name of base": _metadata("base", "{}"),
    "base a number": _metadata("base", "3"),
    "no block": _metadata("block", "0"),
    "negative block": _metadata("block", "-64"),
    "odd block": _metadata("block", "63"),
    "huge block": _metadata("block", str(1 << 40)),
    "block in words": _metadata("block", "many"),
    "endless block": _metadata("block", "1" * 5000),
    "no files": _metadata("files", "0"),
    "files in words": _metadata("files", "one"),
    "dtype unknown": _tensor(UP, dtype="F12"),
    "dtype a list": _tensor(UP, dtype=["BF16"]),
    "dtype of eight bits": _tensor(UP, dtype="F8_E4M3"),
    "shape a text": _tensor(UP, shape="20"),
    "shape a number": _tensor(UP, shape=140),
    "negative shape": _tensor(UP, shape=[-20, -7]),
    "shape of texts": _tensor(UP, shape=["20", "7"]),
    "shape of truths": _tensor(UP, shape=[True, 140]),
    "huge shape": _tensor(UP, shape=[1 << 61, 1 << 61]),
    "many dimensions": _tensor(UP, shape=[1] * 100),
    "more rows than bytes": _tensor(UP, shape=[20_000, 7]),
    "base a text": _tensor(UP, base="x"),
    "base too short": _tensor(UP, base=[UP]),
    "name of base a list": _tensor(UP, base=[[UP], "BF16", [20, 7]]),
    "dtype of base unknown": _tensor(UP, base=[UP, "F12", [20, 7]]),
    "base larger": _tensor(UP, base=[UP, "BF16", [21, 7]]),
    "base of other rows": _tensor(UP, shape=[7, 20]),
    "base of other dimensions": _tensor(UP, shape=[140]),
    "integers that are extrapolated": _tensor(IDS, extrapolated=True),
    "table a number": _tensor(UP, table=1),
    "no table": _tensor(UP, table=None),
    "a tensor under another name": lambda header: header[METADATA].update(tensors=_renamed(header, UP, "x")),
}


def _renamed(header: dict[str, Any], name: str, other: str) -> str:
    return str(header[METADATA]["tensors"]).replace(json.dumps(name), json.dumps(other), 1)


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_header_that_says_nonsense_is_refused(damaged: Pack, change: Change) -> None:
    signed_anew(damaged.file, change)
    with pytest.raises(ExpoError) as caught:
        outcomes(damaged.by_delta(ALPHA))
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


TABLES: dict[str, Callable[[Any], None]] = {
    "unknown coding": lambda table: table["coding"].fill(4),
    "huge coding": lambda table: table["coding"].fill(2**32 - 1),
    "all the same": lambda table: table["coding"].fill(0),
    "all changes": lambda table: table["coding"].fill(1),
    "all shuffled": lambda table: table["coding"].fill(2),
    "all raw": lambda table: table["coding"].fill(3),
    "huge parts": lambda table: table["parts"].fill(2**32 - 1),
    "no parts": lambda table: table["parts"].fill(0),
    "parts changed round": lambda table: table["parts"].__setitem__(slice(None), table["parts"][:, ::-1].copy()),
    "one part": lambda table: table["parts"].__setitem__(
        slice(None), np.stack([table["parts"].sum(axis=1), 0 * table["coding"], 0 * table["coding"]], axis=1)
    ),
    "blocks changed round": lambda table: table.__setitem__(slice(None), table[::-1].copy()),
    "other checksums": lambda table: table["bytes"].__iadd__(1),
}


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES)
def test_table_that_says_nonsense_is_never_a_crash(damaged: Pack, change: Callable[[Any], None]) -> None:
    content = damaged.file.read_bytes()
    messages: list[tuple[str, str]] = []
    for name in (UP, EMBED, NEW, IDS, SAME):
        damaged.file.write_bytes(content)
        _change_table(damaged, name, change)
        try:
            damaged.lazy(name).materialize()
        except ExpoError as error:
            messages.append((name, error.message))
    assert messages
    assert [message for name, message in messages if f"tensor '{name}'" not in message] == []


def _change_table(damaged: Pack, name: str, change: Callable[[Any], None]) -> None:
    planned = damaged.by_delta(ALPHA).tensors[name]
    record, count = planned.records[-1], planned.delta.tensor.count(SMALL_BLOCK)  # type: ignore[union-attr]
    content = bytearray(damaged.file.read_bytes())
    table = np.frombuffer(content, TABLE, count, record.offset)
    change(table)
    damaged.file.write_bytes(content)
    signed_anew(damaged.file, _tensor(name, table=f"{checksum(table.tobytes()):016x}"))


def test_delta_that_changed_since_it_was_checked_is_refused(damaged: Pack) -> None:
    source = open_delta(Source(name="delta", path=str(damaged.delta))).source
    signed_anew(damaged.file, _metadata("base", json.dumps({"name": "other", "revision": None})))
    with pytest.raises(CheckpointError, match="has changed since the server was started"):
        open_delta(source)
