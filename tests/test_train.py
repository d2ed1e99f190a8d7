"""train.py: exact resume, processes and micro-batches, the length of a run, configs, which images it trains on."""

import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import HERE, augment_flags, checkpoint, classifier_flags, cut_off, flags, processes, same, train_flags
from PIL import Image

import classifier
import data
import ddpm
from configurator import settings_in

KEYS = ("model", "ema", "optimizer", "scaler", "step", "sums", "history", "trained_on")


def resume(folder, **changes):
    return flags(out_dir=folder, init_from="resume", device="cpu", **changes)


def test_a_run_cut_off_before_any_write_continues_to_the_same_bits(shards, tmp_path, run, capfd):
    """Run n is cut off before its n-th write, run n + 1 goes on from what is there: with the settings of the first,
    dropout, micro-batches and bfloat16, to the weights, average, optimiser and log of a run that never stopped.
    """
    whole, cut, step = tmp_path / "whole", tmp_path / "cut", 0
    settings = dict(max_iters=4, eval_interval=1, grad_accum=2, dtype="bfloat16", ema_decay=0.5)
    run("train", *train_flags(shards, whole, **settings))
    for n in range(9):
        how = resume(cut) if step else train_flags(shards, cut, **settings)
        status, text = cut_off(n, capfd, "train", *how)
        assert f"steps {step} to 4, " in text and "torch.bfloat16" in text and (status == 0) == (n == 8), text
        step = max(0, n - 4)  # a save is six writes; the fifth gives the checkpoint its name
        assert (cut / "ckpt.pt").exists() == (step > 0) and (not step or checkpoint(cut)["step"] == step)
        assert n < 2 or data.read_json(cut / "log.json")["step"]
    a, b = checkpoint(whole), checkpoint(cut)
    for key in KEYS:
        assert same(a[key], b[key]), key
    assert a["config"] == b["config"] | dict(out_dir=str(whole), init_from="scratch")
    assert (whole / "log.json").read_bytes() == (cut / "log.json").read_bytes()


@pytest.mark.parametrize("during", ("a step", "a grid"))
def test_a_signal_saves_the_step_and_the_run_continues(during, shards, trained, tmp_path, run, monkeypatch):
    """Wherever it arrives, the step that the run ends at is saved, and the rest is that of an undisturbed run."""
    owner, name = (ddpm, "update_ema") if during == "a step" else (ddpm.DDPM, "sample")
    function = getattr(owner, name)

    def interrupted(*args):
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(owner, name, interrupted)
    text = run("train", *train_flags(shards, tmp_path, sample_interval=1))
    step = 1 if during == "a step" else 2  # the grid of step 1 is finished, and one step more
    assert f"stopped at step {step} of 6: " in text and checkpoint(tmp_path)["step"] == step
    assert f"steps {step} to 6" in run("train", *resume(tmp_path))
    a, b = checkpoint(trained), checkpoint(tmp_path)
    assert all(same(a[key], b[key]) for key in KEYS)


def test_a_resumed_run_may_change_to_float16_and_keeps_its_loss_scale(trained, tmp_path, run):
    shutil.copytree(trained, tmp_path / "out")
    assert "torch.float16" in run("train", *resume(tmp_path / "out", dtype="float16", max_iters=7))
    saved = checkpoint(tmp_path / "out")
    torch.save(saved | dict(scaler=saved["scaler"] | dict(scale=64.0)), tmp_path / "out" / "ckpt.pt")
    assert "torch.float16" in run("train", *resume(tmp_path / "out", max_iters=8))
    assert checkpoint(tmp_path / "out")["scaler"]["scale"] == 64


def test_a_folder_that_holds_a_run_is_refused(shards, trained, fails):
    before = checkpoint(trained)
    for start in ("scratch", f"{trained}/ckpt.pt"):
        assert "holds an earlier run" in fails("train", *train_flags(shards, trained, init_from=start))
    assert same(before, checkpoint(trained))


def test_micro_batches_and_processes_equal_one_batch(shards, tmp_path, run):
    def settings(name, **changes):
        return train_flags(shards, tmp_path / name, dropout=0.0, max_iters=4, **changes)

    texts = dict(one=run("train", *settings("one")))
    texts["accumulated"] = run("train", *settings("accumulated", grad_accum=4))
    texts["two"], _ = processes(2, "train", *settings("two", grad_accum=2, sample_interval=4))
    norms = {name: list(map(float, re.findall(r"grad norm +([\d.]+)", text))) for name, text in texts.items()}
    assert (tmp_path / "two" / "samples_000004.png").exists()
    one = checkpoint(tmp_path / "one")
    for name in ("accumulated", "two"):
        other = checkpoint(tmp_path / name)
        for key in ("model", "ema"):
            assert all(torch.allclose(x, other[key][k], atol=1e-5) for k, x in one[key].items()), (name, key)
        for key in ("train_loss", "val_loss", "log_loss", "test_loss"):
            np.testing.assert_allclose(one["history"][key], other["history"][key], rtol=1e-4)
        assert norms[name] == pytest.approx(norms["one"], abs=2e-3)  # three digits; Adam hides another scale


class HostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what would make a GPU's host wait for a value: item(), float(), nonzero, indexing by a mask."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, indices = function.overloadpacket.__name__, args[1] if len(args) > 1 else None
        masks = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in indices)
        self.count += masks or name in ("_local_scalar_dense", "nonzero", "equal", "masked_select")
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_from_the_device(shards, tmp_path, run):
    reads = []
    for n in (3, 9):
        with HostReads() as mode:
            run("train", *train_flags(shards, tmp_path / str(n), max_iters=n, log_interval=99, eval_interval=99))
        reads.append(mode.count)
    assert reads[0] == reads[1] > 0  # the first step and the last report; those between do not


def test_learning_rate_log_and_number_of_steps(shards, tmp_path, run):
    settings = dict(max_iters=12, warmup_iters=3, lr=0.8, min_lr=0.1, eval_interval=8, grad_clip=1e-3, log_interval=4)
    run("train", *train_flags(shards, tmp_path, **settings))
    log = data.read_json(tmp_path / "log.json")
    keys = "step epochs train_loss val_loss val_quarters test_loss log_step log_loss lr"
    assert log.keys() == set(keys.split()) and log["log_step"] == [1, 4, 8, 12] and log["step"] == [8, 12]
    assert log["lr"] == pytest.approx([0.2, 0.8, 0.1 + 0.35 * (1 + np.cos(np.pi / 2)), 0.1])
    assert log["epochs"] == pytest.approx([8 * 8 / 54, 12 * 8 / 54]) and log["test_loss"] > 0
    weights = [1, 3, 4]  # steps that each logged loss is the mean of
    assert log["train_loss"] == pytest.approx([np.average(log["log_loss"][:3], weights=weights), log["log_loss"][3]])
    assert len(log["val_loss"]) == len(log["val_quarters"]) == 2 and len(log["val_quarters"][0]) == 4


def test_the_validation_loss_is_that_of_the_averaged_weights(shards, trained):
    """In eval mode, with the same t and noise every time; by quarter of t."""
    model, saved = ddpm.load_model(f"{trained}/ckpt.pt")
    (images, labels), *_ = data.load_splits(f"{shards}/tiny")
    t, eps = model.random_t_eps(6, ddpm.make_generator(0, 2**32 - 1))
    with torch.no_grad():
        losses = model(ddpm.to_float(torch.tensor(images[54:])), torch.tensor(labels[54:]), t, eps)
    quarters = [losses[t // 5 == q].mean().item() for q in range(4)]
    assert saved["history"]["val_loss"][-1] == pytest.approx(losses.mean().item())
    assert saved["history"]["val_quarters"][-1] == pytest.approx(quarters, nan_ok=True)


def test_epochs_give_the_length(shards, tmp_path, run):
    text = run("train", *train_flags(shards, tmp_path, epochs=1, eval_interval=99))
    assert "steps 0 to 7" in text  # 54 images in batches of 8, whatever max_iters says
    assert checkpoint(tmp_path)["history"]["test_loss"] > 0
    assert "steps 7 to 9" in run("train", *resume(tmp_path, max_iters=9))  # a resumed run may be given another length
    assert "steps 9 to 14" in run("train", *resume(tmp_path, epochs=2))


@pytest.mark.parametrize("name", sorted(n for n in os.listdir(f"{HERE}/config") if n.endswith(".py")))
def test_every_config_runs(name, shards, tmp_path, run):
    small = dict(max_iters=1, batch_size=4, ch=8, timesteps=20, beta_end=0.6, eval_images=6, val_fraction=0.5)
    small |= dict(out_dir=tmp_path / "out", data_dir=shards, sample_interval=0, device="cpu")
    small |= dict(dataset=f"{shards}/cifar10") if name == "folder.py" else {}
    run("train", f"config/{name}", *flags(**small))
    assert len(data.read_json(tmp_path / "out" / "log.json")["val_loss"]) == 1
    if name == "cats_frogs.py":  # its second command
        small |= dict(out_dir=tmp_path / "cats", classes="cat", conditional=False, sample_interval=1)
        run("train", f"config/{name}", *flags(**small))
        assert checkpoint(tmp_path / "cats")["model_args"]["num_classes"] == 0
        run("sample", *flags(out_dir=tmp_path / "cats", steps=2, num_samples=3, device="cpu"))


def test_the_default_recipe_is_that_of_cifar_linear_and_has_38_million_parameters():
    defaults = {key: default for key, (default, _) in settings_in(f"{HERE}/train.py").items()}
    scope = {}
    with open(f"{HERE}/config/cifar_linear.py") as f:
        exec(f.read(), {}, scope)
    assert scope.items() <= defaults.items()
    config = ddpm.DDPMConfig(num_classes=10)
    assert all(getattr(config, key) == defaults[key] for key in vars(config).keys() & defaults.keys() - {"image_size"})
    with torch.device("meta"):
        assert round(sum(p.numel() for p in ddpm.UNet(config).parameters()) / 1e6, 1) == 38.3


@pytest.mark.parametrize("what", ("one image", "one class", "no classes", "constant", "grey"))
def test_odd_data_can_be_trained_on_and_sampled(what, tmp_path, run):
    n, channels = 1 if what == "one image" else 40, 1 if what == "grey" else 3
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, channels), dtype=np.uint8)
    images[:] = 7 if what == "constant" else images
    labels = None if what == "no classes" else np.arange(n) % (1 if what == "one class" else 3)
    names = [] if labels is None else ["a", "b", "c"][: labels.max() + 1]
    data.write_shards(f"{tmp_path}/tiny", images, labels, names)
    shares = dict(val_fraction=0.0 if n == 1 else 0.1)
    text = run("train", *train_flags(tmp_path, tmp_path / "out", max_iters=2, sample_interval=2, **shares))
    assert f"{len(names) or 'no'} classes" in text and (tmp_path / "out" / "samples_000002.png").exists()
    assert len(data.read_json(tmp_path / "out" / "log.json")["val_loss"]) == (n > 1)
    run("sample", *flags(out_dir=tmp_path / "out", steps=2, num_samples=2, device="cpu"))
    assert Image.open(tmp_path / "out" / "sample.png").height == max(1, len(names)) * 18 + 2


def test_n_real_trains_on_the_images_that_the_classifier_takes(shards, tmp_path, run, fails, monkeypatch):
    """With labels or without; a resumed run cannot take others."""
    monkeypatch.setattr(classifier, "n_real", 9)
    (images, labels), *_ = data.load_splits(f"{shards}/tiny")
    n = data.training_count(len(images), 0.1)
    taken, their_labels = classifier.arm_images("real", (images[:n], labels[:n]), None, 0)
    assert np.bincount(their_labels).tolist() == [3, 3, 3]
    for conditional in (True, False):
        out_dir = tmp_path / str(conditional)
        text = run("train", *train_flags(shards, out_dir, n_real=9, max_iters=1, conditional=conditional))
        assert "9 training and 6 validation images" in text
        assert checkpoint(out_dir)["trained_on"]["training"] == data.fingerprint(taken)
    assert "not the images that" in fails("train", *resume(tmp_path / "True", n_real=12))


def test_n_real_says_when_it_started_from_other_weights(shards, trained, tmp_path, run):
    """Weights that saw all images do not become those of a few by fine-tuning, nor after a resume."""
    settings = dict(n_real=9, max_iters=1, init_from=f"{trained}/ckpt.pt")
    run("train", *train_flags(shards, tmp_path / "a", **settings))
    run("train", *resume(tmp_path / "a", max_iters=2))
    run("augment", *augment_flags(tmp_path / "a", tmp_path / "s"))
    text = run(
        "classifier", *classifier_flags(shards, tmp_path / "mlp", tmp_path / "s", seeds=1, arms="real,synthetic")
    )
    assert "the generator was trained on 9 real images, after a training on others" in text


def test_a_model_is_fine_tuned_on_other_classes(shards, trained, tmp_path, run, fails):
    """From its averaged weights; the network is the checkpoint's, and other classes get new embeddings."""
    start, settings = checkpoint(trained)["ema"], dict(dataset=f"{shards}/tiny", init_from=f"{trained}/ckpt.pt")
    settings |= dict(max_iters=1, batch_size=8, lr=1e-12, min_lr=1e-12, dropout=0.0, sample_interval=0, device="cpu")
    for classes in ("", "bird,airplane"):
        settings |= dict(out_dir=tmp_path / (classes or "all"), classes=classes)
        run("train", *flags(**settings))
        got = checkpoint(settings["out_dir"])
        assert got["model_args"]["ch"] == 8 and got["model_args"]["dropout"] == 0 and got["step"] == 1
        for key, value in got["model"].items():
            if not classes or "condition.label" not in key:
                assert torch.allclose(value, start[key], atol=1e-6), key
    assert got["model"]["net.condition.label.weight"].shape == (3, 32)
    settings |= dict(out_dir=tmp_path / "refused")
    assert "ch: checkpoint 8, now 16" in fails("train", *flags(**settings, ch=16))
    data.write_shards(f"{tmp_path}/grey", np.zeros((40, 8, 8, 1)), None, [])
    settings |= dict(dataset=f"{tmp_path}/grey", classes="")
    assert "channels: checkpoint 3, now 1" in fails("train", *flags(**settings))
