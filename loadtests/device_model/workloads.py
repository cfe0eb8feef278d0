"""Models as one rank of several takes them: names and shapes of real ones, in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from expo_serve.load.selection import Selection
from loadtests.device_model.pipeline import Given


@dataclass(frozen=True)
class Model:
    """The sizes of a model; with experts, each layer has that many, and a router."""

    name: str
    layers: int
    hidden: int
    inner: int
    """Of an expert, where there are any."""
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    experts: int = 0
    shared: int = 0
    """Width of the experts that every token takes."""
    dense_layers: int = 0
    dense_inner: int = 0

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yield name, shape, and how ranks divide it: by rows, by columns, or not at all."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden), "rows"
        for layer in range(self.layers):
            yield from self._layer(
                f"model.layers.{layer}", has_experts=bool(self.experts) and layer >= self.dense_layers
            )
        yield "model.norm.weight", (self.hidden,), "whole"
        yield "lm_head.weight", (self.vocabulary, self.hidden), "rows"

    def _layer(self, layer: str, *, has_experts: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
        hidden, wide = self.hidden, self.heads * self.head
        yield f"{layer}.input_layernorm.weight", (hidden,), "whole"
        for name, rows in (("q", wide), ("k", self.kv_heads * self.head), ("v", self.kv_heads * self.head)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden), "rows"
        yield f"{layer}.self_attn.o_proj.weight", (hidden, wide), "columns"
        yield f"{layer}.post_attention_layernorm.weight", (hidden,), "whole"
        if not has_experts:
            yield from self._mlp(f"{layer}.mlp", self.dense_inner or self.inner)
            return
        yield f"{layer}.mlp.gate.weight", (self.experts, hidden), "whole"
        for expert in range(self.experts):
            yield from self._mlp(f"{layer}.mlp.experts.{expert}", self.inner)
        if self.shared:
            yield from self._mlp(f"{layer}.mlp.shared_experts", self.shared)

    def _mlp(self, name: str, inner: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield f"{name}.gate_proj.weight", (inner, self.hidden), "rows"
        yield f"{name}.up_proj.weight", (inner, self.hidden), "rows"
        yield f"{name}.down_proj.weight", (self.hidden, inner), "columns"


MODELS = {
    model.name: model
    for model in (
        Model("8B", 32, 4096, 14336, 32, 8, 128, 128256),
        Model("70B", 80, 8192, 28672, 64, 8, 128, 128256),
        Model("235B MoE", 94, 4096, 1536, 64, 4, 128, 151936, experts=128),
        Model(
            "671B MoE", 61, 7168, 2048, 128, 4, 128, 129280,
            experts=256, shared=2048, dense_layers=3, dense_inner=18432,
        ),
    )
}  # fmt: skip
"""Llama 3.1 8B and 70B, Qwen3 235B A22B, and one of DeepSeek V3's sizes (its latent attention counted as heads)."""


def workload(model: Model, ranks: int) -> Iterator[Given]:
    """Yield what one of so many tensor-parallel ranks takes."""
    for name, shape, division in model.tensors():
        yield Given(name, shape, (_part(shape, division, ranks),))


def _part(shape: tuple[int, ...], division: str, ranks: int) -> Selection:
    if division == "whole" or ranks == 1:
        return Selection.flat(0, prod(shape)) if len(shape) == 1 else Selection(shape, (shape[1], 1), 0)
    rows, columns = shape
    if division == "rows":
        return Selection((rows // ranks, columns), (columns, 1), 0)
    return Selection((rows, columns // ranks), (columns, 1), 0)


def alike(count: int, size: int, layers: int) -> Iterator[Given]:
    """Yield layers of tensors of one size in bytes, taken whole."""
    shape = (size // 2 // 256, 256)
    for layer in range(layers):
        for number in range(count):
            yield Given(f"model.layers.{layer}.{number}", shape, (Selection(shape, (256, 1), 0),))
