# make install, into .venv, with the pinned packages; make demo [SEED=k], make demo-real [SEED=k],
# make test, make lint and make docs, each after it.
.DELETE_ON_ERROR:
.PHONY: demo demo-real test lint docs install

# The first that runs: a shim of a version manager can be on the path and fail.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$python && break; done)
SEED ?= 0
PYTEST_ARGS ?= -n 2
BIN = .venv/bin

demo: install
	$(BIN)/python -m gspo.demo --seed $(SEED) --output runs/demo

demo-real: install  # a pretrained model of 135 million parameters, which it downloads once
	$(BIN)/python -m gspo.demo --real --seed $(SEED) --output runs/demo-real

test: install
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  # the pages that are made from the code
	$(BIN)/python -m gspo.config.reference > docs/configuration.md

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	{ echo "Python 3.11 or 3.12 is needed, found '$(PYTHON)': try make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	# By its path: setuptools' own finder gives way to any folder named gspo, as in the one above this clone.
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt \
		--config-settings editable_mode=compat -e '.[dev,gguf,hf,lora,plots]'
	touch $@
