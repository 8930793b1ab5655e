# Two commands that set up all they need: `make demo` and `make test`.
PYTHON ?= python3

demo: .venv/ready
	.venv/bin/python main.py --data sample --emsize 200 --nhid 400 --batch_size 10 --lr 20 \
	    --dropout 0.2 --dropouth 0.1 --dropouti 0.2 --dropoute 0 --wdrop 0.2 --bptt 35 \
	    --epochs 12 --finetune 4 --save sample.pt

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test
