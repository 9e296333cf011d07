# Everything runs in a virtual environment that these targets make on a fresh machine: Python, a C++ compiler, and
# Java for METEOR are all that must be there. `make demo` and `make test` are the two commands to know.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= auto
# What differs between the two lines of transformers: its classes, and how it loads and saves.
BOTH_LINES ?= python_tests/models/test_families.py python_tests/checkpoint/test_pretrained.py
TRANSFORMERS4 := "transformers==4.57.6" "huggingface_hub<1" "tokenizers<0.23" requests urllib3 charset-normalizer idna certifi
OUT ?= gpu-out
# Tests of GPU kernels do not meet the CPU's.
OF_GPUS := --ignore-glob='*/test_cuda_*' --ignore-glob='*/test_triton_*' --ignore-glob='*/test_ptx*'
OF_CPU := $(wildcard python_tests/backends/test_cpu_*.py) python_tests/backends/test_integer.py
SANITIZED ?= python_tests $(OF_GPUS)
# A thread that waits gives its core away, which counts where other processes want it.
export OMP_WAIT_POLICY ?= passive
BIN := $(VENV)/bin
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(filter %.cpp %.h %.inl %.cu %.cuh,$(CSRC))

.PHONY: help setup demo test sanitize emulate lint format bench gpu clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.torch: $(VENV)/.python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/.transformers4: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/transformers4 $(TRANSFORMERS4)
	touch $@

setup: $(VENV)/.installed  ## virtual environment, dependencies, compiled extension

demo: setup  ## quantize the shipped trained VLMs, score them before and after, write demo-out/
	$(BIN)/mmq demo --out demo-out $(ARGS)

test: setup lint $(VENV)/.transformers4  ## linters, type checks and the test suite; models also under transformers 4
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)
	PYTHONPATH=$(VENV)/transformers4 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(BOTH_LINES)

# AVX-512's kernels take half of the time to compile, and run only where the CPU has it.
UP_TO := $(shell grep -qs avx512 /proc/cpuinfo || echo MMQ_CPU_UP_TO=avx2)

# Torch has the real allocator's tensors watched too: the sanitizer's allocator is loaded before everything else. What a
# sanitizer says on its way out would be lost with what pytest captures of file descriptors.
sanitize: setup  ## the suite under AddressSanitizer and UBSan, AVX-512 masked off where a test does not ask for it
	$(UP_TO) MMQ_SANITIZE=address,undefined MMQ_CUDA=off $(BIN)/python setup.py --quiet build --build-lib build/sanitized
	PYTHONPATH=build/sanitized MMQ_CPU_ISA=avx2 PYTHONDONTWRITEBYTECODE=1 \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD=$$($${CXX:-c++} -print-file-name=libasan.so):$$($${CXX:-c++} -print-file-name=libubsan.so) \
	$(BIN)/pytest --capture=sys -p no:cacheprovider -n $(WORKERS) --dist loadgroup $(SANITIZED) $(ARGS)

emulate: setup  ## tests of the AVX-512 kernels on a CPU that lacks it, in minutes
	MMQ_EMULATE=avx512 MMQ_CUDA=off $(BIN)/python setup.py --quiet build --build-lib build/emulated
	PYTHONPATH=build/emulated $(BIN)/pytest -p no:cacheprovider -n $(WORKERS) --dist loadgroup -k avx512 $(OF_CPU) $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: setup  ## rewrite the sources in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

bench: setup  ## microbenchmarks of this machine, appended to benchmarks/results
	$(BIN)/python benchmarks/bench_cpu.py $(ARGS)

gpu:  ## build, test, sanitize and measure on this machine's GPU, with the Python that is there; OUT=folder
	$(PYTHON) benchmarks/gpu.py --out $(OUT) $(ARGS)

clean:  ## remove what was built; the virtual environment stays
	rm -rf build dist demo-out gpu-out *.egg-info mmq_kernels/_C*.so
