# `make` lists the targets.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.stamp
DOCS_STAMP := $(VENV)/.stamp-docs
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env quickstart test tests test-fast lint types bench docs clean distclean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) \
		| while IFS="$$(printf '\t')" read -r name text; do printf '%-11s %s\n' "$$name" "$$text"; done

env: $(STAMP) ## make or update .venv (about 6 GB; PYTHON=... chooses the interpreter)

# A .venv whose Python no longer starts is remade, however new its stamp is.
ifneq ($(shell $(PY) -c 'import pip; print("ok")' 2>/dev/null),ok)
$(STAMP): FORCE
endif
FORCE:

# The stamp goes first and comes back last: an install that failed or was interrupted leaves none.
# One plain install takes torch and torchvision together; a torch from elsewhere breaks torchvision's import.
$(STAMP): pyproject.toml
	@rm -f $@ $(DOCS_STAMP)
	@$(PY) -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo 'installing into $(VENV); the first time takes minutes'
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	@rm -f $@
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

quickstart: $(STAMP) ## train the quickstart; ARGS="--trainer.max_epochs 1" passes options on
	$(PY) -m lightning_dml fit --config configs/quickstart.yaml $(ARGS)

# mypy beside the tests, which wait for processes of theirs a good part of the time.
test: lint ## lint, types, and every test
	@$(MAKE) --no-print-directory -j 2 types tests

# Two processes of one thread are done sooner than one of two; a file stays with one of them for its fixtures.
tests: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

test-fast: $(STAMP) ## the tests that are not marked slow
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m 'not slow'

lint: $(STAMP) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# callbacks/ and datamodules/ are parts of lightning_dml that stand beside it, so mypy is shown one package of links, and
# the rest beside it as here: the paths in its errors are those of this folder but for those two.
types: $(STAMP) ## mypy --strict over the package, tests, examples and benchmarks
	@rm -rf build/types
	@mkdir -p build/types/lightning_dml
	@cd build/types/lightning_dml && ln -s ../../../lightning_dml/* ../../../callbacks ../../../datamodules .
	@cd build/types && ln -s ../../tests ../../examples ../../benchmarks .
	cd build/types && ../../$(PY) -m mypy --strict --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		--explicit-package-bases lightning_dml tests examples benchmarks

bench: $(STAMP) ## run every benchmark
	@set -e; for file in benchmarks/[!_]*.py; do \
		[ -e "$$file" ] || continue; \
		echo "$$file"; $(PY) "$$file"; \
	done

# mkdocstrings reads the sources from one package too; it does not follow links, hence copies.
docs: $(DOCS_STAMP) ## build the documentation into build/site
	@rm -rf build/docs/lightning_dml
	@mkdir -p build/docs
	@cp -R lightning_dml build/docs/lightning_dml
	@cp -R callbacks datamodules build/docs/lightning_dml/
	$(PY) -m mkdocs build --strict

clean: ## remove build products, caches, and the runs/ folder
	rm -rf build dist *.egg-info runs lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)
