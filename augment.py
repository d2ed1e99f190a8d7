"""Writes a synthetic training set: per_class images of each class, sampled from a checkpoint, as uint8 .npy shards.

python augment.py                                          5000 per class from out/ckpt.pt into out/synthetic
python augment.py --out_dir=out-shapes --per_class=500     from another run
python augment.py --vary=1.2                               variations of the training images instead of pure samples
torchrun --nproc_per_node=gpu augment.py                   the shards split over all GPUs: the same images

Resumable: run the same command again, even after kill -9; a larger per_class adds to what is there. Without a
checkpoint in out/ it takes the small pretrained weights in weights/.
"""

import hashlib
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist

import data
import runtime
from configurator import configure
from ddpm import check, image_noise, make_generator, sigma_of, to_float

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out"  # the checkpoint is here
checkpoint = ""  # another checkpoint, a path
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
vary = 0.0  # above 0: start from training images with so much noise (sigma) instead of from noise alone
dataset = ""  # of vary: the training images; default those that train.py was given
data_dir = "data"  # of vary
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
model, saved = runtime.open_model(out_dir, checkpoint, ema, device, amp_dtype)
trained_on = saved.get("trained_on", {})
known = names = list(model.config.class_names) or [str(k) for k in range(model.K)]
labels = data.class_ids(classes, names, unique=True) if classes else list(range(max(1, model.K)))
C = len(labels)
w = runtime.resolve_guidance(w, guidance_scale, 1.0, model)
if w <= -1:  # the network saw no labels, or was pushed away from them
    names = []
sampling = dict(w=w, interval=list(interval) if w > 0 else [], seed=seed, sampler=sampler, steps=steps, eta=eta)
model.check_sampling(torch.tensor(labels) if model.K else None, **{k: v for k, v in sampling.items() if k != "seed"})
weights = hashlib.sha256(repr((model.config, saved.get("betas"))).encode())
for p in model.state_dict().values():
    weights.update(p.cpu().numpy().tobytes())
each = max(1, shard_size // C)  # images of every class in a shard, the classes in turn; the last shard has fewer
settings = sampling | dict(vary=vary, weights=weights.hexdigest(), per_class=per_class, shard_size=each * C)
settings |= dict(classes=[known[k] for k in labels if known], dtype=str(amp_dtype or torch.float32))
if vary:
    source, kept = dataset or trained_on.get("dataset", "cifar10"), trained_on.get("classes", "")
    with runtime.rank_0_first(rank, world):
        real, real_labels, real_names = data.load(source, "train", data_dir, model.shape[1], kept)
    part = trained_on.get("val_fraction", 0), 0 if dataset else trained_on.get("n_real", 0)
    (real, real_labels), (held_out, _) = data.training_part(real, real_labels, real_names, *part)
    fits = not model.K or (real_labels is not None and real_names == known)
    check(fits, f"vary: {source} has classes {real_names}, the model {known}")
    if rank == 0 and data.fingerprint(held_out) != trained_on.get("validation"):
        print(f"note: the model may have been trained on other images of {source} than these")
    groups = [np.flatnonzero(real_labels == k) if model.K else np.arange(len(real)) for k in labels]
    vary_t = min(range(model.T), key=lambda t: abs(math.log(sigma_of(model.abar[t]) / vary)))
    check(steps <= vary_t + 1, f"steps: {steps}, but sigma {vary} is step {vary_t} of the model")
    settings |= dict(varied=data.fingerprint(real))
folder, n_shards = synthetic_dir or os.path.join(out_dir, "synthetic"), math.ceil(per_class / each)
manifest = f"{folder}/manifest.json"


def images_in(i):
    return min(each, per_class - i * each) * C


def files_of(i):
    return [f"{folder}/{kind}_{i:05d}.npy" for kind in (("labels", "images") if names else ("images",))]


def is_done(i):
    return all(os.path.exists(path) and len(data.load_array(path)) == images_in(i) for path in files_of(i))


def start_of(indices):
    """Where the images `indices` start: at step vary_t of real images of their classes, which come in turn; or None."""
    if not vary:
        return None
    chosen = [groups[k % C][k // C % len(groups[k % C])] for k in indices]
    x0, t = to_float(torch.tensor(real[chosen])).to(device), torch.full((len(chosen),), vary_t, device=device)
    return vary_t, model.q_sample(x0, t, image_noise([make_generator(seed, k) for k in indices], model.shape, device))


def open_folder():
    """Prepares the folder; returns the shards to make. Raises UserError if it holds a set of other settings."""
    runtime.lock_folder(folder)
    shards, earlier = data.shard_files(folder), data.manifest_of(folder)
    check(earlier or not os.path.exists(manifest), f"{manifest} is of another program: use another --synthetic_dir")
    old = earlier.get("settings", {})
    if overwrite:
        for path in shards:  # cut off here, the manifest refuses what is left
            os.remove(path)
    elif shards:
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
    for net in filter(None, (model.net, model.guide)):
        net.compile(**use_compile)
if rank == 0:
    how = f"{runtime.guidance_text(w, interval, model)}{sampler}, {steps} steps, seed {seed}"
    what = f"{per_class} images of each of {C} classes into {folder}"
    print(f"{how}; {what}: {len(todo[0])} of {n_shards} shards to make", flush=True)
for i in mine:
    indices, images = range(i * each * C, i * each * C + images_in(i)), []
    y = torch.tensor(labels).repeat(len(indices) // C)
    how = dict(start=start_of(indices)) | sampling
    for batch in model.sample_batches(y if model.K else None, indices, batch_size, **how):
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
    content = dict(complete=True, settings=settings, shards=hashes, trained_on=trained_on)
    data.save_json(manifest, content | dict(step=saved["step"], device=device, torch=torch.__version__))
    columns = min(8, images_in(0) // C)
    preview = data.load_array(f"{folder}/images_00000.npy")[: columns * C]
    preview = preview.reshape(columns, C, *model.shape[1:], -1).swapaxes(0, 1).reshape(preview.shape)
    data.tile(preview, columns, [names[k] for k in labels if names]).save(f"{folder}/preview.png")
    print(f"{per_class * C} images in {folder}; see {folder}/preview.png")
runtime.leave_processes()
