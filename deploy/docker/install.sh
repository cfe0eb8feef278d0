#!/bin/sh
# The steps of the image's build, with the plan (plan.py) beside this file:
#   install.sh tools    what builds the project's wheel, into the build stage's own environment
#   install.sh system   Debian's packages, the user, the folders
#   install.sh locked   the locked packages: into a new environment in /opt/expo, or beside the vLLM that the base has
#   install.sh own      the project's wheel
# Python's packages are just what is named, without dependencies. OFFLINE=1 takes every wheel from /wheels; else they come
# from the indexes PYPI and TORCH_INDEX.
set -eu
plan=$(dirname "$0")
python=$(command -v python3)
if [ -s "$plan/torch.txt" ]; then python=/opt/expo/bin/python; fi

# from INDEX ENVIRONMENT ARGUMENT...
from() {
  index=$1 environment=$2
  shift 2
  if [ "${OFFLINE:-}" = 1 ]; then
    set -- --no-index --find-links /wheels "$@"
  else
    set -- --index-url "$index" "$@"
  fi
  # A distribution may call its Python apt's own; in an image it is nobody else's.
  PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore /build/pip/bin/python -m pip --python "$environment" install \
    --quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: "$@"
}

# A container can write no byte code, and some images leave out that of the standard library. On all cores; files that are
# meant for another Python do not compile, as under pip, and that is no error.
compile() {
  python3 -m compileall -qq -j 0 -x '/(dist-packages|test|idlelib|lib2to3)/' \
    "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" /opt/expo || true
}

case $1 in
  tools)
    from "$PYPI" /build/pip/bin/python --require-hashes -r "$plan/tools.txt"
    ;;
  system)
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    xargs apt-get install -qy --no-install-recommends < "$plan/system.txt"
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
    groupadd --gid 10001 expo
    useradd --uid 10001 --gid 10001 --no-log-init --create-home --shell /usr/sbin/nologin expo
    # Open to anyone, since some engines give a volume the mode of the folder that it covers.
    install -d -m 1777 /cache /home/expo
    ;;
  locked)
    if [ -s "$plan/torch.txt" ]; then
      python3 -m venv --without-pip /opt/expo
      from "$TORCH_INDEX" "$python" --no-compile -r "$plan/torch.txt"
      from "$PYPI" "$python" --no-compile --require-hashes -r "$plan/locked.txt"
      # 170 MB of the packages' own tests.
      find /opt/expo -depth \( -type d -name tests -o -path '*/torch/test' -o -path '*/torch/bin/test_*' \) -exec rm -r {} +
      compile
    elif [ -s "$plan/locked.txt" ]; then
      from "$PYPI" "$python" --require-hashes -r "$plan/locked.txt"
    fi
    ;;
  own)
    OFFLINE=1 from "" "$python" "$plan"/own/*.whl
    ;;
esac
