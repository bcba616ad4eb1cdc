# Every target first makes the environment that it runs in, and brings it up to date when
# pyproject.toml or constraints.txt has changed. Two variables:
#   make train PYTHON=python3.12        the Python to make the environment with
#   make train ARGS="--lr 1e-3"         more arguments for what the target runs

.PHONY: FORCE help train test test-faults bench results check format test-tlens4 env hooks clean

TLENS4 := 4.3.0
SAES := sparsify/scripts/train_tlens_saes

help:
	@echo "make train        train an SAE end to end in the bundled language model, and evaluate it"
	@echo "make test         all tests"
	@echo "make test-faults  those that kill runs, fill disks, damage files and the like"
	@echo "make bench        time training steps beside a plain reference step"
	@echo "make results      all runs, tables and plots of docs/results.md: some hours"
	@echo "make check        lint, format and types; changes no file"
	@echo "make format       repair format, and what of lint repairs itself"
	@echo "make test-tlens4  the tests that drive a model, with TransformerLens $(TLENS4)"
	@echo "make env          only the environment, .venv"
	@echo "make hooks        have git run 'make check' before every commit"
	@echo "make clean        remove environments and caches; runs stay"

train: .venv/ready
	.venv/bin/python $(SAES)/run_train_tlens_saes.py $(SAES)/tiny_python_quick.yaml $(ARGS)

test: .venv/ready
	.venv/bin/python -m pytest $(ARGS)

test-faults: .venv/ready
	.venv/bin/python -m pytest -m fault $(ARGS)

bench: .venv/ready
	.venv/bin/python sparsify/scripts/benchmark/run_benchmark.py $(ARGS)

results: .venv/ready
	.venv/bin/python sparsify/scripts/results/run_results.py $(ARGS)

check: .venv/ready
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m basedpyright --pythonpath .venv/bin/python

format: .venv/ready
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

test-tlens4: .venv-tlens4/ready
	.venv-tlens4/bin/python -m pytest -m model $(ARGS)

env: .venv/ready

hooks: .venv/ready
	.venv/bin/python -m pre_commit install

clean:
	rm -rf .venv .venv-tlens4 .hypothesis .pytest_cache .ruff_cache build *.egg-info
	find sparsify tests -name __pycache__ -prune -exec rm -rf {} +

# FORCE if environment $(1) was made for a copy of this folder, whose code it would run, or with
# another Python than the one that is asked for.
stale = $(shell if [ -e $(1)/ready ]; then \
	grep -qxF 'folder=$(CURDIR)' $(1)/ready \
	&& { [ -z '$(PYTHON)' ] || grep -qxF 'python=$(PYTHON)' $(1)/ready; } || echo FORCE; fi)

PYTHONS = $(if $(PYTHON),'$(PYTHON)',python3 python3.14 python3.13 python3.12 python3.11 python)
NO_PYTHON = $(if $(PYTHON),PYTHON=$(PYTHON) is not,none is on the PATH)

# Make environment $(1) with the extra $(2), under the constraints that the command $(3) prints.
# The environment is made from scratch unless all that changed is what belongs into it.
define make_environment
@for python in $(PYTHONS); do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	python=; \
done; \
if [ -z "$$python" ]; then \
	echo "error: sparsify needs Python 3.11 or newer, and $(NO_PYTHON); set one: make PYTHON=/path/to/python3.11" >&2; \
	exit 1; \
fi; \
set -e; \
echo "Installing into $(1): 1 to 3 minutes, more if torch (up to 3 GB on Linux) is not yet downloaded ..."; \
if [ -n "$(filter FORCE,$^)" ] || ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
	"$$python" -m venv --clear $(1); \
fi; \
$(3) > $(1)/constraints.txt; \
$(1)/bin/python -m pip install -q --disable-pip-version-check -c $(1)/constraints.txt -e '.[$(2)]'; \
printf '%s\n' 'folder=$(CURDIR)' 'python=$(PYTHON)' > $(1)/ready
endef

.venv/ready: pyproject.toml constraints.txt $(call stale,.venv)
	$(call make_environment,.venv,dev,cat constraints.txt)

# What TransformerLens 4 needs is a part of what 3.9 needs, in versions that suit both, so the second
# environment has the same constraints, except for one line.
.venv-tlens4/ready: pyproject.toml constraints.txt Makefile $(call stale,.venv-tlens4)
	$(call make_environment,.venv-tlens4,test,sed 's/^transformer-lens==.*/transformer-lens==$(TLENS4)/' constraints.txt)
