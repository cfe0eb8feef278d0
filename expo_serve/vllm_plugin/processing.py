"""How vLLM processes layers that it quantises while a model loads: the watch over the writes leaves it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps

import torch

from expo_serve.load.coverage import unwatched
from expo_serve.vllm_plugin.unwritten import is_quantised_late

_PROCESS = "process_weights_after_loading"


@contextmanager
def processed_unwatched(model: torch.nn.Module, settle: Callable[[], None]) -> Iterator[None]:
    """Leave the dispatch modes whenever vLLM quantises a layer, while the block runs.

    Under a mode that watches operations torch compiles no function, which it then never does in this process, and one
    with ``fullgraph=True`` fails. The watch needs nothing of it: what a layer was given has been recorded by then.

    Args:
        model: before its weights are loaded.
        settle: waits until the values of all copies are in memory; called before a layer is processed, as no mode
            would do it at the first operation that reads them.
    """
    with ExitStack() as methods:
        for layer in model.modules():
            if is_quantised_late(layer):
                methods.enter_context(_unwatched_method(layer.quant_method, settle))
        yield


@contextmanager
def _unwatched_method(method: object, settle: Callable[[], None]) -> Iterator[None]:
    if _PROCESS in vars(method):  # shared by several layers
        yield
        return
    process = getattr(method, _PROCESS)

    @wraps(process)
    def process_unwatched(layer: torch.nn.Module) -> None:
        settle()
        with unwatched():
            process(layer)

    setattr(method, _PROCESS, process_unwatched)
    try:
        yield
    finally:
        delattr(method, _PROCESS)
