"""Tests run in several processes at once (pytest-xdist), so each computes in one thread."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # set before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
