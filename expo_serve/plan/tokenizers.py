"""Checks the tokenizer that a result is served with: whether it is there, and whether both sides mean the same tokens.

Reads JSON files only; a vocabulary in another format is not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from expo_serve.checkpoint.links import check_inside, is_file
from expo_serve.config import Source
from expo_serve.errors import CheckpointError, count_of
from expo_serve.plan.plan import Plan
from expo_serve.shown import shown

_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model*", "tokenizer.mm.model*", "tekken.json", "*.tiktoken", "tiktoken.model",
    "vocab.json", "vocab.txt", "*.spm", "spiece.model", "sentencepiece*.model", "*.vocab",
)  # fmt: skip
"""Files that hold the tokens themselves, by the names of transformers and vLLM."""
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that a tokenizer needs beside its tokens, and that are no tokenizer alone."""
_SHOWN = 10
_MAX_BYTES = 256 * 2**20


def tokenizer_problem(plan: Plan) -> str | None:
    """Return what is wrong with the tokenizer of a result, in one line that begins with its side; None if it is whole.

    Args:
        plan: names the folder that it is served from.
    """
    source = plan.tokenizer or plan.model
    if has_vocabulary(source):
        return None
    side = next((operand for operand, there in plan.sources.items() if there == source), "the model")
    settings = [name for name in _SETTINGS if is_file(Path(source.path, name))]
    if not settings:
        return f"{side}: {source.name} has no tokenizer; copy it into that folder"
    return (
        f"{side}: {source.name} holds half a tokenizer ({', '.join(settings)} without the tokens); copy the whole "
        "tokenizer into that folder" + (", or remove the rest of it to use that of base" if plan.tokenizer else "")
    )


def all_warnings(plan: Plan) -> list[str]:
    """Return the warnings of a plan, and what is wrong with its tokenizer; a server refuses that."""
    problem = tokenizer_problem(plan)
    return [*plan.warnings, *([problem] if problem else [])]


def has_vocabulary(source: Source) -> bool:
    """Return whether a source holds a tokenizer's tokens, or the code of a tokenizer of its own."""
    folder = Path(source.path)
    files = [file for file in folder.glob("*") if is_file(file)]
    if any(fnmatchcase(file.name, pattern) for file in files for pattern in _VOCABULARIES):
        return True
    settings = _read("tokenizer_config.json", source)
    code = settings.get("auto_map") if isinstance(settings, dict) else None
    return isinstance(code, dict) and "AutoTokenizer" in code and any(file.suffix == ".py" for file in files)


def vocabulary_warnings(base: Source, other: Source) -> Iterator[str]:
    """Warn of token ids that mean different tokens on the two sides: their embeddings are extrapolated all the same.

    Args:
        base: the side before alignment.
        other: the side whose tokenizer the result is served with.
    """
    if (whole := _bytes("tokenizer.json", base)) and whole == _bytes("tokenizer.json", other):
        return  # as most often; reading the tokens of a large vocabulary takes a while
    ours, theirs = _tokens(base), _tokens(other)
    different = [number for number in sorted(ours.keys() & theirs.keys()) if ours[number] != theirs[number]]
    if different:
        examples = ", ".join(
            f"{shown(number)}: {shown(ours[number])} and {shown(theirs[number])}" for number in different[:_SHOWN]
        )
        yield (
            f"{count_of(len(different), 'token id means', 'token ids mean')} one token in base and another one beside "
            f"it; are these the tokenizers of one model? ({examples}{', ...' if len(different) > _SHOWN else ''})"
        )


def _tokens(source: Source) -> dict[int, str]:
    """Return the tokens of a source's tokenizer by their ids; empty where no JSON file has them."""
    whole = _read("tokenizer.json", source)
    if not isinstance(whole, dict):
        return _by_id(_read("vocab.json", source))
    model = whole.get("model")
    found = _by_id(model.get("vocab")) if isinstance(model, dict) else {}
    added = whole.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(number := token.get("id"), int):
            found[number] = _text(token.get("content"))
    return found


def _by_id(vocabulary: object) -> dict[int, str]:
    """Return the tokens of a mapping to ids (BPE, WordPiece) or of a list of pairs with a score (Unigram)."""
    if isinstance(vocabulary, dict):
        return {number: token for token, number in vocabulary.items() if isinstance(number, int)}
    if isinstance(vocabulary, list):
        return {number: _text(item[0]) for number, item in enumerate(vocabulary) if isinstance(item, list) and item}
    return {}


def _text(token: object) -> str:
    """Return a token's text; for what is no text, something that tells it from others."""
    return token if isinstance(token, str) else shown(token)


def _read(name: str, source: Source) -> object:
    """Return the content of a JSON file; None where it cannot be read: whoever needs the file says so."""
    try:
        content: object = json.loads(_bytes(name, source) or b"null")
    except (ValueError, RecursionError):
        return None
    return content


def _bytes(name: str, source: Source) -> bytes | None:
    """Return the bytes of a file of the source; None where it has none that can be read."""
    file = Path(source.path, name)
    try:
        check_inside(file, source)
        return file.read_bytes() if file.stat().st_size <= _MAX_BYTES else None
    except (OSError, CheckpointError):
        return None
