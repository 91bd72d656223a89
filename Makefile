# `make help` lists what there is. Every target makes the virtual environment that it needs, or brings it up to date.

VENV ?= .venv
BENCH ?= speedup
GPU_WORKERS ?= 12
PYTEST_ARGS ?= -n auto

ifdef PYTHON
# An interpreter that already has the packages: used as it is, nothing is installed, the user's PYTHONPATH is kept.
PY := PYTHONPATH=src$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON)
SETUP := @:
else
PY := $(VENV)/bin/python
SETUP := @python3 tools/setup_env.py --venv $(VENV)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench gpu-check sanitize clean

help:
	@echo "make demo       train LeNet-5 with the sequential implementation and in parallel, compare, draw graphs (2 minutes)"
	@echo "make test       all tests that need no GPU"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the speedup benchmark at full size; BENCH=NAME for another one"
	@echo "make gpu-check  the GPU tests and figures; writes benchmarks/results/gpu-check.json"
	@echo "make sanitize   convolutions, norms, pools and products under compute-sanitizer's four tools, on the GPU; writes benchmarks/results/sanitize.json"
	@echo "make setup      the environment only; tries PyCUDA again where it could not be built"
	@echo "make clean      removes the environment and what tools left behind"
	@echo
	@echo "VENV=DIR          where the environment is (.venv); one that you made with the Python of your choice is used"
	@echo "PYTHON=PROGRAM    no environment: this Python with the packages it has, for machines without a network"
	@echo "PYTEST_ARGS=...   pytest's arguments instead of -n auto (all cores), such as PYTEST_ARGS='-k conv -x'"

setup:
	$(SETUP) --retry plots images test

demo:
	$(SETUP) plots images
	$(PY) -m parcnn bench speedup --demo

test:
	$(SETUP) test
	@$(PY) tools/gpu_record.py status
	$(PY) -m pytest -m "not gpu" $(PYTEST_ARGS)

lint:
	$(SETUP) --no-cuda lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench:
	$(SETUP) plots images
	$(PY) -m parcnn bench $(BENCH)

# Most GPU tests wait for their oracle on the CPU, so several run side by side, with one thread each: BLAS would start one for
# every core in each of them. Those of the runtime, some of which watch what overlaps with what, have the GPU alone. The record
# is written only when every test passed and the figures could be taken.
gpu-check:
	$(SETUP) test
	@$(PY) tools/gpu_record.py require
	@mkdir -p runs/gpu-check
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -m "gpu or torch" -n $(GPU_WORKERS) --ignore=tests/cuda/test_gpu_runtime.py --junitxml=runs/gpu-check/kernels.xml
	$(PY) -m pytest -m gpu tests/cuda/test_gpu_runtime.py --junitxml=runs/gpu-check/runtime.xml
	$(PY) -m parcnn bench gpu-check --json runs/gpu-check/figures.json
	$(PY) tools/gpu_record.py write --junit runs/gpu-check/kernels.xml runs/gpu-check/runtime.xml --figures runs/gpu-check/figures.json

# A few problems by every kernel family: the tools slow kernels down by far too much for all tests. Errors of the driver's
# functions are exceptions anyway, and some ask for functions that this driver lacks. The record is written only when all four
# tools were clean; SANITIZER_TOOLS="memcheck racecheck" runs some and writes none.
SANITIZER_TOOLS ?= memcheck racecheck initcheck synccheck
SANITIZED = $(addprefix tests/cuda/test_, conv_fuzz.py::test_every_family conv_winograd.py::test_integers_are_exact \
	conv_depthwise_sm90.py::test_every_form conv_stem_sm90.py::test_not_a_number_and_infinity_pass \
	conv_sm90_pointwise.py::test_every_form_is_exact conv_sm90_one_window.py::test_values_are_exact \
	conv_wgrad_sm90_halves.py::test_not_a_number_and_infinity_show conv_unpool.py::test_nan_and_infinities conv_moments.py::test_moments_of_integers \
	conv_sm90_sums.py::test_what_is_no_number_stays_in_its_channel batch_norm_kernels.py::test_dgrad_by_given_sums \
	conv_sm90_epilogue.py::test_y_may_take_the_place_of_the_addend conv_sm90_epilogue.py::test_a_derivative_follows_from_the_input \
	conv_sm90_epilogue.py::test_an_activation_is_taken_of_the_sum conv_sm90_windows.py::test_what_is_not_finite \
	batch_norm_kernels.py::test_train_by_given_moments batch_norm_kernels.py::test_dgrad_in_place pool_kernels.py::test_smallest \
	batch_norm_pool_kernels.py::test_train_by_given_moments batch_norm_pool_kernels.py::test_several_tiles_a_block \
	gemm.py::test_a_tensor_may_be_several_operands gemm.py::test_not_a_number_and_infinity_pass \
	muon_kernels.py::test_copies_are_the_new_weights_rounded)
sanitize:
	$(SETUP) test
	@$(PY) tools/gpu_record.py require
	@mkdir -p runs/sanitize
	@for tool in $(SANITIZER_TOOLS); do \
		echo "compute-sanitizer --tool $$tool"; \
		PATH="$$PATH:/usr/local/cuda/bin" compute-sanitizer --tool $$tool --target-processes all --report-api-errors no --error-exitcode 1 \
			env $(PY) -m pytest -q -m gpu $(SANITIZED) --junitxml=runs/sanitize/$$tool.xml || exit 1; \
	done
	@$(PY) tools/gpu_record.py sanitized --junit $(SANITIZER_TOOLS:%=runs/sanitize/%.xml)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tools -name __pycache__ -type d -prune -exec rm -r {} +
