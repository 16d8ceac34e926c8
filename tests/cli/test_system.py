"""Commands on systems that are not as they should be: streams that are gone, modules that load too slowly for somebody,
few descriptors, names that Windows does not have, a Mac's GPU.
"""

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import blackbox
import iclora.locks
import iclora.memory
import model.flux
import model.position
import train
from blackbox import REFERENCES, ROOT, SCRIPTS, refused
from iclora.config import TINY
from iclora.plan import parse_lora, pick_device
from model.flux import Flux, FluxConfig
from model.lora import attach
from model.position import grid_ids, rotary_angles

SMALL = ["--grid", "1x2", "--mask", "2", "--panel-size", "16", "--steps", "1", "--device", "cpu"]
TRAIN = ["--steps", "1", "--rank", "1", "--batch", "1", "--sample-every", "0", "--holdout", "0", "--device", "cpu"]


def start(command, *argv, **more):
    """A command in a process of its own, whose streams are given as for subprocess."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *SCRIPTS[command], *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, timeout=120, **streams | more)


# streams


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "closed", "ascii", "nobody listens"])
def test_a_set_is_saved_whatever_becomes_of_stdout(kind, tmp_path):
    more = {"env": os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}} if kind == "ascii" else {}
    if kind == "full":
        more["stdout"] = open("/dev/full", "w")
    if kind == "closed":
        more["preexec_fn"] = lambda: os.close(1)
    if kind == "nobody listens":
        reader, more["stdout"] = os.pipe()
        os.close(reader)
    done = start("sample", *SMALL, "--out", tmp_path / "\u00e9", **more)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert len(list((tmp_path / "\u00e9").iterdir())) == 3, "composite, panel, JSON"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "nobody listens"])
def test_a_run_is_trained_and_saved_whatever_becomes_of_stderr(kind, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    stderr = open("/dev/full", "w") if kind == "full" else writer
    done = start("train", "--data", "sets/walk", *TRAIN, "--out", tmp_path / "run", stderr=stderr)
    assert done.returncode == 0 and (tmp_path / "run" / "lora.safetensors").is_file()


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_mistake_has_its_status_whatever_becomes_of_stderr(kind):
    more = {"stderr": open("/dev/full", "w")} if kind == "full" else {"preexec_fn": lambda: os.close(2)}
    done = start("sample", "--steps", "0", **more)
    assert (done.returncode, done.stdout) == (2, b"")


# while modules load


@pytest.mark.parametrize("command", SCRIPTS)
@pytest.mark.parametrize(("raised", "status", "line"), [
    ("KeyboardInterrupt", 130, b"interrupted"), ("MemoryError", 2, b"error: "),
    ("OSError(24, 'Too many open files')", 2, b"error: "), ("ImportError('no numpy')", 2, b"error: "),
])  # fmt: skip
def test_what_ends_a_command_while_modules_load_is_one_line(command, raised, status, line, tmp_path):
    (tmp_path / "torch.py").write_text(f"raise {raised}")
    flags = ["a", "b", "--to", "kohya"] if command == "convert" else []
    done = start(command, *flags, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == status and done.stderr.startswith(line) and done.stderr.count(b"\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["data", "convert"])
def test_five_descriptors_are_too_few_and_that_is_one_line(command):
    flags = ["a", "b", "--to", "kohya"] if command == "convert" else ["sets"]
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))  # noqa: E731
    done = start(command, *flags, preexec_fn=few)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(b"error: ")


def test_two_dashes_are_no_number(capsys):
    assert blackbox.main("train", "--rank=--") == 2
    refused(capsys, "--rank '--' is not a whole number")


# other systems


def without_unix(monkeypatch):
    """Take away what Windows does not have."""
    for owner, names in ((os, ("sysconf", "fork", "killpg", "mkfifo", "link")), (signal, ("SIGHUP", "SIGALRM"))):
        for name in names:
            monkeypatch.delattr(owner, name, raising=False)
    monkeypatch.setattr(iclora.locks, "fcntl", None)


@pytest.mark.slow
def test_nothing_is_called_that_windows_does_not_have(monkeypatch, tmp_path):
    without_unix(monkeypatch)
    assert blackbox.main("sample", *SMALL, "--out", tmp_path / "out") == 0
    prompt = ["--ref", REFERENCES / "cat.png", "--prompt", "a cat on a beach.", "--steps", "1", "--device", "cpu"]
    assert blackbox.main("sample", *prompt, "--out", tmp_path / "out") == 0
    for steps in ([], ["--steps", "2"]):  # the checkpoint of the first one is kept beside the second's
        flags = ["--data", ROOT / "sets" / "walk", *TRAIN, "--decay", "0", *steps]
        assert blackbox.main("train", *flags, "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "checkpoint.previous.safetensors").is_file()
    assert iclora.memory.free_memory("cpu") == sys.maxsize, "which refuses nothing"


@pytest.mark.parametrize("path", [r"C:\loras\a.safetensors", r"C:\loras\a.safetensors:0.8"])
def test_a_drive_is_no_strength(path):
    with pytest.raises(ValueError, match="there is no such file"):
        parse_lora(path)


@pytest.mark.parametrize(("there", "wanted"), [
    ({"cuda", "mps"}, "cuda"), ({"mps"}, "mps"), (set(), "cpu"),
])  # fmt: skip
def test_auto_takes_the_best_device_that_there_is(there, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert pick_device("auto", TINY, pytest.fail) == wanted


class NoDoubles(TorchDispatchMode):
    """Notes every float64 tensor that is computed: a Mac's GPU has none."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.found += [str(function) for tensor in made if tensor.dtype == torch.float64]
        return out


def test_nothing_but_rotary_angles_is_computed_in_float64_and_those_on_the_cpu_for_a_mac(monkeypatch):
    flux = Flux(FluxConfig(64, 64, 6, 5, 32, 48, 1, 1, 1, (4, 14, 14), True)).requires_grad_(False)
    trained = attach(flux, "all-linear", 2, generator=torch.Generator("cpu"))
    pe = rotary_angles(torch.cat((torch.zeros(1, 4, 3), grid_ids(2, 4)[None]), dim=1), (4, 14, 14))
    assert pe.dtype == torch.float32
    monkeypatch.setattr(model.flux, "rotary_angles", lambda *_: pe)
    optimizer = torch.optim.AdamW(trained, fused=True)
    with NoDoubles() as doubles:
        v = flux(torch.zeros(1, 8, 64), grid_ids(2, 4)[None], torch.zeros(1, 4, 5), torch.zeros(1, 4, 3),
                 torch.full((1,), 0.5), torch.zeros(1, 6), torch.ones(1))  # fmt: skip
        v.square().mean().backward()
        optimizer.step()
    assert doubles.found == []
    source = open(model.position.__file__).read()
    assert '"cpu" if ids.device.type == "mps"' in source and source.count("float64") == 4, "a Mac is not at hand"


# hanging up


def test_a_terminal_that_hangs_up_saves_the_run_unless_that_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.stop_between_steps() as signals:  # under nohup
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
