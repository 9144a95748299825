# make demo   distil the embedded teacher into a tiny student, and show how near it came
# make test   run the tests
# Both set themselves up in .venv first. PYTHON chooses the interpreter (3.10 or later).

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test clean

demo: .venv/ready
	$(RUN) train.py --minutes 4 --steps 100000 --out out/demo --overwrite
	$(RUN) evaluate.py --student out/demo $(wildcard assets/tiny_student.safetensors) --out out/demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q --durations=5 tests

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv
