"""Bad inputs cost one line and status 2: no traceback, no hang, no memory gone, nothing left in the output folder."""

import errno
import gc
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import bad_inputs
import bad_models
import sample
from bad_inputs import SMALL
from model.weights import find_model
from sampling.images import open_picture

ROOT = Path(__file__).parents[2]
CASES = [*bad_inputs.cases(), *bad_models.cases()]
SECONDS = 20  # for one input
MEMORY = 700 * (2**20 if sys.platform == "darwin" else 2**10)  # by which one input may raise the peak, 700 MiB
BY_NAME = {case.name: case for case in CASES}
DEFAULT = 4  # every fourth input is tried in the default run, the others with the slow tests
SOME_FIRST = [pytest.param(case, marks=[pytest.mark.slow] * bool(i % DEFAULT)) for i, case in enumerate(CASES)]
PROCESSES = (
    "--steps '1001'",
    "the arguments ['--stpes', '3']",
    "a prompt of bytes that are no UTF-8",
    "PNG that claims 100000 a side",
    "a record cut at -1",
    "a record of nesting without end",
    "a record that is a fifo",
    "transformer that is a pickle",
    "tokenizer/tokenizer.json of nesting without end",
    "an output folder that is a device",
)


class Hung(BaseException):
    """Raised in the middle of what takes too long; no handler of exceptions swallows it."""


@contextmanager
def limits() -> Iterator[None]:
    """Ends what hangs, and fails on what takes too much memory."""

    def hung(*_: object) -> None:
        raise Hung(f"more than {SECONDS} s")

    before, handler = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """The folder of the tiny model. The libraries are imported here, so that no input is charged for it."""
    import transformers.models.clip.modeling_clip
    import transformers.models.t5.modeling_t5  # noqa: F401

    gc.freeze()  # what is imported, so that the collection after every text encoder takes no time
    yield find_model("tiny").root.resolve()
    gc.unfreeze()


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that is gone afterwards; pytest's own would keep gigabytes of damaged models."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@pytest.fixture
def stderr(model, capfd, recwarn, monkeypatch) -> Callable[[], str]:
    """Gives what a process of its own would have written there, with log lines and warnings, which pytest diverts."""
    for handler in logging.getLogger("transformers").handlers:
        if type(handler) is logging.StreamHandler:  # and not one of pytest's
            monkeypatch.setattr(handler, "stream", sys.stderr)
    silent = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)

    def written() -> str:
        warned = [f"{warning.message}\n" for warning in recwarn if not issubclass(warning.category, silent)]
        return "".join([*warned, capfd.readouterr().err])

    return written


def check(status: int, err: str, out: Path, doubtful: bool) -> None:
    """One line and nothing written, or, of a doubtful input, all that was promised."""
    lines = err.splitlines()
    if status == 0 and doubtful:
        assert all(line.startswith("note: ") for line in lines)
        (record,) = out.glob("*.json")
        outputs = json.loads(record.read_text())["outputs"]
        pictures = [outputs["composite"], *outputs["panels"].values()]
        assert sorted(os.listdir(out)) == sorted([record.name, *pictures])
        for name in pictures:
            open_picture(out / name)
        return
    assert status == 2
    assert lines[-1].startswith("error: ") and len(lines[-1]) > 20
    assert all(line.startswith("note: ") for line in lines[:-1])
    assert all(line.isprintable() for line in lines)
    assert not out.exists() or not list(out.iterdir())


def test_there_are_enough_bad_inputs():
    assert len(CASES) == len(BY_NAME) >= 800
    assert sum(not case.doubtful for case in CASES[::DEFAULT]) >= 200, "and 100 of test_structures.py"


@pytest.mark.parametrize("case", SOME_FIRST, ids=lambda case: ascii(case.name)[1:-1])
def test_a_bad_input_costs_one_line(case, model, folder, stderr):
    argv, out = case.make(folder, model), folder / "made"
    before = sorted(folder.rglob("*"))
    with limits():
        status = sample.main(["--out", str(out), *argv])
    check(status, stderr(), out, case.doubtful)
    assert sorted(path for path in folder.rglob("*") if out not in (path, *path.parents)) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_of_its_own_ends_alike(name, model, folder):
    argv, out = BY_NAME[name].make(folder, model), folder / "made"
    command = [sys.executable, "sample.py", "--out", out, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    check(done.returncode, done.stderr.decode(), out, doubtful=False)
    assert done.stdout == b""


@pytest.mark.parametrize(
    ("function", "code", "failing"),
    [
        ("os.fsync", errno.ENOSPC, 2),
        ("os.fsync", errno.EIO, 3),
        ("os.mkdir", errno.EROFS, 1),
        ("os.listdir", errno.EACCES, 1),
        ("os.lstat", errno.ENAMETOOLONG, 1),
        ("builtins.open", errno.EMFILE, 1),
        ("builtins.open", errno.EIO, 9),
        ("io.open", errno.EMFILE, 1),
    ],
)
def test_a_system_that_fails_costs_one_line(function, code, failing, folder, stderr, monkeypatch):
    module, name = function.split(".")
    real, calls = getattr(sys.modules[module], name), []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == failing:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    with limits(), monkeypatch.context() as patch:
        patch.setattr(sys.modules[module], name, fails)
        status = sample.main(["--out", str(folder / "made"), *SMALL])
    assert len(calls) >= failing
    check(status, stderr(), folder / "made", doubtful=False)
