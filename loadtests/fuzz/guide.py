"""Coverage-guided fuzzing where atheris is installed (``pip install atheris``), else the same changes without a guide.

atheris is libFuzzer for Python: what reaches new lines of the package is kept and changed further. It ends the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

INSTRUMENTED = ("expo_serve.checkpoint", "expo_serve.plan", "expo_serve.config", "expo_serve.cli")
MAX_BYTES = 512 * 2**10
"""Of a changed file."""
_SHARE_FOUND = 0.6
"""Of what is changed; the rest are real files, since libFuzzer keeps small ones, most of them broken."""
_STACKED = (1, 1, 1, 2, 3)
Change = Callable[[bytes, random.Random], bytes]


def engine() -> str:
    """Return what guides, for the results."""
    is_there = importlib.util.find_spec("atheris") is not None
    return f"atheris {metadata.version('atheris')}" if is_there else "not guided by coverage"


def _atheris() -> Any:
    return importlib.import_module("atheris") if importlib.util.find_spec("atheris") else None


@contextmanager
def instrumented() -> Iterator[None]:
    """Have the package's modules that are imported within report what they reach."""
    if not (atheris := _atheris()):
        yield
        return
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        yield


def fuzz(
    one: Callable[[bytes], None], change: Change | None, seeds: list[bytes], corpus: Path, seconds: float, seed: int
) -> None:
    """Call ``one`` with changed data until the time is over.

    Args:
        one: takes the data.
        change: returns other data, of the same format; None for bytes without a format, which a strategy draws from.
        seeds: what is changed first; bytes of any content if there are none.
        corpus: folder of what reached something new; it is read, and added to.
        seconds: how long.
        seed: of the changes.
    """
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seeds or _random_seeds(seed)):
        (corpus / f"seed-{number}").write_bytes(content)
    atheris = _atheris()
    if atheris is None:
        _fuzz_blindly(one, change, sorted(corpus.iterdir()), seconds, seed)
        return
    flags = {
        "max_total_time": max(1, round(seconds)), "seed": seed + 1, "timeout": 300, "rss_limit_mb": 0, "len_control": 0,
        "max_len": MAX_BYTES, "verbosity": 1, "artifact_prefix": f"{corpus.parent}/",
    }  # fmt: skip
    arguments = [sys.argv[0], *(f"-{name}={value}" for name, value in flags.items()), str(corpus)]
    settings: dict[str, Any] = {"custom_mutator": _mutator(change, seeds)} if change else {}
    atheris.Setup(arguments, one, **settings)
    atheris.Fuzz()


def _random_seeds(seed: int) -> list[bytes]:
    """Return bytes of several lengths: a strategy draws larger values from longer ones."""
    chance = random.Random(seed)
    return [chance.randbytes(length) for length in (100, 400, 1000, 3000, 8000) for _ in range(8)]


def _mutator(change: Change, seeds: list[bytes]) -> Callable[[bytes, int, int], bytes]:
    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        changed = bytes(data) if len(data) > 1 and chance.random() < _SHARE_FOUND else chance.choice(seeds)
        for _ in range(chance.choice(_STACKED)):
            with suppress(ValueError, RecursionError, TypeError, KeyError):  # of a format that is broken by now
                changed = change(changed, chance)
        return changed[:max_size]

    return mutate


def _fuzz_blindly(
    one: Callable[[bytes], None], change: Change | None, files: list[Path], seconds: float, seed: int
) -> None:
    chance = random.Random(seed)
    started = time.monotonic()
    mutate = _mutator(change, [file.read_bytes() for file in files]) if change else None
    while time.monotonic() - started < seconds:
        one(
            mutate(b"", MAX_BYTES, chance.getrandbits(32))
            if mutate
            else chance.randbytes(chance.choice((64, 512, 4096)))
        )
