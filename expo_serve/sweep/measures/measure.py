"""What a measure is, and how its numbers come to intervals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from expo_serve.sweep.observed import Observed
from expo_serve.sweep.results import Measured, MeasureInfo
from expo_serve.sweep.statistics import Array, Estimate, mean, share_interval


@dataclass(frozen=True)
class Series:
    """One measure over the alphas."""

    name: str
    info: MeasureInfo
    by_alpha: Mapping[float, Measured]
    samples: Mapping[tuple[float, int], float] = field(default_factory=dict)
    """What single answers have, by alpha and prompt; empty where the measure is not of single answers."""


class Measure(ABC):
    """A measure; its docstring has formula and source. One without state, so one instance is enough."""

    name: ClassVar[str]
    """What ``--measure`` takes; series of one reward or task among several are called ``NAME:WHICH``."""

    @abstractmethod
    def series(self, observed: Observed, rewards: Sequence[str]) -> Iterator[Series]:
        """Yield what can be measured: nothing where nothing of the kind was observed.

        Args:
            observed: what the sweep has observed.
            rewards: the specifications of the rewards, the one to maximise first.
        """


def means(observed: Observed, values: Mapping[tuple[float, int], float]) -> dict[float, Measured]:
    """Return the mean over the answers at each alpha, with an interval by Student's t."""
    return means_of(observed, observed.of_answers(values))


def means_of(observed: Observed, table: Array) -> dict[float, Measured]:
    """Return the mean of each column with an interval by Student's t.

    Args:
        observed: what the sweep has observed.
        table: of the shape (rows, alphas), NaN where there is no value.
    """
    return from_estimate(observed, mean(table), np.isfinite(table).sum(axis=0))


def shares(observed: Observed, table: Array) -> dict[float, Measured]:
    """Return the mean of each column; where it is of zeros and ones, its interval is that of a share."""
    found = means_of(observed, table)
    for alpha, column in zip(observed.alphas, table.T, strict=True):
        seen = column[np.isfinite(column)]
        if len(seen) and np.isin(seen, (0.0, 1.0)).all():
            low, high = share_interval(int(seen.sum()), len(seen))
            found[alpha] = Measured(value=float(seen.mean()), low=low, high=high, n=len(seen))
    return found


def from_estimate(observed: Observed, estimate: Estimate, counts: Sequence[int] | Array) -> dict[float, Measured]:
    """Return estimates of the shape (1, alphas) by alpha.

    Args:
        observed: what the sweep has observed.
        estimate: the estimates.
        counts: what each of them is over.
    """
    columns = zip(observed.alphas, estimate.value[0], estimate.low()[0], estimate.high()[0], counts, strict=True)
    return {alpha: measured(value, low, high, int(count)) for alpha, value, low, high, count in columns}


def measured(value: float, low: float, high: float, count: int) -> Measured:
    """Return a number with its interval, None for what is not finite."""
    if not np.isfinite(value):
        return Measured(value=None, n=count)
    is_known = np.isfinite(low) and np.isfinite(high)
    return Measured(
        value=float(value), low=float(low) if is_known else None, high=float(high) if is_known else None, n=count
    )


def at_zero(value: float, count: int) -> Measured:
    """Return what alpha 0 has against itself."""
    return Measured(value=value, n=count)
