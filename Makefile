# make demo   quantize and run the shipped language model, compare, draw a picture
# make test   lint, types, all tests
# make versions TORCH=2.11.0 TRANSFORMERS=5.17.0 [TESTS=tests/test_weights.py]   tests under other versions, in an environment of their own (several GB: that torch may bring CUDA with it)
# Each makes its own environment in .venv; what is needed before is Python 3.11 or newer and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
TORCH ?= 2.11.0
TRANSFORMERS ?= 5.17.0
TESTS ?= tests

.PHONY: demo test lint types unit bench env versions clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

# types and tests side by side: mypy alone would leave a core idle for a minute
test: lint
	$(MAKE) -j2 types unit

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	PYTHON=$(CURDIR)/$(BIN)/python sh .ci/mypy.sh

# one thread for each worker: two workers on two cores would otherwise wait for each other
unit: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup --durations=15

versions:
	test -x .venv-$(TORCH)/bin/python || $(PYTHON) -m venv .venv-$(TORCH)
	.venv-$(TORCH)/bin/python -m pip install -q --disable-pip-version-check 'setuptools>=77' torch==$(TORCH)
	.venv-$(TORCH)/bin/python -m pip install -q --disable-pip-version-check -e '.[demo,dev]' torch==$(TORCH) transformers==$(TRANSFORMERS) 'pytest<9.1'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= .venv-$(TORCH)/bin/python -m pytest -q -n $(JOBS) --dist loadgroup $(TESTS)

bench: $(READY)
	$(BIN)/python benchmarks/run.py cpu

env: $(READY)

# torch first and by its version: an unpinned torch may bring gigabytes of CUDA with it
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qcompile needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-* build out *.egg-info
