#!/usr/bin/env bash
# Builds the image with podman or docker; arguments go to their `build`.
#   IMAGE     its name (expo-serve:<version>)
#   BASE      the base image (the Dockerfile's)
#   COMPILER  empty: no C++ compiler in the CPU image, which then runs vLLM eagerly
#   ENGINE    podman or docker (the first that is there)
#   PYTHON    see wheels.sh
# An image of this name that was made of the same content is left as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
default_base=$(sed -n 's/^ARG BASE=//p' deploy/docker/Dockerfile | head -1)
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' expo_serve/version.py)
readonly base=${BASE:-$default_base} compiler=${COMPILER-g++} image=${IMAGE:-expo-serve:$version} label=expo-serve.content
engine=${ENGINE:-$(command -v podman || command -v docker || true)}
[ -n "$engine" ] || { echo "build.sh: neither podman nor docker is here; one of them builds the image" >&2; exit 1; }

# One number for all that the image is made of.
content=$({
  echo "$base $compiler"
  find deploy/docker/{Dockerfile,install.sh,plan.py} requirements/{cpu,dev,torch}.txt pyproject.toml README.md LICENSE \
    .dockerignore expo_serve -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
} | sha256sum | cut -c1-32)
there=$("$engine" image inspect --format "{{index .Config.Labels \"$label\"}}" "$image" 2>/dev/null || true)
[ "$there" != "$content" ] || { echo "$image is up to date"; exit 0; }

# The wheels are for the default base's Python. Without them the build fetches its own.
offline=""
if [ "$base" = "$default_base" ] && deploy/docker/wheels.sh; then offline=1; fi

flags=(--file deploy/docker/Dockerfile --tag "$image" --label "$label=$content")
flags+=(--build-arg "BASE=$base" --build-arg "COMPILER=$compiler" --build-arg "OFFLINE=$offline")
revision=$(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || true)
flags+=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision")
if [[ $(basename "$engine") == podman* ]]; then
  # A build only fetches packages, and the host's network is there where no bridge can be made.
  flags+=(--network host)
fi
DOCKER_BUILDKIT=1 "$engine" build "${flags[@]}" "$@" .
