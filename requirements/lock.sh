#!/usr/bin/env bash
# Makes cpu.txt (what serving on CPU needs), dev.txt (what tests and demo need beyond it) and vision.txt anew.
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
# dev.in is resolved under the constraint of cpu.txt; what cpu.txt has need not stand twice.
python3 - <<'PY'
import re
blocks = lambda text: {block.split("==")[0]: block for block in re.findall(r"^\S+==.*\n(?:    .*\n?)*", text, re.M)}
cpu, dev = (open(f"requirements/{name}.txt").read() for name in ("cpu", "dev"))
open("requirements/dev.txt", "w").write("".join(b for name, b in blocks(dev).items() if name not in blocks(cpu)))
PY
