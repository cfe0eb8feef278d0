"""Changes real files at random, each at the level of its format: what follows the format's rules gets far in."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import yaml

from expo_serve.cli.options import _Loader
from expo_serve.plan.packed_format import _KEYS, _digest
from loadtests import fuzz_pickle
from loadtests.fuzz_pickle import change_bytes

Change = Callable[[bytes, random.Random], bytes]
_LENGTH_BYTES = 8
_DEEP = "\0deep"
NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 7, 8, 16, 64, 255, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308,
    float("inf"), float("nan"), True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "\n", "a\nb", "\x1b[31mred\x1b[0m", "\x85", "\u2028", "\u202e", "\ud800", "é", "鍵", "%s",
    "{}", "{0.a}", "..", ".", "/", "../x", "/etc/passwd", "a/b", "a\\b", "x" * 256, "y" * 3000, "z" * 70_000,
    "9" * 5000, "1e5", "NaN",
    "null", "~", "~nobody", "[red]", "[/]", "BF16", "F32", "I64", "U8", "F8_E4M3", "F4", "BOOL", "LORA", "gptq",
    "model.safetensors", "__metadata__", f"model.layers.{'9' * 5000}.mlp.up_proj.weight",
    "model.layers.99999999999999999999.mlp.up_proj.weight", "model.layers.².x.weight", "model.layers.0.mtp.x.weight",
    "(" * 900, "(" * 300 + ")" * 300, "a{99999999999999}", "a{1,65535}b", "(?i", "(?P<a>x)(?P=a)", "[", "\\",
    "x*" * 400,
    ".*.*.*.*.*.*.*.*.*.*.*.*=", "(a|b|ab)?" * 100, "(?=a)*", "\\Z\\Z", "^^", "()", "a??b",
)  # fmt: skip
_DEPTHS = (2, 20, 90, 300, 900, 950, 960, 970, 975, 980, 985, 990, 995, 1000, 3000, 100_000)


def change_json(content: bytes, chance: random.Random) -> bytes:
    """Change values, keys, order or depth of a JSON document; now and then its text."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return change_bytes(content, chance)
    if chance.random() < 0.1:
        return change_bytes(content, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        tree = _changed_tree(tree, chance)
    return _text(tree, chance)


def _text(tree: Any, chance: random.Random) -> bytes:
    try:
        text = json.dumps(tree, ensure_ascii=chance.random() < 0.5)
    except (ValueError, RecursionError):
        return b"{}"
    depth = chance.choice(_DEPTHS)
    start, end = chance.choice((("[", "]"), ('{"a":', "}"), ('["b",', "]")))
    text = text.replace(json.dumps(_DEEP), start * depth + "1" + end * depth).replace(f'"{_DEEP}"', "1" * 5000)
    if chance.random() < 0.05 and '": ' in text:  # the same key once more
        key, _, rest = text.partition('": ')
        text = f'{key}": 1, {key[key.rfind(chr(34)) :]}": {rest}'
    return text.encode(errors="surrogatepass" if chance.random() < 0.5 else "replace")


def _changed_tree(tree: Any, chance: random.Random) -> Any:
    places = list(_places(tree))
    if not places:
        return odd_value(tree, chance)
    holder, key = chance.choice(places)
    kind = chance.randrange(10)
    if kind < 5:
        holder[key] = odd_value(tree, chance)
    elif kind == 5:
        del holder[key]
    elif kind == 6:
        holder[key] = [holder[key]] if chance.random() < 0.5 else {"a": holder[key]}
    elif isinstance(holder, dict):
        name = _odd_text(tree, chance)
        holder[name] = holder.pop(key) if kind < 9 else odd_value(tree, chance)
    elif kind < 9:
        holder.insert(key, holder[key])
    else:
        holder.append(odd_value(tree, chance))
    return tree


def _places(tree: Any, depth: int = 0) -> Any:
    """Yield each container and key of a tree."""
    if depth > 50 or not isinstance(tree, dict | list):
        return
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        yield from _places(tree[key], depth + 1)


def odd_value(tree: Any, chance: random.Random) -> Any:
    """Return a value of any kind, most often one that some reader takes for another."""
    match chance.randrange(9):
        case 0 | 1:
            return chance.choice(NUMBERS)
        case 2 | 3:
            return _odd_text(tree, chance)
        case 4:
            return chance.choice((None, [], {}, [[]], [None], {"": None}, [0] * 65, [1] * 3000, ["x"] * 200))
        case 5:
            return _DEEP
        case 6:
            return [odd_value(tree, chance) for _ in range(chance.randrange(4))]
        case 7:
            return {_odd_text(tree, chance): odd_value(tree, chance) for _ in range(chance.randrange(4))}
    places = list(_places(tree))
    holder, key = chance.choice(places) if places else ([0], 0)
    return json.loads(json.dumps(holder[key]))


def _odd_text(tree: Any, chance: random.Random) -> str:
    """Return an odd text, or a key or text of the tree itself: the names that the format knows."""
    own = [key for holder, key in _places(tree) if isinstance(holder, dict)]
    own += [holder[key] for holder, key in _places(tree) if isinstance(holder[key], str)]
    if own and chance.random() < 0.4:
        text: str = chance.choice(own)
        return text if chance.random() < 0.6 else text + chance.choice(TEXTS)
    return chance.choice(TEXTS)


def _split(content: bytes) -> tuple[bytes, bytes]:
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    return content[_LENGTH_BYTES:end], content[end:]


def joined(header: bytes, data: bytes) -> bytes:
    """Return a safetensors file."""
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header + data


def change_safetensors(content: bytes, chance: random.Random) -> bytes:
    """Change the header, with a length that fits; now and then the data, or bytes anywhere."""
    if chance.random() < 0.15:
        return change_bytes(content, chance)
    header, data = _split(content)
    header = (_renamed if chance.random() < 0.5 else change_json)(header, chance)
    if chance.random() < 0.1:
        data = change_bytes(data, chance)
    return joined(header, data)


def _renamed(header: bytes, chance: random.Random) -> bytes:
    """Change names, dtypes and shapes so that the file still follows the format."""
    try:
        tree = json.loads(header)
        names = [name for name, entry in tree.items() if isinstance(entry, dict) and "shape" in entry]
        name = chance.choice(names)
        entry = tree[name]
        match chance.randrange(4):
            case 0:
                tree = {(_odd_text(tree, chance) if key == name else key): value for key, value in tree.items()}
            case 1:
                other = chance.choice(names)
                ends = {name: tree[other], other: tree[name]}
                tree = {key: ends.get(key, value) for key, value in tree.items()}
            case 2:
                sizes = entry["shape"]
                entry["shape"] = chance.choice((sizes[::-1], [*sizes, 1], [1, *sizes], [_product(sizes)], []))
            case _:
                entry["dtype"] = chance.choice(("BF16", "F16", "I16", "U16", "F8_E4M3", "U8"))
    except (ValueError, RecursionError, TypeError, AttributeError, IndexError, KeyError):
        return change_json(header, chance)
    return _text(tree, chance)


def _product(sizes: list[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def change_packed(content: bytes, chance: random.Random) -> bytes:
    """Change the metadata of a packed delta and sign it again; else as any safetensors file."""
    header, data = _split(content)
    try:
        tree = json.loads(header)
        metadata = tree["__metadata__"]
        key = chance.choice(("files", "block", "base", "tensors", "tensors", "tensors"))
        metadata[key] = change_json(str(metadata[key]).encode(errors="surrogatepass"), chance).decode(errors="replace")
        if chance.random() < 0.2:
            metadata[key] = chance.choice(TEXTS)
        metadata["checksum"] = _digest(tuple(str(metadata.get(one, "")) for one in _KEYS))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return change_safetensors(content, chance)
    if chance.random() < 0.3:
        return change_safetensors(content, chance)
    return joined(_text(tree, chance), data)


_SNIPPETS = (
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "<<: {base: x}\n", "? [a, b]\n: c\n", "1: 2\n", "null: x\n",
    *(f"alpha: {value}\n" for value in ("!!python/object:os.system x", "0x" + "f" * 5000, "9" * 5000, "1:30:00")),
    *(f"alpha: {value}\n" for value in ("2001-99-99", "!!binary x", "!!set {a, b}", "&r [*r]", "1_0", "~", "[1]")),
    "base: &r {x: *r}\n", "--- \n---\n", "%YAML 9.9\n---\n", "\ufeff", "\t", "\0", "\x85",
    "base: !!timestamp 2001-01-01\n",
    f"alpha-rule: ['(=1', '{'(' * 600}=1']\n", f"alpha-rule: '{'(' * 400}{')' * 400}=1'\n",
    "alpha-rule: 'a{99999999999999}=1'\n",
    "alpha-rule: {pattern: x, alpha: 1}\n", f"rounding-seed: 0x{'f' * 5000}\n", f"rounding-seed: '{'1' * 5000}'\n",
    "base: ''\n", 'base: "\\ud800"\n', 'base: "a\\0b"\n', "base: ~nobody/x\n", "allow: [x]\n", "pair: x\n",
)  # fmt: skip
_DOUBLED = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30)), "alpha: *a29", ""]
)
_MERGED = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 24)), "<<: *a23", ""]
)
_NESTED = tuple("alpha: " + "[" * depth + "]" * depth + "\n" for depth in (50, 150, 300, 1000))


def change_yaml(content: bytes, chance: random.Random) -> bytes:
    """Change values and keys of a YAML document, or put odd YAML among its lines."""
    if chance.random() < 0.1:
        return change_bytes(content, chance)
    if chance.random() < 0.5:
        lines = content.decode(errors="replace").splitlines(keepends=True)
        snippet = chance.choice((*_SNIPPETS, *_SNIPPETS, *_SNIPPETS, _DOUBLED, _MERGED, *_NESTED))
        at = chance.randrange(len(lines) + 1)
        key = snippet.partition(":")[0]
        kept = [line for line in lines if not line.startswith(f"{key}:")]
        return "".join([*kept[:at], snippet, *kept[at:]]).encode(errors="surrogatepass")
    try:
        tree = yaml.load(content, _Loader)  # which refuses what aliases make endless
        for _ in range(chance.choice((1, 1, 2, 3))):
            tree = _changed_tree(tree, chance)
        text: str = yaml.safe_dump(tree, allow_unicode=chance.random() < 0.5)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        return change_bytes(content, chance)
    return text.encode(errors="surrogatepass")


def change_pickle(content: bytes, chance: random.Random) -> bytes:
    """Change bytes, opcodes or the zip archive of a PyTorch file."""
    try:
        return fuzz_pickle.LEVELS[chance.choice(list(fuzz_pickle.LEVELS))](content, chance)
    except Exception:  # noqa: BLE001 - what was changed before is no archive any more
        return change_bytes(content, chance)


CHANGES: dict[str, Change] = {
    "safetensors": change_safetensors,
    "full delta": change_safetensors,
    "adapter": change_safetensors,
    "packed delta": change_packed,
    "yaml": change_yaml,
    "pickle": change_pickle,
}
"""By format; all others are JSON."""
