"""All tests: properties of the maths and of the program, on tiny nets, offline, on the CPU.

Contents, in the order of the README:
    helpers and fixtures
    the whole chain
    ddpm.py           schedules and tables; network; images, noise and loss; guidance and samplers; checkpoints
    data.py           shards, batches, data sets
    configurator.py   settings, errors, device
    train.py, sample.py, augment.py, classifier.py, evaluate.py, plot.py, bench.py, gan.py, ablate.py
    a GPU, emulated
Tests are named test_FILE_PROPERTY. The errors that a user can cause are one table per script, test_FILE_user_errors.
`pytest -q` runs the fast ones, `pytest -q -m slow -rP` those that take minutes.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs one test per core; before torch is imported

import contextlib
import functools
import hashlib
import http.server
import json
import math
import pathlib
import pickle
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import warnings

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import classifier
import configurator
import data
import ddpm
import evaluate
from ddpm import (
    DDPM,
    EMA,
    DDPMConfig,
    UserError,
    make_betas,
    make_generator,
    posterior_coefficients,
    to_float,
    to_uint8,
)

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = dict(image_size=8, num_classes=3, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0)
TINY |= dict(timesteps=20, beta_end=0.6, class_names=("a", "b", "c"))
SCHEDULES = ("linear", "cosine", "quadratic", "sigmoid")
SAMPLERS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpm++", 0.0)]  # with eta
SCRIPTS = ("train.py", "sample.py", "augment.py", "classifier.py", "evaluate.py", "plot.py", "bench.py", "gan.py")
SCRIPTS += ("ablate.py",)
BENCH = "--device=cpu --batch_size=2 --rounds=1 --steps=2 --num_samples=10 --timesteps=15 --image_size=8".split()

# ---------------------------------------------------------------------------------------------------------------------
# helpers: tiny models and data


def tiny(**changes):
    """A tiny model whose zero-initialised outputs are filled, so that it puts something out."""
    torch.manual_seed(0)
    model = DDPM(DDPMConfig(**(TINY | changes)))
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


class Net(nn.Module):
    """Stands in for the network: a function of (x, t, y), which counts its calls."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls, self.seen = function, 0, []

    def forward(self, x, t, y):
        self.calls, self.seen = self.calls + 1, self.seen + [int(t[0])]
        return self.function(x, t, y)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_batch(model, n=4):
    return torch.randn(n, *model.shape).clamp(-1, 1), torch.arange(n) % 3


def write_checkpoint(path, model, **more):
    """What train.py saves of a model, as far as load_model needs it."""
    content = dict(model_args=vars(model.config), model=model.state_dict(), ema=EMA(model).state_dict(), step=5)
    with ddpm.atomic_write(path) as f:
        torch.save(content | more, f)


def same(a, b):
    """Equal to the last bit, whatever the nesting."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def finite_difference(f, x, h=1e-6):
    """df/dx by central differences, for a float64 tensor that f reads in place."""
    d, flat = torch.zeros_like(x), x.view(-1)
    for i in range(flat.numel()):
        old, values = flat[i].item(), []
        for sign in (1, -1):
            flat[i] = old + sign * h
            values.append(f().item())
        flat[i], d.view(-1)[i] = old, (values[0] - values[1]) / (2 * h)
    return d


def keep_start(init, kept):
    def wrapped(self, model, *args):
        kept.append([p.clone() for p in model.weights()])
        init(self, model, *args)

    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# helpers: the scripts through their command lines


def cli(capfd, script, *args):
    """Runs a script in this process as its command line would: (exit status, output and errors)."""
    status, handlers = 0, [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [os.path.join(HERE, script), *args])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        try:
            runpy.run_path(os.path.join(HERE, script), run_name="__main__")
        except SystemExit as e:
            status = e.code or 0
        except BaseException as e:
            try:
                sys.excepthook(type(e), e, e.__traceback__)
                status = 1
            except SystemExit as hooked:
                status = hooked.code
        finally:
            for signum, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
                signal.signal(signum, handler)
    out, err = capfd.readouterr()
    return status, out + err


def start_torchrun(nproc, script, *flags, nnodes=1):
    """Starts a script under torchrun on one or more emulated hosts: their processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = ["--nnodes", str(nnodes), "--master_addr=127.0.0.1", f"--master_port={port}", f"--nproc_per_node={nproc}"]
    command = [sys.executable, "-m", "torch.distributed.run", *where]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    ranks = [[*command, f"--node_rank={k}", f"{HERE}/{script}", *flags] for k in range(nnodes)]
    return [subprocess.Popen(rank, **pipes) for rank in ranks]


def torchrun(*args, **how):
    """Runs a script under torchrun to its end: (exit status, output and errors). See start_torchrun."""
    hosts = start_torchrun(*args, **how)
    text = "".join(host.communicate(timeout=180)[0] for host in hosts)
    return max(host.returncode for host in hosts), text


FORKS = """
import os, runpy, sys, time
import configurator, data, ddpm, torch  # imported once: each run is a fork of this process
for line in sys.stdin:
    seconds, *sys.argv = line[:-1].split(chr(9))
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        os.dup2(writer, 1)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as output:
        output.readline()  # it has begun
        time.sleep(float(seconds))
        os.kill(pid, 9)
        print(os.waitpid(pid, 0)[1], flush=True)
"""


def kill_at_random(kills, most, command, check):
    """Starts command(), [script, flag, …], and kills it at most so many seconds after its first line of output.

    check() is called after each run. Fails unless it was hit so many times.
    """
    rng, hits, pipes = random.Random(0), 0, dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", FORKS], env=os.environ | {"PYTHONPATH": HERE}, **pipes) as server:
        for _ in range(2 * kills):
            script, *flags = command()
            server.stdin.write("\t".join([str(rng.uniform(0, most)), f"{HERE}/{script}", *flags]) + "\n")
            server.stdin.flush()
            hits += int(server.stdout.readline()) == signal.SIGKILL
            check()
            if hits == kills:
                break
        server.stdin.close()
    assert hits == kills


def peak_memory(script, *flags):
    """The largest resident memory of a script's process, in MB."""
    code = "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # kB
    command = [sys.executable, "-c", code, f"{HERE}/{script}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
    return int(done.stdout.split("peak ")[1]) / 1024


def one_line(result):
    status, text = result
    assert status == 2 and "Traceback" not in text, text
    return text.strip().splitlines()[-1]


def help_lines(capfd, script):
    status, text = cli(capfd, script, "--help")
    assert status == 0
    lines = [line.strip() for line in text.split("keys (--key=value):")[1].splitlines()]
    return [line.split("  ")[0] for line in lines if "=" in line]


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


def tiny_flags(shards, out_dir, **changes):
    settings = dict(dataset=f"{shards}/tiny", out_dir=out_dir, ch=8, ch_mult="1,2", num_res_blocks=1, dropout=0.1)
    settings |= dict(attn_resolutions="4", timesteps=20, beta_end=0.6, batch_size=8, max_iters=6, warmup_iters=2)
    settings |= dict(lr=1e-3, min_lr=1e-3, log_interval=1, eval_interval=2, sample_interval=0, device="cpu")
    return [f"--{k}={v}" for k, v in (settings | changes).items()]


def augment_flags(out_dir, folder, **changes):
    settings = dict(out_dir=out_dir, synthetic_dir=folder, per_class=7, shard_size=6, batch_size=4, steps=3)
    return [f"--{k}={v}" for k, v in (settings | {"device": "cpu"} | changes).items()]


def classifier_flags(shards, out_dir, folder, **changes):
    settings = dict(dataset=f"{shards}/tiny", out_dir=out_dir, synthetic_dir=folder, seeds=2, hidden=16, shift=1)
    settings |= dict(batch_size=8, max_iters=6, eval_interval=3, warmup_iters=1, device="cpu")
    return [f"--{k}={v}" for k, v in (settings | changes).items()]


def classifier_settings(**changes):
    settings = dict(hidden=(32,), gray=False, dropout=0.2, hflip=True, shift=1, optimizer="adamw", batch_size=20)
    settings |= dict(max_iters=30, lr=3e-3, min_lr=0.0, warmup_iters=3, weight_decay=0.01, eval_interval=10)
    return settings | dict(device="cpu", dtype=torch.float32) | changes


def contents(folder):
    """The bytes of a folder's shards by file name."""
    return {p.name: p.read_bytes() for p in sorted(pathlib.Path(folder).glob("*.npy"))}


def evaluation(capfd, root, *flags):
    where = [f"--dataset={root}/real", f"--data_dir={root}/data", f"--out_dir={root}/out", f"--cache_dir={root}/kept"]
    return cli(capfd, "evaluate.py", *where, "--resize=32", "--device=cpu", *flags)


def learn(capfd, tmp_path, *flags):
    """Runs bench.py --what=learn on random images: what it said, and {side and steps: what it drew}."""
    rng, names = np.random.default_rng(0), [f"class {k}" for k in range(10)]
    data.write_shards(f"{tmp_path}/real", rng.integers(256, size=(50, 8, 8, 3)), np.arange(50) % 10, names)
    flags = (*BENCH, "--what=learn", f"--dataset={tmp_path}/real", f"--learn_dir={tmp_path}/learned", *flags)
    status, text = cli(capfd, "bench.py", "config/shapes.py", *flags)
    assert status == 0, text
    drawn = {}
    for side in pathlib.Path(tmp_path, "learned").glob("*-steps"):
        images, labels, found = data.load(str(side))
        assert images.shape == (10, 8, 8, 3) and labels.tolist() == list(range(10)) and found == names
        drawn[side.name] = np.array(images)
    return text, drawn


# ---------------------------------------------------------------------------------------------------------------------
# helpers: files of the data sets


def write_fashion_mnist(root, n):
    """n images of each split as the idx files that the real set comes in; returns their pixels."""
    (raw := root / "FashionMNIST" / "raw").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        header = b"\0\0\x08\x03" + b"".join(k.to_bytes(4, "big") for k in (n, 28, 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes(k % 10 for k in range(n))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + n.to_bytes(4, "big") + labels)
    return pixels


def write_flowers102(root, monkeypatch):
    """Two small jpg images for each of 102 classes and split, and the .mat files that the real set comes with."""
    from PIL import Image
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    (folder := root / "flowers-102" / "jpg").mkdir(parents=True)
    rng, ids = np.random.default_rng(0), np.arange(1, 409)
    for i in ids:
        pixels = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image_{i:05d}.jpg")
    savemat(folder.parent / "imagelabels.mat", {"labels": (ids - 1) % 102 + 1})
    first = ids[:204][np.argsort((ids[:204] - 1) % 102, kind="stable")]  # class by class, as in the real set
    savemat(folder.parent / "setid.mat", {"trnid": first, "valid": first, "tstid": ids[204:]})
    md5 = lambda name: hashlib.md5((folder.parent / name).read_bytes()).hexdigest()  # noqa: E731
    files = {key: (name, md5(name)) for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    monkeypatch.setattr(Flowers102, "_file_dict", Flowers102._file_dict | files)


def write_folder(root):
    """A folder of images of two classes, without a test split."""
    from PIL import Image

    for name in ("left", "right"):
        (root / "images" / name).mkdir(parents=True)
        for i in range(40):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")


# ---------------------------------------------------------------------------------------------------------------------
# fixtures


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A data_dir with small sets of every built-in data set's form, and a shard folder of 8x8 images."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    forms = {"cifar10": (32, 3, 10), "fashion_mnist": (28, 1, 10), "flowers102": (64, 3, 102), "shapes": (32, 3, 10)}
    for name, (size, channels, classes) in (forms | {"tiny": (8, 3, 3)}).items():
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        names = names[:classes] if classes <= 10 else [str(k) for k in range(classes)]
        n = 60 if size == 8 else 20
        for split in ("train", "test"):
            images = rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
            data.write_shards(f"{root}/{name}/{split}", images, np.arange(n) % classes, names)
    return str(root)


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory):
    """The folder of a tiny model, trained for a few steps by the real script."""
    out_dir = str(tmp_path_factory.mktemp("run") / "out")
    flags = tiny_flags(shards, out_dir, sample_interval=6)
    subprocess.run([sys.executable, f"{HERE}/train.py", *flags], check=True, cwd=shards, capture_output=True)
    return out_dir


@pytest.fixture(scope="session")
def synthetic(trained, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("synthetic") / "set")
    subprocess.run([sys.executable, f"{HERE}/augment.py", *augment_flags(trained, folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def real_shapes(tmp_path_factory):
    """A data set of 300 + 300 shapes in a folder, and its first 100 training images as a sample folder."""
    root = tmp_path_factory.mktemp("shapes")
    for split, seed in (("train", 0), ("test", 1)):
        images, labels, names = data.make_shapes(300, seed)
        data.write_shards(f"{root}/real/{split}", images, labels, names)
        if split == "train":
            order = np.argsort(labels, kind="stable").reshape(10, -1)[:, :10].ravel()
            data.write_shards(f"{root}/copied", images[order], (labels[order] + 3) % 10, [*names[-3:], *names[:-3]])
    return root


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory):
    """A weights file in torch-fidelity's format, of random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    path = str(tmp_path_factory.mktemp("inception") / "weights.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: None)
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        torch.manual_seed(0)
        net = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(net.state_dict(), path)
    return path


def shape_classifier():
    """A small network that tells the ten real shapes apart, and its accuracy on 2,000 others."""
    images, labels, _ = data.make_shapes(12000, seed=5)
    x, y = to_float(torch.from_numpy(images)), torch.from_numpy(labels).long()
    torch.manual_seed(0)
    layers = []
    for a, b in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))
    steps = 400
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        k = torch.randint(10000, (64,))
        noisy = x[k] + 0.1 * torch.rand(64, 1, 1, 1) * torch.randn(64, 3, 32, 32)
        F.cross_entropy(net(noisy), y[k]).backward()
        optimizer.step(), optimizer.zero_grad(), scheduler.step()
    net.eval()
    with torch.no_grad():
        return net, (net(x[10000:]).argmax(1) == y[10000:]).float().mean().item()


def feature_sets(n=90, k=70, d=12):
    rng = np.random.default_rng(0)
    X, Y = rng.normal(1, 1, (n, d)), rng.normal(1.1, 1.1, (k, d)) * np.linspace(0.7, 1.2, d)
    return X.astype(np.float32), Y.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# the whole chain: first, since it takes longest


@pytest.mark.slow
def test_chain_of_the_quick_start(tmp_path):
    """Two thirds of config/shapes.py: 95% of 500 images are of the class asked for; an untrained net scores 10%.

    Then 20 real images of each class: synthetic ones beside them gain many times the gain's error.
    """
    start = time.time()
    run = lambda *args: subprocess.run([sys.executable, *args], cwd=tmp_path, check=True)  # noqa: E731
    run(f"{HERE}/train.py", "config/shapes.py", "--sample_interval=0", "--max_iters=1000")
    minutes = (time.time() - start) / 60
    net, real = shape_classifier()
    y = torch.arange(500) % 10
    model = ddpm.load_model(f"{tmp_path}/out-shapes/ckpt.pt")[0]
    x = torch.cat([model.sample(y[s], 1.8, 0, s.tolist(), "dpm++", 25) for s in torch.arange(500).split(100)])
    asked = (net(x).argmax(1) == y).float().mean().item()
    fresh = DDPM(model.config)
    x = torch.cat([fresh.sample(y[s], 0.0, 0, s.tolist(), "dpm++", 5) for s in torch.arange(500).split(100)])
    untrained = (net(x).argmax(1) == y).float().mean().item()
    print(
        f"\nclassifier on real shapes {real:.1%}; as asked {asked:.1%}, untrained {untrained:.1%}; "
        f"training took {minutes:.1f} min on one core"
    )
    assert real >= 0.99 and asked >= 0.95 and untrained < 0.2

    run(f"{HERE}/augment.py", "--out_dir=out-shapes", "--per_class=200")
    few = ["--n_real=200", "--seeds=3", "--hidden=512", "--max_iters=800", "--arms=real,real+synthetic,real+real"]
    run(f"{HERE}/classifier.py", "--dataset=shapes", "--out_dir=out-shapes", *few)
    runs = data.read_json(f"{tmp_path}/out-shapes/classifier.json")["runs"]
    of = {arm: [r for r in runs if r["arm"] == arm] for arm in classifier.ARMS}
    gain, half = classifier.difference(of["real+synthetic"], of["real"])
    control, _ = classifier.difference(of["real+real"], of["real"])
    print(f"{gain:+.1f} ± {half:.1f} points from synthetic shapes, control {control:+.1f}")
    assert gain > 10 and gain > 5 * half and gain > 3 * abs(control)


# ---------------------------------------------------------------------------------------------------------------------
# ddpm.py: schedules and tables


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_every_schedule_destroys_the_image(schedule):
    betas = make_betas(schedule, 1000, 1e-4, 0.02)
    assert len(betas) == 1000 and (1 - betas).prod() < 1e-2
    for bad in ((0.0, 0.02), (1e-4, 1.5), (-0.1, 0.1)):
        if schedule != "cosine" and (schedule, bad[0]) != ("sigmoid", 0.0):
            with pytest.raises(UserError, match=r"between 0 and 1|must be in \[0, 1\)"):
                make_betas(schedule, 10, *bad)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_tables_against_plain_python(schedule):
    T, a, b = 500, 1e-4, 0.028
    model = tiny(timesteps=T, beta_end=b, schedule=schedule)
    abar = 1.0
    for t in range(T):
        if schedule == "linear":
            beta = a + (b - a) * t / (T - 1)
        elif schedule == "quadratic":
            beta = (a**0.5 + (b**0.5 - a**0.5) * t / (T - 1)) ** 2
        elif schedule == "sigmoid":
            beta = a + (b - a) / (1 + math.exp(6 - 12 * t / (T - 1)))
        else:
            f = [math.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, t + 1)]
            beta = min(0.999, 1 - f[1] / f[0])
        previous, abar = abar, abar * (1 - beta)
        var = beta * (1 - previous) / (1 - abar)
        c0, ct = previous**0.5 * beta / (1 - abar), (1 - beta) ** 0.5 * (1 - previous) / (1 - abar)
        assert posterior_coefficients(model.abar[t], model.abar[t - 1] if t else 1.0) == pytest.approx((c0, ct, var))
        for name, value in dict(betas=beta, alphas_bar=abar, q_var=1 - abar).items():
            assert getattr(model, name)[t].item() == pytest.approx(value, rel=1e-6, abs=1e-12), (name, t)
        assert model.abar[t] == pytest.approx(abar, rel=1e-9)


@pytest.mark.parametrize("schedule", ("linear", "quadratic", "sigmoid"))
@pytest.mark.parametrize("T", (50, 100, 200))
def test_ddpm_warns_where_signal_remains_and_suggests_a_fix(T, schedule):
    with pytest.warns(UserWarning, match=r"= 0\.\d\d of the image.*use timesteps=\d+ or beta_end=[\d.]+$") as caught:
        tiny(timesteps=T, beta_end=0.02, schedule=schedule)
    text = str(caught[0].message)
    longer, steeper = re.search(r"use timesteps=(\d+) or beta_end=([\d.]+)", text).groups()
    if schedule == "linear" and T > 50:
        assert {100: "= 0.60", 200: "= 0.36"}[T] in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(timesteps=int(longer), beta_end=0.02, schedule=schedule)
        tiny(timesteps=T, beta_end=float(steeper), schedule=schedule)
        for other in SCHEDULES:
            tiny(timesteps=500, beta_end=0.028, schedule=other)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_posterior_variance_is_finite_and_zero_at_t0(schedule):
    model = tiny(schedule=schedule)
    for name, table in model.named_buffers():
        assert table.isfinite().all(), name
    abar = [1.0, *model.abar]
    for t in range(20):
        c0, ct, var = posterior_coefficients(abar[t + 1], abar[t])
        assert math.isfinite(c0) and math.isfinite(ct) and (var > 0) == (t > 0)
    assert posterior_coefficients(abar[1], 1.0) == (1, 0, 0)  # the last step gives x0_hat


def test_ddpm_posterior_variance_is_an_explicit_choice(double):
    model = tiny()
    abar = torch.tensor(model.abar)
    beta = model.betas[1:]
    _, _, var = posterior_coefficients(abar[1:], abar[:-1])
    assert torch.allclose(var, 1 / ((1 - beta) / beta + 1 / (1 - abar[:-1])), rtol=1e-12)
    y = torch.tensor([0])
    assert not torch.equal(model.sample(y, variance="posterior"), model.sample(y, variance="beta"))
    with pytest.raises(UserError, match="variance"):
        model.sample(y, variance="learned")


def test_ddpm_mean_from_eps_equals_mean_from_x0(double):
    model = tiny()
    xt, eps, t = torch.randn(20, *model.shape), torch.randn(20, *model.shape), torch.arange(20)
    x0_hat, _ = model.to_x0_eps(eps, xt, t)
    beta, abar = (table[:, None, None, None] for table in (model.betas, model.alphas_bar))
    from_eps = (xt - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()
    c0, ct, _ = posterior_coefficients(abar, torch.cat([torch.ones_like(abar[:1]), abar[:-1]]))
    assert torch.allclose(c0 * x0_hat + ct * xt, from_eps, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# ddpm.py: network


def test_ddpm_network_initially_outputs_zero():
    model = DDPM(DDPMConfig(**TINY))
    x = torch.randn(2, *model.shape)
    assert not model.net(x, torch.tensor([0, 9]), torch.tensor([0, 1])).any()
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(ddpm.Attention(16)(x), x)
    assert torch.equal(model.net.mid2(x, torch.randn(2, 32)), x)
    assert (
        not DDPM(DDPMConfig(**TINY, arch="cnn"))
        .net(torch.randn(1, 3, 8, 8), torch.tensor([0]), torch.tensor([0]))
        .any()
    )


def test_ddpm_fused_layers_equal_the_plain_ones():
    torch.manual_seed(0)
    x, emb = torch.randn(3, 8, 6, 5), torch.randn(3, 12)
    film, up = ddpm.FiLM(8, 12), ddpm.Upsample(8)
    nn.init.normal_(film.norm.weight), nn.init.normal_(film.norm.bias)
    scale, shift = film.affine(emb)[:, :, None, None].chunk(2, dim=1)
    assert torch.allclose(film(x, emb), film.norm(x) * (1 + scale) + shift, atol=1e-5)
    plain = F.conv2d(F.interpolate(x, scale_factor=2), up.weight, up.bias, padding=1)
    assert up(x).shape == (3, 8, 12, 10) and torch.allclose(up(x), plain, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), up.weight)[0] for out in (up(x), plain))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    attention = ddpm.Attention(8)
    nn.init.normal_(attention.proj.weight)
    qkv = attention.qkv(attention.norm(x)).reshape(3, 3, 8, 30).transpose(-1, -2)[:, None]
    h = F.scaled_dot_product_attention(*qkv.unbind(2)).transpose(-1, -2).reshape(x.shape)
    assert torch.allclose(attention(x), x + attention.proj(h), atol=1e-5)


def test_ddpm_dropout_keeps_its_share_and_the_mean():
    torch.manual_seed(0)
    for p in (0.1, 0.5, 0.9):
        layer, x = ddpm.Dropout(p), torch.ones(1001, 999, requires_grad=True)
        out = layer(x)
        kept = out != 0
        assert abs(kept.double().mean() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
        assert torch.allclose(out[kept], torch.tensor(1 / (1 - p)), rtol=1e-3)
        for shift in (1, 2, 4):  # neighbours, which share 64 random bits, are independent
            together = (kept.flatten()[shift:] & kept.flatten()[:-shift]).double().mean()
            assert abs(together - (1 - p) ** 2) < 5e-3 * (1 - p) ** 0.5
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out.detach())
        assert not torch.equal(layer(x), out) and layer.eval()(x) is x


def test_ddpm_image_sizes_and_batch_independence():
    with pytest.raises(UserError, match=r"image_size: 30 is not divisible by 8.*use 24"):
        DDPMConfig(**(TINY | dict(image_size=30, ch_mult=(1, 1, 1, 1))))
    for size in (28, 32):
        for arch in ddpm.ARCHS:
            model = tiny(image_size=size, ch_mult=(1, 2), attn_resolutions=(size // 2,), arch=arch).eval()
            x, t, y = torch.randn(3, *model.shape), torch.tensor([0, 5, 19]), torch.tensor([0, 1, 2])
            out = model.network(x, t, y)
            assert out.shape == x.shape
            for i in range(3):
                assert torch.allclose(out[i], model.network(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], atol=1e-5)
    with pytest.raises(UserError, match="this model takes"):
        model(torch.zeros(1, 3, 30, 30), torch.tensor([0]))


def test_ddpm_any_width_has_groups_that_divide_it():
    for ch in (2, 6, 8, 10, 48, 100, 128, 320):
        norm = ddpm.GroupNorm(ch)
        assert ch % norm.num_groups == 0 and norm.num_groups <= 32
    model = tiny(ch=8)
    x0, y = random_batch(model)
    assert model(x0, y).isfinite().all()


def test_ddpm_attention_in_two_heads():
    """Head h attends with channels 64 h to 64 h + 63 of q, k and v."""
    torch.manual_seed(0)
    layer, x = ddpm.Attention(128), torch.randn(2, 128, 3, 3)
    nn.init.normal_(layer.proj.weight, std=0.1)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, HW) each
    heads = []
    for c in (slice(0, 64), slice(64, 128)):
        attention = torch.einsum("bci,bcj->bij", q[:, c], k[:, c]).div(8).softmax(dim=-1)
        heads.append(torch.einsum("bij,bcj->bci", attention, v[:, c]))
    wanted = x + layer.proj(torch.cat(heads, dim=1).view_as(x))
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_ddpm_embedding_has_the_frequencies_of_the_transformer():
    """From 1 down to 1/10,000, in a geometric series (Vaswani et al. 2017)."""
    t = torch.tensor([1.0])
    freqs = torch.tensor([10000 ** (-i / 15) for i in range(16)])
    assert torch.allclose(ddpm.sinusoidal_embedding(t, 32)[0], torch.cat([freqs.cos(), freqs.sin()]), atol=1e-6)


@pytest.mark.parametrize("T", (500, 1000))
def test_ddpm_embeddings_of_all_t_differ(T):
    distance = torch.cdist(
        ddpm.sinusoidal_embedding(torch.arange(T), 128), ddpm.sinusoidal_embedding(torch.arange(T), 128)
    )
    assert (distance + 10 * torch.eye(T)).min() > 1e-3


def test_ddpm_patch_unconditional_and_depths():
    flat = dict(ch_mult=(1,), attn_resolutions=(8,))
    for changes in (dict(patch=2), dict(num_classes=0), flat, dict(num_res_blocks=2), dict(channels=1)):
        model = tiny(**changes)
        x0, y = random_batch(model)
        y = y if model.K else None
        model(x0, y).mean().backward()
        # the null label's row is trained by dropped labels; everything else must get a gradient
        assert all(p.grad is not None for p in model.parameters())
        assert model.sample(y, indices=range(4), steps=2).shape == x0.shape
    with pytest.raises(UserError, match="this model has 0 classes"):
        tiny(num_classes=0).sample(torch.tensor([0]))


def test_ddpm_autocast_covers_only_the_network():
    model = tiny()
    model.amp_dtype = torch.bfloat16
    x0, y = random_batch(model)
    loss = model(x0, y)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------------------------------------------------------------
# ddpm.py: images, noise and loss


def test_ddpm_uint8_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels).min() == -1 and to_float(levels).max() == 1
    assert to_uint8(torch.tensor([-9.0, -1.004, 1.004, 9.0]).view(1, 1, 4, 1)).flatten().tolist() == [0, 0, 255, 255]


def test_ddpm_noise_is_normal_and_one_image_each():
    model = tiny()
    _, eps = model.random_t_eps(4000)
    assert abs(eps.mean()) < 0.01 and abs(eps.var() - 1) < 0.01 and abs((eps**4).mean() - 3) < 0.1  # uniform: 1.8
    assert not torch.equal(eps[0], eps[1])
    x = ddpm.image_noise([ddpm.make_generator(0, k) for k in range(2000)], model.shape).flatten(1)
    assert abs(x.mean()) < 0.01 and abs(x.var() - 1) < 0.01
    neighbours = (x[1:] * x[:-1]).mean(1)
    assert neighbours.abs().max() < 6 / math.sqrt(x.shape[1]) and abs(neighbours.mean()) < 0.01


def test_ddpm_q_sample_has_the_closed_form_moments():
    model = tiny()
    x0, t = torch.full((5000, *model.shape), 0.7), torch.full((5000,), 9)
    xt = model.q_sample(x0, t, torch.randn_like(x0))
    abar = model.alphas_bar[9]
    assert abs(xt.mean() - abar.sqrt() * 0.7) < 0.01 and abs(xt.var() / (1 - abar) - 1) < 0.02


def test_ddpm_loss_is_a_mean():
    model = DDPM(DDPMConfig(**TINY))
    x0 = torch.zeros(64, *model.shape)
    y, t = torch.zeros(64, dtype=torch.long), torch.arange(64) % 20
    eps = torch.randn(64, *model.shape)
    loss = model(x0, y, t, eps)
    assert loss.shape == (64,) and abs(loss.mean() - 1) < 0.05
    twice = model(*(v.repeat(2, *[1] * (v.ndim - 1)) for v in (x0, y, t, eps)))
    assert torch.allclose(twice.mean(), loss.mean())


@pytest.mark.parametrize("kind,function", (("l2", lambda d: d**2), ("l1", abs), ("huber", None)))
def test_ddpm_loss_kinds(kind, function):
    function = function or (lambda d: torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5))
    model = tiny(loss=kind)
    model.net = Net(lambda x, t, y: 0.5 * x)
    x0, y = random_batch(model)
    t, eps = model.random_t_eps(4)
    wanted = function(0.5 * model.q_sample(x0, t, eps) - eps).mean((1, 2, 3))
    assert torch.allclose(model(x0, y, t, eps), wanted, rtol=1e-5)


@pytest.mark.parametrize("objective", ddpm.OBJECTIVES)
def test_ddpm_weightings_and_objectives(double, objective):
    """The same error in x0 costs the same under vlb, whatever the objective: it is one bound."""
    reference, model = tiny(weighting="vlb"), tiny(weighting="vlb", objective=objective)
    t = torch.arange(20)
    x0, eps, error = (torch.randn(20, *model.shape) for _ in range(3))
    xt = model.q_sample(x0, t, eps)
    abar = model.alphas_bar[t][:, None, None, None]
    believed = x0 + error  # and the eps that belongs to it
    out = model.target(believed, (xt - abar.sqrt() * believed) / (1 - abar).sqrt(), t)
    model.net = Net(lambda x, t, y: out)
    beta = reference.betas
    eps_error = (abar / (1 - abar)) * error**2
    wanted = beta / (2 * (1 - beta) * (1 - reference.alphas_bar)) * eps_error.mean((1, 2, 3))  # [Ho] eq. 12
    assert torch.allclose(model(x0, t % 3, t, eps), wanted, rtol=1e-9)
    assert torch.allclose(model.to_x0_eps(out, xt, t)[0], believed, atol=1e-9)
    snr = reference.alphas_bar / (1 - reference.alphas_bar)
    closed = {"eps": snr.clamp(max=5) / snr, "x0": snr.clamp(max=5), "v": snr.clamp(max=5) / (snr + 1)}[objective]
    assert torch.allclose(tiny(weighting="min_snr", objective=objective).loss_weight, closed, rtol=1e-9)
    assert (tiny(objective=objective).loss_weight == 1).all()


def test_ddpm_loss_is_against_the_noise():
    model = tiny()
    x0, y = random_batch(model)
    t, eps = model.random_t_eps(4)
    model.net = Net(lambda x, t, y: eps)
    assert model(x0, y, t, eps).abs().max() < 1e-12


def test_ddpm_inputs_are_not_modified():
    model = tiny()
    x0, y = random_batch(model)
    t, eps = model.random_t_eps(4)
    before = [v.clone() for v in (x0, y, t, eps)]
    model(x0, y, t, eps).mean().backward()
    with torch.no_grad():
        model.predict(eps, t, y, 1.8)
        model.drop_labels(y), model.q_sample(x0, t, eps), to_uint8(x0)
    assert all(torch.equal(a, b) for a, b in zip(before, (x0, y, t, eps)))


def test_ddpm_label_dropout_is_one_coin_per_image():
    model, y, n = tiny(p_uncond=0.1), torch.zeros(40000, dtype=torch.long), 40000
    dropped = model.drop_labels(y, torch.rand(n, generator=torch.Generator().manual_seed(0))) == 3
    assert abs(dropped.sum().item() - 0.1 * n) < 4 * math.sqrt(n * 0.1 * 0.9)
    assert not y.any()  # the caller's labels stay
    batches = dropped.view(-1, 200).sum(1)
    assert batches.min() > 0 and batches.max() < 200 and len(batches.unique()) > 5
    assert not (tiny(p_uncond=0.0).drop_labels(y) == 3).any() and (tiny(p_uncond=1.0).drop_labels(y) == 3).all()


def test_ddpm_labels_are_0_to_K_minus_1_and_the_null_label_is_K():
    model = tiny().eval()
    assert model.net.condition.label.num_embeddings == 4
    x, t = torch.randn(1, *model.shape), torch.tensor([5])
    outs = [model.network(x, t, torch.tensor([k])) for k in range(4)]
    assert all(not torch.equal(outs[a], outs[b]) for a in range(4) for b in range(a))
    assert torch.equal(model.network(x, t, None), outs[3])
    for label in (-1, 3):
        with pytest.raises(UserError, match="this model has 3 classes"):
            model.sample(torch.tensor([label]))


def test_ddpm_nothing_is_dropped_while_sampling_or_validating():
    model = tiny(dropout=0.5, p_uncond=0.9)
    seen, inner = [], model.net
    model.net = Net(lambda x, t, y: seen.append(y) or inner(x, t, y))
    model.net.inner = inner  # so that it is switched to eval mode
    y = torch.tensor([0, 1, 2])
    model.train()
    a, b = (model.sample(y, sampler="ddim", steps=4) for _ in range(2))
    assert torch.equal(a, b) and all(torch.equal(s, y) for s in seen) and model.training
    with ddpm.evaluating(model):
        x0, t, eps = torch.zeros(3, *model.shape), torch.tensor([1, 2, 3]), torch.ones(3, *model.shape)
        assert torch.equal(model(x0, y, t, eps), model(x0, y, t, eps))
    assert model.training


# ---------------------------------------------------------------------------------------------------------------------
# ddpm.py: guidance and samplers


@pytest.mark.parametrize("B", (1, 2, 3))
def test_ddpm_guidance_convention(double, B):
    model = tiny().eval()
    inner = model.net
    model.net = Net(lambda x, t, y: inner(x, t, y))
    xt, t, y = torch.randn(B, *model.shape), torch.full((B,), 7), torch.arange(B) % 3
    conditional, null = model.network(xt, t, y), model.network(xt, t, torch.full_like(y, 3))
    model.net.calls = 0
    assert torch.equal(model.guided(xt, t, y, 0.0), conditional) and model.net.calls == 1
    assert torch.equal(model.guided(xt, t, y, -1.0), null) and model.net.calls == 2
    for w in (0.5, 1.8, 6.0):  # one pass of 2B equals two passes, linear in w
        model.net.calls = 0
        assert torch.allclose(model.guided(xt, t, y, w), (1 + w) * conditional - w * null, atol=1e-12)
        assert model.net.calls == 1


@pytest.mark.parametrize("objective", ddpm.OBJECTIVES)
def test_ddpm_eps_hat_belongs_to_the_clipped_x0_hat(double, objective):
    model = tiny(objective=objective)
    xt, t = 3 * torch.randn(20, *model.shape), torch.arange(20)
    for clip in (True, False):
        x0_hat, eps_hat = model.predict(xt, t, t % 3, 1.8, clip)
        abar = model.alphas_bar[t][:, None, None, None]
        assert torch.allclose(abar.sqrt() * x0_hat + (1 - abar).sqrt() * eps_hat, xt, atol=1e-10)
        assert not clip or x0_hat.abs().max() <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_clipping_keeps_the_chain_bounded(schedule):
    model = tiny(schedule=schedule, timesteps=1000, beta_end=0.02)
    generator = torch.Generator().manual_seed(0)
    model.net = Net(lambda x, t, y: torch.randn(x.shape, generator=generator))
    hats = []
    x = model.sample(torch.tensor([0, 1]), on_step=lambda i, xt, x0_hat: hats.append((xt, x0_hat)))
    assert len(hats) == 1000 and x.isfinite().all()
    for xt, x0_hat in hats:
        assert x0_hat.abs().max() <= 1 and xt.isfinite().all() and xt.abs().max() < 10


def test_ddpm_every_t_is_trained_and_visited():
    model = tiny()
    t, _ = model.random_t_eps(2000)
    assert sorted(t.unique().tolist()) == list(range(20))
    model.net = Net(lambda x, t, y: 0 * x)
    model.sample(torch.tensor([0]))
    assert model.net.seen == list(range(19, -1, -1))
    abar = torch.cumprod(1 - make_betas("linear", 1000, 1e-4, 0.02), 0)
    assert abs(abar[0] - 0.9999) < 1e-12 and abs(abar[999] / 4.0358e-5 - 1) < 1e-4


def test_ddpm_steps_fall_from_T_minus_1_to_0():
    for schedule in SCHEDULES:
        model = tiny(schedule=schedule, timesteps=500, beta_end=0.028)
        for steps in (1, 2, 3, 10, 50, 250, 499, 500):
            ts = model.sampler_timesteps(steps)
            assert len(ts) == steps and ts[0] == 499 and all(a > b for a, b in zip(ts, ts[1:]))
            last = model.abar[ts[-1]]
            assert steps == 1 or 0 <= ts[-1] < 12 and (1 - last) / last <= 0.03**2 * 1.2
        assert model.sampler_timesteps(500) == model.sampler_timesteps(None) == list(range(499, -1, -1))
        for steps in (0, 501):
            with pytest.raises(UserError, match="steps: .* must be in"):
                model.sampler_timesteps(steps)


def test_ddpm_steps_are_even_in_the_seventh_root_of_sigma():
    model = tiny(schedule="linear", timesteps=5000, beta_end=0.0028)  # fine enough for the formula to be seen
    sigma = np.array([(1 / model.abar[t] - 1) ** 0.5 for t in model.sampler_timesteps(8)])
    assert np.ptp(np.diff(sigma ** (1 / 7))) < 0.02 and abs(sigma[-1] - 0.03) < 0.002
    model = tiny(schedule="cosine", timesteps=5000)  # its last sigma, 1e5, is far above 80
    sigma = np.array([(1 / model.abar[t] - 1) ** 0.5 for t in model.sampler_timesteps(8)])
    assert np.ptp(np.diff(np.r_[80, sigma[1:]] ** (1 / 7))) < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler,eta", SAMPLERS)
@pytest.mark.parametrize("steps", (1, 2, 7, None))
def test_ddpm_oracle_of_one_image_gives_it_back(sampler, eta, steps, schedule):
    model = tiny(schedule=schedule)
    point = torch.rand(1, *model.shape) * 2 - 1

    def oracle(x, t, y):
        abar = model.alphas_bar[t][:, None, None, None]
        return (x - abar.sqrt() * point) / (1 - abar).sqrt()

    model.net = Net(oracle)
    x = model.sample(torch.tensor([0, 1]), sampler=sampler, steps=steps, eta=eta)
    assert torch.allclose(x, point.expand_as(x), atol=2e-3)


@pytest.mark.parametrize("sampler,eta", SAMPLERS)
def test_ddpm_oracle_of_gaussian_data_gives_its_mean_and_variance(double, sampler, eta):
    model = tiny(timesteps=1000, beta_end=0.02, objective="x0")  # many steps: their error in the variance is O(1/steps)
    mu, var = 0.3, 0.04

    def oracle(x, t, y):
        abar = model.alphas_bar[t][:, None, None, None]
        return (mu / var + abar.sqrt() * x / (1 - abar)) / (1 / var + abar / (1 - abar))

    model.net = Net(oracle)
    y = torch.zeros(128, dtype=torch.long)
    steps = 25 if sampler == "dpm++" else None
    x = model.sample(y, sampler=sampler, eta=eta, steps=steps, clip_x0=False)
    assert abs(x.mean() - mu) < 4 * math.sqrt(var / x.numel()) + 0.002
    assert abs(x.var() / var - 1) < 0.06


def test_ddpm_ancestral_sampler_agrees_with_numpy_step_by_step(double):
    """Algorithm 2 of Ho et al., written again from the paper in NumPy float64."""
    T, betas, model = 20, np.linspace(1e-4, 0.6, 20), tiny()
    model.net = Net(lambda x, t, y: 0.4 * torch.sin(3 * x) + 0.02 * t[:, None, None, None])
    steps = []
    y = torch.tensor([0, 1])
    model.sample(y, seed=3, clip_x0=False, on_step=lambda i, xt, x0: steps.append(xt.numpy()))
    noise = functools.partial(ddpm.image_noise, [ddpm.make_generator(3, k) for k in range(2)], model.shape)
    x, alphas, abar = noise().numpy(), 1 - betas, np.cumprod(1 - betas)
    for t in range(T - 1, -1, -1):
        eps = 0.4 * np.sin(3 * x) + 0.02 * t
        mean = (x - betas[t] / np.sqrt(1 - abar[t]) * eps) / np.sqrt(alphas[t])
        sigma = np.sqrt(betas[t] * (1 - abar[t - 1]) / (1 - abar[t])) if t else 0.0
        x = mean + sigma * noise().numpy() if t else mean
        np.testing.assert_allclose(steps[T - 1 - t], x, rtol=1e-9, atol=1e-9)


def test_ddpm_ddim_with_eta_1_is_ddpm(double):
    model, y = tiny(), torch.tensor([0, 1])
    assert torch.allclose(model.sample(y, sampler="ddim", eta=1.0), model.sample(y), atol=1e-9)


@pytest.mark.parametrize("steps", (7, 20))
@pytest.mark.parametrize("how", (*[dict(sampler=s, eta=e) for s, e in SAMPLERS], dict(sampler="ddpm", variance="beta")))
def test_ddpm_every_sampler_step_by_step(how, steps, double):
    """From the formulas of the papers, in NumPy, also where steps are skipped: the same noise, the same chain."""
    model, chain = tiny(), []
    y = torch.tensor([0, 1])
    model.sample(y, w=0.7, seed=3, steps=steps, **how, on_step=lambda i, xt, x0: chain.append((xt.numpy(), x0.numpy())))
    generators = [make_generator(3, k) for k in range(2)]
    noise = lambda: ddpm.image_noise(generators, model.shape).numpy()  # noqa: E731
    xt, ts, abar = noise(), model.sampler_timesteps(steps), np.cumprod(1 - model.betas.numpy())
    lam = lambda a: 0.5 * np.log(a / (1 - a))  # noqa: E731  [6]: the half log-SNR
    for i, t in enumerate(ts):
        x0, a = chain[i][1], abar[t]
        b = abar[ts[i + 1]] if i + 1 < len(ts) else 1.0
        eps = (xt - a**0.5 * x0) / (1 - a) ** 0.5
        beta, posterior = 1 - a / b, (1 - b) / (1 - a) * (1 - a / b)  # of the skipped steps taken together
        if b == 1.0:
            xt = x0
        elif how["sampler"] == "ddpm":  # [1] eq. 6 and 7
            mean = b**0.5 * beta / (1 - a) * x0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * xt
            xt = mean + (beta if "variance" in how else posterior) ** 0.5 * noise()
        elif how["sampler"] == "ddim":  # [4] eq. 12 and 16
            sigma = how["eta"] * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
            xt = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * eps + (sigma * noise() if sigma else 0)
        else:  # [6] algorithm 2
            h, D = lam(b) - lam(a), x0
            if i:
                r = (lam(a) - lam(abar[ts[i - 1]])) / h
                D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * chain[i - 1][1]
            xt = (1 - b) ** 0.5 / (1 - a) ** 0.5 * xt - b**0.5 * (np.exp(-h) - 1) * D
        np.testing.assert_allclose(chain[i][0], xt, atol=1e-5)


@pytest.mark.parametrize("sampler,order", (("ddim", 1), ("dpm++", 2)))
def test_ddpm_samplers_converge_at_their_order(sampler, order, double):
    """On a mixture of two Gaussians, whose best x0_hat is known: twice the steps, 1/2 or 1/4 of the error."""
    model = tiny(num_classes=0, class_names=(), image_size=4, attn_resolutions=(2,), timesteps=4000, beta_end=0.01)

    def network(xt, t, y):  # eps_hat for x0 ~ (N(1, 0.5^2) + N(-1, 0.5^2)) / 2 in every value
        a, s = model.signal_noise(t)
        var = 0.25 * a**2 + s**2
        weight = torch.tanh(a * xt / var)  # of the first minus that of the second
        x0 = weight + 0.25 * a / var * (xt - a * weight)
        return (xt - a * x0) / s

    model.net = Net(network)
    draw = lambda steps: model.sample(None, 0, 0, range(50), sampler, steps, clip_x0=False)  # noqa: E731
    exact = draw(1600) if order == 2 else draw(4000)
    errors = [(draw(steps) - exact).square().mean().sqrt().item() for steps in (25, 50, 100)]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(order - 0.3 < slope < order + 0.6 for slope in slopes), (errors, slopes)


def test_ddpm_rounding_draws_no_root_of_a_negative_number():
    model = tiny(timesteps=4000, beta_end=0.028)  # 1 - abar_s - sigma^2 = -1e-16
    assert model.sample(torch.tensor([0]), steps=3, sampler="ddim", eta=1.0).isfinite().all()
    with pytest.raises(UserError, match="3 labels, but 1 indices"):
        model.sample(torch.tensor([0, 1, 2]), indices=[5])


def test_ddpm_reverse_noise_is_scaled_by_the_standard_deviation():
    model = tiny()
    model.net = Net(lambda x, t, y: 0 * x)
    seen = {}
    y = torch.zeros(400, dtype=torch.long)
    model.sample(y, steps=None, on_step=lambda i, xt, x0: seen.setdefault(i, (xt, x0)))
    x_start = ddpm.image_noise([ddpm.make_generator(0, k) for k in range(400)], model.shape)
    c0, ct, var = posterior_coefficients(model.abar[19], model.abar[18])
    residual = seen[0][0] - c0 * seen[0][1] - ct * x_start
    assert abs(residual.var() / var - 1) < 0.02


def test_ddpm_last_step_draws_no_noise(monkeypatch):
    model = tiny(timesteps=1, beta_start=0.995, beta_end=0.995)
    model.net = Net(lambda x, t, y: 0 * x)
    drawn, original = [], ddpm.image_noise
    monkeypatch.setattr(ddpm, "image_noise", lambda *args: drawn.append(1) or original(*args))
    model.sample(torch.tensor([0]))
    assert len(drawn) == 1  # only the starting noise


def test_ddpm_interval_guides_only_between_its_ends():
    model, y, calls = tiny(timesteps=50, beta_end=0.28), torch.tensor([0, 1]), []
    model.net = Net(lambda x, t, y: calls.append((t[0].item(), len(t))) or 0.1 * x + 0.05 * y[:, None, None, None])

    def draw(**how):
        calls.clear()
        return model.sample(y, sampler="dpm++", steps=20, **how)

    always, never = draw(w=2.0), draw(w=0.0)
    assert torch.equal(draw(w=2.0, interval=(0, 1e9)), always) and torch.equal(draw(w=2.0, interval=(1e8, 1e9)), never)
    some = draw(w=2.0, interval=(0.3, 3))
    assert not torch.equal(some, always) and not torch.equal(some, never)
    assert [n for _, n in calls] == [4 if 0.3 <= (1 / model.abar[t] - 1) ** 0.5 <= 3 else 2 for t, _ in calls]
    assert 0 < sum(n == 4 for _, n in calls) < 20
    unconditional = draw(w=-1.0)
    assert torch.equal(draw(w=-1.0, interval=(0.3, 3)), unconditional) and not torch.equal(unconditional, never)
    for wrong in ((1,), (3, 1), (-1, 2), ("a", "b")):
        with pytest.raises(UserError, match="interval"):
            draw(w=2.0, interval=wrong)


def test_ddpm_sample_returns_one_type_for_all_arguments():
    model = tiny()
    for sampler in ddpm.SAMPLERS:
        for w in (-1, 0, 1.8):
            x = model.sample(torch.tensor([0, 2]), w=w, sampler=sampler, steps=3)
            assert type(x) is torch.Tensor and x.shape == (2, *model.shape)


def test_ddpm_images_do_not_depend_on_batch_size_or_order():
    model = tiny()
    y = torch.arange(64) % 3  # one batch of 64, and the same in pieces
    for sampler, eta in (("ddpm", 0.0), ("ddim", 1.0), ("dpm++", 0.0)):
        draw = lambda k: model.sample(y[k], 1.8, 5, k, sampler, 4, eta)  # noqa: E731
        whole = draw(list(range(64)))
        for size in (1, 7):
            parts = torch.cat([draw(list(range(s, min(s + size, 64)))) for s in range(0, 64, size)])
            assert torch.allclose(parts, whole, atol=1e-3)
        order = torch.randperm(64)
        assert torch.allclose(draw(order.tolist()), whole[order], atol=1e-3)
    assert not torch.equal(model.sample(y[:1], seed=1), model.sample(y[:1], seed=2))


def test_ddpm_compiled_network_sees_one_batch_shape():
    model, shapes = tiny(), []
    y = torch.arange(7) % 3
    eager = torch.cat(list(model.sample_batches(y, range(7), 3, steps=2, w=1.0)))

    def backend(graph, inputs):
        shapes.append([v.shape for v in inputs if v.ndim == 4 and v.shape[1:] == model.shape])
        return graph.forward

    model.net.compile(backend=backend, dynamic=False)
    model.compiled = True
    compiled = torch.cat(list(model.sample_batches(y, range(7), 3, steps=2, w=1.0)))
    assert shapes == [[(3, *model.shape)]] and compiled.shape == eager.shape
    assert (compiled.int() - eager.int()).abs().max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# ddpm.py: averaged weights and checkpoints


def test_ddpm_weight_decay_shrinks_matrices_only():
    model = tiny()
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    ddpm.make_optimizer(model, lr=0.1, weight_decay=0.5).step()
    for p in model.parameters():
        assert torch.allclose(p, torch.tensor(0.95 if p.ndim > 1 else 1.0))


def test_ddpm_ema():
    net = nn.Linear(2, 1)
    ema = EMA(net, 0.9999)
    start = net.weight.detach().clone()
    for _ in range(50):
        ema.update()
    assert torch.allclose(ema.shadow["weight"], start)  # constant weights are a fixed point
    torch.manual_seed(0)
    for decay in (0.99, 0.5):
        ema, wanted = EMA(net, decay), net.weight.detach().clone()
        for k in range(30):
            with torch.no_grad():
                net.weight.normal_()
            ema.update()
            d = min(decay, (1 + k) / (10 + k))
            wanted = d * wanted + (1 - d) * net.weight.detach()
        assert torch.allclose(ema.shadow["weight"], wanted, atol=1e-6)
    again = EMA(nn.Linear(2, 1), 0.5)
    again.load_state_dict(ema.state_dict())
    assert again.updates == 30 and torch.equal(again.shadow["weight"], ema.shadow["weight"])
    raw = net.weight.detach().clone()
    with ema.applied():
        assert torch.equal(net.weight, ema.shadow["weight"])
    assert torch.equal(net.weight, raw)
    # warm-up: the initial weights' share after 10,000 updates at 0.9999
    share = math.prod(min(0.9999, (1 + k) / (10 + k)) for k in range(10_000))
    assert share < 1e-6
    assert {n for n, _ in tiny().named_parameters()} == set(EMA(tiny()).shadow)  # and not the schedule


def test_ddpm_checkpoint_keys_are_the_plain_modules_and_ema_samples_differ(tmp_path):
    model = tiny()
    names = set(model.state_dict())
    model.net.compile(backend="eager")
    assert set(model.state_dict()) == names and not any("_orig_mod" in n for n in names)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    y = torch.tensor([0])
    raw = model.sample(y, steps=3)
    with ema.applied():  # in place: the compiled network sees the averages
        averaged = model.sample(y, steps=3)
    assert not torch.equal(raw, averaged)
    path = str(tmp_path / "ckpt.pt")
    write_checkpoint(path, model, ema=ema.state_dict())
    assert torch.allclose(ddpm.load_model(path)[0].sample(y, steps=3), averaged, atol=1e-5)
    assert torch.allclose(ddpm.load_model(path, ema=False)[0].sample(y, steps=3), raw, atol=1e-5)


def test_ddpm_a_damaged_checkpoint_is_one_line(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="train a model first"):
        ddpm.load_checkpoint(path)
    write_checkpoint(path, tiny())
    model, info = ddpm.load_model(path)
    assert info["step"] == 5 and info["path"] == path and info["description"] == f"{path}, step 5, averaged weights"
    assert not model.training and same(model.state_dict(), tiny().state_dict())
    whole = open(path, "rb").read()
    for where in range(0, len(whole), len(whole) // 100):  # one bit: an error, or the same weights
        open(path, "wb").write(whole[:where] + bytes([whole[where] ^ 4]) + whole[where + 1 :])
        try:
            assert same(ddpm.load_model(path)[0].state_dict(), model.state_dict()), where
        except UserError as e:
            assert "ckpt.pt is damaged" in str(e) and "\n" not in str(e)
    open(path, "wb").write(whole[:1000])
    with pytest.raises(UserError, match="ckpt.pt is damaged"):
        ddpm.load_model(path)


ARGS = vars(tiny().config)


@pytest.mark.parametrize(
    "change,said",
    (
        (dict(model_args={}), "damaged or not of this program"),
        (dict(model_args=ARGS | {"colour": 1}), "unexpected keyword argument 'colour'"),
        (dict(model_args=ARGS | {"ch": 16}), "size mismatch"),
        (dict(model_args=ARGS | {"ch": "8"}), "ch: 8 must be"),
        (dict(model_args=ARGS | {"ch": 8.5}), "ch: 8.5 must be a whole number"),
        (dict(model_args=ARGS | {"num_res_blocks": 10**5}), "num_res_blocks: 100000 must be in [1, 64]"),
        (dict(model_args=ARGS | {"image_size": 10**9}), "image_size: 1000000000 must be in [1, 4096]"),
        (dict(model_args=ARGS | {"ch_mult": (1, 10**6)}), "ch_mult"),
        (dict(model_args=ARGS | {"class_names": ("a",)}), "1 class_names for 3 classes"),
        (dict(model_args=ARGS | {"class_names": (1, 2, 3)}), "class_names"),
        (dict(model_args=None), "damaged or not of this program"),
        (dict(ema=5), "damaged or not of this program"),
        (dict(ema=dict(shadow={})), "Missing key"),
        (
            dict(ema=dict(shadow={k: v * math.nan for k, v in tiny().state_dict().items()})),
            "weights that are not finite",
        ),
        (dict(step="five"), "step"),
    ),
)
def test_ddpm_foreign_checkpoints_are_one_line(change, said, tmp_path):
    path = str(tmp_path / "ckpt.pt")
    content = dict(model_args=ARGS, ema=EMA(tiny()).state_dict(), step=5) | change
    torch.save(content, path)
    with pytest.raises(UserError, match=re.escape(said)) as e:
        ddpm.load_model(path)
    assert "\n" not in str(e.value)
    torch.save([content], path)
    with pytest.raises(UserError, match="damaged or not of this program"):
        ddpm.load_model(path)


@pytest.mark.slow
def test_ddpm_kill_9_while_saving_leaves_a_whole_file(tmp_path):
    code = (
        "import torch, ddpm\nprint('ready', flush=True)\nfor step in range(10**6):\n"
        "    big = {'w': torch.full((300_000,), float(step))}\n"
        "    content = dict(model_args={}, ema={'shadow': big}, step=step)\n"
        "    with ddpm.atomic_write('ckpt.pt') as f: torch.save(content, f)\n"
    )
    for seed in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": HERE}
        )
        process.stdout.readline()
        time.sleep(0.3 + random.Random(seed).random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        loaded = ddpm.load_checkpoint(str(tmp_path / "ckpt.pt"))
        assert (loaded["ema"]["shadow"]["w"] == loaded["step"]).all() and loaded["step"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# data.py


def test_data_shards_round_trip_and_their_faults(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(25) % 3
    folder = str(tmp_path / "s")
    data.write_shards(folder, images, labels, ["a", "b", "c"], shard_size=10)
    got = data.load(folder)
    assert np.array_equal(got[0], images) and np.array_equal(got[1], labels) and got[2] == ["a", "b", "c"]
    got = data.load(folder, classes="c,a")
    assert got[2] == ["c", "a"] and np.array_equal(got[0], images[labels != 1])
    assert np.array_equal(got[1], np.where(labels[labels != 1] == 2, 0, 1))
    with pytest.raises(UserError, match="did you mean"):
        data.load(folder, classes="aa,b")
    odd = str(tmp_path / "my_images_[1]")  # a name that looks like a file's or a pattern
    data.write_shards(odd, images, labels, ["a", "b", "c, d"])
    assert np.array_equal(data.load(odd)[1], labels)
    assert np.array_equal(data.load(odd, classes=["c, d", "a"])[1], got[1])
    with pytest.raises(UserError, match="at most 256 classes"):
        data.write_shards(odd, images, labels + 300, [])
    np.save(f"{folder}/labels_00001.npy", np.full(10, 7, dtype=np.uint8))
    with pytest.raises(UserError, match="labels run from 0 to 7"):
        data.load(folder)
    os.remove(f"{folder}/labels_00001.npy")
    with pytest.raises(UserError, match="3 files of images, but 2"):
        data.load(folder)
    with open(f"{folder}/images_00002.npy", "r+b") as f:
        f.truncate(150)
    with pytest.raises(UserError, match="images_00002.npy is damaged"):
        data.load(folder)


def test_data_batches_are_a_function_of_seed_and_step():
    images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1).repeat(4, 1).repeat(4, 2)
    make = lambda seed: data.Batches(images, np.arange(20), 8, seed)  # noqa: E731
    a, b, other = make(1), make(1), make(2)
    forward = [a(s) for s in range(10)]
    backward = [b(s) for s in reversed(range(10))][::-1]
    assert all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(forward, backward))
    assert not torch.equal(torch.cat([other(s)[1] for s in range(10)]), torch.cat([y for _, y in forward]))
    seen = torch.cat([y for _, y in forward])[:80].view(4, 20)  # four epochs of 20, each with every image once
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in seen) and not torch.equal(seen[0], seen[1])
    x, y = a(3)
    assert torch.equal(to_uint8(x)[:, 0, 0, 0].long(), y)  # images keep their labels
    halves = [a(3, slice(k, k + 4)) for k in (0, 4)]
    assert torch.equal(torch.cat([h[0] for h in halves]), x)


def test_data_shifts_move_an_image_and_repeat_its_border():
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    wide = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
    moved = {(dy, dx): wide[dy : dy + 8, dx : dx + 8] for dy in range(5) for dx in range(5)}
    for hflip in (False, True):
        batches, seen = data.Batches(image[None], None, 400, seed=0, hflip=hflip, shift=2), set()
        for x in to_uint8(batches(0)[0]).numpy():
            ways = {(key, f) for key, m in moved.items() for f in (0, 1) if np.array_equal(x, m[:, :: 1 - 2 * f])}
            assert len(ways) == 1
            seen |= ways
        assert len(seen) == 25 * (1 + hflip)  # every shift in -2..2 along both axes, mirrored or not


def test_data_flips_and_crops():
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))[None, :, :, None].repeat(400, 0)
    x, _ = data.Batches(ramp, None, 400, 0)(0)
    flipped = (x[:, 0, 0, 0] > x[:, 0, 0, -1]).float().mean()
    assert 0.4 < flipped < 0.6
    assert not (data.Batches(ramp, None, 400, 0, hflip=False)(0)[0][:, 0, 0, 0] > 0).any()
    x, _ = data.Batches(ramp, None, 400, 0, hflip=False, crop=0.5)(0)
    span = (x[:, 0, 0, -1] - x[:, 0, 0, 0]) * 127.5 / 8 + 1  # in pixels of the source
    assert x.shape == (400, 1, 32, 32) and 15 < span.min() < 20 and 29 < span.max() < 33
    left = (x[:, 0, 0, 0] + 1) * 127.5 / 8  # from one border to the other
    place = (left / (32 - span).clamp(min=1))[span < 28]
    assert place.min() < 0.1 and place.max() > 0.9 and 0.4 < place.mean() < 0.6
    assert x.min() >= -1 and x.max() <= 1


def test_data_shapes_are_ten_balanced_seeded_classes():
    images, labels, names = data.make_shapes(500, 3)
    again, _, _ = data.make_shapes(500, 3)
    assert images.dtype == np.uint8 and images.shape == (500, 32, 32, 3) and len(names) == 10
    assert np.array_equal(images, again) and (np.bincount(labels) == 50).all()
    assert len(np.unique(images.reshape(500, -1), axis=0)) == 500
    means = np.stack([images[labels == k].mean((0, 3)) for k in range(10)])  # the classes differ in form
    assert min(np.abs(means[a] - means[b]).max() for a in range(10) for b in range(a)) > 10


def test_data_folder_of_images_with_and_without_classes(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        (tmp_path / "p" / name).mkdir(parents=True)
        for i in range(5):
            size = (20 + 4 * i, 24, 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / "p" / name / f"{i}.png")
    images, labels, names = data.load(str(tmp_path / "p"), data_dir=str(tmp_path / "kept"), image_size=16)
    assert images.shape == (10, 16, 16, 3) and names == ["x", "y"] and np.bincount(labels).tolist() == [5, 5]
    again = data.load(str(tmp_path / "p"), data_dir=str(tmp_path / "kept"), image_size=16)[0]
    assert isinstance(again, np.memmap) and np.array_equal(again, images)
    images, labels, names = data.load(str(tmp_path / "p" / "x"), data_dir=str(tmp_path / "kept"), image_size=16)
    assert len(images) == 5 and labels is None and names == []
    assert data.load(str(tmp_path / "p"), "test", str(tmp_path / "kept"))[0] is None
    (tmp_path / "p" / "x" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="bad.png is not a readable image"):
        data.load(str(tmp_path / "p"), data_dir=str(tmp_path / "kept"), image_size=16)


def save_image(path, array=None, **how):
    """Saves a PIL image, by default 8x8 noise that depends on the file's name."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(list(path.name.encode())).integers(0, 256, (8, 8, 3)) if array is None else array
    image = array if isinstance(array, Image.Image) else Image.fromarray(array.astype(np.uint8))
    image.save(path, **how)


def test_data_images_are_decoded_as_a_viewer_shows_them(tmp_path):
    from PIL import Image

    corner = np.zeros((8, 8, 3))
    corner[:4, :4] = 255  # the upper left quarter
    upright = {1: (0, 0), 2: (0, 4), 3: (4, 4), 4: (4, 0), 5: (0, 0), 6: (0, 4), 7: (4, 4), 8: (4, 0)}
    for orientation, (y, x) in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        wanted = np.zeros((8, 8, 3))
        wanted[y : y + 4, x : x + 4] = 255
        for suffix, how in ((".jpg", dict(quality=100, subsampling=0)), (".png", {}), (".webp", dict(lossless=True))):
            path = tmp_path / f"exif{orientation}{suffix}"
            save_image(path, corner, exif=exif, **how)
            with Image.open(path) as image:
                assert np.abs(data.decode_image(image, 8) - wanted).max() <= 8, path
    red = np.zeros((8, 8, 4))
    red[..., 0] = 255
    half = red.copy()
    half[..., 3] = 127
    palette = Image.new("P", (8, 8))  # colour 0 is transparent
    palette.putpalette([255, 0, 0] * 256)
    grey = Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16))
    steps = np.linspace(0, 255, 64).reshape(8, 8, 1).repeat(3, 2)
    wanted = (
        ("alpha.png", red, {}, 255),
        ("half.png", half, {}, np.array([255, 128, 128])),
        ("grey_alpha.png", Image.new("LA", (8, 8), (0, 0)), {}, 255),
        ("palette.png", palette, dict(transparency=0), 255),
        ("palette.gif", palette, dict(transparency=0), 255),
        ("key.png", Image.new("RGB", (8, 8), "red"), dict(transparency=(255, 0, 0)), 255),
        ("grey_key.png", Image.new("L", (8, 8), 7), dict(transparency=7), 255),
        ("grey16.png", grey, {}, steps),
        ("grey16.tif", grey, {}, steps),
        ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 0)), {}, 255),
        ("bits.png", Image.new("1", (8, 8), 1), {}, 255),
        ("int32.tif", Image.new("I", (8, 8), 200), {}, 200),
        ("float.tif", Image.new("F", (8, 8), 200.4), {}, 200),
    )
    for name, array, how, values in wanted:
        save_image(tmp_path / name, array, **how)
        with Image.open(tmp_path / name) as image:
            assert np.abs(data.decode_image(image, 8).astype(int) - values).max() <= 1, name


def test_data_folder_uses_or_names_every_file(tmp_path, capfd):
    """Sub-folders of a class belong to it; `train` may be a class; hidden names and links back are nothing."""
    root = tmp_path / "p"
    used = ["train/a.png", "bus/b.tif", "bus/more/c.jfif", "bus/more/d.PPM", "car/e.jpg", "car/f.png.gif"]
    for name in used:
        format = "JPEG" if name.endswith("jfif") else None
        save_image(root / name, format=format)
    for name in (".ipynb_checkpoints/g.png", "car/._e.png", "car/.hidden/h.png", "i.png"):
        save_image(root / name)
    (root / "none").mkdir()
    (root / "car" / "notes.txt").write_text("x")
    (root / "bus" / "raw.heic").write_text("x")
    (root / "dangling.txt").symlink_to("nowhere")
    (root / "car" / "back").symlink_to("..")
    (root / "back").symlink_to("../..")
    images, labels, names = data.load(str(root), "train", str(tmp_path / "kept"), 8)
    assert names == ["bus", "car", "train"] and np.bincount(labels).tolist() == [3, 2, 1]
    said = capfd.readouterr().err
    wanted = "1 *.heic, 2 *.txt, 1 images beside the classes, back/ without images, none/ without images"
    assert f"{root}: not used: {wanted}\n" in said
    for name in ("Train/x/0.png", "Train/y/1.png", "val/x/2.png", "3.png", "__MACOSX/._x/._0.png"):
        save_image(tmp_path / "q" / name)
    (tmp_path / "q" / "notes").mkdir()
    images, labels, names = data.load(str(tmp_path / "q"), "train", str(tmp_path / "kept"), 8)
    assert (
        names == ["x", "y"] and len(images) == 2 and "not used: 3.png, __MACOSX, notes, val" in capfd.readouterr().err
    )
    assert data.load(str(tmp_path / "q"), "test", str(tmp_path / "kept"), 8)[0] is None
    (tmp_path / "r").mkdir()
    (tmp_path / "q").rename(tmp_path / "r" / "flowers")
    with pytest.raises(UserError, match="has one sub-folder with images, flowers/, which has several"):
        data.load(str(tmp_path / "r"), "train", str(tmp_path / "kept"), 8)


def test_data_unreadable_images_are_named_in_one_line(tmp_path):
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 3_000_000, zip=True)
    huge = Image.new("L", (1, 1))
    bad = {
        "dangling.png": lambda p: p.symlink_to("nowhere"),
        "fifo.png": lambda p: os.mkfifo(p),
        "text.png": lambda p: save_image(p, pnginfo=text),
        "float.tif": lambda p: Image.new("F", (8, 8), -0.5).save(p),
        "cut.jpg": lambda p: (save_image(p, np.zeros((64, 64, 3))), p.write_bytes(p.read_bytes()[:300])),
        "empty.gif": lambda p: p.write_bytes(b""),
        "huge.gif": lambda p: (huge.save(p), p.write_bytes(p.read_bytes()[:6] + b"\xff\xff" * 2 + p.read_bytes()[10:])),
    }
    for k, (name, make) in enumerate(bad.items()):
        save_image(tmp_path / str(k) / "0.png")
        make(tmp_path / str(k) / name)
        with pytest.raises(UserError, match=f"{name} is not a readable image") as e:
            data.load(str(tmp_path / str(k)), "train", str(tmp_path / "kept"), 8)
        assert "\n" not in str(e.value)


def test_data_folder_that_changes_is_decoded_again(tmp_path, monkeypatch):
    path, load = tmp_path / "p" / "0.bmp", lambda: data.load(str(tmp_path / "p"), "train", str(tmp_path / "kept"), 8)[0]
    save_image(path, np.zeros((8, 8, 3)))
    before, stat = load().copy(), path.stat()
    save_image(path, np.full((8, 8, 3), 9))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same name, size and time
    assert (load() != before).all()
    assert len(list((tmp_path / "kept").iterdir())) == 2
    monkeypatch.setattr(data, "DECODING", 10**6)
    load()
    assert len(list((tmp_path / "kept").iterdir())) == 3


@pytest.mark.parametrize(
    "files,said",
    (
        (dict(labels=np.array([0, np.nan])), "float64 .2,., expected a whole number for each of 2 images"),
        (dict(labels=np.array([0, 0.5])), "expected a whole number"),
        (dict(labels=np.array(["a", "b"])), "expected a whole number"),
        (dict(labels=np.array([[0], [1]])), "expected a whole number"),
        (dict(labels=np.array([-1, 1])), "labels run from -1 to 1"),
        (dict(labels=np.array([0, 2]), classes=["a", "b"]), "labels run from 0 to 2, but there are 2 classes"),
        (dict(classes={"0": "a"}), "classes.json holds a dict, expected a list"),
        (dict(classes=[0, 1]), "classes.json: expected a list of names that differ"),
        (dict(classes=["a", "a"]), "classes.json: expected a list of names that differ"),
        (dict(images=np.zeros((0, 8, 8, 3), np.uint8), labels=None), "no images in"),
        (dict(images=np.zeros((2, 8, 8, 4), np.uint8)), "uint8 .2, 8, 8, 4., expected uint8 .N, H, W, 1 or 3."),
        (dict(images=np.zeros((2, 8, 8, 3))), "float64 .2, 8, 8, 3., expected uint8"),
        (dict(images=np.array([None, {}])), "images_00000.npy is damaged or not an .npy file"),
    ),
)
def test_data_shards_that_are_refused(files, said, tmp_path):
    files = dict(images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 1])) | files
    for kind in ("images", "labels"):
        if files[kind] is not None:
            np.save(tmp_path / f"{kind}_00000.npy", files[kind])
    if "classes" in files:
        (tmp_path / "classes.json").write_text(json.dumps(files["classes"]))
    with pytest.raises(UserError, match=said) as e:
        data.load(str(tmp_path))
    assert "\n" not in str(e.value)


def test_data_shards_in_other_layouts(tmp_path, capfd):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images_00000.npy", np.asfortranarray(images))
    np.save(tmp_path / "labels_00000.npy", np.array([1, 2, 1, 2], dtype=np.int32))
    (got, labels), _, names = data.load_splits(str(tmp_path))
    assert np.array_equal(got, images) and got.flags.c_contiguous and labels.dtype == np.int64
    assert names == ["0", "1", "2"] and "no training images of 0" in capfd.readouterr().err
    with open(tmp_path / "images_00000.npy", "ab") as f:
        f.write(b"more")
    with pytest.raises(UserError, match="its size does not fit its header"):
        data.load(str(tmp_path))


def test_data_mutated_files_are_one_line_or_load(tmp_path):
    """1,000 files with a changed, cut or added part: shards, labels, JSON, and images of eight formats."""
    rng, images = np.random.default_rng(0), np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    data.write_shards(f"{tmp_path}/shards", images, np.arange(6) % 3, ["a", "b", "c"])
    files = [tmp_path / "shards" / name for name in ("images_00000.npy", "labels_00000.npy", "classes.json")]
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "tif", "ppm", "tga"):
        save_image(tmp_path / suffix / f"0.{suffix}", rng.integers(0, 256, (16, 16, 3)))
        files.append(tmp_path / suffix / f"0.{suffix}")
    loaded = refused = 0
    for k in range(1000):
        path, whole = files[k % len(files)], files[k % len(files)].read_bytes()
        where, changed = int(rng.integers(len(whole))), bytearray(whole)
        if k % 3 == 0:
            changed[where] = int(rng.integers(256))
        elif k % 3 == 1:
            changed = changed[:where]
        else:
            changed[where:where] = rng.bytes(int(rng.integers(1, 40)))
        path.write_bytes(changed)
        try:
            x, y, names = data.load(str(path.parent), "train", str(tmp_path / "kept"), 0 if "npy" in path.name else 8)
            assert x.dtype == np.uint8 and x.shape[1:] == (8, 8, 3) and (y is None or y.max() < len(names))
            loaded += 1
        except UserError as e:
            assert "\n" not in str(e), (path, str(e))
            refused += 1
        path.write_bytes(whole)
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
    assert loaded > 300 and refused > 300, (loaded, refused)
    print(f"{loaded} loaded, {refused} refused in one line")


def test_data_every_bit_of_a_header(tmp_path):
    """Each of the 1,024, flipped: an error of one line, or the same values."""
    path, images = tmp_path / "images_00000.npy", np.zeros((2, 8, 8, 3), np.uint8)
    np.save(path, images)
    whole = path.read_bytes()
    for bit in range(1024):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert np.array_equal(data.read_shards(str(tmp_path))[0], images), bit
        except UserError as e:
            assert "\n" not in str(e), bit


def test_data_cifar10_download_is_checked_and_then_not_needed(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's own format, fetched by torchvision from a server of this test."""
    import torchvision

    kind, rng, source = torchvision.datasets.CIFAR10, np.random.default_rng(0), tmp_path / "cifar-10-batches-py"
    source.mkdir()
    pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    batch = {"data": pixels, "labels": list(range(10))}
    for name, content in (("b", batch), ("t", batch), ("batches.meta", {"label_names": list("abcdefghij")})):
        (source / name).write_bytes(pickle.dumps(content))
    md5 = lambda path: hashlib.md5(path.read_bytes()).hexdigest()  # noqa: E731
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    monkeypatch.setattr(kind, "train_list", [["b", md5(source / "b")]])
    monkeypatch.setattr(kind, "test_list", [["t", md5(source / "t")]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(source / "batches.meta")}
    monkeypatch.setattr(kind, "meta", meta)
    monkeypatch.setattr(kind, "filename", "c.tar.gz")
    monkeypatch.setattr(kind, "tgz_md5", "0" * 32)
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/c.tar.gz")
    where = str(tmp_path / "data")
    with pytest.raises(UserError, match="download failed.*By hand.*config/shapes.py"):  # a wrong checksum
        data.load("cifar10", data_dir=where)
    monkeypatch.setattr(kind, "tgz_md5", md5(tmp_path / "c.tar.gz"))
    images, labels, names = data.load("cifar10", data_dir=where)
    assert np.array_equal(images, pixels.reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)) and names == list("abcdefghij")
    server.shutdown()  # kept as shards: no second download
    assert np.array_equal(data.load("cifar10", "test", where)[1], np.arange(10))


def test_data_failed_download_says_what_to_do(tmp_path, capfd, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "file:///nowhere.tar.gz")
    line = one_line(cli(capfd, "train.py", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out", "--device=cpu"))
    assert "download failed" in line and "cs.toronto.edu" in line and "config/shapes.py" in line


def test_data_fashion_mnist_in_its_own_format(tmp_path):
    pixels = write_fashion_mnist(tmp_path, 6)
    images, labels, names = data.load("fashion_mnist", data_dir=str(tmp_path))
    assert np.array_equal(images[..., 0], pixels) and labels.tolist() == list(range(6)) and names[0] == "T-shirt/top"
    with pytest.raises(UserError, match="is 28x28, but image_size, or the model of init_from, is 32"):
        data.load("fashion_mnist", data_dir=str(tmp_path), image_size=32)


@pytest.mark.slow
@pytest.mark.parametrize("which", ("fashion_mnist", "fashion_mnist, unconditional", "flowers102", "folder"))
def test_data_every_set_goes_through_all_scripts(capfd, tmp_path, monkeypatch, which):
    """From the files that the real sets come in, by their configs: train, sample, evaluate, plot."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    name, _, unconditional = which.partition(", ")
    dataset = f"{tmp_path}/images" if name == "folder" else name
    {"fashion_mnist": lambda: write_fashion_mnist(tmp_path / "data", 100),
     "flowers102": lambda: write_flowers102(tmp_path / "data", monkeypatch),
     "folder": lambda: write_folder(tmp_path)}[name]()  # fmt: skip
    of, size = [f"--dataset={dataset}"], 16 if name == "folder" else 64 if name == "flowers102" else 28
    attention = dict(folder=4, flowers102=16).get(name, 14)
    train = [*of, f"--image_size={size}", "--ch=8", "--ch_mult=1,2", f"--attn_resolutions={attention}", "--max_iters=2"]
    train += ["--out_dir=out-x", "--batch_size=8", "--timesteps=10", "--eval_interval=2", "--sample_interval=2"]
    train += ["--eval_images=8", "--use_compile=False", "--conditional=False"][: 3 if unconditional else 2]
    for script, *flags in (
        ("train.py", f"config/{name}.py", *train),
        ("sample.py", "--out_dir=out-x", "--steps=2", "--num_samples=2"),
        (
            "augment.py",
            "--out_dir=out-x",
            "--steps=2",
            f"--per_class={40 if unconditional else 20 if name == 'folder' else 4}",
        ),
        ("evaluate.py", *of, f"--image_size={size}", "--out_dir=out-x", "--n=40", "--resize=32"),
        ("plot.py", "loss", "--out_dir=out-x"),
        ("plot.py", "data", *of, f"--image_size={size}", "--out_dir=out-x"),
        ("plot.py", "forward", *of, f"--image_size={size}", "--out_dir=out-x"),
    ):
        status, text = cli(capfd, script, *flags)
        assert status == 0, text
    if name == "flowers102":
        images, labels, _ = data.load(name)
        order = data.shuffled([k + 102 * i + 1 for k in range(102) for i in range(2)])  # ids of the training images
        assert labels.tolist() == [(k - 1) % 102 for k in order]
        with Image.open(f"data/flowers-102/jpg/image_{order[5]:05d}.jpg") as image:
            assert np.array_equal(images[5], data.decode_image(image, 64))
    made = set(os.listdir("out-x"))
    assert {"ckpt.pt", "sample.png", "evaluate.json", "plot_loss.png", "plot_data.png"} <= made
    assert ("evaluate_nearest.png" in made) == (name != "folder")  # no image of it is held out of training
    scores = data.read_json("out-x/evaluate.json")["scores"]
    assert scores["samples"]["n"] == 40 and scores["samples"]["kd"] > 0
    assert any("other half" in title for title in scores) == (name == "folder")


# ---------------------------------------------------------------------------------------------------------------------
# configurator.py


@pytest.mark.parametrize("script", SCRIPTS)
def test_configurator_help_lists_every_key_with_its_comment(script, capfd):
    status, text = cli(capfd, script, "--help")
    assert status == 0 and "--key=value" in text
    lines = [line.strip() for line in text.split("keys (--key=value):")[1].splitlines()]
    with open(f"{HERE}/{script}") as f:
        block = re.split("^# -{100,}$", f.read(), flags=re.M)[1]
    keys = re.findall(r"^(\w+) = .+?(?:  # (.*))?$", block, flags=re.M)
    assert len(keys) >= 10
    if script in ("train.py", "sample.py", "augment.py", "classifier.py"):
        for key in ("out_dir=", "seed=", "device='auto'"):
            assert key in text
        assert "cuda, mps, cpu" in text
    for key, comment in keys:
        assert any(line.startswith(f"{key}=") and line.endswith(comment) for line in lines), key


def test_configurator_checks_settings(shards, trained, tmp_path, capfd):
    config = tmp_path / "c.py"
    config.write_text("lr = 1\nbatch_sise = 4\n")
    assert "c.py:2: unknown key 'batch_sise': did you mean 'batch_size'?" in one_line(
        cli(capfd, "train.py", str(config))
    )
    config.write_text("import math\nlr = 'fast'\n")
    assert "c.py:2: lr='fast' is not of type float" in one_line(cli(capfd, "train.py", str(config)))
    config.write_text("lr = 1 / 0\n")
    assert "ZeroDivisionError" in one_line(cli(capfd, "train.py", str(config)))
    assert "no config file 'config/nothing.py'" in one_line(cli(capfd, "train.py", "config/nothing.py"))
    line = one_line(cli(capfd, "train.py", "--sampler=ddim"))
    assert "flag: unknown key 'sampler': it is a key of augment.py, sample.py" in line
    assert "it is a key of train.py" in one_line(cli(capfd, "sample.py", "--p_uncond=1"))
    assert "did you mean 'max_iters'" in one_line(cli(capfd, "train.py", "--max_iter=5"))
    assert "is not of type int" in one_line(cli(capfd, "train.py", "--batch_size=2.5"))
    assert "is not of type bool" in one_line(cli(capfd, "train.py", "--hflip=1"))
    assert "is not of type tuple" in one_line(cli(capfd, "train.py", "--ch_mult=a,b"))
    assert "write it as --lr=value" in one_line(cli(capfd, "train.py", "--lr"))
    assert "unknown key 'os'" in one_line(cli(capfd, "train.py", "--os=1"))
    config.write_text("max_iters = 1e0\nlr = 1\nch_mult = [1, 2]\n")  # a float that is whole, an int, a list
    flags = [f for f in tiny_flags(shards, f"{tmp_path}/out=1") if f.split("=")[0] not in ("--max_iters", "--lr")]
    flags = [f for f in flags if not f.startswith("--ch_mult")]
    assert cli(capfd, "train.py", str(config), *flags, "--batch_size=8e0")[0] == 0  # and a value with a "=" in it
    saved = ddpm.load_checkpoint(f"{tmp_path}/out=1/ckpt.pt")
    assert saved["config"]["ch_mult"] == (1, 2) and saved["model_args"]["ch_mult"] == (1, 2)
    assert saved["config"]["lr"] == 1.0 and type(saved["config"]["max_iters"]) is int


def test_configurator_paths_and_config_files_as_people_write_them(shards, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tmp_path / "c.py"
    config.write_bytes(b"\xef\xbb\xbfmax_iters = 1\n")  # a byte order mark, as Windows editors write
    status, text = cli(capfd, "train.py", *tiny_flags(shards, "~/runs/a"), "~/c.py")
    assert status == 0 and (tmp_path / "runs" / "a" / "ckpt.pt").exists() and not os.path.exists("~"), text
    config.write_text("out_dir = '~/runs/a'\n")
    assert cli(capfd, "sample.py", str(config), "--device=cpu", "--num_samples=1")[0] == 0
    for text in ("exit()", "raise SystemExit(0)", "import sys; sys.exit()"):
        config.write_text(text)
        assert "c.py: SystemExit" in one_line(cli(capfd, "train.py", str(config)))


def arguments_of_configure(script, capfd):
    """What a script passes to configure: (its globals, ranges, optional)."""
    seen = []

    def record(namespace, ranges=(), **optional):
        seen.extend((dict(namespace), dict(ranges), optional))
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configurator, "configure", record)
        cli(capfd, script, *(["mistuned"] if script == "ablate.py" else []))
    return seen


@pytest.mark.parametrize("script", SCRIPTS)
def test_configurator_every_number_has_a_range(script, capfd):
    """In the table of all scripts, in the script's own, or in DDPMConfig; and nan is in none."""
    namespace, ranges, _ = arguments_of_configure(script, capfd)
    ranges = configurator.RANGES | ranges
    settings = {k: v for k, v in namespace.items() if k.islower() and not k.startswith("_")}
    numbers = {k for k, v in settings.items() if type(v) in (int, float)} - vars(DDPMConfig()).keys()
    assert numbers <= ranges.keys()
    for key, interval in ranges.items():
        with pytest.raises(UserError, match="must be in"):
            ddpm.check_range(key, math.nan, interval)


NASTY = "nan inf -inf -1 0 0.5 1e400 1e-400 -0.0 None True [] () {} 1,, 1,2 a ' \\ ~ -- 1j 0x10 1_0 lambda:0".split(" ")
NASTY += [
    "",
    " ",
    "9" * 400,
    "-" * 5000 + "1",
    "(" * 5000,
    "1\x00",
    f"[{'1,' * 9999}]",
    "__import__('os')",
    "\U0001f600",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_configurator_nasty_settings(script, monkeypatch, tmp_path, capfd):
    """Every key with every value: taken with its type and in its range, or one line that names the key."""
    namespace, ranges, optional = arguments_of_configure(script, capfd)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", [script])
    defaults, taken = configurator.configure(dict(namespace), ranges, **optional)[0], []

    def attempt(key, argument):
        monkeypatch.setattr(sys, "argv", [script, argument])
        try:
            got = configurator.configure(dict(namespace), ranges, **optional)[0][key]
        except UserError as e:
            assert key in str(e) and "\n" not in str(e)
            return
        taken.append(key)
        assert type(got) is type(defaults[key]) or key in optional
        if type(got) in (int, float) and key in (intervals := configurator.RANGES | ranges):
            ddpm.check_range(key, got, intervals[key])

    for key in defaults:
        for value in NASTY:
            attempt(key, f"--{key}={value}")
    print(f"{script}: {len(defaults) * len(NASTY)} settings, {len(taken)} taken, the others refused in one line")
    assert len(taken) > len(NASTY)

    # Flags of any text, and config files of any value.
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    values = scalars | st.lists(scalars, max_size=3) | st.lists(st.integers() | st.floats(), max_size=3).map(tuple)
    keys, path = st.sampled_from(sorted(defaults)), tmp_path / "config.py"

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(keys, st.text() | values.map(str), values)
    def any_setting(key, text, value):
        attempt(key, f"--{key}={text}")
        path.write_text(f"from math import inf, nan\n{key} = {value!r}\ndel inf, nan\n", encoding="utf-8")
        attempt(key, str(path))

    any_setting()


@pytest.mark.parametrize("script", ("train.py", "sample.py", "augment.py", "classifier.py", "evaluate.py", "gan.py"))
def test_configurator_out_dir_is_checked_before_the_work(script, tmp_path, capfd, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in ("file", "file/x"):
        assert one_line(cli(capfd, script, f"--out_dir={tmp_path}/{path}")).endswith("file is not a folder")
    assert "out_dir is empty" in one_line(cli(capfd, script, "--out_dir="))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert one_line(cli(capfd, script, f"--out_dir={tmp_path}/new")).endswith(
        f"out_dir: no permission to write to {tmp_path}"
    )


def test_configurator_a_real_command_line_works_from_any_folder(tmp_path):
    run = lambda *args: subprocess.run(  # noqa: E731
        [sys.executable, f"{HERE}/train.py", *args], cwd=tmp_path, capture_output=True, text=True
    )
    done = run("--learning_rate=1")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert "unknown key 'learning_rate'" in done.stderr
    done = run("config/shapes.py", "--dataset=nowhere")  # the config file beside the script is found
    assert done.returncode == 2 and "dataset 'nowhere' is neither a data set nor a folder" in done.stderr


def test_configurator_out_of_memory_is_one_line_and_a_bug_keeps_its_traceback(capfd):
    with pytest.raises(SystemExit) as caught:
        configurator.print_user_error(torch.OutOfMemoryError, torch.OutOfMemoryError("CUDA out of memory"), None)
    assert caught.value.code == 2 and "lower batch_size" in capfd.readouterr().err
    configurator.print_user_error(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capfd.readouterr().err


def test_configurator_imports_only_what_every_run_needs():
    """Half of the seconds to a first step are imports: those that only some runs need are made when they are needed."""
    code = (
        "import sys, data, configurator; print(*{'torchvision', 'PIL', 'matplotlib', 'torch._dynamo'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE)
    assert done.stdout.strip() == ""


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def test_train_a_resumed_run_equals_an_uninterrupted_one(shards, tmp_path, capfd):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert cli(capfd, "train.py", *tiny_flags(shards, whole, grad_accum=2))[0] == 0
    assert cli(capfd, "train.py", *tiny_flags(shards, parts, grad_accum=2, max_iters=4))[0] == 0
    status, text = cli(capfd, "train.py", f"--out_dir={parts}", "--init_from=resume", "--max_iters=6")
    assert status == 0 and "max_iters changes from the checkpoint's 4 to 6" in text
    a, b = (ddpm.load_checkpoint(f"{d}/ckpt.pt") for d in (whole, parts))
    for key in ("model", "ema", "optimizer", "scaler", "step"):
        assert same(a[key], b[key]), key
    assert a["history"]["val_loss"] == b["history"]["val_loss"] and len(a["history"]["val_loss"]) == 3
    assert a["history"]["train_loss"] == b["history"]["train_loss"]


def test_train_sigterm_saves_and_the_run_continues(shards, tmp_path, capfd):
    flags = tiny_flags(shards, str(tmp_path / "out"), max_iters=100_000, eval_interval=50_000)
    process = subprocess.Popen([sys.executable, f"{HERE}/train.py", *flags], stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step       5"):
        pass
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    stopped_at = ddpm.load_checkpoint(str(tmp_path / "out" / "ckpt.pt"))["step"]
    assert process.returncode == 0 and f"stopped by a signal at step {stopped_at}" in out and stopped_at >= 5
    status, text = cli(
        capfd, "train.py", f"--out_dir={tmp_path}/out", "--init_from=resume", f"--max_iters={stopped_at + 2}"
    )
    assert status == 0 and f"steps {stopped_at} to {stopped_at + 2}" in text


@pytest.mark.slow
def test_train_killed_50_times_equals_an_uninterrupted_run(shards, tmp_path, capfd):
    cut, whole, steps = tmp_path / "cut", tmp_path / "whole", [0]

    def flags(folder, how="scratch", max_iters=10**6):
        return [*tiny_flags(shards, str(folder), eval_interval=3, max_iters=max_iters), f"--init_from={how}"]

    def check():
        if (cut / "ckpt.pt").exists():
            steps.append(ddpm.load_checkpoint(str(cut / "ckpt.pt"))["step"])
        if (cut / "log.json").exists():
            data.read_json(cut / "log.json")

    kill_at_random(50, 0.5, lambda: ["train.py", *flags(cut, "resume" if steps[-1] else "scratch")], check)
    assert steps == sorted(steps) and len(set(steps)) > 20
    end = steps[-1] + 2
    for folder, how in ((cut, "resume"), (whole, "scratch")):
        assert cli(capfd, "train.py", *flags(folder, how, end))[0] == 0
    a, b = (ddpm.load_checkpoint(f"{d}/ckpt.pt") for d in (cut, whole))
    for key in ("model", "ema", "optimizer", "step"):
        assert same(a[key], b[key]), key
    assert repr(a["history"]) == repr(b["history"])  # NaN where no t fell into a quarter
    print(f"\ntrain.py: 50 kills between steps 0 and {steps[-1]}, {len(set(steps))} different checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("what", ("SIGTERM", "SIGINT", "a process killed"))
def test_train_torchrun_that_is_stopped_can_be_resumed(what, shards, tmp_path):
    """A signal saves the step that it was at; if one process is killed, the other ends too. All can be resumed."""
    flags = tiny_flags(shards, str(tmp_path), max_iters=10**6, eval_interval=40)
    (host,) = start_torchrun(2, "train.py", *flags)
    while not (line := host.stdout.readline()).startswith("step      50 "):
        assert line
    if signalled := what.startswith("SIG"):
        host.send_signal(getattr(signal, what))
    else:
        ranks = subprocess.run(["ps", "-o", "pid=", "--ppid", str(host.pid)], capture_output=True, text=True).stdout
        os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    text = host.communicate(timeout=90)[0]
    step = ddpm.load_checkpoint(f"{tmp_path}/ckpt.pt")["step"]
    assert host.returncode != 0 and (f"stopped by a signal at step {step}:" in text) == signalled, text
    assert step >= 50 if signalled else step >= 40 and step % 40 == 0
    assert [p.name for p in tmp_path.glob("*.tmp")] == []
    status, text = torchrun(2, "train.py", *flags, "--init_from=resume", f"--max_iters={step + 2}")
    assert status == 0 and f"steps {step} to {step + 2}" in text, text


@pytest.mark.slow
def test_train_memory_does_not_grow_with_the_number_of_steps(shards, tmp_path):
    peak = {}
    for n in (200, 2200):
        flags = tiny_flags(shards, f"{tmp_path}/{n}", max_iters=n, eval_interval=100, log_interval=10)
        peak[n] = peak_memory("train.py", *flags)
    print("\npeak memory of train.py by steps:", {n: f"{mb:.0f} MB" for n, mb in peak.items()})
    assert peak[2200] - peak[200] < 20


@pytest.mark.parametrize("what", ("one image", "one class", "constant", "grey", "64x64"))
def test_train_and_sample_odd_data(what, tmp_path, capfd):
    n, side, channels = 1 if what == "one image" else 40, 64 if what == "64x64" else 8, 1 if what == "grey" else 3
    images = np.random.default_rng(0).integers(0, 256, (n, side, side, channels), dtype=np.uint8)
    images[:] = 7 if what == "constant" else images
    labels = np.zeros(n) if what in ("one image", "one class") else np.arange(n) % 3
    names = ["a", "b", "c"][: int(labels.max()) + 1]
    data.write_shards(f"{tmp_path}/tiny", images, labels, names)
    flags = tiny_flags(tmp_path, f"{tmp_path}/out", max_iters=3, val_fraction=0.0 if n == 1 else 0.1)
    status, text = cli(capfd, "train.py", *flags, f"--attn_resolutions={side // 2}")
    assert status == 0 and f"{len(names)} classes" in text, text
    status, text = cli(capfd, "sample.py", f"--out_dir={tmp_path}/out", "--steps=2", "--num_samples=2", "--device=cpu")
    assert status == 0 and os.path.exists(f"{tmp_path}/out/sample.png"), text


def test_train_two_gloo_processes_equal_one(shards, tmp_path, capfd):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert cli(capfd, "train.py", *tiny_flags(shards, one, dropout=0.0, sample_interval=6))[0] == 0
    status, text = torchrun(2, "train.py", *tiny_flags(shards, two, dropout=0.0, sample_interval=6))
    assert status == 0, text
    a, b = (ddpm.load_checkpoint(f"{d}/ckpt.pt") for d in (one, two))
    for key in ("model", "ema"):
        x, y = (c[key] if key == "model" else c[key]["shadow"] for c in (a, b))
        assert x.keys() == y.keys() and all(torch.allclose(x[k], y[k], atol=2e-5) for k in x)
    for key in ("train_loss", "val_loss", "log_loss", "train_quarters"):
        np.testing.assert_allclose(a["history"][key], b["history"][key], rtol=1e-3)
    assert os.path.exists(f"{two}/samples_000006.png")


def test_train_a_step_reads_nothing_back_from_the_device(shards, tmp_path, capfd):
    reads = []
    for n in (3, 9):
        flags = dict(max_iters=n, log_interval=100, eval_interval=100, crop=0.9)
        with HostReads() as mode:
            assert cli(capfd, "train.py", *tiny_flags(shards, str(tmp_path / str(n)), **flags))[0] == 0
        reads.append(mode.count)
    assert reads[0] == reads[1] > 0  # the first step, the last and the evaluation report; those between do not


def test_train_learning_rate_and_number_of_steps(shards, tmp_path, capfd):
    flags = tiny_flags(shards, str(tmp_path), max_iters=12, warmup_iters=3, lr=0.8, min_lr=0.1, eval_interval=100)
    assert cli(capfd, "train.py", *flags, "--grad_clip=0.001")[0] == 0
    with open(tmp_path / "log.json") as f:
        log = json.load(f)
    assert log["log_step"] == list(range(1, 13)) and log["step"] == [12]
    assert log["lr"][:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and log["lr"][-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(log["lr"][3:], log["lr"][4:]))
    assert {"train_loss", "val_loss", "test_loss", "epochs"} <= log.keys() and log["test_loss"] > 0
    assert log["epochs"] == [pytest.approx(12 * 8 / 54)]


def test_train_epochs_give_the_length(shards, tmp_path, capfd):
    status, text = cli(capfd, "train.py", *tiny_flags(shards, str(tmp_path)), "--epochs=1")
    assert status == 0 and "steps 0 to 7" in text  # 54 images in batches of 8, whatever max_iters says
    resume = [f"--out_dir={tmp_path}", "--init_from=resume"]
    status, text = cli(capfd, "train.py", *resume, "--max_iters=9")
    assert status == 0 and "steps 7 to 9" in text  # a resumed run may be given another length


@pytest.mark.parametrize("name", sorted(n for n in os.listdir(f"{HERE}/config") if n.endswith(".py")))
def test_train_every_config_runs(name, shards, tmp_path, capfd):
    small = dict(
        max_iters=2, batch_size=2, ch=8, timesteps=20, beta_end=0.6, eval_interval=2, eval_images=4, val_fraction=0.5
    )
    flags = [f"--{k}={v}" for k, v in small.items()] + [f"--out_dir={tmp_path}/out", f"--data_dir={shards}"]
    flags += [f"--dataset={shards}/cifar10"] if name == "folder.py" else []
    assert cli(capfd, "train.py", f"config/{name}", *flags, "--sample_interval=0", "--device=cpu")[0] == 0
    assert len(json.load(open(tmp_path / "out" / "log.json"))["val_loss"]) == 1
    if name == "cats_frogs.py":
        flags += ["--classes=cat", "--conditional=False", "--sample_interval=2"]
        assert cli(capfd, "train.py", f"config/{name}", *flags, "--device=cpu")[0] == 0
        assert ddpm.load_checkpoint(f"{tmp_path}/out/ckpt.pt")["model_args"]["num_classes"] == 0
        assert cli(capfd, "sample.py", f"--out_dir={tmp_path}/out", "--steps=2", "--num_samples=3")[0] == 0


def test_train_default_recipe_has_its_size_and_takes_steps(shards, tmp_path, capfd):
    flags = [f"--data_dir={shards}", f"--out_dir={tmp_path}", "--max_iters=2", "--batch_size=2", "--device=cpu"]
    status, text = cli(capfd, "train.py", "config/cifar_linear.py", *flags, "--eval_images=2", "--sample_interval=0")
    assert status == 0
    assert 35 < float(text.split("M parameters")[0].split()[-1]) < 40
    defaults = dict(line.split("=", 1) for line in help_lines(capfd, "train.py"))
    with open(f"{HERE}/config/cifar_linear.py") as f:
        scope = {}
        exec(f.read(), scope)
    assert all(repr(v) == defaults[k] for k, v in scope.items() if not k.startswith("_"))


def test_train_from_scratch_keeps_the_checkpoint_that_it_finds(shards, tmp_path, capfd):
    def train(**changes):
        changes = dict(max_iters=2, eval_interval=1) | changes
        status, text = cli(capfd, "train.py", *tiny_flags(shards, str(tmp_path), **changes))
        assert status == 0
        return "of an earlier run is now" in text

    assert not train() and not train(init_from="resume", max_iters=3)
    first = (tmp_path / "ckpt.pt").read_bytes()
    os.utime(tmp_path / "ckpt.pt", (1e9, 1e9))
    assert train(seed=1) and ddpm.load_checkpoint(f"{tmp_path}/ckpt.pt")["step"] == 2
    assert train(seed=2)  # each earlier run has a file of its own
    kept = sorted(tmp_path.glob("ckpt_*.pt"))
    assert len(kept) == 2 and kept[0].read_bytes() == first


def test_train_warns_of_classes_only_in_the_validation_split(tmp_path, capfd):
    images, labels = np.zeros((30, 8, 8, 3), np.uint8), np.repeat([0, 1, 2], [14, 14, 2])
    data.write_shards(f"{tmp_path}/tiny", images, labels, ["a", "b", "c"])
    flags = tiny_flags(tmp_path, f"{tmp_path}/out", max_iters=1, eval_interval=1)
    status, text = cli(capfd, "train.py", *flags)
    assert status == 0 and "warning: c: no training images" in text
    assert "warning" not in cli(capfd, "train.py", *flags, "--val_fraction=0.05")[1]


def test_n_real_trains_on_the_images_that_the_classifier_takes(shards, tmp_path, capfd):
    """Same weights as from a set of only these images; augment.py hands on which they were, classifier.py compares."""
    images, labels, names = data.read_shards(f"{shards}/tiny/train")
    n_train = data.training_count(len(images), 0.1)
    kept = np.concatenate([data.balanced(labels[:n_train], 9, 0), np.arange(n_train, len(images))])
    assert len(set(kept[:9])) == 9 and np.bincount(labels[kept[:9]]).tolist() == [3, 3, 3]
    data.write_shards(f"{tmp_path}/few", images[kept], labels[kept], names)
    few = dict(dataset=f"{tmp_path}/few", val_fraction=0.4)
    for out_dir, changes in (("a", dict(n_real=9)), ("b", few), ("c", dict(n_real=12))):
        status, text = cli(capfd, "train.py", *tiny_flags(shards, f"{tmp_path}/{out_dir}", **changes))
        assert status == 0 and f"{12 if out_dir == 'c' else 9} training and 6 validation images" in text
    a, b, c = (ddpm.load_checkpoint(f"{tmp_path}/{out_dir}/ckpt.pt") for out_dir in "abc")
    assert all(v.equal(b["model"][k]) for k, v in a["model"].items())
    assert not all(v.equal(c["model"][k]) for k, v in a["model"].items())
    resumed = cli(capfd, "train.py", "--init_from=resume", f"--out_dir={tmp_path}/a", "--n_real=12", "--device=cpu")
    assert "val_fraction, n_real or the data has changed" in one_line(resumed)

    assert cli(capfd, "augment.py", *augment_flags(f"{tmp_path}/a", f"{tmp_path}/s"))[0] == 0
    flags = classifier_flags(shards, f"{tmp_path}/mlp", f"{tmp_path}/s", seeds=1)
    said = "the generator was trained on 9 real images, those that n_real=9 takes here"
    text = cli(capfd, "classifier.py", *flags, "--n_real=9")[1]
    assert said in text and text.startswith("9 real and "), text
    manifest = data.read_json(f"{tmp_path}/s/manifest.json")
    manifest["trained_on"]["training"] = data.fingerprint(images[:9])
    data.save_json(f"{tmp_path}/s/manifest.json", manifest)
    assert said.replace("those", "not those") in cli(capfd, "classifier.py", *flags, "--n_real=9")[1]


def test_n_real_says_when_it_started_from_other_weights(shards, trained, tmp_path, capfd):
    """Weights that saw all images do not become those of a few by fine-tuning, nor after a resume."""
    fine_tuned = tiny_flags(shards, f"{tmp_path}/a", n_real=9, max_iters=1, init_from=f"{trained}/ckpt.pt")
    assert cli(capfd, "train.py", *fine_tuned)[0] == 0
    resume = ("--init_from=resume", f"--out_dir={tmp_path}/a", "--max_iters=2", "--device=cpu")
    status, text = cli(capfd, "train.py", *resume, f"--data_dir={shards}")
    assert status == 0, text
    assert cli(capfd, "augment.py", *augment_flags(f"{tmp_path}/a", f"{tmp_path}/s"))[0] == 0
    flags = classifier_flags(shards, f"{tmp_path}/mlp", f"{tmp_path}/s", seeds=1)
    text = cli(capfd, "classifier.py", *flags, "--n_real=9")[1]
    assert "9 real images, those that n_real=9 takes here, and started from weights of an earlier training" in text


def test_n_real_without_labels_takes_the_same_images(shards, tmp_path, capfd):
    found = []
    for conditional in (True, False):
        flags = tiny_flags(shards, f"{tmp_path}/{conditional}", n_real=9, max_iters=1, conditional=conditional)
        assert cli(capfd, "train.py", *flags)[0] == 0
        found.append(ddpm.load_checkpoint(f"{tmp_path}/{conditional}/ckpt.pt")["trained_on"]["training"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "flags,said",
    (
        ("--init_from=resume", "no checkpoint"),
        ("--init_from=resume", "train a model first"),
        ("--init_from=gpt2", "init_from: 'gpt2' is not scratch, resume or a checkpoint"),
        ("--init_from=PRETRAINED --ch=16", "ch: checkpoint 64, flag 16: it cannot change"),
        ("--attn_resolutions=5", "attn_resolutions: (5,), but the levels are 8, 4 wide"),
        ("--seed=-1", "seed: -1 must be in"),
        ("--seed=100000000000000000000", "seed: 100000000000000000000 must be in"),
        (f"--lr=1{'0' * 400}", "is not of type float"),
        (f"--lr={'-' * 5000}1", "is not of type float"),
        (f"--ch_mult={'(' * 5000}", "is not of type tuple"),
        ("--num_res_blocks=100000", "num_res_blocks: 100000 must be in [1, 64]"),
        ("--schedule=linear --timesteps=20000 --beta_end=0.9", "alpha_bar falls to zero"),
        ("--out_dir=", "out_dir is empty"),
        ("--data_dir=FILE", "file is not a folder"),
        ("--grad_accum=3", "not divisible by 1 processes x grad_accum 3"),
        ("--schedule=bad", "schedule: 'bad' is not one of linear"),
        ("--beta_end=1.5", "beta_end: 1.5 must be in [0, 1)"),
        ("--ch_mult=1.5,2", "multiples must be whole numbers"),
        ("--ch_mult=1,1,1,1,1", "is not divisible by 16"),
        ("--dataset=cifar", "did you mean 'cifar10'?"),
        ("--classes=birb", "unknown class 'birb': did you mean 'bird'?"),
        ("--val_fraction=1.0", "val_fraction: 1.0 must be in [0, 1)"),
        ("--device=cuda:99", "device: 'cuda:99' is not available"),
        ("--crop=0", "crop: 0.0 must be in (0, 1]"),
        ("--grad_clip=-1", "grad_clip: -1.0 must be in [0, inf)"),
        ("--sample_interval=-1", "sample_interval: -1 must be in [0, inf)"),
        ("--log_interval=0", "log_interval: 0 must be in [1, inf)"),
        ("--max_iters=0", "max_iters: 0 must be in [1, inf)"),
        ("--lr=-1e-3", "lr: -0.001 must be in (0, inf)"),
        ("--ema_decay=1.5", "ema_decay: 1.5 must be in [0, 1)"),
        ("--lr=1e18 --min_lr=1e18 --max_iters=60 --eval_interval=2", "lower lr"),
        ("--lr=1e18 --min_lr=1e18 --max_iters=60 --eval_interval=2", "last checkpoint: step"),
        ("--init_from=resume --out_dir=TRAINED --ch=16", "ch: checkpoint 8, flag 16"),
        ("--init_from=resume --out_dir=TRAINED --val_fraction=0.2", "not the checkpoint's images: val_fraction"),
    ),
)
def test_train_user_errors(flags, said, shards, trained, tmp_path, capfd):
    base = [] if "TRAINED" in flags or "PRETRAINED" in flags else tiny_flags(shards, str(tmp_path / "out"))
    (tmp_path / "file").write_text("x")
    where = dict(PRETRAINED=f"{HERE}/weights/cifar_small.pt", TRAINED=trained, FILE=f"{tmp_path}/file")
    for name, path in where.items():
        flags = flags.replace(name, path)
    assert said in one_line(cli(capfd, "train.py", *base, *flags.split()))


def test_train_foreign_checkpoints_are_not_resumed(shards, tmp_path, capfd):
    """Every part of a checkpoint left out, or of another type or shape: one line, and the file stays as it is."""
    assert cli(capfd, "train.py", *tiny_flags(shards, str(tmp_path), max_iters=2))[0] == 0
    path = tmp_path / "ckpt.pt"
    whole = ddpm.load_checkpoint(path)
    bad = [(key, {k: v for k, v in whole.items() if k != key}) for key in whole.keys() - {"trained_on"}]
    bad += [(key, whole | {key: value}) for key in whole for value in (5.5, "x", [1], {"a": torch.ones(2)})]
    short = {k: v[:1] for k, v in whole["model"].items()}
    state = {k: {n: v[:1] if v.ndim else v for n, v in s.items()} for k, s in whole["optimizer"]["state"].items()}
    bad += [("model", whole | {"model": short}), ("ema", whole | {"ema": {"updates": 2, "shadow": short}})]
    bad += [("optimizer", whole | {"optimizer": whole["optimizer"] | {"state": state}})]
    for key, content in bad:
        torch.save(content, path)
        before = path.read_bytes()
        result = cli(capfd, "train.py", f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=3")
        if key in ("scaler", "model_args") and key in content:  # not read when a float32 run is resumed
            assert result[0] == 0, result
        else:
            assert "checkpoint" in one_line(result), (key, result)
            assert path.read_bytes() == before


def test_train_fine_tunes_a_model_on_other_classes(shards, trained, tmp_path, capfd):
    """From its averaged weights; the network is the checkpoint's, and other classes get new embeddings."""
    start = ddpm.load_checkpoint(f"{trained}/ckpt.pt")["ema"]["shadow"]
    few = dict(max_iters=1, lr=1e-12, min_lr=1e-12, init_from=f"{trained}/ckpt.pt", dropout=0.0)
    del_keys = ("--ch=", "--ch_mult=", "--num_res_blocks=", "--attn", "--timesteps=", "--beta_end=")
    for classes, kept in (("", True), ("bird,airplane", False)):
        flags = tiny_flags(shards, f"{tmp_path}/{kept}", **few, classes=classes)
        status, text = cli(capfd, "train.py", *[f for f in flags if not f.startswith(del_keys)])
        assert status == 0 and "dropout changes from the checkpoint's 0.1 to 0.0" in text, text
        got = ddpm.load_checkpoint(f"{tmp_path}/{kept}/ckpt.pt")
        assert got["model_args"]["ch"] == 8 and got["step"] == 1
        for key, value in got["model"].items():
            if kept or "condition.label" not in key:
                assert torch.allclose(value, start[key], atol=1e-6), key
    assert got["model"]["net.condition.label.weight"].shape == (3, 32)
    flags = [f for f in flags if not f.startswith(del_keys)]
    assert "image_size: checkpoint 8, flag 16: it cannot" in one_line(cli(capfd, "train.py", *flags, "--image_size=16"))
    data.write_shards(f"{tmp_path}/gray", np.zeros((40, 8, 8, 1), np.uint8), None, [])
    line = one_line(cli(capfd, "train.py", *flags, f"--dataset={tmp_path}/gray", "--classes="))
    assert line.endswith("init_from: a model of 3-channel images")


@pytest.mark.slow
def test_train_a_full_disk_is_one_line_and_the_last_checkpoint_stays(shards, tmp_path):
    """The limit on the size of a file stands for the disk."""
    import resource

    flags, out = tiny_flags(shards, str(tmp_path / "out"), max_iters=2), tmp_path / "out"
    command = [sys.executable, f"{HERE}/train.py", *flags]
    subprocess.run(command, check=True, capture_output=True)
    before = (out / "ckpt.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))  # noqa: E731
    resume = [*command[:2], f"--out_dir={out}", "--init_from=resume"]
    done = subprocess.run([*resume, "--max_iters=4"], preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"cannot write {out}/ckpt.pt: File too large; the file that was there is unchanged" in done.stderr
    assert (out / "ckpt.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    assert subprocess.run([*resume, "--max_iters=4"]).returncode == 0


@pytest.mark.slow
def test_train_output_that_nobody_reads_ends_nothing(shards, tmp_path):
    for name, command in (("pipe", "| head -1"), ("closed", ">&-"), ("full", "> /dev/full")):
        line = [sys.executable, f"{HERE}/train.py", *tiny_flags(shards, str(tmp_path / name))]
        done = subprocess.run(f"set -o pipefail; {' '.join(line)} {command}", shell=True, executable="/bin/bash",
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
        assert ddpm.load_checkpoint(tmp_path / name / "ckpt.pt")["step"] == 6


def test_train_and_augment_lock_their_folders(shards, trained, tmp_path, capfd):
    import fcntl

    for script, flags in (
        ("train.py", tiny_flags(shards, str(tmp_path))),
        ("augment.py", augment_flags(trained, str(tmp_path))),
    ):
        configurator.locked.clear()
        lock = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by another process" in one_line(cli(capfd, script, *flags))
        os.close(lock)
        assert cli(capfd, script, *flags)[0] == 0
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


@pytest.mark.slow
def test_train_torchrun_says_what_is_wrong(shards, trained, tmp_path):
    """A user's error, processes that differ, a script that is not distributed: one line each, of every process."""
    flags = tiny_flags(shards, str(tmp_path / "out"))
    status, text = torchrun(2, "train.py", *flags, "--val_fraction=0.001")
    assert status == 1 and "train.py: val_fraction=0.001 of 60 images leaves none" in text, text
    config = tmp_path / "differ.py"
    config.write_text("import os\nlr = 1e-3 * (1 + int(os.environ['RANK']))\n")
    status, text = torchrun(2, "train.py", *[f for f in flags if "lr=" not in f], str(config))
    assert status == 1 and "train.py: the processes differ in lr" in text, text
    status, text = torchrun(2, "sample.py", f"--out_dir={trained}", "--device=cpu")
    assert status == 1 and "start it with `python sample.py`" in text and not os.path.exists(f"{trained}/sample.png")


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def test_sample_writes_what_it_says(trained, capfd):
    from PIL import Image

    def image(name):
        return np.asarray(Image.open(f"{trained}/{name}").convert("RGB")).astype(int)

    def sample(*args):
        status, text = cli(capfd, "sample.py", f"--out_dir={trained}", "--steps=4", *args)
        assert status == 0, text
        return text

    assert "w=1.8 (guidance_scale=2.8)" in sample()
    default = image("sample.png")
    assert "w=1.8" in sample("--guidance_scale=2.8", "--batch_size=7")
    assert np.abs(image("sample.png") - default).max() <= 2
    sample("--batch_size=1")
    assert np.abs(image("sample.png") - default).max() <= 2
    assert np.abs(image("noise.png") - default).max() > 50
    sample("--seed=18")
    assert np.abs(image("sample.png") - default).max() > 50
    sample("--classes=bird,bird,0", "--num_samples=2", "--gif=True", "--ema=False")
    assert Image.open(f"{trained}/denoising.gif").n_frames == 4
    height = lambda rows: rows * 18 + 2  # noqa: E731
    assert image("sample.png").shape[0] == height(3)
    for rows, n in (("w=-1,0,2,6", 4), ("ema=True,False", 2), ("steps=2,3", 2), ("sampler=ddpm,ddim,dpm++", 3)):
        sample(f"--rows={rows}")
        assert image("compare.png").shape[0] == height(n)


def test_sample_says_after_every_step_how_far_it_is(trained, capfd, monkeypatch):
    shares = []
    monkeypatch.setattr(configurator, "progress", lambda title, share, start: shares.append(share))
    flags = ["--steps=4", "--num_samples=2", "--batch_size=4"]  # 6 images in 2 batches
    assert cli(capfd, "sample.py", f"--out_dir={trained}", *flags)[0] == 0
    assert shares == [k / 8 for k in range(1, 9)]


def test_sample_compares_two_keys_from_the_same_noise(trained, capfd):
    from PIL import Image

    def compare(*flags):
        assert cli(capfd, "sample.py", f"--out_dir={trained}", "--steps=4", "--num_samples=2", *flags)[0] == 0
        return np.asarray(Image.open(f"{trained}/compare.png")).astype(int)

    size, top, gap, columns = 18, 18, 8, 6  # of a tile with its margin; the column titles; between columns; 3 classes
    grid = compare("--rows=seed=3,4,3", "--columns=ema=True,True,False", "--w=1")
    left = grid.shape[1] - 3 * columns * size - 2 * gap - 2

    def cell(i, j):
        x = left + j * (columns * size + gap)
        return grid[top + 2 + i * size : top + (i + 1) * size, x + 2 : x + columns * size]

    assert grid.shape[0] == top + 3 * size + 2 and cell(0, 0).shape == cell(2, 2).shape
    assert np.array_equal(cell(0, 0), cell(2, 0)) and np.array_equal(cell(0, 0), cell(0, 1))  # equal settings
    assert not np.array_equal(cell(0, 0), cell(1, 0)) and not np.array_equal(cell(0, 0), cell(0, 2))
    alone = compare("--columns=ema=False", "--seed=3", "--w=1")  # one cell by itself is the same
    assert np.array_equal(alone[top + 2 : top + size, 2 : columns * size], cell(0, 2))


def test_sample_uses_pretrained_weights_without_a_checkpoint(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = cli(capfd, "sample.py", "--steps=2", "--num_samples=1", "--device=cpu")
    assert status == 0 and "out holds no checkpoint, using the pretrained weights " in text
    assert os.path.exists("out/sample.png")
    for name in os.listdir(f"{HERE}/weights"):
        assert os.path.getsize(f"{HERE}/weights/{name}") <= 8e6
    trained_on = ddpm.load_checkpoint(f"{HERE}/weights/cifar_small.pt")["trained_on"]
    assert trained_on["dataset"] == "cifar10" and len(trained_on["validation"]) == 64
    assert "holds only averaged weights" in one_line(cli(capfd, "sample.py", "--ema=False"))


@pytest.mark.parametrize(
    "flags,said",
    (
        ("--w=1 --guidance_scale=2", "not both"),
        ("--w=nan", "w='nan' is not of type float"),
        ("--w=1e999", "w: inf must be in (-inf, inf)"),
        ("--classes=birt", "unknown class 'birt': did you mean 'bird'?"),
        ("--sampler=euler", "sampler: 'euler' is not one of"),
        ("--steps=21", "steps: 21 must be in [1, 20]"),
        ("--eta=1", "eta=1 is for ddim"),
        ("--variance=beta", "variance=beta for ddpm"),
        ("--sampler=ddim --eta=1.5", "eta: 1.5 must be in [0, 1]"),
        ("--interval=3,1", "interval: (3, 1) must be low,high"),
        ("--device=cuda:x", "'cuda:x' is not available"),
        ("--num_samples=-1", "num_samples: -1 must be in"),
        ("--rows=lr=1,2", "rows=KEY=VALUE,VALUE: 'lr' is not one of w, guidance_scale"),
        ("--rows=steps=3,x", "rows: 'x' is not of type int, which steps is"),
        ("--rows=steps=2,21", "steps: 21 must be in [1, 20]"),
        ("--rows=w=0,1 --gif=True", "gif cannot be combined with rows or columns"),
        ("--rows=w=0,1 --columns=guidance_scale=2,3", "change the same setting"),
        ("--out_dir=none", "no checkpoint"),
        ("--HERE=x", "unknown key 'HERE'"),
    ),
)
def test_sample_user_errors(flags, said, trained, capfd, monkeypatch):
    monkeypatch.setattr(DDPM, "sample", lambda *a, **k: 1 / 0)  # all is checked before anything is sampled
    assert said in one_line(cli(capfd, "sample.py", f"--out_dir={trained}", *flags.split()))


def test_sample_of_a_model_without_a_null_label_and_of_a_damaged_one(shards, tmp_path, capfd):
    flags = tiny_flags(shards, str(tmp_path / "u"), p_uncond=0.0, max_iters=1)
    assert cli(capfd, "train.py", *flags)[0] == 0
    line = one_line(cli(capfd, "sample.py", f"--out_dir={tmp_path}/u", "--w=1.8"))
    assert "trained at p_uncond=0" in line
    status, text = cli(capfd, "sample.py", f"--out_dir={tmp_path}/u", "--steps=2")
    assert status == 0 and "w=0" in text
    with open(f"{tmp_path}/u/ckpt.pt", "r+b") as f:
        f.truncate(2000)
    assert "damaged" in one_line(cli(capfd, "sample.py", f"--out_dir={tmp_path}/u"))


# ---------------------------------------------------------------------------------------------------------------------
# augment.py


def test_augment_writes_balanced_shards_and_says_how(trained, synthetic):
    images, labels, names = data.load(synthetic)
    assert images.shape == (21, 8, 8, 3) and images.dtype == np.uint8 and names == ["airplane", "automobile", "bird"]
    assert np.bincount(labels).tolist() == [7, 7, 7] and labels[:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert len(contents(synthetic)) == 2 * 4 and len(np.unique(images, axis=0)) == 21
    manifest = data.read_json(f"{synthetic}/manifest.json")
    expected = dict(w=1.0, interval=[0.25, 4.0], sampler="dpm++", steps=3, seed=0, per_class=7, step=6)
    assert expected.items() <= manifest["settings"].items() and manifest["complete"] and manifest["seconds"] > 0
    assert manifest["counts"] == {"airplane": 7, "automobile": 7, "bird": 7} and manifest["images"] == 21
    assert manifest["trained_on"]["val_fraction"] == 0.1
    model = ddpm.load_model(f"{trained}/ckpt.pt")[0]
    how = dict(sampler="dpm++", steps=3, interval=(0.25, 4.0))
    x, unguided = (to_uint8(model.sample(torch.arange(3), w, 0, [18, 19, 20], **how)).numpy() for w in (1.0, 0.0))
    assert not np.array_equal(x, unguided)
    assert np.abs(images[18:].astype(int) - x).max() <= 1  # image k of the seed
    from PIL import Image

    assert Image.open(f"{synthetic}/preview.png").height == 3 * 18 + 2  # a row for each class


def test_augment_continues_and_grows_to_the_same_bytes(trained, synthetic, tmp_path, capfd):
    folder = str(tmp_path / "s")
    assert cli(capfd, "augment.py", *augment_flags(trained, folder, per_class=3))[0] == 0
    status, text = cli(capfd, "augment.py", *augment_flags(trained, folder))
    assert status == 0 and "3 of 4 shards" in text  # the first was whole, the second was cut short
    assert contents(folder) == contents(synthetic)
    os.remove(f"{folder}/labels_00002.npy")
    status, text = cli(capfd, "augment.py", *augment_flags(trained, folder))
    assert status == 0 and "1 of 4 shards" in text and contents(folder) == contents(synthetic)
    written = os.stat(f"{folder}/images_00000.npy").st_mtime_ns
    status, text = cli(capfd, "augment.py", *augment_flags(trained, folder))
    assert status == 0 and "0 of 4 shards" in text and os.stat(f"{folder}/images_00000.npy").st_mtime_ns == written


def test_augment_two_gloo_processes_write_the_bytes_of_one(trained, synthetic, tmp_path):
    status, text = torchrun(2, "augment.py", *augment_flags(trained, str(tmp_path / "s")))
    assert status == 0, text
    assert contents(tmp_path / "s") == contents(synthetic)
    assert data.load(str(tmp_path / "s"))[2] == ["airplane", "automobile", "bird"]


def test_augment_of_a_class_subset_and_of_an_unconditional_model(trained, shards, tmp_path, capfd):
    assert cli(capfd, "augment.py", *augment_flags(trained, f"{tmp_path}/s", classes="bird,airplane"))[0] == 0
    images, labels, names = data.load(f"{tmp_path}/s")
    assert np.bincount(labels).tolist() == [7, 0, 7] and names == ["airplane", "automobile", "bird"]
    flags = tiny_flags(shards, f"{tmp_path}/u", conditional=False, max_iters=1)
    assert cli(capfd, "train.py", *flags)[0] == 0
    assert cli(capfd, "augment.py", *augment_flags(f"{tmp_path}/u", ""))[0] == 0
    images, labels, names = data.load(f"{tmp_path}/u/synthetic")
    assert images.shape == (7, 8, 8, 3) and labels is None and names == []
    assert cli(capfd, "sample.py", f"--out_dir={tmp_path}/u", "--num_samples=12", "--device=cpu")[0] == 0
    from PIL import Image

    assert Image.open(f"{tmp_path}/u/sample.png").size == (8 * 18 + 2, 2 * 18 + 2)  # no classes: rows of eight


@pytest.mark.parametrize(
    "flags,said",
    (
        ("--w=1.8", "was made with w=1.0, not 1.8: use --overwrite=True"),
        ("--interval=1,2", "was made with interval=[0.25, 4.0], not [1, 2]"),
        ("--ema=False", "was made with weights="),
        ("--per_class=2", "per_class=7, not 2"),
        ("--per_class=0", "per_class: 0 must be in [1, inf)"),
        ("--w=1 --guidance_scale=2", "not both"),
        ("--classes=bird,bird", "names a class twice"),
        ("--classes=,", "or none"),
        ("--overwrite=True --interval=2,1", "interval: [2, 1] must be low,high"),
        ("--overwrite=True --sampler=euler", "sampler: 'euler' is not one of"),
        ("--overwrite=True --steps=1000", "steps: 1000 must be in"),
        ("--overwrite=True --eta=1", "eta=1 is for ddim"),
        ("--overwrite=True --variance=beta", "variance=beta for ddpm"),
        ("--hidden=1", "unknown key 'hidden': it is a key of classifier.py"),
    ),
)
def test_augment_user_errors(flags, said, trained, synthetic, capfd):
    before = contents(synthetic)
    assert said in one_line(cli(capfd, "augment.py", *augment_flags(trained, synthetic), *flags.split()))
    assert contents(synthetic) == before  # nothing was deleted or changed


def test_augment_refuses_foreign_and_damaged_shards(trained, synthetic, tmp_path, capfd, monkeypatch):
    folder = str(tmp_path / "s")
    shutil.copytree(synthetic, folder)

    def refused(**changes):
        return one_line(cli(capfd, "augment.py", *augment_flags(trained, folder, **changes)))

    (tmp_path / "s" / "images_00099.npy").write_bytes((tmp_path / "s" / "images_00000.npy").read_bytes())
    assert "images_00099.npy is not part of this set" in refused()
    os.remove(f"{folder}/images_00099.npy")
    path = f"{folder}/images_00001.npy"
    with open(path, "r+b") as f:
        f.truncate(300)
    assert "images_00001.npy is not the file listed in manifest.json: it was truncated or changed" in refused()
    manifest = data.read_json(f"{folder}/manifest.json")
    data.save_json(f"{folder}/manifest.json", manifest | {"complete": False})  # as before the end of a run
    assert "images_00001.npy is damaged" in refused()
    assert cli(capfd, "augment.py", *augment_flags(trained, folder, w=1.8, overwrite=True))[0] == 0
    assert contents(folder).keys() == contents(synthetic).keys() and contents(folder) != contents(synthetic)
    data.write_shards(str(tmp_path / "mine"), np.zeros((3, 8, 8, 3)), np.zeros(3), ["a"])
    folder = str(tmp_path / "mine")
    assert "holds shards that were not written by augment.py" in refused()
    folder = str(tmp_path / "full")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert "the disk has 0 MB free" in refused()


@pytest.mark.slow
@pytest.mark.parametrize("change", ({}, {"overwrite": True, "seed": 5}))
def test_augment_cut_off_between_any_two_writes(change, trained, synthetic, tmp_path, capfd, monkeypatch):
    """Stops before the N-th renaming or removal, for every N: what is there is refused or right; a rerun ends it."""
    after = str(tmp_path / "after")
    assert cli(capfd, "augment.py", *augment_flags(trained, after, **change))[0] == 0
    before, after, n = contents(synthetic), contents(after), 0

    class CutOff(BaseException):
        pass

    def counted(function):
        def wrapped(*args):
            nonlocal left
            left -= 1
            if left < 0:
                raise CutOff
            return function(*args)

        return wrapped

    ended = False
    while not ended:
        folder, left = str(tmp_path / str(n)), n
        shutil.copytree(synthetic, folder) if change else os.makedirs(folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(os, "remove", counted(os.remove))
            ended = cli(capfd, "augment.py", *augment_flags(trained, folder, **change))[0] == 0
        try:
            data.load(folder)
            assert contents(folder) in (before, after)
        except UserError:
            assert not ended
        assert cli(capfd, "augment.py", *augment_flags(trained, folder, **change))[0] == 0
        data.load(folder)
        assert contents(folder) == after
        n += 1
    assert n >= 12  # 4 shards of two files, classes.json, and the manifest at the start and the end


@pytest.mark.slow
def test_augment_killed_50_times_leaves_no_wrong_shard(trained, tmp_path):
    """What is there after each kill is right, and the end is that of an undisturbed run."""
    flags = lambda name: augment_flags(trained, f"{tmp_path}/{name}", per_class=800)  # noqa: E731
    subprocess.run([sys.executable, f"{HERE}/augment.py", *flags("whole")], check=True, capture_output=True)
    whole, partial = contents(tmp_path / "whole"), []
    assert len(whole) == 2 * 400

    def check():
        there = contents(tmp_path / "cut")
        assert all(there[name] == whole[name] for name in there)
        partial.append(0 < len(there) < len(whole))
        if len(there) == len(whole):
            shutil.rmtree(tmp_path / "cut")  # from the start again

    kill_at_random(50, 0.3, lambda: ["augment.py", *flags("cut")], check)
    print(f"\naugment.py: 50 kills, {sum(partial)} with part of the set written")
    assert sum(partial) >= 30
    subprocess.run([sys.executable, f"{HERE}/augment.py", *flags("cut")], check=True, capture_output=True)
    assert contents(tmp_path / "cut") == whole
    assert np.bincount(data.load(f"{tmp_path}/cut")[1]).tolist() == [800] * 3


@pytest.mark.parametrize("what", ("truncated", "missing", "foreign", "mislabelled", "renamed classes", "cut off"))
def test_augment_damaged_sets_are_one_line_that_names_the_file(what, synthetic, shards, tmp_path, capfd):
    folder = f"{tmp_path}/s"
    shutil.copytree(synthetic, folder)
    path, labels = f"{folder}/images_00001.npy", f"{folder}/labels_00001.npy"
    if what == "truncated":
        with open(path, "r+b") as f:
            f.truncate(os.path.getsize(path) - 1)
    elif what == "renamed classes":
        path = f"{folder}/classes.json"
        data.save_json(path, ["bird", "automobile", "airplane"])
    elif what == "missing":
        os.remove(path)
    elif what == "foreign":
        path = f"{folder}/images_extra.npy"
        shutil.copy(f"{folder}/images_00001.npy", path)
    elif what == "mislabelled":
        path = labels
        np.save(labels, np.load(labels)[::-1])
    else:
        path, manifest = folder, data.read_json(f"{folder}/manifest.json")
        data.save_json(f"{folder}/manifest.json", manifest | {"complete": False})
    flags = [f"--dataset={shards}/tiny", f"--synthetic_dir={folder}", f"--out_dir={tmp_path}", "--device=cpu"]
    assert path in one_line(cli(capfd, "classifier.py", *flags))


@pytest.mark.slow
def test_augment_memory_does_not_grow_with_the_number_of_images(tmp_path):
    model = DDPM(DDPMConfig(image_size=64, num_classes=10, arch="cnn", ch=4, ch_mult=(1,), timesteps=2, beta_end=0.999))
    os.makedirs(tmp_path / "out")
    write_checkpoint(f"{tmp_path}/out/ckpt.pt", model)
    peak = {}
    for n in (50, 1000):  # 6 and 123 MB of images
        flags = augment_flags(
            f"{tmp_path}/out", f"{tmp_path}/{n}", per_class=n, shard_size=100, batch_size=100, steps=1
        )
        peak[n] = peak_memory("augment.py", *flags)
    print("\npeak memory of augment.py by images per class (64x64):", {n: f"{mb:.0f} MB" for n, mb in peak.items()})
    assert peak[1000] - peak[50] < 60


# ---------------------------------------------------------------------------------------------------------------------
# classifier.py


@pytest.mark.parametrize("B,sizes", ((1, (3, 2)), (4, (5, 7, 3)), (7, (6, 4, 9, 2)), (2, (4, 1, 5))))
def test_classifier_gradients_equal_autograd_and_finite_differences(double, B, sizes):
    model, loss, generator = classifier.MLP(sizes), classifier.SoftmaxCrossEntropy(), torch.Generator().manual_seed(1)
    for p in model.weights():
        p.normal_(generator=generator)
    x = torch.randn(B, sizes[0])
    y = torch.arange(B) % sizes[-1]
    y[-1] = sizes[-1] - 1  # labels at both ends
    value = loss.forward(model.forward(x, training=True), y)
    model.backward(loss.backward())
    weights = [p.clone().requires_grad_() for p in model.weights()]
    h = x
    for i, (W, b) in enumerate(zip(weights[::2], weights[1::2])):
        h = (F.relu(h) if i else h) @ W + b
    expected = F.cross_entropy(h, y)
    expected.backward()
    assert torch.allclose(value, expected.detach(), rtol=1e-12, atol=1e-12)
    for p, g, w in zip(model.weights(), model.gradients(), weights):
        assert torch.allclose(g, w.grad, rtol=1e-10, atol=1e-10)
        numeric = finite_difference(lambda: loss.forward(model.forward(x), y), p)
        assert torch.allclose(g, numeric, rtol=1e-5, atol=1e-7)


def test_classifier_every_layer_returns_the_gradient_of_its_input(double):
    x, linear, dropout = torch.randn(4, 5), classifier.Linear(5, 3, dtype=torch.float64), classifier.Dropout(0.5)
    layers = [
        (linear, lambda x: x @ linear.W + linear.b),
        (classifier.ReLU(), F.relu),
        (dropout, lambda x: x * dropout.mask),
    ]
    for layer, function in layers:
        y = layer.forward(x, training=True)
        leaf = x.clone().requires_grad_()
        expected, dy = function(leaf), torch.randn(y.shape)
        expected.backward(dy)
        assert torch.allclose(y, expected.detach(), atol=1e-12)
        assert torch.allclose(layer.backward(dy), leaf.grad, atol=1e-12), layer


@pytest.mark.parametrize("scale", (0.0, 1.0, 1e4))
def test_classifier_softmax_cross_entropy_of_extreme_logits(double, scale):
    loss, signs = classifier.SoftmaxCrossEntropy(), torch.tensor([[1.0, -1, 0], [-1, 1, 0.5], [0, 0, 0]])
    for y in (torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2]), torch.tensor([2, 2, 0])):
        logits = (scale * signs).requires_grad_()
        F.cross_entropy(logits, y).backward()
        value = loss.forward(logits.detach(), y)
        assert value.isfinite() and torch.allclose(value, F.cross_entropy(logits, y).detach(), rtol=1e-12)
        assert torch.allclose(loss.backward(), logits.grad, atol=1e-10)
    one = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert loss.forward(one, torch.tensor([0, 1])) == 0 and not loss.backward().any()  # a perfect prediction


def test_classifier_weights_start_with_variance_2_over_n():
    layer = classifier.Linear(500, 400, torch.Generator().manual_seed(0))
    assert layer.W.var().item() == pytest.approx(2 / 500, rel=0.02) and not layer.b.any()


def test_classifier_dropout():
    layer, x = classifier.Dropout(0.2, torch.Generator().manual_seed(0)), torch.ones(400, 257)
    assert layer.forward(x) is x and layer.backward(x) is x  # nothing outside training
    y = layer.forward(x, training=True)
    share = (y == 0).float().mean().item()
    assert abs(share - 51 / 256) < 4 * math.sqrt(0.2 * 0.8 / x.numel()) and abs(y.mean().item() - 1) < 0.01
    assert y.max().item() == pytest.approx(256 / (256 - 51))  # 51 of 256 values of a byte are dropped
    assert not torch.equal(y, layer.forward(x, training=True))
    rows = (y == 0).float().mean(1)
    assert rows.min() > 0.05 and rows.max() < 0.4  # a coin for each value


@pytest.mark.parametrize("kind", ("sgd", "adamw"))
def test_classifier_optimizers_equal_torchs(double, kind):
    model = classifier.MLP((3, 4, 2))
    ours, theirs = classifier.OPTIMIZERS[kind](model, weight_decay=0.1), [p.clone() for p in model.weights()]
    how = dict(momentum=0.9) if kind == "sgd" else dict(weight_decay=0.1)
    optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind](theirs, lr=0.01, **how)
    for k in range(5):
        for layer in model.linears:
            layer.dW = torch.sin(torch.arange(layer.W.numel()) + k + 0.0).view(layer.W.shape)
            layer.db = torch.cos(torch.arange(len(layer.b)) + k + 0.0)
        for p, g in zip(theirs, model.gradients()):
            p.grad = g.clone()
            if kind == "sgd":  # torch's SGD couples its decay with the momentum; ours is AdamW's
                p.mul_(1 - 0.01 * 0.1)
        optimizer.step()
        ours.step(0.01)
    assert all(torch.allclose(p, q, rtol=1e-10, atol=1e-12) for p, q in zip(model.weights(), theirs))


def test_classifier_trains_with_autograd_off(monkeypatch):
    images, labels, _ = data.make_shapes(300, seed=0)
    labels, seen = labels.astype(np.int64), []
    forward = classifier.Linear.forward
    monkeypatch.setattr(classifier.Linear, "forward", lambda *a: seen.append(torch.is_grad_enabled()) or forward(*a))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("autograd was used"))
    with torch.enable_grad():
        model, _ = classifier.train(images, labels, images, labels, 10, 0, classifier_settings())
    assert seen and not any(seen)
    assert not any(p.requires_grad or p.grad_fn for p in model.weights())


def test_classifier_learns_and_is_a_function_of_the_seed():
    rng, labels = np.random.default_rng(0), np.arange(1500) % 3
    images = rng.integers(0, 200, (1500, 8, 8, 3)) + 12 * labels[:, None, None, None]  # brighter by class
    images = images.astype(np.uint8)
    val = images[1000:], labels[1000:]
    settings = classifier_settings(max_iters=200, batch_size=50, eval_interval=50)
    train = lambda seed=0, **more: classifier.train(images[:1000], labels[:1000], *val, 3, seed, settings | more)  # noqa: E731
    model, best = train()
    accuracy = (classifier.predict(model, val[0], False, "cpu").numpy() == val[1]).mean()
    assert accuracy == pytest.approx(best["val"], abs=1e-6) and accuracy > 0.6
    assert same(train()[0].weights(), model.weights())  # a function of the seed
    assert not same(train(seed=1)[0].weights(), model.weights())
    assert train(gray=True)[0].layers[0].W.shape[0] == 64
    for more in ({"gray": True}, {"dtype": torch.bfloat16}, {"optimizer": "sgd", "lr": 0.01}, {"hidden": ()}):
        assert train(**more)[1]["val"] > 0.5, more


def test_classifier_keeps_the_best_validation(monkeypatch):
    """Validation goes up, then down: the weights and the number of the best update come back."""
    images, labels, seen = np.zeros((30, 4, 4, 3), np.uint8), np.arange(30) % 3, []
    right = iter((10, 25, 20))

    def predict(model, *_):
        seen.append([p.clone() for p in model.weights()])
        wrong = torch.from_numpy(labels.copy())
        wrong[next(right) :] = -1
        return wrong

    monkeypatch.setattr(classifier, "predict", predict)
    model, best = classifier.train(images, labels, images, labels, 3, 0, classifier_settings())
    assert best["step"] == 20 and best["val"] == pytest.approx(25 / 30)
    assert same(model.weights(), seen[1]) and not same(seen[1], seen[2])


def test_classifier_test_images_choose_nothing(shards, tmp_path, capfd):
    found = []
    for name in ("a", "b"):  # two data sets that differ in their test images alone
        shutil.copytree(f"{shards}/tiny", tmp_path / name)
        if name == "b":
            images, labels, names = data.read_shards(f"{tmp_path}/b/test")
            data.write_shards(f"{tmp_path}/b/test", images[::-1], labels, names)
        flags = classifier_flags(str(tmp_path), str(tmp_path / name), "", dataset=f"{tmp_path}/{name}", arms="real")
        assert cli(capfd, "classifier.py", *flags)[0] == 0
        found.append(data.read_json(f"{tmp_path}/{name}/classifier.json")["runs"])
    for a, b in zip(*found):
        assert (a["step"], a["val"]) == (b["step"], b["val"]) and a["confusion"] != b["confusion"]


def test_classifier_arms_get_equal_weights_and_updates(monkeypatch):
    images = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
    real = images[:30], np.arange(30) % 3
    synthetic = images[30:], np.arange(30) % 3
    sizes = {}
    for arm in classifier.ARMS:
        x, y = classifier.arm_images(arm, real, synthetic, 0, 0, seed=0)
        sizes[arm] = len(x)
        assert np.array_equal(x[:, 0, 0, 0] % 3, y)  # images keep their labels
        assert (x[:, 0, 0, 0] >= 30).any() == ("synthetic" in arm) and (x[:, 0, 0, 0] < 30).any() == ("real" in arm)
    assert sizes == {"real": 30, "synthetic": 30, "real+synthetic": 60, "real+real": 60}
    x, y = classifier.arm_images("real+synthetic", real, synthetic, 9, 6, seed=1)
    assert np.bincount(y[:9]).tolist() == [3, 3, 3] and np.bincount(y[9:]).tolist() == [2, 2, 2]
    assert len(set(x[:, 0, 0, 0])) == 15
    updates, kept, step = [], [], classifier.AdamW.step
    monkeypatch.setattr(classifier.AdamW, "step", lambda self, lr: updates.append(lr) or step(self, lr))
    monkeypatch.setattr(classifier.AdamW, "__init__", keep_start(classifier.AdamW.__init__, kept))
    for arm in classifier.ARMS:
        images = classifier.arm_images(arm, real, synthetic, 0, 0, seed=0)
        classifier.train(*images, *real, 3, 0, classifier_settings())
    assert all(same(kept[0], k) for k in kept) and len(kept) == 4
    assert len(updates) == 4 * 30 and updates[:30] == updates[30:60]


def test_classifier_statistics_against_scipy():
    stats = pytest.importorskip("scipy.stats")  # comes with the extra `flowers`
    for df in range(1, 31):
        assert classifier.T_97_5[df - 1] == pytest.approx(stats.t.ppf(0.975, df), abs=6e-4)
    mean, error, half = classifier.mean_and_error([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, error) == (3, pytest.approx(math.sqrt(0.5))) and half == pytest.approx(2.776 * error, rel=1e-3)
    assert classifier.mean_and_error([1.0]) == (1.0, None, None)
    assert classifier.mean_and_error([1.0, 2.0] * 20)[2] == pytest.approx(1.96 * 0.5064 / 40**0.5, rel=1e-3)


def test_classifier_verdict_says_what_the_numbers_say():
    def runs(*tests, n_real=0):
        right = [round(100 * t) for t in tests]
        return [dict(test=t, n_real=n_real, confusion=[[k, 100 - k], [0, 100]]) for t, k in zip(tests, right)]

    def verdict(synthetic, control=None):
        arms = {"real": runs(0.50, 0.51, 0.52)[: len(synthetic)], "real+synthetic": runs(*synthetic)}
        return classifier.verdict(arms | ({"real+real": runs(*control)} if control else {}), ["cat", "dog"])

    text = verdict((0.60, 0.61, 0.63))
    assert "real+synthetic minus real: +10.33 points" in text and "Synthetic data helped." in text
    assert "got better (95% each): cat +10.3." in text and "got worse (95% each): none." in text
    text = verdict((0.40, 0.41, 0.43))
    assert "-9.67 points" in text and "Synthetic data hurt." in text and "got worse (95% each): cat -9.7." in text
    text = verdict((0.40, 0.61, 0.53))
    assert "No effect was shown." in text and "helped" not in text and "hurt" not in text
    text = verdict((0.60,))
    assert "One seed cannot tell" in text and "interval" not in text and "95%" not in text
    text = verdict((0.60, 0.61, 0.63), (0.60, 0.61, 0.62))  # the control gains as much
    assert "No effect was shown in both comparisons." in text and "real+synthetic minus real+real: +0.33 points" in text
    assert "helped" in verdict((0.60, 0.61, 0.63), (0.51, 0.50, 0.52))
    assert classifier.verdict({"real": runs(0.5)}, ["cat", "dog"]) == ""
    assert "another generator or other test images were not tried" in text
    few = {arm: runs(0.5, 0.6, n_real=9) for arm in ("real", "real+synthetic")}
    assert "another generator, other real images or other test images" in classifier.verdict(few, ["cat", "dog"])


def test_classifier_comparison_writes_what_it_says(shards, synthetic, tmp_path, capfd):
    status, text = cli(capfd, "classifier.py", *classifier_flags(shards, str(tmp_path), synthetic))
    assert status == 0, text
    found = data.read_json(f"{tmp_path}/classifier.json")
    assert [(r["arm"], r["seed"]) for r in found["runs"]] == [(a, k) for k in (0, 1) for a in classifier.ARMS]
    for run in found["runs"]:
        confusion = np.array(run["confusion"])
        assert confusion.sum() == 60 and run["test"] == pytest.approx(np.trace(confusion) / 60)
        assert run["step"] in (3, 6) and run["images"] == {"real": 54, "synthetic": 21}.get(run["arm"], 75)
    assert found["verdict"] in text and "2 seeds" in found["verdict"]
    assert found["synthetic"]["settings"]["w"] == 1 and "±" in text and "note:" not in text
    assert text.count("minus real by class") == 3
    from PIL import Image

    assert Image.open(f"{tmp_path}/confusion.png").width > 4 * 300


def test_classifier_table_of_amounts(shards, synthetic, tmp_path, capfd):
    flags = classifier_flags(shards, str(tmp_path), synthetic, amounts="9,54,60", ratios="0.5,2")
    status, text = cli(capfd, "classifier.py", *flags)
    assert status == 0, text
    runs = data.read_json(f"{tmp_path}/classifier_amounts.json")["runs"]
    cells = [(r["n_real"], r["n_synthetic"]) for r in runs[::2]]
    assert cells == [(9, 0), (9, 4), (9, 18), (54, 0)]
    assert "not run, it takes 1 to 21 synthetic images" in text and text.count("95% interval") == 2
    assert os.path.exists(f"{tmp_path}/confusion_amounts.png") and not os.path.exists(f"{tmp_path}/confusion.png")


@pytest.mark.parametrize(
    "flags,said",
    (
        ("--synthetic_dir=none", "make them with `python augment.py`"),
        ("--arms=fake", "arms: 'fake' is not one of real, real+synthetic"),
        ("--arms=real,real", "names one twice"),
        ("--optimizer=lion", "optimizer: 'lion' is not one of sgd, adamw"),
        ("--dtype=float16", "dtype: 'float16' is not one of"),
        ("--seeds=0", "seeds: 0 must be in [1, inf)"),
        ("--seed=-1", "seed: -1 must be in [0, 4294967296)"),
        ("--val_fraction=0.0", "val_fraction: 0.0 must be in (0, 1)"),
        ("--val_fraction=0.01", "leaves none"),
        ("--hidden=0.5", "hidden: 0.5 must be a whole number"),
        ("--hidden=0", "hidden: 0 must be in (0, inf)"),
        ("--n_real=100", "100 images requested, only 54 available"),
        ("--lr=1e30 --arms=real", "the weights are not finite at update"),
        ("--out_dir=x --per_class=1", "unknown key 'per_class': it is a key of augment.py, evaluate.py"),
        ("--dataset=CIFAR --classes=bird --val_fraction=0.5", "images are 8x8, expected squares of 32"),
    ),
)
def test_classifier_user_errors(flags, said, shards, synthetic, tmp_path, capfd):
    flags = flags.replace("CIFAR", f"{shards}/cifar10").split()
    assert said in one_line(cli(capfd, "classifier.py", *classifier_flags(shards, str(tmp_path), synthetic), *flags))


def test_classifier_notes_validation_images_that_the_generator_saw(shards, synthetic, tmp_path, capfd):
    flags = classifier_flags(shards, str(tmp_path), synthetic, val_fraction=0.3, seeds=1)
    assert (
        "note: the generator may have been trained on the validation images" in cli(capfd, "classifier.py", *flags)[1]
    )


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py


def test_evaluate_distances_of_known_sets():
    """Against the formulas in NumPy, and sets whose distance is known."""
    X, Y = feature_sets()
    A, B = X.astype(np.float64), Y.astype(np.float64)
    S, T = np.cov(A, rowvar=False), np.cov(B, rowvar=False)
    values, vectors = np.linalg.eigh(S)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ T @ root).clip(min=0)).sum()
    fd = np.square(A.mean(0) - B.mean(0)).sum() + np.trace(S) + np.trace(T) - 2 * cross
    assert evaluate.frechet_distance(X, Y) == pytest.approx(fd, rel=1e-6)
    assert (
        evaluate.frechet_distance(Y, X) == pytest.approx(fd, rel=1e-6) and abs(evaluate.frechet_distance(X, X)) < 1e-6
    )
    assert evaluate.frechet_distance(X, 2 * X + 1) == pytest.approx(  # |mu + 1|^2 + sum of (2s - s)^2
        np.square(A.mean(0) + 1).sum() + np.trace(S), rel=1e-6
    )
    K = lambda P, Q: (P @ Q.T / 12 + 1) ** 3  # noqa: E731
    mean_off_diagonal = lambda M: (M.sum() - np.trace(M)) / (len(M) * (len(M) - 1))  # noqa: E731
    rng = np.random.default_rng(0)
    halves = zip(*(np.array_split(rng.permutation(70), 2) for _ in range(2)))
    kd = [sum(mean_off_diagonal(K(P, P)) for P in (A[i], B[j])) - 2 * K(A[i], B[j]).mean() for i, j in halves]
    found = evaluate.kernel_distance(X[:70], Y, parts=2)
    assert found == (pytest.approx(np.mean(kd), rel=1e-6), pytest.approx(np.std(kd, ddof=1) / 2**0.5, rel=1e-6))


def test_evaluate_precision_and_recall():
    """Kynkäänniemi et al. 2019: the share of one set within a ball, to the third neighbour, of the other."""
    X, Y = feature_sets()

    def covered(A, B):  # the share of A in the balls around B
        radius = np.sort(np.linalg.norm(B[:, None] - B[None], axis=-1), axis=1)[:, 3]
        return (np.linalg.norm(A[:, None] - B[None], axis=-1) <= radius).any(1).mean()

    found, back = evaluate.scores(X, Y), evaluate.scores(Y, X)
    assert found["precision"] == pytest.approx(covered(X, Y), abs=1e-6)
    assert found["recall"] == pytest.approx(covered(Y, X), abs=1e-6) and 0 < found["recall"] < 1
    assert (back["precision"], back["recall"]) == (found["recall"], found["precision"])


def test_evaluate_kernel_distance_is_unbiased_and_its_error_is_right():
    rng, values, errors = np.random.default_rng(0), [], []
    for _ in range(60):
        X, Y = (rng.normal(0, 1, (100, 4)).astype(np.float32) for _ in range(2))
        value, error = evaluate.kernel_distance(X, Y, parts=5)
        values.append(value)
        errors.append(error)
    assert min(values) < 0 < max(values) and abs(np.mean(values)) < 4 * np.std(values) / 60**0.5
    assert 0.6 < np.mean(errors) / np.std(values) < 1.6


def test_evaluate_nearest_neighbours():
    X, Y = feature_sets(n=1100)  # more than one block
    distances, indices = evaluate.nearest(X, Y)
    table = np.linalg.norm(X[:, None] - Y[None], axis=-1)
    assert np.array_equal(indices.numpy(), table.argmin(1)) and np.allclose(distances.numpy(), table.min(1), atol=1e-4)


def test_evaluate_error_of_the_memorised_share_accounts_for_hubs():
    """Over random halves of one pool, with samples that crowd around a few of its images."""
    rng, shares, errors = np.random.default_rng(0), [], []
    pool = rng.normal(size=(100, 6)).astype(np.float32)
    X = (pool[:8].repeat(50, axis=0) + 0.1 * rng.normal(size=(400, 6))).astype(np.float32)
    for _ in range(200):
        a, b = np.array_split(pool[rng.permutation(100)], 2)
        share, error = evaluate.share_nearer(evaluate.nearest(X, a), evaluate.nearest(X, b), 50)
        shares.append(share)
        errors.append(error)
    assert np.std(shares) == pytest.approx(np.mean(errors), rel=0.2)
    assert abs(np.mean(shares) - 0.5) < 4 * np.mean(errors) / 200**0.5
    assert np.mean(errors) > 5 * 0.5 / 400**0.5  # than that of coin tosses
    every = evaluate.share_nearer(evaluate.nearest(pool, a), evaluate.nearest(pool, b), 50)
    assert every == pytest.approx((0.5, 0))  # one copy of each: always half of them
    tie = evaluate.nearest(pool[:1], pool)
    assert evaluate.share_nearer(tie, tie, 100)[0] == 0.5


def test_evaluate_features_are_cached_by_content(tmp_path):
    class Network:
        d, key, calls = 3, "net-1234", 0

        def __call__(self, images):
            self.calls += 1
            return images.reshape(len(images), -1)[:, :3].astype(np.float32)

    def features(images):
        return evaluate.features_of(network, images, "reference", f"{tmp_path}/cifar10-train")

    network, images = Network(), np.arange(5 * 48, dtype=np.uint8).reshape(5, 4, 4, 3)
    first = features(images)
    assert np.array_equal(first, images.reshape(5, -1)[:, :3]) and np.array_equal(features(images), first)
    assert network.calls == 1
    features(images + 1)
    network.key = "net-5678"
    features(images)
    assert network.calls == 3
    assert all(name.startswith("cifar10-train-5-net-") for name in os.listdir(tmp_path))
    for path in tmp_path.glob("*net-5678*"):
        path.write_bytes(b"cut off")
    with pytest.raises(UserError, match="damaged"):
        features(images)


def test_evaluate_says_what_it_compares(capfd, real_shapes):
    flags = (f"--samples={real_shapes}/copied", "--per_class=True")
    status, text = evaluation(capfd, real_shapes, *flags)
    assert status == 0, text
    for said in ("EfficientNet-Lite0, 1280 features", "resized to 32", "100 images of", "train split", "real: test"):
        assert said in text, said
    assert "refused" in text and "FID" not in text
    result = data.read_json(f"{real_shapes}/out/evaluate.json")
    scores = result["scores"]
    assert scores["samples"]["fd"] is None and scores["samples"]["n"] == 100
    assert abs(scores["samples"]["kd"]) < 5 * scores["samples"]["kd_error"]  # the same images, in part
    assert len(scores) == 2 and "ring: fewer than 20 images in a set" in text
    found = result["memorisation"]
    assert found["share"] > 0.55 and (found["train"], found["of"], found["test"]) == (100, 300, 100)
    assert "every sample a copy: 67%" in text
    assert all(math.isfinite(s["kd"]) and math.isfinite(s["kd_error"]) for s in scores.values())
    assert list(pathlib.Path(f"{real_shapes}/kept").glob("real-100-lite0-32-*.npy"))


def test_evaluate_sees_damage(capfd, real_shapes, tmp_path):
    images, labels, names = data.load(f"{real_shapes}/real/test")
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 30, images.shape), 0, 255)
    data.write_shards(f"{tmp_path}/noisy", noisy, labels, names)
    status, text = evaluation(capfd, real_shapes, f"--samples={tmp_path}/noisy", "--n=300")
    assert status == 0, text
    samples, real = data.read_json(f"{real_shapes}/out/evaluate.json")["scores"].values()
    assert samples["kd"] > real["kd"] + 5 * real["kd_error"]


def test_evaluate_compares_a_generator_of_few_images_with_those_it_saw(capfd, real_shapes, tmp_path):
    images, labels, names = data.load(f"{real_shapes}/real/train")
    index = data.balanced(labels[:270], 50, 0)
    data.write_shards(f"{tmp_path}/samples", images[index], labels[index], names)
    shards = {f.name: data.file_hash(f) for f in (tmp_path / "samples").glob("*.npy")}
    manifest = dict(complete=True, settings={}, shards=shards)
    trained_on = dict(val_fraction=0.1, n_real=50, training=data.fingerprint(images[index]))
    for changed, said in (({}, "to one of 50 (of 50) training images"), (dict(n_real=40), "not measured")):
        data.save_json(f"{tmp_path}/samples/manifest.json", manifest | dict(trained_on=trained_on | changed))
        status, text = evaluation(capfd, real_shapes, f"--samples={tmp_path}/samples", "--n=50")
        assert status == 0 and said in text, text
        assert ("100.0% of the samples are nearer" in text and "a copy: 100%" in text) == (not changed)


def test_evaluate_leaves_out_the_validation_images_of_the_generator(tmp_path):
    images = np.arange(20 * 12, dtype=np.uint8).reshape(20, 2, 2, 3)
    assert len(evaluate.seen_by_generator(tmp_path, images, None)) == 20
    trained_on = dict(val_fraction=0.1, validation=data.fingerprint(images[18:]))
    data.save_json(f"{tmp_path}/manifest.json", dict(trained_on=trained_on))
    assert evaluate.seen_by_generator(tmp_path, images, None).tolist() == list(range(18))
    assert len(evaluate.seen_by_generator(tmp_path, images[::-1], None)) == 20  # another set of images


def test_evaluate_finds_copied_samples(capfd, real_shapes):
    status, text = evaluation(capfd, real_shapes, f"--samples={real_shapes}/real/train", "--n=300")
    assert status == 0 and "100.0% of the samples are nearer" in text
    result = data.read_json(f"{real_shapes}/out/evaluate.json")
    scores = result["scores"]["samples"]
    assert scores["precision"] == scores["recall"] == 1 and abs(scores["kd"]) < 4 * scores["kd_error"]
    assert os.path.exists(f"{real_shapes}/out/evaluate_nearest.png")
    flags = (
        f"--samples={real_shapes}/real/test",
        "--split=test",
        "--allow_small_n=True",
        "--classes=ring,disc",
        "--per_class=True",
    )
    status, text = evaluation(capfd, real_shapes, *flags)
    assert status == 0, text
    assert "refused" not in text and " 0.0% of the samples are nearer" in text
    scores = data.read_json(f"{real_shapes}/out/evaluate.json")["scores"]
    assert abs(scores["samples"]["fd"]) < 1e-4 < scores["real: train"]["fd"]
    assert len(scores) == 2 + 4 and scores["samples, disc"]["n"] == 30 and scores["samples, disc"]["precision"] == 1


def test_evaluate_grey_and_unlabelled_samples(capfd, real_shapes, tmp_path):
    write_fashion_mnist(tmp_path, 60)
    images = data.load("fashion_mnist", data_dir=str(tmp_path))[0]
    data.write_shards(f"{tmp_path}/rgb", np.repeat(images, 3, axis=-1), None, [])
    flags = ["--dataset=fashion_mnist", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}", "--resize=32"]
    flags += [f"--cache_dir={tmp_path}/kept", f"--samples={tmp_path}/rgb", "--device=cpu"]
    status, text = cli(capfd, "evaluate.py", *flags)
    assert status == 0, text
    scores = data.read_json(tmp_path / "evaluate.json")["scores"]
    assert scores["samples"]["precision"] == 1 and len(scores) == 2  # grey, three times over, is the same grey
    assert "needs labels" in one_line(cli(capfd, "evaluate.py", *flags, "--per_class=True"))


@pytest.mark.parametrize(
    "flags,said",
    (
        ("--n=200", "n=200: there are 100 samples"),
        ("--n=10", "minimum 20"),
        ("--features=inception --per_class=True", "needs features=lite0"),
        ("--features=vgg", "features: 'vgg' is not one of"),
        ("--features=inception --weights=nowhere.pth", "no weights file"),
        ("--split=val", "split: 'val' is not one of train, test"),
        ("--samples=TINY", "images are 8x8"),
        ("--samples=nowhere", "make them with `python augment.py`"),
        ("--sampler=ddim", "it is a key of augment.py"),
    ),
)
def test_evaluate_user_errors(flags, said, capfd, real_shapes, shards):
    flags = flags.replace("TINY", f"{shards}/tiny").split()
    assert said in one_line(evaluation(capfd, real_shapes, f"--samples={real_shapes}/copied", *flags))


def test_evaluate_refuses_splits_of_different_classes(capfd, real_shapes, tmp_path):
    images, labels, names = data.make_shapes(30, 0)
    for split, order in (("train", names), ("test", names[::-1])):
        data.write_shards(f"{tmp_path}/other/{split}", images, labels, order)
    flags = (f"--dataset={tmp_path}/other", f"--samples={real_shapes}/copied")
    assert "the splits have different classes" in one_line(evaluation(capfd, real_shapes, *flags))


def test_evaluate_inception_download_fails_with_advice(capfd, real_shapes, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    result = evaluation(capfd, real_shapes, f"--samples={real_shapes}/copied", "--features=inception")
    assert "downloading Inception's weights" in result[1] and "use --weights=PATH" in one_line(result)


@pytest.mark.slow
def test_evaluate_fid_end_to_end(capfd, real_shapes, random_inception):
    flags = [f"--samples={real_shapes}/copied", "--features=inception", f"--weights={random_inception}", "--n=40"]
    status, text = evaluation(capfd, real_shapes, *flags)
    assert status == 0 and "no FID of 2048 images or fewer" in text and "kernel_inception_distance_mean" in text
    assert "frechet" not in text
    status, text = evaluation(capfd, real_shapes, *flags, "--allow_small_n=True")
    assert status == 0, text
    for said in ("Inception-v3", "resized to 299", "40 images of each", "samples:", "real: test:"):
        assert said in text, said
    result = data.read_json(f"{real_shapes}/out/evaluate_inception.json")
    for key in ("frechet_inception_distance", "inception_score_mean", "kernel_inception_distance_mean", "precision"):
        assert math.isfinite(result["samples"][key]) and math.isfinite(result["real: test"][key])
    kept = os.listdir(f"{real_shapes}/kept")
    assert any(data.file_hash(random_inception)[:8] in name for name in kept)


# ---------------------------------------------------------------------------------------------------------------------
# plot.py


@pytest.mark.parametrize("kind", ("schedules", "forward", "loss", "confusion", "data"))
def test_plot_draws_all_kinds(capfd, shards, trained, tmp_path, kind):
    from PIL import Image

    matrix = np.eye(3, dtype=int).tolist()
    runs = [{"arm": a, "test": 0.5, "confusion": matrix, "images": 3} for a in ("real", "synthetic") for _ in "ab"]
    data.save_json(f"{tmp_path}/classifier.json", {"classes": ["a", "b", "c"], "runs": runs})
    flags = {
        "loss": [f"--logs={trained}/log.json,{trained}/log.json"],
        "forward": [f"--data_dir={shards}"],
        "data": [f"--data_dir={shards}", "--dataset=fashion_mnist", "--seed=17"],
    }.get(kind, [])
    status, text = cli(capfd, "plot.py", kind, f"--out_dir={tmp_path}", *flags)
    assert status == 0, text
    image = np.asarray(Image.open(tmp_path / f"plot_{kind}.png").convert("RGB"))
    assert min(image.shape[:2]) > 250 and image.std() > 20
    if kind == "confusion":  # two arms; of amounts, three cells, though two have as many images
        for run, (n_real, n_synthetic) in zip(runs, ((1, 2), (2, 1), (2, 1), (3, 0))):
            run |= dict(arm="real+synthetic", n_real=n_real, n_synthetic=n_synthetic)
        data.save_json(f"{tmp_path}/classifier_amounts.json", {"classes": ["a", "b", "c"], "runs": runs})
        flags = [f"--out_dir={tmp_path}", f"--results={tmp_path}/classifier_amounts.json"]
        assert cli(capfd, "plot.py", kind, *flags)[0] == 0
        assert 1.3 < Image.open(tmp_path / "plot_confusion.png").width / image.shape[1] < 1.7


def test_plot_noised_images_are_q_samples(tmp_path):
    import plot

    x0 = torch.rand(3, 4, 4)
    model = DDPM(DDPMConfig(**(TINY | dict(timesteps=500, beta_end=0.028, image_size=4, ch_mult=(1,)))))
    eps, ts = torch.randn(x0.shape, generator=ddpm.make_generator(0)), [0, 100, 499]
    expected = model.q_sample(x0.expand(3, -1, -1, -1), torch.tensor(ts), eps.expand(3, -1, -1, -1))
    assert torch.allclose(plot.noised(x0, "linear", ts), expected, atol=1e-6)


def test_plot_user_errors(capfd, tmp_path):
    assert "'' is not one of schedules, forward, loss, confusion, data" in one_line(cli(capfd, "plot.py"))
    assert "'beta' is not one of" in one_line(cli(capfd, "plot.py", "beta"))
    assert "no log" in one_line(cli(capfd, "plot.py", "loss", f"--out_dir={tmp_path}"))
    assert "no results" in one_line(cli(capfd, "plot.py", "confusion", f"--out_dir={tmp_path}"))
    stopped = {key: [] for key in ("step", "train_loss", "val_loss", "val_quarters")}  # before the first evaluation
    data.save_json(f"{tmp_path}/log.json", stopped)
    assert cli(capfd, "plot.py", "loss", f"--out_dir={tmp_path}")[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# bench.py: what it prints, not how fast anything is


def test_bench_prints_all_parts(capfd):
    flags = (*BENCH, "--what=train,sample,profile", "--ch=8", "--ch_mult=1,2", "--attn_resolutions=")
    status, text = cli(capfd, "bench.py", "config/shapes.py", *flags)
    assert status == 0, text
    for said in ("training step, batch 2", "dpm++, 2 steps, w=0.3", "convolution_backward", "peak mem", "of 3x3 conv"):
        assert said in text, said


def test_bench_user_errors(capfd):
    assert "train, sample" in one_line(cli(capfd, "bench.py", "--what=speed"))
    assert "stands alone" in one_line(cli(capfd, "bench.py", "--what=train,learn"))
    assert "peer: 'jax' is not one of" in one_line(cli(capfd, "bench.py", "--peer=jax"))
    assert "rounds: 0 must be in [1, inf)" in one_line(cli(capfd, "bench.py", "--rounds=0"))


@pytest.mark.slow
@pytest.mark.parametrize("patch", (1, 2))
def test_bench_diffusers_has_the_same_layout(capfd, patch):
    flags = (*BENCH, "--ch=128", f"--patch={patch}", "--ch_mult=1,2", "--num_res_blocks=1", "--samplers=ddim")
    status, text = cli(capfd, "bench.py", "--peer=diffusers", *flags)
    assert status == 0, text
    ours, theirs = re.search(r"nanoDDPM (\S+)M, diffusers (\S+)M", text).groups()
    assert ours == theirs and "x our time" in text


def test_bench_learns_for_a_while_and_keeps_what_was_learned(capfd, tmp_path):
    net = ("--ch=8", "--ch_mult=1,2", "--attn_resolutions=")
    text, drawn = learn(capfd, tmp_path, *net, "--minutes=0.02", "--steps=2")
    steps, images = map(int, re.search(r"nanoDDPM: (\d+) steps, (\d+) images in 0.02 minutes", text).groups())
    assert images == 2 * steps > 0
    text, again = learn(capfd, tmp_path, *net, "--minutes=0.02", "--steps=3")
    assert "is there and not trained again" in text and np.array_equal(
        drawn["nanoDDPM-2-steps"], again["nanoDDPM-2-steps"]
    )
    assert not np.array_equal(again["nanoDDPM-3-steps"], again["nanoDDPM-2-steps"])
    flags = (*BENCH, "--what=learn", f"--dataset={tmp_path}/real", f"--learn_dir={tmp_path}/learned", *net)
    line = one_line(cli(capfd, "bench.py", "config/shapes.py", *flags, "--minutes=0.01"))
    assert "nanoDDPM.pt was trained with minutes=0.02, not 0.01" in line


@pytest.mark.slow
@pytest.mark.parametrize("peer", ("diffusers", "lucidrains"))
def test_bench_peers_learn(capfd, tmp_path, peer):
    flags = (f"--peer={peer}", "--minutes=0.05", "--steps=2")
    text, drawn = learn(capfd, tmp_path, *flags)
    side = f"{peer}-2-steps"
    assert not np.array_equal(drawn[side], drawn["nanoDDPM-2-steps"]) and f"{peer}: " in text
    shutil.rmtree(f"{tmp_path}/learned/{side}")
    assert np.array_equal(learn(capfd, tmp_path, *flags)[1][side], drawn[side])  # the network that was kept draws it


@pytest.mark.slow
def test_bench_runs_lucidrains(capfd):
    status, text = cli(capfd, "bench.py", "config/cifar_small.py", "--peer=lucidrains", *BENCH)
    assert status == 0 and "lucidrains" in text and "x our time" in text, text


# ---------------------------------------------------------------------------------------------------------------------
# gan.py


def gan_flags(shards, out_dir, **changes):
    settings = dict(dataset=f"{shards}/tiny", out_dir=out_dir, ch=4, z_dim=5, batch_size=8, max_iters=6, log_interval=1)
    return [f"--{k}={v}" for k, v in (settings | dict(sample_interval=2, device="cpu") | changes).items()]


class SignalAfter(list):
    """Stands for the list of catch_signals: a signal comes after n looks at it."""

    def __init__(self, n):
        self.left = n

    def __bool__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("how", (dict(), dict(conditional=False), dict(label_smoothing=0.1, input_noise=0.1)))
def test_gan_a_resumed_run_equals_an_uninterrupted_one(how, shards, tmp_path, monkeypatch, capfd):
    whole, parts = f"{tmp_path}/whole", f"{tmp_path}/parts"
    assert cli(capfd, "gan.py", *gan_flags(shards, whole, **how))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(configurator, "catch_signals", lambda: SignalAfter(4))
        status, text = cli(capfd, "gan.py", *gan_flags(shards, parts, **how))
        assert status == 0 and "stopped by a signal at step 4" in text
    resume = ("--init_from=resume", f"--out_dir={parts}")
    status, text = cli(capfd, "gan.py", *resume)
    assert status == 0 and "steps 4 to 6" in text
    a, b = (torch.load(f"{folder}/gan.pt", weights_only=True) for folder in (whole, parts))
    for key in ("generator", "discriminator", "G_optimizer", "D_optimizer", "step", "history"):
        assert same(a[key], b[key]), key
    for name in ("samples_000002.png", "samples_000006.png", "training.gif"):
        assert pathlib.Path(whole, name).read_bytes() == pathlib.Path(parts, name).read_bytes()
    from PIL import Image

    assert Image.open(f"{whole}/training.gif").n_frames == 3
    assert "ch: checkpoint 4, flag 8" in one_line(cli(capfd, "gan.py", *resume, "--ch=8"))
    assert "val_fraction: checkpoint 0.1, flag 0.2" in one_line(cli(capfd, "gan.py", *resume, "--val_fraction=0.2"))
    assert "holds an earlier run" in one_line(cli(capfd, "gan.py", *gan_flags(shards, parts, **how)))
    with monkeypatch.context() as patch:
        patch.setattr(configurator, "catch_signals", lambda: SignalAfter(1))
        assert "before the set was complete" in one_line(cli(capfd, "gan.py", *resume, "--per_class=2"))
    pathlib.Path(parts, "ckpt.pt").touch()
    assert "holds a run of train.py" in one_line(cli(capfd, "gan.py", *resume))


def test_gan_label_is_a_channel_of_both_networks(shards, tmp_path, capfd):
    inputs = {}
    for conditional in (True, False):
        flags = gan_flags(shards, f"{tmp_path}/{conditional}", conditional=conditional, max_iters=1)
        assert cli(capfd, "gan.py", *flags)[0] == 0
        content = torch.load(f"{tmp_path}/{conditional}/gan.pt", weights_only=True)
        inputs[conditional] = [content["discriminator"]["layers.0.weight"].shape[1]]
        inputs[conditional] += [content["generator"]["layers.0.weight"].shape[0]]
    assert inputs[True] == [n + 1 for n in inputs[False]] == [4, 5]


def test_gan_remedies_change_the_discriminators_loss(shards, tmp_path, capfd):
    losses = []
    for k, how in enumerate(({}, dict(label_smoothing=0.2), dict(input_noise=0.5))):
        assert cli(capfd, "gan.py", *gan_flags(shards, f"{tmp_path}/{k}", max_iters=1, **how))[0] == 0
        losses.append(data.read_json(f"{tmp_path}/{k}/log.json")["d_loss"][0])
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    "dataset,shape", (("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3)), ("tiny", (8, 8, 3)))
)
def test_gan_images_have_the_size_of_the_real_ones(dataset, shape, shards, tmp_path, capfd):
    flags = gan_flags(shards, str(tmp_path), max_iters=1, per_class=2, dataset=f"{shards}/{dataset}")
    assert cli(capfd, "gan.py", *flags)[0] == 0
    images, labels, names = data.load(f"{tmp_path}/synthetic")
    assert images.shape[1:] == shape and np.bincount(labels).tolist() == [2] * len(names)


def test_gan_writes_a_set_for_evaluate_and_classifier(shards, tmp_path, capfd):
    assert cli(capfd, "gan.py", *gan_flags(shards, str(tmp_path), max_iters=1, per_class=10))[0] == 0
    flags = classifier_flags(shards, str(tmp_path), "", seeds=1)
    status, text = cli(capfd, "classifier.py", *flags)
    assert status == 0 and "30 synthetic training images" in text and "note:" not in text, text
    where = (f"--dataset={shards}/tiny", f"--out_dir={tmp_path}", f"--cache_dir={tmp_path}/c", "--resize=32", "--n=30")
    status, text = cli(capfd, "evaluate.py", *where, "--device=cpu")
    assert status == 0 and "samples" in text


@pytest.mark.slow
def test_gan_learns(real_shapes, tmp_path, capfd):
    """The Fréchet distance of the images at 4x4 pixels falls to less than half of its start."""

    def distance(steps):
        flags = dict(dataset=f"{real_shapes}/real", ch=32, batch_size=32, max_iters=steps, per_class=30, val_fraction=0)
        flags |= dict(log_interval=100, sample_interval=500, z_dim=100)
        assert cli(capfd, "gan.py", *gan_flags("", f"{tmp_path}/{steps}", **flags))[0] == 0
        sets = (data.load(folder)[0] for folder in (f"{tmp_path}/{steps}/synthetic", f"{real_shapes}/real"))
        return evaluate.frechet_distance(*(F.avg_pool2d(to_float(torch.tensor(x)), 8).flatten(1).numpy() for x in sets))

    start, end = distance(1), distance(600)
    assert end < 0.5 * start, (start, end)


@pytest.mark.parametrize(
    "flags,said",
    (
        ("--init_from=resume", "no checkpoint"),
        ("--label_smoothing=0.5", "label_smoothing: 0.5 must be in [0, 0.5)"),
        ("--input_noise=-1", "input_noise: -1.0 must be in [0, inf)"),
        ("--batch_size=0", "batch_size: 0 must be in"),
        ("--w=1", "unknown key 'w': it is a key of augment.py"),
    ),
)
def test_gan_user_errors(flags, said, shards, tmp_path, capfd):
    assert said in one_line(cli(capfd, "gan.py", *gan_flags(shards, str(tmp_path)), *flags.split()))


# ---------------------------------------------------------------------------------------------------------------------
# ablate.py


def ablate(shards, root, *flags, **how):
    """ablate.py with a study of two tiny cells, `tiny`, as a process."""
    with open(f"{HERE}/ablate.py", encoding="utf-8") as f:
        source = f.read()
    with open(f"{root}/tiny.py", "w") as f:
        small = dict(ch=8, num_res_blocks=1, timesteps=20, beta_end=0.6, batch_size=4, eval_interval=5, ch_mult=(1, 2))
        f.write(f"dataset = {shards + '/shapes'!r}\n" + "".join(f"{k} = {v!r}\n" for k, v in small.items()))
    cells = {"cosine": dict(schedule="cosine", steps=3), "one step": dict(schedule="cosine", steps=1)}
    cells["DCGAN"] = dict(script="gan.py", dataset=f"{shards}/shapes")
    study = dict(config=f"{root}/tiny.py", minutes=1, n=(20,), cells=cells)
    source = source.replace("STUDIES = {", f"STUDIES = {{'tiny': {study!r},", 1)
    with open(f"{root}/ablate.py", "w", encoding="utf-8") as f:
        f.write(source)
    command = [sys.executable, f"{root}/ablate.py", *flags, "--max_iters=20", "--device=cpu"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)
    return subprocess.Popen(command, **pipes, env=os.environ | {"PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_ablate_killed_and_resumed_gives_the_same_results(shards, tmp_path):
    found = {}
    for way in ("whole", "killed"):
        (root := tmp_path / way).mkdir()
        process, kills, rng = ablate(shards, root, "tiny", "--seeds=1"), 0, random.Random(0)
        while way == "killed" and kills < 8:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(2, 10))
                break  # it is done
            process.kill()
            process.wait()
            kills += 1
            process = ablate(shards, root, "tiny", "--seeds=1")
        text = process.communicate(timeout=300)[0]
        assert process.returncode == 0 and "wrote" in text and (way == "whole" or kills >= 3), text
        found[way] = data.read_json(f"{root}/out-ablate/tiny.json")["runs"]
        assert (root / "out-ablate" / "tiny.md").read_text().count("\n| ") == 6  # title, rule, cells, real images
    assert found["whole"] == found["killed"] and len(found["whole"]) == 3
    assert len(list((tmp_path / "whole" / "out-ablate" / "models-20").glob("*"))) == 2  # two cells share a model
    refused = ablate(shards, tmp_path / "whole", "tiny", "--n=21").communicate()[0]
    assert "was made with another study" in refused and "Traceback" not in refused


def test_ablate_passes_a_signal_on_once(tmp_path, monkeypatch):
    """A second one would end a training before it saves."""
    import ablate

    log, saved = tmp_path / "log.txt", tmp_path / "saved"
    lines = ("import time, configurator", "signals = configurator.catch_signals()", "print('ready', flush=True)")
    lines += ("while not signals: time.sleep(0.01)", "time.sleep(1)", f"open({str(saved)!r}, 'w')")

    class SignalWhenReady:
        def __bool__(self):
            return "ready" in log.read_text()

    monkeypatch.setattr(ablate, "signals", SignalWhenReady(), raising=False)
    monkeypatch.setenv("PYTHONPATH", HERE)
    with pytest.raises(UserError, match="stopped by a signal"):
        ablate.run([sys.executable, "-c", "\n".join(lines)], log)
    assert saved.exists()


def test_ablate_shows_why_a_timed_training_failed(tmp_path, monkeypatch):
    import ablate

    monkeypatch.setattr(ablate, "signals", [], raising=False)
    with pytest.raises(UserError, match="no network"):
        ablate.steps_per_second([sys.executable, "-c", "raise SystemExit('no network')"], tmp_path / "log.txt")


def test_ablate_cells_of_equal_cost_take_equally_many_steps(tmp_path, monkeypatch):
    """A speed measured twice differs, so a cell `like` another takes its steps."""
    import ablate

    speeds = iter((3.0, 2.0))
    monkeypatch.setattr(ablate, "work_dir", str(tmp_path))
    monkeypatch.setattr(ablate, "steps_done", lambda cell: math.inf)
    monkeypatch.setattr(ablate, "steps_per_second", lambda command, log: next(speeds))
    study, content = ablate.STUDIES["gan"], dict(study=ablate.STUDIES["gan"], budgets={}, minutes=1)
    plan = ablate.make_plan(study, configurator.defaults_of("train.py"), str(tmp_path))
    for cell in plan:
        ablate.train_cell(cell, content, lambda: None)
    steps = [content["budgets"][cell["model"]] for cell in plan]
    assert steps == [180, 90, 180, 180, 180, 120, 180, 120]


def test_ablate_a_training_that_was_not_timed_or_not_finished_is_no_result(tmp_path, monkeypatch):
    import ablate

    speeds = iter((None, 2.0))
    monkeypatch.setattr(ablate, "work_dir", str(tmp_path))
    monkeypatch.setattr(ablate, "run", lambda command, log: None)
    monkeypatch.setattr(ablate, "steps_per_second", lambda command, log: 60 * next(speeds))
    content = dict(study=ablate.STUDIES["gan"], budgets={}, minutes=1)
    plan = ablate.make_plan(content["study"], configurator.defaults_of("train.py"), str(tmp_path))
    with pytest.raises(TypeError):  # the first cell was not timed
        ablate.train_cell(plan[0], content, lambda: None)
    with pytest.raises(UserError, match="stopped at step 0 of 3600"):  # the second, half as long, is timed itself
        ablate.train_cell(plan[1], content, lambda: None)


def test_ablate_a_setting_that_is_new_in_train_py_does_not_refuse_older_results(tmp_path, monkeypatch):
    import ablate

    def settled(cell, content, save):
        raise UserError("trained")

    for key, value in dict(work_dir=str(tmp_path), results_dir=str(tmp_path), given={}, signals=[]).items():
        monkeypatch.setattr(ablate, key, value, raising=False)
    monkeypatch.setattr(ablate, "train_cell", settled)
    with pytest.raises(UserError, match="9 of 9 cells failed"):
        ablate.main("mistuned")
    for change, said in (({}, "9 of 9"), ({"lr": 1.0}, "another recipe")):
        recipe = ablate.defaults_of("train.py") | {k: v for k, (v, _) in ablate.run_config("config/shapes.py").items()}
        del recipe["n_real"]
        settings = dict(study=ablate.STUDIES["mistuned"], minutes=2, max_iters=0, torch=torch.__version__)
        data.save_json(f"{tmp_path}/mistuned.json", settings | dict(recipe=recipe | change, runs=[], budgets={}))
        with pytest.raises(UserError, match=said):
            ablate.main("mistuned")


def test_ablate_goes_on_after_a_cell_that_failed(tmp_path, monkeypatch, capfd):
    import ablate

    scores = dict(fd=None, kd=0.01, precision=0.5, recall=0.5, images=1, n=20)

    def train(cell, content, save):
        if cell["title"] == "lr 10 times too large":
            raise UserError("lower lr")

    def score(cell):
        return [dict(title=cell["title"], seed=0, classes="", real=dict(scores), machine="here") | scores]

    settings = dict(work_dir=str(tmp_path), results_dir=str(tmp_path), train_cell=train, sample_and_score=score)
    for key, value in (settings | dict(given={}, signals=[], n=20)).items():
        monkeypatch.setattr(ablate, key, value, raising=False)
    with pytest.raises(UserError, match="1 of 9 cells failed"):
        ablate.main("mistuned")
    assert "lr 10 times too large, seed 0: lower lr" in capfd.readouterr().out
    assert len(data.read_json(f"{tmp_path}/mistuned.json")["runs"]) == 8


def test_ablate_image_stays_when_the_samples_are_gone(tmp_path):
    """So that a study can be given more seeds after work_dir was deleted."""
    import ablate

    plan, content = [], {"runs": []}
    for title in ("a", "b"):
        content["runs"].append(dict(title=title, seed=0))
        plan.append(dict(title=title, seed=0, synthetic=str(tmp_path / title)))
        data.write_shards(str(tmp_path / title), np.zeros((10, 8, 8, 3)), None, [])
    ablate.write_image(plan, content, tmp_path / "image.png")
    before = (tmp_path / "image.png").read_bytes()
    shutil.rmtree(tmp_path / "a")
    ablate.write_image(plan, content, tmp_path / "image.png")
    assert (tmp_path / "image.png").read_bytes() == before


def test_ablate_dry_run_lists_every_cell(capfd):
    for study, cells in (("schedules", 12), ("gan", 8), ("ema_guidance", 4)):
        status, text = cli(capfd, "ablate.py", study, "--dry_run=True", "--seeds=2")
        assert status == 0 and f"{cells} cells x 2 seeds" in text and text.count("evaluate.py") >= 2 * cells, text
    assert "4 cells x 2 seeds, 2 trainings" in text  # EMA and guidance need no training of their own
    found = []
    for study in ("linear_cosine", "ema_guidance"):
        text = cli(capfd, "ablate.py", study, "--dry_run=True", "--max_iters=9")[1]
        found.append(set(re.findall(r"models-9\S*", text)))
    assert len(found[0]) == 2 and found[1] < found[0]  # the recipe's own cell is trained once for both


def test_ablate_every_study_uses_settings_that_exist():
    import ablate

    for study in ablate.STUDIES.values():
        assert type(study["n"]) is tuple
        for cell in study["cells"].values():
            script = (study.get("base", {}) | cell).get("script", "train.py")
            known = configurator.defaults_of(script).keys() | configurator.defaults_of("augment.py").keys()
            assert set(study.get("base", {}) | cell) <= known | ablate.CELL_KEYS.keys()


@pytest.mark.parametrize(
    "flags,said",
    (
        ("", "ablate.py STUDY: '' is not one of schedules, "),
        ("nothing", "'nothing' is not one of"),
        ("mistuned --seeds=0", "seeds: 0 must be in [1, inf)"),
        ("mistuned --minutes=-1", "minutes: -1.0 must be in"),
        ("mistuned --epochs=1", "unknown key 'epochs'"),
    ),
)
def test_ablate_user_errors(flags, said, capfd):
    assert said in one_line(cli(capfd, "ablate.py", *flags.split()))


def test_ablate_report_fills_in_the_tables(tmp_path, monkeypatch, capfd):
    import ablate

    scores = dict(fd=None, precision=0.5, recall=0.25, images=640, val_loss=0.1, n=100)
    real, few = dict(n=100, kd=-0.001), dict(n=50, kd=-0.002)
    runs = [dict(title="a", seed=k, kd=0.01 * (k + 1), real=real, classes="cat", **scores) for k in range(2)]
    runs.append(dict(title="b", seed=0, kd=0.01, real=real, classes="cat,frog", **scores))
    runs.append(dict(title="c", seed=0, kd=0.01, real=few, classes="frog", machine="there", **scores))
    study = dict(config="config/shapes.py", loss=True, minutes=2, n=[500])
    content = dict(study=study, minutes=None, max_iters=9, machine="here", runs=runs)
    (tmp_path / "results").mkdir()
    data.save_json(f"{tmp_path}/results/mistuned.json", content)
    (tmp_path / "RESULTS.md").write_text("before\n<!-- mistuned -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(ablate, "HERE", str(tmp_path))
    ablate.report(f"{tmp_path}/results")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| a | 2 | 100 | 640 |  | 15.00 ± 5.00 | 0.500 ± 0.000 | 0.250 ± 0.000 | 0.1000 ± 0.0000 |" in text
    assert all(f"| real images {of} |  | 100 |  |  | -1.00 |" in text for of in ("cat", "cat,frog"))
    assert "old" not in text and "-2.00" not in text  # nor real images that are fewer than n
    assert "; here; there." in text
    assert (
        text.startswith("before")
        and text.endswith("after\n")
        and "`python ablate.py mistuned --seeds=2 --max_iters=9`" in text
    )
    with pytest.raises(UserError, match="no study in"):
        ablate.report(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# a GPU, emulated: fake CUDA tensors, counted graphs, mocked devices, gloo


@pytest.fixture
def fake_cuda(monkeypatch):
    """A FakeTensorMode in which CUDA tensors have shapes, dtypes, devices and strides, but no values.

    An operation on tensors of two devices is an error there, as on a GPU.
    """
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 has no fake CUDA tensors without a driver")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    return FakeTensorMode()


def on_fake_cuda(model, mode):
    """Moves a model onto the fake GPU: its parameters and buffers lose their values."""
    with mode:
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda"))
            for name, b in module._buffers.items():
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
    return model


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that scripts compile, each for the whole network, and runs them eagerly."""
    counter, original = CompileCounter(), nn.Module.compile
    torch._dynamo.reset()

    def compile_whole(self, dynamic, options=None):
        torch.compile(self, options=options)  # raises for an option that there is not
        original(self, backend=counter, fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", compile_whole)
    return counter


def test_ddpm_gpu_attention_suits_the_fused_kernels(fake_cuda, monkeypatch):
    """They ask for rows without gaps; without them the maths runs in several kernels and in float32."""
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: seen.extend(qkv) or torch.empty_like(qkv[0]))
    attention = on_fake_cuda(ddpm.Attention(128), fake_cuda)
    with fake_cuda:
        attention(torch.empty(2, 128, 4, 4, device="cuda"))
    q, k, v = (torch.empty_strided(a.shape, a.stride()) for a in seen)
    assert q.shape == (2, 2, 16, 64)
    math_path = torch._fused_sdp_choice(q.transpose(-1, -2), k.transpose(-1, -2), v.transpose(-1, -2))
    assert torch._fused_sdp_choice(q, k, v) != math_path == 0


def test_ddpm_gpu_keeps_activations_in_16_bits(fake_cuda, monkeypatch):
    """Autocast would run GroupNorm in float32, which makes all that follows up to the next convolution float32."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: q * k * v)
    model = on_fake_cuda(tiny(dropout=0.1), fake_cuda)
    model.amp_dtype, kept = torch.bfloat16, []
    with fake_cuda:
        x, k = torch.empty(4, *model.shape, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
            out = model.network(x, k, k)
    assert out.dtype == torch.float32 and out.device.type == "cuda"
    maps = [v.dtype for v in kept if v.ndim == 4 and v.shape[0] in (1, 4) and v.shape[-1] > 3]  # not the kernels
    assert len(maps) > 20 and torch.float32 not in maps[1:]  # the first is the input


def test_ddpm_gpu_network_is_one_graph(fake_cuda):
    model, counter = on_fake_cuda(tiny(), fake_cuda), CompileCounter()
    torch._dynamo.reset()
    model.net.compile(backend=counter, fullgraph=True, dynamic=False)
    model.amp_dtype = torch.bfloat16
    with fake_cuda:
        x, k = torch.empty(4, *model.shape, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
        assert model.network(x, k, k).device.type == "cuda"
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", (dict(), dict(w=1.0), dict(w=1.0, interval=(0.5, 2.0)), dict(sampler="dpm++", steps=5)))
def test_ddpm_gpu_step_and_samplers_stay_on_the_device(how, fake_cuda, monkeypatch):
    images, labels = np.zeros((9, 8, 8, 3), np.uint8), np.arange(9) % 3
    model = on_fake_cuda(tiny(), fake_cuda)
    model.amp_dtype = torch.bfloat16
    steps = model.sampler_timesteps(how.get("steps"))
    monkeypatch.setattr(model, "check_sampling", lambda *_: steps)  # reads the labels, which have no values here
    with fake_cuda:
        x0, y = data.Batches(images, labels, 4, 0, crop=0.8, shift=1, device="cuda")(0)
        t, eps = model.random_t_eps(4, device="cuda")
        losses = model(x0, model.drop_labels(y), t, eps)
        x = model.sample(y, indices=range(4), **how)
        assert {v.device.type for v in (x0, y, t, eps, losses, x)} == {"cuda"}
        assert to_uint8(x).device.type == "cuda" and losses.dtype == torch.float32


def test_ddpm_noise_of_an_image_is_that_of_its_generator():
    for shape in ((3, 32, 32), (1, 28, 28), (3, 8, 8), (1, 3, 3)):
        rows, alone = ([make_generator(5, k) for k in range(4)] for _ in range(2))
        for _ in range(2):
            noise = ddpm.image_noise(rows, shape)
            assert torch.equal(noise, torch.stack([torch.randn(shape, generator=g) for g in alone]))


def test_train_gpu_compiles_one_graph(graphs, shards, tmp_path, capfd):
    """For all steps; validation, grids and the averaged weights neither recompile nor break it."""
    flags = tiny_flags(shards, str(tmp_path), use_compile=True, sample_interval=3, grad_accum=2)
    status, text = cli(capfd, "train.py", *flags)
    assert status == 0 and graphs.frame_count == 1, text


def test_augment_and_sample_gpu_compile_one_graph(graphs, trained, synthetic, tmp_path, capfd):
    """Guided and unguided steps and a smaller last batch are one graph; the images are those of eager mode."""
    assert cli(capfd, "augment.py", *augment_flags(trained, f"{tmp_path}/s", use_compile=True, batch_size=5))[0] == 0
    assert graphs.frame_count == 1
    a, b = (data.read_shards(folder)[0].astype(int) for folder in (f"{tmp_path}/s", synthetic))
    assert np.abs(a - b).max() <= 1
    flags = [f"--out_dir={trained}", "--use_compile=True", "--batch_size=16", "--interval=0.5,2", "--device=cpu"]
    assert cli(capfd, "sample.py", *flags)[0] == 0 and graphs.frame_count == 2  # another network, another graph


def test_augment_gpu_compiles_only_long_jobs(trained, tmp_path, capfd, monkeypatch):
    compiled = []
    black = lambda self, y, indices, *_, **__: [torch.zeros(len(indices), 8, 8, 3, dtype=torch.uint8)]  # noqa: E731
    monkeypatch.setattr(DDPM, "compile_network", lambda self: compiled.append(self))
    monkeypatch.setattr(DDPM, "sample_batches", black)
    auto = lambda use_compile, _: use_compile != "False"  # noqa: E731  (as on a GPU)
    monkeypatch.setattr(configurator, "resolve_compile", auto)
    cases = (
        (dict(per_class=2), False),
        (dict(per_class=2, use_compile=True), True),
        (dict(per_class=17000, steps=20), True),
    )
    for k, (flags, wanted) in enumerate(cases):
        flags = augment_flags(trained, f"{tmp_path}/{k}", shard_size=60000, **flags)
        assert cli(capfd, "augment.py", *flags)[0] == 0
        assert bool(compiled) is wanted
        compiled.clear()


def test_configurator_gpu_of_each_process(monkeypatch):
    """A T4 at 0 and an A100 at 1: what is asked about the GPU is asked of the right one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: current[-1] == 1)
    t4, a100 = ("cuda:0", torch.float16, False), ("cuda:1", torch.bfloat16, False)
    cases = (("auto", "", t4), ("auto", "1", a100), ("cuda", "1", a100), ("cuda:1", "0", a100))
    for device, local_rank, wanted in cases:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert configurator.setup_device(device, use_compile="False") == wanted
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="'cuda:2' is not available .GPUs: 2.: use fewer processes"):
        configurator.setup_device("auto")


def test_configurator_gpu_compiles_where_that_works(monkeypatch, capfd):
    monkeypatch.setattr(torch, "compile", lambda f: lambda x: f(x))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: 1)
    for capability, triton, compiles in (((9, 0), True, True), ((6, 1), True, False), ((9, 0), False, False)):
        monkeypatch.setattr(configurator, "find_spec", lambda _: triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        assert configurator.resolve_compile("auto", "cuda:0") is compiles
    monkeypatch.setattr(configurator, "find_spec", lambda _: True)

    def compile_without_cc(f):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one via CC")

    monkeypatch.setattr(torch, "compile", compile_without_cc)
    assert not configurator.resolve_compile("auto", "cuda:0")
    said = capfd.readouterr().err.splitlines()
    assert said[-1] == "torch.compile fails here (RuntimeError: Failed to find C compiler.): running eagerly"
    assert not configurator.resolve_compile("auto", "cpu")
    for device in ("cpu", "cuda:0"):
        with pytest.raises(UserError, match="^use_compile: .*Failed to find C compiler"):
            configurator.resolve_compile("True", device)


def test_train_float16_survives_a_loss_that_overflows(shards, tmp_path, capfd, monkeypatch):
    network, calls = DDPM.network, []

    def overflowing(self, xt, t, y):
        calls.append(self.training)
        out = network(self, xt, t, y)
        return out * float("inf") if (sum(calls) if self.training else "validation") in bad else out

    monkeypatch.setattr(DDPM, "network", overflowing)
    flags = tiny_flags(shards, str(tmp_path), dtype="float16", log_interval=2, eval_interval=4, max_iters=8)
    bad = {3}
    status, text = cli(capfd, "train.py", *flags)
    assert status == 0, text

    def refuse(constant):
        raise ValueError(constant)

    log = json.loads((tmp_path / "log.json").read_text(), parse_constant=refuse)
    assert all(map(math.isfinite, log["log_loss"])) and len(log["log_loss"]) == 4
    checkpoint = ddpm.load_checkpoint(f"{tmp_path}/ckpt.pt")
    assert all(v.isfinite().all() for v in checkpoint["ema"]["shadow"].values())
    assert checkpoint["scaler"]["scale"] == 2**15  # halved once
    calls, bad = [], {"validation"}  # not hidden: there is no step to skip
    assert cli(capfd, "train.py", *flags)[0] == 0
    assert data.read_json(f"{tmp_path}/log.json")["val_loss"] == [None, None]
    calls, bad = [], set(range(100))
    assert "at step 2, lr" in one_line(cli(capfd, "train.py", *flags))


def test_train_float16_learns_over_200_steps(shards, tmp_path, capfd):
    flags = dict(dtype="float16", max_iters=200, log_interval=50, eval_interval=100)
    assert cli(capfd, "train.py", *tiny_flags(shards, str(tmp_path), **flags))[0] == 0
    log = data.read_json(f"{tmp_path}/log.json")
    assert log["val_loss"][1] < log["val_loss"][0] and log["log_loss"][-1] < 0.9 * log["log_loss"][0]


def test_train_validation_images_are_moved_as_bytes(shards, tmp_path, capfd, monkeypatch):
    moved, to = [], torch.Tensor.to
    record = lambda self, *a, **k: moved.append((tuple(self.shape), self.dtype)) or to(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "to", record)
    assert cli(capfd, "train.py", *tiny_flags(shards, str(tmp_path), max_iters=1))[0] == 0
    assert ((6, 8, 8, 3), torch.uint8) in moved  # as floats they take four times the bytes


@pytest.mark.slow
def test_train_two_compiled_processes_equal_two_eager(shards, tmp_path):
    """DistributedDataParallel cuts a compiled network into several graphs, one for each of its buckets."""
    flags = dict(ch=64, ch_mult="1", attn_resolutions="", dtype="float32", max_iters=4, eval_interval=4)
    found = []
    for use_compile in (False, True):
        folder = f"{tmp_path}/{use_compile}"
        how = tiny_flags(shards, folder, use_compile=use_compile, **flags)
        status, text = torchrun(2, "train.py", *how)
        assert status == 0 and ("compiled" if use_compile else "eager") in text, text
        found.append(ddpm.load_checkpoint(f"{folder}/ckpt.pt"))
    eager, compiled = found
    for key in ("log_loss", "val_loss"):  # not the weights: Adam makes a whole step of a gradient's rounding error
        np.testing.assert_allclose(compiled["history"][key], eager["history"][key], rtol=1e-3)


@pytest.mark.slow
def test_train_four_processes_and_two_hosts_equal_one(shards, tmp_path, capfd):
    """Loss, weights, validation; then resumed with another number of processes, and sampled by two hosts."""
    how = dict(dropout=0.0, eval_interval=3, val_fraction=0.4)
    assert cli(capfd, "train.py", *tiny_flags(shards, f"{tmp_path}/1", **how))[0] == 0
    one = ddpm.load_checkpoint(f"{tmp_path}/1/ckpt.pt")

    def equals_one(folder):
        other = ddpm.load_checkpoint(f"{tmp_path}/{folder}/ckpt.pt")
        assert all(torch.allclose(v, other["model"][k], atol=2e-5) for k, v in one["model"].items())
        for key in ("train_loss", "val_loss", "val_quarters", "test_loss"):
            np.testing.assert_allclose(other["history"][key], one["history"][key], rtol=1e-4)

    for folder, nproc, nnodes in (("4", 4, 1), ("2x2", 2, 2)):
        status, text = torchrun(nproc, "train.py", *tiny_flags(shards, f"{tmp_path}/{folder}", **how), nnodes=nnodes)
        assert status == 0 and "on 4 x cpu" in text and "Warning" not in text.replace("OMP_NUM_THREADS", ""), text
        equals_one(folder)
    flags = tiny_flags(shards, f"{tmp_path}/resumed", **how)
    status, text = torchrun(2, "train.py", *flags, "--max_iters=3", "--lr=1e-3", "--min_lr=1e-3", nnodes=2)
    assert status == 0, text
    resume = (f"--out_dir={tmp_path}/resumed", "--init_from=resume", "--max_iters=6")
    status, text = torchrun(2, "train.py", *resume)
    assert status == 0 and "steps 3 to 6" in text, text
    equals_one("resumed")
    assert cli(capfd, "augment.py", *augment_flags(f"{tmp_path}/resumed", f"{tmp_path}/a"))[0] == 0
    status, text = torchrun(2, "augment.py", *augment_flags(f"{tmp_path}/resumed", f"{tmp_path}/b"), nnodes=2)
    assert status == 0 and contents(tmp_path / "a") == contents(tmp_path / "b"), text


def test_bench_gpu_report(capfd):
    flags = ("--what=gpu", *BENCH, "--ch=8", "--ch_mult=1,2", "--attn_resolutions=")
    status, text = cli(capfd, "bench.py", "config/shapes.py", *flags)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert status == 0 and len(rows) == 4 and rows[2][0] == "| nanoDDPM, eager", text
    assert len(rows[2]) == len(rows[0]) == 10 and all(float(v) > 0 for v in rows[2][2:4])
    assert rows[3][0] == "| diffusers" and "32 groups" in rows[3][1]  # the reason for a side that is left out
    assert f"torch {torch.__version__}, Python" in text and "TFLOP/s: matrix product" in text


@pytest.mark.slow
def test_bench_gpu_report_compiled_and_beside_diffusers(graphs, capfd, monkeypatch):
    compile_, theirs = torch.compile, lambda f: type(f).__module__.startswith("diffusers")
    monkeypatch.setattr(torch, "compile", lambda f, **how: f if theirs(f) else compile_(f, **how))
    flags = ("--what=gpu", *BENCH, "--ch=128", "--ch_mult=1", "--num_res_blocks=1", "--use_compile=True")
    status, text = cli(capfd, "bench.py", "config/shapes.py", *flags)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    names = ["nanoDDPM, eager", "nanoDDPM, compiled", "... channels last", "... combo kernels", "diffusers"]
    assert status == 0 and [row[0][2:] for row in rows] == names and {len(row) for row in rows} == {10}, text
    assert graphs.frame_count == 2  # to train and to sample; the three networks share them, with one backend here


def test_bench_float16_scales_our_loss(capfd, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", lambda self, _: steps.append(self.is_enabled()))
    for dtype in ("float16", "bfloat16"):
        flags = (*BENCH, "--what=profile", f"--dtype={dtype}", "--ch=8", "--ch_mult=1,2", "--attn_resolutions=")
        assert cli(capfd, "bench.py", "config/shapes.py", *flags)[0] == 0
    assert steps == [True, True, False, False]  # a step to warm up, and one


def test_bench_runs_without_the_resource_module(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows has none
    flags = (*BENCH, "--what=train", "--ch=8", "--ch_mult=1,2", "--attn_resolutions=")
    status, text = cli(capfd, "bench.py", "config/shapes.py", *flags)
    assert status == 0 and "peak memory nan MB" in text, text


def test_bench_counts_every_wait_for_the_gpu(capfd, monkeypatch):
    found = {}
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: found.setdefault("modes", []).append(mode))
    run = runpy.run_path
    monkeypatch.setattr(runpy, "run_path", lambda *a, **k: found.update(run(*a, **k)))
    flags = (*BENCH, "--what=train", "--ch=8", "--ch_mult=1,2", "--attn_resolutions=")
    assert cli(capfd, "bench.py", "config/shapes.py", *flags)[0] == 0
    host_waits = found["host_waits"]
    assert host_waits(lambda: None) is None
    monkeypatch.setattr(found["s"], "device", "cuda:0")

    def wait_twice():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("does not yet detect all synchronizing operations", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    assert host_waits(wait_twice) == 2 and found["modes"] == ["warn", "default"]


def test_evaluate_and_augment_replace_no_file_that_is_mapped(real_shapes, trained, tmp_path, capfd, monkeypatch):
    """Windows refuses to replace or remove one."""
    replaced = []

    def not_mapped(function):
        def checked(source, *rest, **how):
            target = os.path.realpath(rest[0] if rest else source)
            mapped = {line.split()[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines()}
            assert not any(path == target or path.startswith(f"{target}/") for path in mapped), target
            replaced.append(target)
            return function(source, *rest, **how)

        return checked

    for module, name in ((os, "replace"), (os, "remove"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, not_mapped(getattr(module, name)))
    shutil.copytree(real_shapes / "real", tmp_path / "real")
    for _ in range(2):
        status, text = evaluation(capfd, tmp_path, f"--samples={real_shapes}/copied", "--n=40")
        assert status == 0, text
    folder = f"{tmp_path}/s"
    assert cli(capfd, "augment.py", *augment_flags(trained, folder, per_class=3))[0] == 0
    assert cli(capfd, "augment.py", *augment_flags(trained, folder))[0] == 0
    assert cli(capfd, "augment.py", *augment_flags(trained, folder, overwrite=True, w=0))[0] == 0
    assert len(replaced) > 20
