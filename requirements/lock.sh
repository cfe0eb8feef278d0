#!/usr/bin/env bash
# Makes cpu.txt (what serving on CPU needs), dev.txt (what tests and demo need beyond it), vision.txt, bench.txt (what
# `make bench` needs beyond both) and deploy.txt (what the chart is tested with) anew.
# WHEELS: a folder or page that holds torch's CPU wheel, which stands on no common index.
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS=${WHEELS:-https://download.pytorch.org/whl/cpu/torch/}

compile() {
  uvx --from uv==0.13.9 uv pip compile "$1" -o "$2" --python-version 3.11 --find-links "$WHEELS" \
    --override requirements/overrides.txt --generate-hashes --no-emit-package torch --no-header --no-annotate --quiet
}

compile requirements/cpu.in requirements/cpu.txt
compile requirements/dev.in requirements/dev.txt
uvx --from uv==0.13.9 uv pip compile requirements/vision.in -o requirements/vision.txt --python-version 3.11 --no-deps \
  --generate-hashes --no-header --no-annotate --quiet
# Apart from the others, in .deploy: checkov pins many packages.
uvx --from uv==0.13.9 uv pip compile requirements/deploy.in -o requirements/deploy.txt --python-version 3.11 \
  --override requirements/deploy-overrides.txt --generate-hashes --no-header --no-annotate --quiet
# Each is resolved under the constraint of those before it; what they have need not stand twice.
keep_own() {
  python3 - "$@" <<'PY'
import re, sys
own, *before = sys.argv[1:]
blocks = lambda file: {b.split("==")[0]: b for b in re.findall(r"^\S+==.*\n(?:    .*\n?)*", open(file).read(), re.M)}
had = {name for file in before for name in blocks(file)}
kept = "".join(block for name, block in blocks(own).items() if name not in had)
open(own, "w").write(kept)
PY
}
keep_own requirements/dev.txt requirements/cpu.txt
compile requirements/bench.in requirements/bench.txt
keep_own requirements/bench.txt requirements/cpu.txt requirements/dev.txt
