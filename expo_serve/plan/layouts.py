"""Finds the modules that two checkpoints store differently: fused against split, or under other names."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from expo_serve.plan.matching import Tensors


@dataclass(frozen=True)
class Layouts:
    """How both checkpoints store one module: the names of its tensors."""

    module: str
    base: list[str]
    aligned: list[str]

    def __str__(self) -> str:
        names = f"{self._shorten(self.base)} in base, {self._shorten(self.aligned)} in aligned"
        return f"{self.module or 'the model'}: {names}"

    def _shorten(self, names: list[str]) -> str:
        below = [name.removeprefix(f"{self.module}.") for name in names]
        more = f" and {len(below) - 3} more" if len(below) > 3 else ""
        return " + ".join(below[:3]) + more


def different_layouts(only_base: Tensors, only_aligned: Tensors) -> list[Layouts]:
    """Find the modules that both checkpoints have but store differently: fused against split, or under other names.

    The rule knows no layer: the tensors of a module that only base has and those that only aligned has are the same
    weights if they have the same number of elements. The innermost module for which this holds is reported.

    Args:
        only_base: base's tensors without a partner, by the names that aligned would have for them.
        only_aligned: aligned's tensors without a partner.
    """
    settled: set[str] = set()
    found = []
    for module, (base, aligned) in _modules(only_base, only_aligned):
        same = _same_weights(
            {name: only_base[name] for name in base if name not in settled},
            {name: only_aligned[name] for name in aligned if name not in settled},
        )
        if same and (module or len(same[0]) + len(same[1]) > 2):  # two single tensors are no layout
            found.append(Layouts(module, *same))
            settled.update(*same)
    position = {name: number for number, name in enumerate(only_aligned)}
    return sorted(found, key=lambda layouts: position[layouts.aligned[0]])


def _modules(only_base: Tensors, only_aligned: Tensors) -> list[tuple[str, tuple[list[str], list[str]]]]:
    """Return every module with the names of its tensors in base and in aligned, the innermost module first."""
    modules: defaultdict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for index, tensors in enumerate((only_base, only_aligned)):
        for name in tensors:
            for module in _enclosing(name):
                modules[module][index].append(name)
    return sorted(modules.items(), key=lambda item: item[0].count(".") + bool(item[0]), reverse=True)


def _enclosing(name: str) -> list[str]:
    """Return the modules around a tensor: ``""`` (the model), ``a`` and ``a.b`` for ``a.b.weight``, none for ``a``."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))] if len(parts) > 1 else []


def _same_weights(base: Tensors, aligned: Tensors) -> tuple[list[str], list[str]] | None:
    """Return the names that have the same number of elements in both: those of all tensors, of matrices or of vectors.

    Other tensors that only one checkpoint has, such as the scale of a norm, are most often of the other rank.
    """
    for are_matrices in ((True, False), (True,), (False,)):
        chosen = [
            {name: record for name, record in tensors.items() if (len(record.shape) > 1) in are_matrices}
            for tensors in (base, aligned)
        ]
        totals = [sum(record.numel for record in tensors.values()) for tensors in chosen]
        if all(chosen) and totals[0] == totals[1]:
            return list(chosen[0]), list(chosen[1])
    return None
