"""Answers that cost something to get, kept in a file: what was asked once is not asked again.

A line is ``{"key": ..., "value": ...}``; the key is a digest of all that decides the answer.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from expo_serve.errors import ExpoError


def digest_of(**parts: Any) -> str:
    """Return a digest of values that can be JSON: 64 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


class Cache:
    """A file of answers by key, read when it is first asked, and appended to.

    Args:
        file: JSON Lines; made with the first answer. Lines that are not whole are passed over.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._values: dict[str, Any] | None = None

    def get(self, key: str) -> Any:
        """Return the value of a key; None where there is none.

        Raises:
            ExpoError: the file cannot be read.
        """
        if self._values is None:
            self._values = self._read()
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value, in the file too.

        Raises:
            ExpoError: it cannot be written; what was written before stays.
        """
        self.get(key)
        assert self._values is not None
        line = json.dumps({"key": key, "value": value})
        try:
            with self._file.open("a+b") as file:
                file.write((_separator(file) + line + "\n").encode())
        except OSError as error:
            raise ExpoError(
                f"sweep: {self._file} cannot be written: {error.strerror}; what was written before is kept: make room, "
                "then go on with --resume"
            ) from None
        self._values[key] = value

    def _read(self) -> dict[str, Any]:
        try:
            text = self._file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ExpoError(f"sweep: {self._file} cannot be read: {error.strerror}") from None
        return dict(filter(None, map(_parse, text.splitlines())))


def _parse(line: str) -> tuple[str, Any] | None:
    try:
        found = json.loads(line)
        return str(found["key"]), found["value"]
    except (ValueError, KeyError, TypeError):
        return None


def _separator(file: Any) -> str:
    """Return what has to come before a new line: a line break where the last line was cut while it was written."""
    if file.seek(0, 2) == 0:
        return ""
    file.seek(-1, 2)
    return "" if file.read(1) == b"\n" else "\n"
