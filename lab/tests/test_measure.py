"""What kept latents lose beside grey panels, and what merging loses: the figures of docs/method.md."""

import pytest
import torch
import torch.nn.functional as F

from iclora.layout import Layout
from lab.measure import kept_latents, merging_error
from model.weights import find_model, load_autoencoder

PAIR = Layout(1, 2, 64, 64)


class Local:
    """An encoder whose cells see their own pixels only."""

    def encode(self, image):
        return F.avg_pool2d(image, 8)


class Mean(Local):
    """One whose cells see the whole picture too."""

    def encode(self, image):
        return F.avg_pool2d(image, 8) + image.mean(dim=(1, 2, 3), keepdim=True)


class Edge(Local):
    """One whose cells see their neighbours to the right and the left."""

    def encode(self, image):
        return F.avg_pool2d(F.avg_pool2d(image, 8), (1, 3), 1, (0, 1))


def test_nothing_moves_where_cells_see_themselves_only():
    figures = kept_latents(Local(), PAIR, [2], 2)
    assert [figures[name] for name in ("grey", "beside", "alone")] == [0, 0, 0]


def test_what_is_seen_of_the_whole_moves_everywhere_and_what_is_seen_of_neighbours_at_the_border_only():
    figures = kept_latents(Mean(), PAIR, [2], 2)
    assert figures["grey"] == pytest.approx(figures["beside"], rel=1e-4) and figures["grey"] > 0.01
    figures = kept_latents(Edge(), PAIR, [1], 2)
    assert figures["grey"] == pytest.approx(figures["beside"] / 8**0.5, rel=1e-4), "one column of eight"
    assert 0 < figures["grey"] and 0 < figures["alone"]


def test_grey_panels_move_the_tiny_models_kept_latents_more_than_encoding_panels_alone_does():
    figures = kept_latents(load_autoencoder(find_model("tiny").autoencoder), PAIR, [2], 4)
    assert 0.9 < figures["latents"] < 1.2
    assert 0.05 < figures["alone"] < 0.6 * figures["grey"] and figures["grey"] < figures["beside"] < 1


@pytest.mark.parametrize(("change", "share"), [(1e-3, 0.033), (3e-4, 0.111), (1e-4, 0.322)])
def test_merging_in_bfloat16_loses_more_of_a_weaker_lora(change, share):
    assert merging_error(change, width=768) == pytest.approx(share, rel=0.03)
    assert merging_error(change, width=64, dtype=torch.float32) < 1e-4
