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

# The demo is on your own images with make demo PHOTOS=DIR (one folder for each class), else on CIFAR-10 if it is in Keras's cache
# or make demo CIFAR10=DIR says where, else on drawn shapes.
PHOTOS ?=
CIFAR10 ?=
ANY_CIFAR10 = $(CIFAR10)$(wildcard $(or $(KERAS_HOME),$(HOME)/.keras)/datasets/cifar-10-*)
IMAGES = $(if $(PHOTOS),your images,$(if $(ANY_CIFAR10),CIFAR-10,drawn shapes))
ON = --dataset $(if $(PHOTOS),folder --data_dir "$(PHOTOS)",$(if $(ANY_CIFAR10),cifar10$(if $(CIFAR10), --data_dir "$(CIFAR10)"),shapes)) \
	--width_multiplier 0.25

demo: $(VENV)/.installed  ## in less than five minutes on two cores: a minute of pretraining, then what a long one has brought
	@rm -rf runs/demo
	@printf '\n1. A minute of pretraining from scratch, on $(IMAGES): the command, its progress, loss and spread.\n\n'
	$(RUN) pretraining.py $(ON) --num_epochs 4 --max_steps 156 --batch_size $(if $(PHOTOS),32,128) --knn_every 0 --output_dir runs/demo
	@printf '\n2. A minute is too short to learn much. The encoder cifar10-narrow has had three hours, on photographs without labels.\n'
	@printf 'Here are test images that it has never seen, of $(IMAGES): a classifier on its features, and one on those of random weights.\n\n'
	$(RUN) linearevaluation.py --encoder_weights none $(ON) --cached_features --knn --output_dir runs/demo/random
	$(RUN) linearevaluation.py --encoder_weights cifar10-narrow $(ON) --cached_features --knn --output_dir runs/demo/cifar10-narrow
	@printf '\nSide by side, and on a page with the most similar images:\n\n'
	$(RUN) report.py runs/demo --beside cifar10-narrow --beside none

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
