"""Faults of the world around a server: its clock, its network, its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtests.chaos.effects import wait_until
from loadtests.chaos.faults import Kind
from loadtests.chaos.victim import Victim


@contextmanager
def set_clock(victim: Victim, kind: Kind) -> Iterator[None]:
    """Let the server's wall clock jump; it stays there."""
    assert victim.place.clock is not None
    victim.place.clock.write_text(f"{kind.target}\n")
    yield


@contextmanager
def cut_network(victim: Victim, kind: Kind) -> Iterator[None]:
    """Take the link away, then give it back."""
    assert victim.place.link is not None
    _link(victim.place.link, "down")
    try:
        yield
    finally:
        _link(victim.place.link, "up")


def _link(name: str, state: str) -> None:
    subprocess.run(["ip", "link", "set", name, state], check=True, capture_output=True)


@contextmanager
def truncate(victim: Victim, kind: Kind) -> Iterator[None]:
    """Cut a checkpoint's file in half."""
    with _changed(_weights(victim, kind)) as file:
        os.truncate(file, file.stat().st_size // 2)
        yield


@contextmanager
def spoil_values(victim: Victim, kind: Kind) -> Iterator[None]:
    """Overwrite a tensor's values in the file with NaN; the header stays."""
    with _changed(_weights(victim, kind)) as file:
        length, header = _header(file)
        tensor = header["model.norm.weight"]
        begin, end = tensor["data_offsets"]
        with file.open("r+b") as writing:
            writing.seek(8 + length + begin)
            writing.write(b"\xff\x7f" * ((end - begin) // 2))
        yield


@contextmanager
def replace_header(victim: Victim, kind: Kind) -> Iterator[None]:
    """Put another file in the place of a checkpoint's, once it has been checked: other metadata, the same tensors."""
    wait_until(lambda: victim.state().get("phase") == "start", 20, "the phase of the start was never seen")
    file = _weights(victim, kind)
    with _changed(file):
        length, header = _header(file)
        other = json.dumps({**header, "__metadata__": {"format": "pt", "made": "again"}}).encode()
        new = file.with_suffix(".new")
        with file.open("rb") as reading, new.open("wb") as writing:
            reading.seek(8 + length)
            writing.write(struct.pack("<Q", len(other)) + other)
            shutil.copyfileobj(reading, writing)
        new.replace(file)
        yield


@contextmanager
def _changed(file: Path) -> Iterator[Path]:
    """Bring a file back in the end."""
    kept = file.with_suffix(".kept")
    shutil.copyfile(file, kept)
    try:
        yield file
    finally:
        kept.replace(file)


def _weights(victim: Victim, kind: Kind) -> Path:
    folder = {"base": victim.place.base, "aligned": victim.place.aligned}[kind.target]
    return folder / "model.safetensors"


def _header(file: Path) -> tuple[int, dict[str, dict[str, list[int]]]]:
    with file.open("rb") as reading:
        (length,) = struct.unpack("<Q", reading.read(8))
        return length, json.loads(reading.read(length))
