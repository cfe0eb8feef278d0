"""What takes base to aligned, in place of a second checkpoint: three kinds, told apart by what lies in the folder.

::

    packed.py   our own lossless format: decodes to aligned, bit for bit
    lora.py     a PEFT LoRA adapter: base + s * B A
    full.py     a checkpoint of differences: base + delta

A kind says whether a folder is of it, opens it (headers only) and plans a load over a base. How elements come out
of its files is its ``*_sides.py``, which is imported when a load begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.config import ExpoConfig, Source
from expo_serve.plan.full import FullDelta
from expo_serve.plan.lora import LoraDelta
from expo_serve.plan.packed import PackedDelta
from expo_serve.plan.plan import OpenedSource, Plan


class Delta(OpenedSource, Protocol):
    """An opened delta."""

    @property
    def format(self) -> str:
        """``packed``, ``lora`` or ``full``."""

    def plan(self, base: Checkpoint, config: ExpoConfig) -> Plan:
        """Decide for every tensor of the result, or refuse.

        Raises:
            PairError: this delta does not belong to this base.
            UsageError: an alpha rule that matches no tensor.
        """


class DeltaFormat(Protocol):
    """What opens deltas of one kind: its class."""

    @property
    def format(self) -> str:
        """``packed``, ``lora`` or ``full``."""

    def recognises(self, folder: Path) -> bool:
        """Whether a folder's content is of this kind."""

    def open(self, source: Source) -> Delta:
        """Read and check what lies there, but no weights.

        Raises:
            CheckpointError: anything is not as its format says.
        """


DELTA_FORMATS: tuple[DeltaFormat, ...] = (PackedDelta, LoraDelta, FullDelta)
"""In the order in which they are tried; the last one takes whatever is left."""


def open_delta(source: Source) -> Delta:
    """Open what lies in a folder as the kind of delta that it is.

    Args:
        source: where it lies; a fingerprint in it must be that of the files found.

    Raises:
        CheckpointError: it is of no kind, or not as its format says.
    """
    return format_of(Path(source.path)).open(source)


def format_of(folder: Path) -> DeltaFormat:
    """The kind of the delta in a folder."""
    return next((kind for kind in DELTA_FORMATS if kind.recognises(folder)), DELTA_FORMATS[-1])
