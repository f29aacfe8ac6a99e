#!/bin/bash
# Fetch the wheels of requirements.lock that fit this machine's Python: wheels.sh DIRECTORY. The only step of building a
# package that needs the network, and only for what is not there yet. Run in a source tree; leaves pip for stage.sh there.
set -euo pipefail
exec 9>"$1/.lock"
flock 9  # another package may be built at the same time
/usr/bin/python3 -m venv --system-site-packages pip
# sdnotify is published as source alone; the distribution's setuptools make a wheel of it, where it is wanted.
pip/bin/pip --quiet --disable-pip-version-check download --require-hashes --no-deps --only-binary :all: \
    --no-binary sdnotify --no-build-isolation --requirement packaging/requirements.lock --dest "$1"
