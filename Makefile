# "make" alone lists what there is. The first time, a virtual environment is made in $(VENV) and filled from PyPI, about
# 0.7 GB to download; after that only when a requirements file has changed.
#
#   make test PYTHON=python3.12             with another Python (3.7 to 3.13), in a fresh $(VENV) (make clean)
#   make test PYTEST_FLAGS="-k losses"      only some tests
#   make demo VENV_FLAGS=--system-site-packages    with a TensorFlow that this machine has outside of $(VENV)
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
PYTEST_FLAGS ?=

RUN = $(VENV)/bin/python

.PHONY: help demo test lint types clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/make \1	/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## pretrain a narrow encoder on drawn shapes, in less than five minutes on two cores
	rm -rf runs/demo
	$(RUN) pretraining.py --dataset shapes --width_multiplier 0.25 --num_epochs 8 --batch_size 128 \
		--output_dir runs/demo --knn_every 2

test: $(VENV)/.installed-dev  ## run all tests, two at a time
	$(RUN) -m pytest -n 2 --dist worksteal $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev  ## check the code with ruff
	$(RUN) -m ruff check .

types: $(VENV)/.installed-dev  ## check the types with mypy
	$(RUN) -m mypy

clean:  ## remove the virtual environment and the caches; runs stay, but for the demo's
	rm -rf $(VENV) runs/demo .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The files that say what was installed last. The pip that old Pythons bring may not know today's wheels.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; (3, 7) <= sys.version_info < (3, 14) or sys.exit("TensorFlow is to be had for Python 3.7 to \
	3.13, and this is %d.%d: name another one, as in make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(RUN) -m pip install --quiet 'pip>=20.3,<24.1; python_version < "3.10"'
	$(RUN) -m pip install -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt requirements-extra.txt
	$(RUN) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	@touch $@
