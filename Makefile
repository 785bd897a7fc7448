TORCH ?= torch==2.13.0
# ^ what .venv installs as torch: one exact version, since an open range takes the newest CUDA build (several gigabytes).
PYTHON ?= python3
# The CUDA kernels: AUTO (built when nvcc works), ON or OFF.
CUDA ?= AUTO
# Whom a test feeds our solvers from. Without its dependencies: one of them wants torchvision, which brings a torch of its own.
CURVLINOPS := curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 einops einconv linear_operator opt-einsum unfoldNd
# Where `make gpu` leaves its log and results.
OUT ?= build/gpu
# Where `make bench` and `make bench-all` leave their results; those of record are in benchmarks/results/cpu.
RESULTS ?= build/bench
# Time for an op at one size; a record deserves 2.
SECONDS_A_SIZE ?= 0.5

VENV := .venv
PY := $(VENV)/bin/python
# The names of the stamps hold what was asked for, so that another TORCH or CUDA is another build.
TOOLS := $(VENV)/.tools-$(subst /,-,$(subst =,-,$(TORCH)))
BUILT := $(VENV)/.built-cuda-$(CUDA)
NATIVE_SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
# Native code is asked for, so a missing header is an error here and never a silent pure-Python package.
NATIVE_ON = -Ccmake.define.TORCH_INFLUENCE_NATIVE=ON -Ccmake.define.TORCH_INFLUENCE_CUDA=$(1)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test mutate emulate emulate-sanitize emulate-mutate dev lint types docs links bench bench-all bench-peers gpu wheel check-wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: dev ## build and run the main job on real data
	$(PY) -m torch_influence demo

test: dev ## build what is missing and run the whole test suite
	$(PY) -m pytest -n auto --dist worksteal

mutate: dev ## change the package in a hundred wrong ways and expect the tests to notice each; minutes
	$(PY) tests/mutate.py

dev: $(BUILT) ## create .venv with an editable install

emulate: dev ## the CUDA kernels run on the CPU by the tests of the ops: see tests/cuda_on_cpu; QUICK=1 without large shapes
	$(PY) tests/cuda_on_cpu/run.py $(if $(QUICK),--quick)

emulate-sanitize: dev ## small shapes of them under the address and the thread sanitizer
	$(PY) tests/cuda_on_cpu/run.py --sanitize

emulate-mutate: dev ## change the kernels in wrong ways and expect the emulator to notice each; writes the table; minutes
	$(PY) tests/cuda_on_cpu/mutate.py --write

lint: dev ## style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --style=file --dry-run -Werror $$(find csrc tests/cuda_on_cpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

types: dev ## static types of the package
	$(PY) -m mypy

docs: dev ## the documentation as a site in build/site; warnings are errors
	$(PY) -m mkdocs build

links: ## ask whether the external links of the pages are alive
	$(PYTHON) docs/links.py

bench: dev ## the native ops, and end to end against the old algorithm; ends with a table; under ten minutes; results in RESULTS
	set -e; for bench in benchmarks/ops/bench_*.py; do \
	  $(PY) $$bench --seconds $(SECONDS_A_SIZE) --json "$(RESULTS)/$$(basename $$bench .py).json"; done
	$(PY) benchmarks/end_to_end.py --json "$(RESULTS)/end_to_end.json" --markdown "$(RESULTS)/end_to_end.md"
	$(PY) benchmarks/report.py "$(RESULTS)"

bench-all: bench ## those, then many queries at once, tolerances and budgets, what solver="auto" takes, a new process, preconditioners, scaling, the top 10 of a million
	set -e; for bench in all_queries price choice fresh_process preconditioners scaling; do \
	  $(PY) benchmarks/$$bench.py --json "$(RESULTS)/$$bench.json" --markdown "$(RESULTS)/$$bench.md"; done
	$(PY) benchmarks/top_k.py --json "$(RESULTS)/top_k.json"
	$(PY) benchmarks/report.py "$(RESULTS)"

# The extra "peers" of pyproject.toml beside .venv, whose packages build/peers sees. Without their dependencies: those want
# another torch and another numpy. What they import in fact is the second list.
bench-peers: PEERS = captum==0.9.0 dattri==0.3.0 kronfluence==1.0.1 pyDVL==0.10.0
bench-peers: PEERS_IMPORT = accelerate==1.15.0 dask distributed "zarr>=3,<4" more-itertools pyDeprecate pandas
bench-peers: dev ## the same questions to pyDVL, captum, kronfluence, dattri and curvlinops, in build/peers: minutes
	$(PYTHON) -m venv build/peers
	echo "import site; site.addsitedir('$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("platlib"))')')" \
	  >"$$(build/peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/dev.pth"
	$(PY) -m pip freeze --exclude-editable | grep -E '^(torch|numpy|scipy)==' >build/peers/constraints.txt
	build/peers/bin/python -m pip install -c build/peers/constraints.txt $(PEERS_IMPORT)
	build/peers/bin/python -m pip install --no-deps $(PEERS)
	build/peers/bin/python benchmarks/peers.py --json "$(RESULTS)/peers.json" --markdown "$(RESULTS)/peers.md"

# Uses the current python and downloads nothing: it must have torch with CUDA, pytest and the build tools. A stage has ten
# minutes; STAGES="build tests" runs some of them, DEVICE=cpu QUICK=1 rehearses them without a GPU: see the script.
gpu: ## on a GPU machine: build into the current python, run the CUDA tests and benchmarks, results in OUT
	OUT="$(OUT)" PYTHON="$(PYTHON)" bash benchmarks/gpu.sh

wheel: dev ## sdist and native wheel in dist/
	$(PY) -m build $(call NATIVE_ON,$(CUDA)) \
	  -Ccmake.define.TORCH_INCLUDE_DIR=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/torch/include

check-wheel: wheel ## audit what the wheel asks for, install it where there is no compiler and test it there
	$(PY) .ci/check_wheel.py dist --torch $(patsubst torch==%,%,$(TORCH))

clean: ## remove what these targets made
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TOOLS): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install "$(TORCH)" "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.26" "ninja>=1.10"
	rm -f $(VENV)/.tools-* && touch $@

$(BUILT): $(TOOLS) $(NATIVE_SOURCES)
	$(PY) -m pip install --no-build-isolation $(call NATIVE_ON,$(CUDA)) -e ".[dev]"
	$(PY) -m pip install --no-deps $(CURVLINOPS)
	rm -f $(VENV)/.built-* && touch $@
