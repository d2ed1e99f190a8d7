"""Every error that a user can cause, through the scripts: one line, exit status 2, no traceback."""

import fcntl
import functools
import os
import socket
import sys

import pytest
import torch
from conftest import augment_flags, classifier_flags, flags, train_flags

import ddpm

# Values just outside of what a key takes; the line names the key.
OUTSIDE = {
    "train": """max_iters=0 max_iters=2.5 batch_size=0 batch_size=1048576 grad_accum=0 grad_accum=3 log_interval=0 lr=0
        eval_interval=0 eval_images=0 min_lr=-1 ema_decay=1 val_fraction=1 val_fraction=0.001 dropout=1 p_uncond=1
        crop=0 crop=1.01 seed=-1 seed=4294967296 patch=0 patch=65 ch=7 ch=4098 ch_mult= ch_mult=65 ch_mult=1.5,2
        num_res_blocks=65 attn_resolutions=5 attn_resolutions=[[1]] timesteps=100001 schedule=exp objective=mu loss=l3
        weighting=snr arch=mlp epochs=1e308 classes=birb device=cpu:x device=cuda:99 dtype=int8 use_compile=yes""",
    "sample": """num_samples=1048576 batch_size=0 w=4294967296 guidance_scale=-4294967297 seed=-1 interval=3 steps=21
        eta=1 sampler=euler classes=² classes=, classes=3 rows=lr=1 columns=lr=1 device=cuda:x dtype=int8""",
    "augment": """per_class=0 per_class=1048576 shard_size=0 shard_size=1048576 batch_size=0 w=-4294967297 steps=0
        interval=1,2,3 eta=1 classes=bird,bird""",
    "classifier": """seeds=0 seeds=21 hidden=0 hidden=0.5 hidden=1048576 dropout=1 shift=-1 optimizer=lion arms=fake
        max_iters=0 eval_interval=0 lr=0 val_fraction=0 val_fraction=0.01 seed=-1 n_synthetic=22 classes=birb""",
    "gan": "ch=0 ch=4097 beta1=1 label_smoothing=1 z_dim=0 z_dim=1048576 input_noise=-1 per_class=0 device=cuda:99",
    "evaluate": "n=-1 resize=31 resize=1025 features=vgg split=val image_size=1048576 seed=-1 device=cpu:x dtype=int8",
    "bench": "rounds=0 num_samples=1048576 patch=0 device=gpu",
    "ablate": "seeds=0 max_iters=-1 n=-1 seed=4294967296 minutes=1",
}
# What the line says, and the commands to which it says so.
SAID = """
unknown key 'batch_sise': did you mean 'batch_size'? | train --batch_sise=4
unknown key 'hidden': --help lists the keys | train --hidden=1; augment --hidden=1
write it as --lr=value | train --lr; train -lr=1
no config file 'nothing.py' (settings are written as --key=value) | train nothing.py; sample nothing.py
file: NameError: name 'x' is not defined | train file
holds an earlier run | train --out_dir=TRAINED; train --out_dir=TRAINED --init_from=TRAINED/ckpt.pt
train a model first | train --init_from=resume; train --init_from=gpt2
is damaged or not of save_model | train --init_from=file; train --init_from=.
is damaged or not of save_model | sample --checkpoint=file; augment --checkpoint=file
[Errno | train --out_dir=file; classifier --out_dir=file; train --out_dir=
did you mean 'cifar10'? | train --dataset=cifar; classifier --dataset=cifar
image_size: 28 is not divisible by 8 | train --dataset=fashion_mnist --data_dir=SHARDS --ch_mult=1,2,2,2
images 8x8, expected squares of 16 | train --image_size=16; classifier --image_size=16
(last checkpoint: step 1): lower lr | train --lr=1e9 --max_iters=60 --eval_interval=1
the weights are not finite at update | classifier --lr=1e9 --arms=real
not both | sample --w=1 --guidance_scale=2; sample --rows=w=0,1 --columns=guidance_scale=2,3
change the same setting | sample --rows=w=0,1 --columns=w=2,3
seed must be at least 0 | sample --rows=seed=-1,0
must be a file name without a folder | sample --name=a/b
steps is not of type int | sample --columns=steps=2,x; sample --rows=steps
gif cannot be combined with rows or columns | sample --rows=w=0,1 --gif=True
sampler: 'euler' is not one of ddpm, ddim, dpm++ | augment --overwrite=True --sampler=euler
make them with `python augment.py` | classifier --synthetic_dir=none; evaluate --dataset=SHARDS/tiny --samples=none
there are 60 samples and 60 and 60 real images | evaluate --dataset=SHARDS/tiny --samples=SHARDS/tiny --n=61
what: 'speed' is not one of train, sample | bench --what=speed
peer: 'jax' is not one of | bench --peer=jax
samplers: 'euler' is not one of ddpm, ddim, dpm++ | bench --samplers=ddim,euler
steps and num_samples must be above 0 | bench --num_samples=0; bench --steps=0
is not one of schedules, forward, loss, confusion, data | plot; plot beta
is not one of schedules, | ablate; ablate beta
into its out_dir | plot loss; plot confusion
"""


@pytest.fixture
def line_of(fails, shards, trained, synthetic, tmp_path, monkeypatch):
    """line_of(script, *given): the line of a script's error, given some flags on top of small ones that work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm, "load_checkpoint", functools.cache(ddpm.load_checkpoint))
    (tmp_path / "file").write_text("x")
    base = dict(train=train_flags(shards, "run"), classifier=classifier_flags(shards, "run", synthetic))
    base |= dict(augment=augment_flags(trained, synthetic), sample=flags(out_dir=trained, device="cpu"))

    def line_of(script, *given):
        given = [flag.replace("TRAINED", trained).replace("SHARDS", shards) for flag in given]
        return fails(script, *base.get(script, []), *given)

    return line_of


@pytest.mark.parametrize("script", OUTSIDE)
def test_values_just_outside_are_refused_and_the_key_is_named(script, line_of):
    for setting in OUTSIDE[script].split():
        assert setting.split("=")[0] in line_of(script, f"--{setting}"), setting


@pytest.mark.parametrize("row", SAID.strip().splitlines())
def test_the_line_says_what_is_wrong(row, line_of):
    said, commands = row.split(" | ")
    for command in commands.split("; "):
        assert said in line_of(*command.split()), command


def test_a_checkpoint_without_a_run_cannot_be_resumed(line_of, tmp_path):
    torch.save(dict(model_args={}, ema={}, step=0), tmp_path / "ckpt.pt")
    assert "has not all that a run goes on from" in line_of("train", "--init_from=resume", "--out_dir=.")


def test_a_folder_in_use_is_left_alone(line_of, tmp_path):
    fcntl.flock(lock := os.open(tmp_path, os.O_RDONLY), fcntl.LOCK_EX)
    for command in ("train --out_dir=.", "augment --synthetic_dir=.", "classifier --out_dir=."):
        assert "is in use by another process" in line_of(*command.split())
    os.close(lock)


def test_processes_that_do_not_meet_say_so(line_of, monkeypatch):
    meet, where = torch.distributed.rendezvous, dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, timeout: meet(url, timeout=timeout / 300))
    with socket.create_server(("127.0.0.1", 0)) as busy:
        for rank, port in (("0", busy.getsockname()[1]), ("1", 9), ("0", 99999)):  # in use, not there, no port
            monkeypatch.setattr(os, "environ", os.environ | where | dict(RANK=rank, MASTER_PORT=str(port)))
            assert "the processes cannot reach each other" in line_of("augment")


def test_a_closed_error_stream_is_no_error(run, trained, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # 2>&-
    assert "sample.png" in run("sample", f"--out_dir={trained}", "--num_samples=1")
