# make run    the main job, with its report         make test       the tests (under 10 minutes)
# make report the HTML report of what is there      make test-all   the slow tests too
# make check  format, lint, types                   make docs       the references of config and columns

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.PHONY: run report test test-all check docs install

PYTHON ?= python3
RESULTS := results
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Settings of another project must not leak in.
unexport PYTHONPATH PYTHONHOME

run: install
	@mkdir -p $(RESULTS)
	# One run at a time: Snakemake holds this lock while it lives, even when only make was killed.
	exec 9> $(RESULTS)/.lock
	flock -n 9 || { echo "Another run is still at work in $(RESULTS); waiting for it to end."; flock 9; }
	if [ -n "$$(ls -A .snakemake/locks 2> /dev/null)" ]; then
	    echo "Unlocking after a run that was killed."
	    snakemake --unlock
	fi
	snakemake $(ARGS)
	if [ ! -e $(RESULTS)/report.html ] || [ -n "$$(find $(RESULTS)/surrogates $(RESULTS)/figures -newer $(RESULTS)/report.html -print -quit)" ]; then
	    snakemake --report $(RESULTS)/report.html
	fi
	echo "Dataset: $(RESULTS)/dataset   Leaderboards: $(RESULTS)/surrogates/*/leaderboard.csv   Report: $(RESULTS)/report.html"

report: install
	@snakemake --report $(RESULTS)/report.html

# Two files of tests at a time: most of their time is starts of Python.
test: install
	@python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: install
	@python -m pytest $(ARGS)

check: install
	@ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	mypy
	snakemake --lint

docs: install
	@PYTHONPATH=workflow python -m kappaflow.docs

install: .venv/.complete

# Installed once and reused; a changed lock installs what changed.
.venv/.complete: envs/requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "kappaflow needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	echo "Installing the environment into .venv (a few minutes, once)."
	$(PYTHON) -m venv .venv || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r envs/requirements.lock
	touch $@
