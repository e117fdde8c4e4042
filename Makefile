# Two commands on a fresh machine with Python 3.12: `make quickstart` and `make test`.
# Everything goes into .venv; set UV_CACHE_DIR, PIP_INDEX_URL or the like in the environment if your site needs it.

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart pipeline test test-fast test-heavy test-runs test-slurm test-long gpu-check check setup setup-gpu docs docs-site lock clean

quickstart: $(READY)  ## distil a tiny student on this CPU: minutes
	CUDA_VISIBLE_DEVICES= $(BIN)/megatron-distill train tiny.quickstart

pipeline: $(READY)  ## distil, then reinforce, with a gate between, on this CPU: minutes
	CUDA_VISIBLE_DEVICES= $(BIN)/megatron-distill pipeline tiny_rl.pipeline

test-fast: $(READY)  ## the tests that start no server and no training job: under a minute
	$(BIN)/python -m pytest -m "not slow and not heavy and not slurm and not long"

test: $(READY)  ## the default tests: minutes
	$(BIN)/python -m pytest -m "not heavy and not slurm and not long"

test-heavy: test-runs test-slurm  ## both of the next; side by side with --jobs=2 --output-sync

test-runs: $(READY)  ## whole runs
	$(BIN)/python -m pytest -m "heavy and not long"

test-slurm: $(READY)  ## the one-host Slurm
	$(BIN)/python -m pytest -m "slurm and not long"

test-long: $(READY)  ## kills, hangs, signals and the GPU ladder in whole runs, the losses' benchmark: half an hour
	$(BIN)/python -m pytest -m long

gpu-check: $(READY)  ## the first hour on GPUs: a ladder of small runs, a table at its end; on CPU its tiny rungs
	$(BIN)/python tools/gpu_check.py

check: $(READY)  ## lint, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(READY)

setup-gpu: $(READY)  ## what bf16 training on a GPU takes besides: Transformer Engine, its extension compiled against this torch
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt setuptools wheel
	NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 $(BIN)/uv pip install --python $(BIN)/python --no-build-isolation \
	  --constraints constraints.txt 'transformer-engine[core_cu13,pytorch]'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.12 is needed (megatron-core 0.17 and later). Try: pyenv install 3.12, or make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "installing about 10 GB of packages into .venv (minutes the first time)"
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraints constraints.txt --editable '.[launch,dev]'
	@touch $@

# Nothing is installed before: the constraints of yesterday may refuse what pyproject.toml asks for today.
lock:  ## write constraints.txt again, from pyproject.toml and what is installed
	@test -x $(BIN)/uv || { echo "$(BIN)/uv: missing, and lock resolves with it. Type: make setup"; exit 1; }
	$(BIN)/python tools/lock.py

docs: $(READY)  ## regenerate the generated pages
	$(BIN)/python -m megatron_distill.runs.metrics > docs/metrics.md
	$(BIN)/python -c "from megatron_distill.config.reference import markdown; print(markdown(), end='')" > docs/config.md

docs-site: $(READY)  ## the documentation as a site, in site/
	$(BIN)/zensical build --clean --strict

clean:  ## remove what setup and docs-site made; runs/ may hold days of work, and stays
	rm -rf .venv site
