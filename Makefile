# make demo | test | lint | bench | results | wheel | clean: each creates what it needs, in .venv beside this file.
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

.PHONY: demo test lint bench results wheel clean

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

bench: $(INSTALLED)
	$(RUN) -m benchmarks.run

# README's tables and the plots, from benchmarks/results/*.json
results: $(INSTALLED)
	$(RUN) -m benchmarks.results_table

wheel: $(INSTALLED)
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist d2vkern.egg-info .pytest_cache .ruff_cache .mypy_cache

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("d2vkern needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install --quiet -c constraints.txt $(TORCH)
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[train,dev]'
	touch $@
