import torch

from lab.full_size import write_random
from model.flux import Flux, FluxConfig
from model.weights import load_flux


def test_random_weights_of_fp8_load_and_keep_the_size_of_what_passes_them(tmp_path):
    with torch.device("meta"):
        state = Flux(FluxConfig(64, 64, 24, 40, 64, 256, 2, 1, 1, (4, 14, 14), True)).state_dict()
    path = tmp_path / "flux1-dev-fp8.safetensors"
    write_random(path, state, torch.float8_e4m3fn, torch.bfloat16)
    flux = load_flux(path, dtype=torch.float32)
    weight = flux.single_blocks[0].linear2.weight
    assert 0.9 < float(weight.std()) * weight.shape[1] ** 0.5 < 1.1 and len(weight.unique()) > 50
    assert not flux.img_in.bias.any() and (flux.single_blocks[0].norm.query_norm.scale == 1).all()
    assert path.stat().st_size < 1.3 * sum(t.numel() for t in state.values())
