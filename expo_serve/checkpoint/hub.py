"""Downloads of the hub what a load needs of a repository, or takes it from the cache.

Which files a repository has is asked first, so that only those are downloaded that are read. Where the hub does not
answer, the cache is used if all of them are there.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from time import sleep
from typing import Any, TypeVar

from expo_serve.checkpoint.companions import is_companion
from expo_serve.checkpoint.file_names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, INDEX_FILE
from expo_serve.checkpoint.hub_errors import UNREACHABLE, HubFailure, bounded_requests, explain, one_line, within
from expo_serve.checkpoint.json_files import read_weight_map
from expo_serve.checkpoint.records import Operand
from expo_serve.config import Source
from expo_serve.errors import CheckpointError, SourceError, count_of, warn

ANSWER_SECONDS = 60.0
"""The longest time that the hub may take to say which files a repository has."""
_PULLS_SECONDS = 20.0
_MAX_PULLS = 5
_TRIES = 2
_MAX_NAMED = 5
# Of the companions those that something reads; a repository has papers, pictures and licences too.
_READ = frozenset((".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".codes", ".vocab", ".py"))
_READ_MORE = frozenset((".npz", ".ttf", ".yaml", ".yml"))
_PICKLES = re.compile(r"(?!(training_args|optimizer|scheduler|rng_state|scaler))[^/]+\.(bin|pt|pth|ckpt)")
_TORCH_FILES = re.compile(r"(pytorch_model[^/]*|adapter_model)\.bin|pytorch_model\.bin\.index\.json")
_MODULE_FILE = re.compile(r"\d+_\w+/[^/]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[!-~]*")

T = TypeVar("T")


@dataclass(frozen=True)
class HubAccess:
    """Access to the hub."""

    token: str | bool | None = None
    """None for the stored token, if there is one; True to require it."""
    cache_dir: str | None = None
    """Folder for downloads; None for the hub's own cache."""
    allow_pickles: bool = False
    """True to download PyTorch's files of a repository without safetensors files."""


@dataclass(frozen=True)
class Repository:
    """What is wanted of the hub."""

    operand: Operand
    hub_id: str
    revision: str | None
    access: HubAccess
    subfolder: str | None = None

    @property
    def where(self) -> str:
        """The repository, for messages."""
        return f"{self.operand}: {self.hub_id!r}" + (f" at revision {self.revision!r}" if self.revision else "")

    @property
    def cache(self) -> Path:
        """Folder of downloads."""
        from huggingface_hub import constants

        return Path(self.access.cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()

    @property
    def storage(self) -> Path:
        """Folder of the repository's commits in the cache."""
        return self.cache / f"models--{self.hub_id.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        """Return the folder of a commit's files, whether or not there is one."""
        return self.storage / "snapshots" / commit

    def folder(self, commit: str) -> Path:
        """Return the folder of the wanted files of a commit: the subfolder, or all of the snapshot."""
        return self.snapshot(commit) / (self.subfolder or "")

    def refusal(self, what: str) -> SourceError:
        """Return an error that names the repository."""
        return SourceError(f"{self.where}: {what}")


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
        return _from_cache(wanted, HubFailure("offline (HF_HUB_OFFLINE)"))
    commit = _cached_commit(wanted)
    if _COMMIT.fullmatch(wanted.revision or "") and commit and (files := _known_files(wanted, commit)):
        folder = wanted.folder(commit)
        needed = _needed(wanted, folder, _of_subfolder(wanted, files))
        if all((folder / name).exists() for name in needed):
            return _found(wanted, commit)
    try:
        commit, files = _call(wanted, lambda: _ask(wanted), tries=_TRIES)
    except HubFailure as failure:
        return _from_cache(wanted, failure)
    _remember(wanted, commit)
    return _download(wanted, commit, _of_subfolder(wanted, files))


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
        if not _COMMIT.fullmatch(info.sha or ""):
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
    if not _holds_weights(wanted, files):
        _refuse_without_weights(wanted, files)
    for choose in (_companions, _weights):
        names = choose(wanted, folder, files)
        try:
            _call(wanted, partial(_fetch, wanted, commit, names), tries=_TRIES)
        except HubFailure as failure:
            raise wanted.refusal(failure.reason) from None
        if missing := [name for name in names if not (folder / name).exists()]:
            raise wanted.refusal(f"the download is not complete: {_listed(missing)} in {folder}; run it again")
    return _found(wanted, commit)


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


def _companions(wanted: Repository, folder: Path, files: Sequence[str]) -> list[str]:
    """Return the files beside the weights that something reads."""
    return [name for name in files if _is_read(PurePosixPath(name)) or _leads_to_weights(wanted, name)]


def _is_read(path: PurePosixPath) -> bool:
    if not is_companion(path):
        return False
    is_weights = path.suffix in (".safetensors", ".bin")  # of a module of sentence-transformers
    return is_weights or path.suffix.lower() in _READ or (len(path.parts) == 1 and path.suffix.lower() in _READ_MORE)


def _leads_to_weights(wanted: Repository, name: str) -> bool:
    """Return whether a file says what the weights are: the index of shards, an adapter's config."""
    if name in (INDEX_FILE, ADAPTER_CONFIG):
        return True
    # A repository of several adapters: by these files it is seen which subfolder to give.
    return wanted.operand == "delta" and name.endswith("/" + ADAPTER_CONFIG) and name.count("/") <= 2


def _weights(wanted: Repository, folder: Path, files: Sequence[str]) -> list[str]:
    """Return the files of the weights: repositories often hold a second copy of them."""
    if wanted.operand == "delta" and {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= set(files):
        return [ADAPTER_WEIGHTS]
    top = [name for name in files if "/" not in name]
    safetensors = [name for name in top if name.endswith(".safetensors")]
    if safetensors and INDEX_FILE in top and (folder / INDEX_FILE).is_file():
        shards = set(read_weight_map(folder / INDEX_FILE).values())
        return sorted(shards & set(files))
    if not safetensors and wanted.access.allow_pickles:
        return [name for name in top if _TORCH_FILES.fullmatch(name)]
    return safetensors


def _holds_weights(wanted: Repository, files: Sequence[str]) -> bool:
    """Return whether there is something to download, or an adapter for which a later message is better."""
    if any("/" not in name and name.endswith(".safetensors") for name in files):
        return True
    if wanted.access.allow_pickles and any(_TORCH_FILES.fullmatch(name) for name in files):
        return True
    if wanted.operand != "delta":
        return ADAPTER_CONFIG in files and "config.json" not in files
    has_pickles = any(_PICKLES.fullmatch(name) for name in files)
    return not has_pickles and any(name.endswith("/" + ADAPTER_CONFIG) for name in files)


def _refuse_without_weights(wanted: Repository, files: Sequence[str]) -> None:
    pickles = [name for name in files if _PICKLES.fullmatch(name)]
    if pickles:
        what = f"the repository holds only pickle files ({_listed(pickles)}), which can run code and are not opened"
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
    there = f"; its folders do: {_listed(folders)}" if folders else ""
    raise wanted.refusal(f"the repository holds no safetensors file{there}; give one that holds a checkpoint")


def _conversion(wanted: Repository) -> str | None:
    """Return the newest pull request that adds safetensors files, as a revision; None if none is found in time."""
    from huggingface_hub import HfApi

    api = HfApi(token=wanted.access.token)

    def look() -> str | None:
        for number in _pull_numbers(api, wanted.hub_id):
            revision = f"refs/pr/{number}"
            files = _of_subfolder(wanted, api.list_repo_files(wanted.hub_id, revision=revision), required=False)
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


def _of_subfolder(wanted: Repository, files: Iterable[str], required: bool = True) -> tuple[str, ...]:
    """Return the files of the subfolder, relative to it."""
    files = tuple(files)
    if not wanted.subfolder:
        return files
    prefix = f"{wanted.subfolder}/"
    found = tuple(name.removeprefix(prefix) for name in files if name.startswith(prefix))
    if not found and required:
        adapters = [name.rpartition("/")[0] for name in files if name.endswith("/" + ADAPTER_CONFIG)]
        raise wanted.refusal(no_subfolder("the repository", wanted.subfolder, adapters))
    return found


def no_subfolder(holder: str, subfolder: str, adapters: Sequence[str]) -> str:
    """Return the message that there is no such subfolder.

    Args:
        holder: the folder or repository, for the message.
        subfolder: what was asked for.
        adapters: the subfolders that hold an adapter.
    """
    there = f"those with an adapter are {_listed(sorted(adapters))}" if adapters else "none of them holds an adapter"
    return f"{holder} has no subfolder {subfolder!r}; {there}"


def _from_cache(wanted: Repository, failure: HubFailure) -> Source:
    """Return the snapshot in the cache if all that a load needs is there.

    Raises:
        SourceError: it is not, or the hub's answer forbids it.
    """
    from huggingface_hub import constants

    commit = None if failure.is_final else _cached_commit(wanted)
    if commit is None:
        absent = "no such folder, not in the hub cache, and " if failure.reason.startswith(UNREACHABLE) else ""
        raise wanted.refusal(_not_cached(wanted) if constants.HF_HUB_OFFLINE else absent + failure.reason)
    folder = wanted.folder(commit)
    missing = _missing(wanted, folder, _known_files(wanted, commit))
    if missing:
        raise wanted.refusal(
            f"{failure.reason}; the hub cache holds only a part of it: {_listed(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing in {folder}; run 'hf download {wanted.hub_id}' online"
        )
    if not constants.HF_HUB_OFFLINE:
        warn(f"{wanted.where}: {failure.reason}; the hub cache is used, commit {commit[:7]}")
    return _found(wanted, commit)


def _not_cached(wanted: Repository) -> str:
    """Return the message for a repository that is not in the cache while offline."""
    others = sorted(path.name[:7] for path in wanted.storage.glob("snapshots/*"))
    there = f"no such folder, not in the hub cache ({wanted.cache})"
    if others:
        there = f"no such revision in the hub cache ({wanted.cache}), which holds {_listed(others)}"
    return f"{there}, and {UNREACHABLE}: offline (HF_HUB_OFFLINE)"


def _cached_commit(wanted: Repository) -> str | None:
    """Return the commit of the wanted revision that the cache holds, as a whole or in part."""
    revision = wanted.revision or "main"
    try:
        commit = revision if _COMMIT.fullmatch(revision) else _ref(wanted, revision).read_text().strip()
        return commit if _COMMIT.fullmatch(commit) and wanted.snapshot(commit).is_dir() else None
    except (OSError, ValueError):  # not there, or no name that a file can have
        return None


def _ref(wanted: Repository, revision: str) -> Path:
    """Return the cache's file for the commit of a branch or tag."""
    if ".." in PurePosixPath(revision).parts or PurePosixPath(revision).is_absolute():
        raise ValueError(revision)
    return wanted.storage / "refs" / revision


def _remember(wanted: Repository, commit: str) -> None:
    """Write into the cache which commit the revision is, as the library does, for when the hub cannot be reached."""
    revision = wanted.revision or "main"
    if _COMMIT.fullmatch(revision):
        return
    try:
        ref = _ref(wanted, revision)
        if ref.is_file() and ref.read_text() == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f".{ref.name}.{os.getpid()}")
        new.write_text(commit)
        new.replace(ref)
    except (OSError, ValueError):  # a cache that is mounted read-only serves all the same
        return


def _known_files(wanted: Repository, commit: str) -> tuple[str, ...] | None:
    """Return the files of a commit if the cache knows them; older versions of the library do not store them."""
    import huggingface_hub

    try:
        tree = huggingface_hub.get_cached_repo_tree(wanted.hub_id, revision=commit, cache_dir=wanted.cache)
        return tuple(file.path for file in tree)
    except Exception:  # noqa: BLE001 - not stored, not readable, or no such function
        return None


def _missing(wanted: Repository, folder: Path, known: Sequence[str] | None) -> list[str]:
    """Return what a load needs and the cache does not hold.

    Args:
        wanted: the repository.
        folder: of the wanted files of its commit in the cache.
        known: all files of the commit; None if they are not known.
    """
    if known is not None:
        needed = _needed(wanted, folder, _of_subfolder(wanted, known))
        # Of a subfolder what is not a module's may have been left out by who filled the cache, and is seldom read.
        needed = [name for name in needed if "/" not in name or _MODULE_FILE.fullmatch(name)]
        return [name for name in needed if not (folder / name).exists()]
    there = sorted(path.name for path in folder.glob("*") if path.exists())
    needed = [] if wanted.operand == "delta" or ADAPTER_CONFIG in there else ["config.json"]
    if INDEX_FILE in there and not (wanted.operand == "delta" and ADAPTER_CONFIG in there):
        needed += sorted(set(read_weight_map(folder / INDEX_FILE).values()))
    elif wanted.operand == "delta" and ADAPTER_CONFIG in there:
        has_pickle = wanted.access.allow_pickles and ADAPTER_PICKLE in there
        needed += [] if has_pickle else [ADAPTER_WEIGHTS]
    elif not _weights(wanted, folder, there):
        needed.append("model.safetensors (or its shards and their index)")
    return [name for name in needed if name not in there]


def _needed(wanted: Repository, folder: Path, files: Sequence[str]) -> list[str]:
    """Return the files that are downloaded, if the index of shards is there already."""
    return sorted({*_companions(wanted, folder, files), *_weights(wanted, folder, files)})


def _found(wanted: Repository, commit: str) -> Source:
    name = f"{wanted.hub_id}/{wanted.subfolder}" if wanted.subfolder else wanted.hub_id
    return Source(name=name, path=str(wanted.folder(commit).resolve()), revision=commit)


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and how many there are more."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {count_of(more, 'other')}" if more > 0 else "")
