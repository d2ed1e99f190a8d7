"""What goes wrong on a machine: kills, full disks, output that nobody reads, stopped hosts, memory. Slow."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TIMEOUT, augment_flags, checkpoint, command, contents, finish, flags, same, start, train_flags
from PIL import Image

import data
import ddpm

pytestmark = pytest.mark.slow


def peak_memory(script, *how):
    """The largest resident memory of a script's process, in MB."""
    code = "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # kB
    process = start([sys.executable, "-c", code, *command(script, *how)[1:]])
    return int(process.communicate(timeout=TIMEOUT)[0].split("peak ")[1]) / 1024


def start_torchrun(nproc, script, *how, nnodes=1):
    """Starts a script under torchrun on one or more emulated hosts: their processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = ["--master_addr=127.0.0.1", f"--master_port={s.getsockname()[1]}", f"--nnodes={nnodes}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc_per_node={nproc}"]
    return [start([*torchrun, f"--node_rank={k}", *command(script, *how)[1:]]) for k in range(nnodes)]


def torchrun(*args, **how):
    """Runs a script under torchrun to its end: (exit status, output and errors). See start_torchrun."""
    hosts = start_torchrun(*args, **how)
    try:
        text = "".join(host.communicate(timeout=TIMEOUT)[0] for host in hosts)
    finally:
        for host in hosts:
            host.terminate()
    return max(host.returncode for host in hosts), text


def kill_after(lines, script, *how):
    """Runs a script in a process of its own, and kills it after so many lines of its output."""
    with start(command(script, *how)) as process:
        for _ in range(lines):
            assert process.stdout.readline()
        process.kill()


def test_train_killed_5_times_equals_an_uninterrupted_run(shards, tmp_path, run):
    cut, whole, steps = tmp_path / "cut", tmp_path / "whole", [0]

    def settings(folder, max_iters=10**6, **changes):
        return train_flags(shards, folder, eval_interval=3, max_iters=max_iters, **changes)

    for lines in range(8, 13):
        kill_after(lines, "train", *settings(cut, init_from="resume" if steps[-1] else "scratch"))
        steps.append(checkpoint(cut)["step"])
    assert steps == sorted(set(steps))
    end = steps[-1] + 2
    run("train", *settings(cut, end, init_from="resume"))
    run("train", *settings(whole, end))
    a, b = checkpoint(cut), checkpoint(whole)
    for key in ("model", "ema", "optimizer", "step", "history"):
        assert same(a[key], b[key]), key


def test_augment_killed_5_times_leaves_no_wrong_shard(trained, tmp_path, run):
    """What is there after each kill is right, and the end is that of an undisturbed run."""
    settings = lambda name: augment_flags(trained, tmp_path / name, per_class=1000, batch_size=6)  # noqa: E731
    run("augment", *settings("whole"))
    whole = contents(tmp_path / "whole")
    for lines in range(3, 8):
        kill_after(lines, "augment", *settings("cut"))
        there = contents(tmp_path / "cut")
        assert 0 < len(there) < len(whole) and all(there[name] == whole[name] for name in there)
    run("augment", *settings("cut"))
    assert contents(tmp_path / "cut") == whole


def test_a_full_disk_is_one_line_and_the_last_file_stays(trained, tmp_path):
    """The limit on the size of a file stands for the disk. With room again, the same command continues."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))  # noqa: E731
    out, made = tmp_path / "out", tmp_path / "made"
    shutil.copytree(trained, out)
    resume = flags(out_dir=out, init_from="resume", max_iters=8, device="cpu")
    augment = augment_flags(trained, made, per_class=30, shard_size=90)
    for script, how, path in (("train", resume, out / "ckpt.pt"), ("augment", augment, made / "images_00000.npy")):
        before = path.exists() and path.read_bytes()
        done = finish(script, *how, preexec_fn=limit)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"{script}.py: cannot write {path}: ") and "None" not in done.stderr
        assert (path.exists() and path.read_bytes()) == before and not list(path.parent.glob("*.tmp"))
        assert finish(script, *how).returncode == 0


def test_no_file_that_is_mapped_is_replaced(shards, trained, tmp_path, run, monkeypatch):
    """Windows refuses to replace or remove one."""
    touched = []

    def not_mapped(function):
        def checked(*paths):
            with open("/proc/self/maps") as f:
                mapped = [line.split()[-1] for line in f]
            for path in map(os.path.realpath, paths):
                assert not any(name == path or name.startswith(f"{path}/") for name in mapped), path
            touched.extend(paths)
            return function(*paths)

        return checked

    for name in ("replace", "remove"):
        monkeypatch.setattr(os, name, not_mapped(getattr(os, name)))
    for k in range(2):
        (tmp_path / f"images/{k}").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / f"images/{k}/a.png")
    data.load(str(tmp_path / "images"), data_dir=str(tmp_path))
    out, made = tmp_path / "out", tmp_path / "made"
    run("train", *train_flags(shards, out))
    run("train", *flags(out_dir=out, init_from="resume", max_iters=8, device="cpu"))
    for how in (dict(per_class=3), dict(per_class=7), dict(overwrite=True, w=0)):
        run("augment", *augment_flags(trained, made, **how))
    assert {"ckpt.pt", "log.json", "manifest.json", "images_00001.npy"} <= {os.path.basename(path) for path in touched}


@pytest.mark.parametrize("output, said", (("| head -1", "Broken pipe"), ("> /dev/full", "No space left on device")))
def test_output_that_cannot_be_written_ends_a_run_in_one_line(output, said, shards, tmp_path):
    line = " ".join(command("train", *train_flags(shards, tmp_path, max_iters=100_000)))
    bash = ["bash", "-c", f"set -o pipefail; {line} {output}"]
    done = subprocess.run(bash, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


@pytest.mark.parametrize("what", ("SIGTERM", "a process killed"))
def test_torchrun_that_is_stopped_loses_at_most_eval_interval_steps(what, shards, tmp_path):
    """If one process is killed, the other ends too. The run can be resumed."""
    settings = train_flags(shards, tmp_path, max_iters=10**6, eval_interval=40)
    (host,) = start_torchrun(2, "train", *settings)
    while not (line := host.stdout.readline()).startswith("step      50 "):
        assert line
    if what == "SIGTERM":
        host.send_signal(signal.SIGTERM)
    else:
        ranks = subprocess.run(["ps", "-o", "pid=", "--ppid", str(host.pid)], capture_output=True, text=True).stdout
        os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    text = line + host.communicate(timeout=TIMEOUT)[0]
    step, last = checkpoint(tmp_path)["step"], int(re.findall(r"^step +(\d+)", text, re.M)[-1])
    assert host.returncode != 0 and step % 40 == 0 and last - 40 <= step <= last, text
    status, text = torchrun(2, "train", *settings, "--init_from=resume", f"--max_iters={step + 2}")
    assert status == 0 and f"steps {step} to {step + 2}" in text, text


def test_four_processes_of_two_hosts_equal_one(shards, tmp_path, run):
    """In loss, weights, validation and images, also when two resume. Their error is one line beside torchrun's."""
    settings = dict(dropout=0.0, eval_interval=3, val_fraction=0.4)
    run("train", *train_flags(shards, tmp_path / "1", **settings))
    status, text = torchrun(2, "train", *train_flags(shards, tmp_path / "4", **settings, max_iters=3), nnodes=2)
    assert status == 0 and "on 4 x cpu" in text and "Warning" not in text.replace("OMP_NUM_THREADS", ""), text
    status, text = torchrun(2, "train", *flags(out_dir=tmp_path / "4", init_from="resume", max_iters=6, device="cpu"))
    assert status == 0 and "on 2 x cpu" in text and "steps 3 to 6" in text, text
    one, four = checkpoint(tmp_path / "1"), checkpoint(tmp_path / "4")
    assert all(torch.allclose(v, four["model"][k], atol=2e-5) for k, v in one["model"].items())
    for key in ("log_loss", "val_loss", "val_quarters", "test_loss"):
        np.testing.assert_allclose(four["history"][key], one["history"][key], rtol=1e-4)
    run("augment", *augment_flags(tmp_path / "4", tmp_path / "a"))
    status, text = torchrun(2, "augment", *augment_flags(tmp_path / "4", tmp_path / "b"), nnodes=2)
    assert text.count("shard ") == 4  # one of each process
    assert status == 0 and contents(tmp_path / "a") == contents(tmp_path / "b"), text
    status, text = torchrun(2, "train", *train_flags(shards, tmp_path / "0", val_fraction=0.001))
    assert status == 1 and re.search("^train.py: val_fraction", text, re.M) and 'train.py", line' not in text, text


@pytest.mark.parametrize("script,lengths,most", (("train", (100, 700), 5), ("augment", (50, 300), 15)))
def test_memory_does_not_grow_with_the_number_of_steps_or_images(script, lengths, most, shards, tmp_path):
    config = dict(image_size=64, num_classes=10, arch="cnn", ch=4, ch_mult=(1,), timesteps=2, beta_end=0.999)
    ddpm.save_model(tmp_path / "ckpt.pt", ddpm.DDPM(ddpm.DDPMConfig(**config)))
    small, few, peak = dict(ch_mult="1", attn_resolutions=""), dict(shard_size=100, batch_size=100, steps=1), {}
    for n in lengths:  # steps; or images of each class, 6 and 37 MB in all
        train = train_flags(shards, tmp_path / str(n), **small, max_iters=n, eval_interval=100, log_interval=10)
        augment = augment_flags(tmp_path, tmp_path / str(n), **few, per_class=n)
        peak[n] = peak_memory(script, *(train if script == "train" else augment))
    print(f"\npeak memory of {script}.py:", {n: f"{mb:.1f} MB" for n, mb in peak.items()})
    assert peak[lengths[1]] - peak[lengths[0]] < most
