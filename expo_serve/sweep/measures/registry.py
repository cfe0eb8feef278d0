"""All measures, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from expo_serve.sweep.measures.answers import Compression, Distinct4, Length, LongestRepeat, Unfinished
from expo_serve.sweep.measures.measure import Measure, Series
from expo_serve.sweep.measures.models import (
    Capability,
    CapabilityChange,
    EffectiveAlpha,
    Kl,
    OverRefusal,
    Perplexity,
)
from expo_serve.sweep.measures.rewards import LengthControlledReward, RewardChange, RewardLevel, WinRate
from expo_serve.sweep.observed import Observed

REGISTRY: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        EffectiveAlpha(),
        RewardLevel(),
        RewardChange(),
        LengthControlledReward(),
        WinRate(),
        Kl(),
        Length(),
        Unfinished(),
        Distinct4(),
        LongestRepeat(),
        Compression(),
        Perplexity(),
        Capability(),
        CapabilityChange(),
        OverRefusal(),
    )
}
"""In the order in which they are shown."""
ALWAYS = frozenset({"effective_alpha", "kl", "reward"})
"""Measures that ``--measure`` does not leave out: the results have fields for them."""


def measure_all(observed: Observed, rewards: Sequence[str], names: Sequence[str] | None) -> Iterator[Series]:
    """Yield everything that can be measured.

    Args:
        observed: what the sweep has observed.
        rewards: the specifications of the rewards, the one to maximise first.
        names: of the measures that are wanted, beside those that always are; None for all.
    """
    for name, measure in REGISTRY.items():
        if names is None or name in names or name in ALWAYS:
            yield from measure.series(observed, rewards)
