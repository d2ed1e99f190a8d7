"""Tests of the library: properties of its maths, on tiny networks, in the order of ddpm.py. Offline, on the CPU."""

import copy
import math
import os
import pickle
import re
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import same
from torch import nn

import ddpm
from ddpm import DDPM, DDPMConfig, UserError, make_betas, make_generator, posterior_coefficients, to_float, to_uint8

torch.set_num_threads(1)  # tiny networks gain nothing from more
TINY = dict(image_size=8, num_classes=3, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0)
TINY |= dict(timesteps=20, beta_end=0.6, class_names=("a", "b", "c"))
LARGEST = dict(image_size=4096, channels=4096, patch=64, ch=4096, num_res_blocks=64, timesteps=100_000)
FORMS = [dict(), dict(patch=2), dict(num_classes=0), dict(num_res_blocks=2), dict(channels=1), dict(image_size=28)]
FORMS += [dict(ch_mult=(1,), attn_resolutions=(8,)), dict(arch="cnn"), dict(arch="cnn", image_size=24, patch=2)]
SAMPLERS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpm++", 0.0)]  # with eta


def tiny(**changes):
    """A tiny model whose zero-initialised weights are filled, so that its output is not 0."""
    torch.manual_seed(0)
    model = DDPM(DDPMConfig(**TINY | changes))
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


class Net(nn.Module):
    """Stands in for the network: a function of (x, t, y), which notes the t and y of its calls."""

    def __init__(self, function):
        super().__init__()
        self.function, self.seen = function, []

    def forward(self, x, t, y):
        self.seen.append((int(t[0]), y.tolist()))
        return self.function(x, t, y)


def column(v):
    """(B,) as (B, 1, 1, 1)."""
    return v[:, None, None, None]


def random_batch(model, n=4):
    """x0, y, t and eps."""
    return torch.randn(n, *model.shape).clamp(-1, 1), torch.arange(n) % 3, *model.random_t_eps(n)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_settings_out_of_range_or_that_do_not_fit_each_other_are_refused():
    for name, most in LARGEST.items():
        for value in (0, -1, most + 1, 8.5, "8", True):
            said = f"^{name}: {value!r} is not (of type int|a whole number from 1 to {most})$"
            with pytest.raises(UserError, match=said):
                DDPMConfig(**TINY | {name: value})
    wrong = dict(arch=["vit"], schedule=["exp"], objective=["score"], loss=["l3"], weighting=["snr"], ch=[7])
    wrong |= dict(dropout=[-0.1, 1.1, "much"], p_uncond=[-0.1, 1.1, math.nan])
    wrong |= dict(ch_mult=[(), (1, 0), (1, 65), (1, 1.5), 3])
    for name, values in wrong.items():
        for value in values:
            said = f"^{name}: {re.escape(repr(value))} (is not one of|must be|is not of type )"
            with pytest.raises(UserError, match=said):
                DDPMConfig(**TINY | {name: value})
    c = DDPMConfig(**LARGEST, ch_mult=[64], attn_resolutions=[64], class_names=["a"], dropout=1, p_uncond=1)
    assert (c.ch_mult, c.attn_resolutions, c.class_names) == ((64,), (64,), ("a",))  # lists, as JSON gives them
    for size, unit, changes in ((30, 8, dict(ch_mult=(1, 1, 1, 1))), (6, 4, dict(patch=2)), (6, 4, dict(arch="cnn"))):
        with pytest.raises(UserError, match=f"^image_size: {size} is not divisible by {unit} "):
            DDPMConfig(**TINY | changes | dict(image_size=size))
    for patch, side, sides in ((1, 3, "8, 4"), (2, 8, "4, 2")):
        with pytest.raises(UserError, match=rf"^attn_resolutions: \[{side}\], but .* have sides \[{sides}\]$"):
            DDPMConfig(**TINY | dict(patch=patch, attn_resolutions=(4, side)))
    DDPMConfig(**TINY | dict(image_size=6, attn_resolutions=[3]))  # the U-Net's first level keeps the resolution
    DDPMConfig(**TINY | dict(arch="cnn", attn_resolutions=[3]))  # has no attention


@pytest.mark.parametrize("schedule", ddpm.SCHEDULES)
def test_tables_against_plain_python(schedule):
    T, a, b = 500, 1e-4, 0.028
    model, abar = tiny(timesteps=T, beta_end=b, schedule=schedule), 1.0
    for t in range(T):
        if schedule == "linear":
            beta = a + (b - a) * t / (T - 1)
        elif schedule == "quadratic":
            beta = (a**0.5 + (b**0.5 - a**0.5) * t / (T - 1)) ** 2
        elif schedule == "sigmoid":
            beta = a + (b - a) / (1 + math.exp(6 - 12 * t / (T - 1)))
        elif schedule == "lognormal":
            sigma = [math.exp(NormalDist(-0.6, 1.2).inv_cdf((u + 0.5) / T)) if u >= 0 else 0 for u in (t - 1, t)]
            beta = 1 - (1 + sigma[0] ** 2) / (1 + sigma[1] ** 2)
        else:
            f = [math.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, t + 1)]
            beta = min(0.999, 1 - f[1] / f[0])
        previous, abar = abar, abar * (1 - beta)
        var = beta * (1 - previous) / (1 - abar)  # [1] eq. 7
        c0, ct = previous**0.5 * beta / (1 - abar), (1 - beta) ** 0.5 * (1 - previous) / (1 - abar)
        assert posterior_coefficients(model.abar[t], model.abar[t - 1] if t else 1.0) == pytest.approx((c0, ct, var))
        assert model.abar[t] == pytest.approx(abar, rel=1e-9)
        assert (model.abar_t[t].item(), model.q_var[t].item()) == pytest.approx((abar, 1 - abar), rel=1e-6)
    assert len(model.abar) == T


def test_betas_outside_0_to_1_are_refused_and_a_signal_that_remains_is_warned_of(recwarn):
    """That is sqrt(abar_T) above 0.1. With all betas equal, abar_T = (1 - beta)^T."""
    wrong = dict(linear=[(0.0, 0.02), (-0.1, 0.1), (1e-4, 1.0), (1e-4, math.nan)])
    wrong |= dict(quadratic=[(0.0, 0.02), (-0.1, 0.1), (0.1, -0.1), (1e-4, 1.5)])
    wrong |= dict(sigmoid=[(-0.1, 0.1), (1e-4, 1.5), (math.inf, 0.02)])
    for schedule, ends in [(name, ends) for name in wrong for ends in wrong[name]]:
        with pytest.raises(UserError, match="^betas run from .* to .*, not between 0 and 1$"):
            DDPM(DDPMConfig(**TINY | dict(schedule=schedule, beta_start=ends[0], beta_end=ends[1])))
    equal = lambda abar: dict.fromkeys(("beta_start", "beta_end"), 1 - abar ** (1 / 20))  # noqa: E731
    with pytest.warns(UserWarning, match="timesteps=20: .*= 0.10 of the image.*raise timesteps or beta_end"):
        tiny(**equal(0.0101))
    tiny(**equal(0.0099))
    for schedule in ddpm.SCHEDULES:
        tiny(timesteps=500, beta_end=0.028, schedule=schedule)
    assert not recwarn.list
    with pytest.raises(UserError, match="800 steps of these betas leave alpha_bar 0"):
        tiny(timesteps=800, beta_start=0.6, beta_end=0.6)  # 1e-318: a float64, but not one to divide by


def test_layers_equal_their_formulas(monkeypatch):
    torch.manual_seed(0)
    x, emb = torch.randn(3, 8, 6, 5), torch.randn(3, 12)
    up, film, block = ddpm.Upsample(8), ddpm.FiLM(8, 12), ddpm.ResBlock(8, 8, 12, 0.0, attention=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2), up.weight, up.bias, padding=1)
    kernels, transposed = [], F.conv_transpose2d
    keep = lambda x, kernel, *a, **k: kernels.append(kernel) or transposed(x, kernel, *a, **k)  # noqa: E731
    monkeypatch.setattr(F, "conv_transpose2d", keep)
    assert up(x).shape == (3, 8, 12, 10) and torch.allclose(up(x), plain, atol=1e-5)
    assert kernels and all(kernel.is_contiguous() for kernel in kernels)  # MPS ignores strides: its images are wrong
    monkeypatch.setattr(torch.version, "hip", "6.2")  # AMD
    assert torch.allclose(up(x), plain, atol=1e-5)
    out = film.affine(emb)  # scale, then shift
    assert torch.allclose(film(x, emb), film.norm(x) * (1 + out[:, :8, None, None]) + out[:, 8:, None, None])
    assert torch.equal(block(x, emb), x)  # as it begins
    widths = {2: 1, 6: 1, 8: 2, 10: 2, 48: 12, 100: 25, 128: 32, 132: 22, 320: 32}
    assert {ch: ddpm.GroupNorm(ch).num_groups for ch in widths} == widths


@pytest.mark.parametrize("ch,heads", ((128, 2), (8, 1)))
def test_attention_against_its_formula(ch, heads):
    """Head h attends with its own equal share of the channels of q, k and v."""
    torch.manual_seed(0)
    layer, x = ddpm.Attention(ch), torch.randn(2, ch, 3, 4)
    nn.init.normal_(layer.proj.weight, std=0.1)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, HW) each
    out = []
    for part in torch.arange(ch).chunk(heads):
        weights = torch.einsum("bci,bcj->bij", q[:, part], k[:, part]).div((ch / heads) ** 0.5).softmax(dim=-1)
        out.append(torch.einsum("bij,bcj->bci", weights, v[:, part]))
    assert torch.allclose(layer(x), x + layer.proj(torch.cat(out, dim=1).view_as(x)), atol=1e-5)


def test_embedding_has_the_frequencies_of_the_transformer():
    """From 1 down to 1/10,000, in a geometric series (Vaswani et al. 2017)."""
    t = torch.tensor([1, 3])
    angles = t[:, None] * torch.tensor([10000 ** (-i / 15) for i in range(16)])
    assert torch.allclose(ddpm.sinusoidal_embedding(t, 32), torch.cat([angles.cos(), angles.sin()], 1), atol=1e-6)
    assert ddpm.sinusoidal_embedding(t, 2).shape == (2, 2)


@pytest.mark.parametrize("changes", FORMS)
def test_every_form_of_the_network(changes):
    """It begins at 0, all of it is trained, the images of a batch do not see each other, and no input is changed."""
    changes = dict(attn_resolutions=(changes.get("image_size", 8) // 2,)) | changes
    model, fresh = tiny(**changes), DDPM(DDPMConfig(**TINY | changes))
    x0, y, t, eps = random_batch(model)
    y, before = y if model.K else None, [v.clone() for v in (x0, t, eps)]
    model(x0, y, t, eps).mean().backward()
    assert all(p.grad.any() for p in model.parameters())
    out = model.network(x0, t, y)
    for i in range(4):
        alone = model.network(x0[i : i + 1], t[i : i + 1], y[i : i + 1] if model.K else None)
        assert torch.allclose(out[i], alone[0], atol=1e-5)
    assert out.shape == x0.shape and not fresh.network(x0, t, y).any()
    assert all(torch.equal(v, old) for v, old in zip((x0, t, eps), before))
    with pytest.raises(UserError, match=r"images of \(3, 30, 30\), but this model takes"):
        model(torch.zeros(1, 3, 30, 30))


def test_autocast_covers_only_the_network():
    model, dtypes = tiny(), []
    model.amp_dtype = torch.bfloat16
    model.net.out.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    x0, y, t, eps = random_batch(model)
    out, loss = model.network(x0, t, y), model(x0, y, t, eps)
    assert out.dtype == loss.dtype == torch.float32 and dtypes == [torch.bfloat16, torch.bfloat16]


def test_uint8_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    x = to_float(levels)
    assert x.shape == (2, 3, 16, 16) and x.is_contiguous() and x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), levels) and torch.equal(to_uint8(x[0]), levels[0])  # and x is as before
    assert torch.equal(to_float(levels[0]), x[0])
    assert to_uint8(torch.tensor([-9.0, -1.004, 1.004, 9.0]).view(1, 1, 4, 1)).flatten().tolist() == [0, 0, 255, 255]
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="not finite"):
            to_uint8(torch.tensor([[[0.5, value]]]))


def test_noise_of_an_image_is_its_own():
    rows = [make_generator(5, k) for k in range(4)]
    alone = [torch.Generator().manual_seed(ddpm.seed_of(5, k)) for k in range(4)]
    for shape in ((3, 8, 8), (1, 3, 3)):  # one draw after another
        wanted = torch.stack([torch.randn(shape, generator=g) for g in alone])
        assert torch.equal(ddpm.image_noise(rows, shape), wanted)


def test_streams_of_all_seeds_differ():
    streams = [first + k for first in (0, 2**30, 2**31) for k in range(1000)] + [2**32 - 1]
    seeds = [ddpm.seed_of(seed, k) for seed in (0, 1, 2, 17, 1337, 10**6) for k in streams]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**32
    assert ddpm.seed_of(1, 0) == 2654435761  # the published images are of these seeds


def test_t_and_eps_are_drawn_uniformly_and_normally():
    model = tiny()
    draw = lambda: model.random_t_eps(4000, torch.Generator().manual_seed(0))  # noqa: E731
    t, eps = draw()
    assert t.unique().tolist() == list(range(20)) and (t.bincount() - 200).abs().max() < 60
    assert eps.shape == (4000, *model.shape) and not torch.equal(eps[0], eps[1])
    assert abs(eps.mean()) < 0.01 and abs(eps.var() - 1) < 0.01 and abs((eps**4).mean() - 3) < 0.1
    assert all(map(torch.equal, draw(), (t, eps)))
    x0, y, t, eps = random_batch(model)
    model.random_t_eps = lambda B, device: (t, eps)
    assert torch.equal(model(x0, y), model(x0, y, t, eps))  # the loss draws them where none are given


@pytest.mark.parametrize("kind", ddpm.LOSSES)
def test_loss_kinds(kind):
    model = tiny(loss=kind)
    model.net = Net(lambda x, t, y: 0.5 * x)
    x0, y, t, eps = random_batch(model)
    abar = column(torch.tensor(model.abar)[t]).float()
    xt = abar.sqrt() * x0 + (1 - abar).sqrt() * eps  # [1] eq. 4
    assert torch.allclose(model.q_sample(x0, t, eps), xt, atol=1e-6)
    d = (0.5 * xt - eps).abs()
    wanted = {"l2": d**2, "l1": d, "huber": torch.where(d < 1, d**2 / 2, d - 0.5)}[kind]
    assert torch.allclose(model(x0, y, t, eps), wanted.mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("objective", ddpm.OBJECTIVES)
def test_weightings_and_objectives(double, objective):
    """The same error in x0 costs the same under vlb, whatever the objective: it is one bound."""
    model, beta = tiny(weighting="vlb", objective=objective), make_betas("linear", 20, 1e-4, 0.6)
    t, abar = torch.arange(20), torch.cumprod(1 - beta, 0)
    snr, a, s = abar / (1 - abar), column(abar).sqrt(), column(1 - abar).sqrt()
    x0, eps, error = (torch.randn(20, *model.shape) for _ in range(3))
    xt = model.q_sample(x0, t, eps)
    believed = x0 + error
    its_eps = (xt - a * believed) / s
    out = model.target(believed, its_eps, t)
    assert torch.allclose(out, {"eps": its_eps, "x0": believed, "v": a * its_eps - s * believed}[objective])
    for got, wanted in zip(model.to_x0_eps(out, xt, t), (believed, its_eps)):
        assert torch.allclose(got, wanted, atol=1e-9)
    model.net = Net(lambda x, t, y: out)
    eps_error = snr * error.square().mean((1, 2, 3))
    wanted = beta / (2 * (1 - beta) * (1 - abar)) * eps_error  # [1] eq. 12 with sigma^2 = beta
    assert torch.allclose(model(x0, t % 3, t, eps), wanted, rtol=1e-9)
    for weighting, x0_weight in dict(min_snr=snr.clamp(max=5), v=(1 / (1 - abar)).clamp(max=6)).items():
        closed = x0_weight / {"eps": snr, "x0": 1, "v": snr + 1}[objective]
        assert torch.allclose(tiny(weighting=weighting, objective=objective).loss_weight, closed, rtol=1e-9)
    assert (tiny(objective=objective).loss_weight == 1).all()


def test_label_dropping_is_one_coin_per_image():
    model, n = tiny(p_uncond=0.1), 40000
    y, u = torch.arange(n) % 3, torch.rand(n, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.drop_labels(y, u), torch.where(u < 0.1, 3, y))
    assert abs((model.drop_labels(y) == 3).sum() - 0.1 * n) < 5 * math.sqrt(n * 0.1 * 0.9)
    assert torch.equal(tiny(p_uncond=0.0).drop_labels(y, torch.zeros(n)), y) and y.max() == 2


@pytest.mark.parametrize("arch", ddpm.ARCHS)
def test_labels_are_0_to_K_minus_1_and_the_null_label_is_K(arch):
    model = tiny(arch=arch).eval()
    x, t = torch.randn(1, *model.shape), torch.tensor([5])
    outs = [model.network(x, t, torch.tensor([k])) for k in range(4)] + [model.network(x, t + 1, torch.tensor([0]))]
    assert all(not torch.equal(outs[a], outs[b]) for a in range(5) for b in range(a))  # t counts too
    assert torch.equal(model.network(x, t, None), outs[3])


@pytest.mark.parametrize("arch", ddpm.ARCHS)
def test_nothing_is_dropped_while_sampling_or_validating(arch):
    model = tiny(arch=arch, dropout=0.5, p_uncond=0.9)
    inner, (x0, y, t, eps) = model.net, random_batch(model, 3)
    assert not torch.equal(model(x0, y, t, eps), model(x0, y, t, eps))  # in training, features are dropped
    model.net = Net(inner)
    first, again = (model.sample(y, sampler="ddim", steps=4) for _ in range(2))
    assert torch.equal(first, again) and not model.training and not inner.training
    assert torch.equal(model(x0, y, t, eps), model(x0, y, t, eps))
    assert all(labels == [0, 1, 2] for _, labels in model.net.seen)


def test_guidance_convention(double):
    model, y = tiny().eval(), torch.tensor([0, 1, 2])
    xt, t = torch.randn(3, *model.shape), torch.tensor([7, 0, 19])
    conditional, null = model.network(xt, t, y), model.network(xt, t, torch.full_like(y, 3))
    model.net = Net(model.net)
    assert torch.equal(model.guided(xt, t, y, 0.0), conditional) and len(model.net.seen) == 1
    assert torch.equal(model.guided(xt, t, y, -1.0), null) and len(model.net.seen) == 2
    assert torch.equal(model.guided(xt, t, None, 1.8), null) and len(model.net.seen) == 3
    for guide, away in ((None, null), (lambda x, t, y: y[:, None, None, None] * x, 3 * xt)):
        model.guide = guide
        for w in (-1.0, -0.5, 0.0, 0.5, 1.8, 6.0):
            wanted = (1 + w) * conditional - w * (away if w > 0 else null)
            assert torch.allclose(model.guided(xt, t, y, w), wanted, atol=1e-12)


@pytest.mark.parametrize("objective", ddpm.OBJECTIVES)
def test_eps_hat_belongs_to_the_clipped_x0_hat(double, objective):
    model, t = tiny(objective=objective), torch.arange(20)
    xt, a, s = 3 * torch.randn(20, *model.shape), *model.signal_noise(t)
    free, clipped = (model.predict(xt, t, t % 3, 1.8, clip) for clip in (False, True))
    assert torch.equal(free[0], model.to_x0_eps(model.guided(xt, t, t % 3, 1.8), xt, t)[0]) and free[0].abs().max() > 1
    assert torch.equal(clipped[0], free[0].clamp(-1, 1))
    for x0_hat, eps_hat in (free, clipped):
        assert torch.allclose(a * x0_hat + s * eps_hat, xt, atol=1e-10)


@pytest.mark.parametrize("schedule", ddpm.SCHEDULES)
@pytest.mark.parametrize("sampler,eta", SAMPLERS)
def test_clipping_is_the_default_and_keeps_the_chain_bounded(sampler, eta, schedule):
    model, chain = tiny(schedule=schedule, timesteps=4000, beta_end=0.028), []
    model.net, y = Net(lambda x, t, y: 9 * torch.sin(99 * x)), torch.tensor([0])
    for steps in (1, 3, 50):
        model.sample(y, sampler=sampler, eta=eta, steps=steps, on_step=lambda i, *step: chain.append(step))
    assert len(chain) == 54 and all(xt.abs().max() < 10 and x0.abs().max() <= 1 for xt, x0 in chain)  # false for NaN


def test_rounding_draws_no_root_of_a_negative_number():
    model = tiny(timesteps=2, beta_start=1e-15, beta_end=0.9996)  # 1 - abar_s - sigma^2 = -2e-31
    assert model.sample(torch.tensor([0]), sampler="ddim", eta=1.0).isfinite().all()


@pytest.mark.parametrize("schedule", ddpm.SCHEDULES)
def test_steps_fall_from_T_minus_1(schedule):
    model = tiny(schedule=schedule, timesteps=500, beta_end=0.028)
    for steps in (1, 2, 3, 10, 50, 250, 499, 500):
        ts = model.sampler_timesteps(steps)
        assert len(ts) == steps and ts[0] == 499 and all(a > b for a, b in zip(ts, ts[1:]))
        last = model.abar[ts[-1]]
        assert steps == 1 or 0 <= ts[-1] < 12 and (1 - last) / last <= 0.03**2 * 1.2
    assert ts == list(range(499, -1, -1))


def test_steps_are_even_in_the_seventh_root_of_sigma():
    """From the last sigma, 33 here, or from 80 where the schedule goes on to 1e5, down to 0.03."""
    for schedule in ("linear", "cosine"):
        model = tiny(schedule=schedule, timesteps=5000, beta_end=0.0028)  # fine enough for the formula to be seen
        sigma = np.array([ddpm.sigma_of(model.abar[t]) for t in model.sampler_timesteps(8)])
        assert np.ptp(np.diff(np.minimum(sigma, 80) ** (1 / 7))) < 0.02 and abs(sigma[-1] - 0.03) < 0.002


@pytest.mark.parametrize("sampler,order", (("ddim", 1), ("dpm++", 2)))
def test_samplers_converge_at_their_order(sampler, order, double):
    """On data N(0.3, 0.04), whose x0_hat is known, the ODE keeps xt at as many deviations from its mean."""
    model, chain, errors = tiny(timesteps=4000, beta_end=0.01, objective="x0"), [], []
    deviations = lambda xt, a: (xt - a**0.5 * 0.3) / (a * 0.04 + 1 - a) ** 0.5  # noqa: E731
    snr = model.abar_t / model.q_var
    model.net = Net(lambda x, t, y: (0.3 / 0.04 + column(snr[t] / model.abar_t[t].sqrt()) * x) / column(25 + snr[t]))
    start = ddpm.image_noise([make_generator(0, k) for k in range(4)], model.shape)
    for steps in (25, 50, 100):
        model.sample(None, 0, 0, range(4), sampler, steps, clip_x0=False, on_step=lambda i, xt, x0: chain.append(xt))
        end = deviations(chain[-2], model.abar[model.sampler_timesteps(steps)[-1]])
        errors.append((end - deviations(start, model.abar[-1])).square().mean().sqrt().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(order - 0.3 < slope < order + 0.6 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("steps", (7, 20))
@pytest.mark.parametrize("sampler,eta", SAMPLERS)
def test_every_sampler_step_by_step(sampler, eta, steps, double):
    """From the formulas of the papers, in NumPy, also where steps are skipped: the same noise, the same chain."""
    model, chain, y, w = tiny(), [], np.array([0, 1]).reshape(2, 1, 1, 1), 0.7
    model.net = Net(lambda x, t, y: 0.4 * torch.sin(3 * x) + 0.02 * column(t) + 0.1 * column(y))
    keep = lambda i, xt, x0: chain.append((xt.numpy(), x0.numpy()))  # noqa: E731
    how = dict(w=w, seed=3, sampler=sampler, steps=steps, eta=eta, clip_x0=False, on_step=keep)
    model.sample(torch.tensor([0, 1]), **how)
    generators = [make_generator(3, k) for k in range(2)]
    noise = lambda: ddpm.image_noise(generators, model.shape).numpy()  # noqa: E731
    xt, ts, abar = noise(), model.sampler_timesteps(steps), np.cumprod(1 - np.linspace(1e-4, 0.6, 20))
    lam = lambda a: 0.5 * np.log(a / (1 - a))  # noqa: E731  [6]: the half log-SNR
    for i, t in enumerate(ts):
        a, b = abar[t], abar[ts[i + 1]] if i + 1 < len(ts) else 1.0
        eps = 0.4 * np.sin(3 * xt) + 0.02 * t + 0.1 * ((1 + w) * y - w * 3)  # [3] eq. 6
        x0, beta = (xt - (1 - a) ** 0.5 * eps) / a**0.5, 1 - a / b  # beta: of the skipped steps taken together
        np.testing.assert_allclose(chain[i][1], x0, rtol=1e-9, atol=1e-9)
        if b == 1.0:
            xt = x0
        elif sampler == "ddpm":  # [1] algorithm 2
            mean = (xt - beta / (1 - a) ** 0.5 * eps) / (1 - beta) ** 0.5
            xt = mean + (beta * (1 - b) / (1 - a)) ** 0.5 * noise()
        elif sampler == "ddim":  # [4] eq. 12 and 16
            sigma = eta * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
            xt = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * eps + (sigma * noise() if sigma else 0)
        else:  # [6] algorithm 2
            h, D = lam(b) - lam(a), x0
            if i:
                r = (lam(a) - lam(abar[ts[i - 1]])) / h
                D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * chain[i - 1][1]
            xt = (1 - b) ** 0.5 / (1 - a) ** 0.5 * xt - b**0.5 * (np.exp(-h) - 1) * D
        np.testing.assert_allclose(chain[i][0], xt, rtol=1e-9, atol=1e-9)


def test_interval_guides_only_between_its_ends():
    model, y = tiny(timesteps=50, beta_end=0.28), torch.tensor([0, 1])
    model.net, ts = Net(lambda x, t, y: 0.1 * x), model.sampler_timesteps(20)
    how = dict(sampler="dpm++", steps=20, interval=[ddpm.sigma_of(model.abar[ts[i]]) for i in (12, 5)])
    model.sample(y, w=2.0, **how)  # both ends belong to it
    visited = [[t for t, labels in model.net.seen if labels == wanted] for wanted in ([0, 1], [3, 3])]
    assert visited == [ts, ts[5:13]]
    model.net.seen.clear()
    model.sample(y, w=-1.0, **how)  # the unconditional model has no interval
    assert [labels for _, labels in model.net.seen] == [[3, 3]] * 20


REFUSED = (
    (dict(), "sampler: 'euler' is not one of ddpm, ddim, dpm", [dict(sampler="euler")]),
    (dict(), "steps: .* must be between 1 and 20", [dict(steps=0), dict(steps=21)]),
    (dict(), "eta: 0.5 must be 0, or at most 1 with sampler=ddim", [dict(eta=0.5), dict(eta=0.5, sampler="dpm++")]),
    (dict(), "eta: .* must be 0, or at most 1", [dict(eta=1.1, sampler="ddim"), dict(eta=-0.1, sampler="ddim")]),
    (dict(), "w: .* must be finite", [dict(w=math.nan), dict(w=-math.inf)]),
    (dict(), "interval: .* must be low,high or empty", [dict(interval=(1,)), dict(interval=(4, 1))]),
    (dict(), "labels .*, but this model has 3 classes", [dict(y=torch.tensor([3])), dict(y=torch.tensor([-1]))]),
    (dict(), "how many images", [dict(y=None)]),
    (dict(), "2 indices, but another number of labels", [dict(indices=[5, 6])]),
    (dict(num_classes=0), "labels .*, but this model has 0 classes", [dict()]),
    (dict(num_classes=0), "w=1: an unconditional model cannot be guided", [dict(y=None, indices=[0], w=1)]),
    (dict(p_uncond=0.0), "w=.* needs a null label", [dict(w=1.8), dict(w=-1), dict(y=None, indices=[0])]),
)


@pytest.mark.parametrize("changes,said,wrong", REFUSED)
def test_what_a_model_cannot_sample_is_refused(changes, said, wrong):
    for how in wrong:
        with pytest.raises(UserError, match=f"^{said}"):
            tiny(**changes).sample(**dict(y=torch.tensor([0])) | how)


@pytest.mark.parametrize("how", (dict(sampler="ddpm"), dict(sampler="ddim", eta=1.0), dict(sampler="dpm++")))
def test_images_do_not_depend_on_batch_size_or_order(how):
    model, y = tiny(), torch.arange(64) % 3
    draw = lambda k: model.sample(y[k], np.float32(1.8), 5, k, steps=3, **how)  # noqa: E731  (a w of any type)
    whole, order = draw(list(range(64))), torch.randperm(16)
    for size, n in ((1, 7), (7, 21)):
        parts = torch.cat([draw(list(range(k, k + size))) for k in range(0, n, size)])
        assert torch.allclose(parts, whole[:n], atol=1e-3)
    assert torch.allclose(draw(order.tolist()), whole[order], atol=1e-3)
    assert torch.allclose(draw([0, 1]), model.sample(y[:2], 1.8, 5, steps=3, **how), atol=1e-3)  # the default indices
    assert not torch.equal(model.sample(y[:1], seed=1, steps=3), model.sample(y[:1], seed=2, steps=3))


@pytest.mark.parametrize("sampler,eta", SAMPLERS)
def test_sampling_goes_on_from_a_noisy_image(sampler, eta):
    """At T-1 from the noise of the seed it is plain sampling; at any t a network that knows x0 leads there."""
    model, y, how = tiny(), torch.arange(3), dict(sampler=sampler, eta=eta, seed=4)
    noise = ddpm.image_noise([make_generator(4, k) for k in range(3)], model.shape)
    assert torch.equal(model.sample(y, start=(19, noise), steps=5, **how), model.sample(y, steps=5, **how))
    x0, seen = (torch.rand(model.shape) * 2 - 1).expand(3, -1, -1, -1), []

    def knows_x0(xt, t, y):
        a, sigma = model.signal_noise(t)
        return (xt - a * x0[: len(xt)]) / sigma

    model.net = Net(knows_x0)
    xt = model.q_sample(x0, torch.full((3,), 7), noise)
    x = model.sample(y, start=(7, xt), on_step=lambda *step: seen.append(step), **how)
    assert torch.allclose(x, x0, atol=1e-4) and [t for t, _ in model.net.seen] == list(range(7, -1, -1))
    model.net.seen.clear()
    model.sample(y, start=(7, xt), steps=3, **how)
    assert len(seen) == 8 and [t for t, _ in model.net.seen] == model.sampler_timesteps(3, 7)
    parts = model.sample_batches(y, range(3), 2, start=(7, xt), steps=8, **how)
    assert (torch.cat(list(parts)).int() - to_uint8(x0).int()).abs().max() <= 1
    for t, images, steps in ((7, xt, 9), (20, xt, 1), (-1, xt, 1), (7, xt[:2], 1)):
        with pytest.raises(UserError, match="start|steps"):
            model.sample(y, start=(t, images), steps=steps, **how)


def test_numbers_of_numpy_are_numbers(tmp_path):
    numbers = dict(num_classes=np.array([0, 2]).max() + 1, ch_mult=[np.int64(1), np.int64(2)], dropout=np.float32(0.5))
    config = DDPMConfig(**TINY | numbers | dict(class_names=list(np.array(["a", "b", "c"]))))
    assert [type(v) for v in (config.num_classes, *config.ch_mult, config.dropout)] == [int, int, int, float]
    model = DDPM(config)
    plain = model.sample(torch.tensor([1]), w=1.5, seed=9, indices=[7], steps=2)
    for w in (np.float32(1.5), torch.tensor(1.5)):
        x = model.sample(np.array([1]), w=w, seed=np.int32(9), indices=np.array([7]), steps=np.int64(2))
        assert torch.equal(x, plain)
    ddpm.save_model(tmp_path / "m.pt", model)
    assert ddpm.load_model(tmp_path / "m.pt")[0].config == config  # nothing of NumPy's is in the file


X0, Y, T, EPS = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=int), torch.ones(4, dtype=int), torch.zeros(4, 3, 8, 8)
UNFIT = [(X0, Y[:1]), (X0, Y[:3]), (X0, None), (X0, Y, T), (X0, Y, None, EPS), (X0, Y, T[:1], EPS), (X0, Y, T, EPS[:1])]
UNFIT += [(X0.byte(), Y), (X0[..., :4], Y), (X0[0], Y), (X0.movedim(1, -1), Y)]


@pytest.mark.parametrize("arguments", UNFIT)
def test_what_the_loss_cannot_use_is_refused(arguments):
    with pytest.raises(UserError):
        tiny()(*arguments)
    with pytest.raises(UserError, match="unconditional"):
        tiny(num_classes=0)(X0, Y)


def test_a_name_without_a_branch_is_not_another_one(monkeypatch):
    """Somebody who adds a name and forgets the branch gets no result of the last branch."""
    for kind in ("SCHEDULES", "SAMPLERS", "ARCHS", "WEIGHTINGS", "LOSSES", "OBJECTIVES"):
        monkeypatch.setattr(ddpm, kind, (*getattr(ddpm, kind), "new"))
    for changes in (dict(schedule="new"), dict(arch="new"), dict(weighting="new")):
        with pytest.raises((KeyError, NotImplementedError)):
            tiny(**changes)
    with pytest.raises(NotImplementedError):
        tiny().sample(Y, sampler="new", steps=2)
    model = tiny()
    model.config.objective = model.config.loss = "new"
    for call in (lambda: model(X0, Y), lambda: model.sample(Y, steps=2)):
        with pytest.raises((KeyError, NotImplementedError)):
            call()


def test_own_network_and_schedule(tmp_path):
    own, betas = nn.Conv2d(3, 3, 1), np.linspace(0.01, 0.5, 20)
    net = Net(lambda x, t, y: own(x))
    net.own = own
    model = DDPM(DDPMConfig(**TINY), net=net, betas=betas)
    assert model.abar == pytest.approx(np.cumprod(1 - betas).tolist(), rel=1e-12)
    x0 = model.sample(torch.tensor([1, 2]), steps=3)
    ddpm.save_model(tmp_path / "m.pt", model, step=5, note="mine")
    other, saved = ddpm.load_model(tmp_path / "m.pt", net=copy.deepcopy(net))
    assert torch.equal(other.sample(torch.tensor([1, 2]), steps=3), x0)
    assert (saved["step"], saved["note"]) == (5, "mine")
    for wrong in (betas[:9], np.append(betas[1:], 1.5), np.append(betas[1:], math.nan)):
        with pytest.raises(UserError, match="betas"):
            DDPM(DDPMConfig(**TINY), betas=wrong)


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    rates = [ddpm.learning_rate(step, 12, 0.8, 0.1, 3) for step in range(12)]
    assert rates == pytest.approx([0.2, 0.4, 0.6] + [0.45 + 0.35 * math.cos(math.pi * k / 8) for k in range(9)])
    assert ddpm.learning_rate(0, 12, 0.8, 0.1, 0) == ddpm.learning_rate(0, 1, 0.8, 0.1, 0) == 0.8


def test_muon_sets_the_singular_values_of_inner_kernels_to_about_1():
    """In its first step, here from 0.1 to 1. Everything else takes AdamW's step."""
    ours, theirs = tiny(), tiny()
    theirs.load_state_dict(ours.state_dict())
    inner = [p.ndim == 4 and "stem" not in name and "net.out" not in name for name, p in ours.named_parameters()]
    pairs = list(zip(inner, ours.parameters(), theirs.parameters()))
    for _, p, q in pairs:
        p.grad = torch.randn_like(p)
        if p.ndim == 4:
            U, values, Vh = torch.linalg.svd(p.grad.flatten(1), full_matrices=False)
            p.grad = (U * torch.linspace(0.1, 1, len(values)) @ Vh).view_as(p)
        q.grad = p.grad.clone()
    optimizer = ddpm.make_optimizer(ours, 0.1, 0.5, "muon")
    optimizer.step()
    for _, p, q in filter(lambda pair: pair[0], pairs):
        update = (0.95 * q - p).detach().flatten(1) / (0.1 * 0.2 * max(p.flatten(1).shape) ** 0.5)
        U, _, Vh = torch.linalg.svd(q.grad.flatten(1), full_matrices=False)
        values = (U.T @ update @ Vh.T).diagonal()  # in the gradient's own directions
        assert 0.6 < values.min() and values.max() < 1.3
    ddpm.make_optimizer(theirs, 0.1, 0.5).step()
    assert all(torch.allclose(p, q, atol=1e-6) for kernel, p, q in pairs if not kernel) and 9 < sum(inner) < len(pairs)
    assert len(optimizer.state_dict()["state"]) == len(pairs)  # a resumed run goes on with all of it


@pytest.mark.parametrize("decay", (0.5, 0.9999))
def test_averaged_weights_have_their_closed_form(decay):
    """Weights k have the share (1 - d_k) times all later d_j: read off with weights that are the unit vectors."""
    net, unit = nn.Linear(31, 31).requires_grad_(False), torch.eye(31)
    net.weight[:], net.bias[:] = unit[30], unit[30]  # the initial weights
    net.register_buffer("count", torch.zeros(()))
    ema = copy.deepcopy(net)
    ddpm.update_ema(ema, net, 5, decay)
    assert all(map(torch.equal, ema.parameters(), net.parameters()))  # constant weights are a fixed point
    for k in range(30):
        net.weight[:], net.bias[:], net.count = unit[k], unit[k], net.count + 1
        ddpm.update_ema(ema, net, k, decay)
    d = [min(decay, (1 + k) / (10 + k)) for k in range(30)]
    shares = torch.tensor([(1 - d[k]) * math.prod(d[k + 1 :]) for k in range(30)] + [math.prod(d)])
    assert all(torch.allclose(p, shares, rtol=1e-4) for p in ema.parameters()) and ema.count == 30


def test_a_loaded_model_is_the_one_that_was_saved(tmp_path):
    raw, averaged, y = tiny(objective="v"), tiny(objective="v"), torch.tensor([0, 2])
    averaged.load_state_dict({name: p / 2 for name, p in raw.state_dict().items()})
    averaged.guide = tiny().net
    ddpm.save_model(path := str(tmp_path / "ckpt.pt"), raw, averaged, step=5)
    raw.guide = averaged.guide  # it guides both
    for ema, wanted in ((True, averaged), (False, raw)):
        model, checkpoint = ddpm.load_model(path, ema=ema)
        assert model.config == wanted.config and same(model.state_dict(), wanted.state_dict())
        assert not model.training and model.amp_dtype is None and checkpoint["step"] == 5
        assert not any(p.requires_grad for p in model.guide.parameters())
        assert torch.equal(model.sample(y, 1.0, steps=3), wanted.sample(y, 1.0, steps=3))
    assert ddpm.load_model(path, amp_dtype=torch.bfloat16)[0].amp_dtype == torch.bfloat16


def test_shipped_weights_load_and_denoise():
    path = os.path.join(os.path.dirname(os.path.abspath(ddpm.__file__)), "weights", "cifar_small.pt")
    with pytest.raises(UserError, match="holds only averaged weights"):
        ddpm.load_model(path, ema=False)
    torch.manual_seed(0)
    model, _ = ddpm.load_model(path)
    t = torch.tensor([min(range(model.T), key=lambda t: abs(ddpm.sigma_of(model.abar[t]) - 0.3))])
    x0 = torch.linspace(-0.5, 0.5, 32).expand(1, 3, 32, 32)
    x0_hat, _ = model.predict(model.q_sample(x0, t, torch.randn(x0.shape)), t, None, 0)
    assert (x0_hat - x0).square().mean() < 0.002  # of 0.09


def test_a_checkpoint_with_a_wrong_bit_is_refused_or_the_same(tmp_path):
    path, content = tmp_path / "ckpt.pt", dict(model_args={}, ema=dict(w=torch.randn(100)), step=5)
    torch.save(content, path)
    whole = path.read_bytes()
    for k in range(0, len(whole), 3):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 4]) + whole[k + 1 :])
        try:
            assert same(ddpm.load_checkpoint(path)["ema"], content["ema"]), k
        except UserError as e:
            assert "ckpt.pt is damaged" in str(e) and "\n" not in str(e)


class Intruder:
    def __reduce__(self):  # makes a folder when it is unpickled
        return os.mkdir, ("made",)


def test_what_is_no_checkpoint_is_one_line_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^no checkpoint bad.pt: train a model first"):
        ddpm.load_model("bad.pt")
    ddpm.save_model("good.pt", tiny())
    content = torch.load("good.pt")
    whole, wrong = (tmp_path / "good.pt").read_bytes(), [b"\x89PNG\r\n" * 99, pickle.dumps(Intruder())]
    lacking = [{k: v for k, v in content.items() if k != key} for key in ("model_args", "ema", "step")]
    for other in (*lacking, [content], 5, torch.zeros(3), content | dict(model_args=Intruder())):
        torch.save(other, "other.pt")
        wrong.append((tmp_path / "other.pt").read_bytes())
    for data in (*wrong, *(whole[:n] for n in (0, 1, 1000, len(whole) // 2, len(whole) - 1))):
        (tmp_path / "bad.pt").write_bytes(data)
        with pytest.raises(UserError, match="^checkpoint bad.pt is damaged or not of save_model$"):
            ddpm.load_model("bad.pt")
    torch.save(content | dict(ema={f"module.{name}": p for name, p in content["ema"].items()}), "bad.pt")
    with pytest.raises(UserError, match="^checkpoint bad.pt is of another version or another network$"):
        ddpm.load_model("bad.pt")
    torch.save(tiny().state_dict(), "bad.pt")
    with pytest.raises(UserError, match="^checkpoint bad.pt is damaged or not of save_model$"):
        ddpm.load_model("bad.pt")
    assert not os.path.exists("made")
