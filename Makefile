# make demo   install into .venv, build the demo model, chat
# make test   install, then lint, types and tests: the one check command
# make breadth   every Mixture-of-Experts type of transformers against stock; writes docs/families.md
# make breadth TRANSFORMERS=5.24.0   the same with another release, in an environment of its own; writes nothing

PYTHON ?= python3
VENV ?= $(if $(TRANSFORMERS),.venv-transformers-$(TRANSFORMERS),.venv)
BIN := $(VENV)/bin
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard quant/csrc/*)

.PHONY: demo test lint types unit slow breadth clean

demo: $(VENV)/.installed
	@$(BIN)/pocketmoe demo

test: lint types unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

breadth: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[breadth]'
	$(if $(TRANSFORMERS),$(BIN)/python -m pip install --quiet 'transformers==$(TRANSFORMERS)')
	$(BIN)/python tests/breadth.py $(if $(TRANSFORMERS),,--table docs/families.md)

# torch comes first and pinned: a looser wish would replace an installed build by a much larger one.
$(VENV)/.installed: $(INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info quant/_pocketmoe_cpu.*
