# `make lab` opens the book, `make test` runs every test, `make book` builds its pages. Each installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
FIRST := notebooks/01-a-write-that-nobody-saw.ipynb

.PHONY: lab test book slides pdf run benchmark clean

# Trusted notebooks show their panels at once; others only after they are run.
lab: .venv/installed
	$(BIN)/jupyter trust notebooks/*.ipynb
	$(BIN)/python tools/function_map.py book/function-map.md
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/$(FIRST)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The pages, for a web server or a disk: build/book/_build/html. Unchanged chapters are not run again.
book: .venv/installed
	$(BIN)/python tools/book.py build/book

# A deck for each chapter: build/slides.
slides: .venv/installed
	$(BIN)/python tools/slides.py build/slides

# The whole book for a printer; needs chromium.
pdf: book
	$(BIN)/python tools/pdf.py build/book/_build/html build/kvmbook.pdf

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
