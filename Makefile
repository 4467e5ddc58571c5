# make demo    index the demo document, ask three questions, print the table
# make test    lint, types, docs, package and every test, in WORKERS processes
# make lint    style, spelling and the import contract
# make types   types, of the rooms that pyproject.toml lists
# make docs    the site, into build/site; a broken link, or one that needs the network, fails
# make package sdist and wheel into dist, and the wheel tried in an environment of its own
# make vllm    the tests that run vLLM, in an environment of their own; skipped without its wheel
# make clients LangChain's and LlamaIndex's clients against the server, from an environment of their own
# make oldest  tests with the lowest supported releases, or TESTS="tests/hf ..." of them
# make newest  tests with the highest
# make format  put the style right
# All create the virtual environment in .venv first; remove that directory to start over.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
INSTALLED := $(VENV)/.installed
EMPTY := build/empty
TESTS ?= tests

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types docs package vllm clients oldest newest format clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/squeezed demo

test: $(INSTALLED) lint types docs package
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: $(INSTALLED)
	rm -rf dist $(EMPTY)
	$(BIN)/python -m build --outdir dist . >/dev/null
	$(PYTHON) -m venv $(EMPTY)
	$(EMPTY)/bin/python -m pip install --quiet --constraint constraints.txt torch dist/*.whl
	HF_HUB_OFFLINE=1 $(EMPTY)/bin/python -I tests/packaged.py
	rm -rf $(EMPTY)

vllm: $(INSTALLED)
	PYTHON=$(PYTHON) timeout --kill-after=30 720 sh tests/inside_vllm/run.sh $(VENV)-vllm

clients: $(INSTALLED)
	test -x build/clients/bin/python || $(PYTHON) -m venv build/clients
	build/clients/bin/python -m pip install --quiet --requirement constraints-clients.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/server/test_server_clients.py

oldest newest:
	test -x build/$@/bin/python || $(PYTHON) -m venv build/$@
	build/$@/bin/python -m pip install --quiet --constraint constraints-$@.txt torch
	build/$@/bin/python -m pip install --quiet --constraint constraints-$@.txt --editable ".[dev,eval,server]"
	OMP_NUM_THREADS=1 build/$@/bin/python -m pytest -q -n $(WORKERS) --dist loadfile $(TESTS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name another with make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24,<27"
	$(BIN)/python -m pip install --constraint constraints.txt torch
	@# a CUDA build of torch brought its own Triton; for a CPU build the tests' interpreter needs one
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install "triton==3.6.0"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev,eval,server]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm build dist *.egg-info .pytest_cache .ruff_cache
