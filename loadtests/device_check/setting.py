"""What every case is given: the device, the size of the work, a folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from loadtests.device_check.outcome import Skipped


@dataclass(frozen=True)
class Setting:
    """Where and how large a case works.

    Args:
        device: that is checked; the CPU checks the command itself.
        quick: small sizes and few rounds: does everything run?
        work: a folder for files, shared by the cases of one run.
        plants: falsify one result on purpose: the case must find it.
    """

    device: torch.device
    quick: bool
    work: Path
    plants: bool = False

    @property
    def is_cuda(self) -> bool:
        """Whether the load goes through the device's stage; onto the CPU it goes the host's way."""
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        """How often each way is measured, after one that does not count."""
        return 1 if self.quick else 5

    def need_cuda(self, what: str) -> None:
        """Skip the case on the CPU.

        Raises:
            Skipped: there is no such thing on a CPU.
        """
        if not self.is_cuda:
            raise Skipped(f"{what}: only on a GPU")

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """How long it takes until the device has done it."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def memory(self) -> Memory:
        """Start to watch the device's memory."""
        return Memory(self)


class Memory:
    """The peak of a device's memory since this was made, over what was there before."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        if setting.is_cuda:
            torch.cuda.synchronize(setting.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(setting.device)
            self._allocated = torch.cuda.memory_allocated(setting.device)
            self._reserved = torch.cuda.memory_reserved(setting.device)

    def peaks(self) -> dict[str, int] | None:
        """Bytes above those of the beginning; None on the CPU."""
        if not self._setting.is_cuda:
            return None
        return {
            "allocated": torch.cuda.max_memory_allocated(self._setting.device) - self._allocated,
            "reserved": torch.cuda.max_memory_reserved(self._setting.device) - self._reserved,
        }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or the load, says that the device has no memory left."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error)
