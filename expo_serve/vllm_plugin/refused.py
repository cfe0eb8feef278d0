"""Tells a configuration that vLLM refuses from a start that failed, and finds vLLM's own sentence about it."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from expo_serve.errors import ExpoError, reason_of

CHECKS = {
    "configure_logging_from_args",
    "validate_parsed_serve_args",
    "validate_api_server_args",
    "from_cli_args",
    "create_model_config",
    "create_engine_config",
}
"""vLLM's functions that check flags, or make the configuration of them: what passes through them is a refusal."""
COMMANDS = {"cmd", "run_headless", "run_multi_api_server"}
"""vLLM's functions that check flags too, but then start the engine: only what they raise themselves is a refusal."""
_ENVIRONMENT = "vllm.envs"
_TELLING = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
"""Exceptions that say what is wrong also where Python has raised them, in the middle of a check."""
_LONGEST = 400
"""Characters of a sentence: some list all that is possible."""
_MOST_PROBLEMS = 3


def sentence_of(error: BaseException) -> str | None:
    """Return why vLLM refuses its configuration, in one line without an exception's class; None if it does not.

    Args:
        error: what vLLM's serve command, or its ``validate``, has raised.
    """
    if not isinstance(error, Exception) or isinstance(error, ExpoError) or reason_of(error) == "out_of_memory":
        return None
    if not _is_from_a_check(error) or not (_is_deliberate(error) or isinstance(error, _TELLING)):
        return None
    return _cut(_text(error)) or None


def _is_from_a_check(error: BaseException) -> bool:
    functions = [frame.f_code.co_name if _is_vllms(frame) else "" for frame in _frames(error)]
    return not CHECKS.isdisjoint(functions) or not COMMANDS.isdisjoint(functions[-1:])


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _is_vllms(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("vllm.")


def _is_deliberate(error: BaseException) -> bool:
    """Return whether the error comes from a ``raise`` or ``assert``, and not from a mistake in a program."""
    file, number = _place_of(error)
    return linecache.getline(file, number).strip().startswith(("raise", "assert"))


def _place_of(error: BaseException) -> tuple[str, int]:
    """Return the file and the line that an exception comes from."""
    *_, (frame, number) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename, number


def _text(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return _joined(_problem(problem) for problem in error.errors(include_url=False))
    text = _message(error).removeprefix("Error: ")
    if variable := _variable_of(error):
        return f"{variable}: {text}"
    if error.__traceback__ is None or _is_deliberate(error):
        return text
    file, number = _place_of(error)
    return f"{text} ({Path(file).name}:{number})"


def _message(error: BaseException) -> str:
    """Return what an exception was raised with; ``str`` would quote the key of a KeyError."""
    match error.args:
        case (str(text),) if isinstance(error, KeyError):
            return text
        case (str(text), *values) if values and text.count("%") == len(values):  # as for a logger
            return text % tuple(values)
    return str(error)


def _problem(problem: Any) -> str:
    """Return one problem of pydantic's: an exception of vLLM's own, or a value of a field."""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, BaseException):
        return _text(cause)
    field = ".".join(str(part) for part in problem["loc"])
    found = problem["input"]
    is_short = isinstance(found, str | int | float)  # and no whole configuration
    return f"{field}: {problem['msg']}" + (f", found {found!r:.80}" if is_short else "")


def _joined(problems: Iterable[str]) -> str:
    each = list(dict.fromkeys(problems))
    rest = len(each) - _MOST_PROBLEMS
    return "; ".join([*each[:_MOST_PROBLEMS], *([f"and {rest} more"] if rest > 0 else [])])


def _variable_of(error: BaseException) -> str | None:
    """Return the environment variable whose value vLLM could not read."""
    readers = (frame for frame in _frames(error) if frame.f_globals.get("__name__") == _ENVIRONMENT)
    return next((frame.f_locals.get("name") for frame in readers if frame.f_code.co_name == "__getattr__"), None)


def _cut(text: str) -> str:
    """Return a text in one line of printable characters, cut where it is long."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST].rpartition(' ')[0]} ..."
