# `make` alone lists what there is to make.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory
PYTHON := .venv/bin/python
# The tests start a thousand processes of ours, each of which would compile the program again.
unexport PYTHONDONTWRITEBYTECODE
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/hyper2kvmd-tests

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

.PHONY: deps
deps: ## install the Debian packages for running and testing (root or sudo)
	@packaging/install-deps.sh run test

.PHONY: bench-deps
bench-deps: ## the same, and those for the benchmark
	@packaging/install-deps.sh run test bench

.PHONY: venv
venv: .venv/.stamp ## make .venv and install the project into it

# The distribution's interpreter and its packages: guestfs and libvirt exist for no other.
.venv/.stamp: pyproject.toml
	@/usr/bin/python3 -m venv --system-site-packages .venv && $(PYTHON) -m pip install -qq --disable-pip-version-check -e '.[dev]' \
		|| { echo "The virtual environment could not be made. Run 'make deps' first: it installs what pip cannot." >&2; exit 1; }
	@touch $@

.PHONY: lint
lint: venv ## ruff, mypy, and the layers of imports
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check . || { echo "Not formatted: run .venv/bin/ruff format ." >&2; exit 1; }
	@.venv/bin/mypy --no-error-summary
	@out=$$(.venv/bin/lint-imports --no-cache 2>&1) || { echo "$$out" >&2; exit 1; }
	@$(PYTHON) -m tests.circles

# A session of pytest: its name, and what it runs. A line for each tier when it passes, and what was skipped; all that
# pytest said when it fails. Much is waited for, and an emulated guest keeps one core busy: so, two processes.
SAY = grep -hE '^(SKIPPED|XFAIL|XPASS)' $(1:%=.cache/logs/%.log) || true; $(PYTHON) -m tests.order --sum $(1)
define pytest
	@mkdir -p .cache/logs
	@echo "$(1) tests (follow them in .cache/logs/$(1).tests)"
	@$(PYTHON) -m pytest -q --tb=short -n 2 --durations=60 --times=$(1) $(2) </dev/null >.cache/logs/$(1).log 2>&1 || { \
		cat .cache/logs/$(1).log; echo "$(1) tests failed" >&2; exit 1; }
endef
UNIT := tests/unit
OTHERS := tests/integration tests/e2e

.PHONY: test
test: deps package-deps venv lint ## what every change must pass: up to half an hour
	$(call pytest,unit,$(UNIT))
	$(call pytest,test,$(OTHERS))
	@$(call SAY,unit test)

.PHONY: test-all
test-all: test test-rest ## and the rest, before a release and when what it covers is touched

.PHONY: test-rest
test-rest: deps package-deps venv ## an hour; what `make test` leaves out (docs/development.md says why)
	$(call pytest,rest,-m rest $(OTHERS))
	@$(call SAY,rest)

.PHONY: test-unit
test-unit: venv ## seconds; needs nothing but Python and python3-hivex
	$(call pytest,unit,$(UNIT))
	@$(call SAY,unit)

.PHONY: test-integration
test-integration: deps venv ## minutes; real qemu-img, libguestfs and libvirt
	$(call pytest,integration,tests/integration)
	@$(call SAY,integration)

.PHONY: test-system
test-system: deps package-deps venv ## minutes; boots migrated guests, runs the service, installs the package on a fresh system
	$(call pytest,system,tests/e2e)
	@$(call SAY,system)

.PHONY: durations
durations: venv ## write the list by which the longest tests come first, from the last `make test-all`
	@$(PYTHON) -m tests.order --keep rest test unit

.PHONY: package-deps
package-deps: ## install the Debian packages for building and testing the package
	@packaging/install-deps.sh package

.PHONY: deb
deb: package-deps ## build the Debian package into dist
	@packaging/debian/build.sh . dist

.PHONY: rpm
rpm: ## build the RPM package into dist; on EL 10 and Fedora, and on Debian for looking at it
	@if command -v dnf >/dev/null; then \
		dnf -q -y install rpm-build 'dnf-command(builddep)' && dnf -q -y builddep packaging/hyper2kvmd.spec; \
	else \
		packaging/install-deps.sh package; \
	fi
	@packaging/rpm/build.sh . dist

.PHONY: lock
lock: venv ## pin the newest versions of the libraries that the package brings
	@packaging/lock.sh

.PHONY: test-container
test-container: deps package-deps venv ## minutes; builds the container image with Podman, and runs it
	@packaging/install-deps.sh container
	@$(PYTHON) -m pytest -q --tb=short tests/e2e/containers.py

.PHONY: release
release: venv ## source, wheel, list of libraries and checksums into dist
	@packaging/release.sh dist

.PHONY: state
state: venv ## keep what this version leaves on disk, for the tests of later ones
	@$(PYTHON) -m tests.state

.PHONY: matrix
matrix: deps venv ## migrate every test guest and boot it (two hours without KVM); prints what README and docs/guests.md have
	@$(PYTHON) -m tests.matrix

.PHONY: demo
demo: deps venv ## watch one guest being migrated
	@$(PYTHON) -m tests.demo

.PHONY: test-fleet
test-fleet: deps venv ## minutes; several hosts with a real Slurm, each in namespaces of its own
	$(call pytest,fleet,-m 'rest or not rest' tests/unit/dispatch tests/integration/dispatch tests/integration/daemon/test_dispatch.py)
	@$(call SAY,fleet)

.PHONY: soak-fleet
soak-fleet: deps venv ## kill, hang and cut off hosts that migrate, 200 times; SOAK="--experiments 20" for fewer
	@$(PYTHON) -m tests.fleet.soak $(SOAK)

.PHONY: soak
soak: deps venv ## break migrations in every way for ten minutes; SOAK="--seconds 7200" for longer
	@$(PYTHON) -m tests.faults $(SOAK)

.PHONY: bench
bench: bench-deps venv ## measure a migration beside virt-v2v
	@$(PYTHON) -m tests.bench

.PHONY: docs
docs: venv ## write the reference pages and the shipped settings again, from the code
	@$(PYTHON) -m tests.reference

.PHONY: preview
preview: deps venv ## draw the dashboards with made-up data, for the documentation
	@$(PYTHON) -m tests.preview

.PHONY: man
man: deps venv ## write the manual pages to build/man
	@$(PYTHON) -m tests.reference --man build/man

.PHONY: clean
clean: ## remove the environment and all that tools left behind; not the guests, which other checkouts use, too
	@rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	@[ ! -d "$(CACHE)" ] || echo "$(CACHE) stays; 'make clean-cache' removes it"

.PHONY: clean-cache
clean-cache: ## remove the guests and systems that the tests keep; they take a quarter of an hour to make
	@rm -rf "$(CACHE)"
