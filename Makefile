# make demo | test | lint | docs | bench | results | peers | wheel | wheel-matrix | aot-cuda | sanitize | clean: each
# creates what it needs, in .venv beside this file.
# Another Python or torch: make test PYTHON=python3.12 TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

# With an NVIDIA driver the CUDA build of torch, even where a CPU build of the same version is at hand.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH ?= $(if $(HAS_GPU),'torch==2.13.0$(comma)!=2.13.0+cpu','torch==2.13.0')
comma := ,

.PHONY: demo test lint docs bench results peers wheel wheel-matrix aot-cuda sanitize clean

demo: $(INSTALLED)
	$(RUN) -m d2v demo

# Two workers of one thread each: Triton's interpreter runs on one. With a GPU one worker, which has all its memory.
JOBS ?= $(if $(HAS_GPU),0,2)

test: $(INSTALLED)
	$(if $(filter 0,$(JOBS)),,OMP_NUM_THREADS=1 )$(RUN) -m pytest -n $(JOBS) --dist worksteal

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The pages of docs/ and the API reference in build/docs; warnings are errors, and nothing is fetched. Not --quiet:
# mkdocs counts only the warnings that it shows.
docs: $(INSTALLED)
	$(PIP) install --quiet -c constraints.txt $$($(RUN) -c 'import importlib.metadata as m; \
	  print(*(r.split(";")[0] for r in m.requires("d2vkern") if "extra == \"docs\"" in r))')
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo build/docs/index.html

bench: $(INSTALLED)
	$(RUN) -m benchmarks.run

# The tables of README.md and docs/ and the plots, from benchmarks/results/*.json
results: $(INSTALLED)
	$(RUN) -m benchmarks.results_table

# Models of transformers, and the folders we write for it, beside an old and the newest release of it, in environments of
# their own under build/.
PEERS ?= 4.57 newest
REQUIRES := import importlib.metadata as m; print(*(r.split(";")[0] for r in m.requires("d2vkern") if "extra ==" in r and "docs" not in r))
peers: $(INSTALLED)
	@for version in $(PEERS); do \
	  folder=build/peers/$$version; peer=transformers; test $$version = newest || peer="transformers==$$version.*"; \
	  echo "== $$peer"; test -x $$folder/bin/python || $(PYTHON) -m venv $$folder || exit 1; \
	  pip="$$folder/bin/python -m pip install --quiet --disable-pip-version-check"; \
	  $$pip $(TORCH) numpy nvtx || exit 1; $$pip --upgrade "$$peer" || exit 1; \
	  $$pip $$($(RUN) -c '$(REQUIRES)') || exit 1; \
	  OMP_NUM_THREADS=1 $$folder/bin/python -m pytest -q -n $(JOBS) tests/d2v/test_hf*.py || exit 1; \
	done

# with CUDA kernels where there is nvcc; one line says what was built
wheel: $(INSTALLED)
	rm -rf dist && mkdir -p dist build
	$(PIP) wheel --verbose --no-deps --no-build-isolation --wheel-dir dist . >build/wheel.log 2>&1 \
	  || { tail -60 build/wheel.log; exit 1; }
	@sed -n 's/^ *\(d2vkern: built\)/\1/p' build/wheel.log | tail -1; ls -l dist

# The wheel beside several torch versions (CUDA builds: gigabytes each), in environments of their own under build/,
# and every kernel compiled by the Triton that comes with each.
MATRIX ?= 2.10.0 2.11.0 newest
wheel-matrix: wheel
	@for version in $(MATRIX); do \
	  folder=build/matrix/$$version; torch=torch; test $$version = newest || torch="torch==$$version"; \
	  echo "== $$torch"; test -x $$folder/bin/python || $(PYTHON) -m venv $$folder || exit 1; \
	  $$folder/bin/python -m pip install --quiet --disable-pip-version-check "$$torch" numpy nvtx || exit 1; \
	  $$folder/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.whl \
	    || exit 1; \
	  cp tests/wheel_smoke.py build/matrix/ && $$folder/bin/python build/matrix/wheel_smoke.py || exit 1; \
	  $$folder/bin/python -m benchmarks.aot --sample --compiles --targets sm_90 --no-eager --no-nvcc \
	    >$$folder/aot.log || { tail $$folder/aot.log; exit 1; }; tail -1 $$folder/aot.log; \
	done

# nvcc for every architecture: spills, registers, access widths
aot-cuda: $(INSTALLED)
	$(RUN) -m benchmarks.aot_cuda

# compute-sanitizer over the compiled CUDA kernels: needs a GPU
CUDA_TESTS := $(RUN) -m pytest -q -m gpu tests/test_native_cuda.py
sanitize: $(INSTALLED)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(CUDA_TESTS) -k "not 31 and not 32_bits and not ten_thousand"
	compute-sanitizer --tool racecheck --error-exitcode 1 $(CUDA_TESTS) -k "masks_are or adamw"
	compute-sanitizer --tool initcheck --error-exitcode 1 $(CUDA_TESTS) -k "gather or scatter or masks_are"
	compute-sanitizer --tool synccheck --error-exitcode 1 $(CUDA_TESTS) -k "masks_are"

clean:
	rm -rf $(VENV) build dist d2vkern.egg-info .pytest_cache .ruff_cache .mypy_cache

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit("d2vkern needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install --quiet -c constraints.txt $(TORCH)
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[train,dev]'
	@$(RUN) -m d2vkern.info | grep '^native'
	touch $@
