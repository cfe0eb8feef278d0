"""What really went through a load: which tensors, which way, how many bytes."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["extrapolated", "materialized", "copied"]

_LOCK = threading.Lock()
"""One for all: who holds it only adds, and a loader that counts must travel to other processes."""


@dataclass
class Counts:
    """Counts of one rank's load. A tensor that a rank never touches does not count."""

    read_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes asked of storage, by side."""
    kinds: dict[str, Kind] = field(default_factory=dict)
    """By tensor: combined straight into the parameter, combined first because the model asked for
    values, or taken over."""

    def add_read(self, side: str, count: int) -> None:
        """Count bytes that were read of a side; from any thread."""
        with _LOCK:
            self.read_bytes[side] += count

    def note(self, name: str, kind: Kind) -> None:
        """Remember how a tensor went; once materialised, it counts so."""
        if self.kinds.get(name) != "materialized":
            self.kinds[name] = kind

    def count(self) -> dict[Kind, int]:
        """Tensors by kind."""
        counts = Counter(self.kinds.values())
        return {kind: counts[kind] for kind in get_args(Kind)}
