"""API keys as they stand on the command line and in a ``--config`` file, to refuse an empty one in no time.

``expo_serve.vllm_plugin.server`` asks again for what vLLM's parser has made of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from expo_serve.cli.options import Options
from expo_serve.errors import ConfigError
from expo_serve.keys import FLAG, required_keys

_SPELLINGS = (FLAG, "--api-ke", "--api-k")
"""vLLM's parser accepts abbreviations; a shorter one could also mean ``--api-server-count``."""


def refuse_unusable_keys(options: Options) -> None:
    """Refuse an API key that is empty or that no request can send.

    Raises:
        UsageError: the key on the command line or in the variable is such a key.
        ConfigError: that of the ``--config`` file is no text.
    """
    in_file = _in_file(options.file_options)
    on_line = _on_line(options.arguments)
    required_keys(in_file if on_line is None else on_line, os.environ)


def _on_line(arguments: Sequence[str]) -> list[str] | None:
    """Return the values of the last flag, as argparse takes them: with ``=``, or up to the next flag."""
    found: list[str] | None = None
    is_value = False
    for argument in arguments:
        if argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            if is_value := _means_keys(flag):
                found = [value] if equals else []
        elif is_value and found is not None:
            found.append(argument)
    return found


def _in_file(options: Mapping[str, Any]) -> list[str] | None:
    """Return the values of a file's key. They must be strings: of other types YAML may change them (``0123`` is 83)."""
    found: list[str] | None = None
    for key, value in options.items():
        if _means_keys(f"--{key}"):
            found = value if isinstance(value, list) else [value]
            if not all(isinstance(item, str) for item in found):
                raise ConfigError("--config: api-key: expected a string in quotes, or a list of them")
    return found


def _means_keys(flag: str) -> bool:
    return flag.replace("_", "-") in _SPELLINGS
