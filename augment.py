"""Writes a synthetic training set: per_class pictures of each class, drawn from a checkpoint, as uint8 .npy shards.

python augment.py                                          5000 per class from out/ckpt.pt, into out/synthetic
python augment.py --out_dir=out-shapes --per_class=500     from another run
torchrun --nproc_per_node=gpu augment.py                   the shards split over all GPUs: the same pictures
python augment.py --keep=0.9                               without the tenth that `python classifier.py` trusts least

A run that was stopped, however rudely, goes on where it stopped when it is started again (on a CPU to the same bytes),
and a larger per_class adds to what is there. Where out/ holds no checkpoint, the small weights in weights/ are used.
"""

import contextlib
import datetime
import glob
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict

import torch
import torch.distributed as dist

from configurator import HERE, ConfigError, configure, progress
from data import (
    DataError,
    class_ids,
    file_hash,
    has_shards,
    load_array,
    read_json,
    save_json,
    shard_files,
    tile,
    write_shard,
)
from ddpm import choose_device, guidance_weight, how_drawn, model_from_checkpoint, open_checkpoint, to_float

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out"  # the checkpoint is here
synthetic_dir = ""  # the shards go here; default out_dir/synthetic
per_class = 5000  # pictures of each class
classes = ""  # names or numbers; default all
seed = 0  # picture k of a seed is the same on any number of processes
w = None  # guidance of Ho & Salimans: -1 unconditional, 0 conditional; default 1 (0 without a null label)
guidance_scale = None  # other papers' number for the same thing, 1 + w; give one of the two
interval = (0.25, 4.0)  # guide only while sigma = sqrt(1 / alpha_bar - 1) is between the two; empty: always
sampler = "dpm++"  # ddpm, ddim
steps = 10  # of the model's T
eta = 0.0  # ddim's noise: 1 makes it ddpm
variance = "posterior"  # of ddpm: posterior or beta
clip_x0 = True  # keep the predicted picture in [-1, 1] at every step
ema = True  # the averaged weights; False: the raw ones
keep = 1.0  # below 1: the share kept (rounded, per class and file), of whose class out_dir/classifier.pt is surest
batch_size = 100  # pictures drawn at once
shard_size = 1000  # pictures in a file, about: each class has the same number
overwrite = False  # True: delete the shards in synthetic_dir first
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # float32, bfloat16, float16
use_compile = "auto"  # True, False
# ---------------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), w=float, guidance_scale=float)

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
folder = synthetic_dir or os.path.join(out_dir, "synthetic")
for key in ("per_class", "batch_size", "shard_size", "steps"):
    if config[key] < 1:
        raise ConfigError(f"{key}: {config[key]} must be at least 1")
if not 0 < keep <= 1:
    raise ConfigError(f"keep: {keep:g} must be in (0, 1]")
device, amp_dtype, use_compile = choose_device(device, dtype, use_compile)
path, checkpoint = open_checkpoint(out_dir, os.path.join(HERE, "weights"))
model = model_from_checkpoint(checkpoint, ema, device)
model.amp_dtype = amp_dtype
w = guidance_weight(w, guidance_scale, 1.0, model)
interval = interval if w > 0 else ()  # where it changes nothing
names = list(model.config.class_names) or [str(k) for k in range(model.K)]
labels_of = class_ids(classes, names) if classes else list(range(max(1, model.K)))
C = len(labels_of)
if len(set(labels_of)) < C or C == 0:
    raise DataError(f"classes={classes} names a class twice, or none")
each = max(1, shard_size // C)  # pictures of a class in a shard
judge = None
if keep < 1:
    from classifier import load_classifier

    if not model.K:
        raise ConfigError("keep: an unconditional model's pictures have no class to judge them by")
    judge = load_classifier(os.path.join(out_dir, "classifier.pt"), names, model.shape, device)


def weights_hash():
    """SHA-256 of the network: its configuration and the very weights that are used."""
    digest = hashlib.sha256(json.dumps(asdict(model.config)).encode())
    for name, p in model.state_dict().items():
        digest.update(name.encode() + p.cpu().numpy().tobytes())
    return digest.hexdigest()


settings = dict(weights=weights_hash(), step=checkpoint["step"], classes=[names[k] for k in labels_of] if names else [])
how = dict(w=w, interval=list(interval), seed=seed, sampler=sampler, steps=steps)  # what DDPM.sample takes
how |= dict(eta=eta, clip_x0=clip_x0, variance=variance)
model.check_sampling(torch.tensor(labels_of) if model.K else None, **how)  # before anything is deleted
settings |= dict(per_class=per_class, shard_size=each * C, ema=ema, dtype=str(amp_dtype or torch.float32)[6:])
settings |= how | dict(keep=keep)
if judge:
    settings["classifier"] = file_hash(os.path.join(out_dir, "classifier.pt"))


def size_of(i):
    """Pictures of each class in shard i."""
    return min(each, per_class - i * each)


def draw_shard(i, report):
    """Shard i as uint8 images (n, H, W, C) and labels (n,), the classes in turn: a function of the settings alone.

    report(share) is told how much of the shard is drawn.
    """
    n = size_of(i)
    drawn = math.ceil(n / keep)  # of each class
    first = i * math.ceil(each / keep) * C  # this shard's first picture
    y = torch.tensor(labels_of).repeat(drawn)
    images = []
    for part in model.draw_pictures(y if model.K else None, range(first, first + len(y)), batch_size, **how):
        images.append(part)
        report(sum(map(len, images)) / len(y))
    images = torch.cat(images)
    if judge:
        confidence = torch.cat([judge(to_float(p).to(device)).cpu() for p in images.split(batch_size)])
        confidence = confidence.gather(1, y[:, None]).view(drawn, C)
        kept = confidence.topk(n, dim=0).indices.sort(dim=0).values  # (n, C): places among a class's pictures
        images = images[(kept * C + torch.arange(C)).flatten()]
    return images.numpy(), y[: n * C].numpy() if names else None


def files_of(i):
    return [f"{kind}_{i:05d}.npy" for kind in ("labels", "images") if names or kind == "images"]


def journals():
    return glob.glob(f"{glob.escape(folder)}/made_*.jsonl")


def survey():
    """Reads the folder: (shards to be made, manifest). Raises DataError for a folder or file of another making.

    A shard is done when the manifest, or the journal of a run that was cut off, has the hashes of its files. One that
    has no entry yet is made again.
    """
    mend = "use --overwrite=True to delete what is there, or another --synthetic_dir"
    manifest = {"complete": False, "settings": settings, "seconds": 0.0, "shards": {}}
    if has_shards(folder):
        if not os.path.exists(f"{folder}/manifest.json"):
            raise DataError(f"{folder} holds shards that augment.py did not make: {mend}")
        manifest = read_json(f"{folder}/manifest.json")
        were = manifest.get("settings", {})
        for key in settings | were:
            was, now = were.get(key), settings.get(key)
            if was != now and not (key == "per_class" and was is not None and was < now):
                raise DataError(f"{folder} was made with {key}={was}, not {now}: {mend}")
        for journal in journals():
            with open(journal, encoding="utf-8") as f:
                for line in f:
                    with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was killed
                        entry = json.loads(line)
                        seconds = entry.pop("seconds")
                        manifest["seconds"] += 0 if entry.keys() <= manifest["shards"].keys() else seconds
                        manifest["shards"] |= entry
    done, todo = {}, []
    for i in range(math.ceil(per_class / each)):
        recorded = {name: manifest["shards"].get(name) for name in files_of(i)}
        if not all(recorded.values()) or not all(os.path.exists(f"{folder}/{name}") for name in recorded):
            todo.append(i)
            continue
        for name, digest in recorded.items():
            if file_hash(f"{folder}/{name}") != digest:
                raise DataError(f"{folder}/{name} was truncated, changed or replaced: delete it and start again")
        if len(load_array(f"{folder}/images_{i:05d}.npy", mmap_mode="r")) == size_of(i) * C:
            done |= recorded
        else:
            todo.append(i)  # the last one of a smaller per_class
    ours = {name for i in range(math.ceil(per_class / each)) for name in files_of(i)}
    if foreign := [path for path in shard_files(folder) if os.path.basename(path) not in ours]:
        raise DataError(f"{foreign[0]} is not of this set: {mend}")
    manifest |= {"complete": False, "settings": settings, "shards": done}
    return todo, manifest


def settle(manifest):
    """Keeps the manifest; the journals are in it."""
    save_json(f"{folder}/manifest.json", manifest)
    for journal in journals():
        os.remove(journal)


def open_folder():
    """The shards that are to be made, in a folder that is ready for them."""
    os.makedirs(folder, exist_ok=True)
    if overwrite:
        settle({"complete": False, "settings": {}, "shards": {}})  # vouches for nothing that is still there
        for old in shard_files(folder):
            os.remove(old)
    todo, manifest = survey()
    need = sum(map(size_of, todo)) * C * (math.prod(model.shape) + 1) + 2**20
    if todo and need > (free := shutil.disk_usage(folder).free):
        raise DataError(f"{folder}: the shards need {need / 1e6:.0f} MB, but the disk has {free / 1e6:.0f} MB free")
    save_json(f"{folder}/classes.json", names)
    settle(manifest)
    return todo


if world > 1:
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=20))  # ranks wait for each other at the end alone
plan = [open_folder() if rank == 0 else None]
if world > 1:
    dist.broadcast_object_list(plan)
todo = plan[0]
mine = todo[rank::world]
if use_compile and mine:
    model.net.compile(dynamic=False)
if rank == 0:
    print(
        f"{path}, step {checkpoint['step']}; {world} x {device}, {settings['dtype']}; "
        f"{how_drawn(w, interval, sampler, steps, seed)}; "
        f"{per_class} pictures for each of {C} classes into {folder}: "
        f"{len(todo)} of {math.ceil(per_class / each)} shards to be made",
        flush=True,
    )
total, start, made = sum(map(size_of, mine)) * C, time.time(), 0
for i in mine:
    began, n = time.time(), size_of(i) * C
    report = lambda share: rank == 0 and progress(f"shard {i}", (made + share * n) / total, start)  # noqa: E731
    write_shard(folder, i, *draw_shard(i, report))
    made += n
    entry = {name: file_hash(f"{folder}/{name}") for name in files_of(i)} | {"seconds": time.time() - began}
    with open(f"{folder}/made_{rank}.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(entry) + "\n")
        f.flush()
        os.fsync(f.fileno())
    if rank == 0:
        speed = made / (time.time() - start)
        left = (total - made) / speed / 60
        print(f"shard {i:5d}  {made}/{total} pictures  {speed:8.1f} images/s  {left:7.1f} min left", flush=True)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
if rank == 0:
    todo, manifest = survey()
    if todo:
        raise DataError(f"{folder}: shards {todo} are not there at the end: did someone else write here?")
    manifest["shards"]["classes.json"] = file_hash(f"{folder}/classes.json")
    manifest |= dict(checkpoint=os.path.relpath(path), trained_on=checkpoint.get("trained_on", {}), device=device)
    manifest |= dict(counts={names[k] if names else "all": per_class for k in labels_of}, pictures=per_class * C)
    settle(manifest | {"torch": torch.__version__, "complete": True})
    rows = min(8, size_of(0))
    preview = load_array(f"{folder}/images_00000.npy")[: rows * C].reshape(rows, C, *model.shape[1:], -1).swapaxes(0, 1)
    preview = preview.reshape(rows * C, *preview.shape[2:])
    tile(preview, rows, [names[k] for k in labels_of] if names else ()).save(f"{folder}/preview.png")
    hours = manifest["seconds"] / 3600
    print(f"{per_class * C} pictures in {folder} ({hours:.2f} hours of drawing); see {folder}/preview.png")
