# Each target works alone from a bare clone; `make help` lists them.
VENV ?= .venv
PYTHON ?=
TORCH_INDEX ?=
DEMO ?= demo
SYNTH ?= --rows 400000 --users 5000 --items 2000 --scenarios 4 --files 16 --seed 1
UV ?= uv
# Processes that run tests side by side, each whole files.
TESTERS ?= 2
export VENV PYTHON TORCH_INDEX

BIN := $(VENV)/bin

.PHONY: help install install-dev demo census test tests chaos lint type lock clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

install:  ## .venv with mtlrec for CPU: PYTHON=... TORCH_INDEX=... VENV=...
	@.ci/install cpu

install-dev:
	@.ci/install dev

demo: $(DEMO)/data/job.yaml  ## synthetic data, two workers, metrics, a checkpoint
	$(BIN)/mtlrec train $<

# The job is written last: where it is, the data are complete.
$(DEMO)/data/job.yaml: | install
	rm -rf $(@D)
	$(BIN)/mtlrec synth $(@D) $(SYNTH)

census: | install  ## the census-income data: DATA=folder with its files
	@test -n "$(DATA)" || { echo "make census: say where the census files are: make census DATA=folder" >&2; exit 2; }
	$(BIN)/mtlrec prepare census "$(DATA)" $(DEMO)/census
	$(BIN)/mtlrec train $(DEMO)/census/job.yaml

# Types are checked beside the first tests: mypy has one thread, and some tests wait more than they compute.
test: lint  ## everything that must hold before a change is taken
	@$(MAKE) --no-print-directory --jobs 2 type tests

# Compiled once, also where Python is told not to keep what it compiled: hundreds of processes import it.
tests: install-dev
	@$(BIN)/python -m compileall -q mtlrec tests benchmarks
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder

chaos: install-dev  ## kills workers, drivers and nodes of a run: KILLS=20 SEED=0
	$(BIN)/python -m tests.chaos --kills $(or $(KILLS),20) --seed $(or $(SEED),0)

lint: install-dev  ## style and likely mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: install-dev  ## types
	$(BIN)/python -m mypy

# torchrec and the CPU build of torch are named here, as no extra may ask for them (docs/install.md).
# Pins stay as they are while they fit; `make lock UPGRADE=--upgrade` takes the newest.
COMPILE = printf '%s\n' torch==2.13.0+cpu torchrec==1.8.0 setuptools | $(UV) pip compile pyproject.toml - \
	--quiet --no-emit-package mtlrec --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--custom-compile-command "make lock" $(foreach links,$(PIP_FIND_LINKS),--find-links $(links)) \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match) $(UPGRADE)
lock:  ## requirements-cpu.txt and requirements-dev.txt from pyproject.toml, with uv
	$(COMPILE) --extra cpu --extra dev --output-file requirements-dev.txt >/dev/null
	$(COMPILE) --extra cpu --constraints requirements-dev.txt --output-file requirements-cpu.txt >/dev/null

clean:  ## removes .venv, the demo and what tools left; runs/ stays
	rm -rf $(VENV) $(DEMO) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find mtlrec tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
