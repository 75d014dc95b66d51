# make quickstart: environment, training, samples and a table on the embedded digits. make gallery: the figures of
# docs/gallery.md. make report: a page about the quickstart's run. make fault-injection: six scripts killed a hundred times
# each. make test: ruff, mypy and the fast CPU tests.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: quickstart gallery report test test-slow fault-injection lint
.DELETE_ON_ERROR:

quickstart: .venv/installed
	$(BIN)/python -m scripts.quickstart

gallery: .venv/installed
	$(BIN)/python -m scripts.dev.gallery

report: .venv/installed
	$(BIN)/python -m scripts.report runs/digits --out report

test: .venv/installed lint
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m "slow or not slow"

fault-injection: .venv/installed
	for script in train sample make_pairs train_vae cache_latents pack_images; do $(BIN)/python -m scripts.dev.fault_injection --kills 100 --script $$script || exit 1; done

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp is newer than the requirements only when the installation went through.
.venv/installed: requirements.txt requirements-latent.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-latent.txt
	touch $@
