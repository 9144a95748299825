# make demo   distil the embedded teacher into a tiny student, and show how near it came
# make test   run the tests
# make findings   the paper's ablations on the embedded teacher, to results/findings/: hours; QUICK=1 only tries it
# make gpu    on a machine with a GPU and PyTorch: its tests and speeds, at most nine minutes, to results/<gpu>/
# All but the last set themselves up in .venv; that takes .venv where it is, else PYTHON's own packages. PYTHON chooses
# the interpreter (3.10 or later).

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test test-slow test-rest gpu findings clean

demo: .venv/ready
	$(RUN) train.py --minutes 2.5 --steps 100000 --frames 8 --batch 2 --micro-batch 2 --muon-lr 0.01 \
		--cache out/demo-cache --samples 256 --cache-crops 1 --out out/demo --overwrite
	$(RUN) evaluate.py --clips 8 --student out/demo $(wildcard assets/tiny_student.safetensors) --out out/demo

test: .venv/ready
	$(MAKE) -j2 test-slow test-rest

# Two halves of about the same time, side by side.
SLOW = tests/test_train.py tests/test_teachers.py tests/test_export.py
test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q --durations=5 $(SLOW)
test-rest: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q --durations=5 $(SLOW:%=--ignore=%) tests

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

findings: .venv/ready
	$(RUN) assets/findings.py $(if $(QUICK),--quick)

gpu:
	@$(if $(wildcard .venv/ready),$(RUN),$(PYTHON)) bench.py --gpu

clean:
	rm -rf .venv
