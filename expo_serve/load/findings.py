"""Whether all values that a device has computed are finite: a sum of each piece, on its way back to the host."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from expo_serve.errors import ExpoError
from expo_serve.load.device_queue import Mark, Queue
from expo_serve.load.transfer import Transfer, check_on_host

_MOST = 64
"""Turns whose sums may be on their way."""


@dataclass(frozen=True)
class _Finding:
    """The sums of a turn, on the host once the device has passed the mark."""

    mark: Mark
    sums: torch.Tensor
    transfers: Mapping[int, Transfer]


class Findings:
    """Brings sums back to the host without waiting for them.

    Args:
        queue: what the device does.
        pieces: the most that a turn has.
    """

    def __init__(self, queue: Queue, pieces: int) -> None:
        self._queue = queue
        self._sums = queue.host_memory(_MOST * pieces * 4).view(torch.float32).view(_MOST, -1)
        self._findings: deque[_Finding] = deque()
        self._brought = 0
        self._failure: ExpoError | None = None

    def bring(self, sums: torch.Tensor, transfers: Mapping[int, Transfer], after: Sequence[Mark]) -> Mark:
        """Enqueue the copying of a turn's sums.

        Args:
            sums: fp32, on the device.
            transfers: the pieces that are to be looked at, by their places in ``sums``.
            after: the ends of what computes the sums.

        Returns:
            The end of the copying.
        """
        if len(self._findings) == _MOST:
            self._look_at(self._findings.popleft())
        host = self._sums[self._brought % _MOST]
        self._brought += 1
        mark = self._queue.run(partial(_copy, host, sums), after)
        self._findings.append(_Finding(mark, host, transfers))
        return mark

    def look(self, *, wait: bool = False) -> None:
        """Look at what has come back so far.

        Args:
            wait: for all of it.

        Raises:
            ExpoError: a value was not finite; it is raised again each time.
        """
        while self._findings and (wait or self._findings[0].mark.is_passed()):
            self._look_at(self._findings.popleft())
        if self._failure:
            raise self._failure

    def forget(self) -> None:
        """Let go of what has not been looked at."""
        self._findings.clear()

    def _look_at(self, finding: _Finding) -> None:
        finding.mark.wait()
        for place, transfer in finding.transfers.items():
            if not math.isfinite(finding.sums[place].item()):
                try:
                    check_on_host(transfer.recipe, transfer.selection)
                except ExpoError as error:
                    self._failure = self._failure or error


def _copy(host: torch.Tensor, device: torch.Tensor) -> None:
    host.copy_(device, non_blocking=True)
