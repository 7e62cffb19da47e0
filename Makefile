# Set-up and the main jobs. Needs Python 3.11 or newer (PYTHON=...) and make, nothing else.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Hydra overrides for the jobs below, such as ARGS="data=busi data.root=/path/to/BUSI profile=quick"
ARGS ?=
STORE := $(or $(patsubst store=%,%,$(filter store=%,$(ARGS))),multirun)
# What make demo trains unless ARGS has a profile.
QUICK := $(if $(filter profile=%,$(ARGS)),,profile=quick $(if $(filter train.epochs=%,$(ARGS)),,train.epochs=6))
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev
EXTRAS := export,dicom,slurm,weights
# What is imported is compiled then, once; pip would compile 23,000 files, most of which nothing imports.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all mutants chaos bench gpu growth lint types table3 table4 table5 effects figure2 figures report results model ui trials clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'ARGS="..." passes Hydra overrides to demo, table3, table4, figure2, figures and report'

setup: $(READY) ## Make .venv with everything that runs (about 6 GB)

define install
$(PYTHON) -c 'import sys; sys.exit("kdsweep needs Python 3.11 or newer, PYTHON=%s is %s" % (sys.executable, sys.version.split()[0])) if sys.version_info < (3, 11) else None'
$(PYTHON) -m venv $(VENV)
$(PY) -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$(1)]'
@touch $(READY) $@
endef

$(READY) $(DEV): pyproject.toml kdsweep/plugins/hydra_plugins/kdsweep_lockstep.py  # both are copied when it is installed

$(READY):
	$(call install,$(EXTRAS))

$(DEV):
	$(call install,dev)

demo: setup ## The 12 cells, Student and Teachers on phantoms, small and short, then Tables 3 and 4
	$(PY) -m kdsweep -m +experiment=table4 $(if $(filter split=%,$(ARGS)),,split=s0) $(QUICK) $(ARGS)
	@$(PY) -m kdsweep tables table3 table4 --store $(STORE)
	@printf '%s\n' '' 'This was the whole machinery on synthetic images, with small networks: its scores are no result.' \
	  'The tables are in $(STORE)/tables, the networks in $(STORE)/cells. Next:' \
	  '  make ui                                    # the runs in MLflow, on http://127.0.0.1:5000' \
	  '  $(PY) -m kdsweep -m +experiment=table4 data=busi data.root=/path/to/BUSI    # your images'

test: $(DEV) ## Run the tests that need seconds each
	$(PYTEST) -m 'not slow and not slurm'

test-all: $(DEV) ## Run all tests, also those with servers, clusters, browsers, installs, simulations
	$(PYTEST)

results: $(DEV) ## Make the tables of results/ of their published scores again and compare them; a difference fails
	$(PY) -m pytest -q tests/results/test_remade.py

mutants: $(DEV) ## Change losses, scores, statistics, splits and views bit by bit with mutmut; a test must fail each time (an hour)
	OMP_NUM_THREADS=1 $(VENV)/bin/mutmut run $(ARGS); $(VENV)/bin/mutmut results

chaos: $(DEV) ## Kill a sweep 20 times at random moments; it must end as an unbroken one (15 minutes; ARGS="--help" for options)
	$(PY) tests/chaos.py $(ARGS)

bench: $(DEV) ## Measure lockstep against one by one, torchdistill and bare Students (20 minutes; ARGS="--help" for options)
	$(PY) benchmarks/bench.py $(ARGS)

gpu: $(DEV) ## Measure on a CUDA device: Table 4's time, lockstep, a profile, torchdistill, tests (9 minutes; STUDY=1 runs Table 4)
	$(PY) benchmarks/gpu.py $(if $(STUDY),--study --store $(STORE)) $(ARGS)

growth: $(DEV) ## Measure plan and bookkeeping of 100, 1,000 and 10,000 cells, training stubbed (an hour; ARGS="--help" for options)
	$(PY) benchmarks/growth.py $(ARGS)

lint: $(DEV) ## Check style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(DEV) ## Check types
	$(PY) -m mypy

table3: setup ## Run the 12 cells of one split (finished ones are not run again) and print Table 3
	@$(PY) -m kdsweep -m +experiment=table3 $(ARGS); code=$$?; $(PY) -m kdsweep tables table3 --store $(STORE) && exit $$code

table4: setup ## Run 12 cells and Student on three splits (finished ones are not run again) and print Table 4
	@$(PY) -m kdsweep -m +experiment=table4 $(ARGS); code=$$?; $(PY) -m kdsweep tables table4 --store $(STORE) && exit $$code

table5: setup ## Measure what Teacher, Student and best cell of the last sweep cost here, and print Table 5
	@$(PY) -m kdsweep tables table5 --store $(STORE)

effects: setup ## Print which of path, loss and teacher augmentation mattered in the last sweep
	@$(PY) -m kdsweep tables effects --store $(STORE)

figure2: setup ## Draw Figure 2: one test image with the contours of all models (of the last sweep, or of that of ARGS)
	@$(PY) -m kdsweep figures figure2 $(ARGS)

figures: setup ## Draw all figures of the last sweep: contours, effects, learning curves, each image against Student
	@$(PY) -m kdsweep figures all $(ARGS)

report: setup ## Write one HTML file on the last sweep: what was run, tables, effects, figures, every cell
	@$(PY) -m kdsweep report $(ARGS)

model: setup ## Export the best distilled Student of the last sweep as ONNX with its model card (STORE/model)
	@$(PY) -m kdsweep export --run best --store $(STORE) --out $(STORE)/model/student.onnx

ui: setup ## Open the MLflow UI on http://127.0.0.1:5000
	@echo 'runs, the best first: http://127.0.0.1:5000/#/experiments/1/runs?searchFilter=tags.%60kdsweep.split%60%20%3D%20%220%22&orderByKey=metrics.%60test%2Fdice%60&orderByAsc=false&workflowType=machine_learning'
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(VENV)/bin/mlflow ui --host 127.0.0.1 --port 5000 \
		--backend-store-uri sqlite:///$(abspath $(STORE))/mlflow.db

trials: $(DEV) ## Open Optuna's dashboard on the studies of +experiment=tuned: http://127.0.0.1:8080
	$(VENV)/bin/optuna-dashboard --host 127.0.0.1 --port 8080 sqlite:///$(abspath $(STORE))/optuna.db

clean: ## Remove caches and build output (never multirun/)
	rm -rf build dist mutants .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kdsweep tests -name __pycache__ -type d -prune -exec rm -rf {} +
