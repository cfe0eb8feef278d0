"""How far two tensors lie apart, counted in values of their dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Distance:
    """What comparing two tensors gave."""

    values: int
    differing: int
    """Values whose bits differ; 0.0 and -0.0 do."""
    largest: int
    """Steps of the dtype between the two that lie farthest apart; 0.0 and -0.0 lie none apart."""
    unwritten: int
    """NaN where a number is expected: most likely what was there before."""
    beyond: int
    """Values more than one step apart, and farther than ``slack``."""

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.values + other.values,
            self.differing + other.differing,
            max(self.largest, other.largest),
            self.unwritten + other.unwritten,
            self.beyond + other.beyond,
        )


NONE = Distance(0, 0, 0, 0, 0)


def distance(found: torch.Tensor, expected: torch.Tensor, slack: float = 0.0) -> Distance:
    """Compare two tensors of one shape and dtype on the CPU.

    Args:
        found: what came out.
        expected: what should have.
        slack: how far apart, as numbers, two values may lie that are more than one step apart: near zero the steps are
            much smaller than the error of the operands.
    """
    found, expected = found.cpu().contiguous(), expected.cpu().contiguous()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    here, there = bits(found), bits(expected)
    differing = here != there
    count = int(differing.count_nonzero())
    if not count:
        return Distance(found.numel(), 0, 0, 0, 0)
    one, other = found.reshape(-1)[differing], expected.reshape(-1)[differing]
    steps = (ordered(one) - ordered(other)).abs()
    if not found.is_floating_point():
        return Distance(found.numel(), count, int(steps.max()), 0, int((steps > 1).count_nonzero()))
    apart = (one.double() - other.double()).abs()
    holes = one.isnan() & ~other.isnan()
    beyond = (steps > 1) & ~(apart <= slack)  # NaN is never within
    return Distance(found.numel(), count, int(steps.max()), int(holes.count_nonzero()), int(beyond.count_nonzero()))


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns of all values, in one row."""
    return values.contiguous().reshape(-1).view(_INTEGERS[values.element_size()])


def ordered(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the values, neighbours one apart, 0.0 and -0.0 the same."""
    patterns = bits(values)
    wide = patterns.long()
    if not values.is_floating_point():
        return wide
    return torch.where(wide < 0, torch.iinfo(patterns.dtype).min - wide, wide)
