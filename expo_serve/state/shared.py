"""Memory that all processes of a running command share: each writes what it does, and any of them can read all of it.

The command makes it and hands it to its children. vLLM's processes, which vLLM starts without any open file of ours,
find it among the open files of their ancestors. So a write is a copy of a few hundred bytes, nothing has a name that
could be left behind, and plain ``vllm serve`` has none.

Layout, in the machine's byte order::

    0               8 bytes  magic
    8               float64  draining: CLOCK_MONOTONIC at the drain's begin; 0 before
    16              float64  cutting: CLOCK_MONOTONIC when open requests began to be cut; 0 before
    24              float64  engine_timeout in seconds; 0 turns the watchdog off
    4096 * (n + 1)  slot n:  uint32 length, uint32 CRC-32, JSON object of that length
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

_NAME = "expo-serve-state"
_MAGIC = b"EXPOST01"
_SLOTS = 512
_SLOT_BYTES = 4096
_SIZE = (_SLOTS + 1) * _SLOT_BYTES
_WORD = struct.Struct("d")
_HEAD = struct.Struct("II")
_ROOM = _SLOT_BYTES - _HEAD.size
_WORDS = {"draining": 8, "cutting": 16, "engine_timeout": 24}
_ATTEMPTS = 5
_MAX_TEXT = 1200
"""Bytes of a message; several fit into a slot."""
_IDENTITY = ("role", "pid", "engine", "rank", "began")
"""What a report never loses."""
_MAX_ANCESTORS = 32


class SharedState:
    """The shared memory behind one file descriptor.

    Args:
        descriptor: of the memory; from :meth:`create`, or of an ancestor.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._allocating = threading.Lock()
        self._last: dict[int, dict[str, Any]] = {}
        """What was last read of each slot."""

    @staticmethod
    def create() -> SharedState:
        """Make new shared memory."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create(_NAME)
        else:  # no Linux: only children that are handed the descriptor share it
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, _SIZE)
        state = SharedState(descriptor)
        state._memory[: len(_MAGIC)] = _MAGIC
        return state

    @staticmethod
    def find() -> SharedState | None:
        """Return what was adopted, or the memory of the nearest ancestor that has one.

        None under plain vLLM, and on another machine than the command's.
        """
        if _own is not None:
            return _own
        for pid in _ancestors():
            for name in _listed(f"/proc/{pid}/fd"):
                if state := _open(f"/proc/{pid}/fd/{name}"):
                    return state
        return None

    def close(self) -> None:
        """Let go of the memory, which is gone with the last process that has it."""
        self._memory.close()
        os.close(self.descriptor)

    @property
    def draining(self) -> float:
        """CLOCK_MONOTONIC at which the drain began; 0 before."""
        return self._word("draining")

    @draining.setter
    def draining(self, when: float) -> None:
        self._set_word("draining", when)

    @property
    def cutting(self) -> float:
        """CLOCK_MONOTONIC at which the requests that are still open began to be cut; 0 before."""
        return self._word("cutting")

    @cutting.setter
    def cutting(self, when: float) -> None:
        self._set_word("cutting", when)

    @property
    def engine_timeout(self) -> float:
        """Seconds without an answer of the engine after which it counts as hung; 0 turns that off."""
        return self._word("engine_timeout")

    @engine_timeout.setter
    def engine_timeout(self, seconds: float) -> None:
        self._set_word("engine_timeout", seconds)

    def _word(self, name: str) -> float:
        value: float = _WORD.unpack_from(self._memory, _WORDS[name])[0]
        return value

    def _set_word(self, name: str, value: float) -> None:
        self._store(_WORDS[name], _WORD.pack(value))

    def reporter(self, role: str, **fields: Any) -> Reporter:
        """Take a slot for this process.

        Args:
            role: ``command``, ``status``, ``keeper``, ``server``, ``api`` or ``rank``.
            fields: what is known at once; JSON values.
        """
        with self._allocating:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
            try:
                slot = next((number for number in range(_SLOTS) if self._length(number) == 0), None)
                reporter = Reporter(self, slot, {"role": role, "pid": os.getpid(), **fields})
            finally:
                fcntl.lockf(self.descriptor, fcntl.LOCK_UN)
        return reporter

    def reports(self, role: str | None = None) -> list[dict[str, Any]]:
        """Return what all processes, or those of a role, have written last, in the order of their slots."""
        found = []
        for number in range(_SLOTS):
            if self._length(number) == 0:
                break
            report = self._read(number)
            if report is not None and role in (None, report.get("role")):
                found.append(report)
        return found

    def _length(self, slot: int) -> int:
        length: int = _HEAD.unpack_from(self._memory, _start(slot))[0]
        return length

    def _read(self, slot: int) -> dict[str, Any] | None:
        """Return what a slot holds, or held where its process is in the middle of a write, or has ended there."""
        for _ in range(_ATTEMPTS):
            length, check = _HEAD.unpack_from(self._memory, _start(slot))
            first = _start(slot) + _HEAD.size
            content = self._memory[first : first + min(length, _ROOM)]
            if zlib.crc32(content) == check:
                report: dict[str, Any] = json.loads(content)
                self._last[slot] = report
                return report
            time.sleep(0.0005)
        return self._last.get(slot)

    def _write(self, slot: int, content: bytes) -> None:
        first = _start(slot) + _HEAD.size
        self._memory[first : first + len(content)] = content
        self._store(_start(slot), _HEAD.pack(len(content), zlib.crc32(content)))

    def _store(self, offset: int, word: bytes) -> None:
        """Write 8 bytes in one piece; ``pack_into`` writes zeros first, which a reader would take for an empty slot."""
        self._memory[offset : offset + len(word)] = word


class Reporter:
    """Writes one slot; without one it does nothing. Any thread may call it.

    Args:
        state: the shared memory; None if there is none.
        slot: its number; None if all are taken.
        fields: what is written first.
    """

    def __init__(self, state: SharedState | None, slot: int | None, fields: dict[str, Any]) -> None:
        self._state, self._slot, self._fields = state, slot, fields
        self._writing = threading.Lock()
        self.update()

    def update(self, **fields: Any) -> None:
        """Change some fields; None removes one."""
        with self._writing:
            merged = {**self._fields, **fields}
            self._fields = {name: value for name, value in merged.items() if value is not None}
            if self._state is not None and self._slot is not None:
                self._state._write(self._slot, _encode(self._fields))

    def enter(self, phase: str) -> None:
        """Note that a phase begins now."""
        self.update(phases={**self._fields.get("phases", {}), phase: time.monotonic()})

    def warn(self, message: str) -> None:
        """Add a warning."""
        self.update(warnings=[*self._fields.get("warnings", []), _cut(message)])

    def fail(self, reason: str, message: str) -> None:
        """Note the error that ends the start or the server; the first one stays.

        Args:
            reason: one of :data:`expo_serve.errors.REASONS`.
            message: one line.
        """
        if "error" not in self._fields:
            self.update(error={"reason": reason, "message": _cut(message)})


_own: SharedState | None = None


def adopt(descriptor: int) -> None:
    """Make a descriptor that was handed to this process the memory that :meth:`SharedState.find` returns."""
    global _own
    _own = SharedState(descriptor)
    os.set_inheritable(descriptor, False)


def report_as(role: str, **fields: Any) -> Reporter:
    """Take a slot in the shared memory of an ancestor; without one the reporter does nothing."""
    state = SharedState.find()
    return state.reporter(role, **fields) if state else Reporter(None, None, {"role": role, **fields})


def _start(slot: int) -> int:
    return (slot + 1) * _SLOT_BYTES


def _cut(text: str) -> str:
    return text.encode(errors="replace")[:_MAX_TEXT].decode(errors="ignore")


def _encode(fields: dict[str, Any]) -> bytes:
    """Return the JSON of a report; where it is too long, without the oldest warnings, then without what is longest."""
    content = _json(fields)
    while len(content) > _ROOM and fields.get("warnings"):
        fields = {**fields, "warnings": fields["warnings"][1:]}
        content = _json(fields)
    while len(content) > _ROOM:
        largest = max(fields.keys() - set(_IDENTITY), key=lambda name: len(_json(fields[name])))
        fields = {name: value for name, value in fields.items() if name != largest}
        content = _json(fields)
    return content


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


def _ancestors() -> Iterator[int]:
    """Yield this process's id and those of its ancestors, the nearest first."""
    pid = os.getpid()
    for _ in range(_MAX_ANCESTORS):
        yield pid
        try:
            with open(f"/proc/{pid}/stat", errors="replace") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return
        if pid == 0:
            return


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # of another user, or gone
        return []


def _open(link: str) -> SharedState | None:
    """Open an open file of a process if it is a shared state."""
    try:
        if not os.readlink(link).startswith(f"/memfd:{_NAME}"):
            return None
        descriptor = os.open(link, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(descriptor).st_size == _SIZE and os.pread(descriptor, len(_MAGIC), 0) == _MAGIC:
        return SharedState(descriptor)
    os.close(descriptor)
    return None
