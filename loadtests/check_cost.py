"""What does it cost to look at every value for NaN and Inf while it is combined?

The loader's way through a whole pair (read, combine, copy into parameters, two threads), with the check and without, in
turn, from a warm page cache. Without: the compiled loops with marks that are always 0; for the way through torch, which
other dtypes and processors take, the sum left out.

    python -m loadtests.check_cost [--size 1.1b] [--rounds 9]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any
from unittest import mock

import numba
import numpy as np
import torch

from expo_serve import kernels
from expo_serve.config import ExpoConfig
from expo_serve.kernels import bf16, reading
from expo_serve.load import formula
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.session import load_into
from expo_serve.load.threads import default_threads
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import prepare
from loadtests.page_cache import warm
from loadtests.pairs import pair_of
from loadtests.results import ALPHA, parser, ratio_spread, save, shown, spread, table, turns


def _recompiled(loop: Any, **replaced: Any) -> Any:
    """A compiled loop again, with other functions in the place of those that it calls."""
    source = loop.py_func
    copied = FunctionType(source.__code__, {**source.__globals__, **replaced}, source.__name__)
    return numba.njit(nogil=True, boundscheck=False, error_model="numpy")(copied)


def _without_check() -> AbstractContextManager[Any]:
    """The compiled loops, blind to values that are not finite."""
    blind = {
        "mark": numba.njit(lambda value: np.uint16(0)),
        "_mark_pair": numba.njit(lambda pair: np.uint32(0)),
    }
    nearest, dithered = (_recompiled(loop, **blind) for loop in (bf16.combine_nearest, bf16.combine_dithered))
    combine = _recompiled(bf16.combine, combine_nearest=nearest, **blind)
    chunks = _recompiled(reading._combine, combine_nearest=nearest, combine_dithered=dithered)
    stream = _recompiled(reading.stream, _combine=chunks)

    @contextmanager
    def patched() -> Iterator[None]:
        with (
            mock.patch.object(bf16, "combine", combine),
            mock.patch.object(reading, "stream", stream),
        ):
            yield

    return patched()


def _without_loops() -> AbstractContextManager[Any]:
    """torch in the place of the compiled loops."""
    return mock.patch.object(kernels, "available", return_value=False)


@contextmanager
def _without_loops_or_check() -> Iterator[None]:
    with _without_loops(), mock.patch.object(formula, "_check_finite"):
        yield


def ways() -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """A context for each way."""
    assert kernels.available("bf16.combine", "reading.stream"), kernels.reason()
    return {
        "compiled": nullcontext,
        "compiled, unchecked": _without_check,
        "torch": _without_loops,
        "torch, unchecked": _without_loops_or_check,
    }


def load(plan: Plan, model: torch.nn.Module) -> None:
    """What the loader does with each tensor, without a model's own code around it."""
    with load_into(model, default_threads()) as session:
        for parameter, planned in zip(model.parameters(), plan.tensors.values(), strict=True):
            parameter.data.copy_(lazy_tensor(planned, session))
        session.settle()


def measure(plan: Plan, rounds: int) -> dict[str, Any]:
    """Seconds of each way, in turn; the first round warms up."""
    torch.set_num_threads(1)
    model = torch.nn.Module()
    for name, planned in plan.tensors.items():
        values = torch.zeros(planned.aligned.shape, dtype=torch.bfloat16)
        model.register_parameter(name.replace(".", "-"), torch.nn.Parameter(values, requires_grad=False))
    made = ways()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for index, name in enumerate(turns(list(made), rounds + 1)):
        with made[name]():
            started = time.perf_counter()
            load(plan, model)
        if index >= len(made):
            seconds[name].append(time.perf_counter() - started)
    checks = {way: ratio_spread(seconds[way], seconds[f"{way}, unchecked"]) for way in ("compiled", "torch")}
    return {"seconds": {name: spread(found) for name, found in seconds.items()}, "checked_over_unchecked": checks}


def main() -> None:
    """Measure one size, print the figures, keep them."""
    options = parser(__doc__, size="1.1b", rounds=9).parse_args()
    with pair_of(options.size, options.work, options.keep) as pair:
        warm(pair.files)
        config = ExpoConfig(base=str(pair.base), aligned=str(pair.aligned), alpha=ALPHA, rounding="nearest")
        figures = measure(prepare(config), options.rounds)
    save("check_cost", options.size, figures, options.results)
    rows = [
        [way, shown(figures["seconds"][way], 3), shown(figures["checked_over_unchecked"].get(way))] for way in ways()
    ]
    print(table(["way", "seconds", "checked / unchecked"], rows))


if __name__ == "__main__":
    main()
