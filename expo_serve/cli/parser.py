"""An argparse parser that raises our errors. Imports little, because a readiness probe runs every few seconds."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any, NoReturn

from expo_serve.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An argparse parser that accepts no abbreviations and raises :class:`UsageError` instead of exiting."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise the error in one line, without a page of usage."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def known_flags(self) -> Collection[str]:
        """Return every flag that was added, with its hyphens."""
        return self._option_string_actions.keys()
