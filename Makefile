# A fresh machine with Python 3.11 - 3.13 needs nothing else: every target makes .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Processes that share the tests: a core and about 3 GB each.
WORKERS ?= 2

.PHONY: install demo test test-slow lint typecheck shapes clean

install: $(STAMP)

# torch first and alone: where pip finds a CPU build it is kept, else PyPI's (with CUDA on Linux) is taken
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e ".[dev]" -c constraints.txt
	touch $(STAMP)

demo: install
	$(BIN)/diffalign demo

test: install
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu"

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Static types are checked on the wheel: the rooms at the root are mapped into the package only when it is built.
typecheck: install
	rm -rf build dist .types
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/pip install --quiet --no-deps --target .types dist/*.whl
	cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml --python-executable ../$(BIN)/python -p diffalign
	cd .types && ../$(BIN)/python -m diffalign.cli list models | grep shapes-sd3
	cd .types && ../$(BIN)/python -m diffalign.cli train demo --dry-run > /dev/null

# The checkpoints from nothing: a night on two cores. One GPU: everything --device cuda --jobs 3
shapes: install
	$(BIN)/python -m diffalign.scripts.shapes.everything

clean:
	rm -rf $(VENV) .types build dist *.egg-info
