# Targets that set up their own environment: `make demo`, `make test`, `make test-slow`.
# `make test TORCH=2.11.0` uses another version of torch than constraints.txt, in a separate environment.
PYTHON ?= python3
VENV = .venv$(TORCH:%=-%)
# The tests expect a resumed run to be bit-identical, which it need not be on a GPU. The tests of a GPU
# are run by records/gpu/run.sh check.
ON_CPU = OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

demo: $(VENV)/ready
	$(VENV)/bin/python main.py --data sample --emsize 200 --nhid 300 --nlayers 2 --batch_size 10 \
	    --bptt 35 --lr 20 --dropout 0.3 --dropouth 0.2 --dropouti 0.3 --dropoute 0.05 --wdrop 0.3 \
	    --epochs 16 --finetune 6 --save sample.pt

test: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(ON_CPU) $(VENV)/bin/python -m pytest -n auto -m "not slow"

test-slow: $(VENV)/ready
	$(ON_CPU) $(VENV)/bin/python -m pytest -n auto -m slow

$(VENV)/ready: requirements.txt requirements-plot.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	sed '$(TORCH:%=s/^torch==.*/torch==%/)' constraints.txt > $(VENV)/constraints.txt
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt -c $(VENV)/constraints.txt
	touch $@

.PHONY: demo test test-slow
