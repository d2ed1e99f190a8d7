"""Samples images from a checkpoint; without one in out/, from the small pretrained weights in weights/.

python sample.py --seed=17 --w=1.8                            a row per class
python sample.py --classes=cat,cat,frog --num_samples=6       rows of the classes you name
python sample.py --rows=w=-1,0,2,6                            a row per value, from the same noise
python sample.py --rows=steps=5,10,25 --columns=sampler=ddim,dpm++      every combination, from the same noise
python sample.py --sampler=ddpm --gif=True                    the full ancestral chain, and a GIF of the denoising
"""

import math
import os
import time

import torch

from configurator import configure, describe_sampling, open_model, parse, progress, resolve_guidance, setup_device
from data import class_ids, tile
from ddpm import UserError, check_choice, image_noise, make_generator, to_uint8

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out"  # the checkpoint is here, and the images go here
seed = 17  # image k of a seed is the same at any batch size and on any machine (up to rounding)
w = None  # guidance of Ho & Salimans: -1 unconditional, 0 conditional; default 1.8 (0 without a null label)
guidance_scale = None  # the other convention, 1 + w; give one of the two
interval = ()  # low,high: guide only while sigma = sqrt(1 / alpha_bar - 1) is between them; empty: always
classes = ""  # names or numbers, a row for each, repeats allowed; default all
num_samples = 0  # images per row and class; default 8, or 1 with rows= or columns=
sampler = "dpm++"  # ddpm, ddim
steps = 0  # default 25 for dpm++, 50 for ddim, all of the model's for ddpm
eta = 0.0  # ddim's noise: 1 makes it ddpm
variance = "posterior"  # of ddpm: posterior or beta
clip_x0 = True  # keep x0_hat in [-1, 1] at every step
ema = True  # the averaged weights; False: the raw ones
batch_size = 80
gif = False  # write denoising.gif
rows = ""  # key=value,value,…: a row per value
columns = ""  # key=value,value,…: a column per value
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # float32, bfloat16, float16
use_compile = "False"  # True is worth it on a GPU for many images
# ---------------------------------------------------------------------------------------------------------------------
ranges = dict(num_samples="[0, inf)", steps="[0, inf)")  # 0: the defaults
config, given = configure(globals(), ranges, w=float, guidance_scale=float)
COMPARED = ("w", "guidance_scale", "sampler", "steps", "eta", "variance", "clip_x0", "ema", "seed")
device, amp_dtype, use_compile = setup_device(device, dtype, use_compile)
models = {}
if gif and (rows or columns):
    raise UserError("gif cannot be combined with rows or columns")


def get_model(ema):
    """(model, info) with averaged or raw weights, loaded once."""
    if ema not in models:
        models[ema] = open_model(out_dir, ema, device, amp_dtype)
        if use_compile:
            models[ema][0].compile_network()
    return models[ema]


def values_of(name, text):
    """'w=0,1' -> [("w=0", {"w": 0.0}), ("w=1", {"w": 1.0})]; '' -> [("", {})]."""
    if not text:
        return [("", {})]
    key, _, values = text.partition("=")
    check_choice(f"{name}=KEY=VALUE,VALUE", key, COMPARED)
    guidance = key in ("w", "guidance_scale")
    kind, settings = float if guidance else type(config[key]), []
    for value in values.split(","):
        try:
            others = {"w": None, "guidance_scale": None} if guidance else {}
            settings.append((f"{key}={value}", others | {key: parse(value, kind)}))
        except TypeError:
            raise UserError(f"{name}: {value!r} is not of type {kind.__name__}, which {key} is") from None
    return settings


def resolve(changes):
    """All settings of one image: config with some changed, w and the number of steps resolved and checked."""
    s = {key: config[key] for key in COMPARED} | changes
    model, _ = get_model(s["ema"])
    s["w"] = resolve_guidance(s["w"], s.pop("guidance_scale"), 1.8, model)
    defaults = {"dpm++": min(25, model.T), "ddim": min(50, model.T), "ddpm": model.T}
    s |= dict(steps=s["steps"] or defaults.get(s["sampler"]), interval=interval)
    model.check_sampling(torch.tensor(labels) if model.K else None, **s)
    return s


def sample(settings, title, frames=None):
    """Images (n, H, W, C) uint8 for `labels`, image k with noise k of the seed. frames: {step: its batches}."""
    settings, start, done = dict(settings), time.time(), []
    model, _ = get_model(settings.pop("ema"))
    total = math.ceil(len(labels) / batch_size) * settings["steps"]

    def on_step(i, xt, x0_hat):
        done.append(i)
        progress(title, len(done) / total, start)
        if frames is not None:
            frames.setdefault(i, []).append(to_uint8(xt).cpu())

    y = torch.tensor(labels) if model.K else None
    return torch.cat(list(model.sample_batches(y, range(len(labels)), batch_size, on_step=on_step, **settings)))


def save(image, name, **how):
    image.save(os.path.join(out_dir, name), **how)
    print(f"wrote {os.path.join(out_dir, name)}")


model, info = get_model(ema)
names = list(model.config.class_names) if model.K else []
shown = class_ids(classes, names) if classes else list(range(model.K)) or [0]
per_class = num_samples or (8 if not (rows or columns) or not model.K else 1)
labels = [k for k in shown for _ in range(per_class)]
row_values, column_values = values_of("rows", rows), values_of("columns", columns)
if set(row_values[0][1]) & set(column_values[0][1]):
    raise UserError(f"rows={rows} and columns={columns} change the same setting")
grid = [[(r, c, resolve(a | b)) for c, b in column_values] for r, a in row_values]
os.makedirs(out_dir, exist_ok=True)
varied = "".join(f"; {name} {text}" for name, text in (("rows", rows), ("columns", columns)) if text)
print(f"{info['description']}; {'first cell: ' if varied else ''}{describe_sampling(**grid[0][0][2])}{varied}")

if rows or columns:
    cells = [[sample(settings, f"{r} {c}") for r, c, settings in row] for row in grid]
    images = torch.cat([torch.cat(row) for row in cells]).numpy()
    titles, column_titles = [row[0][0] for row in grid if rows], [c for _, c, _ in grid[0] if columns]
    save(tile(images, len(labels) * len(grid[0]), titles, column_titles), "compare.png")
else:
    frames = {} if gif else None
    titles = [names[k] for k in shown if names]
    width = per_class if names else min(8, per_class)  # of the grid; a row per class
    save(tile(sample(grid[0][0][2], "sampling", frames).numpy(), width, titles), "sample.png")
    noise = image_noise([make_generator(seed, k) for k in range(len(labels))], model.shape)
    save(tile(to_uint8(noise / 3).numpy(), width, titles), "noise.png")
    if gif:
        times = sorted({*range(0, len(frames), max(1, len(frames) // 50)), max(frames)})
        sheets = [tile(torch.cat(frames[i])[: len(labels)].numpy(), width, titles) for i in times]
        durations = [80] * (len(sheets) - 1) + [2000]  # ms
        save(sheets[0], "denoising.gif", save_all=True, append_images=sheets[1:], loop=0, duration=durations)
