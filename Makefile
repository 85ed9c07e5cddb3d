# A reader needs only two commands: `make run` and `make test`.
# Both need Python 3.11 or newer and make; the first one to run builds .venv, the others reuse it.

PYTHON    ?= python3
ARGS      ?=
WORKERS   ?= 2
NOTEBOOKS ?=
VENV      := .venv
PY        := $(VENV)/bin/python
READY     := $(VENV)/.ready

# One thread per process: the tests run in parallel, and stored outputs must not depend on the core count.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help run test test-all lab again notebooks export readme bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

run: $(READY)  ## Train the tiny model; another preset: make run ARGS="--preset loop3 --scale mini"
	$(PY) -m golf_nb.train $(ARGS)

test: $(READY)  ## Run every notebook and a test of each kind; a selection: make test ARGS="-k schedule"
	$(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) --dist=worksteal $(ARGS)

test-all: $(READY)  ## Run the long proofs too: every recipe killed and resumed, every experiment at toy size
	$(ONE_THREAD) $(PY) -m pytest --all -n $(WORKERS) --dist=worksteal $(ARGS)

lab: $(READY)  ## Open the notebooks in JupyterLab; what you change there: make export
	$(VENV)/bin/jupyter lab nbs

again: $(READY)  ## Rerun an experiment and its page: make again PAGE=e01; a toy version in seconds: ARGS=--toy
	$(if $(PAGE),,$(error name a page: make again PAGE=e01))
	$(PY) -m golf_nb.study.grid nbs/experiments/$(PAGE).json --again $(ARGS)
	$(if $(findstring --toy,$(ARGS)),,$(PY) -m golf_nb.study.findings && $(ONE_THREAD) $(PY) -m golf_nb.authoring.book run nbs/experiments/$(PAGE)_*.ipynb)

notebooks: export  ## Run the notebooks and store their outputs; a selection: NOTEBOOKS="nbs/00_schedule.ipynb"
	$(ONE_THREAD) $(PY) -m golf_nb.authoring.book run $(NOTEBOOKS)

export: $(READY)  ## Write golf_nb/ from the notebooks, and clean the notebooks
	$(PY) -m golf_nb.authoring.book export

readme: $(READY)  ## Write README.md from nbs/index.ipynb
	$(PY) -m golf_nb.authoring.book readme

bench: $(READY)  ## Measure speed, each number with a baseline
	$(PY) bench/table.py $(ARGS)

clean:  ## Remove .venv and everything left by a run, a build, or a test, except runs/
	rm -rf $(VENV) build dist _proc _docs *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@command -v $(PYTHON) > /dev/null || { \
	  echo "golf_nb needs Python 3.11 or newer, and there is no '$(PYTHON)' here: name yours with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("golf_nb needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name another with make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The stamp is written last, so an interrupted install is resumed.
$(READY): requirements.txt setup.py settings.ini | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
