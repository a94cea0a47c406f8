# The interface to the project: `make help` lists the targets. Paths are relative, so a folder with spaces is fine.

PYTHON ?= python3
MODEL ?= tiny
PORT ?= 8000
ARGS ?=

# BIN=/another/environment/bin is used as it is: nothing is installed into it.
BIN := .venv/bin
STAMP := $(if $(filter .venv/bin,$(BIN)),.venv/.installed)
CODE := kernels quant replicas cluster deploy tests benchmarks examples

# Without an NVIDIA driver the versions of constraints-cpu.txt are taken; with one, pip chooses within pyproject.toml.
CONSTRAINTS := $(shell { test -e /proc/driver/nvidia/version || nvidia-smi -L >/dev/null 2>&1; } || echo -c constraints-cpu.txt)

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup serve doctor docs test coverage test-slow test-thorough test-gpu sanitize-gpu check format clean bench-scheduler bench-step bench-all-reduce bench-sse bench-ttft bench-decode bench-kernels bench-latency bench-throughput bench-serve bench-vllm bench-vllm-tp bench-parallel bench-versions bench-plots bench-table

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null || grep '##' Makefile

setup: $(STAMP) ## make .venv and install Shoal into it (done by the other targets when needed)

.venv/.installed: pyproject.toml constraints-cpu.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"make: Shoal needs Python 3.11 or newer and $(PYTHON) is {sys.version.split()[0]}; name another: make setup PYTHON=python3.12")'
	@echo "setup: installing into .venv (a few minutes the first time) $(CONSTRAINTS)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade 'pip>=25'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(CONSTRAINTS) -e '.[test,dev]'
	@touch $@

serve: $(STAMP) ## serve MODEL (tiny) on PORT (8000); more flags in ARGS
	@$(BIN)/shoal serve $(MODEL) --port $(PORT) $(ARGS)

doctor: $(STAMP) ## what would stop or slow models here (GPUs, NCCL, shared memory, ports)
	@$(BIN)/shoal doctor $(ARGS)

docs: $(STAMP) ## write docs/configuration.md from the fields of the configuration
	@$(BIN)/python -m shoal.deploy.configuration_docs

test: $(STAMP) ## the fast tests, on the CPU; pytest's own options in ARGS
	@$(BIN)/python -m pytest -q $(ARGS)

coverage: $(STAMP) ## the fast tests with the share of lines and branches that they run (slower than make test)
	@$(BIN)/python -m pytest -q --cov --cov-report=term:skip-covered $(ARGS)

test-slow: $(STAMP) ## the tests that take minutes
	@$(BIN)/python -m pytest -q -m 'slow and not gpu' $(ARGS)

test-thorough: $(STAMP) ## the state machines of block pool and engine, 3000 runs each (two minutes)
	@HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -q --timeout=3600 tests/replicas/engine/test_block_pool.py tests/replicas/engine/test_engine_machine.py $(ARGS)

test-gpu: $(STAMP) ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu $(ARGS) tests/kernels tests/replicas

sanitize-gpu: $(STAMP) ## every kernel once under compute-sanitizer, on a CUDA device
	@PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m tests.kernels.sanitize

check: $(STAMP) ## lint, format, types, imports, spelling, whitespace
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "check: not formatted (make format):"; $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/basedpyright --warnings
	@$(BIN)/lint-imports --no-logo --no-cache >/dev/null || { $(BIN)/lint-imports --no-logo --no-cache; exit 1; }
	@$(BIN)/codespell $(wildcard $(CODE) docs *.md *.toml Makefile)
	@! grep -rnIE '[[:blank:]]+$$' $(wildcard $(CODE) docs k8s .ci *.md *.toml *.txt) --exclude-dir=__pycache__ --exclude='*.json' --exclude='*.svg' --exclude=merges.txt \
		|| { echo "check: trailing whitespace, above" >&2; exit 1; }

format: $(STAMP) ## rewrite the code in the project's format
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

bench-scheduler: $(STAMP) ## microseconds a decode step of the scheduler takes, at 256 and 10,000 sequences
	@$(BIN)/python -m benchmarks.scheduler $(ARGS)

bench-step: $(STAMP) ## microseconds to send a step's plan to two shards, against Ray and pickle
	@$(BIN)/python -m benchmarks.step_channel $(ARGS)

bench-all-reduce: $(STAMP) ## microseconds of an all-reduce over 2 and 4 GPUs: NCCL, torch's symmetric memory, Shoal's kernels
	@$(BIN)/python -m benchmarks.all_reduce $(ARGS)

bench-sse: $(STAMP) ## streams through ingress and router, against bare uvicorn
	@$(BIN)/python -m benchmarks.sse $(ARGS)

bench-ttft: $(STAMP) ## time to first token that router and replica add to the bare engine
	@$(BIN)/python -m benchmarks.ttft $(ARGS)

bench-decode: $(STAMP) ## tokens/s on the CPU, against transformers generate
	@$(BIN)/python -m benchmarks.decode_cpu $(ARGS)

bench-kernels: $(STAMP) ## microseconds of every kernel, and its share of the device's limit (ARGS='--model 1b')
	@$(BIN)/shoal bench kernels --json benchmarks/results/bench_kernels.json $(ARGS)

bench-latency: $(STAMP) ## milliseconds of a decode step and prompt tokens/s, by batch and context (ARGS='--trace FILE')
	@$(BIN)/shoal bench latency --json benchmarks/results/bench_latency.json $(ARGS)

bench-throughput: $(STAMP) ## output tokens/s of a thousand requests of mixed lengths, without HTTP
	@$(BIN)/shoal bench throughput --json benchmarks/results/bench_throughput.json $(ARGS)

bench-serve: $(STAMP) ## TTFT, ITL and goodput of the server on PORT, over HTTP
	@$(BIN)/shoal bench serve --url http://127.0.0.1:$(PORT) --json benchmarks/results/bench_serve.json $(ARGS)

bench-vllm: $(STAMP) ## Shoal and vLLM in turn on one GPU (ARGS='--peer-python /path/to/python', that of a vLLM)
	@for group in 8b 1b http; do $(BIN)/python -m benchmarks.vs_vllm $$group $(ARGS) || exit 1; done

bench-vllm-tp: $(STAMP) ## the same on two GPUs, tensor parallel (ARGS as above)
	@$(BIN)/python -m benchmarks.vs_vllm 8b-tp2 $(ARGS)

bench-parallel: $(STAMP) ## speedup of a second GPU: tensor and pipeline parallel
	@$(BIN)/python -m benchmarks.parallel 8b $(ARGS)

bench-versions: $(STAMP) ## this checkout against another one, in turn (ARGS='--old /path/to/checkout')
	@for group in 8b 1b; do $(BIN)/python -m benchmarks.versions $$group $(ARGS) || exit 1; done

bench-plots: $(STAMP) ## the plots of docs/performance.md from benchmarks/results
	@$(BIN)/python -m benchmarks.plots

bench-table: $(STAMP) ## benchmarks/results as tables, into docs/performance-tables.md
	@$(BIN)/python -m benchmarks.table --write

clean: ## remove what make and the tools wrote (.venv too)
	@rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache .coverage *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
