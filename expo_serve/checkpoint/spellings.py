"""Recognises sources that are spelled as other tools take them, and says how they are spelled here."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from expo_serve.checkpoint.records import Operand

_HUB_HOSTS = frozenset(("huggingface.co", "www.huggingface.co", "hf.co"))
_PART = r"[A-Za-z0-9][\w.-]*"
_ID = rf"{_PART}/{_PART}"
_PLUS = re.compile(rf"(?P<base>{_PART}(/{_PART})?)\+(?P<delta>\S+)")
_AT = re.compile(rf"(?P<id>{_PART}(/{_PART})?)[@:](?P<revision>[\w.-][^\s@:]*)")
_CACHE_FOLDER = re.compile(rf"models--(?P<id>{_PART}(--{_PART})?)")
_PATH = re.compile(
    rf"(?P<id>{_ID})(@(?P<at>[^/\s]+))?"
    r"(/(tree|blob|resolve|commit|raw)/(?P<revision>refs/pr/\d+|[^/\s]+))?(/(?P<rest>\S+))?/?"
)
_WITH_REVISION = re.compile(rf"{_ID}/(tree|blob|resolve|commit|raw)/\S+")
_OTHER_KINDS = ("datasets", "spaces", "buckets", "collections", "papers", "docs", "kernels")


def right_spelling(operand: Operand, given: str, endpoint: str) -> str | None:
    """Return what to give instead of a source that other tools take; None if it is not one of theirs.

    Args:
        operand: ``base``, ``aligned`` or ``delta``, for the flags.
        given: what was given; no folder has this name.
        endpoint: address of the hub, whose pages are recognised beside those of huggingface.co.
    """
    if match := _CACHE_FOLDER.fullmatch(given):
        return _flags(operand, match["id"].replace("--", "/", 1))
    if match := _PLUS.fullmatch(given):
        instead = " in place of --aligned" if operand == "aligned" else ""
        return f"--base {match['base']} --delta {match['delta']}{instead}"
    path = _hub_path(given, endpoint)
    if path is None:
        match = _AT.fullmatch(given)
        return _flags(operand, match["id"], match["revision"]) if match else None
    if path.split("/")[0] in _OTHER_KINDS:
        return f"the address of a model's repository (this is one of {path.split('/')[0]})"
    match = _PATH.fullmatch(path.removeprefix("models/"))
    if match is None:
        return f"--{operand} ORGANISATION/NAME"
    return _flags(operand, match["id"], match["revision"] or match["at"], match["rest"])


def _hub_path(given: str, endpoint: str) -> str | None:
    """Return what follows the hub's name in an address; None if ``given`` is none of the hub's."""
    if _WITH_REVISION.fullmatch(given) and given.split("/")[0] not in _HUB_HOSTS:
        return given
    try:
        own = urlsplit(endpoint).netloc.rpartition("@")[2]
        parts = urlsplit(given if "://" in given else f"https://{given}")
    except ValueError:  # no address at all
        return None
    if parts.scheme.lower() == "hf":
        return unquote(f"{parts.netloc}{parts.path}").strip("/")
    host = parts.netloc.rpartition("@")[2].lower()
    is_hub = host in _HUB_HOSTS or (own != "" and host == own.lower())
    return unquote(parts.path).strip("/") if is_hub and parts.scheme.lower() in ("http", "https") else None


def _flags(operand: Operand, hub_id: str, revision: str | None = None, rest: str | None = None) -> str:
    flags = f"--{operand} {hub_id}" + (f" --{operand}-revision {revision}" if revision else "")
    if rest and operand == "delta" and "." not in rest.rsplit("/", 1)[-1]:
        flags += f" --delta-subfolder {rest}"
    return flags
