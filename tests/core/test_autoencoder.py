import copy

import pytest
import torch

from golden import AE, EXACT, WHOLE, case, far
from model.autoencoder import decode_tiled
from model.weights import load_autoencoder


@pytest.fixture(scope="module")
def autoencoder():
    return load_autoencoder(AE)


@torch.no_grad()
def test_encode_equals_the_official_autoencoder(autoencoder):
    golden, exact = case("ae"), copy.deepcopy(autoencoder).double()
    moments = torch.cat(exact.moments(golden["image"].double()), dim=1)
    assert far(moments, golden["moments"]) < EXACT, "in float64, so that only the reference is rounded"
    assert far(torch.cat(autoencoder.moments(golden["image"]), dim=1), moments) < EXACT, "as each CPU rounds it"
    assert far(autoencoder.encode(golden["image"]), golden["latent_mean"]) < EXACT


@torch.no_grad()
def test_decode_equals_the_official_autoencoder(autoencoder):
    golden = case("ae")
    assert far(autoencoder.decode(golden["z"]), golden["decoded"]) < WHOLE


@torch.no_grad()
def test_a_posterior_sample_is_fixed_by_its_seed_and_spreads_around_the_mean(autoencoder):
    golden = case("ae")
    mean, logvar = autoencoder.moments(golden["image"])
    draws = [autoencoder.encode(golden["image"], torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    spread = (draws[0] - golden["latent_mean"]) / 0.3611 / torch.exp(0.5 * logvar)
    assert abs(float(spread.std()) - 1) < 0.1 and abs(float(spread.mean())) < 0.1


@torch.no_grad()
def test_one_tile_is_the_whole_picture(autoencoder):
    z = case("ae")["z"]
    assert far(decode_tiled(autoencoder, z, tile=8, overlap=2), autoencoder.decode(z)) < 1e-5


def test_tiles_cover_the_picture_and_fade_into_each_other(autoencoder):
    """With a decoder that only enlarges, tiling must give back exactly what it is given."""

    class Enlarge:
        def decode(self, z):
            return torch.nn.functional.interpolate(z[:, :3], scale_factor=8, mode="nearest")

    z = torch.randn(1, 16, 13, 21)
    assert far(decode_tiled(Enlarge(), z, tile=6, overlap=2), Enlarge().decode(z)) < 1e-6


def test_pictures_are_tiled_one_after_the_other(autoencoder, monkeypatch):
    z, seen, decode = torch.randn(3, 16, 12, 8), [], autoencoder.decode
    one_by_one = torch.cat([decode_tiled(autoencoder, one[None], 8, 2) for one in z])
    monkeypatch.setattr(autoencoder, "decode", lambda tile: seen.append(len(tile)) or decode(tile))
    assert torch.equal(decode_tiled(autoencoder, z, 8, 2), one_by_one) and {*seen} == {1}
