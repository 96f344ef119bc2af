# make train and make test need git, make and Python 3.10 to 3.13, nothing else. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
# More arguments for the command that a target runs, as in: make train ARGS="--epochs 5 --seed 1"
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.fastdeit-installed
# One thread in each of the test processes, of which there is one per core.
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: help install train test test-long test-fast coverage docs notebook test-compiled test-pillow test-transformers-4 lint kernels bench clean

help:
	@echo "make install   create $(VENV) and install fastdeit into it, with the versions of constraints.txt"
	@echo "make train     install, then train a small distilled DeiT on real digits (about 5 minutes on 2 cores)"
	@echo "make test      install, then run the tests, all but the longest ones (at most 20 minutes on 2 cores)"
	@echo "make test-long install, then run the longest tests: whole trainings, kills, two processes, host time"
	@echo "make test-fast install, then run a selection of the tests in at most 90 seconds on 2 cores"
	@echo "make coverage  install, then run all tests and report the share of lines that they run (minutes longer)"
	@echo "make test-compiled  install, then execute the compiled code of every shipped kernel on the CPU"
	@echo "make test-pillow  install, then run the tests of images and augmentation on the newest Pillow"
	@echo "make test-transformers-4  install, then run the tests of transformers 4.57 on that version"
	@echo "make lint      install, then ruff check, ruff format --check and mypy"
	@echo "make docs      install, then build the site of the documentation into build/site, links checked"
	@echo "make notebook  install, then execute examples/two_tokens.ipynb into build/ (minutes of training)"
	@echo "make kernels   install, then compile every kernel configuration and report on it"
	@echo "make bench     install, then run the short benchmarks (on a GPU)"
	@echo "make clean     remove what builds and tools left; keeps $(VENV) and runs/"

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON) here. Use: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastdeit needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Use: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "$(PYTHON) cannot create virtual environments (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[train,loader,test,bench,hosts]'
	@touch $@

train: $(STAMP)
	$(BIN)/fastdeit train $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 16 --dist worksteal -m 'not long' $(ARGS)

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 16 --dist worksteal -m long --durations 0 $(ARGS)

# A look at every layer: the rules on the source, ops under the interpreter, blocks, models, costs, a command, the docs.
FAST := tests/test_source_rules.py tests/test_type_check.py tests/test_explanation.py tests/test_documentation.py tests/blocks tests/cost \
	tests/ops/test_layer_norm.py tests/nn/test_mlp.py tests/commands/test_explain.py tests/train/test_config.py

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 16 --dist worksteal $(FAST) -k 'not 8192 and not repeated_runs' $(ARGS)

# Kernels count too: the interpreter runs their Python. sysmon, the default from Python 3.14 on, slows tests down least.
coverage: $(STAMP)
	COVERAGE_CORE=sysmon OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 16 --dist worksteal --cov --cov-report term $(ARGS)

# sm_89 and sm_100 differ from sm_80 and sm_90 in few instructions: there one schedule is enough.
test-compiled: $(STAMP)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(BIN)/python -m fastdeit.testing.ptx --arch sm_80 --arch sm_90 --thorough $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(BIN)/python -m fastdeit.testing.ptx --arch sm_89 --arch sm_100 $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/testing/ptx/test_on_a_model.py --on ptx:sm_90

# Beside the environment, whose Pillow stays that of constraints.txt.
test-pillow: $(STAMP)
	rm -rf build/pillow
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target build/pillow pillow
	@PYTHONPATH=build/pillow $(BIN)/python -c 'import PIL; print("Pillow", PIL.__version__, "from", PIL.__path__[0])'
	PYTHONPATH=build/pillow OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/train/test_policies.py tests/train/test_image_files.py $(ARGS)

# Beside the environment, whose transformers is that of constraints.txt; with what that version needs in older versions.
test-transformers-4: $(STAMP)
	rm -rf build/transformers-4
	$(BIN)/python -m pip install --quiet --target build/transformers-4 --no-deps \
		transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2 requests charset-normalizer idna urllib3 certifi
	@PYTHONPATH=build/transformers-4 $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONPATH=build/transformers-4 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/hosts/test_huggingface_4.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/type_check.py

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo build/site/index.html

notebook: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[notebook]'
	$(BIN)/python -m jupyter nbconvert --to notebook --execute --output-dir build examples/two_tokens.ipynb

kernels: $(STAMP)
	$(BIN)/fastdeit kernels $(ARGS)

bench: $(STAMP)
	$(BIN)/fastdeit bench $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find fastdeit kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
