# make demo | test | lint | docs | dist | bench | bench-gpu: each sets itself up on a fresh machine, in its own virtual environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An installed torch_tpu must not look for a TPU where there is none.
export TPU_SKIP_MDS_QUERY ?= 1
export TORCH_DEVICE_BACKEND_AUTOLOAD ?= 0

.PHONY: demo test test-slow lint format docs dist bench bench-gpu clean

INSTALL := $(BIN)/python -m pip install --quiet --no-compile --upgrade-strategy only-if-needed --editable

# Byte code is written when a module is first used (--no-compile): most of what is installed never is. An environment
# that forbids it would compile PyTorch anew in each process, for 15 seconds.
unexport PYTHONDONTWRITEBYTECODE
$(VENV)/package: pyproject.toml
	@echo "Installing PyTorch and the package into $(VENV): a few GB, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

# The Keras engine and TorchTPU are tested too where their wheels are for.
ifeq ($(shell uname -sm),Linux x86_64)
DEV := dev,keras,tpu
else
DEV := dev
endif

# In one call, since each call of pip takes half a minute to see what is there.
$(VENV)/ready: pyproject.toml
	@echo "Installing the package, and what tests and checks need, into $(VENV): a few GB, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[$(DEV)]'
	touch $(VENV)/package $@

demo: $(VENV)/package
	$(BIN)/simmim pretrain --recipe demo --out runs/demo
	$(BIN)/simmim reconstruct runs/demo demo --out runs/demo/reconstruction.png
	@echo "Look at runs/demo/report.html and runs/demo/reconstruction.png"

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/vulture

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/docs: $(VENV)/package
	@echo "Installing what the docs site needs into $(VENV)"
	$(INSTALL) '.[docs]'
	touch $@

# site/index.html; to read it: python -m http.server -d site
docs: $(VENV)/docs
	$(BIN)/python tools/docs_site.py build/docs
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict
	@echo "Read the docs: $(BIN)/python -m http.server -d site"

$(VENV)/release: $(VENV)/package
	$(INSTALL) '.[release]'
	touch $@

dist: $(VENV)/release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

bench: $(VENV)/ready
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/input_vs_peers.py
	$(BIN)/python benchmarks/step_vs_peers.py
	$(BIN)/python benchmarks/savings.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/chart.py

# On a machine with an NVIDIA GPU whose python3 has torch, timm and transformers; needs no network.
bench-gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
