"""Makes a kit that carries what a bare machine with a GPU lacks, for ``python -m loadtests.device_check`` there.

    python3 deploy/gpu/kit.py [--part small vllm] [--python 3.12] [--capability 90] [--vllm 0.32.0] [--no-ptx]

    python3 deploy/gpu/kit.py --unpack DIR          on the other machine

part   what for                                                             file
small  stage 1 on a machine with PyTorch and huggingface_hub                small.zip
vllm   stages 2 and 3 without an installed vLLM, on a card of one kind      vllm.zip, site.zip
image  stages 2 and 3 in a bare environment: what images of PyTorch have    image.zip
hub    stage 1 where huggingface_hub is missing, and so is transformers     hub.zip

The parts are made by this machine's pip from the index that it is configured for. vLLM's wheel is cut: its Python, its
two kernel libraries with the code of other cards zeroed, and the allocator of its sleep mode. FlashAttention is left
out: a stand-in lets the package import, and engines are told to use Triton's attention.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import fatbin  # beside this file

LOCK = Path(__file__).parents[2] / "requirements" / "cpu.txt"
SMALL = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "zstandard", "xxhash", "psutil")
HUB = (
    *("huggingface-hub", "filelock", "fsspec", "httpx2", "httpcore2", "truststore", "h11", "idna", "anyio", "sniffio"),
    *("pyyaml", "tqdm", "typing-extensions", "packaging"),
)
VLLM = (
    *("cbor2", "pyzmq", "oss-harmony", "openai", "httpx2", "httpcore2", "truststore", "sniffio", "msgspec", "pybase64"),
    *("cachetools", "xgrammar", "apache-tvm-ffi", "fastapi", "starlette", "opentelemetry-api", "partial-json-parser"),
    *("llguidance", "compressed-tensors", "loguru"),
)
IMAGE = (
    *("aiohttp", "aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict", "propcache", "yarl", "requests"),
    *("charset-normalizer", "urllib3", "certifi", "cloudpickle", "py-cpuinfo", "einops", "pillow", "prometheus-client"),
    *("python-multipart", "sentencepiece", "tiktoken", "uvloop"),
)
PARTS = {"small": SMALL, "hub": HUB, "image": IMAGE, "vllm": VLLM}
USUAL_PARTS = ("small", "vllm")

_KEPT = ("vllm/*.py", "vllm/*.json", "vllm-*.dist-info/*", "vllm/cumem_allocator.abi3.so")
_CUT = ("vllm/_C_stable_libtorch.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so")
_STAND_IN = "vllm/vllm_flash_attn/_vllm_fa3_C.py"
_NEWEST_GLIBC = 35
"""The C library's minor version of the other machine: 35 is Ubuntu 22.04's."""
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(_NEWEST_GLIBC, 16, -1)] + ["manylinux2014_x86_64"]


def locked(names: Sequence[str], lock: Path = LOCK) -> list[str]:
    """The packages in the versions that the project is tested with.

    Raises:
        SystemExit: the lock has no such package.
    """
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.MULTILINE))
    if missing := [name for name in names if name not in pins]:
        raise SystemExit(f"kit.py: {lock.name} has no {', '.join(missing)}")
    return [f"{name}=={pins[name]}" for name in names]


def pip(*arguments: str) -> None:
    """Run this Python's pip."""
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-cache-dir"], check=True)


def pack_packages(names: Sequence[str], file: Path, python: str) -> None:
    """Install packages for the other machine's Python into a zip file."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [flag for platform in _PLATFORMS for flag in ("--platform", platform)]
        flags += ["--python-version", python, "--implementation", "cp", "--only-binary=:all:", "--no-compile"]
        pip("install", *flags, "--target", folder, *locked(names))
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    out.write(path, path.relative_to(folder))


def pack_vllm(version: str, file: Path, capability: int, keeps_ptx: bool) -> None:
    """Cut vLLM's wheel down to what a load on one kind of card needs."""
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--dest", folder, "--only-binary=:all:", f"vllm=={version}")
        (wheel,) = Path(folder).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
            cut_wheel(given, out, capability, keeps_ptx)


def cut_wheel(given: zipfile.ZipFile, out: zipfile.ZipFile, capability: int, keeps_ptx: bool = True) -> None:
    """Copy what is needed from one archive to the other."""
    for name in given.namelist():
        if name in _CUT:
            library, counts = fatbin.cut(given.read(name), capability, keeps_ptx)
            out.writestr(name, library)
            print(f"{name}: {dict(counts)}")
        elif any(fnmatch(name, pattern) for pattern in _KEPT) and not name.endswith("/"):
            out.writestr(name, given.read(name))
    out.writestr(_STAND_IN, '"""A stand-in: the package imports without the kernels of FlashAttention 3."""\n')


def unpack(kit: Path, folder: Path) -> None:
    """Unpack every part that is there; done on the other machine.

    Raises:
        SystemExit: there is none.
    """
    files = sorted(kit.glob("*.zip"))
    if not files:
        raise SystemExit(f"kit.py: {kit} holds no part of a kit")
    for file in files:
        with zipfile.ZipFile(file) as packed:
            packed.extractall(folder)
    print(f"PYTHONPATH={folder}:. holds {', '.join(file.stem for file in files)}")


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path(".kit"), help="folder for the zip files (default .kit)")
    made.add_argument("--part", nargs="+", choices=PARTS, default=USUAL_PARTS, help="by default small and vllm")
    made.add_argument("--python", default="3.12", help="the other machine's (default 3.12)")
    made.add_argument(
        "--capability", type=int, default=90, help="the card's, without the point (default 90: H100, H200)"
    )
    made.add_argument("--no-ptx", action="store_true", help="17 MB less, and without Marlin's kernels on such a card")
    made.add_argument("--unpack", type=Path, metavar="DIR", help="make nothing: unpack the parts that are in --out")
    made.add_argument("--vllm", default="0.32.0", help="version (default 0.32.0)")
    return made


def main() -> None:
    """Make the parts and say how large they are."""
    options = parser().parse_args()
    out: Path = options.out
    if options.unpack:
        unpack(out, options.unpack)
        return
    out.mkdir(parents=True, exist_ok=True)
    for part in options.part:
        pack_packages(PARTS[part], out / f"{'site' if part == 'vllm' else part}.zip", options.python)
    if "vllm" in options.part:
        pack_vllm(options.vllm, out / "vllm.zip", options.capability, not options.no_ptx)
    for file in sorted(out.glob("*.zip")):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
