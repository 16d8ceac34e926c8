"""Training without the script: what is drawn, the loss, the loop, averages, checkpoints, curves; on random networks."""

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import iclora.training as training
import model.checkpoint
from iclora.checkpoint import (
    as_begun,
    averaged,
    digest,
    last_good,
    load_checkpoint,
    new_state,
    only_run,
    read_checkpoint,
    refuse_other_run,
    save_checkpoint,
    start_folder,
    write_atomic,
)
from iclora.config import DEV, SCHNELL, TINY, TrainConfig, resolve_training_defaults, saved
from iclora.layout import Layout, generate_mask
from iclora.loader import Batch
from iclora.monitor import CURVE_SIZE, Metrics, draw_curve
from iclora.processes import sum_over_processes
from iclora.references import image_ids
from iclora.training import flow_loss, micro_batches, sample_kept, sample_step, sample_times
from model.checkpoint import read_header, save_safetensors
from model.flux import Flux, FluxConfig
from model.lora import attach, trainable
from model.position import grid_ids, reference_ids
from sampling.flow import time_stretch
from sampling.latents import pack
from train import train

PAIR = Layout(1, 2, 32, 32)  # 8 tokens
TOKENS = PAIR.image_tokens
ORIGIN = {"data": "sets", "model": "base", "encoders": "T5", "init_lora": "one"}
CONFIG = resolve_training_defaults(
    TrainConfig(rank=2, steps=6, batch=4, lr=0.01, warmup=2, decay=0.0, dropout=0.5), TINY, "cpu"
)
PANELS = replace(CONFIG, condition="clean")


def network(guidance=True, blocks=1):
    torch.manual_seed(0)
    shape = FluxConfig(64, 64, 6, 5, 32, 48, 1, blocks, blocks, (4, 14, 14), guidance)
    return Flux(shape).requires_grad_(False).eval()


def adapted(**more):
    flux = network(**more)
    attach(flux, "all-linear", 2, generator=torch.Generator().manual_seed(1))
    return flux, new_state(trainable(flux))


class Shelf:
    """A loader of random sets, by number; the caption of a set is its number, and of a left out one zeros."""

    def __init__(self, count=8, layout=PAIR):
        draw = torch.Generator().manual_seed(2)
        shape = (16, layout.height // 8, layout.width // 8)
        self.z, self.known = (torch.randn(count, *shape, generator=draw) for _ in range(2))
        self.txt, self.vec = torch.randn(count, 3, 5, generator=draw), torch.randn(count, 6, generator=draw)
        self.layout, self.held_out = layout, [(layout, [count - 2, count - 1])]

    def batch(self, number):
        return self.layout, [(4 * number + i) % 6 for i in range(4)]

    def collate(self, layout, examples, kept, dropped):
        told = 1 - torch.tensor(dropped, dtype=torch.float)
        texts = self.txt[examples] * told[:, None, None], self.vec[examples] * told[:, None]
        if not any(kept):
            return Batch(self.z[examples], *texts)
        hidden = [[p for p in range(1, layout.panels + 1) if p not in some] for some in kept]
        generated = torch.cat([generate_mask(panels, layout).bool() for panels in hidden])
        return Batch(self.z[examples], *texts, self.known[examples], generated)


class Ledger:
    """Stands for the monitor: notes losses, and what is to be saved and drawn."""

    def __init__(self):
        self.losses = []

    def log(self, loss):
        self.losses.append(loss)

    def due(self, every):
        return False

    def save(self):
        pass


def run(config=CONFIG, steps=None, flux_and_state=None, ledger=None):
    flux, state = flux_and_state or adapted()
    ledger = ledger or Ledger()
    train(replace(config, steps=steps or config.steps), flux, Shelf(), state, ledger)
    return state, ledger.losses


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.parameters])


# what is drawn


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_draws_the_same_for_any_number_of_processes(ranks, accumulate):
    whole = sample_step(PANELS, 3, 8, PAIR)
    shares = [s for rank in range(ranks) for s in micro_batches(8, rank, ranks, accumulate)]
    pieces = [sample_step(PANELS, 3, 8, PAIR)[share] for share in shares]
    assert torch.equal(torch.cat([piece.noise for piece in pieces]), whole.noise)
    assert torch.equal(torch.cat([piece.t for piece in pieces]), whole.t)
    assert [kept for piece in pieces for kept in piece.kept] == whole.kept
    assert [left for piece in pieces for left in piece.dropped] == whole.dropped


def test_steps_and_seeds_draw_differently_and_the_largest_seed_works():
    drawn = [
        sample_step(replace(CONFIG, seed=seed), step, 2, PAIR).noise for seed in (0, 1, 2**63 - 1) for step in (0, 1)
    ]
    assert len({noise.numpy().tobytes() for noise in drawn}) == 6


def test_captions_are_left_out_as_often_as_asked_for():
    dropped = [left for step in range(100) for left in sample_step(replace(CONFIG, dropout=0.2), step, 8, PAIR).dropped]
    assert 0.15 < sum(dropped) / len(dropped) < 0.25
    assert not any(sample_step(replace(CONFIG, dropout=0.0), 0, 64, PAIR).dropped)


@pytest.mark.parametrize(("count", "ranks", "accumulate"), [(8, 1, 1), (8, 2, 1), (8, 1, 4), (8, 2, 2), (6, 3, 1)])
def test_a_batch_is_cut_evenly_and_wholly(count, ranks, accumulate):
    cut = [
        list(range(count))[share] for rank in range(ranks) for share in micro_batches(count, rank, ranks, accumulate)
    ]
    assert [i for piece in cut for i in piece] == list(range(count))
    assert {len(piece) for piece in cut} == {count // ranks // accumulate}


@pytest.mark.parametrize(("count", "ranks", "accumulate"), [(4, 3, 1), (4, 1, 3), (6, 2, 2), (1, 2, 1)])
def test_a_batch_that_cannot_be_cut_is_refused(count, ranks, accumulate):
    message = f"a batch of {count} cannot be cut for {ranks} processes and --accumulate {accumulate}; use a --batch"
    with pytest.raises(ValueError, match=message):
        micro_batches(count, 0, ranks, accumulate)


def times(kind, tokens=TOKENS):
    return sample_times(kind, 20_000, tokens, torch.Generator().manual_seed(3))


def test_logit_normal_times_gather_around_one_half():
    t = times("logit-normal")
    assert 0 < t.min() and t.max() < 1 and abs(t.median() - 0.5) < 0.01
    assert abs(t.logit().mean()) < 0.02 and abs(t.logit().std() - 1) < 0.02


def test_uniform_times_are_even():
    counts = torch.histc(times("uniform"), 10, 0, 1)
    assert abs(counts / 2000 - 1).max() < 0.08


@pytest.mark.parametrize("tokens", [TOKENS, 256, 4096])
def test_shifted_times_are_uniform_ones_moved_towards_noise_as_in_sampling(tokens):
    even, stretch = times("uniform"), time_stretch(tokens)
    assert torch.allclose(times("shifted", tokens), stretch * even / (1 + (stretch - 1) * even))
    assert (times("shifted", 4096) >= even).all()


@pytest.mark.parametrize("panels", [1, 2, 3, 4])
def test_any_panels_are_kept_but_never_all(panels):
    draws = torch.Generator().manual_seed(0)
    seen = {sample_kept(panels, draws) for _ in range(600)}
    every = {tuple(p for p in range(1, panels + 1) if bits >> (p - 1) & 1) for bits in range(2**panels - 1)}
    assert seen == every


def test_panels_are_kept_under_clean_conditioning_only():
    assert sample_step(CONFIG, 0, 8, PAIR).kept == [()] * 8
    assert set(sample_step(PANELS, 0, 64, PAIR).kept) == {(), (1,), (2,)}


WITH = replace(PAIR, references=((32, 16), (16, 16)))  # 3 tokens
PAIRS = replace(CONFIG, method="uno", posterior="sample", offset="d", offset_scale=1.0)


def test_references_are_drawn_anew_in_every_step_and_change_nothing_else_of_what_is_drawn():
    first, second, mean = (
        sample_step(PAIRS, 3, 8, WITH),
        sample_step(PAIRS, 4, 8, WITH),
        sample_step(CONFIG, 3, 8, WITH),
    )
    assert first.ref_noise.shape == (8, 3, 64) and not torch.equal(first.ref_noise, second.ref_noise)
    assert torch.equal(first.noise, mean.noise) and torch.equal(first.t, mean.t) and mean.ref_noise is None
    pieces = [first[share].ref_noise for rank in range(2) for share in micro_batches(8, rank, 2, 2)]
    assert torch.equal(torch.cat(pieces), first.ref_noise)


def test_targets_are_drawn_anew_in_every_step_and_change_nothing_else_of_what_is_drawn():
    sampled = replace(PAIRS, target_posterior="sample")
    first, second, mean = (sample_step(*which, 8, WITH) for which in ((sampled, 3), (sampled, 4), (PAIRS, 3)))
    assert first.z_noise.shape == (8, 16, 4, 8) and not torch.equal(first.z_noise, second.z_noise)
    assert torch.equal(first.noise, mean.noise) and torch.equal(first.ref_noise, mean.ref_noise)
    assert mean.z_noise is None
    pieces = [first[share].z_noise for rank in range(2) for share in micro_batches(8, rank, 2, 2)]
    assert torch.equal(torch.cat(pieces), first.z_noise)


def test_what_is_learnt_is_the_drawn_target():
    sets, noise, t = ingredients()
    drawn = replace(sets, z_std=torch.full_like(sets.z, 0.5)).sample_posterior(None, torch.ones_like(sets.z))
    assert float(flow_loss(Spy(noise - pack(sets.z + 0.5)), drawn, noise, t).max()) == 0


# the loss


class Spy(torch.nn.Module):
    """Notes what a transformer is called with, and answers with a fixed velocity."""

    def __init__(self, v, guidance=True):
        super().__init__()
        self.v, self.config = v, network(guidance).config

    def forward(self, *called):
        self.called = called
        return self.v


def ingredients(kept=((), ())):
    noise = torch.randn(2, TOKENS, 64, generator=torch.Generator().manual_seed(5))
    return Shelf().collate(PAIR, [0, 1], kept, [False, False]), noise, torch.tensor([0.25, 0.75])


def test_the_loss_is_the_squared_error_of_the_velocity():
    sets, noise, t = ingredients()
    v = torch.randn(2, TOKENS, 64)
    spy = Spy(v)
    loss = flow_loss(spy, sets, noise, t)
    data = pack(sets.z)
    assert torch.allclose(loss, torch.stack([((v - (noise - data)) ** 2)[i].mean() for i in range(2)]))
    assert torch.allclose(spy.called[0], torch.stack([(1 - t[i]) * data[i] + t[i] * noise[i] for i in range(2)]))
    assert torch.equal(spy.called[2], sets.txt) and torch.equal(spy.called[5], sets.vec)
    assert torch.equal(spy.called[4], t)
    assert float(flow_loss(Spy(noise - data), sets, noise, t).max()) == 0


def test_the_transformer_is_told_guidance_one_if_it_takes_any():
    sets, noise, t = ingredients()
    spy = Spy(noise)
    flow_loss(spy, sets, noise, t)
    assert spy.called[6].tolist() == [1.0, 1.0]
    spy = Spy(noise, guidance=False)
    flow_loss(spy, sets, noise, t)
    assert spy.called[6] is None


def test_kept_panels_stand_clean_in_the_input_and_do_not_count():
    sets, noise, t = ingredients(kept=((1,), ()))
    v = torch.randn(2, TOKENS, 64)
    spy = Spy(v)
    loss = flow_loss(spy, sets, noise, t)
    x, data, known = spy.called[0], pack(sets.z), pack(sets.known)
    left, right = (generate_mask([panel], PAIR)[0, :, 0].bool() for panel in (1, 2))
    assert torch.equal(x[0, left], known[0, left])
    assert torch.allclose(x[0, right], (0.75 * data + 0.25 * noise)[0, right])
    assert torch.allclose(x[1], (0.25 * data + 0.75 * noise)[1]), "the second example keeps nothing"
    error = ((v - (noise - data)) ** 2).mean(dim=-1)
    assert torch.allclose(loss, torch.stack((error[0, right].mean(), error[1].mean())))
    v[0, left] = 1e6
    assert torch.allclose(flow_loss(Spy(v), sets, noise, t), loss)


def test_what_is_kept_is_never_taken_from_the_whole_composite():
    sets, noise, t = ingredients(kept=((1,), (2,)))
    spy = Spy(noise)
    flow_loss(spy, sets, noise, t)
    before = spy.called[0]
    left = generate_mask([1], PAIR)[0, :, 0].bool()
    z = sets.z.clone()
    z[0, :, :, 4:] += 1  # of the panel that is asked for, in the first example
    z[0, :, :, :4] += 1  # and what the autoencoder made of its neighbour beside it
    flow_loss(spy, replace(sets, z=z), noise, t)
    assert torch.equal(spy.called[0][0, left], before[0, left])
    assert not torch.equal(spy.called[0][0, ~left], before[0, ~left])


def referred(posterior=None):
    sets, noise, t = ingredients()
    shown = torch.randn(2, 2, 3, 64, generator=torch.Generator().manual_seed(6))
    batch = replace(sets, references=shown[0], ref_std=shown[1], ids=image_ids(WITH, "d", 1))
    return batch.sample_posterior(posterior), noise, t


def test_references_stand_clean_behind_the_target_and_the_loss_is_on_the_target_alone():
    sets, noise, t = referred()
    spy = Spy(torch.zeros(2, TOKENS, 64))
    loss = flow_loss(spy, sets, noise, t)
    assert torch.equal(spy.called[8], sets.references) and spy.called[0].shape == (2, TOKENS, 64)
    assert spy.called[9] is False
    flow_loss(spy, replace(sets.to("cpu"), isolate_refs=True), noise, t)
    assert spy.called[9] is True
    ids = torch.cat([grid_ids(2, 4), *reference_ids((2, 4), [(1, 2), (1, 1)])])
    assert torch.equal(spy.called[1], torch.stack((ids, ids)))
    assert torch.allclose(loss, (noise - pack(sets.z)).square().mean(dim=(1, 2)))
    flux, _ = adapted()
    other = replace(sets, references=sets.references + 1)
    assert (flow_loss(flux, sets, noise, t) - flow_loss(flux, other, noise, t)).abs().min() > 1e-6


def test_a_drawn_reference_is_the_mean_and_the_spread_times_noise():
    posterior = torch.randn(2, 3, 64)
    mean, drawn = referred()[0], referred(posterior)[0]
    assert torch.equal(drawn.references, mean.references + mean.ref_std * posterior)


def test_the_transformer_predicts_the_same_with_references_in_front_or_aside():
    flux, sets, x = network(), referred()[0], torch.randn(2, TOKENS, 64)
    more = (sets.txt, torch.zeros(2, 3, 3), torch.tensor([0.3, 0.6]), sets.vec, torch.ones(2))
    ids = sets.ids.expand(2, -1, -1)
    together = flux(torch.cat((x, sets.references), dim=1), ids, *more)
    assert together.shape == (2, TOKENS + 3, 64)
    aside = flux(x, ids, *more, None, sets.references)
    assert torch.allclose(aside, together[:, :TOKENS], atol=1e-5)
    attach(flux, "uno", 2)
    assert torch.equal(flux(x, ids, *more, None, sets.references), aside), "fresh adapters change nothing"


def test_recomputing_activations_gives_the_same_loss_and_gradients():
    sets, noise, t = ingredients(kept=((1,), ()))
    results = []
    for recompute in (False, True):
        flux, state = adapted(blocks=2)
        for p in state.parameters:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
        if recompute:
            training.checkpoint_blocks(flux)
        loss = flow_loss(flux, sets, noise, t).sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in state.parameters)])
    assert len(results[0]) > 50 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(float(grad.abs().max()) > 0 for grad in results[0])


def test_recomputing_really_keeps_fewer_activations():
    sets, noise, t = ingredients()
    kept = []
    for recompute in (False, True):
        flux, _ = adapted(blocks=2)
        if recompute:
            training.checkpoint_blocks(flux)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            flow_loss(flux, sets, noise, t)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_the_validation_loss_repeats_exactly_and_sees_a_change():
    flux, state = adapted()
    shelf = Shelf()
    cpu = torch.device("cpu")
    losses = [training.validation_loss(flux, shelf, condition, cpu) for condition in ("none", "clean") for _ in "ab"]
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]
    assert all(map(math.isfinite, losses))
    torch.nn.init.normal_(state.parameters[1])
    assert training.validation_loss(flux, shelf, "none", cpu) != losses[0]


def test_validation_keeps_panels_clean_if_training_does():
    flux, _ = adapted()
    kept = {}
    for condition in ("none", "clean"):
        shelf, asked = Shelf(), []
        real = shelf.collate
        shelf.collate = lambda layout, examples, some, dropped, real=real, asked=asked: (
            asked.extend(some) or real(layout, examples, some, dropped)
        )
        training.validation_loss(flux, shelf, condition, torch.device("cpu"))
        kept[condition] = asked
    assert set(kept["none"]) == {()}
    assert len(kept["clean"]) == 10 and set(kept["clean"]) == {(), (1,), (2,)}


# the loop


def test_training_lowers_the_loss():
    config = replace(CONFIG, dropout=0.0)
    state, losses = run(config, steps=60)
    assert state.step == len(losses) == 60
    assert sum(losses[-15:]) < 0.97 * sum(losses[:15])


def test_only_the_adapters_change():
    flux, state = adapted()
    before = {name: p.clone() for name, p in flux.named_parameters()}
    run(flux_and_state=(flux, state))
    changed = {name for name, p in flux.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".adapters." in name for name in changed)
    assert len(changed) == len(state.parameters)


@pytest.mark.parametrize("config", [CONFIG, PANELS], ids=["text", "clean"])
def test_a_batch_in_parts_gives_what_the_whole_batch_gives(config):
    whole, losses = run(config)
    for accumulate in (2, 4):
        cut, same = run(replace(config, accumulate=accumulate))
        assert torch.allclose(torch.tensor(same), torch.tensor(losses), rtol=1e-5)
        assert (weights(cut) - weights(whole)).norm() < 1e-5 * weights(whole).norm()


def test_the_rate_warms_up_stays_and_falls():
    config = replace(CONFIG, lr=0.5, warmup=4, steps=1000, decay=0.0)
    assert [training.learning_rate(config, step) for step in (0, 1, 3, 4, 999)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    falling = replace(config, decay=0.4)
    assert [training.learning_rate(falling, step) for step in (0, 4, 600, 800)] == [0.125, 0.5, 0.5, 0.25]
    assert training.learning_rate(falling, 999) == pytest.approx(0.5 / 400)
    assert training.learning_rate(replace(config, decay=1.0), 500) == 0.25
    assert training.learning_rate(replace(config, warmup=0), 0) == 0.5


def test_a_large_gradient_is_clipped(monkeypatch):
    first, _ = run(steps=1)
    monkeypatch.setattr(training, "flow_loss", lambda *a, loss=flow_loss: 1e4 * loss(*a))
    second, _ = run(steps=1)
    moments = [state.optimizers[0].state_dict()["state"] for state in (first, second)]
    norms = [math.sqrt(sum(float((m["exp_avg"] / 0.1).square().sum()) for m in own.values())) for own in moments]
    assert norms[1] == pytest.approx(1.0, rel=1e-3), "the first moment is a tenth of the gradient"


def test_a_loss_that_is_not_finite_ends_the_run_before_it_changes_anything(monkeypatch):
    flux, state = adapted()
    run(steps=2, flux_and_state=(flux, state))
    before = weights(state)
    monkeypatch.setattr(training, "flow_loss", lambda *a, loss=flow_loss: loss(*a) * math.inf)
    with pytest.raises(ValueError, match="training diverged: in step 3 the loss is inf, .* with a lower --lr and anot"):
        run(flux_and_state=(flux, state))
    assert state.step == 2 and torch.equal(weights(state), before)


def test_who_asks_to_stop_waits_for_the_step_to_be_whole():
    class Interrupter(Ledger):
        def log(self, loss):
            super().log(loss)
            if len(self.losses) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    state, losses = run(ledger=Interrupter())
    assert state.step == len(losses) == 3
    assert torch.equal(weights(run(flux_and_state=None, steps=3)[0]), weights(state))


# averages


def test_the_average_follows_the_weights_and_forgets_the_first_steps_sooner():
    flux, state = adapted()
    average = [p.detach().clone() for p in state.parameters]

    class Follower(Ledger):
        def log(self, loss):
            decay = min(0.5, state.step / (state.step + 9))
            for mean, p in zip(average, state.parameters, strict=True):
                mean.mul_(decay).add_((1 - decay) * p.detach())

    train(replace(CONFIG, ema=0.5, steps=20), flux, Shelf(), state, Follower())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(average, state.average, strict=True))
    assert not torch.allclose(weights(state), torch.cat([a.flatten() for a in average]), atol=1e-4)


def test_without_averaging_the_last_weights_are_saved():
    state, _ = run(replace(CONFIG, ema=0.0))
    assert all(torch.equal(a, p) for a, p in zip(state.average, state.parameters, strict=True))


def test_averaged_puts_the_average_in_place_and_the_weights_back_even_after_an_error():
    state, _ = run()
    before, pointers = weights(state), [p.data_ptr() for p in state.parameters]
    with pytest.raises(KeyError), averaged(state):
        assert torch.equal(weights(state), torch.cat([a.flatten() for a in state.average]))
        assert not torch.equal(weights(state), before)
        raise KeyError
    assert torch.equal(weights(state), before) and pointers == [p.data_ptr() for p in state.parameters]


# checkpoints


@pytest.mark.parametrize("config", [CONFIG, PANELS], ids=["text", "clean"])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_state_that_is_saved_and_loaded_goes_on_to_the_same_bits(tmp_path, config, stop):
    path = tmp_path / "checkpoint.safetensors"
    whole, losses = run(config)
    first, early = run(config, steps=stop)
    save_checkpoint(path, first, saved(config), ORIGIN)
    flux, state = adapted()
    load_checkpoint(path, state)
    assert state.step == stop
    resumed, late = run(config, flux_and_state=(flux, state))
    assert early + late == losses
    assert torch.equal(weights(resumed), weights(whole))
    assert all(torch.equal(a, b) for a, b in zip(resumed.average, whole.average, strict=True))
    written = []
    for number, state in enumerate((resumed, whole)):
        save_checkpoint(tmp_path / str(number), state, saved(config), ORIGIN)
        written.append((tmp_path / str(number)).read_bytes())
    assert written[0] == written[1]


def test_equal_contents_make_equal_bytes_in_any_number_of_saves(tmp_path):
    tensors = {f"{i}.weight": torch.full((3, i + 1), float(i)) for i in range(30)}
    about = {f"key {i}": f"value {i}" for i in range(30)}
    hashes = set()
    for _ in range(20):
        save_safetensors(tensors, tmp_path / "a.safetensors", dict(reversed(about.items())))
        hashes.add(hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest())
    assert len(hashes) == 1
    assert model.checkpoint.read_header(tmp_path / "a.safetensors")[1].items() >= about.items()


CHANGES = {
    "method": "uno", "stage": 2, "ref_size": 32, "offset": "h", "offset_scale": 2.0, "posterior": "mean",
    "reference_attention": "alone", "rank": 4, "targets": "attn", "condition": "clean", "concat": "tokens",
    "text": "panel", "batch": 2, "lr": 0.5, "warmup": 3, "decay": 0.5, "ema": 0.5, "dropout": 0.25, "times": "uniform",
    "panel_size": 48, "composite_size": "64,96", "preset": "couple-profile", "lora_init": "uno", "eps": 1e-6,
    "target_posterior": "sample", "fit": "pad", "holdout": 0.5, "seed": 1, "grid": "1x2", "dtype": "bfloat16",
    "quantize": "fp8",
}  # fmt: skip
FREE = {
    "steps": 9, "save_every": 9, "sample_every": 9, "sample_prompt": ("a fox",),
    "accumulate": 2, "checkpointing": "auto", "device": "cuda", "compile": True, "offload": True, "vram": 12.0,
    "dry_run": True,
    "tensorboard": True, "out": "elsewhere", "config": "a.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint.safetensors"
    save_checkpoint(path, run(steps=1)[0], saved(CONFIG), ORIGIN)
    return path


def test_a_run_from_before_an_option_existed_goes_on_with_the_value_of_then(tmp_path):
    path, old = tmp_path / "checkpoint.safetensors", {**saved(CONFIG), "eps": None}
    for name in ("eps", "lora_init", "target_posterior", "composite_size", "preset"):
        del old[name]
    save_checkpoint(path, run(steps=1)[0], old, ORIGIN)
    refuse_other_run(path, CONFIG, ORIGIN)
    for name, before in (("eps", "1e-08"), ("lora_init", "kaiming"), ("target_posterior", "mean")):
        now = CHANGES[name]
        with pytest.raises(ValueError, match=f"with --{name.replace('_', '-')} {before}, not {now}; give the same"):
            refuse_other_run(path, replace(CONFIG, **{name: now}), ORIGIN)
    then = {"lora_init": "kaiming", "target_posterior": "mean", "eps": 1e-8}
    for method in ("uno", "in-context-lora"):  # on a model whose defaults are others now
        begun, found = as_begun(TrainConfig(method=method, out=str(tmp_path)), print)
        assert found == path
        config = resolve_training_defaults(begun, DEV, "cpu")
        assert {name: getattr(config, name) for name in then} == then
    assert as_begun(TrainConfig(eps=1e-6, out=str(tmp_path)), print)[0].eps == 1e-6, "which is then refused"


def test_a_run_that_begins_now_or_knew_the_option_keeps_its_own(tmp_path, checkpoint):
    fresh, begun = (TrainConfig(out=str(folder)) for folder in (tmp_path / "none", checkpoint.parent))
    assert as_begun(fresh, print) == (fresh, None) and as_begun(begun, print) == (begun, checkpoint)


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_is_refused_with_its_flag_and_both_values(checkpoint, name):
    before, now = getattr(CONFIG, name), CHANGES[name]
    with pytest.raises(ValueError) as caught:
        refuse_other_run(checkpoint, replace(CONFIG, **{name: now}), ORIGIN)
    assert str(caught.value) == (
        f"{checkpoint.parent} holds a run with --{name.replace('_', '-')} {before}, not {now}; "
        "give the same settings to go on, or another --out"
    )


@pytest.mark.parametrize("name", FREE)
def test_a_setting_without_influence_on_the_result_may_change(checkpoint, name):
    refuse_other_run(checkpoint, replace(CONFIG, **{name: FREE[name]}), ORIGIN)


def test_a_run_whose_rate_falls_keeps_its_number_of_steps(tmp_path):
    falling, path = replace(CONFIG, decay=0.5), tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, run(falling, steps=1)[0], saved(falling), ORIGIN)
    refuse_other_run(path, falling, ORIGIN)
    with pytest.raises(ValueError, match="holds a run with --steps 6, not 9; give the same settings to go on"):
        refuse_other_run(path, replace(falling, steps=9), ORIGIN)


def test_every_setting_is_either_refused_or_free():
    assert CHANGES.keys() | FREE.keys() | {"data", "model", "init_lora"} == vars(CONFIG).keys()


@pytest.mark.parametrize(("name", "flag"), [("data", "--data sets"), ("model", "--model tiny")])
def test_sets_and_model_are_compared_by_content_and_not_by_name(checkpoint, name, flag):
    moved = replace(CONFIG, **{name: "elsewhere"})
    refuse_other_run(checkpoint, moved, ORIGIN)
    other = {**ORIGIN, name: "other"}
    with pytest.raises(ValueError, match=f"holds a run with {flag}, not elsewhere; give the same"):
        refuse_other_run(checkpoint, moved, other)
    with pytest.raises(ValueError, match=f"holds a run with {flag}, not {flag.split()[1]} with other content; give"):
        refuse_other_run(checkpoint, CONFIG, other)


def test_other_encoders_or_another_lora_before_it_are_another_run(checkpoint):
    with pytest.raises(ValueError, match="holds a run with --model tiny, not tiny with other content; give the same"):
        refuse_other_run(checkpoint, CONFIG, {**ORIGIN, "encoders": "others"})
    with pytest.raises(ValueError, match="holds a run with --init-lora None, not b; give the same"):
        refuse_other_run(checkpoint, replace(CONFIG, init_lora="b"), {**ORIGIN, "init_lora": "other"})
    refuse_other_run(checkpoint, replace(CONFIG, init_lora="moved"), ORIGIN)


def test_a_checkpoint_from_before_a_mark_existed_goes_on(tmp_path):
    started, path = replace(CONFIG, init_lora="one"), tmp_path / "c.safetensors"
    save_checkpoint(path, run(CONFIG, steps=1)[0], saved(started), {"data": "sets", "model": "base"})
    refuse_other_run(path, started, ORIGIN)
    for other in ("other", None):  # then by name, as it was
        with pytest.raises(ValueError, match=f"holds a run with --init-lora one, not {other}; give the same"):
            refuse_other_run(path, replace(CONFIG, init_lora=other), ORIGIN)


def test_without_a_checkpoint_anything_may_begin(tmp_path):
    start_folder(tmp_path, CONFIG)
    refuse_other_run(None, replace(CONFIG, rank=8, out=str(tmp_path)), {})
    refuse_other_run(None, replace(CONFIG, out=str(tmp_path / "none")), {})


@pytest.mark.parametrize("name", ["config.json", "lora.safetensors", "loss.png", "metrics.jsonl"])
def test_a_folder_in_which_somebody_elses_file_would_be_overwritten_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").write_text("mine")
    refuse_other_run(None, replace(CONFIG, out=str(tmp_path)), {})
    (tmp_path / name).write_text('{"config": {"rank": 4}}')
    with pytest.raises(ValueError, match=f"has a {name} that is not train.py's and would be overwritten; give another"):
        refuse_other_run(None, replace(CONFIG, out=str(tmp_path)), {})
    assert sorted(os.listdir(tmp_path)) == sorted(["notes.txt", name])


def test_a_run_that_does_not_say_what_it_learnt_from_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, run(steps=1)[0], saved(CONFIG), {})
    with pytest.raises(ValueError, match="does not say what it was trained on; remove it"):
        refuse_other_run(path, CONFIG, ORIGIN)


def beside(tmp_path, steps=(1, 2)):
    """The last checkpoint and the one before it, of two saves."""
    path = tmp_path / "checkpoint.safetensors"
    for step in steps:
        save_checkpoint(path, run(steps=step)[0], saved(CONFIG), ORIGIN)
    return path, tmp_path / "checkpoint.previous.safetensors"


def test_the_checkpoint_before_the_last_one_is_kept_until_the_next_step_is_saved(tmp_path):
    path, earlier = beside(tmp_path, (1, 2, 2))
    assert [read_checkpoint(each)[2] for each in (path, earlier)] == [2, 1], "the same step twice is one save"
    assert not path.samefile(earlier)
    save_checkpoint(path, run(steps=3)[0], saved(CONFIG), ORIGIN)
    assert [read_checkpoint(each)[2] for each in (path, earlier)] == [3, 2]


@pytest.mark.parametrize("kind", ["cut", "flipped", "gone", "a folder"])
def test_damage_costs_one_interval_and_not_the_run(tmp_path, kind):
    path, earlier = beside(tmp_path)
    data, said = bytearray(path.read_bytes()), []
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind != "gone":
        data[-5] ^= 1
        path.write_bytes(data[:-1] if kind == "cut" else data)
    assert last_good(path, said.append) == earlier
    assert len(said) == 1 and said[0].endswith("; going on from the one before it, step 1") and "\n" not in said[0]
    earlier.write_bytes(earlier.read_bytes()[:-1])
    with pytest.raises(ValueError, match="; remove it, and any beside it, to start anew"):
        last_good(path, said.append)
    assert len(said) == 1


def test_whole_checkpoints_are_gone_on_from_without_a_word_and_none_is_none(tmp_path):
    path, _ = beside(tmp_path)
    assert last_good(path, pytest.fail) == path and last_good(tmp_path / "none" / path.name, pytest.fail) is None


DAMAGE = {
    "cut short": lambda data: data[:-1], "empty": lambda data: b"", "no header": lambda data: b"junk" * 100,
    "too long": lambda data: data + b"x",
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_one_line_that_says_what_to_do(checkpoint, tmp_path, kind):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(DAMAGE[kind](checkpoint.read_bytes()))
    with pytest.raises(ValueError, match="checkpoint.safetensors .*; remove it, .* start anew, or give anot") as caught:
        refuse_other_run(path, CONFIG, ORIGIN)
    assert "\n" not in str(caught.value) and path.exists()


@pytest.mark.parametrize("where", ["weight", "moment", "step"])
def test_a_flipped_bit_is_told(checkpoint, tmp_path, where):
    path, data = tmp_path / "checkpoint.safetensors", bytearray(checkpoint.read_bytes())
    size = 8 + int.from_bytes(data[:8], "little")
    at = {"weight": size + 5, "moment": len(data) - 5, "step": data.index(b'"step":"') + 8}[where]
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: it does not hold what was written; remove it, .* to start anew"):
        load_checkpoint(path, adapted()[1])


def test_a_folder_is_one_run_s_at_a_time(tmp_path):
    tmp_path = tmp_path / "run"
    with only_run(tmp_path):
        with pytest.raises(ValueError, match="another run works in .*; wait until it has ended, or give another --out"):
            with only_run(tmp_path):
                pass
        assert not list(tmp_path.iterdir())
    assert not tmp_path.exists(), "nothing was written in it"
    with only_run(tmp_path):  # the other one has ended
        (tmp_path / "file").touch()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.slow
def test_a_lock_dies_with_its_process(tmp_path):
    code = "import os, sys, pathlib; from iclora.checkpoint import only_run\n"
    code += "with only_run(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another run works in"), only_run(tmp_path):
            pass
        other.kill()
    with only_run(tmp_path):
        pass


def test_what_is_no_checkpoint_is_not_taken_for_one(checkpoint, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_safetensors({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no checkpoint of train.py; remove it"):
        read_checkpoint(path)
    for odd in ({"step": "10" * 9}, {"step": "[1, 2]"}, {"config": "[]"}, {"origin": "null"}, {"origin": "[" * 10**5}):
        save_safetensors({"a": torch.zeros(1)}, path, {"step": "1", "config": "{}", "origin": "{}"} | odd)
        with pytest.raises(ValueError, match="is no checkpoint of train.py; remove it"):
            read_checkpoint(path)
    save_safetensors({"a": torch.zeros(1)}, path, {"step": "1", "config": "{}", "origin": "{}"})
    with pytest.raises(ValueError, match="does not hold what this run trains .*; remove it"):
        load_checkpoint(path, adapted()[1])


def test_a_checkpoint_that_was_damaged_during_the_run_is_replaced_and_not_kept(tmp_path):
    path, earlier = beside(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    save_checkpoint(path, run(steps=3)[0], saved(CONFIG), ORIGIN)
    assert [read_checkpoint(each)[2] for each in (path, earlier)] == [3, 1]


ODD = {
    "a moment of another shape": lambda t: t | {"0.optimizer.exp_avg": torch.ones(3)},
    "a moment that is missing": lambda t: {k: v for k, v in t.items() if k != "1.optimizer.exp_avg_sq"},
    "a step of two numbers": lambda t: t | {"0.optimizer.step": torch.ones(2)},
    "weights of another type": lambda t: t | {"0.weight": t["0.weight"].bfloat16()},
    "one tensor too many": lambda t: t | {"99.weight": torch.ones(1)},
    "no averages": lambda t: {k: v for k, v in t.items() if not k.endswith("average")},
}


@pytest.mark.parametrize("kind", ODD)
def test_a_checkpoint_holds_exactly_what_the_run_trains(checkpoint, tmp_path, kind):
    path, (_, metadata) = tmp_path / "checkpoint.safetensors", read_header(checkpoint)
    tensors = ODD[kind](load_file(checkpoint))
    save_safetensors(tensors, path, metadata | {"digest": digest(tensors, metadata)})
    with pytest.raises(ValueError, match="does not hold what this run trains .*; remove it"):
        load_checkpoint(path, adapted()[1])
    with torch.device("meta"):
        flux = Flux(network().config)
    fresh = new_state(attach(flux, "all-linear", 2, generator=torch.Generator()))
    refuse_other_run(checkpoint, CONFIG, ORIGIN, fresh=fresh)
    with pytest.raises(ValueError, match="does not hold what this run trains .*; remove it"):
        refuse_other_run(path, CONFIG, ORIGIN, fresh=fresh)  # which needs no data


def test_a_cpu_with_other_features_is_told(checkpoint, tmp_path, monkeypatch):
    said = []
    load_checkpoint(checkpoint, adapted()[1], said.append)
    assert said == []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VAX")
    load_checkpoint(checkpoint, adapted()[1], said.append)
    assert len(said) == 1 and said[0].endswith("and goes on with VAX; it may end in slightly other numbers")


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "model.checkpoint.save_file"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_scraps(checkpoint, tmp_path, monkeypatch, where):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(checkpoint.read_bytes())
    write_atomic(tmp_path / "metrics.jsonl", "earlier\n")
    state, _ = run(steps=2)
    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, state, saved(CONFIG), ORIGIN)
    if where != "model.checkpoint.save_file":
        with pytest.raises(OSError, match="No space left"):
            write_atomic(tmp_path / "metrics.jsonl", "later\n")
    found = last_good(path, lambda line: None)
    assert found.read_bytes() == checkpoint.read_bytes() and (tmp_path / "metrics.jsonl").read_text() == "earlier\n"
    assert sorted(os.listdir(tmp_path)) == [found.name, "metrics.jsonl"]


def test_a_new_start_clears_away_what_a_kill_left(tmp_path):
    fresh = ".checkpoint.safetensors.fresh.tmp"
    scraps = [".checkpoint.safetensors.77.tmp", fresh, f".{fresh}.9a.tmp", ".loss.png.0f.tmp", ".tmpN61V6g"]
    mine = [".mine.tmp", "checkpoint.safetensors", "notes.tmp"]
    for name in (*scraps, *mine):
        (tmp_path / name).write_text("")
    start_folder(tmp_path, CONFIG)
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, "config.json"])
    assert json.loads((tmp_path / "config.json").read_text())["config"]["rank"] == 2


# what is seen


def test_metrics_of_steps_that_are_done_again_are_dropped_and_a_cut_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, 0)
    for step in (1, 2, 3):
        first.add(step=step, loss=0.5)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in Metrics(path, 2).rows()] == [1, 2]
    assert Metrics(path, 0).rows() == [] and path.read_text() == ""


def test_lines_of_metrics_that_no_run_writes_do_not_count(tmp_path):
    path, good = tmp_path / "metrics.jsonl", '{"step": 2, "loss": 0.5}'
    odd = ['{"epoch": 1}', "1", "null", "[]", '{"step": 1, "loss": null}', '{"step": "1", "loss": 1}', "[" * 10**5, "x"]
    odd += [
        '{"step": 0, "loss": 1}',
        '{"step": 1.5, "loss": 1}',
        '{"step": 1, "loss": 1' + "0" * 400 + "}",
        '{"loss": 1}',
    ]
    path.write_bytes("\n".join([*odd, good, ""]).encode() + b"\xff\n")
    assert Metrics(path, 5).rows() == [{"step": 2, "loss": 0.5}] and path.read_text() == good + "\n"


def test_metrics_that_are_no_file_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert Metrics(tmp_path / "metrics.jsonl", 5).rows() == []


def colours(path):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        return {colour for _, colour in picture.convert("RGB").getcolors(2**20)}


def test_the_curve_shows_loss_and_validation(tmp_path):
    path = tmp_path / "loss.png"
    rows = [{"step": i, "loss": 1 / i, **({"validation": 2 / i} if i % 5 == 0 else {})} for i in range(1, 31)]
    for _ in range(2):  # the second one replaces the first
        draw_curve(rows, path)
    assert {(20, 90, 170), (210, 80, 30), (255, 255, 255)} <= colours(path)
    assert os.listdir(tmp_path) == ["loss.png"]


def test_the_mean_of_a_short_run_follows_its_losses(tmp_path):
    draw_curve([{"step": i, "loss": float(i == 1)} for i in range(1, 21)], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        places = {(x, y) for x in range(picture.width) for y in range(picture.height)}
        lowest = max(y for x, y in places if picture.getpixel((x, y)) == (20, 90, 170))
    assert lowest > 0.85 * CURVE_SIZE[1], "it ends at the losses, which are at the bottom, not far above them"


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 0.5}],
        [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}],
        [{"step": 1, "loss": 0.5, "validation": 0.5}],
    ],
)
def test_a_short_or_flat_run_has_a_curve_too(tmp_path, rows):
    draw_curve(rows, tmp_path / "loss.png")
    assert len(colours(tmp_path / "loss.png")) > 2


def test_without_any_step_there_is_no_curve(tmp_path):
    draw_curve([], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_curve_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    draw_curve([{"step": 1, "loss": 0.5}], tmp_path / "loss.png")
    before = (tmp_path / "loss.png").read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        draw_curve([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.1}], tmp_path / "loss.png")
    assert os.listdir(tmp_path) == ["loss.png"] and (tmp_path / "loss.png").read_bytes() == before


# defaults and data


@pytest.mark.parametrize(
    ("row", "device", "expected"),
    [
        (DEV, "cuda", (5000, 4, 1e-4, 512, "bfloat16")),
        (SCHNELL, "cuda", (5000, 4, 1e-4, 512, "bfloat16")),
        (TINY, "cpu", (800, 8, 1e-3, 64, "float32")),
    ],
)
def test_the_models_row_decides_what_is_left_open(row, device, expected):
    config = resolve_training_defaults(TrainConfig(), row, device)
    assert (config.steps, config.batch, config.lr, config.panel_size, config.dtype) == expected
    assert (config.rank, config.ema, config.dropout, config.times) == (16, 0.99, 0.05, "logit-normal")
    assert resolve_training_defaults(TrainConfig(steps=3, lr=0.5), row, device).steps == 3


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (DEV, (5000, 16, 1e-5, 512, 512)),
        (SCHNELL, (5000, 16, 1e-5, 512, 512)),
        (TINY, (1500, 16, 1e-3, 64, 64)),
    ],
)
def test_uno_has_settings_of_its_own(row, expected):
    config = resolve_training_defaults(TrainConfig(method="uno"), row, "cpu")
    assert (config.steps, config.batch, config.lr, config.rank, config.panel_size) == expected
    assert (config.targets, config.dropout, config.times, config.stage) == ("uno", 0.1, "shifted", 1)
    assert (config.offset, config.offset_scale, config.posterior, config.ref_size) == ("d", 1.0, "sample", None)
    assert config.reference_attention == "joint"
    assert resolve_training_defaults(config, row, "cpu") == config


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"offset": "w"}, "--offset"),
        ({"stage": 2}, "--stage"),
        ({"ref_size": 64}, "--ref-size"),
        ({"reference_attention": "alone"}, "--reference-attention"),
        ({"method": "uno", "grid": "1x2"}, "--grid"),
        ({"method": "uno", "condition": "clean"}, "--condition"),
        ({"method": "uno", "text": "panel"}, "--text"),
        ({"method": "uno", "concat": "tokens"}, "--concat"),
    ],
)
def test_settings_of_the_other_method_are_refused(given, flag):
    with pytest.raises(ValueError, match=f"^{flag} means nothing to --method [a-z-]+; leave it out$"):
        resolve_training_defaults(TrainConfig(**given), TINY, "cpu")


@pytest.mark.parametrize(
    ("method", "row", "expected"),
    [
        ("in-context-lora", DEV, ("kaiming", "mean", 1e-6)),
        ("in-context-lora", TINY, ("kaiming", "mean", 1e-8)),
        ("uno", DEV, ("uno", "sample", 1e-8)),
        ("uno", TINY, ("kaiming", "mean", 1e-8)),
    ],
)
def test_what_the_official_codes_do_is_the_default_of_their_models(method, row, expected):
    config = resolve_training_defaults(TrainConfig(method=method), row, "cpu")
    assert (config.lora_init, config.target_posterior, config.eps) == expected
    given = TrainConfig(method=method, lora_init="uno", target_posterior="sample", eps=0.5)
    config = resolve_training_defaults(given, row, "cpu")
    assert (config.lora_init, config.target_posterior, config.eps) == ("uno", "sample", 0.5)


def test_how_adapters_begin_and_the_optimizers_eps_are_those_asked_for():
    downs = {}
    for init in ("kaiming", "uno"):
        flux = network()
        training.add_adapters(flux, replace(CONFIG, rank=64, lora_init=init), None)
        downs[init] = torch.cat([p.detach().flatten() for p in trainable(flux)[::2]])
    assert downs["uno"].std() == pytest.approx(1 / 64, rel=0.02) and downs["kaiming"].abs().max() <= 1 / 32**0.5
    assert new_state(trainable(flux), 0.25).optimizers[0].param_groups[0]["eps"] == 0.25


def test_a_preset_brings_its_grid_and_area_and_several_sizes_leave_none_of_a_panel():
    config = resolve_training_defaults(TrainConfig(preset="film-storyboard"), DEV, "cpu")
    assert (config.grid, config.panel_size) == ("3x1", 724)
    config = resolve_training_defaults(TrainConfig(preset="film-storyboard"), TINY, "cpu")
    assert (config.grid, config.panel_size) == ("3x1", 64), "it can draw no others"
    config = resolve_training_defaults(TrainConfig(preset="film-storyboard", grid="1x2", panel_size=512), DEV, "cpu")
    assert (config.grid, config.panel_size) == ("1x2", 512)
    config = resolve_training_defaults(TrainConfig(composite_size="512,768"), DEV, "cpu")
    assert config.panel_size is None and resolve_training_defaults(config, DEV, "cpu") == config
    with pytest.raises(ValueError, match="are two ways to say how large sets are"):
        resolve_training_defaults(TrainConfig(composite_size="512", panel_size=512), DEV, "cpu")


def test_sums_over_one_process_are_left_alone():
    tensor = torch.ones(3)
    sum_over_processes([tensor], 1)
    assert tensor.tolist() == [1, 1, 1]
