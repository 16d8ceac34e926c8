"""What the system does to a command: interruptions while modules load and at its end, streams that fail, no memory."""

import os
import subprocess
import sys

import pytest

from blackbox import ROOT, SCRIPTS
from iclora.cli import guard

COMMAND = "import sys; sys.argv[0] = '-m'; import iclora\n"  # makes a process one of our commands
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
LORA = "weights/tiny/loras/walk.safetensors"
ARGUMENTS = {
    "sample": ["--grid", "1x2", "--mask", "2", "--steps", "1"],
    "train": ["--data", "sets/walk"],
    "data": ["sets/walk"],
    "convert": [LORA, "{}/a.safetensors", "--to", "kohya"],
    "lab": ["--kind", "one", "--count", "1"],
}
HOOK = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r} and "iclora" in sys.modules:
            {do}
sys.meta_path.insert(0, Finder())
"""


def run(*argv, env=None, **more):
    """Run Python in the repository's folder; its status and what it wrote to stderr."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, text=True, timeout=300, **more)
    return done.returncode, done.stderr


def hooked(folder, command, name, do):
    """Run a command that does something as soon as it imports a module."""
    (folder / "sitecustomize.py").write_text(HOOK.format(name=name, do=do))
    script = {**SCRIPTS, "lab": ["-m", "lab.pairs"]}[command]
    words = [word.format(folder) for word in ARGUMENTS[command]]
    out = ["--out", str(folder / "out")] if command in ("sample", "train", "lab") else []
    return run(*script, *words, *out, env={"PYTHONPATH": str(folder)})


@pytest.mark.parametrize("command", ARGUMENTS)
def test_an_interruption_while_modules_load_is_one_line(tmp_path, command):
    status, said = hooked(tmp_path, command, "torch", "os.kill(os.getpid(), signal.SIGINT)")
    assert status == 130 and said in ("interrupted\n", "interrupted; what was finished is saved\n")


def test_a_missing_package_and_no_memory_are_one_line_and_a_mistake_of_ours_is_not():
    assert run("-c", f"{COMMAND}import no_such_package") == (
        2, "error: No module named 'no_such_package' (ModuleNotFoundError, while modules were loaded)\n",
    )  # fmt: skip
    assert run("-c", f"{COMMAND}raise MemoryError") == (
        2, "error: memory ran out (MemoryError, while modules were loaded)\n",
    )  # fmt: skip
    status, said = run("-c", f"{COMMAND}1 / 0")
    assert status == 1 and "ZeroDivisionError" in said


def test_somebody_elses_program_is_left_alone(tmp_path):
    (tmp_path / "train.py").write_text(
        "import sys, signal; before = sys.stdout, sys.excepthook, signal.getsignal(2)\n"
        "import iclora; sys.exit(before != (sys.stdout, sys.excepthook, signal.getsignal(2)))"
    )
    assert run(str(tmp_path / "train.py"), env={"PYTHONPATH": str(ROOT)}) == (0, "")


TELL = COMMAND + "print('\\u00e4' * 100_000); print('told', file=sys.stderr); sys.exit(3)"


@FULL
def test_a_full_stdout_changes_no_status():
    with open("/dev/full", "w") as full:
        assert run("-c", TELL, stdout=full) == (3, "told\n")


@FULL
def test_a_full_stderr_changes_no_status():
    with open("/dev/full", "w") as full:
        assert run("-c", TELL, stderr=full)[0] == 3


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_pipe_changes_no_status(name):
    read, write = os.pipe()
    os.close(read)
    try:
        assert run("-c", TELL, **{name: write}) == (3, "told\n" if name == "stdout" else None)
    finally:
        os.close(write)


def test_characters_that_a_stdout_does_not_have_are_written_in_another_way(tmp_path):
    with open(tmp_path / "out", "wb") as file:
        assert run("-c", TELL, env={"PYTHONIOENCODING": "ascii"}, stdout=file) == (3, "told\n")
    assert (tmp_path / "out").read_bytes() == b"\\xe4" * 100_000 + b"\n"


@FULL
def test_a_full_stderr_beside_a_closed_stdout_changes_no_status():
    shell = f'"{sys.executable}" -c "$1" >&- 2>/dev/full'
    assert subprocess.run(["bash", "-c", shell, "bash", TELL], cwd=ROOT, timeout=100).returncode == 3


def test_a_line_is_told_at_once():
    code = COMMAND + "import os; print('now'); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, timeout=100)
    assert done.stdout == b"now\n"


def test_streams_that_were_closed_are_opened_so_that_no_file_takes_their_place(tmp_path):
    code = COMMAND + f"f = open({str(tmp_path / 'a')!r}, 'w'); print('out'); print('err', file=sys.stderr); f.close()"
    shell = f'"{sys.executable}" -c "$1" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", shell, "bash", code], cwd=ROOT, timeout=100).returncode == 0
    assert (tmp_path / "a").read_text() == ""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
    ],
)
def test_little_memory_is_one_line(error, capsys):
    def work():
        raise error

    assert guard(work, "try less") == 2
    assert capsys.readouterr().err == "error: memory ran out; try less\n"


def test_too_few_open_files_are_one_line_and_other_errors_are_raised(capsys):
    def work(error):
        raise error

    assert guard(lambda: work(RuntimeError("unable to open file </a>: Too many open files (24)"))) == 2
    assert capsys.readouterr().err == "error: unable to open file </a>: Too many open files (24)\n"
    with pytest.raises(RuntimeError, match="a bug"):
        guard(lambda: work(RuntimeError("a bug")))
