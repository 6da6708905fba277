PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast test-slow lint constraints

demo: .venv/recipes.stamp
	$(BIN)/tdq run ddim-digits-ptq name=demo reconstruction.iterations=400 training.lsq.learning_rate=3e-3

test: .venv/all.stamp
	$(PYTEST)

# What one runs between two edits: no whole recipe, documentation page or network of real size.
test-fast: .venv/all.stamp
	$(PYTEST) -m "not slow and not whole"

test-slow: .venv/all.stamp
	$(BIN)/pytest -m slow

# mypy does not follow an editable install, so it reads an installed copy.
lint: .venv/all.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/installed .
	$(BIN)/mypy build/installed/tdq_plugin

# The versions that the suite was tested with; torch is the same with and without "+cpu".
constraints: .venv/all.stamp
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

.venv/%.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
