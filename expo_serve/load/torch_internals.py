"""Every name of torch that the package uses and that torch does not document, one each, with the reason."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.utils import _python_dispatch

Operation = torch._ops.OpOverload
"""One operation as ``__torch_dispatch__`` gets it."""

make_wrapper_subclass = torch.Tensor._make_wrapper_subclass
"""Makes a tensor with sizes, strides and a dtype but no storage."""

disabled_torch_function = torch._C._disabled_torch_function_impl
"""Turns ``__torch_function__`` off for a subclass, whose operations would pass through Python twice otherwise."""


def without_modes() -> AbstractContextManager[object]:
    """Return a context in which no dispatch mode sees the operations."""
    context: AbstractContextManager[object] = _python_dispatch._disable_current_modes()
    return context


def storage_identity(tensor: torch.Tensor) -> int:
    """Identify a tensor's storage, also of a tensor on the meta device, which has no address."""
    storage = tensor.untyped_storage()
    return int(storage._cdata if tensor.is_meta else storage.data_ptr())
