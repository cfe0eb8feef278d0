"""Where a written checkpoint comes from: recorded in its files' metadata, and told by its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from expo_serve.checkpoint.records import JsonObject
from expo_serve.config import ExpoConfig
from expo_serve.plan.plan import Plan
from expo_serve.version import __version__

KEY = "expo_serve"
"""Of the ``__metadata__`` of every file that is written; its value is JSON."""
CARD = "README.md"
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Fields of the model's own card that hold for the result too."""
_MARK = "<!-- the card of the model that this was made from -->"


def provenance(plan: Plan, config: ExpoConfig | None) -> JsonObject:
    """Return the sources and, with a configuration, how they were combined.

    Args:
        plan: of the result.
        config: its alpha, rules and rounding; None for a delta, which holds for every alpha.
    """
    sources = {side: source.model_dump(exclude={"path"}) for side, source in plan.sources.items()}
    combined: JsonObject = {}
    if config:
        combined = {
            "alpha": config.alpha_text,
            "alpha_rules": [rule.text for rule in config.alpha_rules],
            "rounding": config.rounding,
            "rounding_seed": config.rounding_seed,
        }
    return {"version": __version__, "sources": sources, **combined}


def metadata(plan: Plan, config: ExpoConfig | None) -> dict[str, str]:
    """Return the provenance as an entry of a file's metadata, whose values are strings."""
    return {KEY: json.dumps(provenance(plan, config))}


def write_card(folder: Path, plan: Plan, config: ExpoConfig | None) -> None:
    """Write the model card: the hub's fields, how the result was made, and below that the card of the model itself.

    Args:
        folder: the result's; a card in it, copied from the model, becomes the lower part.
        plan: of the result.
        config: as for :func:`provenance`.

    Raises:
        OSError: the folder cannot be written to.
    """
    fields, text = _read_card(folder / CARD)
    known = provenance(plan, config)
    hub = [source.name for source in plan.sources.values() if source.revision]
    data = ModelCardData(
        library_name="transformers",
        base_model=hub or None,
        base_model_relation="merge" if hub and config else None,
        tags=["expo-serve", "merge" if config else "delta"],
        **fields,
    )
    rows = [f"| {side} | {source.name} | {source.revision or '-'} |" for side, source in plan.sources.items()]
    more = [
        f"| {key.replace('_', ' ')} | {_shown(known[key])} | |" for key in known if key not in ("version", "sources")
    ]
    lines = ["---", data.to_yaml(), "---", f"# {_title(plan, config)}", "", _how(config), ""]
    lines += ["| | | revision |", "|---|---|---|", *rows, *more, f"| expo-serve | {__version__} | |", ""]
    (folder / CARD).write_text("\n".join([*lines, *([_MARK, text, ""] if text else [])]))


def _title(plan: Plan, config: ExpoConfig | None) -> str:
    name = plan.aligned_or_delta.source.short_name
    return f"{name}, extrapolated with alpha {config.alpha_text}" if config else f"{name}, as a packed delta"


def _how(config: ExpoConfig | None) -> str:
    if config is None:
        return (
            "Holds what distinguishes a model from its base, without loss. Serve it with "
            "`expo-serve --base BASE --delta THIS --alpha X`."
        )
    return (
        "Weights: `aligned + alpha * (aligned - base)` (ExPO, [arXiv 2404.16792](https://arxiv.org/abs/2404.16792)), "
        f"rounded {'dithered' if config.rounding == 'dithered' else 'to nearest'}."
    )


def _shown(value: object) -> str:
    return ", ".join(f"`{item}`" for item in value) or "none" if isinstance(value, list) else f"{value}"


def _read_card(file: Path) -> tuple[dict[str, Any], str]:
    """Return the fields to keep and the text of a model's card; nothing where there is none that can be read."""
    try:
        card = ModelCard(file.read_text(), ignore_metadata_errors=True)
        fields = card.data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001  # the hub's library raises many kinds, and no merge may fail by a card
        return {}, ""
    return {key: fields[key] for key in _KEPT if key in fields}, card.text.rpartition(_MARK)[2].strip()
