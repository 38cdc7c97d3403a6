# Everything here needs only python3 (3.10 to 3.13, with venv and pip), make and cc; each target does its own set-up.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# The oldest TensorFlow that is supported and one between; the newest is the one in $(VENV).
MATRIX ?= 2.16.2 2.18.1

# With a driver, the CUDA libraries that TensorFlow needs to see a GPU.
EXTRA := $(if $(wildcard /proc/driver/nvidia/version),cuda,tensorflow)

# For instance: make test PYTEST="tests/policy -x"
PYTEST        ?=
PYTEST_MATRIX ?= -m matrix

# The hook is copied into an environment, so a change to it means to install again.
INSTALLED := pyproject.toml tfenv/runtime/finder.py tfenv/deploy/tfenv.pth

.PHONY: help venv test lint generate generated docs test-matrix test-lowest demo bench build clean

help:
	@echo "make demo         what TensorFlow takes without and with a policy, side by side"
	@echo "make test         all checks and all tests"
	@echo "make test-matrix  the tests of applying a policy, on TensorFlow $(MATRIX)"
	@echo "make test-lowest  the tests without TensorFlow, on the lowest versions of the dependencies"
	@echo "make lint         the checks alone: ruff, mypy, basedpyright, generated files"
	@echo "make generate     writes the generated files anew, after a change of schemas/tfgpu.schema.json"
	@echo "make docs         the documentation site, into site/"
	@echo "make bench        the benchmarks"
	@echo "make build        the wheel and the sdist, into dist/"
	@echo "make clean        removes the environments and what tools left behind"

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

.venv-tf%/.installed: $(INSTALLED)
	$(call make_venv,.venv-tf$*)
	.venv-tf$*/bin/python -m pip install --quiet --editable . "tensorflow==$*" --group test
	@touch $@

# They are made through a pattern rule; without this, make would take the stamps away again.
.PRECIOUS: .venv-tf%/.installed

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

# Two workers for two cores; a file stays together, its tests share what is costly to start.
WORKERS ?= -n 2 --dist loadfile

test: venv lint
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST)

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

test-tf%: .venv-tf%/.installed
	.venv-tf$*/bin/python -m pytest $(WORKERS) $(PYTEST_MATRIX)

test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -m "not tensorflow and not slow" tests/policy tests/config tests/gpus tests/audit

# ---- other

demo: venv
	sample_configs/demo/run $(BIN)/python

bench: venv
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/import_tf.py
	$(BIN)/python benchmarks/clamp.py
	$(BIN)/python benchmarks/lease.py
	$(BIN)/python benchmarks/audit.py
	$(BIN)/python benchmarks/machine_policy.py
	$(BIN)/python benchmarks/resolver.py

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

build: venv
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf .venv .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
