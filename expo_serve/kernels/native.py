"""Small loops as machine code: LLVM's IR, compiled for the processor at hand in some 50 ms by llvmlite.

llvmlite comes with vLLM (numba stands on it). Where it is missing or cannot compile, callers do the same work more
slowly in Python or torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, TypeVar

Result = TypeVar("Result")
_engines: list[Any] = []
"""They own the code's memory."""


def once(function: Callable[[], Result]) -> Callable[[], Result]:
    """Call a function one time in a process; a second thread waits for the first one's result."""
    lock, cached = threading.Lock(), cache(function)

    @wraps(function)
    def call() -> Result:
        with lock:
            return cached()

    return call


def _answer_like_an_object(library: Any) -> None:
    """llvmlite's library answers every name with a function, ``__dict__`` too. Whoever looks through all that modules
    hold fails at that, as vLLM does when it begins a second engine in a process."""
    getattr(library, "_fntab", {}).setdefault("__dict__", {})


def compiled(ir: str, signatures: Mapping[str, Any]) -> dict[str, Callable[..., Any]] | None:
    """Compile functions. Calls of them hold no lock of Python's.

    Args:
        ir: a module of LLVM's intermediate representation, with opaque pointers.
        signatures: of the functions in it that are wanted, as :func:`ctypes.CFUNCTYPE` gives them.

    Returns:
        The functions by name, or None where they cannot be compiled.
    """
    try:
        import llvmlite.binding as llvm

        _answer_like_an_object(llvm.ffi.lib)
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(ir)
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(module, passes)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None
    _engines.append(engine)
    return {name: signature(engine.get_function_address(name)) for name, signature in signatures.items()}
