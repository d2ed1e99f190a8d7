"""What the tests of the programs share: the scripts through their command lines, and small data and models.

tests/test_SCRIPT.py has the properties of a script; test_user_errors.py every error that a user can cause; test_gpu.py
a GPU, emulated; test_faults.py (slow) kills, full disks and several hosts; test_chain.py (slow) the quick start.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs one test per core; before torch is imported

import fcntl
import pathlib
import runpy
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import ddpm
from lab.ablate import HERE, flags, path_of

TIMEOUT = 600  # seconds of a subprocess: ends a hang, measures nothing


def pytest_collection_modifyitems(items):
    """The longest test comes first, so that the other workers have the rest to do."""
    items.sort(key=lambda item: "test_chain" not in item.nodeid)


def command(script, *flags):
    return [sys.executable, path_of(script), *flags]


def environment(**more):
    return os.environ | {"PYTHONPATH": HERE} | more


def execute(script, *flags):
    """Runs a script in this process as its command line would: its exit status."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    flock, locked = fcntl.flock, []  # a lock lasts as long as its process: here, as the script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path_of(script), *flags])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        patch.setattr(fcntl, "flock", lambda file, how: (locked.append(file), flock(file, how)))
        try:
            runpy.run_path(path_of(script), run_name="__main__")
            return 0
        except SystemExit as e:
            return e.code or 0
        except BaseException as e:
            try:
                sys.excepthook(type(e), e, e.__traceback__)
                return 1
            except SystemExit as hooked:
                return hooked.code
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            for file in locked:
                os.close(file)


def call(capfd, script, *flags):
    """execute, and what it prints: (exit status, output and errors)."""
    capfd.readouterr()
    status = execute(script, *flags)
    return status, "".join(capfd.readouterr())


def finish(script, *flags, **more):
    """Runs a script in a process of its own, to its end."""
    how = dict(capture_output=True, text=True, env=environment(), timeout=TIMEOUT) | more
    return subprocess.run(command(script, *flags), **how)


def cut_off(n, capfd, script, *flags):
    """call, of a script that is cut off before its n-th fsync, renaming or removal of a file."""
    left = iter(range(n))

    def counted(function):
        def wrapped(*args):
            if next(left, None) is None:
                raise GeneratorExit  # what no script catches
            return function(*args)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "remove"):
            patch.setattr(os, name, counted(getattr(os, name)))
        return call(capfd, script, *flags)


def start(words, **more):
    """Starts a process whose output and errors can be read."""
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()) | more
    return subprocess.Popen(words, **how)


def processes(n, script, *flags):
    """What a script prints in each of n processes that work together, as under torchrun. They have to succeed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(n))
    ranks = [environment(RANK=str(k), LOCAL_RANK=str(k), **where) for k in range(n)]
    started = [start(command(script, *flags), env=env) for env in ranks]
    try:
        texts = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), texts
    return texts


@pytest.fixture
def run(capfd):
    """run(script, *flags): what a script prints. It has to succeed."""

    def run(script, *flags):
        status, text = call(capfd, script, *flags)
        assert status == 0, text
        return text

    return run


@pytest.fixture
def fails(capfd):
    """fails(script, *flags): the one line of a script's error. It has to end with status 2."""

    def fails(script, *flags):
        status, text = call(capfd, script, *flags)
        assert status == 2 and "Traceback" not in text, text
        return text.strip().splitlines()[-1]

    return fails


def train_flags(shards, out_dir, **changes):
    settings = dict(dataset=f"{shards}/tiny", out_dir=out_dir, ch=8, ch_mult="1,2", num_res_blocks=1, dropout=0.1)
    settings |= dict(attn_resolutions="4", timesteps=20, beta_end=0.6, batch_size=8, max_iters=6, warmup_iters=2)
    settings |= dict(lr=1e-3, min_lr=1e-3, log_interval=1, eval_interval=2, sample_interval=0, guide_step=2)
    return flags(**settings | dict(device="cpu", dtype="float32") | changes)


def augment_flags(out_dir, folder, **changes):
    settings = dict(out_dir=out_dir, synthetic_dir=folder, per_class=7, shard_size=6, batch_size=4, steps=3)
    return flags(**settings | dict(device="cpu", dtype="float32") | changes)


def classifier_flags(shards, out_dir, folder, **changes):
    settings = dict(dataset=f"{shards}/tiny", out_dir=out_dir, synthetic_dir=folder, seeds=2, hidden=16, shift=1)
    settings |= dict(batch_size=8, max_iters=6, eval_interval=3, warmup_iters=1, device="cpu")
    return flags(**settings | changes)


def checkpoint(folder):
    return ddpm.load_checkpoint(f"{folder}/ckpt.pt")


def same(a, b):
    """Equal to the last bit, whatever the nesting. NaN, of a quarter without any t, equals NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else repr(a) == repr(b)


def contents(folder):
    """The bytes of a folder's shards by file name."""
    return {p.name: p.read_bytes() for p in sorted(pathlib.Path(folder).glob("*.npy"))}


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A data_dir with small sets of every built-in data set's form, and a shard folder `tiny` of 8x8 images."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    forms = {"cifar10": (32, 3, 10), "fashion_mnist": (28, 1, 10), "flowers102": (64, 3, 102), "shapes": (32, 3, 10)}
    for name, (size, channels, classes) in (forms | {"tiny": (8, 3, 3)}).items():
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        names = names[:classes] if classes <= 10 else [str(k) for k in range(classes)]
        n = 60 if size == 8 else 2 * classes
        for split in ("train", "test"):
            images = rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
            data.write_shards(f"{root}/{name}/{split}", images, np.arange(n) % classes, names)
    return str(root)


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory):
    """The out_dir of a tiny model, trained for a few steps by the real script."""
    out_dir = str(tmp_path_factory.mktemp("run") / "out")
    assert execute("train", *train_flags(shards, out_dir, sample_interval=6)) == 0
    return out_dir


@pytest.fixture(scope="session")
def synthetic(trained, tmp_path_factory):
    """A folder of 7 images of each class of `trained`."""
    folder = str(tmp_path_factory.mktemp("synthetic") / "set")
    assert execute("augment", *augment_flags(trained, folder)) == 0
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
