"""Why two checkpoints are no pair: each check raises with what, where, found, and what to do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import TensorRecord
from expo_serve.config import ExpoConfig
from expo_serve.errors import PairError
from expo_serve.plan.matching import Matching
from expo_serve.plan.names import (
    architecture_stems,
    is_embedding,
    is_leftover,
    is_output,
    ties_embeddings,
    vocabulary_sizes,
)

Tensors = Mapping[str, TensorRecord]


def refuse_architectures(base: Checkpoint, aligned: Checkpoint) -> None:
    """One type of model; its class may differ in the head, as that of a body saved alone does.

    Raises:
        PairError: they are different models.
    """
    same_type = base.config.get("model_type") == aligned.config.get("model_type")
    if same_type and architecture_stems(base.config) == architecture_stems(aligned.config):
        return
    key = "architectures" if same_type else "model_type"
    raise PairError(
        f"base and aligned have different architectures: {key} is {base.config.get(key)!r} in base "
        f"({base.source.name}), {aligned.config.get(key)!r} in aligned ({aligned.source.name})"
    )


def refuse_tensors(base: Checkpoint, aligned: Checkpoint, matching: Matching, config: ExpoConfig) -> None:
    """Check what was matched and what was not.

    Raises:
        PairError: shapes, layouts or one-sided tensors that a pair does not have.
    """
    _refuse_shapes(base, aligned, matching)
    _refuse_layouts(matching)
    _refuse_strangers(base, aligned, matching)
    if config.unmatched == "refuse" and (matching.only_base or matching.only_aligned):
        _refuse_untied_output(base, aligned, matching)
        _refuse_one_sided(base, aligned, matching)


def _refuse_shapes(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> None:
    grown = set(product(vocabulary_sizes(base.config), vocabulary_sizes(aligned.config)))
    both = (
        (partner or matching.same_name.get(name), aligned.tensors[name]) for name, partner in matching.partners.items()
    )
    wrong = [
        f"{record.name}: base {_describe(partner)}, aligned {_describe(record)}"
        for partner, record in both
        if partner and not is_leftover(record) and not _are_alike(partner, record, grown)
    ]
    if wrong:
        raise PairError(
            f"base and aligned are not a pair: {len(wrong)} of {len(aligned.tensors)} tensors differ in shape or kind"
            f"{_size_differences(base, aligned)}; give two checkpoints of one model",
            wrong,
        )


def _are_alike(base: TensorRecord, aligned: TensorRecord, grown: set[tuple[int, int]]) -> bool:
    """Whether the two can be extrapolated; of integers, which are copied, only that both sides have some."""
    return base.is_float == aligned.is_float and (not aligned.is_float or _fits(base, aligned, grown))


def _fits(base: TensorRecord, aligned: TensorRecord, grown: set[tuple[int, int]]) -> bool:
    """Whether two tensors have one shape, but for the rows of a vocabulary (``grown``: its sizes on both sides)."""
    if base.shape == aligned.shape:
        return True
    if len(base.shape) != len(aligned.shape) or not base.shape or base.shape[1:] != aligned.shape[1:]:
        return False
    rows = (base.shape[0], aligned.shape[0])
    return rows[0] < rows[1] and (is_embedding(aligned) or is_output(aligned) or rows in grown)


def _describe(record: TensorRecord) -> str:
    return f"{record.dtype} {list(record.shape)}"


def _refuse_layouts(matching: Matching) -> None:
    """Also with ``--unmatched copy``, which would leave these modules as aligned has them and not say so."""
    found = different_layouts(matching.only_base, matching.only_aligned)
    if found:
        raise PairError(
            f"{len(found)} modules are stored in one way in base and in another in aligned (fused or split, or under "
            f"other names), the first {found[0]}; save both sides in the same way, such as with one version of one "
            "library; --unmatched copy does not apply, as they would not be extrapolated",
            [str(layouts) for layouts in found],
        )


def _refuse_strangers(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> None:
    """Also with ``--unmatched copy``: with nothing to extrapolate it is aligned that would be served."""
    if matching.only_aligned and not any(matching.partners.values()):
        raise PairError(
            f"base and aligned are not a pair: of {len(aligned.tensors)} tensors of aligned and {len(base.tensors)} of "
            "base no two have one name; give two checkpoints of one model"
        )


def _refuse_untied_output(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> None:
    """A tied output is the embedding, so it cannot go another way than the embedding goes."""
    outputs = [record for record in matching.only_base.values() if is_output(record)]
    is_all = len(outputs) == len(matching.only_base) and not matching.only_aligned
    same_head = base.config.get("architectures") == aligned.config.get("architectures")
    is_untied = ties_embeddings(base.config) is False and ties_embeddings(aligned.config) is not False
    if is_all and same_head and is_untied:
        raise PairError(
            f"base has an output of its own ({outputs[0].name} {list(outputs[0].shape)}, tie_word_embeddings false), "
            "aligned ties its output to the embedding: the extrapolated output could not be tied; give a base that is "
            "tied too, or let --unmatched copy ignore base's output"
        )


def _refuse_one_sided(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> None:
    only_aligned, only_base = matching.only_aligned.values(), matching.only_base.values()
    details = [f"only in aligned: {record.name} {list(record.shape)}" for record in only_aligned]
    details += [f"only in base: {record.name} {list(record.shape)}" for record in only_base]
    raise PairError(
        f"{len(details)} tensors are on one side only ({len(only_aligned)} in aligned, {len(only_base)} in base)"
        f"{_size_differences(base, aligned)}; --unmatched copy takes those of aligned over and ignores "
        "those of base",
        details,
    )


def _size_differences(base: Checkpoint, aligned: Checkpoint) -> str:
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    pairs = ((key, base.config.get(key), aligned.config.get(key)) for key in keys)
    texts = [f"{key} {ours} against {theirs}" for key, ours, theirs in pairs if ours != theirs]
    return f" ({', '.join(texts)})" if texts else ""


@dataclass(frozen=True)
class Layouts:
    """How the two sides store one module: the names below it."""

    module: str
    base: list[str]
    aligned: list[str]

    def __str__(self) -> str:
        sides = f"{self._shorten(self.base)} in base, {self._shorten(self.aligned)} in aligned"
        return f"{self.module or 'the model'}: {sides}"

    def _shorten(self, names: list[str]) -> str:
        below = [name.removeprefix(f"{self.module}.") for name in names]
        more = f" and {len(below) - 3} more" if len(below) > 3 else ""
        return " + ".join(below[:3]) + more


def different_layouts(only_base: Tensors, only_aligned: Tensors) -> list[Layouts]:
    """The modules that both sides have but store in different ways, each as near to its tensors as can be.

    Args:
        only_base: base's tensors without a partner, by the names that aligned would have for them.
        only_aligned: aligned's.
    """
    settled: set[str] = set()
    found = []
    for module, (base, aligned) in _modules(only_base, only_aligned):
        same = _same_weights(
            {name: only_base[name] for name in base if name not in settled},
            {name: only_aligned[name] for name in aligned if name not in settled},
        )
        if same and (module or len(same[0]) + len(same[1]) > 2):  # two lone tensors are no layout
            found.append(Layouts(module, *same))
            settled.update(*same)
    position = {name: number for number, name in enumerate(only_aligned)}
    return sorted(found, key=lambda layouts: position[layouts.aligned[0]])


def _modules(only_base: Tensors, only_aligned: Tensors) -> list[tuple[str, tuple[list[str], list[str]]]]:
    """Every module and the tensors below it on both sides, the innermost first."""
    modules: defaultdict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, tensors in enumerate((only_base, only_aligned)):
        for name in tensors:
            for module in _enclosing(name):
                modules[module][side].append(name)
    return sorted(modules.items(), key=lambda item: item[0].count(".") + bool(item[0]), reverse=True)


def _enclosing(name: str) -> list[str]:
    """``a.b``, ``a`` and, as an empty text, the whole model for ``a.b.weight``; none for a name without dots."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))] if len(parts) > 1 else []


def _same_weights(base: Tensors, aligned: Tensors) -> tuple[list[str], list[str]] | None:
    """The names on both sides that hold the same number of elements in sum: all, the matrices or the vectors.

    What else is on one side only (the scale of a norm, say) is most often of the other kind.
    """
    for are_matrices in ((True, False), (True,), (False,)):
        sides = [
            {name: record for name, record in tensors.items() if (len(record.shape) > 1) in are_matrices}
            for tensors in (base, aligned)
        ]
        totals = [sum(record.numel for record in side.values()) for side in sides]
        if all(sides) and totals[0] == totals[1]:
            return list(sides[0]), list(sides[1])
    return None
