"""A wall clock of a server's own, by libfaketime, which stands between a program and the C library.

The package on PyPI is built without a part that Debian's has, and under which ``time.sleep`` of Python 3.11 and later
fails while the steady clock is left alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PACKAGE = "libfaketime==3.0.1"
_HASH = "sha256:49c2b06250bd5a1206efe5ecfdc575850517081b50b42c6c58718be1a4a09fbd"
_VARIABLE = "EXPO_CHAOS_LIBFAKETIME"
_INSTALL_SECONDS, _TRY_SECONDS = 120.0, 20.0
_TRY = "import threading, time; time.sleep(0.01); threading.Event().wait(0.01); print(time.time())"


def install(work: Path) -> None:
    """Install the library into a folder, once; whether that went well shows when it is used.

    To be called where the network is still there.
    """
    folder = work.absolute() / "libfaketime"
    os.environ[_VARIABLE] = str(folder / "libfaketime/vendor/libfaketime/src/libfaketime.so.1")
    if folder.exists():
        return
    wanted = work / "libfaketime.txt"
    wanted.write_text(f"{_PACKAGE} --hash={_HASH}\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", str(wanted)]
    subprocess.run([*command, "--target", str(folder)], timeout=_INSTALL_SECONDS, check=False)


def environment(file: Path) -> dict[str, str]:
    """Return the variables under which a program takes its wall clock from a file: an offset, such as ``+3600``."""
    return {
        "LD_PRELOAD": os.environ.get(_VARIABLE, ""),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def trouble(file: Path) -> str:
    """Return why a clock of its own does not work here; empty if it does."""
    if not Path(os.environ.get(_VARIABLE, "")).is_file():
        return f"{_PACKAGE} could not be built from PyPI (it needs a C compiler and make)"
    command = [sys.executable, "-c", _TRY]
    try:
        plain, faked = (
            subprocess.run(command, env=variables, capture_output=True, text=True, timeout=_TRY_SECONDS, check=False)
            for variables in (dict(os.environ), {**os.environ, **environment(file)})
        )
    except subprocess.TimeoutExpired:
        return "under libfaketime Python waits for ever"
    if faked.returncode:
        return f"under libfaketime Python fails: {faked.stderr.strip().splitlines()[-1]}"
    offset = float(file.read_text())
    if abs(float(faked.stdout) - float(plain.stdout) - offset) > _TRY_SECONDS:
        return "libfaketime changes nothing"
    return ""
