"""Draws pictures from a checkpoint. Without one in out_dir, from the small pretrained weights in weights/.

python sample.py --seed=17 --w=1.8                       a row for each class
python sample.py --classes=cat,cat,frog --num_samples=6  rows of the classes you name
python sample.py --sweep=w=-1,0,2,6                      a row for each value, the same noise in every row
python sample.py --sampler=ddpm --gif=True               the full ancestral chain, and a GIF of the denoising
"""

import math
import os
import time

import torch

from configurator import HERE, ConfigError, configure, parse, progress
from data import class_ids, tile
from ddpm import (
    PictureNoise,
    choose_device,
    guidance_weight,
    how_drawn,
    model_from_checkpoint,
    open_checkpoint,
    to_uint8,
)

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out"  # the checkpoint is here, and the pictures go here
seed = 17  # picture k of a seed is the same at any batch size and on any machine (up to rounding)
w = None  # guidance of Ho & Salimans: -1 unconditional, 0 conditional; default 1.8 (0 without a null label)
guidance_scale = None  # other papers' number for the same thing, 1 + w; give one of the two
interval = ()  # low,high: guide only while sigma = sqrt(1 / alpha_bar - 1) is between them; empty: always
classes = ""  # names or numbers, a row for each, repeats allowed; default all
num_samples = 0  # pictures per row and class; default 8, in a sweep 1
sampler = "dpm++"  # ddpm, ddim
steps = 0  # default 25 for dpm++, 50 for ddim, all of the model's for ddpm
eta = 0.0  # ddim's noise: 1 makes it ddpm
variance = "posterior"  # of ddpm: posterior or beta
clip_x0 = True  # keep the predicted picture in [-1, 1] at every step
ema = True  # the averaged weights; False: the raw ones
batch_size = 80
gif = False  # write denoising.gif
sweep = ""  # key=value,value,…: a row per value
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # float32, bfloat16, float16
use_compile = "False"  # True pays on a GPU for many pictures
# ---------------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), w=float, guidance_scale=float)
SWEEPABLE = ("w", "guidance_scale", "sampler", "steps", "eta", "variance", "clip_x0", "ema", "seed")

if num_samples < 0 or batch_size < 1:
    raise ConfigError(f"num_samples={num_samples} and batch_size={batch_size} must be positive")
device, amp_dtype, use_compile = choose_device(device, dtype, use_compile)
path, checkpoint = open_checkpoint(out_dir, os.path.join(HERE, "weights"), device)

sweep_key, _, sweep_text = sweep.partition("=")
if sweep and gif:
    raise ConfigError("a sweep has no gif: give one of the two")
if sweep and (sweep_key not in SWEEPABLE or not sweep_text):
    raise ConfigError(f"sweep: {sweep!r} must be KEY=VALUE,VALUE with KEY one of {', '.join(SWEEPABLE)}")
models = {}


def model_with(ema):
    """The network with averaged or raw weights, made once."""
    if ema not in models:
        models[ema] = model_from_checkpoint(checkpoint, ema, device)
        models[ema].amp_dtype = amp_dtype
        if use_compile:
            models[ema].net.compile(dynamic=False)
    return models[ema]


def resolve(settings):
    """Settings with w (and not guidance_scale) and steps made definite, for the model at hand."""
    model = model_with(settings["ema"])
    w = guidance_weight(settings["w"], settings["guidance_scale"], 1.8, model)
    default_steps = {"dpm++": min(25, model.T), "ddim": min(50, model.T), "ddpm": model.T}.get(settings["sampler"])
    return settings | {"w": w, "guidance_scale": None, "steps": settings["steps"] or default_steps}


def draw(labels, s, what, frames=None):
    """Pictures (n, H, W, C) uint8 for a list of labels (None: unlabelled), picture k with noise k of the seed."""
    model, batches, start, done = model_with(s["ema"]), math.ceil(len(labels) / batch_size), time.time(), []

    def on_step(i, xt, x0_hat):
        done.append(i)
        progress(what, len(done) / (batches * s["steps"]), start)
        if frames is not None:
            frames.setdefault(i, []).append(to_uint8(xt).cpu())

    how = {key: s[key] for key in ("w", "seed", "sampler", "steps", "eta", "clip_x0", "variance")}
    how |= dict(interval=interval, on_step=on_step)
    y = torch.tensor(labels) if model.K else None
    return torch.cat(list(model.draw_pictures(y, range(len(labels)), batch_size, **how)))


def save(picture, name, **how):
    picture.save(os.path.join(out_dir, name), **how)
    print(f"wrote {os.path.join(out_dir, name)}")


model = model_with(ema)
settings = {key: config[key] for key in SWEEPABLE}
rows = class_ids(classes, model.config.class_names) if classes else list(range(model.K)) or [None]
names = list(model.config.class_names) if model.K else []
os.makedirs(out_dir, exist_ok=True)
chosen = resolve(settings)
print(
    f"{path}, step {checkpoint['step']}, {'averaged' if ema else 'raw'} weights; {device}, "
    f"{str(amp_dtype or torch.float32)[6:]}; "
    + how_drawn(chosen["w"], interval, chosen["sampler"], chosen["steps"], chosen["seed"])
)
if sweep:
    per_class = num_samples or (1 if model.K else 8)
    labels = [k for k in rows for _ in range(per_class)]
    y, swept = torch.tensor(labels) if model.K else None, []  # a title and settings for each row
    for text in sweep_text.split(","):
        try:
            kind = float if sweep_key in ("w", "guidance_scale") else type(config[sweep_key])
            value = parse(text, kind)
        except TypeError:
            raise ConfigError(f"sweep: {text!r} is not of type {kind.__name__}, which {sweep_key} is") from None
        clash = {"w": None, "guidance_scale": None} if sweep_key in ("w", "guidance_scale") else {}
        s = resolve(settings | clash | {sweep_key: value})
        model_with(s["ema"]).check_sampling(y, interval=interval, **s)  # every row, before one is drawn
        swept.append((f"{sweep_key}={text}", s))
    pictures = torch.cat([draw(labels, s, title) for title, s in swept])
    save(tile(pictures.numpy(), len(labels), [title for title, _ in swept]), f"sweep_{sweep_key}.png")
else:
    columns = num_samples or 8
    labels, titles, frames = [k for k in rows for _ in range(columns)], [names[k] for k in rows if names], {}
    pictures = draw(labels, chosen, "sampling", frames if gif else None)
    save(tile(pictures.numpy(), columns, titles), "sample.png")
    noise = PictureNoise(seed, range(len(labels)), model.shape)()
    save(tile(to_uint8(noise / 3).numpy(), columns, titles), "noise.png")
    if gif:
        shown = sorted({*range(0, len(frames), max(1, len(frames) // 50)), max(frames)})
        sheets = [tile(torch.cat(frames[i])[: len(labels)].numpy(), columns, titles) for i in shown]
        durations = [80] * (len(sheets) - 1) + [2000]  # ms
        save(sheets[0], "denoising.gif", save_all=True, append_images=sheets[1:], loop=0, duration=durations)
