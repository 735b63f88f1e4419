# `make lab` opens the book, `make test` runs every test. Both install what they need into .venv first.
PYTHON ?= python3
BIN := .venv/bin
FIRST := notebooks/01-a-write-that-nobody-saw.ipynb

.PHONY: lab test run benchmark clean

# Trusted notebooks show their panels at once; others only after they are run.
lab: .venv/installed
	$(BIN)/jupyter trust notebooks/*.ipynb
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/$(FIRST)

test: .venv/installed
	$(BIN)/python -m pytest

# Run every chapter and store its outputs: after a change to the model or to a chapter.
run: .venv/installed
	$(BIN)/python tools/store_outputs.py notebooks/*.ipynb

benchmark: .venv/installed
	$(BIN)/python -m benchmarks

.venv/installed: pyproject.toml tools/overrides.json
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kvmbook needs Python 3.11 or newer"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	mkdir -p .venv/share/jupyter/lab/settings && cp tools/overrides.json .venv/share/jupyter/lab/settings/
	touch $@

clean:
	rm -rf .venv build *.egg-info
