"""What a load goes through: the operations that a model's code applies to the tensors of our loader, and the kinds of
layers that it fills. ``seen.json`` has them for every family; :data:`CORE` are the families that show all of them.

``python -m tests.conformance.seen`` loads every family once and writes the file anew (some five minutes).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expo_serve.load.lazy import LazyTensor

FILE = Path(__file__).with_name("seen.json")
_LAYERS = ("vllm.model_executor.layers.", "torch.nn.modules.")

CORE = {
    "ApertusForCausalLM": "an activation with parameters (XIELU)",
    "AriaForConditionalGeneration": "torch's own multi-head attention; experts stored transposed",
    "BagelForConditionalGeneration": "a config and checkpoint of vLLM's own; convolutions as matrices",
    "BailingMoeV2_5ForCausalLM": "linear attention with a norm by groups",
    "BloomForCausalLM": "query, key and value interleaved: cloned and reordered, so materialized",
    "DeepseekV3ForCausalLM": "latent attention (MLA), groups of experts",
    "Ernie4_5_MoeForCausalLM": "a bias of the router that is squeezed",
    "FalconForCausalLM-multi-query": "concatenated, so materialized",
    "FalconForCausalLM-new": "the other layout of one architecture's query, key and value",
    "GPT2LMHeadModel": "matrices stored transposed (Conv1D)",
    "GptOssForCausalLM": "all experts in one tensor, with biases; copied in parts",
    "GraniteMoeHybridForCausalLM": "Mamba 2 beside attention and experts",
    "GraniteSpeechPlusForConditionalGeneration": "sound: convolutions and batch norms",
    "JambaForSequenceClassification": "Mamba 1, computed in fp32; a parameter that vLLM leaves unfilled",
    "LlamaBidirectionalModel": "an encoder made of a decoder, pooled",
    "LlamaForCausalLM": "what most models are: fused projections, norms, an embedding, an output",
    "LlamaForCausalLM-tied": "one tensor for embedding and output",
    "MiniMaxM2ForCausalLM": "norms that are sharded themselves; a router's bias",
    "MixtralForCausalLM": "a tensor for each expert's matrix",
    "OlmoeForCausalLM-transformers": "the model of transformers in vLLM",
    "OpenAIPrivacyFilterForTokenClassification": "stacked and permuted, so materialized",
    "Phi3ForCausalLM-embeds": "a checkpoint that is fused already, run without its output",
    "Qwen3ASRRealtimeGeneration": "convolutions over two dimensions",
    "Qwen3VLMoeForConditionalGeneration": "experts in one tensor that the hub's files hold transposed; a tower",
    "Qwen3_5MoeForConditionalGeneration": "gated delta networks, a tower, experts: most kinds of layers in one",
}
"""Family to what it alone, or best, stands for: these run in ``make test``, all others are slow."""


class Seen:
    """Names of operations of torch's dispatcher, where ``copy_ cast`` is a copy into another dtype, and of the classes
    of layers, vLLM's and torch's, that own a parameter. What is peculiar to one model is none of those."""

    def __init__(self) -> None:
        self.operations: set[str] = set()
        self.layers: set[str] = set()

    def as_lists(self) -> dict[str, list[str]]:
        """As in the file."""
        return {"operations": sorted(self.operations), "layers": sorted(self.layers)}


def recorded() -> dict[str, dict[str, list[str]]]:
    """What the file says, by the family's name."""
    found: dict[str, dict[str, list[str]]] = json.loads(FILE.read_text())
    return found


@contextmanager
def watched() -> Iterator[Seen]:
    """Note what all loads by our loader go through meanwhile."""
    from expo_serve.vllm_plugin.loader import ExpoModelLoader

    seen, load_weights = Seen(), ExpoModelLoader.load_weights

    def load_and_note(loader: Any, model: torch.nn.Module, *arguments: Any) -> None:
        with _Noted(seen.operations):
            load_weights(loader, model, *arguments)
        seen.layers |= {type(module).__name__ for module in model.modules() if _is_layer(module)}

    with mock.patch.object(ExpoModelLoader, "load_weights", load_and_note):
        yield seen


def _is_layer(module: torch.nn.Module) -> bool:
    owns_a_parameter = next(module.parameters(recurse=False), None) is not None
    return owns_a_parameter and type(module).__module__.startswith(_LAYERS)


class _Noted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that get a tensor of our loader."""

    def __init__(self, operations: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations = operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        lazy = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyTensor)]
        if lazy:
            name = func._schema.name.removeprefix("aten::")
            is_cast = name == "copy_" and args[0].dtype != lazy[-1].dtype
            self._operations.add(f"{name} cast" if is_cast else name)
        return func(*args, **kwargs)


def _main() -> None:
    from tests.conformance.conftest import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from tests.compare import by_expo
    from tests.conformance.checkpoints import write_pair
    from tests.conformance.families import FAMILIES
    from tests.conformance.running import load, many_engines

    found = {}
    with many_engines():
        for family in FAMILIES:
            with tempfile.TemporaryDirectory() as folder, watched() as seen:
                base, aligned = write_pair(Path(folder), family)
                load(aligned, trust_remote_code=True, **family.engine, **by_expo(base, 0.5))
            found[family.name] = seen.as_lists()
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _main()
