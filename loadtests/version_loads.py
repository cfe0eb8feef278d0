"""Load a pair once for each line of standard input, and print what it cost: one version of `versions --loads`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from loadtests.loading import CONTENDERS, empty_model, load_once
from loadtests.pairs import Pair


def main(size: str, base: str, aligned: str) -> None:
    """Load until the input ends."""
    pair = Pair(size, Path(base), Path(aligned))
    with empty_model(pair.aligned) as (model, config):
        for _ in sys.stdin:
            print(json.dumps(load_once(model, config, CONTENDERS["expo"], pair)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
