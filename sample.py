"""Samples images from a checkpoint; without one in out/, from the small pretrained weights in weights/.

python sample.py --seed=17 --w=1.8                            a row per class
python sample.py --classes=cat,cat,frog --num_samples=6       rows of the classes you name
python sample.py --rows=w=-1,0,2,6                            a row per value, from the same noise
python sample.py --rows=steps=5,10,25 --columns=sampler=ddim,dpm++      every combination, from the same noise
python sample.py --sampler=ddpm --gif=True                    the full ancestral chain, and a GIF of the denoising
"""

import functools
import json
import math
import os
import time

import torch
from PIL.PngImagePlugin import PngInfo

import runtime
from configurator import checked, configure
from data import class_ids, tile
from ddpm import check, check_choice, image_noise, make_generator, to_uint8

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out"  # the checkpoint is here, and the images go here
checkpoint = ""  # another checkpoint, a path
name = ""  # of the files; default sample, or compare with rows= or columns=
seed = 17  # image k of a seed is the same at any batch size and on any machine (up to rounding)
w = None  # guidance of Ho & Salimans: -1 unconditional, 0 conditional; default 1.8 (0 without a null label)
guidance_scale = None  # the other convention, 1 + w; give one of the two
interval = (0.25, 4.0)  # guide only while sigma = sqrt(1 / alpha_bar - 1) is between the two; empty: always
classes = ""  # names or numbers, a row for each, repeats allowed; default all
num_samples = 0  # images per row and class; default 8, or 1 with rows= or columns=
sampler = "dpm++"  # ddpm, ddim
steps = 0  # default 25 for dpm++, 50 for ddim, all of the model's for ddpm
eta = 0.0  # ddim's noise: 1 makes it ddpm
ema = True  # the averaged weights; False: the raw ones
batch_size = 80
gif = False  # write denoising.gif
png = False  # write every image as a file of its own too, row by row: sample/0000.png, …
rows = ""  # key=value,value,…: a row per value
columns = ""  # key=value,value,…: a column per value
device = "auto"  # cuda, mps, cpu
dtype = "float32"  # bfloat16, float16, or auto: the fastest here
# ---------------------------------------------------------------------------------------------------------------------
config, _ = configure(globals())
COMPARED = {"w": None, "guidance_scale": None, "sampler": "", "steps": 0, "eta": 0.0, "ema": True, "seed": 0}
device, amp_dtype, _ = runtime.setup_device(device, dtype, "False")
check(os.path.basename(name) == name, f"name: {name} must be a file name without a folder")
check(not (gif and (rows or columns)), "gif cannot be combined with rows or columns")


@functools.cache
def get_model(ema):
    """The model with averaged or raw weights, loaded once."""
    return runtime.open_model(out_dir, checkpoint, ema, device, amp_dtype)[0]


def values_of(text):
    """'w=0,1' -> [("w=0", {"w": 0.0}), ("w=1", {"w": 1.0})]; '' -> [("", {})]."""
    if not text:
        return [("", {})]
    key, _, values = text.partition("=")
    check_choice("rows or columns", key, COMPARED)
    return [(f"{key}={v}", {key: checked(text, key, v, COMPARED[key])}) for v in values.split(",")]


def sample(changes, title, frames=None):
    """Images (n, H, W, C) uint8 for `labels`, image k with noise k of the seed, under config with some changes, and w.

    frames: {step: its batches}, filled in.
    """
    s, start, done = {key: config[key] for key in COMPARED} | changes, time.time(), []
    model = get_model(s.pop("ema"))
    s["w"] = runtime.resolve_guidance(s["w"], s.pop("guidance_scale"), 1.8, model)
    s["steps"] = s["steps"] or min({"dpm++": 25, "ddim": 50}.get(s["sampler"], model.T), model.T)
    total = math.ceil(len(labels) / batch_size) * s["steps"]

    def on_step(i, xt, x0_hat):
        done.append(i)
        runtime.progress(title, len(done) / total, start)
        if frames is not None:
            frames.setdefault(i, []).append(to_uint8(xt).cpu())

    y = torch.tensor(labels) if model.K else None
    guided = runtime.guidance_text(s["w"], interval, model)
    print(f"{title}: {guided}{s['sampler']}, {s['steps']} steps, seed {s['seed']}", flush=True)
    batches = model.sample_batches(y, range(len(labels)), batch_size, interval=interval, on_step=on_step, **s)
    images = torch.cat(list(batches))
    print(f"{len(images)} images in {time.time() - start:.1f} s")
    return images, s["w"]


def save(image, file, **how):
    """Writes a file of out_dir; a PNG with the settings as its text."""
    info, path = PngInfo(), os.path.join(out_dir, file)
    info.add_text("settings", json.dumps({k: v for k, v in config.items() if k not in ("out_dir", "checkpoint")}))
    with runtime.atomic_write(path) as f:
        image.save(f, format=file[-3:], **how | ({"pnginfo": info} if file.endswith("png") else {}))
    print(f"wrote {path}")


model = get_model(ema)
os.makedirs(out_dir, exist_ok=True)
names = (list(model.config.class_names) or [str(k) for k in range(model.K)]) if model.K else []
shown = class_ids(classes, names) if classes else list(range(model.K or 1))
per_class = num_samples or (1 if rows or columns else 8)
labels = [k for k in shown for _ in range(per_class)]
stem = name or ("compare" if rows or columns else "sample")
if rows or columns:
    row_values, column_values = values_of(rows), values_of(columns)
    check(not row_values[0][1].keys() & column_values[0][1].keys(), "rows and columns change the same setting")
    cells = [sample(a | b, f"{r} {c}".strip()) for r, a in row_values for c, b in column_values]
    images, of_classes = torch.cat([x for x, _ in cells]).numpy(), all(w > -1 for _, w in cells)
    titles, over = [r for r, _ in row_values if r], [names[k] if names and of_classes else "" for k in shown]
    heads = [f"{c if k == 0 else ''}\n{over[k]}" for c, _ in column_values for k in range(len(shown))]
    heads = heads if columns else over if any(over) else ()  # the value over the first class, and the classes
    save(tile(images, len(labels) * len(column_values), titles, heads), f"{stem}.png")
else:
    frames = {} if gif else None
    images, used_w = sample({}, "sampling", frames)
    titles = [names[k] for k in shown if names and used_w > -1]  # at w = -1 images are of no class
    width = per_class if names else min(8, per_class)
    save(tile(images.numpy(), width, titles), f"{stem}.png")
    noise = image_noise([make_generator(seed, k) for k in range(len(labels))], model.shape)
    noise = to_uint8(noise / 3).numpy()  # / 3: 3 sigma is black or white
    save(tile(noise, width, titles), f"{name}_noise.png" if name else "noise.png")
    if gif:
        times = sorted({*range(0, len(frames), max(1, len(frames) // 25)), max(frames)})
        sheets = [tile(torch.cat(frames[i]).numpy(), width, titles, zoom=1) for i in times]
        durations = [80] * (len(sheets) - 1) + [2000]  # ms
        how = dict(save_all=True, append_images=sheets[1:], loop=0, duration=durations)
        save(sheets[0], f"{name}.gif" if name else "denoising.gif", **how)
if png:
    folder = runtime.new_path(os.path.join(out_dir, stem))
    os.makedirs(folder)
    for k, image in enumerate(images):
        tile(image[None], 1, zoom=1, pad=0).save(os.path.join(folder, f"{k:04d}.png"))
    print(f"wrote {folder}")
