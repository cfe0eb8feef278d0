"""The names under which transformers loads a checkpoint's tensors, from its table of conversions.

The table is ``transformers/conversion_mapping.py`` (transformers 5; transformers 4 has none): lists of
``WeightRenaming`` and others by class or ``model_type``. The file is read as data and never run: importing it imports
torch, which takes seconds, and a plan is made without it. What a renaming means is described by ``WeightTransform`` in
``transformers/core_model_loading.py``.

Only renamings are used. Conversions that split, merge or turn tensors are known so that nothing is paired across them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from expo_serve.checkpoint.records import JsonObject
from expo_serve.plan.names import LANGUAGE_PARTS

_FILE = "conversion_mapping.py"
_ALIASES = "_MODEL_TO_CONVERSION_PATTERN"
_BUILDER = "_build_checkpoint_conversion_mapping"
_LOOK_AROUND = re.compile(r"\(\?.+?\)?\)")


@dataclass(frozen=True)
class Entry:
    """One element of a list of the table: the patterns before and after, each one or several."""

    kind: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]


Table = Mapping[str, tuple[Entry, ...]]


@dataclass(frozen=True)
class Renaming:
    """A pattern that is searched in a name, and what replaces what it found; ``\\1`` is its first group."""

    pattern: re.Pattern[str]
    replacement: str

    def apply(self, name: str) -> str:
        """Return the name with the first match replaced, as ``WeightTransform.rename_source_key`` does."""
        match = self.pattern.search(name)
        if not match:
            return name
        replacement = self.replacement.replace(r"\1", match[1]) if r"\1" in self.replacement else self.replacement
        return name.replace(match[0], replacement, 1)


@dataclass(frozen=True)
class Conversion:
    """What transformers does to the tensors of one type of model."""

    renamings: tuple[Renaming, ...] = ()
    of_language_part: tuple[Renaming, ...] = ()
    value_changes: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...] = ()
    """Patterns of names before and after a conversion that is more than a renaming."""

    def rename(self, name: str) -> str:
        """Return the name in memory for one in a checkpoint, as far as the whole model's renamings say."""
        return _apply(self.renamings, name)

    def rename_part(self, name: str) -> str:
        """Apply the renamings of the language part to a name within it."""
        return _apply(self.of_language_part, name)

    def changes_values(self, one: str, other: str) -> bool:
        """Return whether two names stand on both sides of a conversion, so that their values may differ."""
        return any(
            (before.search(one) and after.search(other)) or (before.search(other) and after.search(one))
            for before, after in self.value_changes
        )


NO_CONVERSION = Conversion()


def _apply(renamings: tuple[Renaming, ...], name: str) -> str:
    for renaming in renamings:
        name = renaming.apply(name)
    return name


def read_conversion(config: JsonObject) -> Conversion:
    """Look a model up in the table of the installed transformers, by its class, then by its type.

    Returns:
        Its conversion; :data:`NO_CONVERSION` if the table does not have the model, or cannot be read.
    """
    table = read_table()
    part = next((part for key in LANGUAGE_PARTS if isinstance(part := config.get(key), dict)), {})
    whole, language = (_look_up(table, values) for values in (config, part))
    try:
        conversion = Conversion(
            tuple(_renamings(whole)), tuple(_renamings(language)), tuple(_value_changes((*whole, *language)))
        )
    except (re.error, IndexError):
        return NO_CONVERSION
    return NO_CONVERSION if conversion == NO_CONVERSION else conversion


def _look_up(table: Table, config: JsonObject) -> tuple[Entry, ...]:
    architectures = config.get("architectures")
    keys = (*(architectures if isinstance(architectures, list) else ()), config.get("model_type"))
    return next((table[key] for key in keys if isinstance(key, str) and key in table), ())


def _renamings(entries: tuple[Entry, ...]) -> Iterator[Renaming]:
    for entry in entries:
        if entry.kind == "WeightRenaming":
            source, target = entry.sources[0], entry.targets[0]
            source = f"^{source}" if target.startswith("^") and not source.startswith("^") else source
            source = f"{source}$" if target.endswith("$") and not source.endswith("$") else source
            yield Renaming(_compiled(source), _plain(target))


def _plain(target: str) -> str:
    """Return the text that a target pattern stands for, as ``process_target_pattern`` does."""
    return _LOOK_AROUND.sub("", target.removeprefix("^").removesuffix("$")).replace(r"\.", ".")


def _value_changes(entries: tuple[Entry, ...]) -> Iterator[tuple[re.Pattern[str], re.Pattern[str]]]:
    for entry in entries:
        if entry.kind == "WeightConverter":
            yield _any_of(entry.sources), _any_of(entry.targets)


def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return _compiled("|".join(pattern.removeprefix("^").removesuffix("$") for pattern in patterns))


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace("*.", r".*\."))


@cache
def read_table() -> Table:
    """Read the table of the installed transformers, without importing it.

    Returns:
        The lists by class or type; those that hold anything else than plain renamings and conversions are left out. The
        table is empty if transformers is not installed or has no such file.
    """
    spec = find_spec("transformers")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    for folder in folders:
        try:
            return table_in(ast.parse((Path(folder) / _FILE).read_text(encoding="utf-8")))
        except (OSError, SyntaxError, ValueError):
            continue
    return {}


def table_in(module: ast.Module) -> Table:
    """Read the table from the syntax tree of the file."""
    table: dict[str, tuple[Entry, ...]] = {}
    aliases: dict[str, str] = {}
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == _BUILDER:
            for inner in statement.body:
                _read_statement(inner, table)
        elif isinstance(statement, ast.Assign) and _name(statement.targets[0]) == _ALIASES:
            aliases.update(_strings(statement.value))
    return {**{alias: table[key] for alias, key in aliases.items() if key in table}, **table}


def _read_statement(statement: ast.stmt, table: dict[str, tuple[Entry, ...]]) -> None:
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict) and _name(statement.targets[0]):
        for key, value in zip(statement.value.keys, statement.value.values, strict=True):
            _store(key, value, table)
    elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Subscript):
        _store(statement.targets[0].slice, statement.value, table)
    elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Subscript):
        _store(statement.target.slice, ast.BinOp(statement.target, ast.Add(), statement.value), table)


def _store(key: ast.expr | None, value: ast.expr, table: dict[str, tuple[Entry, ...]]) -> None:
    """Store one list; one that cannot be read is left out, so that no half of it is applied."""
    if not isinstance(key, ast.Constant):
        return
    try:
        table[str(key.value)] = tuple(_entries(value, table))
    except ValueError:
        table.pop(str(key.value), None)


def _entries(node: ast.expr, table: Table) -> Iterator[Entry]:
    """Yield the elements of a list, of a copy of another list, or of a sum of both.

    Raises:
        ValueError: it is none of these, or an element is of another kind.
    """
    if isinstance(node, ast.List):
        yield from map(_entry, node.elts)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _entries(node.left, table)
        yield from _entries(node.right, table)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "copy":
        yield from _entries(node.func.value, table)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and str(node.slice.value) in table:
        yield from table[str(node.slice.value)]
    else:
        raise ValueError(ast.dump(node))


def _entry(node: ast.expr) -> Entry:
    kind = _name(node.func) if isinstance(node, ast.Call) else ""
    if not isinstance(node, ast.Call) or kind not in ("WeightRenaming", "WeightConverter", "PrefixChange"):
        raise ValueError(ast.dump(node))
    if kind == "PrefixChange":  # of a wrapper
        return Entry(kind, (), ())
    given = dict(zip(("source_patterns", "target_patterns"), node.args, strict=False))
    given.update({keyword.arg: keyword.value for keyword in node.keywords if keyword.arg})
    sources, targets = (_texts(given.get(key)) for key in ("source_patterns", "target_patterns"))
    is_plain = len(sources) == len(targets) == 1 and r"\1" not in sources[0] and "(" not in _plain(targets[0])
    if kind == "WeightRenaming" and not is_plain:
        raise ValueError(ast.dump(node))
    return Entry(kind, sources, targets)


def _texts(node: ast.expr | None) -> tuple[str, ...]:
    """Return a text, or those of a list.

    Raises:
        ValueError: it is neither.
    """
    value = ast.literal_eval(node) if node else None
    texts = tuple(value) if isinstance(value, list) else (value,)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{value!r} is no pattern")
    return texts


def _strings(node: ast.expr) -> dict[str, str]:
    value = ast.literal_eval(node)
    return {str(key): str(other) for key, other in value.items()} if isinstance(value, dict) else {}


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""
