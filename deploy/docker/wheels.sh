#!/usr/bin/env bash
# Fetches the wheels that the CPU image is made of into deploy/docker/wheels, by the locks; again only when a lock has
# changed. Out here pip is set up for this machine's indexes and its cache is warm, and a build has neither.
#   PYTHON   a Python 3.11 with pip, as the default base has it (.venv's if it is one, or python3.11)
set -euo pipefail
cd "$(dirname "$0")/../.."
readonly wheels=deploy/docker/wheels
stamp=$(cat requirements/{cpu,dev,torch}.txt deploy/docker/plan.py | sha256sum)
[ "$stamp" != "$(cat $wheels/.stamp 2>/dev/null || true)" ] || exit 0

is_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || is_311 "$python" || python=python3.11
is_311 "$python" || { echo "wheels.sh: Python 3.11 is needed; $python is none, or is not here; set PYTHON" >&2; exit 1; }
plan=$(mktemp -d)
trap 'rm -r "$plan"' EXIT
"$python" deploy/docker/plan.py . "$plan" whole
fetch() {
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest $wheels "$@"
}
fetch -r "$plan/torch.txt" 2>/dev/null || fetch --index-url https://download.pytorch.org/whl/cpu -r "$plan/torch.txt"
fetch --require-hashes -r "$plan/locked.txt"
fetch --require-hashes -r "$plan/tools.txt"
echo "$stamp" > $wheels/.stamp
