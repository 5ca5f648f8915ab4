# A fresh machine with Python 3.11 - 3.13 needs nothing else: every target makes .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Processes that share the tests: a core and about 3 GB each.
WORKERS ?= 2

.PHONY: install demo test test-slow oldest newest lint typecheck house docs shapes clean

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

# The rooms that call other libraries, against the oldest and the newest versions that pyproject.toml allows.
CORE  := $(addprefix tests/,algorithms config core diffusion lora parity pipelines quantization schedulers training)
NEEDS := --editable ".[server,plots,quantization]" pytest pytest-xdist scikit-image

oldest newest: CHECK = OMP_NUM_THREADS=1 .venv-$@/bin/python -m pytest -n $(WORKERS) --dist loadfile \
	-m "not slow and not gpu" $(CORE)

# torch first and alone, for the reason above
oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python .ci/lowest.py > .venv-oldest/lowest.txt
	.venv-oldest/bin/pip install --quiet torch -c .venv-oldest/lowest.txt
	.venv-oldest/bin/pip install --quiet $(NEEDS) -c .venv-oldest/lowest.txt
	$(CHECK)

newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade torch
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager $(NEEDS)
	$(CHECK)

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

# The table of sizes, couplings, texts and types
house: install
	$(BIN)/python -m benchmarks.common.house --output benchmarks/results/house.json

# The documentation site, in site/. The extra `docs` is installed once.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

$(VENV)/.docs: $(STAMP)
	$(BIN)/pip install --quiet -e ".[docs]" -c constraints.txt
	touch $@

# The checkpoints from nothing: a night on two cores. One GPU: everything --device cuda --jobs 3
shapes: install
	$(BIN)/python -m diffalign.scripts.shapes.everything

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .types build dist site *.egg-info
