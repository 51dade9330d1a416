# Two commands: `make quickstart` trains a model and shows what it writes, `make test` passes the tests.
# Both make their own environment in .venv; nothing outside this folder is touched.

# The newest Python that runs, of those that the newest jax supports, on the path or pyenv's, whose shims are on the path
# for versions that do not run. 3.13.0 is passed over: in the tests a thread of tensorstore, which reads checkpoints,
# crashed in it. The figures in README are of Python 3.11: make PYTHON=python3.11
PYTHONS := $(foreach v,3.14 3.13 3.12 3.11,python$(v) $(wildcard $(HOME)/.pyenv/versions/$(v).*/bin/python$(v)))
PYTHON ?= $(shell for p in $(PYTHONS) python3; do $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:3] == (3, 13, 0))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
CONFIG ?= configs/quickstart.py
TOPOLOGY ?= v5e:2x2
RUN ?= runs/assistant
PYTEST := $(VENV)/bin/python -m pytest
PARALLEL := -n auto --dist loadfile  # what the tests of a file share is made once

# What `make test-core` runs, for another Python, another jax or another processor: the numbers of the network and of
# training, what a compiler can get wrong, and what changes with the versions of libraries: files, tokenizers, the command.
CORE := $(addprefix tests/test_,xla.py model.py optimizer.py objectives.py mesh.py sampling.py batches.py tokenizer.py \
	storage.py cli.py recipe.py)

.PHONY: quickstart assistant chat plan test test-core test-slow test-all test-hf test-browser test-spark lint lock clean same-python

quickstart: $(VENV)/.installed
	$(VENV)/bin/llmjax run --config $(CONFIG)

# The quickstart goes on: at most ten minutes more. What is done already is skipped.
assistant: $(VENV)/.installed
	$(VENV)/bin/llmjax run --config configs/quickstart.py
	$(VENV)/bin/llmjax run --config configs/assistant.py

# The page and the server of a run: make chat RUN=runs/smollm2
chat: $(VENV)/.installed-serve
	$(VENV)/bin/llmjax serve --workdir $(RUN)

# make plan CONFIG=configs/runs/llama2.py:maxtext TOPOLOGY=v5p:4x8x8: with the TPU's compiler, on Linux x86-64.
plan: $(VENV)/.installed-plan
	$(VENV)/bin/llmjax plan --config $(CONFIG) --topology $(TOPOLOGY)

# Every promise once.
test: $(VENV)/.installed-test
	$(PYTEST) $(PARALLEL) --durations 20 -m "not slow and not exhaustive"

test-core: $(VENV)/.installed-test
	$(PYTEST) $(PARALLEL) -m "not slow and not exhaustive" $(CORE)

# The same promises in more cases, and what takes long.
test-slow: $(VENV)/.installed-test
	$(PYTEST) $(PARALLEL) --durations 20 -m "slow and not exhaustive"

# Everything, before an issue is resolved; CI has no time for it.
test-all: $(VENV)/.installed-test
	$(PYTEST) $(PARALLEL) --durations 20 -m "slow or exhaustive or not slow"

# The tests that compare with Hugging Face's transformers live, on PyTorch; `make test` compares with stored answers.
test-hf: $(VENV)/.installed-hf
	$(PYTEST) $(PARALLEL) tests/test_hf_decoders.py tests/test_hf_encoders.py tests/test_hf_export.py tests/test_interop_command.py \
		tests/test_adapters_peft.py tests/test_dequantize.py

# The pages in this machine's Chromium (Debian: apt install chromium). Screenshots are in runs/screenshots.
test-browser: $(VENV)/.installed-browser
	LLMJAX_SCREENSHOTS=runs/screenshots $(PYTEST) -n 0 -m "not exhaustive" tests/test_serve_browser.py tests/test_serve_browser_sources.py tests/test_studio_browser.py

# The preparation on Spark, against this machine's own engine; needs Java 17.
test-spark: $(VENV)/.installed-spark
	$(PYTEST) tests/test_prepare_spark.py

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# A Python that is asked for, where there is an environment of another one, would change nothing.
same-python:
ifeq ($(origin PYTHON),command line)
	@[ ! -e $(VENV)/bin/python ] || [ "$$($(VENV)/bin/python -V)" = "$$($(PYTHON) -V)" ] || { \
		echo "$(VENV) has $$($(VENV)/bin/python -V), not $$($(PYTHON) -V): give VENV=.venv-other, or run make clean first"; exit 1; }
endif

$(VENV)/bin/uv: | same-python
	$(PYTHON) -m venv $(VENV) || { echo "llmjax needs Python 3.11 or later with venv: make PYTHON=/path/to/python3"; exit 1; }
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/bin/uv
	.ci/uv $(VENV) install --quiet --python $(VENV)/bin/python -r requirements.lock
	.ci/uv $(VENV) install --quiet --python $(VENV)/bin/python --no-deps --editable .
	touch $@

$(VENV)/.installed-test: requirements-test.lock $(VENV)/.installed
	.ci/uv $(VENV) install --quiet --python $(VENV)/bin/python -r requirements-test.lock
	touch $@

$(VENV)/.installed-hf: $(VENV)/.installed-test
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.ci/uv $(VENV) install --quiet --python $(VENV)/bin/python -c requirements-test.lock transformers==5.23.0 peft==0.21.2
	touch $@

$(VENV)/.installed-browser: $(VENV)/.installed-test
	.ci/uv $(VENV) install --quiet --python $(VENV)/bin/python -c requirements-test.lock "playwright>=1.60,<2" axe-playwright-python==0.1.8
	touch $@

$(VENV)/.installed-spark: $(VENV)/.installed-test
	.ci/uv $(VENV) install --quiet --python $(VENV)/bin/python -c requirements-test.lock "pyspark>=4.1,<5" "pandas>=2.2" setuptools
	touch $@

$(VENV)/.installed-serve: $(VENV)/.installed
	.ci/uv $(VENV) install --quiet --python $(VENV)/bin/python -c requirements-test.lock --editable '.[serve]'
	touch $@

$(VENV)/.installed-plan: requirements-plan.lock $(VENV)/.installed
	.ci/uv $(VENV) install --quiet --python $(VENV)/bin/python -r requirements-plan.lock
	touch $@

# The lock files hold exact versions for every platform and every Python from 3.11 on, and name no registry.
COMPILE = .ci/uv $(VENV) compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate \
	--no-emit-find-links --custom-compile-command "make lock"
lock: | $(VENV)/bin/uv
	$(COMPILE) pyproject.toml -o requirements.lock
	$(COMPILE) --extra test -c requirements.lock pyproject.toml -o requirements-test.lock
	$(COMPILE) --extra plan -c requirements.lock pyproject.toml -o requirements-plan.lock

clean:
	rm -rf .venv .venv-* runs
