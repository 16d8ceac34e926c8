"""What a GPU adds: the same numbers, the same pictures to rounding, one training step. Skipped without CUDA."""

import pytest
import torch

import train
from golden import FLUX, case, far
from iclora.config import SampleConfig
from iclora.pipeline import Pipeline
from iclora.plan import make_plan
from model.weights import examples_folder, load_flux

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_golden_forward_holds_on_the_gpu():
    golden = case("dev")
    flux = load_flux(FLUX["dev"], device="cuda", dtype=torch.float32)
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    with torch.no_grad():
        out = flux(**{name: golden[name].cuda() for name in names})
    assert far(out.cpu(), golden["out"]) < 1e-4


@pytest.mark.parametrize("ref", [(), (str(examples_folder() / "references" / "cat.png"),)], ids=["plain", "reference"])
def test_a_set_on_the_gpu_is_the_set_of_the_cpu_to_rounding(ref):
    made = []
    for device in ("cpu", "cuda"):
        config = SampleConfig(grid="2x2", mask="3", ref=ref, steps=4, device=device, dtype="float32")
        (result,) = Pipeline(config, print).run(make_plan(config, print))
        made.append(torch.frombuffer(bytearray(result.composite.tobytes()), dtype=torch.uint8).float())
    assert (made[0] - made[1]).abs().mean() < 1


def test_a_training_runs_on_the_gpu(tmp_path):
    assert train.main(["--data", "sets/walk", "--steps", "2", "--device", "cuda", "--out", str(tmp_path / "run")]) == 0
