"""Is memory that the model frees while it loads used again, inside of a memory pool too (vLLM's sleep mode)?

Torch gives no block back, while a pool is open, that another stream was recorded for. A model that is quantised while
it loads frees each layer's original: with such a record all originals would lie beside all results.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.session import LoadSession
from loadtests.device_check import order, stage
from loadtests.device_check.setting import Setting

_LAYERS = 12
Copy = Callable[[torch.Tensor], object]


def run(setting: Setting) -> dict[str, Any]:
    """Layers that are loaded and freed in turn: how many blocks do they take, plain and by expo, in a pool and not?"""
    setting.need_cuda("a memory pool")
    plan = order.pair_plan(setting)
    plain = lazy_tensor(plan.tensors[order.WEIGHT], LoadSession()).materialize()
    figures: dict[str, Any] = {"layers": _LAYERS, "bytes_a_layer": plain.nbytes}
    wrong = []
    for title, opened in (("pool", _pool), ("no pool", nullcontext)):
        here = _watched(setting, opened, plain, lambda values: values.copy_(plain))
        with stage.session_into({}) as session:

            def copy(values: torch.Tensor) -> None:
                values.copy_(stage.lazy(plan, order.WEIGHT, session))

            ours = _watched(setting, opened, plain, copy)
        figures[title] = {"plain": here, "expo": ours}
        if ours["blocks"] > here["blocks"] + (2 if title == "no pool" else 0):
            wrong.append(f"{title}: {ours['blocks']} blocks for {_LAYERS} layers, plain copies take {here['blocks']}")
    return {**figures, "wrong": wrong}


def _pool() -> AbstractContextManager[object]:
    return torch.cuda.use_mem_pool(torch.cuda.MemPool())


def _watched(
    setting: Setting, opened: Callable[[], AbstractContextManager[object]], like: torch.Tensor, copy: Copy
) -> dict[str, int]:
    """Load into fresh memory, take the result elsewhere, free it; as often as there are layers."""
    with torch.no_grad():
        copy(torch.empty_like(like, device=setting.device))  # buffers of the stage are there from now on
        memory, blocks = setting.memory(), set()
        with opened():
            for _ in range(_LAYERS):
                values = torch.empty_like(like, device=setting.device)
                copy(values)
                values.mul(2)  # the model works with it
                blocks.add(values.data_ptr())
                del values
            peaks = memory.peaks() or {}
    return {"blocks": len(blocks), **peaks}
