"""Writes a synthetic training set: per_class images of each class, sampled from a checkpoint, as uint8 .npy shards.

python augment.py                                          5000 per class from out/ckpt.pt into out/synthetic
python augment.py --out_dir=out-shapes --per_class=500     from another run
torchrun --nproc_per_node=gpu augment.py                   the shards split over all GPUs: the same images

Resumable: run the same command again, even after kill -9; a larger per_class adds to what is there. Without a
checkpoint in out/ it takes the small pretrained weights in weights/.
"""

import hashlib
import math
import os
import time

import torch
import torch.distributed as dist

import data
import runtime
from configurator import configure
from ddpm import check

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
ema = True  # the averaged weights; False: the raw ones
batch_size = 100  # images sampled at once
shard_size = 1000  # images per file, about: each class has the same number
overwrite = False  # True: delete the shards in synthetic_dir first
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # float32, bfloat16, float16
use_compile = "auto"  # torch.compile the network: True, False
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

# Model and settings. The images are a function of these settings alone.
device, amp_dtype, use_compile = runtime.setup_device(device, dtype, use_compile)
rank, world = runtime.join_processes("cpu")  # by gloo: only a list and barriers pass between the processes
model, checkpoint = runtime.open_model(out_dir, ema, device, amp_dtype)
names = list(model.config.class_names) or [str(k) for k in range(model.K)]
labels = data.class_ids(classes, names, unique=True) if classes else list(range(max(1, model.K)))
C = len(labels)
w = runtime.resolve_guidance(w, guidance_scale, 1.0, model)
sampling = dict(w=w, interval=list(interval) if w > 0 else [], seed=seed, sampler=sampler, steps=steps, eta=eta)
model.check_sampling(torch.tensor(labels) if model.K else None, **{k: v for k, v in sampling.items() if k != "seed"})
weights = hashlib.sha256(repr(model.config).encode())
for p in model.state_dict().values():
    weights.update(p.cpu().numpy().tobytes())
each = max(1, shard_size // C)  # images of every class in a shard, the classes in turn; the last shard has fewer
settings = sampling | dict(weights=weights.hexdigest(), per_class=per_class, shard_size=each * C)
settings |= dict(classes=[names[k] for k in labels if names], dtype=str(amp_dtype or torch.float32))
folder, n_shards = synthetic_dir or os.path.join(out_dir, "synthetic"), math.ceil(per_class / each)
manifest = f"{folder}/manifest.json"


def images_in(i):
    return min(each, per_class - i * each) * C


def files_of(i):
    return [f"{folder}/{kind}_{i:05d}.npy" for kind in (("labels", "images") if names else ("images",))]


def is_done(i):
    return all(os.path.exists(path) and len(data.load_array(path)) == images_in(i) for path in files_of(i))


def open_folder():
    """Prepares the folder; returns the shards to make. Raises UserError if it holds a set of other settings."""
    runtime.lock_folder(folder)
    shards, old = data.shard_files(folder), {}
    if overwrite:
        for path in shards:  # cut off here, the manifest refuses what is left
            os.remove(path)
    elif shards:
        old = data.read_json(manifest).get("settings", {}) if os.path.exists(manifest) else {}
        others = [key for key in settings if old.get(key) != settings[key] and key != "per_class"]
        others += ["per_class"] if old.get("per_class", 0) > per_class else []
        advice = "use --overwrite=True to delete it, or another --synthetic_dir"
        check(not others, f"{folder} was made with another {', '.join(others)}: {advice}")
    data.save_json(manifest, {"complete": False, "settings": settings})
    data.save_json(f"{folder}/classes.json", names)
    return [i for i in range(n_shards) if not is_done(i)]


# Sample. Rank 0 opens the folder; each process makes every world-th shard that is missing.
todo = [open_folder() if rank == 0 else None]
if world > 1:
    dist.broadcast_object_list(todo)
mine = todo[0][rank::world]
total, made, start = sum(map(images_in, mine)), 0, time.time()
if use_compile:
    model.net.compile(dynamic=False)
if rank == 0:
    print(
        f"w={w:g} (guidance_scale={1 + w:g}), interval {sampling['interval']}, {sampler}, {steps} steps, seed {seed}; "
        f"{per_class} images of each of {C} classes into {folder}: {len(todo[0])} of {n_shards} shards to make",
        flush=True,
    )
for i in mine:
    first, y, images = i * each * C, torch.tensor(labels).repeat(images_in(i) // C), []
    for batch in model.sample_batches(y if model.K else None, range(first, first + len(y)), batch_size, **sampling):
        images.append(batch)
        if rank == 0:
            runtime.progress(f"shard {i}", (made + sum(map(len, images))) / total, start)
    data.write_shard(folder, i, torch.cat(images).numpy(), y.numpy() if names else None)
    made += len(y)
    speed = made / max(1e-9, time.time() - start)
    left = runtime.duration((total - made) / speed)
    print(f"shard {i:5d}  {made}/{total} images  {speed:8.1f} images/s  {left} left", flush=True)

# Finish: hashes of all files, and a preview with a row per class.
if world > 1:
    dist.barrier()
if rank == 0:
    hashes = {os.path.basename(path): data.file_hash(path) for i in range(n_shards) for path in files_of(i)}
    content = dict(complete=True, settings=settings, shards=hashes, trained_on=checkpoint.get("trained_on", {}))
    data.save_json(manifest, content | dict(step=checkpoint["step"], device=device, torch=torch.__version__))
    columns = min(8, images_in(0) // C)
    preview = data.load_array(f"{folder}/images_00000.npy")[: columns * C]
    preview = preview.reshape(columns, C, *model.shape[1:], -1).swapaxes(0, 1).reshape(preview.shape)
    data.tile(preview, columns, [names[k] for k in labels if names]).save(f"{folder}/preview.png")
    print(f"{per_class * C} images in {folder}; see {folder}/preview.png")
if world > 1:
    runtime.leave_processes()
