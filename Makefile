# Every target makes what it needs, from an empty folder: the virtual environment, torch, the
# libraries. `make help` lists them.

PYTHON ?= python3
# the development pin; the package itself asks for torch>=2.10
TORCH ?= torch==2.13.0
# the oldest that the stable ABI target allows
OLD_TORCH ?= torch==2.10.*
# one that PyPI builds with CUDA
CUDA_TORCH ?= torch==2.14.1
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch is there already: an isolated build would not see it
INSTALL := $(PIP) install -q --no-build-isolation
# a process for each processor, whose thread it does not share; what is left of a long file at the
# end goes to whoever is done
PARALLEL_PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# every extra that a part of the package needs
ALL_PARTS := $(VENV)/.with-train $(VENV)/.with-splat $(VENV)/.with-view

.PHONY: help build test test-all test-abi test-cuda-abi gpu-code bench check format demo wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## train a feature field on two photographs; report in runs/
	$(BIN)/rayfuse train

test: $(ALL_PARTS) $(VENV)/.with-test  ## the whole suite but the slow tests
	$(PARALLEL_PYTEST)

test-all: $(ALL_PARTS) $(VENV)/.with-test  ## the suite with the slow tests
	$(PARALLEL_PYTEST) -m "slow or not slow"

test-abi: $(VENV)/.built  ## load this build under an older torch, in a second environment
	$(PYTHON) -m venv .venv-abi
	.venv-abi/bin/pip install -q "$(OLD_TORCH)" numpy pytest hypothesis jaxtyping
	PYTHONPATH=python .venv-abi/bin/python tests/abi.py

test-cuda-abi: $(VENV)/.built  ## load the CUDA library under a torch with CUDA (5 GB), GPU or none
	RAYFUSE_CUDA=1 $(INSTALL) --no-deps -e .
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install -q "$(CUDA_TORCH)" numpy
	PYTHONPATH=python .venv-cuda/bin/python tests/abi_cuda.py

gpu-code: $(VENV)/.with-test  ## compile the GPU kernels that changed, GPU or none, and write docs/gpu
	$(BIN)/python tests/gpu_code.py

bench: $(VENV)/.with-bench  ## every op against its peers and the machine's limit
	$(BIN)/python -m pytest bench

check: $(ALL_PARTS) $(VENV)/.with-test $(VENV)/.with-check  ## what CI runs before the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu')
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --doctest-modules python/rayfuse tests/test_law.py

format: $(VENV)/.with-check  ## write all sources in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')

build: $(VENV)/.built  ## the virtual environment with an editable install

wheel: $(VENV)/.built  ## one wheel for every Python and torch, in dist/
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

clean:  ## all that make made
	rm -rf build dist .venv .venv-abi .venv-cuda python/rayfuse/lib python/*.egg-info

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "$(TORCH)" numpy "setuptools>=77" ninja
	@touch $@

SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(INSTALL) --no-deps -e .
	@touch $@

# one of the libraries is enough, and takes a third of the time
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	RAYFUSE_ISAS=native $(INSTALL) -e '.[train]'
	$(INSTALL) --no-deps $(NO_DEPS_train)
	@touch $@

$(VENV)/.with-%: pyproject.toml | $(VENV)/.built
	$(INSTALL) -e '.[$*]'
	$(if $(NO_DEPS_$*),$(INSTALL) --no-deps $(NO_DEPS_$*))
	@touch $@

# the weights of a real network in a wheel whose own requirements would replace torch
NO_DEPS_train := stlpips-pytorch==0.0.2
# drop-ins are tested against what they stand for, of which a small part is needed
NO_DEPS_test := nerfstudio==1.1.5 nerfacc==0.5.2 torch_efficient_distloss==0.1.3
NO_DEPS_bench := torch_efficient_distloss==0.1.3
