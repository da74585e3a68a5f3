# Everything a person does here by hand: `make demo`, `make test`, `make check`. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_TEST := $(VENV)/.ready-test
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench bench-peers check format stubs clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(READY)  ## Serve the demo model: two ranks on CPU, HTTP on 127.0.0.1:8000, gRPC on 127.0.0.1:9000
	@exec $(BIN)/manta serve demo --tensor-parallel 2

WORKERS ?= 2
test: $(READY_TEST)  ## Run the tests, in two processes at a time (see tests/work_units.py)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(READY_TEST)  ## Run what takes minutes as well
	$(BIN)/python -m pytest -m "slow or not slow"

bench: $(READY_TEST)  ## Measure the engine on this machine: bfloat16, int8, int4 and a mixture of experts, of random weights
	$(PIP) install --quiet --group bench
	$(BIN)/python -m benchmarks.run --fresh --rounds 3 --shape dense --shape moe
	$(BIN)/python -m benchmarks.run --report

PEERS := $(HOME)/.cache/manta/benchmarks
BENCH_PEERS ?= --rounds 5
bench-peers: $(READY_TEST)  ## The same compared with llama.cpp, OpenVINO, ONNX Runtime, vLLM and transformers, round after round (builds llama.cpp)
	benchmarks/peers/set_up.sh $(PEERS) $(PYTHON)
	$(PIP) install --quiet --group bench
	$(BIN)/python -m benchmarks.run --fresh --shape dense --shape moe $(BENCH_PEERS) --peer llama_cpp=$(PEERS)/peers/bin/python \
	    --peer openvino=$(PEERS)/peers/bin/python --peer onnxruntime_genai=$(PEERS)/peer_onnxruntime/bin/python \
	    --peer vllm_cpu=$(PEERS)/peer_vllm/bin/python --peer transformers_eager=$(BIN)/python
	$(BIN)/python -m benchmarks.run --report

check: $(READY_TEST)  ## Lint, types, import contracts, protocol files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd client && ../$(BIN)/mypy
	$(BIN)/lint-imports
	cd client/proto && ../../$(BIN)/buf lint
	$(BIN)/yamllint --strict k8s tests/k8s
	$(BIN)/shellcheck k8s/images/drain benchmarks/peers/set_up.sh
	$(BIN)/hadolint k8s/images/Dockerfile

format: $(READY_TEST)  ## Put the code in its usual form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: $(READY_TEST)  ## Generate gRPC stubs and the synchronous client again
	$(BIN)/python client/generate.py
	$(BIN)/python client/unasync.py

$(READY): pyproject.toml client/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Manta needs Python 3.11 or newer; say which one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1" "setuptools>=77"
	$(PIP) install --progress-bar on -e . -e client
	@echo "Building the CPU kernels (once; about a minute on two cores; without a C++ compiler torch's and gloo are used, which are slower)"
	-@$(BIN)/python -m parallel.native.library
	@touch $@

$(READY_TEST): $(READY)
	$(PIP) install --quiet --group test --group lint
	-@$(BIN)/python k8s/fetch_helm.py  # without Helm the chart's tests are skipped
	@touch $@

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
