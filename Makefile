# What is run again and again, in the environment that is active. .ci/run and .github/workflows/test.yml call these too.
PYTHON ?= python

.PHONY: test test-core test-slow lint lab lab-slow

test:
	$(PYTHON) -m pytest

test-core:
	$(PYTHON) -m pytest tests/core

test-slow:
	$(PYTHON) -m pytest -m slow

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

lab:
	$(PYTHON) -m pytest lab

lab-slow:
	$(PYTHON) -m pytest lab -n 0 -m slow
