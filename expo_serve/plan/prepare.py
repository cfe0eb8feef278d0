"""From a configuration to a plan: find the sources, check the files, pair them."""

from __future__ import annotations

from pathlib import Path

from expo_serve.checkpoint.folder import open_checkpoint
from expo_serve.checkpoint.records import Operand
from expo_serve.checkpoint.source import HubAccess, find_source
from expo_serve.config import ExpoConfig, Pinned, Source
from expo_serve.errors import ConfigError
from expo_serve.plan.delta import open_delta
from expo_serve.plan.pair import plan_pair
from expo_serve.plan.plan import Plan


def prepare(config: ExpoConfig, hub: HubAccess | None = None) -> Plan:
    """Find, check and pair; reads headers only.

    Args:
        config: with ``base`` and one of ``aligned`` and ``delta`` set, or pinned sources.
        hub: how the hub is reached.

    Raises:
        SourceError, CheckpointError, PairError, UsageError: as found, base first.
    """
    hub = hub or HubAccess()
    pinned = config.pinned
    if not pinned and (config.base is None or (config.aligned is None and config.delta is None)):
        raise ConfigError("base is missing" if config.base is None else "aligned is missing")
    base = open_checkpoint("base", locate("base", config, hub))
    if config.delta if pinned is None else pinned.delta:
        return open_delta(locate("delta", config, hub)).plan(base, config)
    return plan_pair(base, open_checkpoint("aligned", locate("aligned", config, hub)), config)


def pin(config: ExpoConfig, plan: Plan, started: float | None, on_terminal: bool = False) -> ExpoConfig:
    """The configuration for the workers: the very versions that were checked."""
    sources = plan.sources
    pinned = Pinned(
        base=plan.base.source,
        aligned=sources.get("aligned"),
        delta=sources.get("delta"),
        model=next(side for side in ("aligned", "base", "delta") if sources.get(side) == plan.model),
        tokenizer=plan.tokenizer.path if plan.tokenizer else None,
        overrides=plan.overrides,
        started=started,
        on_terminal=on_terminal,
    )
    return config.model_copy(update={"pinned": pinned})


def locate(operand: Operand, config: ExpoConfig, hub: HubAccess) -> Source:
    """Find the source of a side, or take what is pinned.

    Raises:
        SourceError: nothing usable is there.
    """
    if config.pinned:
        return _on_this_machine(operand, getattr(config.pinned, operand), hub)
    return find_source(operand, getattr(config, operand), getattr(config, f"{operand}_revision"), hub)


def _on_this_machine(operand: Operand, source: Source, hub: HubAccess) -> Source:
    """A worker on another machine may have to take the commit from its own cache or from the hub."""
    if Path(source.path).is_dir() or source.revision is None:
        return source
    found = find_source(operand, source.name, source.revision, hub)
    return found.model_copy(update={"fingerprint": source.fingerprint})
