# What is run again and again, in the environment that is active. .ci/run and .github/workflows/test.yml call these too.
PYTHON ?= python
DEMO := $(shell mktemp -u -d -t iclora-demo.XXXXXX)

.PHONY: test test-core test-slow lint demo lab lab-slow

test:
	$(PYTHON) -m pytest

test-core:
	$(PYTHON) -m pytest tests/core

test-slow:
	$(PYTHON) -m pytest -m slow

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

demo:
	$(PYTHON) sample.py --grid 2x2 --mask 3 --out $(DEMO)
	$(PYTHON) tests/compare_picture.py $(DEMO)/0001.png tests/fixtures/pictures/first.png
	rm -r $(DEMO)

lab:
	$(PYTHON) -m pytest lab

lab-slow:
	$(PYTHON) -m pytest lab -n 0 -m slow
