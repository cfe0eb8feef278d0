"""Damaged packed deltas and other bases: an error of ours, or exactly the right bits; nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from expo_serve.errors import CheckpointError, ExpoError, PairError
from expo_serve.load.blocks import TABLE
from expo_serve.load.counts import Counts
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.write import packed as packing
from tests.load.lazies import numbers
from tests.models.packs import (
    ALPHA,
    EMBED,
    SMALL_BLOCK,
    Pack,
    Packs,
    assert_same_outcomes,
    outcomes,
    tensors_of_each_coding,
)
from tests.models.raw import tiny_tensors, write_raw


def test_all_codings_are_there(every_coding: Pack) -> None:
    """Else the tests below would see less than they say."""
    codings = set()
    for planned in every_coding.by_delta(ALPHA).tensors.values():
        record = planned.records[-1]
        count = planned.delta.tensor.count(SMALL_BLOCK)  # type: ignore[union-attr]
        raw = record.file.read_bytes()[record.offset :][: count * TABLE.itemsize]
        codings |= set(np.frombuffer(raw, TABLE)["coding"].tolist())
    assert codings == {0, 1, 2, 3}


def damage(damaged: Pack, contents: Iterator[tuple[object, bytes]]) -> tuple[list[tuple[object, str]], int]:
    """Which contents load wrong, and how many load right."""
    expected = outcomes(damaged.by_pair(ALPHA))
    wrong: list[tuple[object, str]] = []
    right = 0
    assert_same_outcomes(outcomes(damaged.by_delta(ALPHA)), expected)
    for what, content in contents:
        damaged.file.write_bytes(content)
        try:
            found = outcomes(damaged.by_delta(ALPHA))
            assert_same_outcomes(found, expected)
            right += 1
        except ExpoError as error:
            if "\n" in error.message:
                wrong.append((what, error.message))
        except Exception as error:  # noqa: BLE001 - whatever else it is, it is wrong
            wrong.append((what, repr(error)[:300]))
    return wrong, right


def _flipped(content: bytes) -> Iterator[tuple[object, bytes]]:
    """Each byte changed in one way or another, and each bit of some."""
    for place, byte in enumerate(content):
        for mask in (1 + 37 * place % 255, *((1 << bit for bit in range(8)) if place % 61 == 0 else ())):
            yield (place, mask), content[:place] + bytes([byte ^ mask]) + content[place + 1 :]


def test_no_flipped_byte_gives_wrong_bits(damaged: Pack) -> None:
    wrong, right = damage(damaged, _flipped(damaged.file.read_bytes()))
    assert wrong == []
    assert right < 20, "a space of the header may become a tab, nothing else"


def _cut(content: bytes) -> Iterator[tuple[object, bytes]]:
    for end in {*range(0, len(content), 13), *range(len(content) - 40, len(content))}:
        yield end, content[:end]
    for tail in (b"\0", b"\0" * 8, content):
        yield "longer", content + tail


def test_no_cut_file_loads(damaged: Pack) -> None:
    assert damage(damaged, _cut(damaged.file.read_bytes())) == ([], 0)


def test_file_that_shrinks_after_planning_is_an_error(damaged: Pack) -> None:
    plan, reader = damaged.by_delta(ALPHA), Reader()
    lazies = [lazy_tensor(planned, LoadSession(reader, Counts())) for planned in plan.tensors.values()]
    with damaged.file.open("r+b") as file:
        file.truncate(damaged.file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="has become shorter"):
        [lazy.materialize() for lazy in lazies]


def _without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _twice(folder: Path, name: str) -> None:
    shutil.copy(folder / name, folder / f"delta-{name}")


@pytest.mark.parametrize("change", [_without, _twice])
def test_missing_or_doubled_file_of_several_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, str], None]
) -> None:
    monkeypatch.setattr(packing, "MAX_FILE_BYTES", 400)
    pack = Packs(tmp_path).make(tiny_tensors(1), tiny_tensors(2))
    names = sorted(file.name for file in pack.delta.glob("*.safetensors"))
    assert len(names) > 2
    for name in names:
        other = Pack(pack.base, pack.aligned, shutil.copytree(pack.delta, tmp_path / f"without-{name}"), "refuse")
        change(other.delta, name)
        with pytest.raises(CheckpointError, match=r"shards are missing|is stored in two files"):
            other.by_delta(ALPHA)


def test_files_of_two_deltas_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lies in the folder from an earlier time."""
    packs = Packs(tmp_path)
    one = packs.make(tiny_tensors(1), tiny_tensors(2))
    monkeypatch.setattr(packing, "MAX_FILE_BYTES", 400)
    several = packs.make(tiny_tensors(1), tiny_tensors(2))
    shutil.copy(one.file, several.delta)
    with pytest.raises(CheckpointError):
        several.by_delta(ALPHA)


OTHER_BASES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "other shape": (
        lambda base: base.update({EMBED: numbers(8, 10)}),
        rf"dtype or shape differs in 1 of 5 tensors, the first {EMBED}",
    ),
    "other dtype": (
        lambda base: base.update({EMBED: base[EMBED].half()}),
        rf"dtype or shape differs in 1 of 5 tensors, the first {EMBED}",
    ),
    "missing": (lambda base: base.pop(EMBED), rf"dtype or shape differs in 1 of 5 tensors, the first {EMBED}"),
}


@pytest.mark.parametrize(("change", "words"), OTHER_BASES.values(), ids=OTHER_BASES)
def test_base_with_another_header_is_refused_before_values_are_read(
    every_coding: Pack, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    base = dict(tensors_of_each_coding()[0])
    change(base)
    other = Pack(write_raw(tmp_path / "base", base), every_coding.aligned, every_coding.delta, every_coding.unmatched)
    with pytest.raises(
        PairError, match=rf"base is not the base that delta was made against \(base\): {words}"
    ) as caught:
        other.by_delta(ALPHA)
    assert len(caught.value.details) == 1
    assert EMBED in caught.value.details[0]


def test_base_of_another_architecture_is_refused(every_coding: Pack, tmp_path: Path) -> None:
    base = write_raw(tmp_path / "base", tensors_of_each_coding()[0], model_type="qwen2")
    with pytest.raises(PairError, match="different architectures"):
        Pack(base, every_coding.aligned, every_coding.delta, every_coding.unmatched).by_delta(ALPHA)


def test_more_tensors_in_base_do_not_matter(every_coding: Pack, tmp_path: Path) -> None:
    base = write_raw(tmp_path / "base", {**tensors_of_each_coding()[0], "more": torch.ones(3)})
    other = Pack(base, every_coding.aligned, every_coding.delta, every_coding.unmatched)
    assert other.by_delta(ALPHA).ignored_base == ("more",)
    assert_same_outcomes(outcomes(other.by_delta(ALPHA)), outcomes(every_coding.by_pair(ALPHA)))
