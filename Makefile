# make demo   distil the embedded teacher into a tiny student, and show how near it came
# make test   run the tests
# make findings   the paper's ablations on the embedded teacher, to results/findings/: hours; QUICK=1 only tries it
# make gpu    on a machine with a GPU and PyTorch: its tests and speeds, at most nine minutes, to results/<gpu>/
# make smoke  each command once, in about a minute: does it run with this Python and the newest packages?
# All but `gpu` set themselves up in VENV (.venv); that takes it where it is, else PYTHON's own packages. PYTHON chooses
# the interpreter (3.11 to 3.13).

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-slow test-rest smoke gpu findings clean

demo: $(VENV)/ready
	$(RUN) train.py --minutes 2.5 --steps 100000 --frames 8 --batch 2 --micro-batch 2 --muon-lr 0.01 \
		--cache out/demo-cache --samples 256 --cache-crops 1 --out out/demo --overwrite
	$(RUN) evaluate.py --clips 8 --student out/demo $(wildcard assets/tiny_student.safetensors) --out out/demo

test: $(VENV)/ready
	$(MAKE) -j2 test-slow test-rest

# Two halves of about the same time, side by side.
SLOW = $(addprefix tests/test_, train.py teachers.py export.py data.py)
test-slow: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q --durations=5 $(SLOW)
test-rest: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q --durations=5 $(SLOW:%=--ignore=%) tests

smoke: $(VENV)/ready
	$(RUN) tests/smoke.py

$(VENV)/ready: requirements.txt requirements-phones.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt -r requirements-phones.txt
	touch $@

findings: $(VENV)/ready
	$(RUN) assets/findings.py $(if $(QUICK),--quick)

gpu:
	PYTHON=$(if $(wildcard $(VENV)/ready),$(RUN),$(PYTHON)) bash results/gpu.sh

clean:
	rm -rf $(VENV)
