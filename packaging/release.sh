#!/bin/bash
# Make the files of a release: release.sh DIRECTORY. The source, the wheel that is built from it, a list of the libraries
# that the packages bring (SBOM), and their checksums. The same tree gives the same bytes.
set -euo pipefail
output=$(readlink -m "$1")
cd "$(dirname "$(readlink -f "$0")")/.."
python=$PWD/.venv/bin/python
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' hyper2kvmd/__init__.py)
date=$(sed -n "s/^## ${version//./\\.} (\([0-9-]*\))$/\1/p" CHANGELOG.md)
if [ -z "$date" ]; then
    echo "CHANGELOG.md has no section '## $version (YEAR-MONTH-DAY)': name what is new in it so, then try again." >&2
    exit 1
fi
SOURCE_DATE_EPOCH=$(date --utc --date "$date" +%s)
export SOURCE_DATE_EPOCH
umask 022
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$output" "$work/tree" "$work/made"
# What git has, or would take: nothing that a build or a test has left.
if ! git ls-files -z --cached --others --exclude-standard --deduplicate | tar --null -cT - | tar -xC "$work/tree"; then
    echo "What git has is not all in the tree: restore it, or remove it with git rm, then try again." >&2
    exit 1
fi

build() { # WHAT TREE
    "$python" -m build "--$1" --outdir "$work/made" "$2" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
}
build sdist "$work/tree"
# setuptools packs files with the times and the order that they have by chance.
name=hyper2kvmd-$version
tar -xzC "$work" -f "$work/made/$name.tar.gz"
tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=go+rX,go-w -cC "$work" "$name" |
    gzip -n >"$work/made/$name.tar.gz"
build wheel "$work/$name"

# What the packages bring is installed by its hashes into an empty environment, which then lists itself, with its licences.
"$python" -m venv "$work/libraries"
"$work/libraries/bin/pip" -qq --disable-pip-version-check install --require-hashes --only-binary :all: --no-deps \
    --requirement packaging/requirements.lock
"$work/libraries/bin/pip" --quiet --disable-pip-version-check uninstall --yes setuptools pip
"$python" -m cyclonedx_py environment --pyproject pyproject.toml --output-reproducible --output-file "$work/sbom.json" \
    "$work/libraries/bin/python"
"$python" - "$work/sbom.json" "$version" >"$work/made/$name.cdx.json" <<'END'
import json, sys
sbom = json.load(open(sys.argv[1]))
sbom["metadata"]["component"]["version"] = sys.argv[2]  # which pyproject.toml leaves to the code
print(json.dumps(sbom, indent=2))
END
(cd "$work/made" && sha256sum -- * >SHA256SUMS)
mv "$work/made"/* "$output"
echo "$output/$name.tar.gz"
