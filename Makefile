# Two commands: `make demo` trains on the embedded toy world, `make test` runs every test, two files at a time. Both install first if needed.
.PHONY: demo test eval-deps

# one rank per GPU, at most two; two ranks on a machine without
NPROC ?= $(shell gpus=$$(nvidia-smi -L 2>/dev/null | wc -l); [ $$gpus -eq 1 ] && echo 1 || echo 2)

demo: .venv/installed
	.venv/bin/torchrun --nproc_per_node=$(NPROC) train.py --algo toolupt @recipes/demo.args --resume_from_checkpoint latest

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15

# into .venv if there is one, else into the environment of python3: what BFCL needs, nothing else touched
eval-deps:
	$(or $(wildcard .venv/bin/python),python3) -m pip install --no-deps -r requirements-eval.txt

.venv/installed: requirements.txt requirements-test.txt requirements-peer.txt requirements-eval.txt install.sh
	bash install.sh
