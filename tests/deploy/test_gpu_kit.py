"""The kit for a bare GPU machine: what is cut out of a library and of a wheel, and that the rest stays in its place."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.deploy.gpu_kit import GPU, fatbin, kit

PTX, CUBIN = 1, 2
BEFORE, AFTER = b"\x7fELF text", b" more text \x50\xed\x55\xba by chance"


def entry(kind: int, capability: int, payload: bytes) -> bytes:
    return struct.pack("<HHIQIIHHI", kind, 0, 64, len(payload), 0, 64, 0, 1, capability).ljust(64, b"\0") + payload


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(*containers: bytes) -> bytes:
    return BEFORE + b"padding".join(containers) + AFTER


def payloads(cut: bytes) -> list[bytes]:
    """Of all entries, in their order."""
    return [cut[code.start : code.start + code.size] for entries in fatbin.containers(cut) for code in entries]


@pytest.mark.parametrize(
    ("capability", "ptx", "kept"),
    [
        (90, True, [b"", b"cubin 90", b"", b"ptx 80"]),
        (90, False, [b"", b"cubin 90", b"", b""]),
        (80, True, [b"cubin 80", b"", b"", b"ptx 80"]),
        (86, True, [b"cubin 80", b"", b"", b"ptx 80"]),  # machine code runs on later cards of its major version
        (100, True, [b"", b"", b"ptx 90", b"ptx 80"]),
        (75, True, [b"", b"", b"", b""]),
    ],
)
def test_what_the_card_takes_is_kept_and_the_rest_zeroed(capability: int, ptx: bool, kept: list[bytes]) -> None:
    first = container(entry(CUBIN, 80, b"cubin 80"), entry(CUBIN, 90, b"cubin 90"), entry(PTX, 90, b"ptx 90"))
    whole = library(first, container(entry(PTX, 80, b"ptx 80")))
    cut, counts = fatbin.cut(whole, capability, ptx)
    assert [payload.strip(b"\0") for payload in payloads(cut)] == kept
    assert len(cut) == len(whole)
    assert cut.startswith(BEFORE)
    assert cut.endswith(AFTER)
    assert counts["containers"] == 2
    assert counts["kept"] + counts["zeroed"] == sum(map(len, payloads(whole)))


@pytest.mark.parametrize("size", range(20))
def test_a_library_that_ends_in_a_header_is_no_error(size: int) -> None:
    whole = library(container(entry(CUBIN, 90, b"cubin 90")))
    damaged = whole[: len(BEFORE) + size * 4]
    assert fatbin.cut(damaged, 90)[0] == damaged


def test_wheel_is_cut_to_python_and_two_libraries(tmp_path: Path) -> None:
    names = [
        "vllm/__init__.py",
        "vllm/model_executor/configs/a.json",
        "vllm/_C_stable_libtorch.abi3.so",
        "vllm/_moe_C_stable_libtorch.abi3.so",
        "vllm/cumem_allocator.abi3.so",
        "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
        "vllm-0.32.0.dist-info/METADATA",
    ]
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        for name in names:
            wheel.writestr(name, library(container(entry(CUBIN, 80, b"cubin 80"))))
    with zipfile.ZipFile(tmp_path / "wheel") as wheel, zipfile.ZipFile(tmp_path / "cut", "w") as out:
        kit.cut_wheel(wheel, out, 90)
    with zipfile.ZipFile(tmp_path / "cut") as made:
        assert set(made.namelist()) == {*names, "vllm/vllm_flash_attn/_vllm_fa3_C.py"} - {names[5]}
        assert b"cubin 80" not in made.read(names[2])
        assert b"cubin 80" in made.read(names[4])


def test_parts_are_unpacked_together(tmp_path: Path) -> None:
    for name in ("small", "site"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as part:
            part.writestr(f"{name}/__init__.py", "")
    kit.unpack(tmp_path, tmp_path / "there")
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"small", "site"}
    with pytest.raises(SystemExit, match="holds no part of a kit"):
        kit.unpack(tmp_path / "there", tmp_path / "nowhere")


def test_versions_are_those_of_the_lock() -> None:
    for part in kit.PARTS.values():
        assert len(kit.locked(part)) == len(set(part))
    with pytest.raises(SystemExit, match="has no no-such-package"):
        kit.locked(["no-such-package"])


def test_help_is_answered_without_any_package() -> None:
    command = [sys.executable, "-S", str(GPU / "kit.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "--capability" in done.stdout
