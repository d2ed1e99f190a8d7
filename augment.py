"""Writes a synthetic training set: per_class images of each class, sampled from a checkpoint, as uint8 .npy shards.

python augment.py                                          5000 per class from out/ckpt.pt into out/synthetic
python augment.py --out_dir=out-shapes --per_class=500     from another run
torchrun --nproc_per_node=gpu augment.py                   the shards split over all GPUs: the same images

Resumable: run the same command again, even after kill -9; a larger per_class adds to what is there. Without a
checkpoint in out/ it takes the small pretrained weights in weights/.
"""

import datetime
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict

import torch
import torch.distributed as dist

from configurator import (
    configure,
    describe_sampling,
    dtype_name,
    duration,
    join_process_group,
    leave_process_group,
    lock_folder,
    open_model,
    process_rank,
    progress,
    resolve_compile,
    resolve_guidance,
    setup_device,
)
from data import (
    check_manifest,
    class_ids,
    file_hash,
    load_array,
    read_json,
    save_json,
    shard_files,
    tile,
    write_shard,
)
from ddpm import UserError

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out"  # the checkpoint is here
synthetic_dir = ""  # the shards go here; default out_dir/synthetic
per_class = 5000  # images of each class
classes = ""  # names or numbers; default all
seed = 0  # image k of a seed is the same on any number of processes
w = None  # guidance of Ho & Salimans: -1 unconditional, 0 conditional; default 1 (0 without a null label)
guidance_scale = None  # the other convention, 1 + w; give one of the two
interval = (0.25, 4.0)  # guide only while sigma = sqrt(1 / alpha_bar - 1) is between the two; empty: always
sampler = "dpm++"  # ddpm, ddim
steps = 10  # of the model's T
eta = 0.0  # ddim's noise: 1 makes it ddpm
variance = "posterior"  # of ddpm: posterior or beta
clip_x0 = True  # keep x0_hat in [-1, 1] at every step
ema = True  # the averaged weights; False: the raw ones
batch_size = 100  # images sampled at once
shard_size = 1000  # images per file, about: each class has the same number
overwrite = False  # True: delete the shards in synthetic_dir first
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # float32, bfloat16, float16
use_compile = "auto"  # True, False; auto: on a GPU, for 1,000,000 images x steps or more per process
# ---------------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), w=float, guidance_scale=float)

# Model and settings. The images are a function of these settings alone.
rank, world = process_rank()
auto = use_compile == "auto"
device, amp_dtype, use_compile = setup_device(device, dtype, "False" if auto else use_compile)
model, info = open_model(out_dir, ema, device, amp_dtype)
names = list(model.config.class_names) or [str(k) for k in range(model.K)]
labels = class_ids(classes, names, unique=True) if classes else list(range(max(1, model.K)))
C = len(labels)
w = resolve_guidance(w, guidance_scale, 1.0, model)
sampling = dict(w=w, interval=list(interval) if w > 0 else [], seed=seed, sampler=sampler, steps=steps, eta=eta)
sampling |= dict(clip_x0=clip_x0, variance=variance)
model.check_sampling(torch.tensor(labels) if model.K else None, **sampling)
digest = hashlib.sha256(json.dumps(asdict(model.config)).encode())
for name, p in model.state_dict().items():
    digest.update(name.encode() + p.cpu().numpy().tobytes())
settings = sampling | dict(weights=digest.hexdigest(), step=info["step"], ema=ema, per_class=per_class)
settings |= dict(classes=[names[k] for k in labels if names], dtype=dtype_name(amp_dtype))

# Shard i holds `each` images of every class (the last one fewer), the classes in turn.
folder = synthetic_dir or os.path.join(out_dir, "synthetic")
each = max(1, shard_size // C)
n_shards = math.ceil(per_class / each)
settings["shard_size"] = each * C


def images_in(i):
    return min(each, per_class - i * each) * C


def names_of(i):
    return [f"{kind}_{i:05d}.npy" for kind in ("labels", "images") if names or kind == "images"]


def is_done(i):
    """Whether the files of shard i are there and of the right length. Raises UserError for a damaged one."""
    paths = [f"{folder}/{name}" for name in names_of(i)]
    return all(os.path.exists(p) and len(load_array(p, mmap=True)) == images_in(i) for p in paths)


def open_folder():
    """Prepares the folder; returns the shards to make. Raises UserError if it holds a set of other settings."""
    lock_folder(folder)
    manifest, advice = f"{folder}/manifest.json", "use --overwrite=True to delete it, or another --synthetic_dir"
    if overwrite:
        save_json(manifest, {"complete": False, "settings": {}, "shards": {}})  # incomplete before anything is deleted
        for old in shard_files(folder):
            os.remove(old)
    need = per_class * C * (math.prod(model.shape) + 1) - sum(map(os.path.getsize, shard_files(folder)))
    if need > (free := shutil.disk_usage(folder).free):
        raise UserError(f"{folder}: the shards need {need / 1e6:.0f} MB, but the disk has {free / 1e6:.0f} MB free")
    if shard_files(folder):
        if not os.path.exists(manifest):
            raise UserError(f"{folder} holds shards that were not written by augment.py: {advice}")
        old = read_json(manifest)
        for key in settings | old.get("settings", {}):
            before, now = old.get("settings", {}).get(key), settings.get(key)
            if before != now and not (key == "per_class" and before is not None and before < now):
                raise UserError(f"{folder} was made with {key}={before}, not {now}: {advice}")
        expected = {name for i in range(n_shards) for name in names_of(i)}
        if unknown := [p for p in shard_files(folder) if os.path.basename(p) not in expected]:
            raise UserError(f"{unknown[0]} is not part of this set: {advice}")
        if old.get("complete"):
            check_manifest(folder, allow_missing=True)
    todo = [i for i in range(n_shards) if not is_done(i)]
    save_json(manifest, {"complete": False, "settings": settings, "shards": {}})
    save_json(f"{folder}/classes.json", names)
    return todo


def make_shard(i, on_batch):
    """Shard i: images (n, H, W, C) uint8 and labels (n,)."""
    first, n = i * each * C, images_in(i)
    y, images = torch.tensor(labels).repeat(n // C), []
    for batch in model.sample_batches(y if model.K else None, range(first, first + n), batch_size, **sampling):
        images.append(batch)
        on_batch(sum(map(len, images)))
    return torch.cat(images).numpy(), y.numpy() if names else None


# Sample. Rank 0 opens the folder; each process makes every world-th shard that is missing.
if world > 1:
    join_process_group("gloo", timeout=datetime.timedelta(days=20))  # they wait for each other only at the end
todo = [open_folder() if rank == 0 else None]
if world > 1:
    dist.broadcast_object_list(todo)
todo = todo[0]
mine = todo[rank::world]
total = sum(map(images_in, mine))
if auto and total * steps >= 1_000_000:  # compiling takes about a minute
    use_compile = resolve_compile("auto", device)
if use_compile:
    model.compile_network()
if rank == 0:
    print(
        f"{info['description']} x {world}; {describe_sampling(**sampling)}; "
        f"{per_class} images of each of {C} classes into {folder}: {len(todo)} of {n_shards} shards to make",
        flush=True,
    )
made, start = 0, time.time()
for i in mine:
    write_shard(folder, i, *make_shard(i, lambda n: rank == 0 and progress(f"shard {i}", (made + n) / total, start)))
    made += images_in(i)
    if rank == 0:
        speed = made / (time.time() - start)
        print(
            f"shard {i:5d}  {made}/{total} images  {speed:8.1f} images/s  {duration((total - made) / speed)} left",
            flush=True,
        )
if world > 1:
    dist.barrier()

# Finish: hashes of all files, and a preview with a row per class.
if rank == 0:
    if missing := [i for i in range(n_shards) if not is_done(i)]:
        raise UserError(f"{folder}: shards {missing} are missing at the end: did another process write here?")
    hashes = {name: file_hash(f"{folder}/{name}") for i in range(n_shards) for name in names_of(i)}
    hashes["classes.json"] = file_hash(f"{folder}/classes.json")
    manifest = dict(complete=True, settings=settings, images=per_class * C, shards=hashes)
    manifest |= dict(counts={names[k] if names else "all": per_class for k in labels}, trained_on=info["trained_on"])
    manifest |= dict(checkpoint=info["path"], device=device, torch=torch.__version__, seconds=time.time() - start)
    save_json(f"{folder}/manifest.json", manifest)
    columns = min(8, images_in(0) // C)
    first = load_array(f"{folder}/images_00000.npy")[: columns * C]
    preview = first.reshape(columns, C, *first.shape[1:]).swapaxes(0, 1).reshape(first.shape)
    tile(preview, columns, [names[k] for k in labels if names]).save(f"{folder}/preview.png")
    print(f"{per_class * C} images in {folder}; see {folder}/preview.png")
if world > 1:
    leave_process_group()
