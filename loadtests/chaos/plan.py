"""What happens to which server, and when: a function of the seed and the minutes alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loadtests.chaos.faults import CATALOGUE, Kind

START_SECONDS, FAILED_START_SECONDS = 45.0, 25.0
"""A start with the first answers, and one that a fault ends on the way."""
AROUND_SECONDS = 12.0
"""What a fault costs beside the time that it lasts: streams before it, recovery, answers to compare."""


@dataclass(frozen=True)
class Fault:
    """One fault of a plan.

    Args:
        kind: a name in the catalogue.
        delay: seconds of quiet serving (or starting) before it.
        holds: seconds that it lasts.
    """

    kind: str
    delay: float
    holds: float

    @property
    def what(self) -> Kind:
        """The entry of the catalogue."""
        return CATALOGUE[self.kind]


@dataclass(frozen=True)
class Life:
    """One server from its start to its end; the last fault ends it, the others it has to survive."""

    faults: tuple[Fault, ...]

    @property
    def needs(self) -> frozenset[str]:
        """The surroundings of the server."""
        return frozenset().union(*(fault.what.needs for fault in self.faults))

    @property
    def seconds(self) -> float:
        """How long it takes, estimated."""
        start = START_SECONDS if self.faults[0].what.when == "serving" else FAILED_START_SECONDS
        return start + sum(AROUND_SECONDS + fault.delay + fault.holds for fault in self.faults)


def plan(seed: int, minutes: float, kinds: Sequence[str] = ()) -> list[Life]:
    """Return the lives of servers that fill the time, one at least.

    Every kind of fault comes once before any comes again. Each life ends with a fault that ends a server, or is a start
    that meets one; those that a server survives are dealt out among the lives that serve.

    Args:
        seed: decides the order, the moments and how long each fault lasts.
        minutes: how long all of it takes, about.
        kinds: names of the faults to choose from; all of them where it is empty.

    Raises:
        ValueError: a kind is unknown.
    """
    if unknown := set(kinds) - CATALOGUE.keys():
        raise ValueError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(CATALOGUE)}")
    chosen = [CATALOGUE[name] for name in kinds] if kinds else list(CATALOGUE.values())
    chance = random.Random(seed)
    lives: list[Life] = []
    left = minutes * 60
    for life in _lives(chance, chosen):
        if lives and life.seconds > left:
            return lives
        lives.append(life)
        left -= life.seconds
    raise AssertionError("the lives have no end")


def _lives(chance: random.Random, kinds: Sequence[Kind]) -> Iterator[Life]:
    """Yield lives without end, a round of all kinds after the other."""
    while True:
        last = _shuffled(chance, [kind for kind in kinds if kind.is_last])
        survived = _shuffled(chance, [kind for kind in kinds if not kind.is_last])
        serving = [kind for kind in last if kind.when == "serving"]
        hands = _dealt(survived, max(1, len(serving)))
        for kind in last:
            before = hands.pop() if kind.when == "serving" else []
            yield Life(tuple(_fault(chance, each) for each in [*before, kind]))
        for rest in hands:
            if rest:
                yield Life(tuple(_fault(chance, each) for each in rest))


def _shuffled(chance: random.Random, kinds: list[Kind]) -> list[Kind]:
    return chance.sample(kinds, len(kinds))


def _dealt(kinds: Sequence[Kind], hands: int) -> list[list[Kind]]:
    return [list(kinds[number::hands]) for number in range(hands)]


def _fault(chance: random.Random, kind: Kind) -> Fault:
    return Fault(kind.name, round(chance.uniform(*kind.delays), 1), round(chance.uniform(*kind.holds), 1))
