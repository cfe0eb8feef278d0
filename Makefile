# The two commands of a fresh machine are `make demo` and `make test`; both install what they need.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ALPHA ?= 0.5
DELTA ?=
PORT ?= 8000
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup demo models serve test test-fast test-kube tools image bench lint chart-docs lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: .venv/.ready ## the locked CPU environment, in .venv

# torch's CPU build comes from a wheel folder that pip knows of, else from PyTorch's own index.
# --no-deps: the locks are complete, and what they leave out must stay out (requirements/overrides.txt). torchvision
# lies apart: tests/conformance needs its Python part, and nothing else may find it.
.venv/.ready: pyproject.toml requirements/cpu.txt requirements/dev.txt requirements/vision.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Python 3.11 is needed (the locked wheels are for it); found: $(PYTHON)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) '$(TORCH)' 2>/dev/null || $(PIP) --index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) --require-hashes -r requirements/cpu.txt
	$(PIP) --require-hashes -r requirements/dev.txt
	$(PIP) --require-hashes --upgrade --target .venv/vision -r requirements/vision.txt
	$(PIP) --no-build-isolation -e .
	@touch $@

models: setup ## the demo's two models, made once in .demo
	$(BIN)/python deploy/demo/prepare.py --out .demo

demo: models ## serve a real pair, ask it, show answers and metrics (ALPHA=0.5; DELTA=lora or packed: base plus a delta)
	$(BIN)/python deploy/demo/demo.py --models .demo --alpha $(ALPHA) --delta "$(DELTA)"

serve: models ## the demo's server, left running (ALPHA=0.5 PORT=8000)
	exec $(BIN)/expo-serve --base .demo/base --aligned .demo/aligned --alpha $(ALPHA) --port $(PORT) --max-model-len 2048

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the chart is tested with (helm, checkov, promtool, ...), apart from the environment, in .deploy.
tools: setup
	@$(BIN)/python -m tests.deploy.install

test: lint models tools ## everything but test-kube: lint, fast tests, tests with real engines
	$(BIN)/python -m pytest
	@echo "Left out: make test-kube, which builds the image and runs it with podman, as root."

test-fast: setup tools ## the tests that start no engine
	$(BIN)/python -m pytest -m 'not engine'

test-kube: models tools ## the image, and the chart's pods run from it by podman; as root (some four minutes)
	$(BIN)/python -m pytest -m kube tests/deploy/kube -v --durations=5

image: ## the container image, by podman or docker (deploy/docker/README.md)
	deploy/docker/build.sh

# What the load tests need beyond the environment: the plot, and peers of the loader.
.venv/.bench-ready: .venv/.ready requirements/bench.txt
	$(PIP) --require-hashes -r requirements/bench.txt
	@touch $@

bench: models .venv/.bench-ready ## measure everything against its bars, about an hour (BENCH=--quick: ten minutes)
	$(BIN)/python -m loadtests.bench $(BENCH)

chart-docs: setup ## the table of values in the chart's README, from values.yaml
	$(BIN)/python deploy/helm/readme.py

lock: ## make the locks anew from requirements/*.in
	requirements/lock.sh

clean: ## remove the environment, the demo's models and what benchmarks left
	rm -rf .venv .demo .bench .deploy deploy/docker/wheels/*.whl deploy/docker/wheels/.stamp
