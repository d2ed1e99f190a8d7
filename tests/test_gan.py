"""gan.py: both networks, the losses, and the set that it writes."""

import runpy
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import classifier_flags, contents, flags, path_of
from PIL import Image

import data
from ddpm import seed_of, to_float, to_uint8


def gan_flags(shards, out_dir, **changes):
    settings = dict(dataset=f"{shards}/tiny", out_dir=out_dir, ch=4, z_dim=5, batch_size=8, max_iters=6)
    settings |= dict(log_interval=1, sample_interval=2, per_class=2, device="cpu")
    return flags(**settings | changes)


@pytest.mark.parametrize("conditional", (True, False))
def test_the_same_seed_gives_the_same_run_in_any_folder(conditional, shards, tmp_path, run, fails):
    """The label is one more channel of both networks."""
    for name in ("a", "b"):
        run("gan", *gan_flags(shards, tmp_path / name, conditional=conditional, label_smoothing=0.1, input_noise=0.1))
    for name in ("log.json", "samples_000006.png", "training.gif"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert contents(tmp_path / "a" / "synthetic") == contents(tmp_path / "b" / "synthetic")
    assert Image.open(tmp_path / "a" / "training.gif").n_frames == 3
    assert "b holds an earlier run" in fails("gan", *gan_flags(shards, tmp_path / "b"))
    networks = torch.load(tmp_path / "a" / "gan.pt", weights_only=True)
    assert networks["discriminator"]["layers.0.weight"].shape[1] == 3 + conditional
    assert networks["generator"]["layers.0.weight"].shape[0] == 4 + conditional


def test_the_training_is_the_one_written_out_here(shards, tmp_path, monkeypatch):
    """Two-sided smoothing, noise on all that D sees, falling to 0, and the non-saturating loss; grid and set of it."""
    s, noise, seed, adam = 0.1, 0.5, 3, (1e-2, (0.6, 0.999))
    how = gan_flags(shards, tmp_path, max_iters=3, seed=seed, label_smoothing=s, input_noise=noise, lr=1e-2, beta1=0.6)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["gan.py", *how])
    script = runpy.run_path(path_of("gan"), run_name="__main__")
    (images, labels), _, names = data.load_splits(f"{shards}/tiny")
    batches = data.Batches(*data.training_part(images, labels, names, 0.1)[0], 8, seed)
    torch.manual_seed(seed)
    G, D = (script[kind](8, 3, 3).apply(script["init_dcgan"]) for kind in ("Generator", "Discriminator"))
    G_optimizer, D_optimizer = (torch.optim.Adam(net.parameters(), *adam) for net in (G, D))
    for step, sigma in enumerate((noise, noise * 2 / 3, noise / 3)):
        x, y = batches(step)
        torch.manual_seed(seed_of(seed + 1, step))
        fake = G(torch.randn(8, 5), y)
        real_logit = D(x + sigma * torch.randn(x.shape), y)
        fake_logit = D(fake.detach() + sigma * torch.randn(x.shape), y)
        log_real = (1 - s) * F.logsigmoid(real_logit) + s * F.logsigmoid(-real_logit)
        log_fake = s * F.logsigmoid(fake_logit) + (1 - s) * F.logsigmoid(-fake_logit)
        D_optimizer.zero_grad()
        (d_loss := -(log_real + log_fake).mean()).backward()
        D_optimizer.step()
        g_loss = -F.logsigmoid(D(fake + sigma * torch.randn(x.shape), y)).mean()
        G_optimizer.zero_grad()
        g_loss.backward()
        G_optimizer.step()
    log, networks = data.read_json(f"{tmp_path}/log.json"), torch.load(tmp_path / "gan.pt", weights_only=True)
    assert (log["d_loss"][-1], log["g_loss"][-1]) == pytest.approx((d_loss.item(), g_loss.item()), rel=1e-5)
    for net, found in ((G, networks["generator"]), (D, networks["discriminator"])):
        for key, p in net.named_parameters():  # a bias before a norm has no gradient but rounding
            assert p.ndim == 1 or torch.allclose(p, found[key], rtol=0, atol=1e-4), key

    def images_of(first, y):
        streams = [torch.Generator().manual_seed(seed_of(seed, first + k)) for k in range(len(y))]
        with torch.no_grad():
            return to_uint8(G.eval()(torch.stack([torch.randn(5, generator=g) for g in streams]), y)).numpy()

    G.load_state_dict(networks["generator"])
    images, labels, _ = data.read_shards(f"{tmp_path}/synthetic")
    assert labels.tolist() == [0, 1, 2, 0, 1, 2] and np.array_equal(images, images_of(2**30, torch.tensor(labels)))
    grid = data.tile(images_of(0, torch.arange(3).repeat_interleave(8)), 8, names)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples_000003.png")), np.asarray(grid))


@pytest.mark.parametrize("name,shape", (("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3)), ("tiny", (8, 8, 3))))
def test_images_have_the_size_of_the_real_ones(name, shape, shards, tmp_path, run, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.0)  # a clock may stand still
    run("gan", *gan_flags(shards, tmp_path, max_iters=1, dataset=f"{shards}/{name}"))
    images, labels, names = data.load(f"{tmp_path}/synthetic")
    assert images.shape[1:] == shape and np.bincount(labels).tolist() == [2] * len(names)


def test_writes_a_set_for_evaluate_and_classifier(shards, tmp_path, run):
    run("gan", *gan_flags(shards, tmp_path, max_iters=1, per_class=10))
    text = run("classifier", *classifier_flags(shards, tmp_path, "", seeds=1))
    assert "30 synthetic training images" in text and "note:" not in text
    settings = dict(dataset=f"{shards}/tiny", out_dir=tmp_path, cache_dir=tmp_path / "c", resize=32, n=30, device="cpu")
    assert "samples" in run("evaluate", *flags(**settings))


@pytest.mark.slow
def test_learns(real_shapes, tmp_path, run):
    """The Fréchet distance of the images at 4x4 pixels falls to less than half of its start."""
    distances, frechet_distance = [], runpy.run_path(path_of("evaluate"))["frechet_distance"]
    for steps in (1, 300):
        settings = dict(dataset=f"{real_shapes}/real", ch=16, z_dim=100, batch_size=32, max_iters=steps, per_class=30)
        run("gan", *gan_flags("", tmp_path / str(steps), **settings, val_fraction=0, sample_interval=0))
        sets = [data.load(str(folder))[0] for folder in (tmp_path / str(steps) / "synthetic", real_shapes / "real")]
        pixels = [F.avg_pool2d(to_float(torch.tensor(images)), 8).flatten(1).numpy() for images in sets]
        distances.append(frechet_distance(*pixels))
    assert distances[1] < 0.5 * distances[0], distances
