"""Text from elsewhere, made safe to print."""

from __future__ import annotations

import re

_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
"""Escape sequences of terminals (ECMA-48): CSI with its parameters, OSC up to its end, and the short ones."""


def printable(text: str) -> str:
    """Return text on one line, without escape sequences; other control and formatting characters are spelled out."""
    return "".join(map(_shown, _SEQUENCE.sub("", text))).strip()


def _shown(character: str) -> str:
    if character.isspace():
        return " "
    return character if character.isprintable() else character.encode("unicode_escape").decode()
