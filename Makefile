# The two commands of a fresh machine are `make demo` and `make test`; both install what they need.
SHELL := /bin/bash
# The first that runs: a version manager leaves commands of versions that are not switched on.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
  $$python -c '' 2>/dev/null && { echo $$python; break; }; done)
PYTHONS := 3.11 3.12 3.13
version = $(shell $(or $1,false) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ALPHA ?= 0.5
DELTA ?=
PORT ?= 8000
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
TORCH := $(shell sed '/^\#/d' requirements/torch.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup demo models serve sweep test test-all test-fast test-pythons test-kube tools image bench lint docs chart-docs lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: .venv/.ready ## the locked CPU environment, in .venv

# torch's CPU build comes from a wheel folder that pip knows of, else from PyTorch's own index.
# --no-deps: the locks are complete, and what they leave out must stay out (requirements/overrides.txt). torchvision,
# stores and lm-eval lie apart: tests need parts of them, and nothing else may find them.
.venv/.ready: pyproject.toml requirements/torch.txt requirements/cpu.txt requirements/dev.txt requirements/vision.txt requirements/stores.txt requirements/lm-eval.txt
	$(if $(filter $(PYTHONS),$(call version,$(PYTHON))),,$(error One of Python $(PYTHONS) is needed; PYTHON is "$(PYTHON)", $(or $(call version,$(PYTHON)),which does not run)))
	@[ "$(call version,.venv/bin/python)" = "$(call version,$(PYTHON))" ] || rm -rf .venv
	$(PYTHON) -m venv .venv
	@$(PIP) '$(TORCH)' 2>.venv/torch.log || \
	  $(PIP) --retries 1 --index-url $(TORCH_INDEX) '$(TORCH)' 2>>.venv/torch.log || { \
	  echo "No $(TORCH) for $$($(PYTHON) --version): neither pip's own indexes and wheel folders nor $(TORCH_INDEX)" \
	    "have it (pip's messages: .venv/torch.log). Set PYTHON to another of $(PYTHONS), or PIP_FIND_LINKS to a folder" \
	    "with the wheel." >&2; exit 1; }
	$(PIP) --require-hashes -r requirements/cpu.txt
	$(PIP) --require-hashes -r requirements/dev.txt
	$(PIP) --require-hashes --upgrade --target .venv/vision -r requirements/vision.txt
	$(PIP) --require-hashes --upgrade --target .venv/stores -r requirements/stores.txt
	$(PIP) --require-hashes --upgrade --no-build-isolation --target .venv/lm-eval -r requirements/lm-eval.txt
	$(PIP) --no-build-isolation -e .
	@touch $@

models: setup ## the demo's two models, made once in .demo
	$(BIN)/python deploy/demo/prepare.py --out .demo

demo: models ## serve a real pair, ask it, show answers and metrics (ALPHA=0.5; DELTA=lora or packed: base plus a delta)
	$(BIN)/python deploy/demo/demo.py --models .demo --alpha $(ALPHA) --delta "$(DELTA)"

sweep: models ## which alpha? The demo's pair, its list reward, eight alphas (some ten minutes; into .demo/sweep)
	cd deploy/demo && exec ../../$(BIN)/expo-serve sweep --base ../../.demo/base --aligned ../../.demo/aligned \
	  --prompts questions.jsonl --reward python:list_reward:reward --alphas 0,0.1,0.3,0.5,0.75,1,1.5,2 \
	  --max-model-len 1024 --out ../../.demo/sweep

serve: models ## the demo's server, left running (ALPHA=0.5 PORT=8000)
	exec $(BIN)/expo-serve --base .demo/base --aligned .demo/aligned --alpha $(ALPHA) --port $(PORT) --max-model-len 2048

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup ## the site of docs/, into .site, with every link and anchor checked
	$(BIN)/mkdocs build --strict

# torch's CPU build may be there for one Python only, so the others run what needs no torch.
test-pythons: setup ## ruff, mypy and the tests without torch under the other Pythons of this machine
	$(BIN)/python -m tests.pythons

# What the chart is tested with (helm, checkov, promtool, ...), apart from the environment, in .deploy; and a browser for
# the report of a sweep, in .browser.
tools: setup
	@$(BIN)/python -m tests.deploy.install
	@$(BIN)/python -m tests.sweep.install

# In two processes; an engine takes both cores by itself, and binds its threads to them.
WITHOUT_ENGINES := $(BIN)/python -m pytest -m 'not engine and not slow' -n 2 --dist loadfile

test: lint docs models tools ## lint, types, docs, all fast tests, and the engine tests that give the most (some 11 minutes once installed)
	$(WITHOUT_ENGINES)
	$(BIN)/python -m pytest -m 'engine and not slow'
	@echo "Left out: slow tests (make test-all), other Pythons (make test-pythons), the image and its pods (make test-kube)."

test-all: lint docs models tools test-pythons ## the slow tests too: every family, every combination (an hour)
	$(WITHOUT_ENGINES)
	$(BIN)/python -m pytest -m 'engine or slow'

test-fast: setup tools ## the tests that start no engine
	$(WITHOUT_ENGINES)

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

lock: ## make the locks anew from requirements/*.in and pyproject.toml, for every supported Python
	$(PYTHON) requirements/lock.py

clean: ## remove the environment, the demo's models and what benchmarks left
	rm -rf .venv .pythons .demo .bench .kit .deploy .browser .site build dist deploy/docker/wheels/*.whl deploy/docker/wheels/.stamp
