# Every target sets itself up: on a fresh Debian 12 with python3, python3-venv and make, `make demo` and
# `make test` need nothing before them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c

BIN := .venv/bin
ARGS ?=
VERSION ?= $(shell sed -n 's/^VERSION = "\(.*\)"/\1/p' node/src/instar/version.py)
CODE := node/src server/src lab/src bench modules tests
PYTEST := $(BIN)/pytest

.PHONY: help setup demo test check test-all test-os test-os-all soak bench lint types imports format lock dist deb modules clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: ## Make .venv with the locked packages (done by every other target when needed)
	@tools/setup.sh

demo: setup ## Real server, real agents, seven releases, five of them bad, jobs, restarts; ARGS="--nodes 5 --report FILE"
	@$(BIN)/instar-lab demo $(ARGS)

test: lint types imports check ## All quick checks: ruff, mypy, import rules, pytest

check: setup ## Only pytest, without slow, soak and os tests; ARGS="-k name"
	@$(PYTEST) -m "not slow and not soak and not os" $(ARGS)

test-all: lint types imports ## Like test, with the slow tests
	@$(PYTEST) -m "not soak and not os" $(ARGS)

# The short run of `make test` is left out: test_all_the_way.py does the same and more.
test-os: setup ## Tests that need root, systemd containers or virtual machines (a quarter of an hour)
	@INSTAR_OS_REQUIRED=1 $(PYTEST) -m "not soak and not slow" --deselect tests/os/vm/test_updates.py tests/os $(ARGS)

test-os-all: setup ## The same with the slow ones: broken systems of every kind, bits that flip later, what is swept
	@INSTAR_OS_REQUIRED=1 $(PYTEST) -m "not soak" tests/os $(ARGS)

soak: setup ## Tests that run for a long time
	@$(PYTEST) -n 0 -m soak $(ARGS)

bench: setup ## Measure, print a table and write docs/performance.md
	@$(BIN)/python -m bench $(ARGS)

lint: setup ## ruff: rules and format
	@$(BIN)/ruff check --quiet $(CODE)
	$(BIN)/ruff format --quiet --check $(CODE) || { echo "make lint: run 'make format'" >&2; exit 1; }

types: setup ## mypy --strict over everything shipped
	@$(BIN)/mypy

imports: setup ## The import rules of the design
	@$(BIN)/lint-imports

format: setup ## Write the code in the one format
	@$(BIN)/ruff check --quiet --fix $(CODE) || true
	$(BIN)/ruff format --quiet $(CODE)

lock: ## Write requirements/*.txt anew (needs uv); ARGS=--upgrade for newer versions
	@tools/lock.sh $(ARGS)

dist: setup ## Build dist/instar.pyz; VERSION=1.2.3 for another version than the source says
	@mkdir -p dist
	$(BIN)/python -m instar_lab.program.build --version $(VERSION) --out dist/instar.pyz

deb: setup ## Build Debian packages of node and server in dist; VERSION=1.2.3, ARGS="--only node"
	@$(BIN)/python -m instar_lab.deb --version $(VERSION) --out dist $(ARGS)

modules: setup ## Build and pack our modules into dist/modules; ARGS=--skip-missing without compilers
	@$(BIN)/instar-lab modules modules/* --out dist/modules $(ARGS)

clean: ## Remove everything that was made here
	@rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
