# `make lab` opens the book, `make test` runs every test, `make book` builds its pages. Each installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
MEASURED := search helpers slots sweep panels

.PHONY: lab edit check test mutants book slides pdf run benchmark $(MEASURED) soak real-bug clean install-lab install-book install-test

# A reader's own copy of the book, in reading/; `make edit` opens the sources.
lab: install-lab
	@$(BIN)/python tools/reading.py

edit: install-lab
	@$(BIN)/python tools/reading.py --sources

# A first answer while you work, within a minute: style, types, the model and the scenes; no chapter, no page, no browser.
check: install-test
	$(BIN)/python -m pytest --quick -n 2 --dist loadfile --no-loadscope-reorder

# Three at once on two cores: a browser, a kernel and a build wait for each other often.
test: install-test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Small mistakes put into the model, one at a time: which do the tests notice, which the chapters? OPTIONS=--help says more.
mutants: install-test
	$(BIN)/python -m tools.mutants $(OPTIONS)

# The pages, for a web server or a disk: build/book/_build/html. Unchanged chapters are not run again.
book: install-book
	$(BIN)/python tools/book.py build/book

# A deck for each chapter: build/slides.
slides: install-book
	$(BIN)/python tools/slides.py build/slides

# The whole book for a printer; needs chromium, and says so before it builds.
pdf: install-book
	@$(BIN)/python tools/browser.py
	$(BIN)/python tools/book.py build/book
	$(BIN)/python tools/pdf.py build/book/_build/html build/kvmbook.pdf

# Run every chapter and store its outputs, and its minutes in the index: after a change to the model or to a chapter.
run: install-book
	$(BIN)/python tools/store_outputs.py notebooks/[0-9]*.ipynb
	$(BIN)/python tools/minutes.py --store
	$(BIN)/python tools/store_outputs.py notebooks/index.ipynb

# Ratios, measured in one run; `make benchmark search slots` some of them, OPTIONS=--store puts the tables into README.md.
benchmark: install-test
	$(BIN)/python -m benchmarks $(filter $(MEASURED),$(MAKECMDGOALS)) $(OPTIONS)

$(MEASURED): benchmark
	@:

# A million steps of random runs on each kind of hardware, in some 30 minutes; goes on where it was interrupted.
soak: install-test
	$(BIN)/python -m tools.soak $(OPTIONS)

# Linux's own KVM loses the write of chapter 1, in an emulator: on Debian, some 20 minutes, 6 GB. OPTIONS=--help says more.
real-bug: install-lab
	$(BIN)/python -m tools.real_bug $(OPTIONS)

# tools/install.py looks each time, which takes a moment; .venv's own Python runs it once that works.
TOO_OLD := import sys; v = sys.version_info; sys.exit(v < (3, 11) and "kvmbook needs Python 3.11 or newer, \
$(PYTHON) is %d.%d; name another: PYTHON=python3.12 make $(MAKECMDGOALS)" % v[:2])
NOT_THERE := there is no program $(PYTHON); install Python 3.11 or newer, or name yours: PYTHON=python3.12 make $(MAKECMDGOALS)
install-lab install-book install-test: install-%:
	@python='$(BIN)/python'; $$python -c 'import pip, tomllib' 2>/dev/null || python='$(PYTHON)'; \
	command -v "$$python" >/dev/null || { echo '$(NOT_THERE)' >&2; exit 1; }; \
	"$$python" -c '$(TOO_OLD)' && "$$python" tools/install.py $*

# reading/ stays: what is written there is the reader's.
clean:
	rm -rf .venv build *.egg-info
