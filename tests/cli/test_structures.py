"""Files that are wrong by structure cost one line, whichever command reads them; whole ones are read.

python -m pytest -m slow -n 0 -s tests/cli/test_structures.py     prints the rows of docs/verification.md
"""

import tempfile
from pathlib import Path

import pytest
import torch

import blackbox
from structures import kinds, make_world, try_kind, try_one

KINDS = 20


@pytest.fixture(scope="module")
def known():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with blackbox.quick_collection(), tempfile.TemporaryDirectory() as folder:
        yield kinds(make_world(Path(folder)))
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_whole_ones_are_read(known):
    assert len(known) == KINDS and {kind.command for kind in known} == set(blackbox.MODULES)
    assert [kind.name for kind in known if try_one(kind, kind.document)] == []


@pytest.mark.parametrize("number", range(KINDS))
def test_changed_ones_cost_one_line(known, number):
    assert try_kind(known[number], 5)[2] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KINDS))
def test_many_changed_ones_cost_one_line(known, number):
    kind = known[number]
    ended = try_kind(kind, 40)
    print(f"| {kind.name} | {kind.command} | {ended.total()} | {ended[2]} |")
    assert ended[2] > 10
