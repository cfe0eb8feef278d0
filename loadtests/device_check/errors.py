"""Does what goes wrong on a device say so, by the names that a user needs?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from expo_serve.errors import ExpoError
from expo_serve.load import device_queue
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.session import LoadSession
from expo_serve.plan.plan import Plan
from loadtests.device_check import files, order, stage
from loadtests.device_check.distance import distance
from loadtests.device_check.setting import Setting, is_out_of_memory

_ROWS, _COLUMNS = 5000, 1024
_NEEDS = re.compile(r"needs .*\d.*(bytes|[KMG]i?B)")


def run(setting: Setting, check: str) -> dict[str, Any]:
    """One of the faults."""
    faults: dict[str, Callable[[Setting], dict[str, Any]]] = {
        "nan": _nan,
        "overflow": _overflow,
        "pinned": _pinned,
        "memory": _memory,
    }
    return faults[check](setting)


def _nan(setting: Setting) -> dict[str, Any]:
    """A NaN in either side, early and late in the tensor, is found and named."""
    said, wrong = {}, []
    for side in ("base", "aligned"):
        for row in (0, _ROWS - 1):
            sides = _sides(torch.bfloat16)
            if not setting.plants:
                sides[side][row, 3] = torch.nan
            folder = _written(setting, f"nan-{side}-{row}", sides)
            message = _message(setting, _plan(folder))
            said[f"{side}, row {row}"] = message
            if not (message and order.WEIGHT in message and f"{side}/model.safetensors" in message):
                wrong.append(f"NaN in {side}, row {row}: {message or 'nothing was said'}")
    return {"said": said, "wrong": wrong}


def _overflow(setting: Setting) -> dict[str, Any]:
    """A result that is too large for fp16 is found and named."""
    sides = _sides(torch.float16)
    sides["base"][-1, -1], sides["aligned"][-1, -1] = -6e4, 6e4
    alpha = 0.0 if setting.plants else 2.0
    message = _message(setting, _plan(_written(setting, "overflow", sides), alpha))
    is_named = bool(message and order.WEIGHT in message and "too large" in message)
    return {"said": message, "wrong": [] if is_named else [f"too large a result: {message or 'nothing was said'}"]}


def _pinned(setting: Setting) -> dict[str, Any]:
    """Where pinned memory is refused the load goes on with plain memory, and says so."""
    setting.need_cuda("pinned memory")
    plan = _plan(_written(setting, "pinned", _sides(torch.bfloat16)))
    expected = lazy_tensor(plan.tensors[order.WEIGHT], LoadSession()).materialize()
    found = torch.full_like(expected, torch.nan, device=setting.device)
    warned: list[str] = []
    with _pinning_refused(), patch.object(device_queue, "warn", warned.append):
        message = _message(setting, plan, found)
    apart = distance(found, expected, slack=2.0**-20)
    wrong = [f"the load ended: {message}"] if message else []
    if apart.beyond:
        wrong.append(f"{apart.beyond} of {apart.values} values are others")
    if len(warned) != 1:
        wrong.append(f"{len(warned)} warnings of plain memory")
    return {"said": message, "warnings": warned, "wrong": wrong}


@contextmanager
def _pinning_refused() -> Iterator[None]:
    empty = torch.empty

    def refuse(*arguments: Any, **options: Any) -> torch.Tensor:
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: operation not supported (refused for this check)")
        made: torch.Tensor = empty(*arguments, **options)
        return made

    torch.empty = refuse
    try:
        yield
    finally:
        torch.empty = empty


def _memory(setting: Setting) -> dict[str, Any]:
    """A device without room for the load's buffers: it says how much it needs."""
    setting.need_cuda("a device's memory")
    plan = _plan(_written(setting, "memory", _sides(torch.bfloat16)))
    found = torch.empty(_ROWS, _COLUMNS, dtype=torch.bfloat16, device=setting.device)
    # What this process may hold in all is what it holds now: one more buffer is refused.
    total = torch.cuda.get_device_properties(setting.device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(setting.device) / total, setting.device)
    try:
        message = _message(setting, plan, found)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
    is_said = bool(message and _NEEDS.search(message))
    wrong = [] if is_said else [f"the message does not say what the load needs: {message or 'no failure'}"]
    return {"said": message, "wrong": wrong}


def _message(setting: Setting, plan: Plan, dest: torch.Tensor | None = None) -> str | None:
    """What the load fails with; None if it does not."""
    if dest is None:
        dest = torch.empty(plan.tensors[order.WEIGHT].result.shape, dtype=_dtype(plan), device=setting.device)
    try:
        with stage.session_into({"0": dest}) as session:
            dest.copy_(stage.lazy(plan, order.WEIGHT, session))
        setting.synchronize()
    except ExpoError as error:
        return str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    return None


def _dtype(plan: Plan) -> torch.dtype:
    return {name: dtype for dtype, name in files.NAMES.items()}[plan.tensors[order.WEIGHT].result.dtype]


def _sides(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    base = files.numbers((_ROWS, _COLUMNS), 1)
    return {"base": base.to(dtype), "aligned": (base + files.numbers((_ROWS, _COLUMNS), 2, 0.05)).to(dtype)}


def _written(setting: Setting, name: str, sides: dict[str, torch.Tensor]) -> Path:
    folder = setting.work / f"errors-{name}"
    for side, values in sides.items():
        files.write_checkpoint(folder / side, {order.WEIGHT: values})
    return folder


def _plan(folder: Path, alpha: float = 0.5) -> Plan:
    return files.plan(folder / "base", folder / "aligned", alpha)
