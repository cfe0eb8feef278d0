"""Walks over the opcodes of a state dict's pickle and notes what it would build, without importing or calling anything.

Format: a pickle of protocol 2, as torch.save writes it into ``data.pkl`` (torch/serialization.py; opcodes are described
in Python's pickletools.py). The allowed opcodes are those that torch's own ``weights_only`` unpickler knows, less
NEWOBJ. A global is nothing but its name; a call of an allowed one gives an inert value (see ``pickle_values``). Work
and memory are bounded: opcodes, memo, stack, strings, and no step looks at more than one level of a value, since
references to references make few bytes stand for a value of any size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pickletools import opcodes

from expo_serve.checkpoint.header import is_size
from expo_serve.checkpoint.pickle_values import (
    CALLS,
    DAMAGED,
    FOREIGN,
    STORAGE_DTYPES,
    Global,
    PickleRefusedError,
    Storage,
    Table,
    is_allowed,
    kind_of,
)

MAX_OPCODES = 5_000_000  # a tensor takes about 40
MAX_MEMO = 2_000_000
MAX_STACK = 10_000  # torch.save puts at most 1000 pairs at a time on it
MAX_STRING_BYTES = 2**20
_MAX_GLOBAL_BYTES = 256
_PROTOCOL = 2
_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in opcodes}


def walk(data: bytes) -> object:
    """Walk over a pickle and return what it would build, made of this module's classes and of plain values.

    Args:
        data: the pickle.

    Raises:
        PickleRefusedError: it is cut or damaged, exceeds a limit, or has an opcode, a global or a call that a dict of
            tensors does not need.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except PickleRefusedError as error:
        raise PickleRefusedError(f"byte {machine.at}: {error}") from None


class _Machine:
    """The unpickler's stack, marks and memo. ``at`` is where the current opcode stands."""

    __slots__ = ("at", "data", "marks", "memo", "position", "stack", "storages")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = self.at = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> object:
        for _ in range(MAX_OPCODES):
            self.at = self.position
            code = self.take(1)[0]
            if code == _STOP:
                return self.result()
            step = _STEPS.get(code)
            if step is None:
                raise PickleRefusedError(f"opcode {_OPCODE_NAMES.get(code, hex(code))} is not allowed; {FOREIGN}")
            step(self)
            if len(self.stack) + len(self.marks) > MAX_STACK:
                raise PickleRefusedError(f"more than {MAX_STACK} values are open at a time; {FOREIGN}")
        raise PickleRefusedError(f"the pickle has more than {MAX_OPCODES} opcodes; give it in safetensors")

    def result(self) -> object:
        value = self.pop()
        if self.stack or self.marks or self.position != len(self.data):
            raise PickleRefusedError(f"values or bytes are left at the pickle's end; {DAMAGED}")
        return value

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        end = self.position + count
        if end > len(self.data):
            raise PickleRefusedError(f"the pickle ends within an opcode; {DAMAGED}")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, count: int) -> int:
        """Return an unsigned integer of so many bytes."""
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        """Return the text up to the next newline."""
        end = self.data.find(b"\n", self.position, self.position + _MAX_GLOBAL_BYTES)
        if end < 0:
            raise PickleRefusedError(f"a global's name has no end within {_MAX_GLOBAL_BYTES} bytes; {DAMAGED}")
        text = _text(self.take(end - self.position))
        self.position += 1
        return text

    def top(self) -> object:
        """Return the last value above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleRefusedError(f"an opcode needs a value where none is; {DAMAGED}")
        return self.stack[-1]

    def pop(self) -> object:
        """Remove and return the last value above the last mark."""
        value = self.top()
        self.stack.pop()
        return value

    def pop_mark(self) -> list[object]:
        """Remove and return the values above the last mark, and the mark."""
        if not self.marks:
            raise PickleRefusedError(f"an opcode needs a mark where none is; {DAMAGED}")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def push_tuple(self, count: int) -> None:
        """Replace the last values by a tuple of them."""
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise PickleRefusedError(f"a text is not UTF-8; {FOREIGN}") from None


def _protocol(machine: _Machine) -> None:
    if (found := machine.number(1)) != _PROTOCOL:
        raise PickleRefusedError(
            f"expected pickle protocol {_PROTOCOL}, torch.save's own, found {found}; save it again without "
            "pickle_protocol, or convert it to safetensors"
        )


def _unicode(machine: _Machine) -> None:
    if (length := machine.number(4)) > MAX_STRING_BYTES:
        raise PickleRefusedError(f"a text has {length} bytes, the limit is {MAX_STRING_BYTES}; {FOREIGN}")
    machine.stack.append(_text(machine.take(length)))


def _global(machine: _Machine) -> None:
    name = f"{machine.line()}.{machine.line()}"
    if not is_allowed(name):
        raise PickleRefusedError(f"global {name!r:.200} is not allowed; {FOREIGN}")
    machine.stack.append(Global(name))


def _put(machine: _Machine, count: int) -> None:
    if (index := machine.number(count)) >= MAX_MEMO:
        raise PickleRefusedError(f"memo number {index} is over the limit of {MAX_MEMO}; {FOREIGN}")
    machine.memo[index] = machine.top()


def _get(machine: _Machine, count: int) -> None:
    if (index := machine.number(count)) not in machine.memo:
        raise PickleRefusedError(f"memo number {index} was never set; {DAMAGED}")
    machine.stack.append(machine.memo[index])


def _append(machine: _Machine, values: list[object]) -> None:
    target = machine.top()
    if not isinstance(target, list):
        raise PickleRefusedError(f"a {kind_of(target)} is appended to; {FOREIGN}")
    target.extend(values)


def _set_items(machine: _Machine, values: list[object]) -> None:
    target = machine.top()
    if not isinstance(target, Table):
        raise PickleRefusedError(f"items of a {kind_of(target)} are set; {FOREIGN}")
    if len(values) % 2:
        raise PickleRefusedError(f"a key has no value; {DAMAGED}")
    for key, value in zip(values[::2], values[1::2], strict=True):
        target.put(key, value)


def _build(machine: _Machine) -> None:
    """Drop the attributes of an OrderedDict, such as a state dict's ``_metadata``."""
    state, target = machine.pop(), machine.top()
    if not isinstance(target, Table) or not target.is_ordered or not isinstance(state, Table):
        raise PickleRefusedError(f"opcode BUILD sets the state of a {kind_of(target)}; {FOREIGN}")


def _persistent(machine: _Machine) -> None:
    """Note a storage: ``("storage", type, key, location, numel)``."""
    value = machine.pop()
    if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
        raise PickleRefusedError(f"expected the description of a storage, found a {kind_of(value)}; {FOREIGN}")
    _, kind, key, location, numel = value
    if not isinstance(kind, Global) or kind.name not in STORAGE_DTYPES:
        raise PickleRefusedError(f"expected a type of storage, found {kind_of(kind)}; {FOREIGN}")
    if not (isinstance(key, str) and isinstance(location, str) and is_size(numel)):
        raise PickleRefusedError(f"a storage needs a key, a location and a number of values; {FOREIGN}")
    storage = Storage(kind.name, key, numel, location)
    first = machine.storages.setdefault(key, storage)
    if (first.type_name, first.numel, first.location) != (storage.type_name, storage.numel, storage.location):
        raise PickleRefusedError(f"storage {key!r:.200} is described in two ways; {FOREIGN}")
    machine.stack.append(first)


def _reduce(machine: _Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    if not isinstance(function, Global) or function.name not in CALLS:
        raise PickleRefusedError(f"a {kind_of(function)} is called; {FOREIGN}")
    if not isinstance(arguments, tuple):
        raise PickleRefusedError(f"{function.name} is called with a {kind_of(arguments)}; {DAMAGED}")
    counts, call = CALLS[function.name]
    if len(arguments) not in counts:
        raise PickleRefusedError(
            f"{function.name} takes {counts.start} to {counts.stop - 1} arguments, the pickle gives it "
            f"{len(arguments)}; {FOREIGN}"
        )
    machine.stack.append(call(arguments))


_STOP = ord(".")
_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: _protocol,
    ord("("): lambda machine: machine.marks.append(len(machine.stack)),
    ord("N"): lambda machine: machine.stack.append(None),
    0x88: lambda machine: machine.stack.append(True),
    0x89: lambda machine: machine.stack.append(False),
    ord("K"): lambda machine: machine.stack.append(machine.number(1)),
    ord("M"): lambda machine: machine.stack.append(machine.number(2)),
    ord("J"): lambda machine: machine.stack.append(int.from_bytes(machine.take(4), "little", signed=True)),
    0x8A: lambda machine: machine.stack.append(int.from_bytes(machine.take(machine.number(1)), "little", signed=True)),
    ord("G"): lambda machine: machine.stack.append(struct.unpack(">d", machine.take(8))[0]),
    ord("X"): _unicode,
    ord(")"): lambda machine: machine.stack.append(()),
    0x85: lambda machine: machine.push_tuple(1),
    0x86: lambda machine: machine.push_tuple(2),
    0x87: lambda machine: machine.push_tuple(3),
    ord("t"): lambda machine: machine.stack.append(tuple(machine.pop_mark())),
    ord("]"): lambda machine: machine.stack.append([]),
    ord("a"): lambda machine: _append(machine, [machine.pop()]),
    ord("e"): lambda machine: _append(machine, machine.pop_mark()),
    ord("}"): lambda machine: machine.stack.append(Table()),
    ord("s"): lambda machine: _set_items(machine, [machine.pop(), machine.pop()][::-1]),
    ord("u"): lambda machine: _set_items(machine, machine.pop_mark()),
    ord("q"): lambda machine: _put(machine, 1),
    ord("r"): lambda machine: _put(machine, 4),
    ord("h"): lambda machine: _get(machine, 1),
    ord("j"): lambda machine: _get(machine, 4),
    ord("c"): _global,
    ord("R"): _reduce,
    ord("b"): _build,
    ord("Q"): _persistent,
}
"""All allowed opcodes but STOP."""
