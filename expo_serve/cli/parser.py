"""argparse, with mistakes in our form. Imports nothing else: a probe runs every few seconds."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any, NoReturn

from expo_serve.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose mistakes are errors of ours."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing a page of usage."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def known_flags(self) -> Collection[str]:
        """Every flag that was added."""
        return self._option_string_actions.keys()
