#!/usr/bin/env bash
# Makes a stand-in for the Dockerfile's default base image out of Debian's packages, for machines that reach Debian but no
# image registry: base_image.sh [NAME]. Needs root, podman and mmdebstrap. Its Python is Debian's own 3.11.
set -euo pipefail
name=${1:-docker.io/library/python:3.11-slim-bookworm}
if ! command -v mmdebstrap >/dev/null; then
  echo "base_image.sh: mmdebstrap is not here (apt-get install mmdebstrap)" >&2
  exit 1
fi

# Where this machine has its own packages from, if they are of the same release.
lists=(/etc/apt/sources.list.d/debian.sources /etc/apt/sources.list)
sources=$(grep -lsE '^(Suites:|deb ).*\bbookworm\b' "${lists[@]}" | head -1 || true)
# No documentation, as in the slim image, and no waiting for the disk: what comes of it is one archive.
mmdebstrap --quiet --variant=apt --include=python3,python3-venv,ca-certificates \
  --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' bookworm - "${sources:-http://deb.debian.org/debian}" \
  | podman import --quiet --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$name"
