"""A training with tables of modulations against one without, bit for bit; on small random networks and a CPU."""

from dataclasses import replace

import pytest
import torch

from iclora import ahead
from iclora.ahead import ask_for_validation
from iclora.checkpoint import load_checkpoint, new_state, save_checkpoint
from iclora.config import TINY, TrainConfig, resolve_training_defaults
from iclora.layout import Layout
from iclora.loader import Batch
from iclora.training import checkpoint_blocks, validation_loss
from model.flux import Flux, FluxConfig
from model.lora import attach, save_lora, trainable
from model.tables import make_tables
from train import train

LAYOUT = Layout(1, 2, 32, 32)  # 8 tokens
CONFIG = resolve_training_defaults(
    TrainConfig(rank=2, steps=7, batch=4, lr=0.01, warmup=2, decay=0.0, dropout=0.5, accumulate=2), TINY, "cpu"
)


def adapted(tables, targets="all-linear", dtype=torch.float32, checkpointing=False):
    torch.manual_seed(0)
    flux = Flux(FluxConfig(64, 64, 6, 5, 32, 48, 1, 1, 1, (4, 14, 14), True)).to(dtype).requires_grad_(False).eval()
    attach(flux, targets, 2, generator=torch.Generator().manual_seed(1))
    if tables:
        make_tables(flux)
    if checkpointing:
        checkpoint_blocks(flux)
    return flux, new_state(trainable(flux))


class Shelf:
    """A loader of random sets with references, by number; the caption of a set is its number."""

    def __init__(self, isolate=False):
        draw = torch.Generator().manual_seed(2)
        self.z, self.refs = torch.randn(8, 16, 4, 8, generator=draw), torch.randn(8, 2, 64, generator=draw)
        self.txt, self.vec = torch.randn(8, 3, 5, generator=draw), torch.randn(8, 6, generator=draw)
        self.ids, self.isolate, self.held_out = torch.randn(1, 10, 3, generator=draw), isolate, [(LAYOUT, [6, 7])]

    def batch(self, number):
        return LAYOUT, [(4 * number + i) % 6 for i in range(4)]

    def collate(self, layout, examples, kept, dropped):
        told = 1 - torch.tensor(dropped, dtype=torch.float)
        texts = self.txt[examples] * told[:, None, None], self.vec[examples] * told[:, None]
        refs = self.refs[examples]
        return Batch(self.z[examples], *texts, references=refs, ids=self.ids, isolate_refs=self.isolate)


class Ledger:
    """Stands for the monitor: notes losses, also of the held-out sets after every third step."""

    def __init__(self, flux, loader, state):
        self.flux, self.loader, self.state, self.losses = flux, loader, state, []

    def log(self, loss):
        self.losses.append(loss)
        if self.state.step % 3 == 0:
            ask_for_validation(self.flux, self.loader)
            self.losses.append(validation_loss(self.flux, self.loader, "none", torch.device("cpu")))

    def due(self, every):
        return False

    def save(self):
        pass


def run(flux, state, steps=CONFIG.steps, isolate=False):
    loader = Shelf(isolate)
    ledger = Ledger(flux, loader, state)
    train(replace(CONFIG, steps=steps), flux, loader, state, ledger)
    return ledger.losses, torch.cat([p.detach().flatten() for p in state.parameters])


CASES = {
    "all Linears": {},
    "no modulations": {"targets": "attn"},
    "the last layer's too": {"targets": "mod,final_layer.adaLN_modulation.1"},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "isolate"), [*((case, False) for case in CASES), ("all Linears", True)])
def test_a_training_with_tables_is_the_one_without_to_the_bit(case, isolate, monkeypatch):
    monkeypatch.setattr(ahead, "AHEAD", 4)
    more = {"checkpointing": isolate, **CASES[case]}  # whose backward pass looks rows up again
    plain, tabled = adapted(False, **more), adapted(True, **more)
    (losses, weights), (tabled_losses, tabled_weights) = run(*plain, isolate=isolate), run(*tabled, isolate=isolate)
    assert tabled_losses == losses and torch.equal(tabled_weights, weights)
    assert len({*losses}) == len(losses) == 7 + 2
    assert tabled[0].tables.passes == 2 + 2 * 2, "two for 7 steps, and each validation one, and one behind it"
    assert tabled[0].tables.count <= 4 + 2 * isolate, "rows of a validation do not stay: a planned card has no room"


def test_what_would_lose_its_gradient_is_refused():
    for tables in (False, True):
        flux, state = adapted(tables, "time_in.in_layer,attn")
        if tables:
            with pytest.raises(ValueError, match="trains no LoRA on time_in"):
                run(flux, state, steps=1)
        else:
            assert run(flux, state, steps=1)[0]


def test_a_killed_training_goes_on_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "AHEAD", 4)
    _, want = run(*adapted(True))
    flux, state = adapted(True)
    run(flux, state, steps=3)
    save_checkpoint(tmp_path / "c.safetensors", state, {}, {"data": "sets"})
    flux, state = adapted(True)
    load_checkpoint(tmp_path / "c.safetensors", state, lambda line: None)
    assert state.step == 3 and torch.equal(run(flux, state)[1], want)


def test_the_lora_is_saved_with_its_names(tmp_path):
    for tables in (False, True):
        flux, _ = adapted(tables)
        save_lora(flux, tmp_path / f"{tables}.safetensors", "kohya")
    assert (tmp_path / "True.safetensors").read_bytes() == (tmp_path / "False.safetensors").read_bytes()
