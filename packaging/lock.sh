#!/bin/bash
# Pin requirements.in to the newest versions, by the hashes of their wheels for every Python that the package is built with.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
for python in 3.11 3.12 3.13 3.14; do
    ../.venv/bin/python -m pip download -qq --disable-pip-version-check --dest "$wheels" --requirement requirements.in \
        --only-binary :all: --implementation cp --python-version "$python" --platform manylinux_2_17_x86_64
done
lock() {
    echo "# Made by \`make lock\` from requirements.in: wheels for amd64 and the Pythons of Debian 12 and 13, EL 10, Fedora and Ubuntu 24.04."
    find . -name '*.whl' -printf '%f\n' | cut -d - -f 1-2 | sort -u | while IFS=- read -r name version; do
        printf '%s==%s' "${name//_/-}" "$version"
        sha256sum "$name-$version"-*.whl | cut -d ' ' -f 1 | sort | while read -r hash; do
            printf ' \\\n    --hash=sha256:%s' "$hash"
        done
        echo
    done
}
(cd "$wheels" && lock >lock)
cp "$wheels/lock" requirements.lock
