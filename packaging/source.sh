#!/bin/bash
# Copy what packages are built from: source.sh DIRECTORY. Run in a source tree; leaves out what working in it has made.
set -euo pipefail
mkdir -p "$1/tests"
cp -r hyper2kvmd etc systemd packaging docs README.md CHANGELOG.md "$1"
cp tests/*.py "$1/tests"
find "$1" -name __pycache__ -type d -prune -exec rm -r {} +
