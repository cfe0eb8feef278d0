"""The configuration of a deployment: its sources, its alpha, its rules. Imports neither torch nor vLLM.

:class:`ExpoConfig` is the content of ``--model-loader-extra-config``, which reaches every vLLM process.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from expo_serve.errors import ConfigError
from expo_serve.shown import plain, shown

MAX_ALPHA = 10_000.0
"""Pairs that are one update of reinforcement learning apart are extrapolated a thousandfold."""
USUAL_ALPHA = 100.0
"""A larger alpha is warned of."""
ALPHA_RANGE = f"a decimal number from -{MAX_ALPHA:.0f} to {MAX_ALPHA:.0f}, such as 0.5"
SOURCE_EXPECTED = "a folder or hub id"
_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def parse_alpha(value: object) -> float:
    """Read alpha from a decimal string or a number.

    Raises:
        ValueError: the value is not a finite decimal, or its size is over 10,000.
    """
    if isinstance(value, str):
        number = float(value) if _DECIMAL.fullmatch(value.strip()) else math.nan
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value) if abs(value) <= MAX_ALPHA else math.inf  # float() of a huge integer overflows
    else:
        number = math.nan
    if not math.isfinite(number) or abs(number) > MAX_ALPHA:
        raise ValueError(f"alpha must be {ALPHA_RANGE}; found {shown(value)}")
    return number


def format_alpha(alpha: float) -> str:
    """Return alpha's canonical form: the shortest decimal that reads back the same, without exponent (``0.5``)."""
    text = format(Decimal(repr(float(alpha))), "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


Method = Literal["dithered", "nearest"]
DoubtName = Literal["different-revisions", "other-base", "same-sources", "whole-checkpoint"]
"""Findings that refuse a load unless they are allowed: docs/sources.md#doubts."""
MAX_SEED = 2**32 - 1
SEED_RANGE = f"an integer from 0 to {MAX_SEED}"


class Rounding(NamedTuple):
    """How results in bf16 and fp16 are rounded: docs/number-rule.md#rounding."""

    method: Method = "nearest"
    seed: int = 0

    def key(self, name: str) -> int | None:
        """Return the 64-bit key from which the random bits of a tensor's elements come; None to round to nearest.

        Args:
            name: the tensor's name in the result.
        """
        if self.method == "nearest":
            return None
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "little")


NEAREST = Rounding()


def parse_seed(value: object) -> int:
    """Read the seed of dithered rounding from an integer, or from its decimal digits.

    Raises:
        ValueError: it is not one, or does not fit into 32 bits.
    """
    digits = value.strip().lstrip("0") or "0" if isinstance(value, str) and value.strip() else ""
    is_number = digits.isascii() and digits.isdigit() and len(digits) <= len(str(MAX_SEED))
    number = int(digits) if is_number else value if isinstance(value, int) and not isinstance(value, bool) else -1
    if not 0 <= number <= MAX_SEED:
        raise ValueError(f"the seed must be {SEED_RANGE}; found {shown(value)}")
    return number


def _as_list(given: object) -> object:
    """Turn one string into a list of it, as YAML files have it."""
    return [given] if isinstance(given, str) else given


def _real_folder(given: str) -> str:
    """Return the path of a folder with links resolved, so that every process means the same one."""
    try:
        if given.strip():
            return str(Path(given).expanduser().resolve())
    except (OSError, RuntimeError, ValueError):  # of an unknown user, or not a path at all
        pass
    raise ValueError(f"expected a folder, found {shown(given)}")


class AlphaRule(BaseModel):
    """Sets ``alpha`` for the tensors whose checkpoint name matches ``pattern`` (``re.search``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    alpha: float

    @property
    def text(self) -> str:
        """The rule as the command line takes it: ``REGEX=VALUE``."""
        return f"{self.pattern}={format_alpha(self.alpha)}"

    def matches(self, name: str) -> bool:
        """Return whether the rule applies to the tensor of this name."""
        return re.search(self.pattern, name) is not None


def parse_alpha_rule(value: object) -> AlphaRule:
    """Read ``REGEX=VALUE``, split at the last ``=``, or a mapping with the keys ``pattern`` and ``alpha``.

    Raises:
        ValueError: there is no ``=``, the pattern is empty or invalid, or the value is not an alpha.
    """
    if isinstance(value, AlphaRule):
        return value
    if isinstance(value, Mapping) and set(value) == {"pattern", "alpha"}:
        value = f"{value['pattern']}={value['alpha']}"
    pattern, divider, number = value.rpartition("=") if isinstance(value, str) else ("", "", "")
    rule = shown(value, 200)
    if not divider or not pattern:
        raise ValueError(f"an alpha rule is REGEX=VALUE, such as 'embed_tokens|lm_head=0'; found {rule}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # the others: a huge number, too many groups
        raise ValueError(f"alpha rule {rule}: {shown(pattern, 200)} is not a regular expression: {error}") from None
    try:
        return AlphaRule(pattern=pattern, alpha=parse_alpha(number))
    except ValueError as error:
        raise ValueError(f"alpha rule {rule}: {error}") from None


def alpha_for(name: str, alpha: float, rules: tuple[AlphaRule, ...]) -> float:
    """Return the alpha of one tensor: that of the first rule that matches its name, else ``alpha``."""
    return next((rule.alpha for rule in rules if rule.matches(name)), alpha)


class Source(BaseModel):
    """A checkpoint or delta that was found: its folder and its version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Hub id, or last part of the folder's path. Never a path, because clients see it."""
    path: str
    """Real path of the folder, with links resolved."""
    revision: str | None = None
    """Commit on the hub; None for a plain folder."""
    fingerprint: str = ""
    """Hash of the file sizes and safetensors headers; it distinguishes layouts, not values."""
    pickles: bool = False
    """Whether PyTorch's .bin files may be walked over, where there are no others."""
    links: tuple[str, ...] = ()
    """Folders to which links among the files may lead, beside the source's own."""

    @property
    def short_name(self) -> str:
        """Last part of the name."""
        return self.name.rsplit("/", 1)[-1]


class Pinned(BaseModel):
    """The sources as the command resolved them once, so that no worker reads another version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Source
    aligned: Source | None = None
    delta: Source | None = None
    """Takes the place of ``aligned``."""
    model: Literal["base", "aligned", "delta"] = "aligned"
    """The source whose folder vLLM gets as the model."""
    tokenizer: str | None = None
    """Folder of the tokenizer and the generation config; None if it is the model's."""
    overrides: dict[str, Any] = {}
    """Keys of the model's config that the result changes, with their new values."""
    started: float | None = None
    """CLOCK_MONOTONIC at the start of the command, in seconds."""
    on_terminal: bool = False
    """True if the command's standard error, which the workers share, is a terminal."""

    @property
    def deployed(self) -> Source:
        """The source whose folder vLLM gets as the model."""
        source = {"base": self.base, "aligned": self.aligned, "delta": self.delta}[self.model]
        assert source is not None
        return source

    @property
    def named_after(self) -> Source:
        """The source that the served model is named after: aligned, or the delta in its place."""
        source = self.aligned or self.delta
        assert source is not None
        return source


class KeysError(ValueError):
    """A rule over several keys is broken. The message can name each key in the caller's way, for example as a flag.

    Args:
        template: message with one ``{}`` for each key.
        keys: fields of :class:`ExpoConfig`.
    """

    def __init__(self, template: str, *keys: str) -> None:
        super().__init__(template.format(*keys))
        self._template, self._keys = template, keys

    def message(self, name: Callable[[str], str]) -> str:
        """Return the message with every key named by ``name``."""
        return self._template.format(*map(name, self._keys))


class ExpoConfig(BaseModel):
    """One deployment. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = None
    """Folder or hub id; None under plain vLLM with a delta, where vLLM's model is base."""
    alpha: Annotated[float, BeforeValidator(parse_alpha)]
    aligned: str | None = None
    """Folder or hub id; None under plain vLLM, where vLLM's model is aligned."""
    delta: str | None = None
    """Folder or hub id of a delta; takes the place of ``aligned``."""
    base_revision: str | None = None
    aligned_revision: str | None = None
    delta_revision: str | None = None
    delta_subfolder: str | None = None
    """Folder within ``delta`` that holds the adapter, where a repository holds several."""
    alpha_rules: tuple[Annotated[AlphaRule, BeforeValidator(parse_alpha_rule)], ...] = ()
    unmatched: Literal["refuse", "copy"] = "refuse"
    allow_pickle_index: bool = False
    """Whether PyTorch's .bin files are read, where a source has no safetensors; nothing of their pickles is run."""
    allow_links: Annotated[tuple[Annotated[str, AfterValidator(_real_folder)], ...], BeforeValidator(_as_list)] = ()
    """Folders to which links among the files of the sources may lead."""
    allow: Annotated[tuple[DoubtName, ...], BeforeValidator(_as_list)] = ()
    rounding: Method = "dithered"
    rounding_seed: Annotated[int, BeforeValidator(parse_seed)] = 0
    pinned: Pinned | None = None

    @model_validator(mode="after")
    def _check_sources(self) -> ExpoConfig:
        if self.aligned is not None and self.delta is not None:
            raise KeysError("{} and {} are both given: leave one out", "aligned", "delta")
        if self.base is None and self.delta is None:
            raise KeysError("{} is missing: expected " + SOURCE_EXPECTED, "base")
        if self.delta_revision is not None and self.delta is None:
            raise KeysError("{} is given, but {} is not", "delta_revision", "delta")
        if self.delta_subfolder is not None and self.delta is None:
            raise KeysError("{} is given, but {} is not", "delta_subfolder", "delta")
        if self.aligned_revision is not None and self.delta is not None:
            raise KeysError("{} is given, but {} is not", "aligned_revision", "aligned")
        return self

    @property
    def alpha_text(self) -> str:
        """Alpha in its canonical form."""
        return format_alpha(self.alpha)

    @property
    def how_to_round(self) -> Rounding:
        """The rounding of every tensor."""
        return Rounding(self.rounding, self.rounding_seed)

    def alpha_for(self, name: str) -> float:
        """Return the alpha of the tensor with this checkpoint name."""
        return alpha_for(name, self.alpha, self.alpha_rules)


def deployment_id(config: ExpoConfig, model: str, revision: str | None) -> str:
    """Return a digest of all that decides what the weights are: 16 hexadecimal digits, the same after a restart.

    It keeps caches apart that name a model by its path. A source on the hub counts by name and commit, a folder by its
    path and the headers of its files; other values in the same folder give the same digest, as they do for vLLM.

    Args:
        config: the deployment.
        model: vLLM's model, which is one of the sources under plain vLLM.
        revision: its revision.
    """
    pinned = config.pinned
    if pinned:
        there = {"base": pinned.base, "aligned": pinned.aligned, "delta": pinned.delta}
        sources: dict[str, list[str | None]] = {
            side: [source.name, source.revision] if source.revision else [source.path, source.fingerprint]
            for side, source in there.items()
            if source
        }
    else:
        sides = ("base", "aligned", "delta")
        given = {side: [getattr(config, side), getattr(config, f"{side}_revision")] for side in sides}
        folder: dict[str, list[str | None]] = {"subfolder": [config.delta_subfolder]} if config.delta_subfolder else {}
        sources = {**given, **folder, "model": [model, revision]}
    parts = {
        "sources": sources,
        "alpha": config.alpha_text,
        "rules": [rule.text for rule in config.alpha_rules],
        "unmatched": config.unmatched,
        "rounding": [config.rounding, config.rounding_seed if config.rounding == "dithered" else 0],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def parse_config(values: Mapping[str, Any], where: str = "", name: Callable[[str], str] = str) -> ExpoConfig:
    """Validate a mapping into an :class:`ExpoConfig`.

    Args:
        values: keys are the names of the fields.
        where: origin of the mapping, with which the message begins, for example ``--model-loader-extra-config``.
        name: returns how the message names a key, for example as a flag.

    Raises:
        ConfigError: names the first problem, in one line.
    """
    try:
        return ExpoConfig.model_validate(dict(values))
    except ValidationError as error:
        problem = _first_problem(error, name)
        raise ConfigError(f"{where}: {problem}" if where else problem) from None


def _first_problem(error: ValidationError, name: Callable[[str], str]) -> str:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, KeysError):
        return cause.message(name)
    key, found = plain(".".join(str(part) for part in first["loc"])), shown(first["input"])
    match first["type"]:
        case "extra_forbidden":
            known = ", ".join(field for field in ExpoConfig.model_fields if field != "pinned")
            return f"unknown key '{key}'; known keys: {known}"
        case "missing":
            return f"{name(key)} is missing" + (f": expected {ALPHA_RANGE}" if key == "alpha" else "")
        case "string_type":
            return f"{name(key)}: expected a string, found {found}"
        case "literal_error":
            return f"{name(key)}: expected {first['ctx']['expected']}, found {found}"
    return f"{name(key)}: {first['msg'].removeprefix('Value error, ')}"
