import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import T5Tokenizer

from lab import pretrain, sets, train_autoencoder, train_flow, train_text
from lab.captions import DOMAIN_WORDS, ROOM, length, panel_prompt, reticent, say_domain, vocabulary
from lab.domains import with_pencil, with_sparkles
from lab.experiments import load_ruler
from lab.export import EXAMPLES, REFERENCES
from lab.generate import Options, generate, load_networks
from lab.sets import GRIDS, draw_chunk, plan_chunk, plan_sets
from lab.tokenizers import T5_LENGTH, make_clip_tokenizer, make_t5_tokenizer
from lab.training import Clock, Stage, Work, finished, orthogonal, rate, run, step_generator
from lab.world import SHAPES, draw, is_held_out, random_set
from model.position import grid_ids
from model.text import load_text_encoders
from model.weights import find_model, load_autoencoder, load_flux
from sampling.flow import interpolate
from sampling.latents import pack


class Stop(Exception):
    pass


def quadratic(stop_at=None):
    """A model, and a loss that depends on the step's own random numbers and may stop the run as a kill would."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss_at(step, generator):
        if step == stop_at:
            raise Stop
        x = torch.randn(16, 6, generator=generator)
        return {"loss": (model(x) - x.sum(dim=1, keepdim=True)).square().mean()}

    return model, loss_at


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, muon):
    stage = Stage("toy", steps=30, batch=16, lr=0.01, muon_lr=muon, warmup=3)
    settings = dict(is_hidden=lambda name, p: p.ndim == 2, every=0, report=lambda line: None)
    model, loss_at = quadratic()
    whole = run(stage, model, loss_at, Work(tmp_path / "a"), **settings).state_dict()
    for stop_at in (7, 19, None):
        model, loss_at = quadratic(stop_at)
        try:
            resumed = run(stage, model, loss_at, Work(tmp_path / "b"), **settings).state_dict()
        except Stop:
            assert stop_at is not None
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    stage = Stage("toy", steps=3, batch=16, lr=0.01)
    model, loss_at = quadratic()
    run(stage, model, loss_at, Work(tmp_path), report=lambda line: None)
    for other in (Work(tmp_path, seed=1), Work(tmp_path, origin="tiny")):
        with pytest.raises(ValueError, match="belongs to a run whose (seed|origin) is .* give another --work"):
            run(stage, model, loss_at, other, report=lambda line: None)


def test_too_few_or_other_drawn_sets_are_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "CHUNK", 2)
    monkeypatch.setattr(sets, "GRIDS", {(1, 1): sets.GRIDS[1, 1]})

    def drawn(total, seed):
        sets.draw_sets(tmp_path, total, seed, processes=1)
        return sets.load_sets(tmp_path, (1, 1), sets.sets_of((1, 1), total))

    few, more = drawn(8, 0), drawn(24, 0)
    assert len(few) == 2 and len(more) == 4 and torch.equal(more[:2], few)
    assert not torch.equal(drawn(24, 1), more)
    again = drawn(24, 0)
    monkeypatch.setattr(sets, "IN_DOMAIN", {False: 1.0, True: 1.0})  # the same seed decides otherwise
    assert torch.equal(again, more) and not torch.equal(drawn(24, 0), more)


def test_training_reduces_the_loss_and_averages_the_weights(tmp_path):
    model, loss_at = quadratic()

    @torch.no_grad()
    def loss_now():
        return float(loss_at(0, torch.Generator().manual_seed(1))["loss"])

    before = loss_now()
    average = run(Stage("toy", 200, 16, lr=0.05, muon_lr=0.05), model, loss_at, Work(tmp_path),
                  is_hidden=lambda name, p: p.ndim == 2, report=lambda line: None)  # fmt: skip
    assert loss_now() < before / 2
    assert not torch.equal(average[0].weight, model[0].weight)


def test_the_rate_warms_up_stays_and_falls_to_zero():
    stage = Stage("s", steps=100, batch=1, lr=1, warmup=10, decay_from=0.5)
    assert rate(stage, 0, 0.0) == 0.1 and rate(stage, 40, 0.4) == 1
    assert 0.4 < rate(stage, 75, 0.75) < 0.6 and rate(stage, 99, 0.99) < 0.01
    assert rate(dataclasses.replace(stage, decay_from=1.0), 99, 0.99) == 1


class Watch:
    """A clock whose seconds are those of a list, one more a step."""

    def __init__(self, *seconds):
        self.times = iter(np.cumsum(seconds).tolist())

    def __call__(self):
        return next(self.times)


def test_a_stage_by_the_clock_ends_when_its_seconds_are_over_and_its_rate_follows_them(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr("lab.training.rate", lambda *state: rates.append(rate(*state)) or rates[-1])
    stage = Stage("toy", steps=2, batch=16, lr=0.01, warmup=1, decay_from=0.5, seconds=10.0)
    model, loss_at = quadratic()
    clock = Clock(stage, Watch(100, 1, 4, 1, 3, 1, 1, 1))  # the first step took 100 seconds, which do not count
    run(stage, model, loss_at, Work(tmp_path), report=lambda line: None, clock=clock)
    shares = [0, 0, 0.1, 0.5, 0.6, 0.9]  # before each step; the next one would begin after 10 seconds
    assert rates == [rate(stage, step, share) for step, share in enumerate(shares)]
    assert clock.seconds == 10 and clock.done == 1 and finished(stage, Work(tmp_path))
    assert not finished(dataclasses.replace(stage, seconds=20.0), Work(tmp_path))


def test_a_killed_stage_by_the_clock_goes_on_with_the_seconds_that_are_left(tmp_path):
    stage = Stage("toy", steps=2, batch=16, lr=0.01, seconds=10.0)
    model, loss_at = quadratic(stop_at=5)
    with pytest.raises(Stop):
        settings = dict(every=0, report=lambda line: None)
        run(stage, model, loss_at, Work(tmp_path), clock=Clock(stage, Watch(0, 1, 2, 1, 2)), **settings)
    lines, steps, (model, loss_at) = [], [], quadratic()
    clock = Clock(stage, Watch(50, 3, 1))
    seen = lambda step, generator: steps.append(step) or loss_at(step, generator)  # noqa: E731
    run(stage, model, seen, Work(tmp_path), report=lines.append, clock=clock)
    assert steps == [5, 6, 7] and clock.seconds == 10, "6 seconds of the killed run, an untimed step, 3 and 1"
    assert lines[-1].startswith("toy 8  loss ") and lines[-1].endswith("0.0 min left")
    run(stage, quadratic()[0], None, Work(tmp_path))  # it is finished, so only loaded


def test_a_bfloat16_stage_keeps_its_weights_and_averages_in_float32(tmp_path):
    stage = Stage("toy", steps=2, batch=16, lr=0.01, muon_lr=0.01, bfloat16=True)
    model, loss_at = quadratic()
    seen = []
    model[0].register_forward_hook(lambda layer, args, out: seen.append(out.dtype))
    average = run(stage, model, loss_at, Work(tmp_path), lambda name, p: p.ndim == 2, report=lambda line: None)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in (*model.parameters(), *average.parameters())} == {torch.float32}
    kept = load_file(tmp_path / "toy.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


def test_processes_beside_know_how_much_of_a_stage_is_done(tmp_path):
    stage = Stage("toy", steps=4, batch=16, lr=0.01)
    clock, (model, loss_at) = Clock(stage), quadratic()
    seen = []

    def with_share(step, generator):
        return {**loss_at(step, generator), "share": torch.tensor(clock.done)}

    run(stage, model, with_share, Work(tmp_path), report=seen.append, clock=clock, processes=2)
    mean = 0.0
    for share in (0.25, 0.5, 0.75):
        mean = 0.98 * mean + 0.02 * share
    assert f"share {mean:.4f}" in seen[0]


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (1, 8, 8)])
def test_muon_moves_singular_values_towards_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape) @ torch.diag(torch.logspace(-1, 1, shape[2]))))
    assert 0.3 < float(values.min()) and float(values.max()) < 1.3


@pytest.fixture(scope="module")
def captions():
    return [text for grid in GRIDS for one in few_of(plan_chunk, grid) for text in one.captions]


def few_of(make, grid, count=4):
    """The sets of a short chunk, planned or drawn."""
    kept, sets.CHUNK = sets.CHUNK, count
    try:
        return make((*grid, 0, 1))
    finally:
        sets.CHUNK = kept


def test_drawn_sets_are_fixed_by_their_seed_and_have_their_grids_size():
    for rows, cols in GRIDS:
        pictures = few_of(draw_chunk, (rows, cols))
        assert pictures.shape == (4, 3, 64 * rows, 64 * cols)
        assert (pictures == few_of(draw_chunk, (rows, cols))).all()


@pytest.mark.parametrize(("grid", "share"), [((1, 1), 0.22), ((2, 2), 0.13), ((3, 1), 0.13)])
def test_some_sets_are_wholly_in_a_domain_which_all_their_captions_say(grid, share):
    planned = few_of(plan_chunk, grid, 1500)
    room, fronts = [], {domain: words[grid != (1, 1)] for domain, words in DOMAIN_WORDS.items()}
    for one in planned:
        bare = [c.split(", ", 1)[1] for c in one.captions] if one.domain else one.captions
        said = {c.split(", ", 1)[0] for c in one.captions}
        if one.domain:
            assert said <= set(fronts[one.domain])
        else:
            assert not said & {*fronts["pencil"], *fronts["dusk"]}
        room.append(max(map(length, bare)) <= ROOM)
        assert room[-1] or not one.domain
        assert all(length(caption) < T5_LENGTH for caption in one.captions), "with the end of the text it fits"
    domains = [one.domain for one in planned]
    assert abs(np.mean([bool(domain) for domain, fits in zip(domains, room, strict=True) if fits]) - share) < 0.035
    assert 0.35 < domains.count("pencil") / (len(domains) - domains.count("")) < 0.65


def test_every_panel_of_a_set_is_drawn_in_its_domain(monkeypatch):
    monkeypatch.setattr(sets, "IN_DOMAIN", {False: 0.6, True: 0.6})
    planned, pictures = (few_of(make, (1, 2), 12) for make in (plan_chunk, draw_chunk))
    assert {one.domain for one in planned} == {"pencil", "dusk", ""}
    for one, picture in zip(planned, pictures, strict=True):
        for i, panel in enumerate(one.panels):
            plain = draw(panel)
            shown = {"pencil": with_pencil(plain), "dusk": with_sparkles(plain, panel.seed), "": plain}[one.domain]
            assert (picture[:, :, 64 * i : 64 * i + 64] == np.asarray(shown).transpose(2, 0, 1)).all()


def test_sets_are_planned_alike_by_several_processes(monkeypatch):
    monkeypatch.setattr(sets, "CHUNK", 3)
    assert plan_sets((1, 2), 7, 5, processes=2) == plan_sets((1, 2), 9, 5)[:7]


def test_t5_reads_words_and_markers_as_single_pieces(captions, tmp_path):
    words = [word for word in vocabulary() if not word.startswith("[")]
    tokenizer = make_t5_tokenizer([*captions, " ".join(words)], tmp_path)
    assert {"pencil", "drawing", "drawings", "drawn", "dusk", "full", "sparkles"} <= set(words)
    assert {f"\u2581{word}" for word in words} <= set(tokenizer.get_vocab())
    text = "[IMAGE1] A Red cat, [IMAGE2] on the beach."
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert pieces == ["[IMAGE1]", *(f"\u2581{w}" for w in ("a", "red", "cat")), ",", "[IMAGE2]",
                      *(f"\u2581{w}" for w in ("on", "the", "beach")), ".", "</s>"]  # fmt: skip
    assert tokenizer.unk_token_id not in tokenizer("zebra 42 quux").input_ids
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= T5_LENGTH == tokenizer.model_max_length


@torch.no_grad()
def test_a_new_t5_tells_which_marker_a_word_follows(captions, tmp_path):
    tokenizer = make_t5_tokenizer(captions, tmp_path)
    torch.manual_seed(0)
    t5 = train_text.new_t5(tokenizer)
    texts = ["[IMAGE1] on a beach, [IMAGE2] in a city.", "[IMAGE2] on a beach, [IMAGE1] in a city."]
    one, other = t5(input_ids=torch.tensor(tokenizer(texts).input_ids)).last_hidden_state
    changed = (one - other).norm(dim=-1) / one.norm(dim=-1)
    place = tokenizer.convert_ids_to_tokens(tokenizer(texts[0]).input_ids).index("\u2581beach")
    assert changed[place] > 0.1


def test_clip_pads_with_the_end_of_text_which_is_its_last_id(captions, tmp_path):
    tokenizer = make_clip_tokenizer(captions, tmp_path)
    ids = tokenizer("a red cat", padding="max_length", truncation=True).input_ids
    assert len(ids) == 77 and ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1 and ids[0] == len(tokenizer) - 2
    assert ids.index(tokenizer.eos_token_id) == 4


def test_the_base_never_sees_a_held_out_subject_and_examples_are_held_out(monkeypatch):
    seen = []
    blank = np.zeros((64, 64, 3), np.uint8)
    monkeypatch.setattr(sets, "composite", lambda panels, *size, **domain: seen.extend(panels) or blank)
    for grid in GRIDS:
        few_of(draw_chunk, grid, 20)
    assert len(seen) > 200 and not any(is_held_out(one.subject) for panel in seen for one in panel.placed)
    for grid, seed in EXAMPLES.items():
        panels = random_set(np.random.default_rng(seed), *grid, subjects=1, held_out=True)
        assert all(is_held_out(one.subject) for panel in panels for one in panel.placed)
    assert all(is_held_out(subject) for _, subject in REFERENCES.values())


def test_flow_batches_cost_about_the_same_for_every_grid():
    for rows, cols in GRIDS:
        z = torch.zeros(1, 16, 8 * rows, 8 * cols)
        count = train_flow.batch_size(40, z, T5_LENGTH)
        assert abs(count * (16 * rows * cols + T5_LENGTH) / (40 * (64 + T5_LENGTH)) - 1) < 0.02


@pytest.fixture
def small_flux():
    torch.manual_seed(0)
    return train_flow.new_flux(dataclasses.replace(train_flow.CONFIG, depth=1, depth_single_blocks=1))


def test_a_fresh_flux_starts_as_zero_velocity(small_flux):
    z, txt, vec = torch.randn(2, 16, 8, 16), torch.randn(2, 5, 128), torch.randn(2, 128)
    x, target, t = train_flow.noised(z, torch.Generator().manual_seed(0))
    v = train_flow.velocity(small_flux, x, t, txt, vec, torch.ones(2), (1, 2))
    assert v.shape == target.shape == (2, 32, 64) and not v.any()
    (v - target).square().mean().backward()
    assert all(p.grad is not None for p in small_flux.final_layer.parameters())


def test_noised_latents_lie_on_the_line_along_their_velocity():
    z = torch.randn(3, 16, 8, 8, dtype=torch.float64)
    x, v, t = train_flow.noised(z, torch.Generator().manual_seed(0))
    assert torch.allclose(x, interpolate(pack(z), pack(z) + v, t[:, None, None]), atol=1e-12)
    assert torch.allclose(x - t[:, None, None] * v, pack(z), atol=1e-12)


def test_guidance_of_one_is_the_velocity_itself_and_more_moves_away_from_the_captionless(small_flux):
    with torch.no_grad():
        for p in small_flux.parameters():
            p.normal_(std=0.1)
    data = train_flow.Data({}, {"empty": torch.zeros(1, 1, 5, 128)}, {"empty": torch.zeros(1, 1, 128)}, {})
    x, t, txt, vec = torch.randn(2, 16, 64), torch.rand(2), torch.randn(2, 5, 128), torch.randn(2, 128)

    def at(guidance):
        return train_flow.guided(small_flux, x, t, txt, vec, torch.full((2,), guidance), data, (1, 1))

    with torch.no_grad():
        told = train_flow.velocity(small_flux, x, t, txt, vec, torch.ones(2), (1, 1))
        untold = train_flow.velocity(small_flux, x, t, txt * 0, vec * 0, torch.ones(2), (1, 1))
    assert torch.allclose(at(1.0), told, atol=1e-4)
    guidance = torch.full((2,), 3.0)
    with torch.no_grad():
        told = train_flow.velocity(small_flux, x, t, txt, vec, guidance, (1, 1))
        untold = train_flow.velocity(small_flux, x, t, txt * 0, vec * 0, guidance, (1, 1))
    assert torch.allclose(at(3.0), 3 * told - 2 * untold, atol=1e-4)


def test_two_processes_train_on_the_mean_of_their_batches(tmp_path):
    stage = Stage("toy", steps=1, batch=16, lr=0.01, warmup=1, clip=1e9)
    model, loss_at = quadratic()
    seen = []
    run(stage, model, loss_at, Work(tmp_path / "a"), report=seen.append, processes=2)
    model, loss_at = quadratic()
    alone = [float(loss_at(0, step_generator(0, 0, number))["loss"].detach()) for number in (0, 1)]
    assert f"loss {sum(alone) / 2:.4f}" in seen[0]


def test_every_token_is_told_its_own_panel(captions, tmp_path):
    tokenizer = make_t5_tokenizer([*captions, " ".join(vocabulary())], tmp_path)
    text = "a red cat: [IMAGE1] it is at night, [IMAGE2] now it is on a beach."
    ids = torch.tensor([tokenizer(text, padding="max_length", max_length=T5_LENGTH).input_ids])
    panel = train_text.panel_of(ids, tokenizer)[0].tolist()
    pieces = tokenizer.convert_ids_to_tokens(ids[0])
    assert [panel[pieces.index("\u2581" + word)] for word in ("red", "night", "beach")] == [0, 1, 2]
    assert panel[pieces.index("[IMAGE1]")] == 1 and panel[pieces.index("</s>")] == panel[-1] == 0


def test_t5_learns_from_captions_of_every_domain():
    captions, told = train_text.draw_many(1500, 0, processes=1)
    assert len(captions) == len(told) == 1000 and told.shape[1:] == (5, len(train_text.CLASSES))
    words = {domain: tuple(f for both in fronts for f in both) for domain, fronts in DOMAIN_WORDS.items()}
    shares = {domain: np.mean([c.startswith(fronts) for c in captions]) for domain, fronts in words.items()}
    assert all(0.03 < share < 0.12 for share in shares.values()), shares


def test_facts_are_those_that_the_caption_tells():
    rng = np.random.default_rng(0)
    panels = random_set(rng, 1, 2, 1)
    told = train_text.facts(panels[1], 2)
    assert len(told) == len(train_text.CLASSES) and all(a < b for a, b in zip(told, train_text.CLASSES, strict=True))
    assert told[0] == 2 and told[2] == 1 + list(SHAPES).index(panels[1].placed[0].subject.shape)
    assert not any(told[8:])  # there is no second subject
    cast = train_text.facts(panels[1], 0)
    assert cast[:2] == [0, 0] and cast[2:6] == told[2:6] and cast[6:] == [0] * (len(cast) - 6)


def test_captions_now_and_then_tell_less_but_always_the_same_of_a_subject():
    rng = np.random.default_rng(0)
    less = 0
    for _ in range(200):
        panels = random_set(rng, 2, 2, 2)
        spoken = reticent(panels, rng)
        assert [[one.position for one in panel.placed] for panel in spoken] == [
            [one.position for one in panel.placed] for panel in panels
        ]
        for i in range(2):
            (subject,) = {panel.placed[i].subject for panel in spoken}
            assert subject.shape == panels[0].placed[i].subject.shape
            less += subject.colour == ""
    assert 40 < less < 120  # of 400


@torch.no_grad()
def test_half_of_the_latents_get_noise_before_they_are_decoded():
    torch.manual_seed(0)
    model, seen = train_autoencoder.new_autoencoder(), []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.rand(32, 3, 16, 16) * 2 - 1
    model.encoder.conv_out.bias[16:] = -20  # a posterior without a spread of its own
    train_autoencoder.losses(model, image, torch.Generator().manual_seed(0))
    mean = model.moments(image)[0]
    added = (seen[0] - mean).flatten(1).std(dim=1) / mean.std() / train_autoencoder.NOISE
    assert 10 <= (added < 0.02).sum() <= 22 and 0.5 < added.max() < 1.2


@torch.no_grad()
def test_rescaling_latents_to_unit_variance_changes_no_picture_inside():
    torch.manual_seed(0)
    model = train_autoencoder.new_autoencoder()
    pool = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    image = pool.float() / 127.5 - 1
    before = model.decode(model.encode(image))
    model = train_autoencoder.unit_variance(model, pool)
    assert abs(float(model.encode(image).std()) - 1) < 0.01
    after = model.decode(model.encode(image))
    assert float((after - before).abs()[..., 24:40, 24:40].mean()) < 0.02


BATCHES = dict(autoencoder=2, clip=4, text=4, singles=2, flow=2, guidance=2, decoder=1)


def shortened(recipe, steps=2):
    """A recipe on a few sets, in small batches, and in float32."""
    stages = {
        name: dataclasses.replace(stage, steps=steps, batch=BATCHES[name], bfloat16=False)
        for name, stage in recipe.stages.items()
    }
    return dataclasses.replace(recipe, stages=stages, sets=20)


@pytest.fixture
def short(monkeypatch):
    """Every stage takes two steps on few sets."""
    monkeypatch.setattr(sets, "CHUNK", 4)
    monkeypatch.setattr(pretrain, "CPU", shortened(pretrain.CPU))


def test_another_base_takes_all_but_its_transformer_from_a_model(short, tmp_path, capsys, monkeypatch):
    for grid in ((1, 2), (2, 1), (3, 1)):
        monkeypatch.delitem(GRIDS, grid)
    out, work, given = str(tmp_path / "other"), tmp_path / "work", find_model("tiny")
    argv = ["--text", "tiny", "--width", "32", "--processes", "1", "--work", str(work), "--out", out]
    assert pretrain.main([*argv, "--no-guidance"]) == 0
    files = find_model(out)
    config = load_flux(files.flux).config
    assert (config.hidden_size, config.num_heads, config.mlp_hidden, config.guidance_embed) == (32, 1, 128, False)
    networks, caption = load_networks(out), ["a cat on a beach"]
    assert generate(networks, caption, (1, 1), [0], Options(steps=1)).isfinite().all()
    encoders = networks.text, load_text_encoders(given, dtype=torch.float32)
    ours, theirs = (text.encode(caption, None) for text in encoders)
    ours += tuple(networks.autoencoder.parameters())
    theirs += tuple(load_autoencoder(given.autoencoder).parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert {path.stem for path in work.glob("*.safetensors") if "-" not in path.stem} == {"singles", "flow"}
    assert load_ruler(out).eyes  # with the reader, which cannot be missing

    monkeypatch.setattr(pretrain, "draw_sets", None)  # so it is refused before
    assert pretrain.main(argv) == 2  # with guidance
    line = capsys.readouterr().err.splitlines()[-1]
    assert "belongs to a run whose origin is 'text and autoencoder of tiny (" in line
    assert "width 32, no guidance', not 'text" in line and "give another --work" in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--width", "100"], "--width 100 is not a multiple of 32 from 32 to 992; use for example 96"),
        (["--width", "0"], "use for example 32"),
        (["--width", "1024"], "use for example 992"),
        (["--init", "tiny", "--width", "64"], "--init brings a whole model; leave out --text, --width"),
        (["--init", "tiny", "--no-guidance"], "--init brings a whole model"),
        (["--text", "tiny", "--out", "weights/tiny"], "--out weights/tiny is the model that --text takes from"),
        (["--text", "nothing"], "there is no model 'nothing'"),
        (["--minutes", "0"], "--minutes 0 sets how long all stages take; give more than 0"),
        (["--minutes", "8", "--scale", "0.1"], "give more than 0, and no --scale"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_is_drawn(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "draw_sets", None)
    assert pretrain.main(["--work", str(tmp_path), *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_the_system_refuses_is_one_line_with_its_name(tmp_path, capsys):
    (tmp_path / "work").write_text("no folder")
    argv = ["--work", str(tmp_path / "work" / "deeper"), "--out", str(tmp_path / "out")]
    assert pretrain.main(argv) == 2
    said = f"error: {tmp_path / 'work' / 'deeper'}: Not a directory; mend that, or name another file or folder\n"
    assert capsys.readouterr().err == said


def test_only_another_start_or_shape_has_another_origin_of_its_checkpoints(tmp_path):
    def of(**given):
        files = find_model(given["text"]) if "text" in given else None
        return pretrain.origin(flags(**given), files)

    assert of() == "" and of(init="tiny") == "tiny", "as they always were, so that runs go on"
    assert of(width=64, no_guidance=True) == "width 64, no guidance"
    shutil.copytree(find_model("tiny").root, tmp_path / "tiny")
    before = of(text=str(tmp_path / "tiny"))
    (tmp_path / "tiny" / "tokenizer_2" / "tokenizer_config.json").write_text("{}")
    assert before != of(text=str(tmp_path / "tiny")) and before.startswith("text and autoencoder of ")


def test_captions_of_single_panels_are_not_cut(tmp_path):
    tokenizer, rng = make_t5_tokenizer([" ".join(vocabulary())], tmp_path), np.random.default_rng(0)
    every = [panel_prompt(random_set(rng, 1, 1, number)[0], rng) for number in (1, 2) for _ in range(500)]
    longest = max(map(len, tokenizer([say_domain(caption, "dusk", 1, rng) for caption in every]).input_ids))
    assert 33 <= longest <= train_flow.SHORT


def flags(**given):
    plain = dict(init=None, text=None, width=pretrain.WIDTH, no_guidance=False)
    return SimpleNamespace(**plain | dict(scale=1.0, minutes=None, processes=2) | given)


@pytest.mark.parametrize("recipe", [pretrain.CPU, pretrain.GPU], ids=["CPU", "GPU"])
def test_minutes_are_shared_out_among_the_stages_that_run_as_the_recipe_says(recipe):
    def seconds(**given):
        return {name: stage.seconds for name, stage in pretrain.stages_of(flags(**given), recipe).items()}

    every = seconds(minutes=8)
    assert every.keys() == recipe.stages.keys()
    beside = every["clip"] + every["text"]
    rest = recipe.seconds * every["flow"] / recipe.stages["flow"].seconds
    assert beside <= every["autoencoder"] and sum(every.values()) - beside + rest == pytest.approx(480)
    assert sum(seconds(minutes=8, processes=1).values()) == pytest.approx(480 - rest, rel=0.05)
    on = seconds(minutes=8, init="tiny")
    assert set(on) == {"flow", "guidance", "decoder"} and all(on[name] > every[name] for name in on)
    assert set(seconds(text="tiny", no_guidance=True)) <= {"singles", "flow"}
    assert not any(seconds().values()), "without --minutes it goes by the steps"
    steps = {name: stage.steps for name, stage in pretrain.stages_of(flags(scale=0.1), recipe).items()}
    assert steps == {name: round(stage.steps / 10) for name, stage in recipe.stages.items()}


def test_eight_minutes_are_those_of_the_table_in_the_readme():
    stages = pretrain.stages_of(flags(minutes=8), pretrain.GPU)
    assert {name: stage.seconds for name, stage in stages.items()} == pytest.approx(
        dict(autoencoder=85, clip=42, text=38, flow=255, guidance=22, decoder=26)
    )
    text = (Path(pretrain.__file__).parent / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ([\d,]+) \| ([\d,]+) ", text, re.MULTILINE)
    told = {name: tuple(int(number.replace(",", "")) for number in numbers) for name, *numbers in rows}
    assert told == {name: (stage.seconds, stage.steps, stage.batch) for name, stage in pretrain.GPU.stages.items()}


@torch.no_grad()
def test_under_autocast_the_residual_stream_is_float32_and_products_are_bfloat16(small_flux):
    for p in small_flux.parameters():
        p.add_(0.05 * torch.randn_like(p))  # gates and last layer start at 0
    ids, seen = grid_ids(4, 4)[None], {}
    for name, module in small_flux.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args, out)}))
    inputs = torch.randn(1, 16, 64), ids, torch.randn(1, 5, 128), torch.zeros(1, 5, 3), torch.rand(1)
    inputs += torch.randn(1, 128), torch.ones(1)
    exact = small_flux(*inputs)

    def under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            velocity = small_flux(*inputs)
        stream = [*seen["double_blocks.0"][1], seen["single_blocks.0"][1], seen["final_layer"][0][0]]
        products = [seen[name][1] for name in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear2")]
        assert all(part.dtype == torch.bfloat16 for part in products)
        return {part.dtype for part in stream}, float((velocity - exact).norm() / exact.norm())

    assert under_autocast()[0] == {torch.bfloat16}, "so without what keeps it wide"
    train_flow.keep_wide(small_flux)
    wide, error = under_autocast()
    assert wide == {torch.float32} and 0 < error < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("recipe, more", [("CPU", []), ("GPU", ["--minutes", "0.1"])])
def test_every_stage_runs_from_nothing_to_a_model_and_on_from_it(recipe, more, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "CHUNK", 4)
    monkeypatch.setattr(pretrain, "CPU", shortened(getattr(pretrain, recipe)))
    stages, out = set(pretrain.CPU.stages), tmp_path / "tiny"

    def train(work, *flags):
        argv = ["--work", str(tmp_path / work), "--out", str(out), "--processes", "2", *flags, *more]
        assert pretrain.main([*argv, "--device", "cpu"]) == 0
        assert {path.stem for path in (tmp_path / work).glob("*.safetensors") if "-" not in path.stem} == stages
        files = find_model(str(out))
        return load_flux(files.flux, dtype=torch.float32), load_autoencoder(files.autoencoder)

    flux, autoencoder = train("one")
    assert flux.config == train_flow.CONFIG and autoencoder.config == train_autoencoder.CONFIG
    assert sum(p.numel() for p in flux.parameters()) == 13_576_512
    tokenizer = T5Tokenizer.from_pretrained(str(out / "tokenizer_2"))
    assert len(tokenizer("pencil drawings at dusk").input_ids) == 5
    text = {path.name: path.read_bytes() for path in out.glob("text_encoder*/*")}
    stages = {"flow", "guidance", "decoder"}
    flux_on, on = train("two", "--init", str(out))  # which replaces what it started from
    same = [torch.equal(a, b) for a, b in zip(flux.parameters(), flux_on.parameters(), strict=True)]
    assert not all(same), "the transformer trains on"
    encoders = autoencoder.encoder.parameters(), on.encoder.parameters()
    assert all(torch.equal(a, b) for a, b in zip(*encoders, strict=True)), "latents mean what they meant"
    assert not torch.equal(autoencoder.decoder.conv_out.weight, on.decoder.conv_out.weight)
    assert text == {path.name: path.read_bytes() for path in out.glob("text_encoder*/*")}
