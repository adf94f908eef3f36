# Every target first makes $(VENV) and installs what is missing, then calls one command that also works without make.
# Options: PYTHON=python3.12 picks the interpreter, VENV=path the environment, ARGS="..." goes to the command.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test test-notebooks test-python test-long faults fuzz docs notebook bench soak clean

# two processes share the cores in tests, and a benchmark wants one thread on a busy machine; no test opens a window
test-notebooks test-python test-long faults fuzz bench: export OMP_NUM_THREADS ?= 1
test-notebooks test-python test-long: export MPLBACKEND ?= agg

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1@\2/p' Makefile | awk -F@ '{printf "  %-20s %s\n", $$1, $$2}'

install: $(STAMP)  ## make .venv and install the package with everything for development: pip install -e '.[dev]'
	@echo "Installed in $(VENV); commands are in $(BIN)."

$(STAMP): settings.ini setup.py
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info<(3,11))' 2>/dev/null || { \
	echo "Chroma-MoE needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1 | sed 's/.*not found/not found/')\
	: name another, as in make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $$($(PYTHON) --version)."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing Chroma-MoE and its requirements in $(VENV): some minutes the first time, seconds later."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train, evaluate and use a small model on the built-in corpus: chroma_demo (ARGS="--minutes 1")
	@echo "Running chroma_demo $(ARGS)"
	@$(BIN)/chroma_demo $(ARGS)

test: test-notebooks test-python  ## run every test that needs no GPU and no long run: nbdev_test, pytest

test-notebooks: $(STAMP)
	@echo "Running every notebook as a test: nbdev_test"
	@$(BIN)/nbdev_test --n_workers 2 --do_print --timing

test-python: $(STAMP)
	@echo "Running tests/ in two processes: pytest -n 2 --dist loadfile $(ARGS)"
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-long: $(STAMP)  ## run the slow cells and tests too, and the GPU ones where there is a GPU
	@echo "Running every notebook with its slow cells, then pytest --long"
	@flags="slow$$($(BIN)/python -c 'import torch; print(" gpu"*torch.cuda.is_available())')"; \
	$(BIN)/nbdev_test --n_workers 2 --do_print --flags "$$flags"
	@$(BIN)/python -m pytest --long $(ARGS)

faults: $(STAMP)  ## kill, starve and cut off the commands at random, and see whether they go on (ARGS="--minutes 20"); runs add up in runs/faults
	@echo "Running python -m tests.faults $(ARGS)"
	@$(BIN)/python -m tests.faults $(ARGS)

fuzz: $(STAMP)  ## damage every kind of file that is read, 10,000 times each, and see: tests/fuzz.py (ARGS="--target store")
	@echo "Damaging files: tests/fuzz.py"
	@PYTHONPATH=. $(BIN)/python tests/fuzz.py --cases 10000 $(ARGS)

docs: $(STAMP)  ## build the doc site in _docs/, offline; warnings are errors: nbs/_site/prep.py, sphinx-build
	@echo "Building the site from the notebooks"
	@$(BIN)/python nbs/_site/prep.py
	@$(BIN)/python -m sphinx -q -W --keep-going -j 2 -b html -c nbs/_site doc_src _docs
	@echo "Open _docs/index.html"

notebook: $(STAMP)  ## open the book in JupyterLab
	@echo "Starting JupyterLab on nbs/"
	@$(BIN)/jupyter-lab $(ARGS) nbs

bench: $(STAMP)  ## measure ours against peers and limits, write benchmarks/results.json
	@echo "Running every benchmarks/bench_*.py"
	@$(BIN)/python benchmarks/run.py $(ARGS)

soak: $(STAMP)  ## serve, encode and train for 40 minutes, and see whether anything grows: benchmarks/soak.json
	@echo "Running benchmarks/soak.py $(ARGS)"
	@$(BIN)/python benchmarks/soak.py $(ARGS)

clean:  ## remove what builds and tests made (not .venv, not runs/)
	@echo "Removing the built site and caches"
	@rm -rf _proc _docs doc_src jupyter_execute build dist .pytest_cache .ruff_cache
	@find chroma_moe tests nbs benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
