#!/bin/bash
# Install the Debian packages the project needs: install-deps.sh PURPOSE... (run, test, package, container, bench).
# Looks first, and touches the network only if a package is missing.
set -euo pipefail
list=$(dirname "$(readlink -f "$0")")/debian-packages.txt
[ $# -gt 0 ] || set -- run test

wanted() { # PURPOSE: its packages
    awk -v purpose="$1" '$1 !~ /^#/ && $2 == purpose { print $1 }' "$list"
}

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "This is not a Debian system; install these by the names your distribution gives them, and a kernel image in /boot:" >&2
    echo "  to run:  $(wanted run | xargs)" >&2
    echo "  to test: $(wanted test | xargs); to benchmark: $(wanted bench | xargs)" >&2
    exit 1
fi

readable_kernel() {
    local image
    for image in /boot/vmlinuz*; do
        [ -f "$image" ] && [ -r "$image" ] && return
    done
    return 1
}

# Of several names, the first that the release has; before apt has lists it knows none, and the last is as good as any.
pick() {
    local name
    for name in ${1//|/ }; do
        if [ "$name" = "$1" ] || apt-cache show "$name" >/dev/null 2>&1; then
            break
        fi
    done
    echo "$name"
}

missing=()
look() { # PURPOSE...: what they want and is not installed
    local purpose packages package installed
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p')
    missing=()
    for purpose in "$@"; do
        packages=$(wanted "$purpose")
        [ -n "$packages" ] || { echo "$0: nothing is needed for '$purpose'; say run, test, package, container or bench" >&2; exit 2; }
        for package in $packages; do
            if [ "$package" = linux-image-amd64 ] && readable_kernel; then
                continue
            fi
            package=$(pick "$package")
            grep -qxF "$package" <<<"$installed" || missing+=("$package")
        done
    done
}
look "$@"
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "As root, please: apt-get install ${missing[*]}" >&2; exit 1; }
    as_root=(sudo)
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -q -o DPkg::Lock::Timeout=300 "$@" </dev/null >"$log" 2>&1
}
# The tests start these themselves; their packages would start them, now and at every boot, where everybody can reach them.
for service in prometheus slurmctld slurmd munge; do
    unit=/etc/systemd/system/$service.service
    if [[ " ${missing[*]} " == *" $service "* && -d ${unit%/*} && ! -e $unit ]]; then
        "${as_root[@]}" ln -s /dev/null "$unit"
    fi
done
# One unreachable source must not stop us if the others have what we need; the installation will tell.
apt update || echo "apt-get update had trouble; trying to install all the same" >&2
look "$@" # with the names that apt knows now
echo "installing ${missing[*]}"
if ! apt install -y --no-install-recommends "${missing[@]}"; then
    cat "$log" >&2
    echo "apt-get could not install: ${missing[*]}" >&2
    exit 1
fi
