"""Values of the Helm chart for a canary: the recommended alpha beside alpha 0, under one name with weights.

The keys are those of ``deploy/helm/expo-serve/values.yaml``, which explains them. What the sweep cannot know is given a
placeholder with which the chart renders, under a comment that begins with EDIT.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from expo_serve.config import ExpoConfig, format_alpha
from expo_serve.sweep.flags import Flag

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOUNT = "/models"
_SIZES = {
    "tensor-parallel-size": "tensorParallelSize",
    "tp": "tensorParallelSize",
    "pipeline-parallel-size": "pipelineParallelSize",
    "pp": "pipelineParallelSize",
}
"""Flags that are keys of the chart."""
_OTHERWISE: dict[str, str | None] = {
    "api-key": "apiKey.existingSecret",
    "hf-token": "weights.download.tokenSecret",
    "download-dir": "weights.volume",
    "port": "service.port",
    "shutdown-timeout": "drain.shutdownTimeoutSeconds",
    "served-model-name": "servedModelNames",
    "data-parallel-size": "resources.limits for the GPUs, then extraArgs",
    "dp": "resources.limits for the GPUs, then extraArgs",
    "prefill-context-parallel-size": "resources.limits for the GPUs, then extraArgs",
    "pcp": "resources.limits for the GPUs, then extraArgs",
    **dict.fromkeys(("nnodes", "n", "node-rank", "r", "master-addr", "headless"), "multiNode.nodes"),
    "distributed-executor-backend": "multiNode.executor",
    **dict.fromkeys(("host", "uds", "config"), None),
}
"""Flags that the chart refuses among ``extraArgs``, and the keys that it has for them; None where it has none."""
_NOT_DOWNLOADED = ("*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "original/*")
"""The chart's own ``weights.download.exclude`` without ``*.bin``."""
_BREAKS = {code: f"\\u{code:04x}" for code in (0x7F, 0x85, 0x2028, 0x2029)}
"""Characters that JSON leaves as they are and YAML does not."""


@dataclass(frozen=True)
class Origin:
    """Where a source is from."""

    operand: str
    hub_id: str | None
    """None for a folder that is no commit in the hub's cache."""
    commit: str | None
    """Of ``hub_id``."""
    path: str | None
    """Absolute path of a folder that was given; None where a hub id was."""


@dataclass(frozen=True)
class Canary:
    """What is to be served."""

    config: ExpoConfig
    origins: Sequence[Origin]
    served: str
    """What served names begin with, for example ``aligned``."""
    alpha: float
    flags: Sequence[Flag]
    """vLLM's."""
    percent: int
    """Share of the requests that the alpha is to be given."""
    cpu_weight_bytes: int | None
    """None for GPUs."""

    @property
    def alphas(self) -> list[str]:
        """Alpha 0 and the other one, in the chart's form: without exponent, at most 15 digits."""
        digits = 12 if abs(self.alpha) < 1000 else 10
        return list(dict.fromkeys(["0", format_alpha(round(self.alpha, digits))]))

    @property
    def name(self) -> str:
        """Served name of both."""
        return f"{_plain(self.served)}-expo"

    @property
    def folders(self) -> list[Origin]:
        """The sources that are folders of this machine."""
        return [origin for origin in self.origins if origin.hub_id is None]

    @property
    def repositories(self) -> list[Origin]:
        """The sources that are on the hub."""
        return [origin for origin in self.origins if origin.hub_id is not None]


def canary_values(canary: Canary) -> str:
    """Return the values as YAML, with comments that say what to fill in and how to go on."""
    values = {
        "image": {"repository": "expo-serve"},
        "defaults": _defaults(canary),
        "variants": {
            variant_name(alpha): {"alpha": alpha, "servedModelNames": [f"{canary.name}-{alpha}"]}
            for alpha in canary.alphas
        },
        "alias": {"name": canary.name, "weights": _shares(canary)},
        **({} if _is_pinned(canary) else {"allowMutableRevisions": True}),
        "weights": _weights(canary),
        "route": {"enabled": True, "parentRefs": [{"name": "gateway"}]},
        "networkPolicy": {
            "gateway": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}}]
        },
    }
    lines = [*(f"# {line}".rstrip() for line in _head(canary)), "", *_lines(values, _notes(canary))]
    return "\n".join(lines) + "\n"


def variant_name(alpha: str) -> str:
    """Return the variant of an alpha: ``-0.5`` is ``alpha-m0-5``. It becomes part of DNS names."""
    return f"alpha-{alpha.replace('-', 'm').replace('.', '-')}"


def _defaults(canary: Canary) -> dict[str, Any]:
    """Return what holds for both: sources with their commits, rules, vLLM's flags."""
    config = canary.config
    found: dict[str, Any] = {}
    for origin in canary.origins:
        found[origin.operand] = origin.hub_id or _mounted(origin)
        if origin.hub_id:
            found[f"{origin.operand}Revision"] = origin.commit
    optional = {
        "deltaSubfolder": config.delta_subfolder,
        "alphaRules": [rule.text for rule in config.alpha_rules],
        "unmatched": "copy" if config.unmatched == "copy" else None,
        "allow": list(config.allow),
        "allowLinks": list(config.allow_links),
        "allowPickleIndex": config.allow_pickle_index,
    }
    found |= {key: value for key, value in optional.items() if value}
    found["rounding"] = config.rounding
    if config.rounding_seed:
        found["roundingSeed"] = config.rounding_seed
    found["device"] = "gpu" if canary.cpu_weight_bytes is None else "cpu"
    if canary.cpu_weight_bytes is not None:
        found["memory"] = {"weightBytes": canary.cpu_weight_bytes}
    sizes = {_SIZES[flag.name]: int(flag.values[0]) for flag in canary.flags if flag.name in _SIZES}
    extra = [word for flag in canary.flags if not _is_otherwise(flag) for word in flag.words]
    return {**found, **sizes, **({"extraArgs": extra} if extra else {})}


def _mounted(origin: Origin) -> str:
    """Return where a folder of this machine is to lie on the volume; its last part is that of the served name."""
    assert origin.path is not None
    return f"{_MOUNT}/{origin.operand}/{_plain(PurePosixPath(origin.path).name)}"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name)


def _is_otherwise(flag: Flag) -> bool:
    return flag.name in _SIZES or flag.name in _OTHERWISE or flag.name.startswith("ssl-")


def _is_pinned(canary: Canary) -> bool:
    return all(_COMMIT.fullmatch(origin.commit or "") for origin in canary.repositories)


def _shares(canary: Canary) -> dict[str, int]:
    first, *others = map(variant_name, canary.alphas)
    return {first: 100 - canary.percent, others[0]: canary.percent} if others else {first: 100}


def _weights(canary: Canary) -> dict[str, Any]:
    """Return the volume, and the download that fills it with what is on the hub."""
    volume: dict[str, Any] = {"existingClaim": "checkpoints"}
    if not canary.folders:
        volume = {"claim": {"create": True, "size": "100Gi"}}
    download: dict[str, Any] = {"enabled": True}
    if canary.config.allow_pickle_index:
        download["exclude"] = list(_NOT_DOWNLOADED)
    return {"volume": volume, **({"download": download} if canary.repositories else {})}


def _head(canary: Canary) -> Iterator[str]:
    """Yield the comment above the values."""
    stable, *others = canary.alphas
    what = "the aligned model itself" if not canary.config.alpha_rules else "with the alpha rules of the sweep"
    if others:
        yield f"Values of the chart deploy/helm/expo-serve: alpha {others[0]} as a canary beside alpha 0, {what}."
    else:
        yield f"Values of the chart deploy/helm/expo-serve: alpha 0, {what}; no other alpha was shown to help."
    yield ""
    yield "  helm upgrade --install NAME deploy/helm/expo-serve -f THIS_FILE"
    yield "  helm test NAME"
    yield ""
    yield "Fill in first what is marked EDIT."
    if others:
        yield from _next_steps(variant_name(stable), variant_name(others[0]), others[0], canary.name)


def _next_steps(stable: str, canary: str, alpha: str, name: str) -> Iterator[str]:
    yield ""
    yield f"Clients ask for the model {name}, and are divided by alias.weights. X-Expo-Alpha: {alpha}, or 0, picks one."
    yield f"To go on:     move weight from {stable} to {canary}, and run helm upgrade. It edits the route alone."
    yield f"To roll back: give {stable} all of the weight and run helm upgrade, or helm rollback NAME."
    yield f"To finish:    once {canary} has had all of the weight for long enough, take {stable} out of both maps."


def _notes(canary: Canary) -> dict[str, list[str]]:
    """Return comments by the key above which they stand."""
    notes = {
        "image.repository": ["EDIT: where your cluster finds the image (make image)."],
        "route.parentRefs": ["EDIT: your Gateway."],
        "networkPolicy.gateway": ["EDIT: who may send requests: the namespace that your gateway runs in."],
        "weights.volume": [_volume_note(canary)],
        "alias.name": ["What clients ask for."],
    }
    for origin in canary.folders:
        notes[f"defaults.{origin.operand}"] = [f"EDIT: bring {_one_line(origin.path)} onto the volume as this folder."]
    if canary.config.allow_links:
        notes["defaults.allowLinks"] = ["EDIT: folders in the container, or leave them out."]
    if local := [
        flag.name for flag in canary.flags if not _is_otherwise(flag) and any(map(os.path.exists, flag.values))
    ]:
        notes["defaults.extraArgs"] = [f"EDIT: --{name} names a file of this machine." for name in local]
    if canary.cpu_weight_bytes is None:
        notes["defaults.device"] = ["Without GPUs: cpu, and memory.weightBytes."]
    if not _is_pinned(canary):
        notes["allowMutableRevisions"] = ["EDIT: a source has no commit. Give one, and take this away."]
    if left_out := [flag.name for flag in canary.flags if _is_otherwise(flag) and flag.name not in _SIZES]:
        notes["defaults"] = [f"Not taken over: --{name}; {_instead(name)}." for name in dict.fromkeys(left_out)]
    return notes


def _volume_note(canary: Canary) -> str:
    if canary.folders:
        return "EDIT: the claim with the folders above; its root is mounted at /models."
    return "EDIT: room for all sources, and a storage class where the cluster's default is not right."


def _instead(name: str) -> str:
    if name.startswith("ssl-"):
        return "TLS ends at the gateway"
    key = _OTHERWISE[name]
    return "the chart sets what is needed" if key is None else f"the chart has {key}"


def _one_line(text: str | None) -> str:
    """Return a text as a comment may hold it."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def _lines(
    values: Mapping[str, Any], notes: Mapping[str, list[str]], above: str = "", indent: str = ""
) -> Iterator[str]:
    """Yield a map as lines of YAML: maps in block style, all else as JSON, which is YAML too."""
    for key, value in values.items():
        where = f"{above}{key}"
        yield from (f"{indent}# {note}" for note in notes.get(where, ()))
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _lines(value, notes, f"{where}.", f"{indent}  ")
        else:
            yield f"{indent}{key}: {json.dumps(value, ensure_ascii=False).translate(_BREAKS)}"
