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

import data
import ddpm
from configurator import run_config, settings_in

KEYS = ("model", "ema", "optimizer", "scaler", "step", "history", "trained_on")


def resume(folder, **changes):
    return flags(out_dir=folder, init_from="resume", device="cpu", **changes)


def test_a_run_cut_off_before_any_write_continues_to_the_same_bits(shards, tmp_path, run, capfd):
    """Run n is cut off before its n-th write, run n + 1 goes on from what is there: with the settings of the first,
    dropout, micro-batches and bfloat16, to the weights, average, optimiser and log of a run that never stopped.
    """
    whole, cut, step = tmp_path / "whole", tmp_path / "cut", 0
    settings = dict(max_iters=4, eval_interval=1, grad_accum=2, dtype="bfloat16", ema_decay=0.5, eval_images=4)
    settings |= dict(optimizer="muon")  # which has AdamW's state, too
    run("train", *train_flags(shards, whole, **settings))
    for n in range(13):  # config.json is three writes, and at each step log.json and the checkpoint are
        how = resume(cut) if step else train_flags(shards, cut, **settings)
        status, text = cut_off(n, capfd, "train", *how)
        assert f"steps {step} to 4, " in text and "torch.bfloat16" in text
        assert (status == 0) == (n == 12), text
        step = min(4, max(0, n - 7))  # the eighth write gives the first checkpoint its name
        assert (cut / "ckpt.pt").exists() == (step > 0) and (not step or checkpoint(cut)["step"] == step)
        assert n < 5 or data.read_json(cut / "log.json")["step"]
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

    def interrupted(*args, **settings):
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **settings)

    monkeypatch.setattr(owner, name, interrupted)
    text = run("train", *train_flags(shards, tmp_path, sample_interval=int(during == "a grid")))
    step = 1 if during == "a step" else 2  # the grid of step 1 is finished, and one step more
    assert f"stopped at step {step} of 6: " in text and checkpoint(tmp_path)["step"] == step
    assert f"steps {step} to 6" in run("train", *resume(tmp_path))
    a, b = checkpoint(trained), checkpoint(tmp_path)
    assert all(same(a[key], b[key]) for key in KEYS)


def test_a_resumed_run_may_change_to_float16_and_keeps_its_loss_scale(trained, tmp_path, run):
    shutil.copytree(trained, tmp_path / "out")
    assert "torch.float16" in run("train", *resume(tmp_path / "out", dtype="float16", max_iters=7, eval_images=1))
    saved = checkpoint(tmp_path / "out")
    torch.save(saved | dict(scaler=saved["scaler"] | dict(scale=64.0)), tmp_path / "out" / "ckpt.pt")
    assert "torch.float16" in run("train", *resume(tmp_path / "out", max_iters=8))
    assert checkpoint(tmp_path / "out")["scaler"]["scale"] == 64


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
        for key in ("val_loss", "log_loss", "test_loss"):
            np.testing.assert_allclose(one["history"][key], other["history"][key], rtol=1e-4)
        assert norms[name] == pytest.approx(norms["one"], abs=2e-3)  # three digits; Adam hides another scale


@pytest.mark.slow
def test_two_compiled_processes_equal_an_eager_one(shards, tmp_path, run):
    """DistributedDataParallel cuts a compiled network into several graphs, one for each of its buckets."""
    how = dict(arch="cnn", ch=96, ch_mult="1", dropout=0.0, max_iters=4, eval_interval=4)  # 2.5 MB: two buckets
    assert "eager" in run("train", *train_flags(shards, tmp_path / "eager", **how))
    texts = processes(2, "train", *train_flags(shards, tmp_path / "compiled", use_compile=True, **how))
    assert "on 2 x cpu" in texts[0] and "compiled" in texts[0]
    eager, compiled = (checkpoint(tmp_path / name)["history"] for name in ("eager", "compiled"))
    for key in ("log_loss", "val_loss"):  # not the weights: Adam makes a whole step of a gradient's rounding error
        np.testing.assert_allclose(compiled[key], eager[key], rtol=1e-3)


class HostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what would make a GPU's host wait for a value: item(), float(), nonzero, indexing by a mask."""

    count = 0

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


def test_epochs_give_the_length(shards, tmp_path, run, fails):
    settings = train_flags(shards, tmp_path, epochs=1, eval_interval=99)
    assert "give one of them" in fails("train", *settings)  # epochs and max_iters
    text = run("train", *(flag for flag in settings if "max_iters" not in flag))
    assert "steps 0 to 7" in text  # 54 images in batches of 8
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


def test_the_default_recipe_is_that_of_cifar_linear_and_has_38_million_parameters():
    defaults = {key: default for key, (default, _) in settings_in(f"{HERE}/train.py").items()}
    assert run_config(f"{HERE}/config/cifar_linear.py").items() <= defaults.items()
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


def test_a_test_loss_of_few_images_is_of_all_classes(shards, tmp_path, run):
    """It depends on the images of the test split, not on their order."""
    images, labels, names = data.load(f"{shards}/tiny", "test")
    for k, order in enumerate((np.arange(60), np.argsort(labels))):
        for split in ("train", "test"):
            data.write_shards(f"{tmp_path}/{k}/{split}", images[order], labels[order], names)
        run("train", *train_flags(shards, f"{tmp_path}/out{k}", dataset=f"{tmp_path}/{k}", max_iters=1, eval_images=6))
    one, other = (checkpoint(f"{tmp_path}/out{k}")["history"]["test_loss"] for k in range(2))
    assert one == pytest.approx(other, rel=1e-6)


def test_n_real_trains_on_the_images_that_the_classifier_takes(shards, tmp_path, run, fails):
    """With labels or without; a resumed run cannot take others, nor batches of another size."""
    (images, labels), _, names = data.load_splits(f"{shards}/tiny")
    (taken, their_labels), _ = data.training_part(images, labels, names, 0.1, 9)
    assert np.bincount(their_labels).tolist() == [3, 3, 3]
    for conditional in (True, False):
        out_dir = tmp_path / str(conditional)
        text = run("train", *train_flags(shards, out_dir, n_real=9, max_iters=1, conditional=conditional))
        assert "9 training and 6 validation images" in text
        assert checkpoint(out_dir)["trained_on"]["training"] == data.fingerprint(taken)
    assert "not the images that" in fails("train", *resume(tmp_path / "True", n_real=12))
    for key, value in dict(batch_size=4, seed=4, optimizer="muon", weight_decay=1, guide_step=1).items():
        assert f"resume: {key} cannot change" in fails("train", *resume(tmp_path / "True", **{key: value}))
    assert data.read_json(tmp_path / "True" / "config.json")["config"]["n_real"] == 9  # what is refused changes nothing


def test_n_real_says_when_it_started_from_other_weights(shards, trained, tmp_path, run):
    """Weights that saw all images do not become those of a few by fine-tuning, nor after a resume."""
    settings = dict(n_real=9, max_iters=1, init_from=f"{trained}/ckpt.pt")
    run("train", *train_flags(shards, tmp_path / "a", **settings))
    run("train", *resume(tmp_path / "a", max_iters=2))
    run("augment", *augment_flags(tmp_path / "a", tmp_path / "s"))
    compared = classifier_flags(shards, tmp_path / "mlp", tmp_path / "s", seeds=1, arms="real,synthetic")
    said = "the generator was trained on 9 real images, after an earlier training"
    assert said in run("classifier", *compared)


def test_a_model_is_fine_tuned_on_other_classes(shards, trained, tmp_path, run, fails):
    """From its averaged weights, with its network. Other classes get new embeddings, not those that the old run began
    with at the same seed, which still resemble the trained ones.
    """
    start, settings = checkpoint(trained)["ema"], dict(dataset=f"{shards}/tiny", init_from=f"{trained}/ckpt.pt")
    settings |= dict(max_iters=1, batch_size=8, lr=1e-12, min_lr=1e-12, dropout=0.0, sample_interval=0, device="cpu")
    for classes in ("", "bird,airplane", "bird,airplane,automobile"):
        settings |= dict(out_dir=tmp_path / (classes or "all"), classes=classes)
        run("train", *flags(**settings))
        got = checkpoint(settings["out_dir"])
        assert got["model_args"]["ch"] == 8 and got["model_args"]["dropout"] == 0 and got["step"] == 1
        for key, value in got["model"].items():
            if not classes or "condition.label" not in key:
                assert torch.allclose(value, start[key], atol=1e-6), key
        new = got["model"]["net.condition.label.weight"]
        old = start["net.condition.label.weight"][: len(new)]
        assert len(new) == 1 + len(classes.split(",") if classes else "abc")
        assert not classes or abs(torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1]) < 0.3
    settings |= dict(out_dir=tmp_path / "refused")
    assert "ch: checkpoint 8, now 16" in fails("train", *flags(**settings, ch=16))
    data.write_shards(f"{tmp_path}/grey", np.zeros((40, 8, 8, 1)), None, [])
    settings |= dict(dataset=f"{tmp_path}/grey", classes="")
    assert "channels: checkpoint 3, now 1" in fails("train", *flags(**settings))


def test_what_a_run_leaves_while_it_goes_on(shards, tmp_path, run, monkeypatch):
    """Settings from the start, the log at every line, a checkpoint five minutes after the last, and before the test."""
    now, saved, update_ema, save_model = [0.0], [], ddpm.update_ema, ddpm.save_model

    def slow(ema, model, step, decay):
        now[0] += 250  # seconds
        if step:
            assert data.read_json(tmp_path / "log.json")["log_step"] == list(range(1, step + 1))
        assert data.read_json(tmp_path / "config.json")["config"]["batch_size"] == 8
        assert (tmp_path / "ckpt.pt").exists() == (step >= 2)
        assert step < 2 or checkpoint(tmp_path)["step"] == step // 2 * 2
        return update_ema(ema, model, step, decay)

    def save(*args, history, **more):
        saved.append(history["test_loss"])
        save_model(*args, history=history, **more)

    monkeypatch.setattr(ddpm, "update_ema", slow)
    monkeypatch.setattr(ddpm, "save_model", save)
    monkeypatch.setattr("time.time", lambda: now[0])
    text = run("train", *train_flags(shards, tmp_path, max_iters=8, eval_interval=99, eval_images=6, warmup_iters=9))
    assert "warning: warmup_iters=9 does not end within max_iters=8" in text
    assert "test loss 0" in text and " on 6 images" in text
    assert saved[:-1] == [None] * 4 and saved[-1] > 0  # at steps 2, 4, 6 and 8, and after the test
    first = next(line for line in text.splitlines() if line.startswith("step       1 "))
    assert "images/s" not in first and text.count("images/s") == 7


def test_a_run_equals_one_written_out(shards, tmp_path, run):
    """Label dropping, accumulated gradients, clipping, AdamW, the average after each step and that of step 2 that is
    kept as a guide, the rate of each step, the log, and validation with the averaged weights, in all and by quarter of
    t, where an image has the same t and noise at any seed and batch size: from the papers' formulas.
    """
    lr, min_lr, decay, clip, wd, p_uncond = 0.01, 0.002, 0.3, 0.7, 0.2, 0.4
    settings = dict(lr=lr, min_lr=min_lr, weight_decay=wd, ema_decay=decay, grad_clip=clip, p_uncond=p_uncond)
    settings |= dict(max_iters=5, warmup_iters=1, eval_interval=3, log_interval=9, grad_accum=2, dropout=0.0)
    settings |= dict(seed=3, val_fraction=0.2)  # 12 images, in batches of 8
    run("train", *train_flags(shards, tmp_path, **settings))
    saved, log = checkpoint(tmp_path), data.read_json(tmp_path / "log.json")
    images, labels, _ = data.load(f"{shards}/tiny")
    order = data.fixed_order(images, labels)
    images, labels = images[order], labels[order]
    torch.manual_seed(3)
    model = ddpm.DDPM(ddpm.DDPMConfig(**saved["model_args"]))
    weights = dict(model.named_parameters())
    ema = {name: w.detach().clone() for name, w in weights.items()}
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.6, 20, dtype=torch.float64), 0).float()[:, None, None, None]
    batches, losses, rates, clipped = data.Batches(images[:48], labels[:48], 8, 3), [], [], []

    def draw(generator, n):
        return torch.randint(20, (n,), generator=generator), torch.randn(n, 3, 8, 8, generator=generator)

    def loss_of(x0, y, t, eps):
        return (model.net(abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps, t, y) - eps).square().mean(dim=(1, 2, 3))

    for k in range(5):
        x0, y = batches(k)
        generator = torch.Generator().manual_seed(ddpm.seed_of(3, 2**30 + k))
        t, eps = draw(generator, 8)
        y = torch.where(torch.rand(8, generator=generator) < p_uncond, 3, y)
        loss = loss_of(x0, y, t, eps).mean()
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))
        norm = sum(g.square().sum() for g in grads.values()).sqrt()
        losses.append(loss.item())
        clipped.append(norm.item() > clip)
        rates.append(lr / 2 if k < 1 else min_lr + (lr - min_lr) / 2 * (1 + np.cos(np.pi * (k - 1) / 3)))
        with torch.no_grad():
            for name, w in weights.items():
                g = grads[name] * min(1, clip / norm)
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g**2
                step = m[name] / (1 - 0.9 ** (k + 1)) / ((v[name] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
                w -= rates[k] * (step + (wd * w if w.ndim > 1 else 0))
                d = min(decay, (1 + k) / (10 + k))
                ema[name] = d * ema[name] + (1 - d) * w
        if k == 1:
            guide = {name.replace("net", "guide", 1): w for name, w in ema.items()}
    assert any(clipped)
    for kind, wanted in (("model", weights), ("ema", ema | guide)):
        for name, w in wanted.items():
            assert torch.allclose(saved[kind][name], w, atol=2e-4), (kind, name)
    model = ddpm.load_model(f"{tmp_path}/ckpt.pt")[0]
    t, eps = map(torch.cat, zip(*(draw(torch.Generator().manual_seed(2**29 + k), 1) for k in range(12))))
    with torch.no_grad():
        val = loss_of(ddpm.to_float(torch.tensor(images[48:])), torch.tensor(labels[48:]), t, eps)
    quarters = [val[t // 5 == q].mean().item() for q in range(4)]
    assert log["val_loss"][-1] == pytest.approx(val.mean().item(), rel=1e-4)
    assert saved["history"]["val_quarters"][-1] == pytest.approx(quarters, rel=1e-4, nan_ok=True)
    keys = "step val_loss val_quarters test_loss log_step log_loss lr"
    assert log.keys() == set(keys.split()) and log["step"] == [3, 5] and log["log_step"] == [1, 3, 5]
    assert log["lr"] == pytest.approx([rates[0], rates[2], rates[4]])
    assert log["log_loss"] == pytest.approx([losses[0], np.mean(losses[1:3]), np.mean(losses[3:])], rel=1e-3)
    assert len(log["val_loss"]) == 2 and log["test_loss"] > 0


def test_fine_tuning_keeps_the_betas_and_needs_the_same_network(shards, trained, tmp_path, run, fails):
    model, betas = ddpm.load_model(f"{trained}/ckpt.pt")[0], np.linspace(0.01, 0.5, 20)
    ddpm.save_model(tmp_path / "betas.pt", ddpm.DDPM(model.config, betas=betas))
    ddpm.save_model(tmp_path / "other.pt", ddpm.DDPM(model.config, net=torch.nn.Conv2d(3, 3, 1)))
    how = train_flags(shards, tmp_path / "out", max_iters=1)
    run("train", *how, f"--init_from={tmp_path}/betas.pt")
    assert checkpoint(tmp_path / "out")["betas"] == betas.tolist()
    other = f"--init_from={tmp_path}/other.pt", f"--out_dir={tmp_path}/b"
    assert "another version or another network" in fails("train", *how, *other)
