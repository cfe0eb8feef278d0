"""Values from elsewhere as messages show them: short and on one line, whatever they are."""

from __future__ import annotations

import reprlib

_MOST = 100
_LARGE_BITS = 256


class _Short(reprlib.Repr):
    """A repr that neither nests deep nor follows a large value to its end: one value can stand in many places."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 10
        self.maxstring = self.maxother = 1000

    def repr_int(self, value: int, level: int) -> str:
        """Return an integer; Python refuses to write one of thousands of digits."""
        bits = value.bit_length()
        return repr(value) if bits <= _LARGE_BITS else f"an integer of {bits} bits"


_SHORT = _Short()


def shown(value: object, most: int = _MOST) -> str:
    """Return a value as Python would write it, without control characters.

    Args:
        value: of any kind, and of any size.
        most: characters to return.
    """
    return _SHORT.repr(value)[:most]


def plain(value: object, most: int = _MOST) -> str:
    """Return a text without quotes, with escapes in the place of control characters; other values as ``shown`` does.

    Args:
        value: of any kind, and of any size.
        most: characters to return.
    """
    if not isinstance(value, str):
        return shown(value, most)
    cut = value[:most]
    return cut if cut.isprintable() else cut.encode("unicode_escape").decode()[:most]
