"""Where loops can be compiled, and where not: then torch does the work, nothing fails, and one line says why.

Most cases need a process of their own: numba reads its environment once.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numba
import numpy as np
import pytest
import torch

import expo_serve
from expo_serve import kernels
from expo_serve.kernels import bf16, compiling, probe
from expo_serve.kernels.bf16 import Bits
from tests.load.lazies import numbers
from tests.models.packs import UP, Packs

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What a process printed."""

    way: str
    bits: str
    reason: str
    from_cache: bool


def run(environment: dict[str, str], package: Path = ROOT, before: str = "") -> Outcome:
    """Load in another process, which finds the package in a folder; variables set to nothing are unset."""
    variables = {**os.environ, "PYTHONPATH": f"{package}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{before}\nfrom tests.kernels.loading import load\nload()"],
        cwd=package,
        env={name: value for name, value in variables.items() if value},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    way, bits, reason, hits = result.stdout.split("\n")[:4]
    return Outcome(way, bits, reason, hits == "1")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, whose folder takes no cache: not even root can make a folder where a file is."""
    root = tmp_path_factory.mktemp("copy")
    source = Path(expo_serve.__file__).parent
    shutil.copytree(source, root / "expo_serve", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "expo_serve/kernels/__pycache__").write_text("no folder")
    return root


NO_CACHE = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/dev/null"}


def test_without_a_place_for_the_cache(copy: Path) -> None:
    """As with a read-only root and no home."""
    found = run(NO_CACHE, copy)
    assert (found.way, found.bits) == ("torch", "right")
    assert "no folder for its cache" in found.reason
    assert "set NUMBA_CACHE_DIR to a writable folder" in found.reason


def test_cache_folder_that_the_environment_names(copy: Path, tmp_path: Path) -> None:
    """Compiled once; again after a change of a file of the room that is not the loop's; not used when damaged."""
    places = {**NO_CACHE, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for is_from_cache in (False, True):
        assert run(places, copy) == Outcome("loops", "right", "", is_from_cache)
    with (copy / "expo_serve/kernels/codes.py").open("a") as file:
        file.write("# changed\n")
    assert run(places, copy) == Outcome("loops", "right", "", False)
    for file_ in (tmp_path / "cache").rglob("*.nb?"):
        file_.write_bytes(file_.read_bytes()[:20])
    found = run(places, copy)
    assert (found.way, found.bits) == ("torch", "right")
    assert "set NUMBA_CACHE_DIR to an empty, writable folder" in found.reason


def test_cache_on_a_full_disk(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba finds the folder, and cannot write to it."""

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def double(value: int) -> int:
        return 2 * value

    loop = compiling.loop("int64(int64)")(double)
    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_save_index", fail)
    monkeypatch.setattr(kernels, "_loop", lambda name: loop)
    assert not kernels.available()
    assert "No space left on device" in kernels.reason()


@pytest.mark.parametrize(
    ("before", "environment", "words"),
    [
        ("sys.modules['numba'] = None", {}, ("numba cannot be imported", "install numba")),
        ("", {"NUMBA_DISABLE_JIT": "1"}, ("NUMBA_DISABLE_JIT is set; unset it",)),
    ],
    ids=["no numba", "switched off"],
)
def test_without_a_compiler(before: str, environment: dict[str, str], words: tuple[str, ...]) -> None:
    found = run(environment, before=before)
    assert (found.way, found.bits) == ("torch", "right")
    for word in words:
        assert word in found.reason
    assert found.reason.count("compiled loops are not used") == 1


@pytest.mark.parametrize("command", ["verify", "apply", "merge"])
def test_commands_say_it_once_on_standard_error(tmp_path: Path, command: str) -> None:
    base = numbers(40, 50)
    pack = Packs(tmp_path).make({UP: base}, {UP: torch.where(numbers(40, 50, seed=1) > 1, base * 2, base)})
    arguments = ["delta", command] if command != "merge" else ["merge", "--alpha", "0.5"]
    arguments += ["--base", str(pack.base), "--delta", str(pack.delta)]
    arguments += ["--out", str(tmp_path / "out")] if command != "verify" else []
    result = subprocess.run(
        [sys.executable, "-m", "expo_serve", *arguments],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("NUMBA_DISABLE_JIT is set; unset it") == 1
    assert "expo-serve: warning: compiled loops are not used" in result.stderr.splitlines()[-1]


Combine = Callable[[Bits, Bits, Bits, float, bool, bool, Bits], bool]


def wrong(base: Bits, aligned: Bits, out: Bits, factor: float, from_aligned: bool, is_delta: bool, noise: Bits) -> bool:
    """Combine, and change the last value by one bit."""
    is_finite = bf16.combine(base, aligned, out, factor, from_aligned, is_delta, noise)
    out[-1] ^= 1
    return is_finite


def careless(
    base: Bits, aligned: Bits, out: Bits, factor: float, from_aligned: bool, is_delta: bool, noise: Bits
) -> bool:
    """Combine, and notice nothing."""
    bf16.combine(base, aligned, out, factor, from_aligned, is_delta, noise)
    return True


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was asked for yet."""
    assert kernels.available(), kernels.reason()
    monkeypatch.setattr(kernels, "_found", {})


@pytest.mark.parametrize("combine", [wrong, careless])
def test_loop_with_other_bits_is_not_used(forgotten: None, monkeypatch: pytest.MonkeyPatch, combine: Combine) -> None:
    monkeypatch.setattr(probe, "combine", combine)
    assert not kernels.available()
    assert "other bits than torch" in kernels.reason()
    assert not kernels.available("reading.gather", "bf16.combine")
    assert kernels.available("reading.gather")


def test_probe_is_serial_and_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 32,768 values on torch wakes its threads, which a busy machine does not run for seconds."""
    sizes, lerp = [], torch.lerp

    def note(base: torch.Tensor, aligned: torch.Tensor, weight: float) -> torch.Tensor:
        sizes.append(base.numel())
        assert base.device.type == "cpu"
        return lerp(base, aligned, weight)

    monkeypatch.setattr(torch, "lerp", note)
    try:
        torch.set_default_device("meta")
        assert probe.gives_bits_of_torch()
    finally:
        torch.set_default_device(None)
    assert max(sizes) < 32768
    assert sum(sizes) > 5 * 2 * 65000


def test_threads_that_ask_at_once_compile_once(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        assert kernels.available("reading.stream")

    monkeypatch.setattr(compiling, "compile_loop", compiled.append)
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1


def test_numba_is_not_imported_before_a_loop_is_asked_for() -> None:
    """vLLM imports the plugin in every process; most never load a weight."""
    code = "import sys, expo_serve.load.fill, expo_serve.write.merged; print('numba' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "False\n"


def test_scan_of_all_modules_finds_objects() -> None:
    """vLLM asks everything that modules hold for its ``__dict__`` when an engine starts."""
    assert kernels.available()
    for module in [module for name, module in sys.modules.items() if name.startswith(("llvmlite.", "numba."))]:
        for value in list(vars(module).values()):
            assert not hasattr(value, "__dict__") or isinstance(vars(value), (dict, MappingProxyType))


def test_no_loop_leaves_its_memory() -> None:
    """Loops check no bounds: arrays of the right sizes are their callers' part, and what they get is not written to."""
    base, other = (np.arange(64, dtype=np.uint16) + 0x3F80 for _ in range(2))
    out = np.full(64 + 32, 7, np.uint16)
    assert bf16.combine(base, other, out[16:80], 0.5, True, False, out[:0])
    assert set(out[:16]) | set(out[80:]) == {7}
    assert np.array_equal(base, np.arange(64) + 0x3F80)
