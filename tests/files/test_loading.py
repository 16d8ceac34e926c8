"""Reading in pieces by several threads gives what mapping gives, for every form, and fails in one line."""

import os

import pytest
import torch
from safetensors.torch import load_file

from golden import FLUX, write
from model import checkpoint, loading
from model.loading import Senders, read_pieces
from model.quantize import load_quantized
from model.weights import load_flux, open_checkpoint


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small files count as large, and pieces end within tensors."""
    monkeypatch.setattr(checkpoint, "BIG", 0)
    monkeypatch.setattr(loading, "PIECE", 1000)
    monkeypatch.setattr(loading, "THREADS", 4)


@pytest.mark.parametrize("stored, dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_pieces_are_cast_to_what_the_whole_would_be(tmp_path, monkeypatch, stored, dtype):
    tensors = {key: tensor.to(stored) for key, tensor in load_file(FLUX["dev"]).items()}
    path = write(tmp_path / "flux1-dev.safetensors", tensors)
    pieces, calls = load_flux(path, dtype=dtype).state_dict(), []
    assert all(torch.equal(pieces[key], tensor.to(dtype)) for key, tensor in tensors.items())
    monkeypatch.setattr(checkpoint, "read_pieces", lambda *args: calls.append(args))
    load_flux(path, dtype=stored)
    assert not calls, "what is as it is wanted is mapped"


def test_a_large_file_of_small_blocks_is_read_in_pieces_too(tmp_path, monkeypatch):
    path = write(tmp_path / "flux1-dev.safetensors", {k: t.bfloat16() for k, t in load_file(FLUX["dev"]).items()})
    opened, calls = open_checkpoint(path, "transformer"), []
    monkeypatch.setattr(checkpoint, "BIG", path.stat().st_size - 1)
    monkeypatch.setattr(checkpoint, "read_pieces", lambda *args: calls.append(args) or read_pieces(*args))
    narrow = load_quantized(opened, dtype=torch.float32).state_dict()
    assert len(calls) == 1 + 5, "what stays wide, and each block"
    monkeypatch.setattr(checkpoint, "BIG", path.stat().st_size)
    mapped = load_quantized(opened, dtype=torch.float32).state_dict()
    assert len(calls) == 1 + 5 and mapped.keys() == narrow.keys()
    assert all(torch.equal(narrow[name].float(), tensor.float()) for name, tensor in mapped.items())


def test_what_is_scaled_or_put_together_is_read_too(tmp_path):
    tensors = load_file(FLUX["dev"])
    key = "double_blocks.0.img_attn.qkv.weight"
    tensors[key] = tensors[key].float().to(torch.float8_e4m3fn)
    path = write(tmp_path / "flux1-dev.safetensors", tensors)
    state = load_flux(path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(state[name], tensor.bfloat16()) for name, tensor in tensors.items())


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path):
    path = write(tmp_path / "flux1-dev.safetensors", load_file(FLUX["dev"]))
    opened = open_checkpoint(path, "transformer")
    os.truncate(path, path.stat().st_size - 5000)
    with pytest.raises(ValueError, match="flux1-dev.safetensors is cut short while it is read"):
        read_pieces(opened.tensors, checkpoint.FLOATS, torch.float32, "cpu")


def test_tensors_made_in_inference_mode_are_filled():
    with torch.inference_mode(), Senders("cpu") as senders:
        target, source = torch.empty(3000), torch.arange(12_000).to(torch.uint8)
        senders.fill(target, torch.float32, loading._copier(source))
    assert torch.equal(target.view(torch.uint8), source)


def test_threads_send_to_the_gpu_of_their_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert Senders("cuda").device == torch.device("cuda", 1) and Senders("cuda:3").device.index == 3
    assert Senders("cpu").device == torch.device("cpu")
