# Every recipe sets .venv up first where that is needed; see tools/bootstrap.py.
# Paths are relative so that the checkout may lie in a folder with spaces.

PAPERS ?=
ARGS ?=

.DEFAULT_GOAL := help
.SILENT:
.PHONY: help run test lint format bench atlas docs install weights browser constraints wheel clean distclean

# The first Python that starts runs the set-up, which looks for a newer one where that is too old.
# Running it is the test: version managers leave shims on PATH for versions that are switched off.
in_venv = for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python); do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 6))' >/dev/null 2>&1; then \
	exec "$$python" tools/bootstrap.py $(1); fi; done; \
	echo 'Stiefel needs Python 3.11 or newer, and $(if $(PYTHON),$(PYTHON) does not start one,there is none on PATH); install one, or name one: make PYTHON=/path/to/python3.13 ...' >&2; exit 1

help: ## Show this
	echo 'make TARGET [NAME=VALUE]'; \
	sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r target text; do \
	printf '  %-12s %s\n' "$$target" "$$text"; done

run: ## Check every paper's claim here (PAPERS="rmnp s4d": some) and build the page of results
	$(call in_venv,--weights -m stiefel reproduce $(PAPERS) --scale laptop --out build/results --page build/atlas $(ARGS))

test: ## Linters, import contracts, types and tests (ARGS="tests/linalg -k polar": some tests)
	$(call in_venv,--weights --browser tools/check.py $(ARGS))

lint: ## The same without the tests
	$(call in_venv,tools/check.py --lint)

format: ## Format the code and fix what ruff can fix
	$(call in_venv,-m ruff check --fix-only)
	$(call in_venv,-m ruff format)

bench: ## Time ours against others in one run (BENCH=layers: another file of benchmarks/)
	$(call in_venv,benchmarks/$(or $(BENCH),run).py $(ARGS))

atlas: ## Build the page again from the results that are there
	$(call in_venv,-m stiefel atlas --results build/results --out build/atlas $(ARGS))

docs: ## Build the documentation, with a reference of every public name, into build/docs
	$(call in_venv,-m sphinx -W --keep-going -q -d build/docs/.doctrees docs build/docs $(ARGS))

install: ## Only set .venv up
	$(call in_venv,)

weights: ## Set .venv up with the pretrained weights that some cards read (260 MB)
	$(call in_venv,--weights)

browser: ## Set .venv up with what the browser tests need (Chromium by apt-get, axe-core by npm)
	$(call in_venv,--browser)

constraints: ## Move constraints.txt to the newest releases (torch stays)
	$(call in_venv,tools/constraints.py)

wheel: ## Build the source archive and, from it, the wheel, into dist/
	$(call in_venv,-m build --no-isolation)

clean: ## Remove what was built and cached; keeps .venv
	rm -rf build dist .cache .hypothesis .pytest_cache .ruff_cache .import_linter_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf .venv
