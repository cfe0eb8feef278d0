"""What does it cost to look at every value for NaN and Inf while it is combined?

The loader's way through a whole pair (read, combine, copy into parameters, two threads), with the check and without, in
turn, from a warm page cache. Without: the compiled loop with the line that notices taken out; for the way through
torch, which other dtypes and processors go, the sum left out.

    python -m loadtests.check_cost [--size 1.1b] [--rounds 9]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from expo_serve.config import ExpoConfig
from expo_serve.kernels.bf16 import _IR, _SIGNATURES, Fused, fused
from expo_serve.kernels.native import compiled
from expo_serve.load import fill as job
from expo_serve.load import formula as extrapolate
from expo_serve.load.counts import Counts
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.reader import Reader
from expo_serve.load.session import LoadSession
from expo_serve.load.threads import Background
from expo_serve.plan.plan import Plan
from expo_serve.plan.prepare import prepare
from loadtests.page_cache import warm
from loadtests.pairs import pair_of
from loadtests.results import ALPHA, parser, ratio_spread, save, shown, spread, table, turns

_NOTICES = "%seen.next = or i16 %seen, %mark"


def unchecked_loops() -> Fused:
    """The compiled loops, deaf to what is not finite."""
    assert _IR.count(_NOTICES) == 1
    functions = compiled(_IR.replace(_NOTICES, "%seen.next = or i16 %seen, 0"), _SIGNATURES)
    assert functions
    return Fused(functions)


@contextmanager
def loops(chosen: Fused | None) -> Iterator[None]:
    """The loader with other loops, or with none: then torch does it."""
    with (
        mock.patch.object(extrapolate, "fused", return_value=chosen),
        mock.patch.object(job, "fused", return_value=chosen),
    ):
        yield


def ways() -> dict[str, Callable[[], Any]]:
    """A context for each."""
    checked, unchecked = fused(), unchecked_loops()
    return {
        "compiled": lambda: loops(checked),
        "compiled, unchecked": lambda: loops(unchecked),
        "torch": lambda: loops(None),
        "torch, unchecked": _torch_unchecked,
    }


@contextmanager
def _torch_unchecked() -> Iterator[None]:
    with loops(None), mock.patch.object(extrapolate, "_check_finite"):
        yield


def load(plan: Plan, model: torch.nn.Module) -> None:
    """What the loader does with each tensor, without a model's own code around it."""
    reader, counts = Reader(), Counts()
    with Background(model) as background:
        for parameter, planned in zip(model.parameters(), plan.tensors.values(), strict=True):
            parameter.data.copy_(lazy_tensor(planned, LoadSession(reader, counts, background.submit)))
        background.wait()


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
        config = ExpoConfig(base=str(pair.base), aligned=str(pair.aligned), alpha=ALPHA)
        figures = measure(prepare(config), options.rounds)
    save("check_cost", options.size, figures, options.results)
    rows = [
        [way, shown(figures["seconds"][way], 3), shown(figures["checked_over_unchecked"].get(way))] for way in ways()
    ]
    print(table(["way", "seconds", "checked / unchecked"], rows))


if __name__ == "__main__":
    main()
