"""What vLLM does to a layer that it quantises while a model loads is compiled as it would be without expo-serve."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from expo_serve.load.coverage import WriteTracker
from expo_serve.vllm_plugin.processing import processed_unwatched


def halved(weight: torch.Tensor) -> torch.Tensor:
    return weight / 2


class Method:
    """Quantises as vLLM's online methods do: once for each layer, here by a compiled function."""

    def __init__(self, *, is_online: bool = True) -> None:
        self.uses_meta_device = is_online
        self._halved = torch.compile(halved, fullgraph=True, backend="eager")

    def process_weights_after_loading(self, layer: Layer) -> None:
        layer.weight = torch.nn.Parameter(self._halved(layer.weight.detach()), requires_grad=False)


class Layer(torch.nn.Linear):
    """A matrix of ones."""

    def __init__(self, method: Method) -> None:
        super().__init__(4, 4, bias=False)
        self.weight.requires_grad_(False).fill_(1)
        self.quant_method = method


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_processing_is_compiled_and_sees_what_was_copied() -> None:
    method = Method()
    layers = [Layer(method), Layer(method)]
    model, late = torch.nn.Sequential(*layers), list[torch.Tensor]()

    def settle() -> None:  # as threads that write what an operation left to them
        while late:
            late.pop().fill_(6)

    with WriteTracker(model) as tracker, processed_unwatched(model, settle):
        for layer in layers:
            late.append(layer.weight.data)
            layer.quant_method.process_weights_after_loading(layer)
    assert all(bool((layer.weight == 3).all()) for layer in layers)
    method.process_weights_after_loading(layers[0])
    assert "process_weights_after_loading" not in vars(method)
    assert tracker.unwritten() == {}


def test_a_function_first_called_under_the_watch_is_never_compiled() -> None:
    layer = Layer(method := Method(is_online=False))
    with WriteTracker(layer), processed_unwatched(layer, lambda: None):
        layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(RuntimeError, match="no compiled frames"):
        method.process_weights_after_loading(layer)
