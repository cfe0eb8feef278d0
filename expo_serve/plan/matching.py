"""Pairs the tensors of two checkpoints, and tells what is left over in either."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import JsonObject, TensorRecord
from expo_serve.plan.conversion import Candidates, find_candidates, is_in_language_part, only_pairs
from expo_serve.plan.names import (
    is_embedding,
    is_foreign_head,
    is_language_part,
    is_leftover,
    is_mtp,
    is_output,
    may_tie_output,
    ties_embeddings,
)

Tensors = Mapping[str, TensorRecord]


@dataclass(frozen=True)
class Matching:
    """The pairs of tensors. Tensors of base are keyed by the names that aligned has, or would have, for them."""

    partners: dict[str, TensorRecord | None]
    """Every tensor of aligned with its partner in base; None for integers and leftovers, which are copied."""
    same_name: dict[str, TensorRecord]
    """Base's tensors whose name aligned has too, paired or not."""
    only_aligned: dict[str, TensorRecord]
    """Tensors of aligned that should have a partner in base but have none."""
    only_base: dict[str, TensorRecord]
    """Tensors of base that no tensor of aligned is paired with, and that would be missed."""
    mtp_only_in_aligned: tuple[str, ...]
    """Multi-token prediction layers that only aligned has. The model itself does not load them."""
    towers: tuple[str, ...]
    """Tensors outside of the language part, where one side is multimodal and the other its language part alone."""
    left_out: tuple[str, ...]
    """Tensors of a value head in a model that generates text: no such model can load them."""


def match(base: Checkpoint, aligned: Checkpoint) -> Matching:
    """Pair the tensors of two checkpoints by name, under other wrappers, and by tied embeddings."""
    left_out = tuple(name for name in aligned.tensors if is_foreign_head(name, aligned.config))
    wanted = {name: record for name, record in aligned.tensors.items() if name not in left_out}
    renamed = _under_aligned_names(base, wanted)
    partners = {name: _partner(record, renamed, base, aligned) for name, record in wanted.items()}
    unpaired = {
        name: record
        for name, record in wanted.items()
        if partners[name] is None and record.is_float and not is_leftover(record)
    }
    mtp_only = {name for name, record in unpaired.items() if is_mtp(record, aligned.config)}
    used = {partner.name for partner in partners.values() if partner}
    only_aligned = {name: record for name, record in unpaired.items() if name not in mtp_only}
    only_base = {
        name: record
        for name, record in renamed.items()
        if record.name not in used and not _is_dispensable(name, record, base, aligned)
    }
    towers: tuple[str, ...] = ()
    if is_language_part(base.config, aligned.config):
        inside = {_branch(name) for name, partner in partners.items() if partner}
        towers = tuple(name for name in only_aligned if _is_tower(name, inside))
    elif is_language_part(aligned.config, base.config):
        inside = set(map(_branch, used))
        towers = tuple(name for name, record in only_base.items() if _is_tower(record.name, inside))
    return Matching(
        partners=partners,
        same_name={name: record for name, record in renamed.items() if name in aligned.tensors},
        only_aligned={name: record for name, record in only_aligned.items() if name not in towers},
        only_base={name: record for name, record in only_base.items() if name not in towers},
        towers=towers,
        mtp_only_in_aligned=tuple(name for name in unpaired if name in mtp_only),
        left_out=left_out,
    )


def _is_tower(name: str, inside: Collection[str]) -> bool:
    """Return whether a tensor of a multimodal model is outside of its language part.

    Args:
        name: of a tensor that the language part alone does not have.
        inside: the branches of the tensors that it has.
    """
    return _branch(name) not in inside and not is_in_language_part(name)


def _branch(name: str) -> str:
    """Return the first module of a tensor's name that is not just the model."""
    return next(part for part in name.split(".") if part != "model")


def _partner(record: TensorRecord, renamed: Tensors, base: Checkpoint, aligned: Checkpoint) -> TensorRecord | None:
    if not record.is_float or is_leftover(record):
        return None
    if found := renamed.get(record.name):
        return found
    may_be_tied = is_output(record) and not is_mtp(record, aligned.config)
    return _tied_embedding(base, record) if may_be_tied and may_tie_output(base.config) else None


def _tied_embedding(checkpoint: Checkpoint, output: TensorRecord) -> TensorRecord | None:
    """Return the input embedding that also serves as this output projection, if exactly one can."""
    found = [
        record
        for record in checkpoint.tensors.values()
        if is_embedding(record) and not is_mtp(record, checkpoint.config)
        if len(record.shape) == 2 and record.grows_into(output)
    ]
    return found[0] if len(found) == 1 else None


def _is_dispensable(name: str, record: TensorRecord, base: Checkpoint, aligned: Checkpoint) -> bool:
    """Return whether a tensor of base without a partner can be ignored without loss."""
    is_unused = is_leftover(record) or is_mtp(record, base.config) or is_foreign_head(name, base.config)
    if is_unused or not record.is_float:
        return True
    is_tied_output = (
        is_output(record)
        and name not in aligned.tensors
        and ties_embeddings(base.config) is not False
        and ties_embeddings(aligned.config) is not False
    )
    return is_tied_output and _tied_embedding(base, record) is not None


def _under_aligned_names(base: Checkpoint, aligned: Tensors) -> dict[str, TensorRecord]:
    """Key base's tensors by aligned's names for them.

    A body that was saved without its head lacks the prefix that the whole model gives it (``layers.0`` against
    ``model.layers.0``); one that was saved inside a wrapper has a prefix more. What no prefix pairs may be wrapped
    otherwise (:mod:`expo_serve.plan.conversion`).
    """
    renaming = find_renaming(base.tensors, aligned)
    renamed = {}
    for name, record in base.tensors.items():
        other = renaming.apply(name)
        keeps_name = name in aligned or other in base.tensors
        renamed[name if keeps_name else other] = record
    is_left = any(
        record.is_float and not is_leftover(record) and name not in renamed for name, record in aligned.items()
    )
    is_spare = any(name not in aligned for name in renamed)
    return _converted(renamed, base, aligned) if is_left and is_spare else renamed


def _converted(renamed: Tensors, base: Checkpoint, aligned: Tensors) -> dict[str, TensorRecord]:
    """Return the same tensors of base, those that are wrapped otherwise under aligned's names for them too."""
    prefixed = {name: record.name for name, record in renamed.items() if name in aligned}
    pairs = only_pairs(find_candidates(aligned, base.tensors, base.config, prefixed))
    names = {other: name for name, other in pairs.items()}
    return {
        names.get(record.name, record.name if name in aligned else name): record for name, record in renamed.items()
    }


@dataclass(frozen=True)
class Renaming:
    """Turns base's names into aligned's: removes the prefix ``cut``, which only base has, or adds ``put``."""

    cut: str = ""
    put: str = ""

    def apply(self, name: str) -> str:
        """Return aligned's name for a tensor of base."""
        return self.put + name.removeprefix(self.cut)


def find_renaming(base: Collection[str], aligned: Collection[str]) -> Renaming:
    """Find the prefix that pairs the most tensors.

    The prefix has to pair more tensors than the names as they are, and most of those that only base has; otherwise
    nothing is renamed.
    """
    only_base = dict.fromkeys(name for name in base if name not in aligned)
    only_aligned = dict.fromkeys(name for name in aligned if name not in base)
    votes = Counter(Renaming(put=prefix) for prefix in _prefixes(only_aligned, only_base))
    votes.update(Renaming(cut=prefix) for prefix in _prefixes(only_base, only_aligned))
    (best, count), (_, second) = [*votes.most_common(2), (Renaming(), 0), (Renaming(), 0)][:2]
    is_clear = count > second and count > len(base) - len(only_base) and 2 * count > len(only_base)
    return best if is_clear else Renaming()


def _prefixes(longer: Iterable[str], shorter: Mapping[str, None]) -> Iterator[str]:
    """Yield each prefix of a ``longer`` name after which one of the ``shorter`` names follows."""
    for name in longer:
        end = name.find(".") + 1
        while end:
            if name[end:] in shorter:
                yield name[:end]
            end = name.find(".", end) + 1


def base_names(names: Collection[str], base: Tensors, config: JsonObject | None = None) -> dict[str, str]:
    """Return base's name for each name in a delta: the same name, one with a prefix more or less, or other wrappers.

    A name that base has in none of these forms, or that could be several of base's, stays as it is.

    Args:
        names: the delta's names.
        base: base's tensors.
        config: base's config, for the names that transformers gives to the tensors of this type of model.
    """
    prefixed = _prefixed_names(names, base)
    is_same = all(name in base for name in names)
    pairs = prefixed if is_same else only_pairs(base_candidates(names, base, config))
    return {name: pairs.get(name, name) for name in names}


def shared_targets(names: Mapping[str, str], base: Tensors) -> dict[str, list[str]]:
    """Return the tensors of base that more than one name means, with these names.

    Args:
        names: base's name for each name in a delta, see :func:`base_names`.
        base: base's tensors.
    """
    by_target: defaultdict[str, list[str]] = defaultdict(list)
    for name, target in names.items():
        by_target[target].append(name)
    return {target: group for target, group in by_target.items() if len(group) > 1 and target in base}


def base_candidates(names: Collection[str], base: Tensors, config: JsonObject | None = None) -> Candidates:
    """Return all tensors of base that each name can mean. For the arguments see :func:`base_names`."""
    return find_candidates(names, base, config or {}, _prefixed_names(names, base))


def _prefixed_names(names: Collection[str], base: Tensors) -> dict[str, str]:
    """Return base's name for each name that base has as it is, or with the prefix that pairs the most."""
    renaming = find_renaming(names, base)
    renamed = {name: name if name in base else renaming.apply(name) for name in names}
    return {name: other for name, other in renamed.items() if other in base}
