"""The inert values that the walk over a state dict's pickle notes, and the names that such a pickle may call.

The names are those in files of torch.save (torch/_utils.py, torch/_tensor.py, torch/_weights_only_unpickler.py). A call
is noted, never made: every function here returns one of this module's classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from expo_serve.checkpoint.records import DTYPES

MAX_ATTRIBUTES = 64
DAMAGED = "copy or download it again"
FOREIGN = "torch.save writes no such thing for a dict of tensors; nothing of it was run; give it in safetensors"

STORAGE_DTYPES: dict[str, str | None] = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.storage.UntypedStorage": "U8",
    **dict.fromkeys(
        f"torch.{name}Storage"
        for name in ("ComplexFloat", "ComplexDouble", "QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")
    ),
}
"""The format's dtype of each type of storage; None where it has none."""
UNTYPED = "torch.storage.UntypedStorage"
TORCH_DTYPES = {f"torch.{dtype.torch_name}": name for name, dtype in DTYPES.items()}
"""The format's dtype of each torch dtype by its global name."""
_OTHER_DTYPES = frozenset(
    f"torch.{name}"
    for name in (
        *("complex32", "complex64", "complex128", "qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
        *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "float4_e2m1fn_x2"),
        *(f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)),
    )
)
_SCHEMES = frozenset(
    f"torch.per_{name}"
    for name in (
        *("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric"),
        "channel_affine_float_qparams",
    )
)


class PickleRefusedError(Exception):
    """Says in half a line why the walk ended, and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name that the pickle would import."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A stretch of values: the entry ``data/<key>`` of the archive, with ``numel`` values of the named type."""

    type_name: str
    key: str
    numel: int
    location: str


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A view of a storage. Offset, size and stride are as the pickle has them, not checked yet.

    ``dtype`` is a global's name where the storage has no type; ``is_lazy`` says that the values are to be changed after
    they are read (conjugated, negated).
    """

    storage: Storage
    offset: object
    size: object
    stride: object
    dtype: str | None = None
    is_lazy: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """A tensor of a kind that has no plain values in the file: ``a sparse tensor``."""

    what: str


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A small value that holds no tensor, such as a torch.Size."""

    name: str


class Table:
    """A dict or OrderedDict. Items under keys that are no strings are only counted.

    Integers of any size could be chosen such that all have one hash; strings cannot.
    """

    __slots__ = ("foreign_keys", "holds_tensors", "is_ordered", "items")

    def __init__(self, is_ordered: bool = False) -> None:
        self.items: dict[str, object] = {}
        self.foreign_keys = 0
        self.holds_tensors = False
        self.is_ordered = is_ordered

    def put(self, key: object, value: object) -> None:
        """Set an item; a key that is already there is refused."""
        if not isinstance(key, str):
            self.foreign_keys += 1
            return
        if key in self.items:
            raise PickleRefusedError(f"the name {key!r:.200} is there twice; {FOREIGN}")
        self.items[key] = value
        self.holds_tensors = self.holds_tensors or isinstance(value, Tensor | Refused)

    def __len__(self) -> int:
        return len(self.items) + self.foreign_keys


def kind_of(value: object) -> str:
    """Name the kind of a value of a walk for messages; its content is left out, which may be of any size."""
    names: dict[type, str] = {
        Table: "dict",
        Tensor: "tensor",
        Refused: "tensor",
        Storage: "storage",
        type(None): "None",
    }
    if isinstance(value, Global | Opaque):
        return value.name
    return names.get(type(value), type(value).__name__)


def _tensor(arguments: tuple[object, ...]) -> Tensor:
    """Note ``(storage, offset, size, stride, requires_grad, hooks, metadata)``, of which the last three may lack."""
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, Storage):
        raise PickleRefusedError(f"a tensor is made of a {kind_of(storage)}; {FOREIGN}")
    if not all(isinstance(requires_grad, bool) for requires_grad in arguments[4:5]):
        raise PickleRefusedError(f"requires_grad of a tensor must be a bool, found {kind_of(arguments[4])}; {FOREIGN}")
    return Tensor(storage, offset, size, stride, is_lazy=_is_filled(arguments[6:]))


def _tensor_v3(arguments: tuple[object, ...]) -> Tensor:
    """Note a tensor of a storage without type, with its dtype in the seventh place."""
    plain, dtype = _tensor(arguments[:6]), arguments[6]
    if not isinstance(dtype, Global) or not (dtype.name in TORCH_DTYPES or dtype.name in _OTHER_DTYPES):
        raise PickleRefusedError(f"expected a dtype, found {kind_of(dtype)}; {FOREIGN}")
    is_lazy = _is_filled(arguments[7:])
    return Tensor(plain.storage, plain.offset, plain.size, plain.stride, dtype.name, is_lazy)


def _is_filled(metadata: tuple[object, ...]) -> bool:
    """Return whether there is metadata of a tensor: its conjugate bit or its negative bit."""
    return bool(metadata) and metadata[0] is not None and not (isinstance(metadata[0], Table) and not len(metadata[0]))


def _parameter(arguments: tuple[object, ...]) -> Tensor | Refused:
    """Note ``(tensor, requires_grad, hooks, attributes)`` as the tensor itself."""
    tensor = arguments[0]
    if not isinstance(tensor, Tensor | Refused):
        raise PickleRefusedError(f"a parameter is made of a {kind_of(tensor)}; {FOREIGN}")
    _check_attributes(arguments[3:])
    return tensor


def _from_type(arguments: tuple[object, ...]) -> Tensor | Refused:
    """Note ``(function, type, arguments of the function, attributes)``: a tensor with attributes, or of a subclass."""
    function, kind, inner, *attributes = arguments
    _check_attributes(tuple(attributes))
    if not (isinstance(function, Global) and function.name in _PLAIN and isinstance(inner, tuple)):
        return Refused("a tensor that torch rebuilds in several steps")
    if not isinstance(kind, Global) or kind.name != _TENSOR:
        return Refused(f"a tensor of the type {kind_of(kind)}")
    counts, call = _PLAIN[function.name]
    if len(inner) not in counts:
        raise PickleRefusedError(f"{function.name} is given {len(inner)} arguments; {FOREIGN}")
    return call(inner)


def _check_attributes(attributes: tuple[object, ...]) -> None:
    """Refuse attributes that could replace the values: ``data`` is one of them."""
    for state in attributes:
        if (
            not isinstance(state, Table)
            or len(state) > MAX_ATTRIBUTES
            or any(isinstance(value, Tensor | Refused | Storage) for value in state.items.values())
        ):
            raise PickleRefusedError(f"a tensor has attributes of which some are no plain values; {FOREIGN}")


def _ordered(arguments: tuple[object, ...]) -> Table:
    return Table(is_ordered=True)


def _refused(what: str) -> tuple[range, Callable[[tuple[object, ...]], object]]:
    return range(1, 17), lambda _: Refused(what)


def _opaque(name: str) -> tuple[range, Callable[[tuple[object, ...]], object]]:
    return range(3), lambda _: Opaque(name)


_TENSOR = "torch.Tensor"
_UTILS = "torch._utils._rebuild_"
_PLAIN: dict[str, tuple[range, Callable[[tuple[object, ...]], Tensor]]] = {
    f"{_UTILS}tensor": (range(4, 5), _tensor),
    f"{_UTILS}tensor_v2": (range(6, 8), _tensor),
    f"{_UTILS}tensor_v3": (range(7, 9), _tensor_v3),
}
CALLS: dict[str, tuple[range, Callable[[tuple[object, ...]], object]]] = {
    **_PLAIN,
    f"{_UTILS}parameter": (range(3, 4), _parameter),
    f"{_UTILS}parameter_with_state": (range(4, 5), _parameter),
    "torch._tensor._rebuild_from_type_v2": (range(4, 5), _from_type),
    f"{_UTILS}qtensor": _refused("a quantised tensor"),
    f"{_UTILS}sparse_tensor": _refused("a sparse tensor"),
    f"{_UTILS}sparse_csr_tensor": _refused("a sparse tensor"),
    f"{_UTILS}nested_tensor": _refused("a nested tensor"),
    f"{_UTILS}meta_tensor_no_storage": _refused("a tensor on the meta device, which has no values"),
    f"{_UTILS}wrapper_subclass": _refused("a tensor of a subclass"),
    f"{_UTILS}device_tensor_from_cpu_tensor": _refused("a tensor of another device, stored as one of this"),
    "collections.OrderedDict": (range(1), _ordered),
    "torch.Size": _opaque("torch.Size"),
    "torch.device": _opaque("torch.device"),
    "torch.serialization._get_layout": _opaque("torch.layout"),
}
"""What may be called: the numbers of arguments, and what notes the call."""
_NAMES = frozenset({_TENSOR, *CALLS, *STORAGE_DTYPES, *TORCH_DTYPES, *_OTHER_DTYPES, *_SCHEMES})


def is_allowed(name: str) -> bool:
    """Return whether a pickle of tensors may name this global."""
    return name in _NAMES
