"""From a configuration to a plan: find the sources, check the files, pair them."""

from __future__ import annotations

from pathlib import Path

from expo_serve.config import ExpoConfig, Pinned, Source
from expo_serve.errors import ConfigError
from expo_serve.weights.checkpoint import Checkpoint, open_checkpoint
from expo_serve.weights.pair import Plan, plan_pair
from expo_serve.weights.source import HubAccess, find_source


def prepare(config: ExpoConfig, hub: HubAccess | None = None) -> Plan:
    """Find, check and pair; reads headers only.

    Args:
        config: with ``aligned`` set, or pinned sources.
        hub: how the hub is reached.

    Raises:
        SourceError, CheckpointError, PairError, UsageError: as found, base first.
    """
    hub = hub or HubAccess()
    if config.aligned is None and config.pinned is None:
        raise ConfigError("aligned is missing")
    return plan_pair(_open("base", config, hub), _open("aligned", config, hub), config)


def pin(config: ExpoConfig, plan: Plan, started: float | None, on_terminal: bool = False) -> ExpoConfig:
    """The configuration for the workers: the very versions that were checked."""
    pinned = Pinned(base=plan.base.source, aligned=plan.aligned.source, started=started, on_terminal=on_terminal)
    return config.model_copy(update={"pinned": pinned})


def _open(side: str, config: ExpoConfig, hub: HubAccess) -> Checkpoint:
    if config.pinned:
        return open_checkpoint(side, _on_this_machine(side, getattr(config.pinned, side), hub))
    given, revision = getattr(config, side), getattr(config, f"{side}_revision")
    return open_checkpoint(side, find_source(side, given, revision, hub))


def _on_this_machine(side: str, source: Source, hub: HubAccess) -> Source:
    """A worker on another machine may have to take the commit from its own cache or from the hub."""
    if Path(source.path).is_dir() or source.revision is None:
        return source
    found = find_source(side, source.name, source.revision, hub)
    return found.model_copy(update={"fingerprint": source.fingerprint})
