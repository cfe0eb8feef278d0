"""Makes a plan from a configuration: finds the sources, checks their files and plans; then pins what was found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

from expo_serve.checkpoint.folder import open_checkpoint
from expo_serve.checkpoint.records import Operand
from expo_serve.checkpoint.source import HubAccess, find_source
from expo_serve.config import ExpoConfig, Pinned, Source
from expo_serve.errors import ConfigError
from expo_serve.plan.delta import open_delta
from expo_serve.plan.doubts import settle
from expo_serve.plan.pair import plan_pair
from expo_serve.plan.plan import Plan
from expo_serve.plan.tokenizers import vocabulary_warnings
from expo_serve.plan.value_warnings import value_warnings


def prepare(config: ExpoConfig, hub: HubAccess | None = None) -> Plan:
    """Find, check and plan the sources; reads headers only.

    Args:
        config: with ``base`` and one of ``aligned`` and ``delta`` set, or with pinned sources.
        hub: access to the hub.

    Raises:
        ConfigError: a source is missing in the configuration.
        SourceError: a source cannot be found.
        CheckpointError: a file breaks its format, or has changed since it was pinned.
        PairError: the sources do not belong together, or something about them is doubtful and not allowed.
        UsageError: an alpha rule matches no tensor.
    """
    hub = hub or HubAccess()
    pinned = config.pinned
    if not pinned and (config.base is None or (config.aligned is None and config.delta is None)):
        missing = "base" if config.base is None else "aligned"
        raise ConfigError(f"{missing} is missing: expected a folder or hub id")
    base = open_checkpoint("base", locate("base", config, hub))
    if config.delta if pinned is None else pinned.delta:
        plan = open_delta(locate("delta", config, hub)).plan(base, config)
    else:
        plan = plan_pair(base, open_checkpoint("aligned", locate("aligned", config, hub)), config)
    return settle(plan, config) if pinned else review(plan, config)


def review(plan: Plan, config: ExpoConfig) -> Plan:
    """Return a new plan with what the user has to know about its sources among the warnings.

    Raises:
        PairError: something about the sources is doubtful and not allowed.
    """
    tokenizer = plan.tokenizer or plan.model
    found = vocabulary_warnings(plan.base.source, tokenizer) if tokenizer != plan.base.source else ()
    return settle(replace(plan, warnings=(*plan.warnings, *found, *value_warnings(plan))), config)


def pin(config: ExpoConfig, plan: Plan, started: float | None, on_terminal: bool = False) -> ExpoConfig:
    """Return the configuration for the workers, with the versions that were checked.

    Args:
        config: the configuration that was planned.
        plan: its plan.
        started: CLOCK_MONOTONIC at the start of the command, in seconds; None if it does not matter.
        on_terminal: True if the command's standard error is a terminal.
    """
    sources = plan.sources
    pinned = Pinned(
        base=plan.base.source,
        aligned=sources.get("aligned"),
        delta=sources.get("delta"),
        model=next(operand for operand in ("aligned", "base", "delta") if sources.get(operand) == plan.model),
        tokenizer=plan.tokenizer.path if plan.tokenizer else None,
        overrides=plan.overrides,
        started=started,
        on_terminal=on_terminal,
    )
    return config.model_copy(update={"pinned": pinned})


def locate(operand: Operand, config: ExpoConfig, hub: HubAccess) -> Source:
    """Find the source of an operand, or return the pinned one.

    Args:
        operand: ``base``, ``aligned`` or ``delta``.
        config: names or pins the source.
        hub: access to the hub.

    Raises:
        SourceError: there is no such folder or repository, or it cannot be reached.
    """
    subfolder = config.delta_subfolder if operand == "delta" else None
    if config.pinned:
        return _on_this_machine(operand, getattr(config.pinned, operand), hub, subfolder)
    revision = getattr(config, f"{operand}_revision")
    hub = replace(hub, allow_pickles=config.allow_pickle_index)
    found = find_source(operand, getattr(config, operand), revision, hub, subfolder=subfolder)
    return found.model_copy(update={"links": config.allow_links, "pickles": config.allow_pickle_index})


def _on_this_machine(operand: Operand, source: Source, hub: HubAccess, subfolder: str | None) -> Source:
    """Return the source as this machine has it: a worker elsewhere may need its own cache or the hub."""
    if Path(source.path).is_dir() or source.revision is None:
        return source
    hub = replace(hub, allow_pickles=source.pickles)
    name = source.name.removesuffix("/" + PurePosixPath(subfolder).as_posix()) if subfolder else source.name
    found = find_source(operand, name, source.revision, hub, subfolder=subfolder)
    return found.model_copy(
        update={"fingerprint": source.fingerprint, "links": source.links, "pickles": source.pickles}
    )
