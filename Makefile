# Two commands: `make quickstart` trains a model and shows what it writes, `make test` passes the tests.
# Both make their own environment in .venv; nothing outside this folder is touched.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG ?= configs/quickstart.py
TOPOLOGY ?= v5e:2x2

.PHONY: quickstart plan test test-hf test-slow test-spark lint lock clean

quickstart: .venv/.installed
	.venv/bin/llmjax run --config $(CONFIG)

# make plan CONFIG=configs/runs/llama2.py TOPOLOGY=v5p:8x8x8: with the TPU's compiler, on Linux x86-64.
plan: .venv/.installed-plan
	.venv/bin/llmjax plan --config $(CONFIG) --topology $(TOPOLOGY)

test: .venv/.installed-test
	.venv/bin/python -m pytest -n auto -m "not slow"

# The tests that compare with Hugging Face's transformers live, on PyTorch; `make test` compares with stored answers.
test-hf: .venv/.installed-hf
	.venv/bin/python -m pytest -n auto tests/test_hf_decoders.py tests/test_hf_encoders.py tests/test_hf_export.py tests/test_interop_command.py tests/test_chat_template.py

# The preparation on Spark, against this machine's own engine; needs Java 17.
test-spark: .venv/.installed-spark
	.venv/bin/python -m pytest tests/test_prepare_spark.py

test-slow: .venv/.installed-test
	.venv/bin/python -m pytest -n auto -m slow

lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/bin/uv:
	$(PYTHON) -m venv .venv || { echo "llmjax needs Python 3.11 or later with venv: make PYTHON=/path/to/python3"; exit 1; }
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/.installed: requirements.lock pyproject.toml | .venv/bin/uv
	.venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
	touch $@

.venv/.installed-test: requirements-test.lock .venv/.installed
	.venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements-test.lock
	touch $@

.venv/.installed-hf: .venv/.installed-test
	.venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv/bin/uv pip install --quiet --python .venv/bin/python -c requirements-test.lock transformers==5.23.0
	touch $@

.venv/.installed-spark: .venv/.installed-test
	.venv/bin/uv pip install --quiet --python .venv/bin/python -c requirements-test.lock "pyspark>=4.1,<5" "pandas>=2.2" setuptools
	touch $@

.venv/.installed-plan: requirements-plan.lock .venv/.installed
	.venv/bin/uv pip install --quiet --python .venv/bin/python -r requirements-plan.lock
	touch $@

# The lock files hold exact versions for every platform and name no registry.
lock: | .venv/bin/uv
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" pyproject.toml -o requirements.lock
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" --extra test -c requirements.lock pyproject.toml -o requirements-test.lock
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" --extra plan -c requirements.lock pyproject.toml -o requirements-plan.lock

clean:
	rm -rf .venv runs
