# make demo | make test | make test-fast | make test-one K=... | make test-kernels | make test-slurm | make lint:
# each makes .venv if it is missing and installs what it needs.
PYTHON ?= python3
VENV := .venv
KERNELS := tests/kernels tests/distributed/test_patterns.py tests/seams/test_moving_tile_kernels.py
RUN := $(VENV)/bin/python -W ignore

# Two ranks on two cores: more threads than that only wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-fast test-one test-kernels test-slurm lint clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or \
	    sys.exit(f"Python 3.11 or 3.12 is needed and this is {v[0]}.{v[1]}; say make PYTHON=python3.12")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -e .
	@touch $@

demo: install
	$(RUN) tools/demo.py

# On three workers, since one of them mostly waits, for Slurm: files share nothing, the tests of one share what it sets up.
test: lint
	$(RUN) -m pytest tests $(KERNELS:%=--ignore=%) -n 3 --dist loadfile --no-loadscope-reorder --durations=10
	@$(MAKE) --no-print-directory test-kernels

# Every room, but nothing that is marked slow, and three cases of a test of many; a worker for each of up to four cores.
test-fast: install
	$(RUN) -m pytest tests -m "not slow" --cases 3 -n logical --maxprocesses 4 --dist loadfile --durations=3

# The tests of one thing: make test-one K=test_blend, K="losses and tp2", K=tests/data/test_blend.py
test-one: install
	@$(RUN) tests/one.py "$(K)"

# The GPU's kernels on the CPU, by Triton's interpreter. Where PyTorch brings no Triton it is put beside the virtual
# environment's packages, since every process that finds it among them imports it.
test-kernels: install
	@$(RUN) -c 'import triton' 2> /dev/null || test -d $(VENV)/triton || \
	    $(VENV)/bin/python -m pip install --quiet --no-deps --target $(VENV)/triton triton==3.9.0 || \
	    echo "There is no Triton to be had here: the tests of its kernels skip"
	PYTHONPATH=$(CURDIR)/$(VENV)/triton $(RUN) -m pytest $(KERNELS) -n 3 --dist loadfile

test-slurm: install
	$(RUN) -m pytest tests/slurm -rs

lint: install
	$(VENV)/bin/ruff check --quiet .

clean:
	rm -rf $(VENV) runs
