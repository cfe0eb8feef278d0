"""Huge pages for parameters that nobody has touched: one fault for 2 MiB instead of one for each of 512 pages.

The kernel is asked, and need not do it. Resident memory does not grow by it: only whole huge pages within a
parameter's memory are asked for. Measurements: docs/performance.md#huge-pages.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

_HUGE_BYTES = 2 << 20
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
"""None where the platform has none."""


def ask_for_huge_pages(model: torch.nn.Module) -> int:
    """Ask for huge pages under a model's parameters on the CPU; return for how many bytes the kernel has taken note."""
    if _ADVICE is None:
        return 0
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in model.parameters() if part.is_cpu}
    advise = ctypes.CDLL(None).madvise
    noted = 0
    for address, storage in storages.items():
        first = -(-address // _HUGE_BYTES) * _HUGE_BYTES
        size = (address + storage.nbytes()) // _HUGE_BYTES * _HUGE_BYTES - first
        if size > 0 and not advise(ctypes.c_void_p(first), ctypes.c_size_t(size), _ADVICE):
            noted += size
    return noted
