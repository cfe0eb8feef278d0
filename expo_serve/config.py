"""What a deployment is: its sources, its alpha, its rules. Pure: no torch, no vLLM, no environment.

:class:`ExpoConfig` is what ``--model-loader-extra-config`` carries to every vLLM process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from expo_serve.errors import ConfigError, UsageError

MAX_ALPHA = 100.0
ALPHA_RANGE = f"a decimal number from -{MAX_ALPHA:.0f} to {MAX_ALPHA:.0f}, such as 0.5"
_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def parse_alpha(value: object) -> float:
    """Read alpha from a decimal text or a number.

    Raises:
        ValueError: it is not a finite decimal, or its size is over 100.
    """
    if isinstance(value, str):
        number = float(value) if _DECIMAL.fullmatch(value.strip()) else math.nan
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value) if abs(value) <= MAX_ALPHA else math.inf  # float() of a huge integer overflows
    else:
        number = math.nan
    if not math.isfinite(number) or abs(number) > MAX_ALPHA:
        raise ValueError(f"alpha must be {ALPHA_RANGE}; found {value!r:.100}")
    return number


def format_alpha(alpha: float) -> str:
    """Alpha's one text: the shortest decimal that gives the number, without exponent (``0.5``, ``1``, ``0``)."""
    text = format(Decimal(repr(float(alpha))), "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


class AlphaRule(BaseModel):
    """Tensors whose checkpoint name matches ``pattern`` (``re.search``) get ``alpha``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    alpha: float

    @property
    def text(self) -> str:
        """The rule as it is written on the command line."""
        return f"{self.pattern}={format_alpha(self.alpha)}"

    def matches(self, name: str) -> bool:
        """Whether the rule applies to the tensor of this name."""
        return re.search(self.pattern, name) is not None


def parse_alpha_rule(value: object) -> AlphaRule:
    """Read ``REGEX=VALUE``; the last ``=`` divides.

    Raises:
        ValueError: no ``=``, an empty or broken pattern, or a value that is no alpha.
    """
    if isinstance(value, AlphaRule):
        return value
    if isinstance(value, Mapping) and set(value) == {"pattern", "alpha"}:
        value = f"{value['pattern']}={value['alpha']}"
    pattern, divider, number = str(value).rpartition("=")
    if not divider or not pattern:
        raise ValueError(f"an alpha rule is REGEX=VALUE, such as 'embed_tokens|lm_head=0'; found {value!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"alpha rule {value!r}: {pattern!r} is not a regular expression: {error}") from None
    try:
        return AlphaRule(pattern=pattern, alpha=parse_alpha(number))
    except ValueError as error:
        raise ValueError(f"alpha rule {value!r}: {error}") from None


def alpha_for(name: str, alpha: float, rules: tuple[AlphaRule, ...]) -> float:
    """The alpha of one tensor: that of the first rule that matches its name, else the deployment's."""
    return next((rule.alpha for rule in rules if rule.matches(name)), alpha)


class Source(BaseModel):
    """One checkpoint, found: where it lies and which version it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The hub id, or the last part of the folder's path. Never a path: it is shown to clients."""
    path: str
    """The real folder, links followed."""
    revision: str | None = None
    """The commit on the hub; None for a plain folder."""
    fingerprint: str = ""
    """Hash of the file sizes and safetensors headers; it tells layouts apart, not values."""

    @property
    def short_name(self) -> str:
        """The last part of the name."""
        return self.name.rsplit("/", 1)[-1]


class Pinned(BaseModel):
    """What the command resolved once, so that no worker reads another version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Source
    aligned: Source | None = None
    delta: Source | None = None
    """In place of ``aligned``."""
    model: Literal["base", "aligned", "delta"] = "aligned"
    """The side whose folder vLLM takes for the model."""
    tokenizer: str | None = None
    """The folder of the tokenizer and the generation config, where it is not the model's."""
    overrides: dict[str, Any] = {}
    """What the result's config says otherwise than the model's."""
    started: float | None = None
    """CLOCK_MONOTONIC when the command was called, in seconds."""
    on_terminal: bool = False
    """Whether the command's standard error, to which the workers' goes, is a terminal."""

    @property
    def deployed(self) -> Source:
        """The folder that vLLM takes for the model."""
        source = {"base": self.base, "aligned": self.aligned, "delta": self.delta}[self.model]
        assert source is not None
        return source

    @property
    def named_after(self) -> Source:
        """What the served model is named after: the aligned side, or the delta where there is none."""
        source = self.aligned or self.delta
        assert source is not None
        return source


class ExpoConfig(BaseModel):
    """One deployment. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = None
    """None under plain vLLM with a delta: there the model itself is base."""
    alpha: Annotated[float, BeforeValidator(parse_alpha)]
    aligned: str | None = None
    """None under plain vLLM: there the model itself is the aligned side."""
    delta: str | None = None
    """What takes base to aligned, in place of ``aligned``."""
    base_revision: str | None = None
    aligned_revision: str | None = None
    delta_revision: str | None = None
    alpha_rules: tuple[Annotated[AlphaRule, BeforeValidator(parse_alpha_rule)], ...] = ()
    unmatched: Literal["refuse", "copy"] = "refuse"
    pinned: Pinned | None = None

    @model_validator(mode="after")
    def _check_sources(self) -> ExpoConfig:
        if self.aligned is not None and self.delta is not None:
            raise ValueError("aligned and delta are both given: give the one or the other")
        if self.base is None and self.delta is None:
            raise ValueError("key 'base' is missing")
        if self.delta_revision is not None and self.delta is None:
            raise ValueError("delta_revision is given, but no delta")
        if self.aligned_revision is not None and self.delta is not None:
            raise ValueError("aligned_revision is given, but the sources are base and delta")
        return self

    @property
    def alpha_text(self) -> str:
        """Alpha's one text."""
        return format_alpha(self.alpha)

    def alpha_for(self, name: str) -> float:
        """The alpha of the tensor with this checkpoint name."""
        return alpha_for(name, self.alpha, self.alpha_rules)


def parse_config(values: Mapping[str, Any], where: str) -> ExpoConfig:
    """Validate a mapping into an :class:`ExpoConfig`.

    Args:
        values: keys as the fields are named.
        where: what the mapping is, for the message: ``--model-loader-extra-config``.

    Raises:
        ConfigError: the first thing that is wrong, in one line.
    """
    try:
        return ExpoConfig.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(name for name in ExpoConfig.model_fields if name != "pinned")
        return f"unknown key {key!r}; known keys: {known}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def alpha_from_flag(text: str) -> float:
    """Read ``--alpha``.

    Raises:
        UsageError: it is not an alpha.
    """
    try:
        return parse_alpha(text)
    except ValueError as error:
        raise UsageError(f"--alpha: {error}") from None


def rules_from_flags(given: object) -> tuple[AlphaRule, ...]:
    """Read every ``--alpha-rule``; a configuration file may give one text or a list.

    Raises:
        UsageError: one is not ``REGEX=VALUE``.
    """
    try:
        return tuple(parse_alpha_rule(text) for text in (given if isinstance(given, list) else [given]))
    except ValueError as error:
        raise UsageError(f"--alpha-rule: {error}") from None
