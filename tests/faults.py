"""Storage that misbehaves: reads that fail, hang, or find another file than there was."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import pytest


@dataclass(frozen=True)
class Read:
    """One call of :func:`os.preadv`: how many there were before, and what it asks for, in bytes."""

    number: int
    offset: int
    size: int


def before_reads(patch: pytest.MonkeyPatch, happen: Callable[[Read], object], *, is_cold: bool = False) -> None:
    """Let something happen before each read by :func:`os.preadv`; compiled loops read without it.

    Args:
        patch: undoes it.
        happen: gets the read. It may raise what the read is to raise, wait, or change the file; then the kernel reads.
        is_cold: whether reads that ask for cached pages only find none. They are never counted.
    """
    numbers, preadv = count(), os.preadv

    def read(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags and is_cold:
            raise BlockingIOError
        if not flags:
            happen(Read(next(numbers), offset, len(buffers[0])))
        return preadv(descriptor, buffers, offset, flags)

    patch.setattr(os, "preadv", read)


def fail_from(number: int, error: BaseException) -> Callable[[Read], None]:
    """The read of this number fails, and all after it."""

    def happen(read: Read) -> None:
        if read.number >= number:
            raise error

    return happen
