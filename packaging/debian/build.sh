#!/bin/bash
# Build the Debian package of a source tree: build.sh TREE DIRECTORY [WHEELS]. Quiet unless it fails; prints the package's name.
# The tree stays as it is. WHEELS (default: TREE/.cache/wheels) keeps what came from the network.
set -euo pipefail
tree=$(readlink -f "$1")
output=$(readlink -m "$2")
export WHEELS=${3:-$tree/.cache/wheels}
umask 022
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$output" "$WHEELS"
cd "$tree"
packaging/source.sh "$work/hyper2kvmd"
cd "$work/hyper2kvmd"
mv packaging/debian debian
# Packages for different releases differ, and a newer release's replaces an older one's.
sed -i "1s/)/+$(. /etc/os-release; echo "$ID$VERSION_ID"))/" debian/changelog
export DEB_BUILD_OPTIONS=nocheck
if ! { debian/rules wheels && dpkg-buildpackage --build=binary --no-sign --no-pre-clean; } </dev/null >"$work/log" 2>&1; then
    cat "$work/log" >&2
    echo "The package could not be built. Run 'packaging/install-deps.sh package' first: it installs what builds it." >&2
    exit 1
fi
package=$(basename "$work"/*.deb)
mv "$work/$package" "$output"
echo "$output/$package"
