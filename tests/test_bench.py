"""bench.py: what it prints, not how fast anything is."""

import re
import sys
import time

import pytest
import torch
from conftest import flags

from ddpm import DDPM, DDPMConfig
from runtime import setup_device

SMALL = dict(device="cpu", batch_size=2, rounds=1, steps=2, num_samples=10, timesteps=15, image_size=8)
SMALL |= dict(beta_end=0.6, ch_mult="1,2")
TINY = dict(ch=8, attn_resolutions="", dtype="float32")


def rows_of(text):
    """What was measured, and the side, of each row. All numbers in it are positive."""
    found = re.findall(r"^(.+?) +(\w+) +([\d.]+) images/s +([\d.]+) ms", text, re.M)
    assert all(float(speed) > 0 and float(ms) > 0 for _, _, speed, ms in found)
    return [(title, side) for title, side, _, _ in found]


def test_prints_all_parts(run):
    text = run("bench", "config/fashion_mnist.py", *flags(**SMALL, **TINY, patch=2))
    sampled = [f"{sampler}, 2 steps, w={w}" for sampler in ("ddpm", "ddim", "dpm++") for w in ("0", "0.3")]
    assert rows_of(text) == [(title, "nanoDDPM") for title in ("training step, batch 2", *sampled)]
    machine, how = text.splitlines()[:2]
    assert machine.endswith(f"1 threads, torch {torch.__version__}") and how.startswith("cpu, torch.float32, eager")
    other = dict(arch="cnn", objective="x0", weighting="min_snr", samplers="ddim")
    assert len(rows_of(run("bench", *flags(**SMALL, **TINY, **other)))) == 3


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_scales_the_loss_of_float16_alone(dtype, run, monkeypatch):
    """Nor does a clock matter that stands still."""
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    steps = []
    unscale = torch.amp.GradScaler.unscale_
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", lambda s, o: (steps.append(s.is_enabled()), unscale(s, o)))
    text = run("bench", "config/shapes.py", *flags(**SMALL | TINY | dict(dtype=dtype, what="train")))
    assert " images/s " in text and steps == [dtype == "float16"] * 2  # a step to warm up, and one


@pytest.mark.slow
def test_channels_last_convolutions_give_the_same_loss():
    model = DDPM(DDPMConfig(image_size=8, arch="cnn", ch=8, ch_mult=(1,), timesteps=20, beta_end=0.6, dropout=0.0))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    given = torch.rand(4, 3, 8, 8) * 2 - 1, None, *model.random_t_eps(4)
    with torch.no_grad():
        expected = model(*given)
        model.net.compile(**setup_device("cpu", "float32", "channels_last")[2])
        assert torch.allclose(model(*given), expected, rtol=1e-4)


def test_peers_that_are_not_installed_are_said_to_be(fails, monkeypatch):
    for peer, module in (("diffusers", "diffusers"), ("lucidrains", "ema_pytorch")):
        monkeypatch.setitem(sys.modules, module, None)  # not installed, though another test may have loaded the rest
        assert "needs `pip install '.[bench]'`" in fails("bench", *flags(**SMALL, **TINY, peer=peer))


@pytest.mark.slow
@pytest.mark.parametrize("patch", (1, 2))
def test_diffusers_has_the_same_layout(patch, run):
    pytest.importorskip("diffusers")
    recipe = dict(ch=128, patch=patch, num_res_blocks=1, attn_resolutions=4, samplers="ddim", peer="diffusers")
    text = run("bench", *flags(**SMALL, **recipe))
    ours, theirs = re.search(r"nanoDDPM (\S+)M, diffusers ([\d.]+)M", text).groups()
    assert ours == theirs and text.count("x our time") == 3


@pytest.mark.slow
def test_lucidrains_is_timed_where_it_can_do_the_same(run):
    pytest.importorskip("denoising_diffusion_pytorch")
    text = run("bench", *flags(**SMALL, **TINY, peer="lucidrains"))
    timed = [title for title, side in rows_of(text) if side == "lucidrains"]
    assert timed == ["training step, batch 2", "ddim, 2 steps, w=0.3"]
