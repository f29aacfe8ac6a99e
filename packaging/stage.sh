#!/bin/bash
# Put all that the packages hold below a directory: stage.sh DIRECTORY [WHEELS]. Run in a source tree, by their recipes.
# WHEELS: a directory with the wheels of requirements.lock, where the distribution's own libraries are too old.
set -euo pipefail
root=$1
wheels=${2:-}
venv=$root/usr/lib/hyper2kvmd/venv
share=$root/usr/share

# The program, with an environment of its own. Nobody activates it; those files name the directory in which it was built.
/usr/bin/python3 -m venv --system-site-packages --without-pip "$venv"
rm -rf "$venv"/bin/[Aa]ctivate* "$venv/include" "$venv/.gitignore"
sed -i '/^command/d' "$venv/pyvenv.cfg"
if [ -n "$wheels" ]; then
    pip/bin/pip --quiet --disable-pip-version-check --python "$venv/bin/python" install --require-hashes --no-deps \
        --requirement packaging/requirements.lock --no-index --find-links "$wheels" --ignore-installed --no-compile \
        --no-build-isolation
fi
libraries=$(echo "$venv"/lib/python3.*/site-packages)
cp -r hyper2kvmd "$libraries"
find "$libraries/hyper2kvmd" -name '*.md' -delete # for who works on it
# Scripts of libraries, which name the directory in which they were installed, and what pip knows of them and all files.
find "$venv/bin" -type f -delete
rm -f "$libraries"/*.dist-info/RECORD
# Not checked at every start; the files change only together.
"$venv/bin/python" -m compileall -q -j0 --invalidation-mode unchecked-hash -s "$root" -p / "$venv"
install -D -t "$root/usr/lib/hyper2kvmd" packaging/upgrade
install -D -t "$root/usr/bin" packaging/launchers/*

# The service.
units=$root/usr/lib/systemd/system
for unit in hyper2kvmd.service hyper2kvmd@.service; do
    install -D -m 0644 -t "$units" "systemd/$unit"
    install -D -m 0644 -t "$units/$unit.d" packaging/package.conf
done
install -D -m 0644 -t "$root/etc/hyper2kvmd" etc/hyper2kvmd.yaml
install -D -m 0644 packaging/sysusers.conf "$root/usr/lib/sysusers.d/hyper2kvmd.conf"
install -D -m 0644 packaging/tmpfiles.conf "$root/usr/lib/tmpfiles.d/hyper2kvmd.conf"
install -D -m 0644 -t "$root/usr/lib/systemd/catalog" packaging/hyper2kvmd.catalog

# What people read, and what their tools read.
install -D -m 0644 -t "$share/bash-completion/completions" packaging/completions/bash/*
install -D -m 0644 -t "$share/fish/vendor_completions.d" packaging/completions/fish/*
PYTHONPATH=. "$venv/bin/python" -B -m tests.reference --man man
for page in man/*; do
    install -D -m 0644 -t "$share/man/man${page##*.}" "$page"
done
ln -s hyper2kvmctl.1 "$share/man/man1/hyper2kvm.1"
install -d "$share/hyper2kvmd" "$share/doc/hyper2kvmd/examples"
cp -r packaging/grafana packaging/prometheus "$share/hyper2kvmd"
rm -f "$share/hyper2kvmd/grafana/dashboards/.lint"
cp -r README.md docs "$share/doc/hyper2kvmd"
cp systemd/examples/* "$share/doc/hyper2kvmd/examples"
cp -r packaging/slurm packaging/dispatch "$share/doc/hyper2kvmd/examples"
