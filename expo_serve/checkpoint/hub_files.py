"""What is wanted of the hub: a repository, and which of its files a load reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from expo_serve.checkpoint.companions import is_companion
from expo_serve.checkpoint.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX_FILE
from expo_serve.checkpoint.json_files import read_weight_map
from expo_serve.checkpoint.records import Operand
from expo_serve.config import Source
from expo_serve.errors import SourceError, count_of

# Of the companions those that something reads; a repository has papers, pictures and licences too.
_READ = frozenset((".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".codes", ".vocab", ".py"))
_READ_MORE = frozenset((".npz", ".ttf", ".yaml", ".yml"))
PICKLES = re.compile(r"(?!(training_args|optimizer|scheduler|rng_state|scaler))[^/]+\.(bin|pt|pth|ckpt)")
_TORCH_FILES = re.compile(r"(pytorch_model[^/]*|adapter_model)\.bin|pytorch_model\.bin\.index\.json")
_MAX_NAMED = 5


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
        """Folder of downloads.

        Raises:
            SourceError: it would lie in a home folder, and there is none.
        """
        from huggingface_hub import constants

        try:
            return Path(self.access.cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
        except RuntimeError:
            raise SourceError(
                f"{self.where} needs a folder for downloads, and this user has no home: set HF_HOME, or give "
                "--download-dir"
            ) from None

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

    def source(self, commit: str) -> Source:
        """Return the wanted files of a commit as a source."""
        name = f"{self.hub_id}/{self.subfolder}" if self.subfolder else self.hub_id
        return Source(name=name, path=str(self.folder(commit).resolve()), revision=commit)

    def refusal(self, what: str) -> SourceError:
        """Return an error that names the repository."""
        return SourceError(f"{self.where}: {what}")


def companions(wanted: Repository, folder: Path, files: Sequence[str]) -> list[str]:
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


def weights(wanted: Repository, folder: Path, files: Sequence[str]) -> list[str]:
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


def holds_weights(wanted: Repository, files: Sequence[str]) -> bool:
    """Return whether there is something to download, or an adapter for which a later message is better."""
    if any("/" not in name and name.endswith(".safetensors") for name in files):
        return True
    if wanted.access.allow_pickles and any(_TORCH_FILES.fullmatch(name) for name in files):
        return True
    if wanted.operand != "delta":
        return ADAPTER_CONFIG in files and "config.json" not in files
    has_pickles = any(PICKLES.fullmatch(name) for name in files)
    return not has_pickles and any(name.endswith("/" + ADAPTER_CONFIG) for name in files)


def needed_files(wanted: Repository, folder: Path, files: Sequence[str]) -> list[str]:
    """Return the files that are downloaded, if the index of shards is there already."""
    return sorted({*companions(wanted, folder, files), *weights(wanted, folder, files)})


def of_subfolder(wanted: Repository, files: Iterable[str], required: bool = True) -> tuple[str, ...]:
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
    there = f"those with an adapter are {listed(sorted(adapters))}" if adapters else "none of them holds an adapter"
    return f"{holder} has no subfolder {subfolder!r}; {there}"


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many there are more."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {count_of(more, 'other')}" if more > 0 else "")
