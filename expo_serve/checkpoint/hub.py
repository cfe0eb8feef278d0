"""Downloads of the hub what a load needs of a repository, or takes it from the cache.

Which files a repository has is asked first, so that only those are downloaded that are read. Where the hub does not
answer, the cache is used if all of them are there.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import sleep
from typing import Any, TypeVar

from expo_serve.checkpoint.hub_cache import COMMIT, cached_commit, from_cache, known_files, remember
from expo_serve.checkpoint.hub_errors import HubFailure, bounded_requests, explain, one_line, within
from expo_serve.checkpoint.hub_files import (
    PICKLES,
    Repository,
    companions,
    holds_weights,
    listed,
    needed_files,
    of_subfolder,
    weights,
)
from expo_serve.config import Source
from expo_serve.errors import CheckpointError, SourceError

ANSWER_SECONDS = 60.0
"""The longest time that the hub may take to say which files a repository has."""
_PULLS_SECONDS = 20.0
_MAX_PULLS = 5
_TRIES = 2
_TOKEN = re.compile(r"[!-~]*")

T = TypeVar("T")


def hub_endpoint() -> str:
    """Return the address of the hub; empty if the environment has one that the library cannot read."""
    try:
        from huggingface_hub import constants
    except Exception:  # noqa: BLE001 - the library parses its environment when it is imported
        return ""
    return constants.ENDPOINT


def hub_source(wanted: Repository) -> Source:
    """Download what a load needs of a repository, or find it in the cache.

    Args:
        wanted: the repository and what of it.

    Raises:
        SourceError: it is not there, not complete, or cannot be reached.
        CheckpointError: its index of shards is damaged.
    """
    _check_library(wanted)
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return from_cache(wanted, HubFailure("offline (HF_HUB_OFFLINE)"))
    commit = cached_commit(wanted)
    if COMMIT.fullmatch(wanted.revision or "") and commit and (files := known_files(wanted, commit)):
        folder = wanted.folder(commit)
        needed = needed_files(wanted, folder, of_subfolder(wanted, files))
        if all((folder / name).exists() for name in needed):
            return wanted.source(commit)
    try:
        commit, files = _call(wanted, lambda: _ask(wanted), tries=_TRIES)
    except HubFailure as failure:
        return from_cache(wanted, failure)
    remember(wanted, commit)
    return _download(wanted, commit, of_subfolder(wanted, files))


def _check_library(wanted: Repository) -> None:
    """Import the library, which reads its environment then, and check what it would trip over later."""
    token = wanted.access.token
    if isinstance(token, str) and not _TOKEN.fullmatch(token):
        raise wanted.refusal("--hf-token has a character that no token has; expected hf_ and letters and digits")
    try:
        import huggingface_hub.constants  # noqa: F401
    except Exception as error:  # noqa: BLE001 - for example a number or an address in the environment that is none
        raise wanted.refusal(
            f"huggingface_hub cannot be imported: {type(error).__name__}: {one_line(error)}; "
            "check the variables HF_* of the environment"
        ) from None


def _call(wanted: Repository, call: Callable[[], T], tries: int = 1) -> T:
    """Run a call of the library with bounded requests; again where that may help.

    Raises:
        HubFailure: it failed.
    """
    from huggingface_hub import constants

    silence = float(max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT))
    for left in reversed(range(tries)):
        try:
            _check_endpoint(constants.ENDPOINT)
            from huggingface_hub import get_session

            with bounded_requests(get_session(), silence):
                return call()
        except (HubFailure, SourceError, CheckpointError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a hub or the network between does to the library
            failure = explain(error, constants.ENDPOINT, str(wanted.cache), wanted.access.token)
            if failure.wait is None or not left:
                raise failure from None
        sleep(failure.wait)
    raise AssertionError


def _check_endpoint(endpoint: str) -> None:
    if not endpoint.startswith(("https://", "http://")):
        raise HubFailure(f"HF_ENDPOINT is {endpoint!r}, expected an address: HF_ENDPOINT=https://{endpoint}")


def _ask(wanted: Repository) -> tuple[str, tuple[str, ...]]:
    """Return the commit that the revision is, and the names of its files."""
    from huggingface_hub import HfApi, constants

    api = HfApi(token=wanted.access.token)

    def ask() -> tuple[str, tuple[str, ...]]:
        timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
        info = api.model_info(wanted.hub_id, revision=wanted.revision or "main", timeout=timeout)
        if not COMMIT.fullmatch(info.sha or ""):
            raise HubFailure(f"{one_line(constants.ENDPOINT)} does not answer as a hub does: no commit in its answer")
        commit = str(info.sha)
        if info.siblings is None:
            return commit, tuple(api.list_repo_files(wanted.hub_id, revision=commit))
        return commit, tuple(sibling.rfilename for sibling in info.siblings)

    return within(ANSWER_SECONDS, ask)


def _download(wanted: Repository, commit: str, files: Sequence[str]) -> Source:
    """Download the companions, then the weights that the index among them names.

    Args:
        wanted: the repository.
        commit: its commit.
        files: all files of the subfolder, relative to it.
    """
    folder = wanted.folder(commit)
    if not holds_weights(wanted, files):
        _refuse_without_weights(wanted, files)
    for choose in (companions, weights):
        names = choose(wanted, folder, files)
        try:
            _call(wanted, partial(_fetch, wanted, commit, names), tries=_TRIES)
        except HubFailure as failure:
            raise wanted.refusal(failure.reason) from None
        if missing := [name for name in names if not (folder / name).exists()]:
            raise wanted.refusal(f"the download is not complete: {listed(missing)} in {folder}; run it again")
    return wanted.source(commit)


def _fetch(wanted: Repository, commit: str, names: Iterable[str]) -> None:
    """Download files of the subfolder that are not in the cache yet."""
    folder = wanted.folder(commit)
    prefix = f"{wanted.subfolder}/" if wanted.subfolder else ""
    absent = [prefix + name for name in names if not (folder / name).exists()]
    if not absent:
        return
    from huggingface_hub import snapshot_download

    snapshot_download(
        wanted.hub_id,
        revision=commit,
        allow_patterns=[glob.escape(name) for name in absent],
        token=wanted.access.token,
        cache_dir=str(wanted.cache),
    )


def _refuse_without_weights(wanted: Repository, files: Sequence[str]) -> None:
    pickles = [name for name in files if PICKLES.fullmatch(name)]
    if pickles:
        what = f"the repository holds only pickle files ({listed(pickles)}), which can run code and are not opened"
        if pull := _conversion(wanted):
            raise wanted.refusal(f"{what}; its pull request holds safetensors: give --{wanted.operand}-revision {pull}")
        raise wanted.refusal(
            f"{what}; convert them to safetensors (https://huggingface.co/spaces/safetensors/convert), or give "
            "--allow-pickle-index: it finds the tensors without running anything"
        )
    if any(name.endswith(".gguf") for name in files):
        raise wanted.refusal(
            "the repository holds GGUF files: quantised checkpoints cannot be extrapolated; give one in safetensors"
        )
    folders = sorted({name.rpartition("/")[0] for name in files if name.endswith(".safetensors")})
    there = f"; its folders do: {listed(folders)}" if folders else ""
    raise wanted.refusal(f"the repository holds no safetensors file{there}; give one that holds a checkpoint")


def _conversion(wanted: Repository) -> str | None:
    """Return the newest pull request that adds safetensors files, as a revision; None if none is found in time."""
    from huggingface_hub import HfApi

    api = HfApi(token=wanted.access.token)

    def look() -> str | None:
        for number in _pull_numbers(api, wanted.hub_id):
            revision = f"refs/pr/{number}"
            files = of_subfolder(wanted, api.list_repo_files(wanted.hub_id, revision=revision), required=False)
            if any("/" not in name and name.endswith(".safetensors") for name in files):
                return revision
        return None

    try:
        return _call(wanted, lambda: within(_PULLS_SECONDS, look))
    except HubFailure:
        return None  # the pickles are told of all the same


def _pull_numbers(api: Any, hub_id: str) -> list[int]:
    """Return the numbers of the newest pull requests whose titles speak of safetensors, or of all if there are none."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = [
            pull.num
            for pull in api.get_repo_discussions(hub_id)
            if pull.is_pull_request and "safetensors" in pull.title.lower() and pull.status != "closed"
        ]
    except HfHubHTTPError:  # discussions can be switched off
        found = []
    if not found:
        pulls = api.list_repo_refs(hub_id, include_pull_requests=True).pull_requests or ()
        found = [int(match[1]) for pull in pulls if (match := re.fullmatch(r"refs/pr/(\d+)", pull.ref))]
    return sorted(found, reverse=True)[:_MAX_PULLS]
