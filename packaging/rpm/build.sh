#!/bin/bash
# Build the RPM package of a source tree: build.sh TREE DIRECTORY [WHEELS]. Quiet unless it fails; prints the package's name.
# The tree stays as it is. WHEELS (default: TREE/.cache/wheels) keeps what came from the network.
set -euo pipefail
tree=$(readlink -f "$1")
output=$(readlink -m "$2")
wheels=$(readlink -m "${3:-$tree/.cache/wheels}")
umask 022
cd "$tree"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' hyper2kvmd/__init__.py)
date=$(sed -n '/^%changelog/{n;s/^\* \(... ... .. ....\) .*/\1/p}' packaging/hyper2kvmd.spec)
SOURCE_DATE_EPOCH=$(date --utc --date "$date" +%s)
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
name=hyper2kvmd-$version
mkdir -p "$output" "$wheels" "$work/SOURCES"
packaging/source.sh "$work/$name"
cd "$work/$name"
build() {
    # The libraries that come along, as the spec has it. Fetched before: where distributions build, there is no network.
    if [ -n "$(rpm --eval '%{?fedora}')" ]; then
        sed -n -i '/^structlog==/,/[^\\]$/p' packaging/requirements.lock
    else
        cat packaging/rpm/sdnotify.lock >>packaging/requirements.lock
    fi
    packaging/wheels.sh "$wheels"
    # --nodeps: where rpm is not what installed the tools, it knows of none.
    tar -czC "$work" -f "$work/SOURCES/$name.tar.gz" "$name"
    rpmbuild -bb --nodeps --define "_topdir $work" --define "wheels $wheels" packaging/hyper2kvmd.spec
}
if ! build </dev/null >"$work/log" 2>&1; then
    cat "$work/log" >&2
    echo "The package could not be built. It takes rpm-build, lowdown and the libraries that the spec file names." >&2
    exit 1
fi
package=$(basename "$work"/RPMS/*/*.rpm)
mv "$work"/RPMS/*/"$package" "$output"
echo "$output/$package"
