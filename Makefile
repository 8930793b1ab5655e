# Two commands that set up all they need: `make demo` and `make test`.
PYTHON ?= python3

demo: .venv/ready
	.venv/bin/python main.py --data sample --emsize 200 --nhid 300 --nlayers 2 --batch_size 10 \
	    --bptt 35 --lr 20 --dropout 0.3 --dropouth 0.2 --dropouti 0.3 --dropoute 0.05 --wdrop 0.3 \
	    --epochs 16 --finetune 6 --save sample.pt

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

.venv/ready: requirements.txt requirements-plot.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test
