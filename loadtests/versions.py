"""Are start, throughput and loads those of another version? Both checkouts in turn, in the same environment.

    git worktree add ../before COMMIT
    python -m loadtests.versions --before ../before [--rounds 10]
    python -m loadtests.versions --before ../before --loads 1.1b [--rounds 40]

Both are started from their folders by the Python that runs this; their first start, which compiles loops, is not
counted. Seconds are from the command to its first answer; then some clients ask for a while. With ``--loads`` each
version has a process in which it loads a pair, warm, into memory that was touched before, whenever it is its turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from loadtests.page_cache import warm
from loadtests.pairs import SIZES, Pair, pair_of
from loadtests.results import RESULTS, WORK, ratio_spread, save, shown, spread, table, turns, workplace
from loadtests.servers import MODEL, ended, first_answer
from tests.server import ENGINE_ENV, Server

_MODELS = Path(__file__).parents[1] / ".demo"
_FLAGS = ["--alpha", "0.5", "--served-model-name", MODEL, "--enforce-eager", "--max-model-len", "1024"]
_CLIENTS, _TOKENS = 8, 32
_HERE = Path(__file__).parents[1]
_HEAD = ("", "before", "now", "now to before")


def measure(folders: dict[str, Path], rounds: int, seconds: float, work: Path) -> dict[str, Any]:
    """Start each version once to warm up, and then in turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    environments = {name: _environment(folder) for name, folder in folders.items()}
    for place, name in enumerate([*folders, *turns(list(folders), rounds)]):
        one = _run(environments[name], seconds, work / f"{place}.log")
        print(
            f"{time.strftime('%H:%M:%S')} {name}: first answer after {one['first_answer']:.1f} s, "
            f"{one['tokens']:.1f} tokens/s",
            flush=True,
        )
        if place >= len(folders):
            found[name].append(one)
    return {
        "commits": {name: _commit(folder) for name, folder in folders.items()},
        "first_answer_seconds": {
            name: spread([one["first_answer"] for one in series]) for name, series in found.items()
        },
        "tokens_per_second": {name: spread([one["tokens"] for one in series]) for name, series in found.items()},
        "first_answer_to_before": _ratios(found, "first_answer"),
        "tokens_to_before": _ratios(found, "tokens"),
    }


def _ratios(found: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> dict[str, Any]:
    return ratio_spread(*([one[key] for one in found[name]] for name in ("now", "before")))


def _run(environment: dict[str, str], seconds: float, log: Path) -> dict[str, float]:
    """Start a version; returns the seconds to its first answer, and its tokens a second."""
    pair = ["--base", str(_MODELS / "base"), "--aligned", str(_MODELS / "aligned")]
    began = time.monotonic()
    command = [sys.executable, "-m", "expo_serve"]
    with ended(Server([*pair, *_FLAGS], log, command=command, **environment)) as server:
        first_answer(server)
        return {"first_answer": time.monotonic() - began, "tokens": _throughput(server, seconds)}


def _environment(folder: Path) -> dict[str, str]:
    """Return what makes Python import the package from a checkout rather than from the working directory.

    Raises:
        RuntimeError: it imports another one.
    """
    environment = {"PYTHONPATH": str(folder.resolve()), "PYTHONSAFEPATH": "1"}
    asked = [sys.executable, "-c", "import expo_serve; print(expo_serve.__file__)"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True, env={**ENGINE_ENV, **environment})
    if not Path(found.stdout.strip()).is_relative_to(folder.resolve()):
        raise RuntimeError(f"{folder} would be measured, but {found.stdout.strip()} is imported")
    return environment


def measure_loads(folders: dict[str, Path], pair: Pair, rounds: int) -> dict[str, Any]:
    """Load a pair with each version once to warm up, and then in turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    with ExitStack() as running:
        loaders = {name: running.enter_context(_loader(folder, pair)) for name, folder in folders.items()}
        for place, name in enumerate([*folders, *turns(list(folders), rounds)]):
            warm(pair.files)
            one = _load(loaders[name])
            if place >= len(folders):
                found[name].append(one)
    return {
        "commits": {name: _commit(folder) for name, folder in folders.items()},
        **{
            key: {name: spread([one[key] for one in series]) for name, series in found.items()}
            for key in ("seconds", "peak_resident_bytes", "anonymous_growth_bytes")
        },
        "seconds_to_before": _ratios(found, "seconds"),
        "peak_to_before": _ratios(found, "peak_resident_bytes"),
    }


@contextmanager
def _loader(folder: Path, pair: Pair) -> Iterator[subprocess.Popen[str]]:
    """Start a process that loads when it is told to."""
    script = str(Path(__file__).with_name("version_loads.py"))
    with subprocess.Popen(
        [sys.executable, script, pair.size, str(pair.base.resolve()), str(pair.aligned.resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**ENGINE_ENV, **_environment(folder)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _load(loader: subprocess.Popen[str]) -> dict[str, Any]:
    assert loader.stdin is not None
    assert loader.stdout is not None
    loader.stdin.write("\n")
    loader.stdin.flush()
    line = next((line for line in loader.stdout if line.startswith("{")), None)
    if line is None:
        raise RuntimeError("a process that loads has ended")
    found: dict[str, Any] = json.loads(line)
    return found


def _throughput(server: Server, seconds: float) -> float:
    began = time.monotonic()
    counts = [0] * _CLIENTS

    def client(number: int) -> None:
        prompt = f"Client {number}: once upon a time"
        body = {"model": MODEL, "prompt": prompt, "max_tokens": _TOKENS, "ignore_eos": True, "temperature": 0}
        while time.monotonic() < began + seconds:
            server.post("/v1/completions", body).raise_for_status()
            counts[number] += _TOKENS

    _together([lambda number=number: client(number) for number in range(_CLIENTS)])  # type: ignore[misc]
    return sum(counts) / (time.monotonic() - began)


def _together(tasks: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure, print the table, keep the figures."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--before", type=Path, required=True, help="checkout of the other version")
    made.add_argument("--rounds", type=int, default=10, help="default 10")
    made.add_argument("--seconds", type=float, default=8, help="of asking, in each start (default 8)")
    made.add_argument("--work", type=Path, default=WORK, help="folder for logs")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    made.add_argument("--loads", choices=SIZES, help="compare loads of a pair of this size alone")
    options = made.parse_args()
    folders = {"before": options.before, "now": _HERE}
    if options.loads:
        _compare_loads(folders, options)
    else:
        _compare_servers(folders, options)


def _compare_servers(folders: dict[str, Path], options: argparse.Namespace) -> None:
    with workplace(options.work.absolute(), "versions") as work:
        figures = measure(folders, options.rounds, options.seconds, work)
    save("versions", "demo", figures, options.results)
    rows = [
        [what, *(shown(figures[key][name], 1) for name in ("before", "now")), shown(figures[ratio], 3)]
        for what, key, ratio in (
            ("first answer after, s", "first_answer_seconds", "first_answer_to_before"),
            ("tokens a second", "tokens_per_second", "tokens_to_before"),
        )
    ]
    print(table(_HEAD, rows))


def _compare_loads(folders: dict[str, Path], options: argparse.Namespace) -> None:
    with pair_of(options.loads, options.work) as pair:
        figures = measure_loads(folders, pair, options.rounds)
    save("versions", f"loads-{options.loads}", figures, options.results)
    rows = [
        [what, *(shown(figures[key][name], 2, scale) for name in ("before", "now")), shown(figures[ratio], 3)]
        for what, key, scale, ratio in (
            ("load, s", "seconds", 1.0, "seconds_to_before"),
            ("peak resident, GB", "peak_resident_bytes", 1e9, "peak_to_before"),
        )
    ]
    print(table(_HEAD, rows))


if __name__ == "__main__":
    main()
