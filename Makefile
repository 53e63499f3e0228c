# Every target makes its own virtual environment in .venv when there is none; nothing else is set up.
#
#   make demo [CHECKPOINT=dir]    make test [ARGS="-k fuse"]    make bench [BENCH=name]
#
# PYTHON names the interpreter that .venv is made from; JOBS is the number of test processes.

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench clean distclean

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS  ?= auto

# The first of these that runs and is new enough, unless PYTHON says which.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv and install the package with its tested dependencies

demo: $(STAMP) ## compile a small policy and act; CHECKPOINT=dir does the same with a real one
	$(BIN)/python -m cortexflow.demo $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(ARGS)

test: $(STAMP) ## run the tests; those that need a GPU are skipped where there is none
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

lint: $(STAMP) ## ruff's rules, ruff's format, mypy
	@status=0; for check in "ruff check ." "ruff format --check ." mypy; do \
		echo "== $$check"; $(BIN)/$$check || status=1; \
	done; exit $$status

bench: $(STAMP) ## run every measurement in benchmarks/ (helpers begin with _), or one with BENCH=name
	@set -e; for file in $(if $(BENCH),benchmarks/$(BENCH).py,benchmarks/[a-z]*.py); do \
		name=$$(basename "$$file" .py); \
		test -f "$$file" || { echo "no measurement is named $$name (looked for $$file)" >&2; exit 1; }; \
		echo "== $$name"; \
		$(BIN)/python -m "benchmarks.$$name" $(ARGS); \
	done

clean: ## remove caches, builds, dumps and the demo's output
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output demo_output dumps
	find cortexflow tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf $(VENV)

# A second run repairs what an interrupted one left: the environment is remade unless its pip answers.
$(STAMP): pyproject.toml constraints.txt
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
		echo "CortexFlow needs Python 3.11 or newer, and no python3 here is. Install one, or name it:" >&2; \
		echo "    make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "CortexFlow needs Python 3.11 or newer; PYTHON=$$python is $$("$$python" -V 2>&1)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "Making $(VENV) with $$("$$python" -V)"; \
		"$$python" -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "Installing cortexflow-vla and its dependencies into $(VENV) (once; some of them are large)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	@touch $@
