"""What a model will ask for next: of each tensor what it took of the last one with the same place in a layer.

Models are layers that are alike: a rank takes the same part of each layer's tensors, in the same order. So after the
first layer most of what comes can be read before it is asked for. A forecast that does not come true costs a read.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

from expo_serve.load.operands import Recipe
from expo_serve.load.selection import Selection

_NUMBER = re.compile(r"\d+")


class Copy(NamedTuple):
    """A copy out of a lazy tensor: which elements went where."""

    selection: Selection
    device: torch.device
    stride: tuple[int, ...]
    """Of the destination."""


class Coming(Protocol):
    """A tensor that the model will be given."""

    @property
    def key(self) -> tuple[object, ...]:
        """Name, and what else decides about what is taken of it (shape and dtype)."""

    @property
    def recipes(self) -> Iterable[Recipe]:
        """Return the recipes of its copies so far."""

    def parts(self, dest: torch.Tensor, selection: Selection) -> Iterable[tuple[torch.Tensor, Selection, Recipe]]:
        """Return a copy of it as parts of one recipe each."""


class Forecast:
    """Knows what was taken of the tensors so far, and tells what will be of those that come.

    Args:
        expect: is called with each copy that is expected, in order; returns whether it wants to hear of more.
    """

    def __init__(self, expect: Callable[[Coming, Copy], bool]) -> None:
        self._expect = expect
        self._coming: deque[Coming] = deque()
        self._told = 0
        """Of those that come: for so many the copies have been told."""
        self._taken: dict[tuple[object, ...], list[Copy]] = {}
        self._now: list[Copy] = []

    def add(self, tensor: Coming) -> None:
        """Note a tensor that the model will be given after the ones that are noted."""
        self._coming.append(tensor)

    def took(self, tensor: Coming, copy: Copy) -> None:
        """Note what the model takes of a tensor.

        Only what it takes while it has that tensor, the first of those that come, says what to read ahead: layers that
        are quantised, or loaded anew, take all of theirs with the last one, when the others are done with.
        """
        if self._coming and self._coming[0] is tensor:
            self._now.append(copy)

    def skip(self, tensor: Coming) -> None:
        """Forget the first of the tensors that come: the model is done with it, and nothing is to be told."""
        if self._coming and self._coming[0] is tensor:
            self._coming.popleft()
            self._told = max(0, self._told - 1)

    def finish(self, tensor: Coming) -> None:
        """Note that the model is done with a tensor, the first of those that come, and tell what is expected now."""
        self.skip(tensor)
        self._taken[_place(tensor.key)] = self._now
        self._now = []
        self.tell()

    def tell(self) -> None:
        """Tell what is expected of the tensors that come, up to the first one of which nothing is known."""
        while self._told < len(self._coming):
            tensor = self._coming[self._told]
            copies = self._taken.get(_place(tensor.key))
            if copies is None:
                return
            self._told += 1
            wants = [self._expect(tensor, copy) for copy in copies]
            if not all(wants):
                return


def _place(key: tuple[object, ...]) -> tuple[object, ...]:
    """Return a tensor's place in its layer: its name without the first number, which is the layer's."""
    name, *others = key
    return _NUMBER.sub("*", str(name), count=1), *others
