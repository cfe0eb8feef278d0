"""Refuses two checkpoints that are not a pair: each check names what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.checkpoint.records import TensorRecord
from expo_serve.config import ExpoConfig
from expo_serve.errors import PairError, UsageError, count_of
from expo_serve.plan.conversion import is_in_language_part
from expo_serve.plan.layouts import different_layouts
from expo_serve.plan.matching import Matching
from expo_serve.plan.names import (
    NOT_GATHERED,
    architecture_stems,
    config_differences,
    described,
    is_adapter_part,
    is_embedding,
    is_language_part,
    is_layer,
    is_leftover,
    is_output,
    ties_embeddings,
    vocabulary_sizes,
)
from expo_serve.shown import shown

_HEAD_SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim")


def refuse_unused_rules(config: ExpoConfig, names: Iterable[str]) -> None:
    """Require each alpha rule to match a tensor.

    Raises:
        UsageError: a rule matches none of ``names``.
    """
    names = tuple(names)
    for rule in config.alpha_rules:
        if not any(rule.matches(name) for name in names):
            raise UsageError(
                f"alpha rule {shown(rule.text, 200)} matches no tensor; run expo-serve inspect --json without it to "
                "see the names"
            )


def refuse_architectures(base: Checkpoint, other: Checkpoint) -> None:
    """Require one type of model. The classes may differ in the head, as that of a body saved alone does.

    A multimodal model and its language part are one type: the language part is extrapolated.

    Args:
        base: the checkpoint before alignment.
        other: the aligned checkpoint, or a delta that has a config.

    Raises:
        PairError: the two are different models.
    """
    same_type = base.config.get("model_type") == other.config.get("model_type")
    stems = [architecture_stems(side.config) for side in (base, other)]
    # Nothing reads the architectures of base: converters and trainers leave them out.
    if same_type and (stems[0] == stems[1] or not all(stems)):
        return
    if is_language_part(base.config, other.config) or is_language_part(other.config, base.config):
        return
    key = "architectures" if same_type else "model_type"
    is_delta = other.operand == "delta"
    raise PairError(
        f"base and {other.operand} have different architectures: {key} is {shown(base.config.get(key))} in base "
        f"({base.source.name}) and {shown(other.config.get(key))} in {other.operand} ({other.source.name}); "
        + ("give the base that the delta was made from" if is_delta else "give two checkpoints of the same model")
    )


def refuse_tensors(base: Checkpoint, aligned: Checkpoint, matching: Matching, config: ExpoConfig) -> None:
    """Check the tensors that were matched and those that were not.

    Raises:
        PairError: shapes or layouts differ, or a tensor is in one checkpoint only.
    """
    _refuse_adapter_parts(aligned)
    for side in (base, aligned):
        _refuse_flat(side)
    _refuse_empty(base, aligned, matching)
    _refuse_shapes(base, aligned, matching)
    _refuse_heads(base, aligned)
    _refuse_layouts(matching)
    _refuse_no_partners(base, aligned, matching)
    _refuse_other_layers(base, aligned, matching)
    if config.unmatched == "refuse" and (matching.only_base or matching.only_aligned):
        _refuse_untied_output(base, aligned, matching)
        _refuse_unmatched(base, aligned, matching)


def _refuse_adapter_parts(aligned: Checkpoint) -> None:
    """Applies with ``--unmatched copy`` too: a copied part of an adapter changes nothing, or breaks the result."""
    parts = [record for name, record in aligned.tensors.items() if is_adapter_part(name)]
    if parts:
        raise PairError(
            f"aligned ({aligned.source.name}) holds {count_of(len(parts), 'tensor')} of an adapter in "
            f"{parts[0].file.name}, the first {parts[0].name}; give a folder with the adapter alone as --delta, or one "
            "with the model alone as --aligned",
        )


def _refuse_empty(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> None:
    for side, other in ((aligned, base), (base, aligned)):
        there = matching.same_name if side is aligned else aligned.tensors
        full = {name for name, record in there.items() if record.numel}
        empty = [record for name, record in side.tensors.items() if not record.numel and name in full]
        if empty:
            raise PairError(
                f"{side.operand} ({side.source.name}) holds {count_of(len(empty), 'tensor')} without values that "
                f"{other.operand} has, the first {empty[0].name} {list(empty[0].shape)}: {NOT_GATHERED}",
                [f"{record.name}: {record.dtype_and_shape} in {record.file.name}" for record in empty],
            )


def _refuse_heads(base: Checkpoint, aligned: Checkpoint) -> None:
    """Applies to equal shapes too: the same rows then belong to other heads."""
    differences = config_differences(base.config, aligned.config, _HEAD_SIZES)
    if differences:
        raise PairError(
            f"base and aligned are not a pair: their attention has other heads ({described(differences)}); give two "
            "checkpoints of the same model, or correct the config that is wrong"
        )


def _refuse_other_layers(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> None:
    """Applies with ``--unmatched copy`` too: where layers were put in or taken out, a number is not the same layer."""
    differences = config_differences(base.config, aligned.config, ("num_hidden_layers",))
    unmatched = [*matching.only_aligned.values(), *matching.only_base.values()]
    if differences and any(is_layer(record.name) for record in unmatched):
        one, two = differences["num_hidden_layers"]
        details, summary = _unmatched(base, aligned, matching)
        raise PairError(
            f"{summary}; layers of one number need not be one layer where {one} became {two}, so give a base with "
            "aligned's layers, made from base as aligned was (for example with mergekit's passthrough)",
            details,
        )


def _refuse_shapes(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> None:
    sizes = vocabulary_sizes(base.config), vocabulary_sizes(aligned.config)
    both = (
        (partner or matching.same_name.get(name), aligned.tensors[name]) for name, partner in matching.partners.items()
    )
    wrong = [
        f"{record.name}: base {partner.dtype_and_shape}, aligned {record.dtype_and_shape}"
        + (f", vocab_size {_shown(sizes[0])} and {_shown(sizes[1])}" if is_embedding(record) else "")
        for partner, record in both
        if partner and not is_leftover(record) and not _are_alike(partner, record, sizes)
    ]
    if wrong:
        raise PairError(
            f"base and aligned are not a pair: shape or kind differs in {len(wrong)} of "
            f"{count_of(len(aligned.tensors), 'tensor')}{_size_differences(base, aligned)}; give two checkpoints of "
            "the same model",
            wrong,
        )


def _are_alike(base: TensorRecord, aligned: TensorRecord, sizes: tuple[set[int], set[int]]) -> bool:
    """Return whether two tensors can be extrapolated, or are both integers, which are copied.

    Another number of rows is accepted for a vocabulary only, and where each side's is what its own config says.

    Args:
        base: base's tensor.
        aligned: aligned's.
        sizes: the vocabulary sizes of both checkpoints, empty where a config has none.
    """
    if base.is_float != aligned.is_float:
        return False
    if not aligned.is_float:
        return True
    if base.shape == aligned.shape:
        return not any(_lacks_rows(record, known) for record, known in zip((base, aligned), sizes, strict=True))
    if not (base.grows_into(aligned) or aligned.grows_into(base)):
        return False
    agree = [record.shape[0] in known for record, known in zip((base, aligned), sizes, strict=True)]
    if is_embedding(aligned) or is_output(aligned):
        return all(each or not known for each, known in zip(agree, sizes, strict=True))
    return all(agree)


def _shown(sizes: set[int]) -> str:
    return " or ".join(map(shown, sorted(sizes))) or "unknown"


def _lacks_rows(record: TensorRecord, sizes: set[int]) -> bool:
    """Return whether the embedding of a language model has fewer rows than every vocabulary that its config names."""
    is_vocabulary = is_embedding(record) and is_in_language_part(record.name) and len(record.shape) == 2
    return is_vocabulary and bool(sizes) and record.shape[0] < min(sizes)


def _refuse_layouts(matching: Matching) -> None:
    """Applies with ``--unmatched copy`` too, which would silently copy these modules from aligned."""
    found = different_layouts(matching.only_base, matching.only_aligned)
    if found:
        raise PairError(
            f"{count_of(len(found), 'module is', 'modules are')} stored differently in base and in aligned (fused or "
            f"split, or under other names), the first {found[0]}; save both checkpoints in the same way, for example "
            "with one version of one library; --unmatched copy does not apply, because these modules would not be "
            "extrapolated",
            [str(layouts) for layouts in found],
        )


def _refuse_flat(side: Checkpoint) -> None:
    """FSDP keeps the parameters of a module in one vector, which only the model itself can take apart."""
    flat = next((name for name in side.tensors if name.endswith("_flat_param")), None)
    if flat:
        raise PairError(
            f"{side.operand} ({side.source.name}) holds flattened parameters of FSDP, the first {flat}; save it as a "
            "full state dict (FULL_STATE_DICT), or merge its parts with accelerate merge-weights"
        )


def _refuse_no_partners(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> None:
    """Applies with ``--unmatched copy`` too: with nothing to extrapolate, the served model would be aligned itself."""
    if matching.only_aligned and not any(matching.partners.values()):
        raise PairError(
            f"base and aligned share no tensor names ({len(base.tensors)} in base, {len(aligned.tensors)} in aligned); "
            "expected two checkpoints of the same model"
        )


def _refuse_untied_output(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> None:
    """A tied output is the embedding, so the two cannot be extrapolated differently."""
    outputs = [record for record in matching.only_base.values() if is_output(record)]
    is_all = len(outputs) == len(matching.only_base) and not matching.only_aligned
    same_head = base.config.get("architectures") == aligned.config.get("architectures")
    is_untied = ties_embeddings(base.config) is False and ties_embeddings(aligned.config) is not False
    if is_all and same_head and is_untied:
        raise PairError(
            f"base has an output of its own ({outputs[0].name} {list(outputs[0].shape)}, tie_word_embeddings false), "
            "but aligned ties its output to the embedding, so the extrapolated output could not be tied; give a base "
            "that is tied too, or let --unmatched copy ignore base's output"
        )


def _refuse_unmatched(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> None:
    details, summary = _unmatched(base, aligned, matching)
    raise PairError(f"{summary}; --unmatched copy copies those of aligned and ignores those of base", details)


def _unmatched(base: Checkpoint, aligned: Checkpoint, matching: Matching) -> tuple[list[str], str]:
    """Return a line for each tensor that one checkpoint lacks, and their sum in one line."""
    only_aligned, only_base = matching.only_aligned.values(), matching.only_base.values()
    details = [f"only in aligned: {record.name} {list(record.shape)}" for record in only_aligned]
    details += [f"only in base: {record.name} {list(record.shape)}" for record in only_base]
    return details, (
        f"{count_of(len(details), 'tensor is', 'tensors are')} in one checkpoint only ({len(only_aligned)} in aligned, "
        f"{len(only_base)} in base){_size_differences(base, aligned)}"
    )


def _size_differences(base: Checkpoint, aligned: Checkpoint) -> str:
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    sizes = {key: (base.config.get(key), aligned.config.get(key)) for key in keys}
    differences = {key: (one, other) for key, (one, other) in sizes.items() if one != other}
    return f" ({described(differences)})" if differences else ""
