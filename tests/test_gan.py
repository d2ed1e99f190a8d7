"""gan.py: both networks, the losses, and the set that it writes."""

import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import classifier_flags, contents, flags, path_of
from PIL import Image

import data
from ddpm import to_float


def gan_flags(shards, out_dir, **changes):
    settings = dict(dataset=f"{shards}/tiny", out_dir=out_dir, ch=4, z_dim=5, batch_size=8, max_iters=6)
    settings |= dict(log_interval=1, sample_interval=2, per_class=2, device="cpu")
    return flags(**settings | changes)


@pytest.mark.parametrize("conditional", (True, False))
def test_the_same_seed_gives_the_same_run_in_any_folder(conditional, shards, tmp_path, run, fails):
    for name in ("a", "b"):
        run("gan", *gan_flags(shards, tmp_path / name, conditional=conditional, label_smoothing=0.1, input_noise=0.1))
    for name in ("log.json", "samples_000006.png", "training.gif"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert contents(tmp_path / "a" / "synthetic") == contents(tmp_path / "b" / "synthetic")
    assert Image.open(tmp_path / "a" / "training.gif").n_frames == 3
    assert "b holds an earlier run" in fails("gan", *gan_flags(shards, tmp_path / "b"))


def test_the_label_is_a_channel_of_both_networks(shards, tmp_path, run):
    inputs = {}
    for conditional in (True, False):
        run("gan", *gan_flags(shards, tmp_path / str(conditional), conditional=conditional, max_iters=1))
        networks = torch.load(tmp_path / str(conditional) / "gan.pt", weights_only=True)
        inputs[conditional] = [networks["discriminator"]["layers.0.weight"].shape[1]]
        inputs[conditional] += [networks["generator"]["layers.0.weight"].shape[0]]
    assert inputs[True] == [n + 1 for n in inputs[False]] == [4, 5]


def test_the_smoothed_loss_of_the_first_step(shards, tmp_path, monkeypatch):
    """Targets 1 - s and s: the mean of log(1 + exp(logit)) - target logit, of real and of generated images."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    logits = {}
    for s, noise in ((0.0, 0.0), (0.2, 0.0), (0.2, 0.5)):
        how = gan_flags(shards, tmp_path / f"{s} {noise}", max_iters=1, label_smoothing=s, input_noise=noise)
        monkeypatch.setattr(sys, "argv", ["gan.py", *how])
        last = runpy.run_path(path_of("gan"), run_name="__main__")
        real, fake = logits[s, noise] = last["d_real"].detach(), last["d_fake"].detach()
        loss = (F.softplus(real) - (1 - s) * real).mean() + (F.softplus(fake) - s * fake).mean()
        (logged,) = data.read_json(f"{tmp_path}/{s} {noise}/log.json")["d_loss"]
        assert logged == pytest.approx(loss.item(), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(logits[0.0, 0.0], logits[0.2, 0.0]))
    assert not any(torch.equal(a, b) for a, b in zip(logits[0.2, 0.5], logits[0.2, 0.0]))


@pytest.mark.parametrize("name,shape", (("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3)), ("tiny", (8, 8, 3))))
def test_images_have_the_size_of_the_real_ones(name, shape, shards, tmp_path, run):
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
