# Everything here needs only python3 (3.10 to 3.13, with venv and pip), make and cc; each target does its own set-up.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# The oldest TensorFlow that is supported and one between. The newest is the one in $(VENV).
OLDEST := 2.16.2
MATRIX ?= $(OLDEST) 2.18.1

# With a driver, the CUDA libraries that TensorFlow needs to see a GPU.
EXTRA := $(if $(wildcard /proc/driver/nvidia/version),cuda,tensorflow)
SIZE  := $(if $(filter cuda,$(EXTRA)),3.4 GB with CUDA,600 MB)

# For instance: make test PYTEST="tests/policy -x". With `--exhaustive` a file has all its tests.
PYTEST        ?=
PYTEST_MATRIX ?= -m matrix

# The hook is copied into an environment, so a change to it means to install again.
INSTALLED := pyproject.toml tfenv/runtime/finder.py tfenv/deploy/tfenv.pth

.PHONY: help venv test test-all test-rest test-torch bytecode lint generate generated docs test-matrix test-gpu test-lowest demo pictures
.PHONY: bench build clean

help:
	@echo "make demo         shows what TensorFlow takes without and with a policy, side by side."
	@echo "make test         runs the checks and the tests that a change can break, in half an hour on two slow cores."
	@echo "make test-all     runs make test and then all it leaves out, also on TensorFlow $(OLDEST) and on PyTorch."
	@echo "make test-torch   runs the tests with PyTorch, in an environment of its own."
	@echo "make test-matrix  runs the tests of applying a policy on TensorFlow $(MATRIX)."
	@echo "make test-gpu     runs the tests that need a real GPU, see docs/hardware.md."
	@echo "make test-lowest  runs the tests without TensorFlow on the lowest versions of the dependencies."
	@echo "make lint         runs the checks alone: ruff, mypy, basedpyright, generated files."
	@echo "make generate     writes the generated files anew, after a change of schemas/."
	@echo "make pictures     draws the pictures in docs/assets/pictures anew, from real runs."
	@echo "make docs         builds the documentation site in site/."
	@echo "make bench        runs the benchmarks."
	@echo "make build        builds the wheel and the sdist in dist/."
	@echo "make clean        removes the environments and what tools left behind."
	@echo
	@echo "make test PYTEST=tests/policy/test_limits.py runs the tests of one file."

# ---- environments

venv: $(VENV)/.installed

# pip reads [dependency-groups] from 25.1 on.
define make_venv
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
endef

$(VENV)/.installed: $(INSTALLED)
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRA)]" --group dev
	@touch $@

# What the demo needs: TensorFlow and tfenv. `make test` adds the development group to the same environment.
# Python compiles what it imports, so pip does not compile all of TensorFlow.
$(VENV)/.demo: $(INSTALLED)
	@echo "Installing tfenv and TensorFlow into $(VENV) (TensorFlow is about $(SIZE)) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --no-compile --editable ".[$(EXTRA)]"
	@touch $@

.venv-tf%/.installed: $(INSTALLED)
	$(call make_venv,.venv-tf$*)
	.venv-tf$*/bin/python -m pip install --quiet --editable . "tensorflow==$*" --group test
	@touch $@

# They are made through a pattern rule; without this, make would take the stamps away again.
.PRECIOUS: .venv-tf%/.installed

# PyTorch depends on gigabytes of NVIDIA's libraries, which simulated GPUs do not need. So it comes without what it depends
# on, and the group `torch` has the rest. Newer ones may call what the simulated GPUs do not have.
.venv-torch/.installed: $(INSTALLED)
	$(call make_venv,.venv-torch)
	.venv-torch/bin/python -m pip install --quiet --editable ".[tensorflow]" --group test --group jax --group torch
	.venv-torch/bin/python -m pip install --quiet --no-deps "torch>=2.6,<2.15"
	@touch $@

.venv-lowest/.installed: $(INSTALLED) .ci/lowest.txt
	$(call make_venv,.venv-lowest)
	.venv-lowest/bin/python -m pip install --quiet --editable . --constraint .ci/lowest.txt --group test
	@touch $@

# The site needs neither TensorFlow nor tfenv.
.venv-docs/.installed: pyproject.toml
	$(call make_venv,.venv-docs)
	.venv-docs/bin/python -m pip install --quiet --group docs
	@touch $@

# ---- checks and tests

# Two workers for two cores. A file stays together, as its tests share what is costly to start, and costly files are
# first (tests/selection.py), so that no worker is alone with one in the end.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder

test: venv lint bytecode
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST)

# Tests start thousands of processes, many of them as users who cannot write here. Each would compile tfenv anew.
bytecode:
	@$(PYTHON) -m compileall -q tfenv

test-all: test test-rest test-tf$(OLDEST) test-torch

# What `make test` leaves out: costly tests, and twenty times the examples of each property.
test-rest: venv bytecode
	$(BIN)/python -m pytest $(WORKERS) --exhaustive -m exhaustive $(PYTEST)

test-torch: .venv-torch/.installed bytecode
	.venv-torch/bin/python -m pytest $(WORKERS) --exhaustive -m torch $(PYTEST)

lint: venv generated
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

generate: venv
	$(BIN)/python tools/generate.py

generated: venv
	$(BIN)/python tools/generate.py --check

test-matrix: $(MATRIX:%=test-tf%)

test-tf%: .venv-tf%/.installed bytecode
	.venv-tf$*/bin/python -m pytest $(WORKERS) --exhaustive $(PYTEST_MATRIX)

# On a machine with a GPU. What was measured is written into the folder that TFGPU_FIGURES names.
test-gpu: venv
	$(BIN)/python -m pytest -m gpu tests/hardware $(PYTEST)

test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -m "not tensorflow" tests/policy tests/config tests/devices tests/audit

# ---- other

# With the environment of `make test` the demo has nothing to install.
demo: $(if $(wildcard $(VENV)/.installed),venv,$(VENV)/.demo)
	@sample_configs/demo/run $(BIN)/python

pictures: venv
	$(BIN)/python tools/pictures.py

bench: venv
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/import_framework.py
	$(BIN)/python benchmarks/import_framework.py --framework jax
	$(BIN)/python benchmarks/clamp.py
	$(BIN)/python benchmarks/lease.py
	$(BIN)/python benchmarks/wall.py
	$(BIN)/python benchmarks/audit.py
	$(BIN)/python benchmarks/replay.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/machine_policy.py
	$(BIN)/python benchmarks/policy_tests.py
	$(BIN)/python benchmarks/resolver.py

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	@echo "Open site/index.html in a browser."

build: venv
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf .venv .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
