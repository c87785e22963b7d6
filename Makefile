# `make demo` trains on the embedded toy world; `make test` takes minutes, `make test-long` adds kills, faults, servers and whole runs.
# Each installs first if needed.
.PHONY: demo test test-long test-gpu eval-deps

# one rank per GPU, at most two; two ranks on a machine without
NPROC ?= $(shell gpus=$$(nvidia-smi -L 2>/dev/null | wc -l); [ $$gpus -eq 1 ] && echo 1 || echo 2)

demo: .venv/installed
	.venv/bin/torchrun --nproc_per_node=$(NPROC) train.py --algo toolupt @recipes/demo.args --resume_from_checkpoint latest

# two files at a time, on one thread each
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15

test: .venv/installed
	$(PYTEST) -m "not long"

test-long: .venv/installed
	$(PYTEST) -m long

# all other tests hide the GPU
test-gpu: .venv/installed
	.venv/bin/python -m pytest -q -k "gpu or vllm" tests/test_attention.py tests/test_model.py tests/test_rollout.py

# into .venv if there is one, else into the environment of python3: what BFCL needs, nothing else touched
eval-deps:
	$(or $(wildcard .venv/bin/python),python3) -m pip install --no-deps -r requirements-eval.txt

.venv/installed: requirements.txt requirements-test.txt requirements-peer.txt requirements-eval.txt install.sh
	bash install.sh
