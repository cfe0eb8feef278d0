"""Modules whose weights the two sides store in different ways: fused against split, or under other names.

The rule knows no layer: below one module, what only base has and what only aligned has are the same
weights when they hold the same number of elements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from expo_serve.checkpoint.records import TensorRecord

Tensors = Mapping[str, TensorRecord]


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
