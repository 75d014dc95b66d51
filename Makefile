# make quickstart: environment, training, samples and a table on the embedded digits. make test: the CPU test suite.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: quickstart test test-slow lint
.DELETE_ON_ERROR:

quickstart: .venv/installed
	$(BIN)/python -m scripts.quickstart

test: .venv/installed lint
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m "slow or not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The stamp is newer than the requirements only when the installation went through.
.venv/installed: requirements.txt requirements-latent.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-latent.txt
	touch $@
