"""LoRA on a device: base's bytes go there, and the product is computed there, with the bits of the host's rule.

That rule is one chain of fused multiply-adds over the rank, in order (:mod:`expo_serve.kernels.low_rank`). A device's
``addcmul`` is one step of it where its compiler fuses the two operations, which is looked at once for each device;
where it does not, or where the host has no such loop, the host computes the product as on the CPU.
"""

from __future__ import annotations

from functools import cache, partial

import torch

from expo_serve import kernels
from expo_serve.checkpoint.records import Operand
from expo_serve.load.formula import combine_unchecked
from expo_serve.load.lora import Factors, LowRankOperands
from expo_serve.load.operands import Recipe
from expo_serve.load.selection import Selection
from expo_serve.load.transfer import StoredTransfer

_PROBED = 67, 7, 130
"""Rows, rank and columns of the product that is compared."""
_MOST_UNWANTED = 2
"""Elements computed for each one that is wanted, at most: a product is computed in whole rows and columns."""


class LowRankTransfer(StoredTransfer):
    """A piece of a tensor that an adapter changes: base is copied, and the device adds the product."""

    def __init__(self, recipe: Recipe, selection: Selection) -> None:
        assert isinstance(recipe.operands, LowRankOperands)
        self._operands = recipe.operands
        super().__init__(recipe, selection, ("base",))

    def _read(self, part: Selection, start: int, host: torch.Tensor) -> None:
        self._operands.factors()  # which later pieces have then
        self._operands.read_base(part, self._memory(host, start))

    def combine(self, out: torch.Tensor, device: torch.Tensor) -> torch.Tensor:
        recipe, selection = self.recipe, self.selection
        box = self._operands.box(selection)
        factors = self._operands.factors_on(device.device)
        delta = box.pick(product(factors, box.rows, box.columns), selection)
        operands: dict[Operand, torch.Tensor] = {"base": self._operand("base", device), "delta": delta}
        return combine_unchecked(out, operands, recipe.dtype, recipe.alpha, recipe.noise(selection, out.device))


def is_transferable(operands: LowRankOperands, selection: Selection, device: torch.device) -> bool:
    """Return True if a device can compute the product for a selection as the host would."""
    wanted = _MOST_UNWANTED * selection.numel
    return operands.is_product_only and operands.box(selection).size <= wanted and has_the_rules_bits(device)


def product(factors: Factors, rows: range, columns: range) -> torch.Tensor:
    """Compute a part of a product by one step for each rank.

    Args:
        factors: on a device.
        rows: of the part.
        columns: of the part.

    Returns:
        fp32, there.
    """
    left, right = factors.part(rows, columns)
    # From +0.0 on, as the host's loop: a first product alone could be -0.0.
    total = torch.addcmul(factors.zero, left[:, :1], right[:1])
    for k in range(1, left.shape[1]):
        total.addcmul_(left[:, k : k + 1], right[k : k + 1])
    return total.mul_(factors.scale)


@cache
def has_the_rules_bits(device: torch.device) -> bool:
    """Return True if :func:`product` has the bits of the host's loop on this device."""
    if not kernels.available("low_rank.product"):
        return False
    rows, rank, columns = _PROBED
    chance = torch.Generator(device="cpu").manual_seed(1)
    with torch.no_grad():
        # vLLM makes the model's dtype the default one while it loads.
        numbers = partial(torch.randn, generator=chance, dtype=torch.float32, device="cpu")
        left, right = numbers(rows, rank), numbers(rank, columns)
        left[0], right[:, 0] = 0, -1  # the sign of zero counts too
        wanted = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
        part = range(rows), range(columns)
        Factors(left, right, 0.3).product(*part, wanted)
        found = product(Factors(left.to(device), right.to(device), 0.3), *part).cpu()
        return torch.equal(found.view(torch.int32), wanted.view(torch.int32))
