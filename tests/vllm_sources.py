"""Does a vLLM have every name that we build on? Read off its sources, so that it need not run here.

``python -m tests.vllm_sources WHEEL_OR_FOLDER`` prints what is missing, one line each, and exits with 1 then.
"""

from __future__ import annotations

import ast
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from expo_serve.vllm_plugin.compat import MEMBERS, NAMES, places

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class Sources:
    """The Python sources of one vLLM.

    Args:
        root: the folder that holds the folder ``vllm``.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._trees: dict[Path, ast.Module] = {}

    def missing(self, names: Iterable[str] = NAMES, members_of: Mapping[str, tuple[str, ...]] = MEMBERS) -> list[str]:
        """One line for every name or member that is not there as we use it."""
        lines = [
            f"{name} ({' or '.join(places(name))})"
            for name in names
            if not any(self.find(place) for place in places(name))
        ]
        for place, members in members_of.items():
            found = self.find(place)
            lines += [f"{place}: {member}" for member in members if found is None or not self._has(found, member)]
        return lines

    def find(self, place: str) -> tuple[str, ast.AST] | None:
        """The module and node that define ``module:name`` or ``module:Class.Inner``, imports followed."""
        module, _, path = place.partition(":")
        first, *inner = path.split(".")
        found = self._top_level(module, first)
        for name in inner:
            found = found and next(((found[0], node) for node in _body(found[1]) if _defines(node, name)), None)
        return found

    def _top_level(
        self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> tuple[str, ast.AST] | None:
        tree = self._tree(module)
        if tree is None or (module, name) in seen:
            return None
        for node in _body(tree):
            if _defines(node, name):
                return module, node
        for importing in ast.walk(tree):
            for alias in importing.names if isinstance(importing, ast.ImportFrom) else ():
                if (alias.asname or alias.name) == name and isinstance(importing, ast.ImportFrom):
                    return self._top_level(self._absolute(module, importing), alias.name, seen | {(module, name)})
        return self._by_package_table(module, name, tree, seen)

    def _by_package_table(
        self, module: str, name: str, tree: ast.Module, seen: frozenset[tuple[str, str]]
    ) -> tuple[str, ast.AST] | None:
        """Packages that import lazily keep a table from names to places: ``{"Name": ".module:Name"}``."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
                        inner, _, there = str(value.value).partition(":")
                        return self._top_level(f"{module}{inner}", there or name, seen | {(module, name)})
        return None

    def _has(self, found: tuple[str, ast.AST], member: str) -> bool:
        module, node = found
        name, _, parameters = member.rstrip(")").partition("(")
        wanted = tuple(part.strip() for part in parameters.split(",") if part.strip())
        if not name:
            return isinstance(node, _Function) and _takes(node, wanted)
        for _, holder in self._with_bases(module, node):
            for child in _members(holder):
                if _defines(child, name):
                    return "(" not in member or (isinstance(child, _Function) and _takes(child, wanted))
        return False

    def _with_bases(self, module: str, node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
        yield module, node
        for base in node.bases if isinstance(node, ast.ClassDef) else ():
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name) and (found := self._top_level(module, base.id)):
                yield from self._with_bases(*found)

    def _tree(self, module: str) -> ast.Module | None:
        stem = self._root / Path(*module.split("."))
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                if file not in self._trees:
                    self._trees[file] = ast.parse(file.read_text())
                return self._trees[file]
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = (self._root / Path(*module.split(".")) / "__init__.py").is_file()
        parts = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
        return ".".join([*parts, *([node.module] if node.module else [])])


def _body(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a module or class, those under ``if`` and ``try`` too."""
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.If, ast.Try)):
            yield from _body(child)
            yield from child.orelse
        else:
            yield child


def _members(node: ast.AST) -> Iterator[ast.AST]:
    """What a class defines, and what its methods set on ``self``."""
    for child in _body(node):
        yield child
        if isinstance(child, _Function):
            yield from (inner for inner in ast.walk(child) if isinstance(inner, (ast.Assign, ast.AnnAssign)))


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, (*_Function, ast.ClassDef)):
        return node.name == name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(
        (isinstance(target, ast.Name) and target.id == name)
        or (isinstance(target, ast.Attribute) and target.attr == name and getattr(target.value, "id", "") == "self")
        for target in targets
    )


def _takes(function: ast.AST, wanted: tuple[str, ...]) -> bool:
    """Whether a function can be called with these and no others."""
    assert isinstance(function, _Function)
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    optional = names[len(names) - len(given.defaults) :]
    return tuple(names[: len(wanted)]) == wanted and set(names[len(wanted) :]) <= set(optional)


def main(path: str) -> int:
    """Check a wheel or a folder; what is missing goes to standard output."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(path)
        if root.is_file():
            with zipfile.ZipFile(root) as wheel:
                wheel.extractall(scratch, [name for name in wheel.namelist() if name.endswith(".py")])
            root = Path(scratch)
        missing = Sources(root).missing()
    for line in missing:
        print(f"missing: {line}")
    print(f"{path}: {len(missing)} missing of {len(NAMES) + sum(map(len, MEMBERS.values()))}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
