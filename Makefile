# make demo           build a student of the embedded teacher, end to end      make check   ruff and mypy
# make test           the tests                                                make clean   remove what these made
# make test-gpu       training on this machine's GPU; installs nothing: .venv, or else PYTHON, has torch and transformers
# make test-targets   the demo's files on emulated processors, in Chromium and in node; installs these first
# make faults         100 kills in all stages, full disks, too little memory, 10,000 damaged inputs; an hour, continues
#                     where it was stopped; KILLS=, MUTATIONS= and SEED= change that
# Two test workers with one computing thread each: threads that wait for each other's core are ten times slower.
# Everything is installed into .venv first; PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OPTIMUM = .venv-optimum
NODE = tests/node/node_modules
DEMO_OUT ?= demo-out
# What depends on the version of transformers: every family through every stage and format, and a whole build.
FAMILY_TESTS = $(foreach name,checkpoint families identity start any_shape clone trainer fold tokenizer to_gguf to_onnx \
	one_grid onnxrt optimum end_to_end every_axis,$(wildcard tests/*/test_$(name).py))

# Every processor that is emulated, both browsers' runtimes, and this machine's own.
TARGETS = android-low raspberry-pi-5 android-high browser-desktop laptop-$(if $(filter x86_64,$(shell uname -m)),x86,arm64)

KILLS ?= 100
MUTATIONS ?= 10000
SEED ?= 1

.PHONY: demo test test-optimum test-gpu test-targets faults check clean

demo: $(VENV)/installed
	$(BIN)/lrc-edge build examples/demo/storyteller --data examples/demo/stories.jsonl --recipe examples/demo/recipe.toml --out $(DEMO_OUT)

test: $(VENV)/installed $(NODE)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not targets and not machine" -n 2

# transformers 4.57 and optimum's ONNX classes, which do not run on transformers 5.
test-optimum: $(OPTIMUM)/installed
	OMP_NUM_THREADS=1 $(OPTIMUM)/bin/pytest -m "not slow and not targets and not machine" -n 2 $(FAMILY_TESTS)

# From the checkout, whose folder lrc_edge links to the others.
test-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m pytest -vv -rs -p no:cacheprovider tests/gpu

test-targets: demo
	$(BIN)/lrc-edge targets setup --yes $(TARGETS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m targets -n 2
	$(BIN)/lrc-edge check $(DEMO_OUT) $(TARGETS:%=--target %)

faults: $(VENV)/installed
	PYTHONPATH=tests:tests/support $(BIN)/python -m faults --same 2 --kills $(KILLS) --disk 30 --memory 45 --mutations $(MUTATIONS) \
		--seed $(SEED) --log build/faults.jsonl

check: $(VENV)/installed
	$(BIN)/ruff check .
	MYPYPATH=. $(BIN)/mypy -p lrc_edge

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OPTIMUM)/installed: pyproject.toml constraints-optimum.txt
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/pip install --quiet --constraint constraints-optimum.txt torch
	$(OPTIMUM)/bin/pip install --quiet --constraint constraints-optimum.txt --editable '.[optimum,test]'
	touch $@

# transformers.js with onnxruntime for node, 474 MB. Without npm its tests are skipped.
$(NODE)/installed: tests/node/package.json
	if command -v npm > /dev/null; then cd tests/node && npm install --ignore-scripts --no-package-lock --loglevel=error && touch node_modules/installed; fi

clean:
	rm -rf $(VENV) $(OPTIMUM) $(NODE) $(DEMO_OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
