"""Does everything that the model gives its stream come before and after the load as it must?

The model's stream may be late (a kernel that sleeps), may be another one than the usual, and may read a parameter by
its address, which no dispatcher sees. Memory that the model frees may be another tensor's at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.session import LoadSession
from expo_serve.plan.plan import Plan
from loadtests.device_check import files, stage
from loadtests.device_check.distance import distance
from loadtests.device_check.outcome import Skipped
from loadtests.device_check.setting import Setting

WEIGHT = "model.layers.0.mlp.down_proj.weight"
_SLEEP_CYCLES = 200_000_000
"""About a tenth of a second of a card at 2 GHz."""
_DEVICE_TO_DEVICE = 3
_TIMES = 6
Reader = Callable[[torch.Tensor, torch.Tensor], None]
"""Copies one tensor to another on the current stream, past torch's dispatcher."""
Found = dict[str, Any]
"""Figures of a check, its ``wrong`` sentences among them."""


def run(setting: Setting, check: str) -> dict[str, Any]:
    """One of the checks."""
    plan = pair_plan(setting)
    expected = lazy_tensor(plan.tensors[WEIGHT], LoadSession()).materialize()
    checks: dict[str, Callable[[Setting, Plan, torch.Tensor], Found]] = {
        "behind-sleep": _behind_sleep,
        "memcpy-reader": _read_by_memcpy,
        "triton-reader": _read_by_triton,
        "streams": _on_other_streams,
        "freed": _freed,
    }
    return {"bytes": expected.nbytes, "times": _TIMES, **checks[check](setting, plan, expected)}


def pair_plan(setting: Setting) -> Plan:
    """A pair whose one tensor takes a load a while."""
    rows = 256 if setting.quick else 16384
    folder = setting.work / f"order-{rows}"

    def write(to: Any) -> None:
        base = files.numbers((rows, 2048), 1)
        for side, values in (("base", base), ("aligned", base + files.numbers((rows, 2048), 2, 0.05))):
            files.write_checkpoint(to / side, {WEIGHT: values.bfloat16()})

    files.made_once(folder, write)
    return files.plan(folder / "base", folder / "aligned")


def sleep(setting: Setting) -> None:
    """Keep the current stream busy for a while."""
    if setting.is_cuda:
        torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]


def _behind_sleep(setting: Setting, plan: Plan, expected: torch.Tensor) -> Found:
    """The model's stream is late with what it writes before the load; the load's values must stand over it."""
    found = torch.empty_like(expected, device=setting.device)
    wrong = []
    with stage.session_into({"0": found}) as session:
        for time in range(_TIMES):
            sleep(setting)
            found.fill_(torch.nan)
            found.copy_(stage.lazy(plan, WEIGHT, session))
            session.settle()
            wrong += _unlike(setting, f"copy {time} behind a kernel that sleeps", found, expected)
    return {"wrong": wrong}


def _read_by_memcpy(setting: Setting, plan: Plan, expected: torch.Tensor) -> Found:
    setting.need_cuda("a reader by address (on the CPU whoever reads must settle first)")
    return _read_behind(setting, plan, expected, _memcpy_reader())


def _read_by_triton(setting: Setting, plan: Plan, expected: torch.Tensor) -> Found:
    setting.need_cuda("a Triton kernel")
    if not find_spec("triton"):
        raise Skipped("triton is not installed; memcpy-reader reads by address too")
    from loadtests.device_check.triton_reader import read

    return _read_behind(setting, plan, expected, read)


def _read_behind(setting: Setting, plan: Plan, expected: torch.Tensor, read: Reader) -> Found:
    """What the model's stream is given right after ``copy_`` reads what was copied, though nobody settled."""
    found = torch.empty_like(expected, device=setting.device)
    seen = [torch.full_like(found, torch.nan) for _ in range(_TIMES)]
    with stage.session_into({"0": found}) as session:
        read(found, seen[0])  # the first launch compiles
        for copy in seen:
            found.fill_(torch.nan)
            lazy = stage.lazy(plan, WEIGHT, session)
            found.copy_(lazy)
            read(found, copy)
    setting.synchronize()
    return _all_unlike(setting, "reader {} right behind copy_", seen, expected)


def _on_other_streams(setting: Setting, plan: Plan, expected: torch.Tensor) -> Found:
    """The model works on streams of its own, another one each time, and reads by address on them."""
    setting.need_cuda("streams")
    read = _memcpy_reader()
    streams = [torch.cuda.Stream(setting.device) for _ in range(3)]  # type: ignore[no-untyped-call]
    made = [torch.empty_like(expected, device=setting.device) for _ in range(_TIMES)]
    seen = [torch.full_like(values, torch.nan) for values in made]
    setting.synchronize()
    with stage.session_into({str(index): values for index, values in enumerate(made)}) as session:
        for index, (values, copy) in enumerate(zip(made, seen, strict=True)):
            with torch.cuda.stream(streams[index % len(streams)]):
                sleep(setting)
                values.fill_(torch.nan)
                values.copy_(stage.lazy(plan, WEIGHT, session))
                read(values, copy)
    setting.synchronize()
    return _all_unlike(setting, "copy {} on a stream of the model's own", seen, expected)


def _freed(setting: Setting, plan: Plan, expected: torch.Tensor) -> Found:
    """The model frees each parameter right after it was copied, and its memory gets another content at once."""
    kept: list[torch.Tensor] = []
    addresses: set[int] = set()
    reused = 0
    with stage.session_into({}) as session:
        for time in range(_TIMES):
            values = torch.empty_like(expected, device=setting.device)
            values.copy_(stage.lazy(plan, WEIGHT, session))
            addresses.add(values.data_ptr())
            del values
            other = torch.empty_like(expected, device=setting.device).fill_(time)
            reused += other.data_ptr() in addresses
            kept.append(other)
    setting.synchronize()
    if setting.plants:
        kept[-1][0, 0] = -1
    wrong = [
        f"tensor {time} has other values than it was filled with after memory was freed"
        for time, other in enumerate(kept)
        if not bool((other == time).all())
    ]
    return {"took_over_freed_memory": reused, "wrong": wrong}


def _memcpy_reader() -> Reader:
    """Copies by the runtime's own call, on the current stream."""
    library = ctypes.CDLL(_runtime())
    copy = library.cudaMemcpyAsync if hasattr(library, "cudaMemcpyAsync") else library.hipMemcpyAsync

    def read(source: torch.Tensor, to: torch.Tensor) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream(source.device).cuda_stream)
        addresses = ctypes.c_void_p(to.data_ptr()), ctypes.c_void_p(source.data_ptr())
        status = copy(*addresses, ctypes.c_size_t(source.nbytes), ctypes.c_int(_DEVICE_TO_DEVICE), stream)
        if status:
            raise RuntimeError(f"the runtime's copy gave error {status}")

    return read


def _runtime() -> str:
    """The library of the CUDA or HIP runtime that torch has loaded into this process."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libcudart" in line or "libamdhip64" in line}
    if not loaded:
        raise Skipped("torch has not loaded the runtime as a library of its own")
    return sorted(loaded)[0]


def _all_unlike(setting: Setting, what: str, found: list[torch.Tensor], expected: torch.Tensor) -> Found:
    return {"wrong": [one for i, copy in enumerate(found) for one in _unlike(setting, what.format(i), copy, expected)]}


def _unlike(setting: Setting, what: str, found: torch.Tensor, expected: torch.Tensor) -> list[str]:
    """A sentence if values are missing or others; the last place may differ, as in the check of the bits."""
    if setting.plants:
        found[0, 0] = torch.nan
    apart = distance(found, expected, slack=2.0**-20)
    if not apart.beyond:
        return []
    return [f"{what}: {apart.beyond} of {apart.values} values are others, {apart.unwritten} of them unwritten"]
