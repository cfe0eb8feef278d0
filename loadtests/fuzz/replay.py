"""Judges files that were kept, one after the other in one process, and prints what became of each as JSON.

python -m loadtests.fuzz.replay corpus.zip

The archive has a folder for each format, by its name. Formats are as ``loadtests.fuzz.deployments`` has them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from loadtests.fuzz.deployments import Format, build, formats
from loadtests.fuzz.judge import Judge


def replay(corpus: Path, folder: Path) -> Iterator[dict[str, str]]:
    """Yield the outcome of each file.

    Args:
        corpus: the archive.
        folder: an empty one, for the deployments.
    """
    with zipfile.ZipFile(corpus) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    build(folder)
    judge, kinds = Judge(folder), formats()
    whole = {kind.name: kind.seeds(folder) for kind in kinds.values()}
    _warm_up(judge, kinds["safetensors"])
    for name, data in files.items():
        kind = kinds[name.partition("/")[0]]
        kind.put(folder, data)
        outcome = judge(kind)
        yield {"file": name, **outcome._asdict()}
        kind.put(folder, whole[kind.name][0])  # other formats read it too


def _warm_up(judge: Judge, kind: Format) -> None:
    """Import what a run imports."""
    if judge(kind).kind != "accepted":
        raise RuntimeError("a whole deployment is not accepted")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    options = parser.parse_args()
    corpus = options.corpus.resolve()
    with tempfile.TemporaryDirectory() as folder:
        found = list(replay(corpus, Path(folder)))
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
