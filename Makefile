# Every target works in a fresh clone: .venv is built first, from the versions in constraints/ that were tested together.
# make PYTHON=python3.12 ... picks the interpreter, make train ARGS="..." hands its options on.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
READY = $(VENV)/ready

# As jupyter-execute does, but without the times of cells, which would change every file at every run.
define EXECUTE
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, resources={"metadata": {"path": "notebooks"}}, record_timing=False, timeout=None).execute()
nbformat.write(notebook, sys.argv[1])
endef
export EXECUTE

.PHONY: help train test check lint notebooks clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: $(READY) ## Train, e.g. make train ARGS="--help"
	$(BIN)/jaxrl train $(ARGS)

# Two workers, since tracing and much of compiling keep a single core busy.
test: $(READY) ## Run the tests, e.g. make test ARGS="-k flow"
	$(BIN)/python -m pytest -n 2 --dist worksteal tests $(ARGS)

# What most changes break: the order of packages, docstrings, pure functions, data and ring, two kinds of agent.
CHECK = tests/test_project.py tests/test_stats.py tests/ops/test_guidance.py tests/ops/test_losses.py tests/data/test_files.py \
	tests/agents/test_catalogue.py tests/agents/test_bc.py tests/agents/test_td3bc.py tests/replay/test_ring.py

check: lint ## Check format, types and the quick tests, in about three minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile $(CHECK) $(ARGS)

lint: $(READY) ## Check format, style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/ty check --python $(VENV)

notebooks: $(READY) ## Run the notebooks and keep their output
	for file in notebooks/*.ipynb; do $(BIN)/python -c "$$EXECUTE" $$file || exit 1; done

clean: ## Remove the environment and everything built or cached; runs/ and datasets/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml $(wildcard constraints/*.txt)
	@name=$$($(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])') || exit 1; \
	case $$name in \
	py311 | py312) pins="-c constraints/$$name.txt" ;; \
	py313) pins=""; echo "Versions are not pinned: tested together on Python 3.11 and 3.12, this is $$($(PYTHON) --version)" >&2 ;; \
	*) echo "jaxrl needs Python 3.11, 3.12 or 3.13, $(PYTHON) is $$($(PYTHON) --version): try make PYTHON=python3.12" >&2; exit 1 ;; \
	esac; \
	echo "Installing into $(VENV) (about 1 GB, a minute or more)"; \
	$(PYTHON) -m venv --clear $(VENV) && $(BIN)/python -m pip install --quiet -e '.[dev]' $$pins
	@touch $@
