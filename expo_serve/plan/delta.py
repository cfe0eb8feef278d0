"""Delta formats. Instead of an aligned checkpoint, a deployment can name a delta::

    packed.py   our own lossless format: decodes to the aligned checkpoint, bit for bit
    lora.py     a PEFT LoRA adapter: base + scale * B A
    full.py     a checkpoint of differences: base + delta

The format is detected from the folder's contents. Each format is a class that recognises a folder, opens it (reading
headers only) and plans a load over a base. To add one, write such a class and list it in :data:`DELTA_FORMATS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.source import adapter_subfolders
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import CheckpointError
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
            PairError: the delta does not belong to this base.
            UsageError: an alpha rule matches no tensor.
        """


class DeltaFormat(Protocol):
    """A format: the class of its opened deltas."""

    @property
    def format(self) -> str:
        """``packed``, ``lora`` or ``full``."""

    def recognises(self, folder: Path) -> bool:
        """Return whether a folder holds a delta of this format."""

    def open(self, source: Source) -> Delta:
        """Read and check the delta's headers and config, but no weights.

        Raises:
            CheckpointError: a file breaks the format, or differs from the fingerprint of ``source``.
        """


DELTA_FORMATS: tuple[DeltaFormat, ...] = (PackedDelta, LoraDelta, FullDelta)
"""All formats, in the order in which they are tried; the last one also takes what no other recognises."""


def open_delta(source: Source) -> Delta:
    """Detect the format of a delta and open it.

    Args:
        source: its folder; if it has a fingerprint, the files must have the same.

    Raises:
        CheckpointError: the folder holds no delta, or a file breaks the delta's format.
    """
    folder = Path(source.path)
    there = [format_ for format_ in DELTA_FORMATS if format_.recognises(folder)]
    if not there and (adapters := adapter_subfolders(folder)):
        raise CheckpointError(
            f"delta: {source.path} holds no delta, but its subfolders hold adapters; give one of them: "
            f"--delta-subfolder {' or '.join(adapters[:5])}"
        )
    return (*there, DELTA_FORMATS[-1])[0].open(source)


def format_of(folder: Path) -> DeltaFormat:
    """Return the format of the delta in a folder."""
    return next((format_ for format_ in DELTA_FORMATS if format_.recognises(folder)), DELTA_FORMATS[-1])
