# Every target sets itself up: .venv is made once, from pyproject.toml and constraints.txt, and a stamp remembers it.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo fsdd fsdd-talker test test-slow check format docs gpu-wheels clean
.DEFAULT_GOAL := setup

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	@echo "setting up .venv (two minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": set PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv || (echo "python3-venv is missing: apt-get install python3-venv" && exit 1)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed,demo,docs,hf,megatron,serve,tensorboard,wandb,dev]'
	@touch $@

demo: .venv/.stamp  ## a tiny omni model learns to hear, see, answer and speak, in 20 minutes
	@$(BIN)/python -m launch.tour

FSDD ?= ../shared/data/fsdd_dev.tar
fsdd: .venv/.stamp  ## real recordings: three speakers train, a fourth is never heard
	@$(BIN)/python -m launch.fsdd $(FSDD)

fsdd-talker: .venv/.stamp  ## the same recordings: a Talker says digits in three voices, and that recogniser checks it
	@$(BIN)/python -m launch.fsdd_talker $(FSDD)

test: .venv/.stamp
	@$(BIN)/python -m pytest -q -m "not slow and not gpu" --numprocesses 2 --dist loadfile --durations 40

test-slow: .venv/.stamp
	@$(BIN)/python -m pytest -q -m "slow and not gpu" --numprocesses 2 --dist loadfile

check: .venv/.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: .venv/.stamp
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: .venv/.stamp  ## the documentation site, in site/; a wrong link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --clean

GPU_PYTHON ?= 3.12
gpu-wheels: .venv/.stamp  ## wheels/ for bench/gpu/run.sh on a machine without a network; its Python is GPU_PYTHON
	@$(BIN)/python -m bench.gpu.wheels --python $(GPU_PYTHON)

clean:
	rm -rf .venv build dist outputs site
