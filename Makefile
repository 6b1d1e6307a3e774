# make demo     train on MNIST with flipped labels, find them, train again without them
# make test     lint, format, types, documentation, tests
# make lowest   the core tests on the lowest versions that setup.cfg allows, in .venv-lowest
# make house    the package's layout in figures: files, lines, floors
# make docs     the documentation as a site: build/docs/index.html
# make bench    measure what recording and retracing cost
# make clean    remove the environment, builds and caches
#
# Everything else runs in .venv, made on the first call with the versions of constraints.txt and
# PyTorch's CPU build. Another build of PyTorch (give it on every call, or export it):
#   make demo TORCH="torch==2.13.0"
# Another Python:                make demo PYTHON=python3.12
# Options of the demo:           make demo ARGS="--epochs 4 --seed 1"

PYTHON ?= python3
TORCH ?=
ARGS ?=

VENV := .venv
CONSTRAINTS := constraints.txt
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: demo test lowest core house docs bench clean FORCE
.DELETE_ON_ERROR:

demo: $(VENV)/all.done
	$(PY) examples/mnist_flipped_labels.py $(ARGS)

# pytest comes last, so that the output ends in its summary. Of tests/zoo it runs what is installed.
test: $(VENV)/test.done $(VENV)/zoo.done docs
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -m pytest -n auto --dist worksteal

lowest:
	$(MAKE) core VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

# What is computed and recorded, and each library that setup.cfg names. Warnings count for nothing
# here: old versions are warned of by what is newer. The longest tests that need torch alone, which is
# no older here, are left to `make test`.
CORE := adjoint trajectory ranking fits/test_central_differences.py fits/test_unrolled.py test_retracing_outcome.py \
        report/test_appearance.py report/test_content.py report/test_page.py report/test_destinations.py \
        report/test_progress.py cli/test_configured_options.py
ALIKE := test_gauss_newton.py test_packaged_updates.py

core: $(VENV)/all.done
	$(PIP) install -q -c $(VENV)/constraints.txt lightning pytest pytest-xdist
	$(PY) -m pytest -n auto --dist worksteal -W ignore $(CORE:%=tests/%) $(ALIKE:%=--ignore=tests/adjoint/%)

house:
	$(PYTHON) tests/house.py

# From scratch, since a page that did not change can still link to one that did. Warnings are errors.
docs: $(VENV)/docs.done
	$(PY) -m sphinx --fresh-env --fail-on-warning --keep-going --quiet -d build/doctrees docs build/docs

bench: $(VENV)/all.done
	$(PY) benchmarks/cost.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-lowest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# Rewritten only when TORCH changes.
$(VENV)/torch.choice: FORCE | $(VENV)/pyvenv.cfg
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# PyTorch alone and first, so that nothing else can pull in another build of it. On Linux the
# constraint asks for the "+cpu" build; pip's usual index has none, but uv knows where it lies.
$(VENV)/torch.done: $(CONSTRAINTS) $(VENV)/torch.choice
ifeq ($(strip $(TORCH)),)
	cp $(CONSTRAINTS) $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt torch || { \
	    echo "pip's index has no CPU build of PyTorch: asking uv for it." && \
	    $(PIP) install -q -c $(VENV)/constraints.txt uv && \
	    $(VENV)/bin/uv pip install --python $(PY) --torch-backend cpu -c $(VENV)/constraints.txt torch; }
else
	grep -v '^torch==' $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt '$(TORCH)'
endif
	touch $@

# The package in place, with the extra that gives the file its name.
$(VENV)/all.done $(VENV)/docs.done $(VENV)/test.done: $(VENV)/%.done: $(VENV)/torch.done setup.cfg pyproject.toml
	@echo "Installing lightning-sgdclean[$*] into $(VENV)"
	$(PIP) install -q -c $(VENV)/constraints.txt -e '.[$*]'
	touch $@

# Others' packages whose modules are tested, each if it installs beside the rest: those of the extra like any other,
# those of packages.txt without what they need, into a folder that only their tests look into.
ZOO := $(shell sed -n '/^zoo =/,/^[a-z]/s/^    //p' setup.cfg)
LEFT_OUT = echo "$$line cannot be had: its tests are left out."
$(VENV)/zoo.done: tests/zoo/packages.txt $(VENV)/test.done
	for line in $(ZOO); do \
	    $(PIP) install -q -c $(VENV)/constraints.txt "$$line" || $(LEFT_OUT); \
	done
	rm -rf $(VENV)/zoo
	sed '/^#/d' $< | while read -r line; do \
	    $(PIP) install -q --no-deps --target $(VENV)/zoo -c $(VENV)/constraints.txt $$line || $(LEFT_OUT); \
	done
	touch $@
