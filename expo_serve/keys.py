"""API keys: which of them the server requires, which are refused, and their form in a header.

No message shows a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expo_serve.errors import UsageError

FLAG = "--api-key"
VARIABLE = "VLLM_API_KEY"


def required_keys(flag: Sequence[str | None] | None, environment: Mapping[str, str]) -> list[str]:
    """Return the keys of which a request must have one, by vLLM's rule: those of the flag, else that of the variable.

    vLLM takes an empty key for none, and leaves every route open: so does a secret that was never filled.

    Args:
        flag: values of ``--api-key``, of which vLLM's parser reads an empty one and ``None`` as None; None where it is
            not given.
        environment: the variables of the process.

    Raises:
        UsageError: there is a key that is empty, or that no header can carry.
    """
    if flag is not None:
        given = ["" if key in (None, "None") else str(key) for key in flag]
        for key in given or [""]:
            check_key(key, FLAG)
        return given
    if VARIABLE in environment:
        check_key(environment[VARIABLE], VARIABLE)
        return [environment[VARIABLE]]
    return []


def check_key(key: str, origin: str) -> None:
    """Require a key that is not empty and that a header can carry.

    Args:
        key: as it was given.
        origin: the flag or variable that it comes from, for the message.

    Raises:
        UsageError: the key is not one.
    """
    if not key.strip():
        raise UsageError(
            f"{origin} is empty, so every route would be open; give a key, or leave it out to serve without one"
        )
    if key != key.strip() or any(character < " " or character == "\x7f" for character in key):
        raise UsageError(
            f"{origin} has a line end, a control character or outer whitespace, which a header does not carry; take it "
            "out of the key (a secret made with echo ends with a line end: use echo -n)"
        )
    try:
        as_in_header(key)
    except UnicodeEncodeError:
        raise UsageError(f"{origin} has half a surrogate pair, which has no bytes; give another key") from None


def as_in_header(key: str) -> str:
    """Return the text that a web framework reads from a header with this key: a character for each byte.

    Headers are decoded as latin-1, while the bytes of the key are those that the user typed: mostly UTF-8, and anything
    at all in a variable. Two such texts are equal if, and only if, their bytes are.
    """
    return key.encode("utf-8", "surrogateescape").decode("latin-1")
