# One word for each thing one does here. `make demo` and `make test` need nothing but make and Python 3.11 or later.

PYTHON ?= python3
# More arguments for pytest, for instance PYTEST="-k compiled -x", and how many processes share the tests.
PYTEST ?=
WORKERS ?= 2
# Folder of GPU results, one stage of them (all when empty), DRY=1 for tiny sizes on any machine, seconds for each stage.
OUT ?= out/gpu
STAGE ?=
DRY ?=
BUDGET_S ?=
# How many damaged files `make fuzz` tries, and the number that decides which.
N ?= 4000
SEED ?= 0

BIN := .venv/bin
WHEEL := out/wheel
# The root is the package, so checkers and GPU machines find `moeplan` through a link that points back to it.
LINKED := PYTHONPATH=.typing

.DEFAULT_GOAL := help
.PHONY: help demo test long lowest servers fuzz guard baseline check lint types floors wheel bench gpu clean

help:
	@echo "make demo    answer a question, measure this CPU, plan, run the plan: pages in out/demo"
	@echo "make test    run the tests"
	@echo "make check   lint, types, floors, and a part of the tests against the built wheel"
	@echo "make long    run the tests with their slow parts and new random cases"
	@echo "make servers run the tests that start a Ray cluster, a Dask cluster, a PostgreSQL server"
	@echo "make lowest  run a part of the tests with the lowest versions that are promised"
	@echo "make fuzz    damage files of every kind that is read, and see what commands say: N=4000 files, SEED=0"
	@echo "make guard   predict tests/baselines/default.json again, and fail where a figure moved"
	@echo "make baseline write tests/baselines/default.json anew, and list which figures moved"
	@echo "make bench   measure the speed of the simulators"
	@echo "make gpu     measure a GPU: OUT=folder [STAGE=n] [DRY=1]"
	@echo "make clean   remove what make made, the environment included"

# --- environments ----------------------------------------------------------------------------------------------------

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "moeplan needs Python 3.11 or later; name one with PYTHON=…")'
	$(PYTHON) -m venv .venv

# What using moeplan takes.
.venv/.user: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

# What running plans takes besides.
.venv/.runner: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[run]'
	@touch $@ .venv/.user

# What working on it takes.
.venv/.developer: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,run,hf,studies]'
	@touch $@ .venv/.user .venv/.runner

.typing/moeplan:
	@mkdir -p .typing
	@ln -sfn .. $@

# --- use -------------------------------------------------------------------------------------------------------------

demo: .venv/.runner
	$(BIN)/moeplan demo --output out/demo

bench: .venv/.developer
	$(BIN)/python -m benchmarks.engine

# A GPU machine's own Python, with torch, triton and numpy, runs what lies here and nothing is installed; a Python without
# torch (a dry run elsewhere) gives way to the developer's environment.
gpu: .typing/moeplan
	@$(PYTHON) -c 'import torch' 2> /dev/null || $(MAKE) --no-print-directory .venv/.developer
	@python="$(PYTHON)"; "$$python" -c 'import torch' 2> /dev/null || python="$(BIN)/python"; \
	$(LINKED):$$PYTHONPATH "$$python" -m benchmarks.gpu --out $(OUT) $(if $(STAGE),--stage $(STAGE)) $(if $(DRY),--dry) $(if $(BUDGET_S),--budget-s $(BUDGET_S))

# --- tests and checks ------------------------------------------------------------------------------------------------

# Each process gets a row of neighbouring tests, which share their modules' fixtures, and takes from the other's row at the end.
test: .venv/.developer
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

# Half an hour of whole GPU dry runs, papers and interpreted kernels, and properties on cases drawn anew.
long: .venv/.developer
	MOEPLAN_LONG=1 $(BIN)/python -m pytest $(PYTEST)

# Studies on real clusters and in a real database, each started for its test: where one is not installed, its tests are skipped.
SERVER_TESTS := $(addprefix tests/studies/,test_cluster.py test_postgresql.py test_faults.py)
servers: .venv/.developer
	MOEPLAN_LONG=1 $(BIN)/python -m pytest $(SERVER_TESTS) $(PYTEST)

# One test of each thing that a dependency does here: files, arrays, compiled code, SimPy, commands, pages.
LOWEST := out/lowest
LOWEST_TESTS := $(addprefix tests/,specs/test_files.py traces/test_format.py sim/offload/test_rules.py reports/test_perfetto.py)
lowest: .typing/moeplan
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --requirement constraints-lowest.txt
	$(LINKED) $(LOWEST)/bin/python -m pytest -q -p no:cacheprovider $(LOWEST_TESTS) $(PYTEST)

fuzz: .venv/.developer .typing/moeplan
	$(LINKED) $(BIN)/python tests/fuzz --count $(N) --seed $(SEED) --keep out/fuzz

# The project's own predictions, of every paper, public report and stored validation.
guard: .venv/.developer .typing/moeplan
	$(LINKED) $(BIN)/python -m moeplan check --baseline tests/baselines/default.json --strict

baseline: .venv/.developer
	$(BIN)/python -m benchmarks.baseline --write

check: lint types floors wheel

lint: .venv/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.developer .typing/moeplan
	MYPYPATH=.typing $(BIN)/mypy -p moeplan

floors: .venv/.developer .typing/moeplan
	$(LINKED) $(BIN)/lint-imports --no-cache

# What shows that a wheel is whole: its files and imports, its data, its command line. The rest of the suite runs once, in `make test`.
SMOKE := $(addprefix tests/,house/test_packaging.py house/test_imports.py specs/test_files.py traces/test_format.py commands/test_cli.py)

# Builds the source distribution, from it the wheel, and runs a part of the source distribution's tests on the installed wheel.
wheel: .venv/.developer
	rm -rf $(WHEEL) moeplan.egg-info/SOURCES.txt
	mkdir -p $(WHEEL)/source
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --outdir $(WHEEL)/dist . > $(WHEEL)/build.log || { cat $(WHEEL)/build.log; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --target $(WHEEL)/site $(WHEEL)/dist/*.whl
	tar -xzf $(WHEEL)/dist/*.tar.gz --strip-components=1 -C $(WHEEL)/source
	cd $(WHEEL)/source && PYTHONPATH="$(CURDIR)/$(WHEEL)/site" MOEPLAN_TESTED_AT="$(CURDIR)/$(WHEEL)/site" ../../../$(BIN)/python -m pytest $(SMOKE) $(PYTEST)

clean:
	rm -rf .venv .typing .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -rf build dist moeplan.egg-info out/demo out/wheel
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
