"""Names without what wrappers of training put into them.

``module.`` comes from DDP, ``_orig_mod.`` from torch.compile, ``_fsdp_wrapped_module.`` from FSDP and
``_checkpoint_wrapped_module.`` from activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Collection

_PARALLEL = "module."
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def bare_names(names: Collection[str]) -> dict[str, str]:
    """Return the bare name of each tensor of one checkpoint.

    ``module.`` is left out where every name begins with it, every other wrapper wherever it stands. If two names would
    become the same, all stay as they are.

    Args:
        names: of all tensors.
    """
    bare = {name: _without_wrappers(name) for name in names}
    while bare and all(name.startswith(_PARALLEL) for name in bare.values()):
        bare = {stored: name.removeprefix(_PARALLEL) for stored, name in bare.items()}
    return bare if len(set(bare.values())) == len(bare) else {name: name for name in names}


def possible_names(stored: str) -> list[str]:
    """Return the names that a tensor can have whose stored name is this: as it is, and without wrappers."""
    names = [stored, _without_wrappers(stored)]
    while names[-1].startswith(_PARALLEL):
        names.append(names[-1].removeprefix(_PARALLEL))
    return names


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
