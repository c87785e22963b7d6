# Two commands: `make demo` trains on the embedded toy world, `make test` runs every test. Both install first if needed.
.PHONY: demo test

demo: .venv/installed
	.venv/bin/torchrun --nproc_per_node=2 train.py --algo toolupt @recipes/demo.args

test: .venv/installed
	.venv/bin/python -m pytest -q

.venv/installed: requirements.txt requirements-test.txt install.sh
	bash install.sh
