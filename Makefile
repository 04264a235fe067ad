# Two entry points, `make sweep` and `make test`; both build .venv from the hash-locked requirements first, as `make
# install` does alone.
PYTHON ?= python3.11
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Ray starts many Python processes: without compiled bytecode each one would compile torch and ray again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install sweep test gpu lint lock audit clean

install: $(STAMP)

sweep: $(STAMP)
	$(BIN)/sweep run demo

# Two processes share the tests by file: a third one would fill their waits, but slow both down by more than that.
test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not long" --numprocesses 2 --dist loadgroup --no-loadscope-reorder

# What only a GPU can show: figures, tests and a small sweep, in some minutes.
gpu: $(STAMP)
	$(BIN)/python -m tests.bench.on_gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lock carries names, versions and hashes, no addresses: it installs from whatever index the machine is set up for.
lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet --output-file requirements.lock

# Known vulnerabilities of what is locked; asks a public database.
audit: $(STAMP)
	$(BIN)/uv tool run pip-audit --strict --requirement requirements.lock --no-deps --disable-pip

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --require-hashes --compile-bytecode -r requirements.lock
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
