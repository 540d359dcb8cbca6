# make run: everything from nothing to the results.   make test: everything the tests need, and the tests.
PYTHON ?= python3
OUT ?= out/run
WORKERS ?= 2
SKIPS ?= any# CI says expected: then a test that is skipped for an unlisted reason fails
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run test test-extras test-gpu bench-gpu bench-quantised check nbdev3 slow study paper lab docs docs-serve readme bench audit clean

run: .venv/installed  ## find functional networks of the default model, ablate them, write a report to $(OUT)
	$(BIN)/llmfact run --out $(OUT) $(ARGS)

test: .venv/installed-dev .venv/installed-docs  ## check that notebooks, library and README are in step; run notebooks and tests
	$(BIN)/llmfact fetch smollm2-135m wiki capitals rotten-tomatoes
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(WORKERS) --timing
	$(PYTEST) tests -m "not slow and not extra" -n $(WORKERS) --dist loadfile --durations 25 $(TESTS)

test-extras: .venv/installed-dev .venv/installed-bench .venv/installed-lm_eval .venv/installed-cluster .venv/installed-quantized nbdev3  ## what needs further packages (lm-eval, nilearn, dask, torchao, bitsandbytes, nbdev 3) or many processes; a few minutes
	$(PYTEST) tests -m "extra and not slow" -n $(WORKERS) --dist loadfile --durations 25 $(TESTS)

check: .venv/installed-dev  ## one notebook and its tests: make check NB=03_ica, make check NB=study/06_verdicts
	@test -f nbs/$(NB).ipynb || { echo "NB=$(NB) is no notebook; say NB=03_ica or NB=study/06_verdicts"; exit 1; }
	$(BIN)/nbdev_export
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path nbs/$(NB).ipynb --n_workers 1
	$(PYTEST) -x -m "not slow and not extra" $(or $(wildcard tests/test_$(STEM).py),$(shell grep -l "$(STEM) import" tests/test_*.py),tests/test_in_step.py)

STEM = $(shell echo $(notdir $(NB)) | sed 's/^[0-9]*_//')
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --skips $(SKIPS)

nbdev3: .venv/installed-nbdev3  ## that the newest nbdev exports the same modules; it cannot share an environment with the pinned one
	.venv-nbdev3/bin/python tests/nbdev3.py

.venv/installed-nbdev3: .venv/bin/python pyproject.toml
	$(PYTHON) -m venv .venv-nbdev3
	.venv-nbdev3/bin/python -m pip install -q "nbdev>=3.3,<4"
	@touch $@

slow: .venv/installed-dev  ## everything slow; hours: the long cells and tests that `make test` leaves out
	$(BIN)/llmfact fetch smollm2-135m wiki
	$(BIN)/nbdev_test --n_workers 1 --flags slow
	$(BIN)/python -m pytest -q tests -m slow --durations 25

study: .venv/installed-peft  ## does it matter which neurons are fine-tuned? Both tasks side by side, one thread each; hours, and the same command goes on
	$(BIN)/llmfact fetch smollm2-135m wiki sotu rotten-tomatoes
	OMP_NUM_THREADS=1 $(BIN)/llmfact study tuning --task reviews --out out/tuning & reviews=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/llmfact study tuning --task speeches --out out/tuning; speeches=$$?; wait $$reviews && exit $$speeches

paper: .venv/installed  ## every study of the paper with its controls, then its figures and tables; an hour or two on two cores, and the same command goes on. GRID=--grid: every factor with every control, a day or more
	$(BIN)/llmfact fetch smollm2-135m wiki sotu rotten-tomatoes
	$(BIN)/llmfact study paper --out out/paper $(GRID)

lab: .venv/installed-lab  ## read and run the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

docs: .venv/installed-dev .venv/installed-docs  ## the documentation site, in _docs; nothing is executed or fetched for it
	$(BIN)/python docs/make_site.py

docs-serve: docs  ## look at it: http://127.0.0.1:8000
	$(BIN)/python -m http.server --directory _docs --bind 127.0.0.1 8000

readme: .venv/installed-dev  ## write README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

bench: .venv/installed-bench  ## the benchmarks of benchmarks/README.md; give them a quiet machine
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/masking.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/ica.py
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/evaluate.py

bench-quantised: .venv/installed-quantized  ## memory of a tuning step on a base of 8 or 4 bits; a quarter of an hour, and 6 GB
	$(BIN)/python benchmarks/quantised.py

bench-gpu: .venv/installed-dev  ## what a GPU brings, within ten minutes on one: benchmarks/README.md. GPU="--device cpu --small": the same code without one
	$(BIN)/llmfact fetch smollm2-135m wiki
	$(BIN)/python benchmarks/gpu.py $(GPU)

test-gpu: .venv/installed-dev  ## the tests that need a GPU: that it gives what the CPU gives
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'no GPU here: torch ' + torch.__version__ + ' finds none')"
	$(PYTEST) tests -m gpu $(TESTS)

audit: .venv/installed-audit  ## known weaknesses of the installed packages; asks a service on the network
	$(BIN)/pip-audit

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed; this is ' + sys.version if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python settings.ini setup.py constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

.venv/installed-%: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(subst _,-,$*)]"
	@touch $@

clean:  ## remove what make made, but not the fetched models and texts in the user's cache
	rm -rf .venv .venv-nbdev3 out build dist _docs _proc *.egg-info .pytest_cache .mypy_cache .ruff_cache nbs/_quarto.yml nbs/nbdev.yml nbs/sidebar.yml
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
