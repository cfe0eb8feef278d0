"""Pairs names that two versions of a library give to the same tensors: as it saves them, and as it has them in memory.

A multimodal model wraps a language model, and the wrappers were renamed more than once: what is
``language_model.model.layers.0`` in a checkpoint is ``model.language_model.layers.0`` in memory, where PEFT takes the
names of an adapter from, and ``model.layers.0`` in the language model alone. Two rules pair such names:

- the wrappers around the language part are left out of the comparison, those around a tower are not. This is what all
  ``_checkpoint_conversion_mapping`` attributes of transformers 4 come to;
- the renamings that transformers 5 applies to a checkpoint's names when it loads one
  (:mod:`expo_serve.plan.conversion_table`).

Nothing is guessed: a name that could mean several tensors, or that another name means too, is not paired.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import takewhile

from expo_serve.checkpoint.records import JsonObject
from expo_serve.plan.conversion_table import NO_CONVERSION, Conversion, read_conversion

_LANGUAGE_WRAPPERS = frozenset({"model", "language_model", "text_model", "llm"})
"""Modules around a language model (or a whole model) in transformers, vLLM, and code that is published with models."""
_LANGUAGE_MODULES = frozenset(
    {"decoder", "embed_tokens", "final_layernorm", "h", "layers", "lm_head", "ln_f", "norm", "transformer", "wte"}
)
"""What a language model holds at its top."""
_TOWER_WRAPPER = re.compile(r"^(vision_tower)\.vision_model\.")
"""A tower's own wrapper, which transformers 5 removed from its vision models (``PrefixChange`` in its table)."""

Rename = Callable[[str], str]
Candidates = dict[str, dict[str, None]]
"""Names to the tensors of base that each can mean, in order."""


def only_pairs(candidates: Candidates) -> dict[str, str]:
    """Return base's name for each name that can mean exactly one tensor, which no other name means."""
    single = {name: next(iter(others)) for name, others in candidates.items() if len(others) == 1}
    uses = Counter(single.values())
    return {name: other for name, other in single.items() if name == other or uses[other] == 1}


def find_candidates(
    names: Collection[str], base: Collection[str], config: JsonObject, prefixed: Mapping[str, str]
) -> Candidates:
    """Find the tensors of base that each name can mean: the one of the same name, where base has it.

    Args:
        names: the tensors of an adapter, a delta or an aligned checkpoint.
        base: base's names.
        config: base's config, which gives the type of the model.
        prefixed: base's names for those that one prefix pairs.
    """
    conversion = read_conversion(config)

    def as_loaded(name: str) -> str:
        return conversion.rename_part(bare_name(conversion.rename(name)))

    # Either side can be the one that has the names in memory, which a renaming must not touch again.
    readings = [(bare_name, _by_key(base, bare_name))]
    if conversion is not NO_CONVERSION:
        readings += [(bare_name, _by_key(base, as_loaded)), (as_loaded, readings[0][1])]
    found = {name: {name: None} if name in base else _candidates(name, readings, conversion) for name in names}
    for name, candidates in found.items():
        if name not in base and name in prefixed:
            candidates[prefixed[name]] = None
    _add_towers(found, base, prefixed)
    return found


def bare_name(name: str) -> str:
    """Return a name without the wrappers around the language part or the whole model."""
    parts = name.split(".")
    wrappers = list(takewhile(_LANGUAGE_WRAPPERS.__contains__, parts[:-1]))
    return _TOWER_WRAPPER.sub(r"\1.", ".".join(parts[len(wrappers) :]))


def is_in_language_part(name: str) -> bool:
    """Return whether a tensor of a multimodal model belongs to its language model, by what follows the wrappers."""
    return bare_name(name).split(".")[0] in _LANGUAGE_MODULES


def _by_key(names: Iterable[str], rename: Rename) -> dict[str, list[str]]:
    keys: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        keys[rename(name)].append(name)
    return dict(keys)


def _add_towers(found: Candidates, base: Iterable[str], prefixed: Mapping[str, str]) -> None:
    """Add all tensors of the same ending to a name without a wrapper: ``layers.0`` may be that of a tower alone."""
    bare = {name for name, others in found.items() if others and name not in prefixed and bare_name(name) == name}
    for other in base if bare else ():
        end = other.find(".") + 1
        while end:
            if other[end:] in bare:
                found[other[end:]][other] = None
            end = other.find(".", end) + 1


def _candidates(
    name: str, readings: Iterable[tuple[Rename, Mapping[str, list[str]]]], conversion: Conversion
) -> dict[str, None]:
    found = (other for rename, keys in readings for other in keys.get(rename(name), ()))
    return {other: None for other in found if not conversion.changes_values(name, other)}


def stored_instead(name: str, base: Iterable[str]) -> tuple[str, list[str]] | None:
    """Find what base stores in the place of a module that it lacks, in the same layer.

    Args:
        name: the name of a tensor that no tensor of base is paired with.
        base: base's names.

    Returns:
        The innermost module around it that base has too, and the names that base has there; None if base has not even
        the layer.
    """
    keys = list(dict.fromkeys(map(bare_name, base)))
    module = bare_name(name).removesuffix(".weight")
    while (module := module.rpartition(".")[0]) and any(part.isdigit() for part in module.split(".")):
        inside = [key.removeprefix(f"{module}.") for key in keys if key.startswith(f"{module}.")]
        if inside:
            return module, list(dict.fromkeys(key.split(".")[0] for key in inside))
    return None


def same_ending(name: str, base: Iterable[str]) -> str | None:
    """Return a tensor of base that ends as a name does from the number of its layer on: one with another name."""
    parts = name.split(".")
    start = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    ending = "." + ".".join(parts[start:])
    return next((other for other in base if start is not None and other.endswith(ending)), None)
