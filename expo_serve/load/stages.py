"""The stages of one load: one for each device, and the forecast of what they will be asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress

import torch

from expo_serve.load import sizes
from expo_serve.load.device_queue import CudaQueue, Mark, Queue
from expo_serve.load.forecast import Coming, Copy, Forecast
from expo_serve.load.operands import Recipe
from expo_serve.load.selection import Selection
from expo_serve.load.stage import Stage
from expo_serve.load.threads import Prefetch, default_threads

_PATIENCE_SECONDS = 5.0
"""After a failure: for reads that nobody wants any more."""


class Stages:
    """One :class:`Stage` for each device of a load, between entering and leaving the context.

    Args:
        threads: that read for each device at once.
        prefetch: brings cold files into the page cache; is closed with the context.
        queue_of: returns what a device does, or None where results are made on the host and copied.
        stage_bytes: of each turn.
        turns: number of turns.
    """

    def __init__(
        self,
        threads: int | None = None,
        prefetch: Prefetch | None = None,
        queue_of: Callable[[torch.device], Queue | None] | None = None,
        stage_bytes: int = sizes.STAGE_BYTES,
        turns: int = sizes.STAGE_TURNS,
    ) -> None:
        self._sizes = stage_bytes, turns
        self._threads = threads or default_threads()
        self._prefetch = prefetch
        self._queue_of = queue_of or _cuda_queue
        self._stages: dict[torch.device, Stage | None] = {}
        self._is_open = False
        self._forecast = Forecast(self._expect)

    def __enter__(self) -> Stages:
        self._is_open = True
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._is_open = False
        stages, self._stages = self._stages, {}
        until = time.monotonic() + _PATIENCE_SECONDS if failure else None
        # What fails now is a consequence of what has failed before.
        with suppress(Exception) if failure else nullcontext(), ExitStack() as closing:
            if self._prefetch:
                closing.callback(self._prefetch.close, until)
            for stage in stages.values():
                if stage:
                    closing.callback(stage.close, until)

    def onto(self, device: torch.device) -> Stage | None:
        """Return the stage of a device; None where results are made on the host and copied, and outside the context.

        Raises:
            LoadError: there is no memory for its buffers.
        """
        if device not in self._stages and self._is_open:
            queue = self._queue_of(device)
            self._stages[device] = Stage(queue, self._threads, *self._sizes, self._prefetch) if queue else None
        return self._stages.get(device)

    def fill(self, dest: torch.Tensor, selection: Selection, recipe: Recipe) -> None:
        """Fill a part of a parameter on a device that has a stage, as :meth:`Stage.fill` does."""
        stage = self.onto(dest.device)
        assert stage is not None
        stage.fill(dest, selection, recipe)

    def run(self, device: torch.device, work: Callable[[], None]) -> Mark:
        """Enqueue tensor operations on the model's current stream of a device that has a stage."""
        stage = self.onto(device)
        assert stage is not None
        return stage.run(work)

    def took(self, tensor: Coming, dest: torch.Tensor, selection: Selection) -> None:
        """Note a copy out of a tensor, as :meth:`Forecast.took` does."""
        self._forecast.took(tensor, Copy(selection, dest.device, dest.stride()))

    def announce(self, tensor: Coming) -> None:
        """Note a tensor that the model will be given after those that are noted."""
        if self._is_open:
            self._forecast.add(tensor)

    def finish(self, tensor: Coming) -> None:
        """Note that the model is done with a tensor; what was read of it ahead, and not asked for, is given up."""
        if not any(self._stages.values()):
            self._forecast.skip(tensor)
            return
        recipes = list(tensor.recipes)
        for stage in self._stages.values():
            if stage:
                stage.give_up(recipes)
        self._forecast.finish(tensor)

    def _expect(self, tensor: Coming, copy: Copy) -> bool:
        stage = self._stages.get(copy.device)
        if not stage:
            return True
        dest = torch.empty_strided(copy.selection.shape, copy.stride, device="meta")
        for part, selection, recipe in tensor.parts(dest, copy.selection):
            stage.expect(part, selection, recipe)
        return stage.wants_more

    def wait(self) -> None:
        """Wait until everything is written, as :meth:`Stage.wait` does for one device."""
        for stage in self._stages.values():
            if stage:
                stage.wait()


def _cuda_queue(device: torch.device) -> Queue | None:
    return CudaQueue(device) if device.type == "cuda" else None
