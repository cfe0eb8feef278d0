"""Which tensor of base stands against which of aligned, and what is left over on either side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import TensorRecord
from expo_serve.plan.names import (
    is_embedding,
    is_foreign_head,
    is_leftover,
    is_mtp,
    is_output,
    may_tie_output,
    ties_embeddings,
)

Tensors = Mapping[str, TensorRecord]


@dataclass(frozen=True)
class Matching:
    """The outcome. Base's tensors go by the names that aligned has, or would have, for them."""

    partners: dict[str, TensorRecord | None]
    """Each tensor of aligned, and base's for it; integers and leftovers have none: they are copied."""
    same_name: dict[str, TensorRecord]
    """Base's tensors whose name aligned has too, paired or not."""
    only_aligned: dict[str, TensorRecord]
    only_base: dict[str, TensorRecord]
    spare: tuple[str, ...]
    """What only aligned has of multi-token prediction layers. The model itself does not load them."""
    left_out: tuple[str, ...]
    """A value head where text is generated: no model of that kind can load it."""


def match(base: Checkpoint, aligned: Checkpoint) -> Matching:
    """Pair the tensors of two checkpoints by name, by prefixed name, and by tied embeddings."""
    left_out = tuple(name for name in aligned.tensors if is_foreign_head(name, aligned.config))
    wanted = {name: record for name, record in aligned.tensors.items() if name not in left_out}
    renamed = _under_aligned_names(base.tensors, wanted)
    partners = {name: _partner(record, renamed, base, aligned) for name, record in wanted.items()}
    unpaired = {
        name: record
        for name, record in wanted.items()
        if partners[name] is None and record.is_float and not is_leftover(record)
    }
    spare = {name for name, record in unpaired.items() if is_mtp(record, aligned.config)}
    used = {partner.name for partner in partners.values() if partner}
    return Matching(
        partners=partners,
        same_name={name: record for name, record in renamed.items() if name in aligned.tensors},
        only_aligned={name: record for name, record in unpaired.items() if name not in spare},
        only_base={
            name: record
            for name, record in renamed.items()
            if record.name not in used and not _carries_nothing(name, record, base, aligned)
        },
        spare=tuple(name for name in unpaired if name in spare),
        left_out=left_out,
    )


def _partner(record: TensorRecord, renamed: Tensors, base: Checkpoint, aligned: Checkpoint) -> TensorRecord | None:
    if not record.is_float or is_leftover(record):
        return None
    if found := renamed.get(record.name):
        return found
    may_be_tied = is_output(record) and not is_mtp(record, aligned.config)
    return _embedding(base, record) if may_be_tied and may_tie_output(base.config) else None


def _embedding(checkpoint: Checkpoint, output: TensorRecord) -> TensorRecord | None:
    """The input embedding that is the output projection too, if there is just one that can be."""
    found = [
        record
        for record in checkpoint.tensors.values()
        if is_embedding(record) and not is_mtp(record, checkpoint.config) and _can_be_tied(record, output)
    ]
    return found[0] if len(found) == 1 else None


def _can_be_tied(embedding: TensorRecord, output: TensorRecord) -> bool:
    """Of one width; the output may have more rows, of a vocabulary that has grown."""
    are_matrices = len(embedding.shape) == len(output.shape) == 2
    return are_matrices and embedding.shape[0] <= output.shape[0] and embedding.shape[1] == output.shape[1]


def _carries_nothing(name: str, record: TensorRecord, base: Checkpoint, aligned: Checkpoint) -> bool:
    """Whether a tensor of base without a partner is no loss."""
    is_unused = is_leftover(record) or is_mtp(record, base.config) or is_foreign_head(name, base.config)
    if is_unused or not record.is_float:
        return True
    is_tied_output = (
        is_output(record)
        and name not in aligned.tensors
        and ties_embeddings(base.config) is not False
        and ties_embeddings(aligned.config) is not False
    )
    return is_tied_output and _embedding(base, record) is not None


def _under_aligned_names(base: Tensors, aligned: Tensors) -> dict[str, TensorRecord]:
    """Base's tensors by aligned's names.

    A body that was saved without its head lacks the prefix under which the whole model holds it
    (``layers.0`` against ``model.layers.0``); one saved within a wrapper has a prefix more.
    """
    renaming = find_renaming(base, aligned)
    renamed = {}
    for name, record in base.items():
        other = renaming.apply(name)
        keeps_name = name in aligned or other in base
        renamed[name if keeps_name else other] = record
    return renamed


@dataclass(frozen=True)
class Renaming:
    """From base's names to aligned's: ``cut`` is a prefix that only base has, ``put`` one that only aligned has."""

    cut: str = ""
    put: str = ""

    def apply(self, name: str) -> str:
        """The other side's name."""
        return self.put + name.removeprefix(self.cut)


def find_renaming(base: Collection[str], aligned: Collection[str]) -> Renaming:
    """The one prefix that pairs the most tensors, more of them than the names as they are, and most of base's."""
    only_base = dict.fromkeys(name for name in base if name not in aligned)
    only_aligned = dict.fromkeys(name for name in aligned if name not in base)
    votes = Counter(Renaming(put=prefix) for prefix in _prefixes(only_aligned, only_base))
    votes.update(Renaming(cut=prefix) for prefix in _prefixes(only_base, only_aligned))
    (best, count), (_, second) = [*votes.most_common(2), (Renaming(), 0), (Renaming(), 0)][:2]
    is_clear = count > second and count > len(base) - len(only_base) and 2 * count > len(only_base)
    return best if is_clear else Renaming()


def _prefixes(longer: Iterable[str], shorter: Mapping[str, None]) -> Iterator[str]:
    """What the ``longer`` names begin with where the rest is one of the ``shorter`` names."""
    for name in longer:
        end = name.find(".") + 1
        while end:
            if name[end:] in shorter:
                yield name[:end]
            end = name.find(".", end) + 1
