# make demo   install into .venv and train, attack and plot a small robust mixture of experts (minutes, no GPU needed)
# make test   install into .venv and run the whole test suite
# make sanitize  build the native code with the address, undefined and thread sanitizers; its tests and the fuzzer with each
# make fuzz      random calls of the native ops beside the reference; SEED=0 SECONDS=60
# make docs   the documentation site, written to build/site
# make bench  the benchmarks, written to benchmarks/results
# make lint   ruff, mypy and clang-format, as CI runs them

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# A file's tests stay in one worker, which computes what they share once; tests/conftest.py says which files begin.
WORKERS ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
SEED ?= 0
SECONDS ?= 60
SOURCES := $(shell find csrc -type f)
CPP := $(shell find csrc tests/helpers/amx_emulation tests/helpers/cuda_emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test sanitize fuzz docs bench lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/robust-moe demo

test: $(VENV)/.installed
	$(RUN) -m pytest $(WORKERS)

sanitize: $(VENV)/.installed
	$(RUN) tests/sanitize --seed $(SEED) --seconds $(SECONDS)

fuzz: $(VENV)/.installed
	$(RUN) tests/fuzz --seed $(SEED) --seconds $(SECONDS)

docs: $(VENV)/.installed
	$(RUN) -m mkdocs build --strict

bench: $(VENV)/.installed
	$(RUN) -m benchmarks --out benchmarks/results

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Installed in place, so that Python edits need no new installation; C++ edits do.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml setup.py $(SOURCES)
	$(RUN) -m pip install --editable ".[train,test,dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info robust_moe_kernels/_C*.so
