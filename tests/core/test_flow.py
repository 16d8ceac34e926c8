from types import SimpleNamespace

import pytest
import torch

import sampling.denoise as loop
from golden import EXACT, WHOLE, far, schedule
from sampling.flow import euler, interpolate, times
from sampling.inpaint import keep_known, steps_left
from sampling.latents import noise, pack, unpack


@pytest.mark.parametrize("key", schedule())
def test_times_equal_the_official_schedule(key):
    steps, tokens, shift = (part.split()[0] for part in key.replace("shift=", "").split(", "))
    got = times(int(steps), int(tokens), shift == "True")
    want = schedule()[key]
    assert len(got) == len(want) and max(abs(a - b) for a, b in zip(got, want, strict=True)) < EXACT


def test_times_start_at_one_fall_and_end_at_zero():
    for tokens in (1, 256, 9072):
        got = times(20, tokens)
        assert got[0] == 1.0 and got[-1] == 0.0 and all(a > b for a, b in zip(got, got[1:], strict=False))


@pytest.mark.parametrize(("steps", "tokens"), [(0, 16), (-3, 16)])
def test_impossible_times_are_refused(steps, tokens):
    with pytest.raises(ValueError, match="use 1 or more"):
        times(steps, tokens)


@pytest.mark.parametrize(("tokens", "stretch"), [(1024, 1.5831), (1936, 1.5868), (24, 1.5788)])
def test_the_released_uno_sampler_counts_a_sixty_fourth_of_the_tokens(tokens, stretch):
    middle = times(2, tokens, schedule="uno-release")[1]  # of even times it would be 0.5
    assert middle / (1 - middle) == pytest.approx(stretch, abs=1e-4) and times(2, tokens)[1] > middle
    assert times(4, 1024, schedule="uno-release") == times(4, 16)
    assert times(4, 1024, False, "uno-release") == times(4, 1024, False)


def test_euler_is_exact_on_a_straight_path():
    data, start = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    x = euler(lambda x, t: start - data, start, times(7, 256))
    assert far(x, data) < WHOLE


def test_euler_on_exponential_decay_equals_its_closed_form():
    ts = [1.0, 0.75, 0.5, 0.25, 0.0]
    x = euler(lambda x, t: x, torch.ones(1, dtype=torch.float64), ts)
    assert abs(float(x) - 0.75**4) < 1e-12


def test_another_sampler_may_ask_for_the_velocity_at_any_time(monkeypatch):
    asked = []
    flux = SimpleNamespace(
        conditioning=lambda t, vec, scale: asked.append(float(t)) or t,
        prefill=lambda *given: None,
        velocity=lambda x, cond, t: t * torch.ones_like(x),  # whose integral from 1 to 0 is -1/2
    )

    def midpoint(velocity, x, times, after_step=None):
        for t, t_next in zip(times, times[1:], strict=False):
            x = x + (t_next - t) * velocity(x, (t + t_next) / 2)
        return x

    monkeypatch.setattr(loop, "euler", midpoint)
    start = torch.zeros(1, 4, 64)
    made = loop.denoise(flux, start, [1.0, 0.5, 0.0], torch.zeros(1, 4, 3), torch.zeros(1, 2, 8), torch.zeros(1, 8))
    assert made.mean() == -0.5 and asked == [1.0, 0.5, 0.75, 0.25], "known times first"


def test_after_step_sees_every_next_time_once():
    seen = []
    euler(lambda x, t: x, torch.zeros(1), [1.0, 0.4, 0.0], lambda x, t: seen.append(t) or x)
    assert seen == [0.4, 0.0]


def test_interpolate_runs_from_data_to_noise():
    data, start = torch.zeros(3), torch.ones(3)
    assert torch.equal(interpolate(data, start, 0.0), data) and torch.equal(interpolate(data, start, 1.0), start)


def test_unpack_undoes_pack_and_tokens_are_channel_major():
    z = torch.randn(2, 16, 6, 10)
    tokens = pack(z)
    assert tokens.shape == (2, 15, 64) and torch.equal(unpack(tokens, 6, 10), z)
    assert torch.equal(tokens[0, 1, :4], z[0, 0, :2, 2:4].flatten())


def test_noise_is_fixed_by_its_seed():
    assert torch.equal(noise(64, 32, 5), noise(64, 32, 5)) and not torch.equal(noise(64, 32, 5), noise(64, 32, 6))
    assert noise(64, 32, 5).shape == (1, 16, 8, 4)


def test_kept_tokens_follow_their_own_path_and_end_clean():
    known, start = torch.randn(1, 6, 64), torch.randn(1, 6, 64)
    mask = torch.tensor([1.0, 0, 1, 0, 0, 1]).view(1, 6, 1)
    seen = []

    def after(x, t):
        x = keep_known(known, start, mask)(x, t)
        seen.append(far(x[:, [1, 3, 4]], interpolate(known, start, t)[:, [1, 3, 4]]))
        return x

    x = euler(lambda x, t: torch.ones_like(x), start, times(5, 256), after)
    assert seen == [0.0] * 5
    assert torch.equal(x[:, [1, 3, 4]], known[:, [1, 3, 4]])
    assert far(x[:, [0, 2, 5]], start[:, [0, 2, 5]] - 1) < WHOLE


def test_what_stands_under_the_mask_is_never_read():
    known, start = torch.randn(1, 4, 64), torch.randn(1, 4, 64)
    mask = torch.tensor([1.0, 0, 0, 1]).view(1, 4, 1)
    poisoned = known.clone()
    poisoned[:, [0, 3]] = torch.nan
    x = torch.randn(1, 4, 64)
    assert torch.equal(keep_known(known, start, mask)(x, 0.3), keep_known(poisoned, start, mask)(x, 0.3))


@pytest.mark.parametrize(("steps", "strength", "left"), [(20, 1, 20), (20, 0.5, 10), (28, 0.6, 16), (100, 0.29, 29)])
def test_a_draft_leaves_whole_steps(steps, strength, left):
    assert steps_left(steps, strength) == left


@pytest.mark.parametrize("strength", [-0.1, 1.1, 0.04, 0, float("nan")])
def test_a_strength_that_leaves_nothing_is_refused(strength):
    with pytest.raises(ValueError, match="strength"):
        steps_left(20, strength)
