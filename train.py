"""Trains a DDPM with classifier-free guidance.

python train.py config/cifar_linear.py                                 one process: GPU, or CPU where there is none
torchrun --nproc_per_node=gpu train.py config/cifar_linear.py          all GPUs of this machine
python train.py config/cifar_linear.py --init_from=resume              go on after a stop (Ctrl-C saves first)
python train.py config/shapes.py                                       a laptop: minutes, no download
"""

import contextlib
import datetime
import math
import os
import shutil
import signal
import time
from dataclasses import asdict

import torch
import torch.distributed as dist

from configurator import ConfigError, configure
from data import Batches, DataError, fingerprint, load, save_json, tile, training_count
from ddpm import (
    DDPM,
    EMA,
    DDPMConfig,
    DDPMError,
    choose_device,
    evaluating,
    learning_rate,
    load_checkpoint,
    make_generator,
    save_checkpoint,
    to_float,
    to_uint8,
)

# ---------------------------------------------------------------------------------------------------------------------
# the run
out_dir = "out"  # checkpoint, log.json and pictures go here
init_from = "scratch"  # or resume: go on from out_dir's checkpoint, with its settings where none are given
seed = 0  # of weights, batches, t, noise and dropout
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # float32, bfloat16, float16
use_compile = "auto"  # torch.compile the network: True, False
# data
dataset = "cifar10"  # fashion_mnist, flowers102, shapes, or a folder of pictures or shards
data_dir = "data"  # where data sets are kept
classes = ""  # cat,frog keeps these alone
image_size = 0  # 0: the data set's own
val_fraction = 0.1  # share of the training split kept for validation; 0 trains on all of it
hflip = True  # mirror half the pictures
crop = 1.0  # below 1: random resized crops of at least this share of the side
# model (see DDPMConfig in ddpm.py)
conditional = True  # False: ignore the labels
p_uncond = 0.1  # probability that a picture loses its label; 0 gives a model that cannot be guided
arch = "unet"  # or cnn
patch = 1  # 2: pixel-unshuffle stem, works at half the resolution
ch = 128  # width of the first level
ch_mult = (1, 2, 2, 2)  # width of each level in units of ch
num_res_blocks = 2  # per level
attn_resolutions = (16,)  # sides of the feature maps that get attention
dropout = 0.1
timesteps = 500  # T
schedule = "linear"  # cosine, quadratic, sigmoid
beta_start = 1e-4
beta_end = 0.028
objective = "eps"  # v, x0
loss = "l2"  # l1, huber
weighting = "simple"  # vlb, min_snr
# optimisation
batch_size = 128  # pictures per step, over all ranks and micro-batches
grad_accum = 1  # micro-batches per step
max_iters = 200_000  # steps
epochs = 0.0  # above 0: the length in epochs, in place of max_iters; the one given last counts
lr = 2e-4  # after warm-up; falls to min_lr along a cosine
min_lr = 2e-5
warmup_iters = 1000
weight_decay = 0.0
grad_clip = 1.0  # 0: none
ema_decay = 0.9999  # of the averaged weights, which evaluation and sampling use
# reports
eval_interval = 2000  # steps between validations, each of which writes the checkpoint
eval_pictures = 5000  # of the validation split, at most
log_interval = 100
sample_interval = 10_000  # steps between class grids; 0: none
# ---------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())


def settle(config, given, checkpoint):
    """On resume, takes settings that were not given from the checkpoint, and refuses another model than it holds."""
    model_keys = set(checkpoint["model_args"])
    for key, value in checkpoint["config"].items():
        if key in ("init_from", "out_dir", "device", "use_compile") or (key in given and given[key] == value):
            continue
        if key in given and key in model_keys | {"conditional", "dataset", "classes"}:
            raise ConfigError(f"{key}: checkpoint {value!r}, flag {given[key]!r}: resume with the checkpoint's value")
        if key in given:
            say(f"resume: {key} changes from {value!r} to {given[key]!r}")
        elif key in config:
            config[key] = value
    return config


def say(*words):
    if rank == 0:
        print(*words, flush=True)


rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
checkpoint = None
if init_from not in ("scratch", "resume"):
    raise ConfigError(f"init_from: {init_from!r} is not one of scratch, resume")
if init_from == "resume":
    checkpoint = load_checkpoint(f"{out_dir}/ckpt.pt")
    globals().update(settle(config, given, checkpoint))
if [key for key in given if key in ("max_iters", "epochs")][-1:] == ["max_iters"]:
    epochs = config["epochs"] = 0.0  # the one given last counts
least = dict(batch_size=1, grad_accum=1, log_interval=1, eval_interval=1, sample_interval=0, grad_clip=0)
for key, value in least.items():
    if config[key] < value:
        raise ConfigError(f"{key}: {config[key]} must be at least {value}")
if not (0 <= val_fraction < 1 and 0 < crop <= 1):
    raise ConfigError(f"val_fraction={val_fraction} must be in [0, 1) and crop={crop} in (0, 1]")
if batch_size % (world * grad_accum):
    raise ConfigError(f"batch_size: {batch_size} is not divisible by {world} ranks x grad_accum {grad_accum}")
device, amp_dtype, use_compile = choose_device(device, dtype, use_compile)
if world > 1:
    patience = datetime.timedelta(hours=2)  # with rank 0, while it downloads
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=patience)

# data: rank 0 makes it where it has to be made
for turn in range(2):
    if (rank == 0) == (turn == 0):
        images, labels, names = load(dataset, "train", data_dir, image_size, classes)
        test_images, test_labels, test_names = load(dataset, "test", data_dir, image_size, classes)
    if world > 1:
        dist.barrier()
if test_images is not None and (test_names != names or (test_labels is None) != (labels is None)):
    raise DataError(f"the test split of {dataset} has other classes than its training split: {test_names}, {names}")
if not conditional or labels is None:
    labels = test_labels = None
    names = names if len(names) == 1 else []  # a model of one class knows what it draws
n_train = training_count(len(images), val_fraction)
n_val = len(images) - n_train
lost = [] if labels is None else sorted(set(labels[n_train:].tolist()) - set(labels[:n_train].tolist()))
if lost:
    say(
        f"beware: all of {', '.join(names[k] for k in lost)} is in the validation part, the last pictures: shuffle them"
    )
trained_on = dict(dataset=dataset, classes=classes, val_fraction=val_fraction, validation=fingerprint(images[n_train:]))
if checkpoint and checkpoint.get("trained_on", trained_on) != trained_on:
    raise ConfigError("resume: the validation pictures are not the checkpoint's: val_fraction or the data has changed")
batches = Batches(
    images[:n_train], None if labels is None else labels[:n_train], batch_size, seed, hflip, crop, 0, device
)
max_iters = config["max_iters"] = math.ceil(epochs * n_train / batch_size) if epochs > 0 else max_iters

# model
torch.manual_seed(seed)
shared = {key: config[key] for key in DDPMConfig.__dataclass_fields__ if key in config}
shared |= dict(image_size=images.shape[1], channels=images.shape[3])
model = DDPM(DDPMConfig(**shared, num_classes=0 if labels is None else len(names), class_names=names)).to(device)
model.amp_dtype = amp_dtype
decayed = [p for p in model.parameters() if p.ndim > 1]
others = [p for p in model.parameters() if p.ndim <= 1]
groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=lr, fused=not device.startswith("mps"))
scaler = torch.amp.GradScaler(device.split(":")[0], enabled=amp_dtype == torch.float16)
ema = EMA(model, ema_decay)
train_sums = torch.zeros(4, 2, device=device)  # loss by quarter of t since the last evaluation
evaluated = ("step", "epochs", "train_loss", "val_loss", "train_quarters", "val_quarters")
logged = ("log_step", "log_loss", "lr", "grad_norm")
step, history = 0, {key: [] for key in (*evaluated, *logged)} | {"test_loss": None}
if checkpoint:
    step, history = checkpoint["step"], checkpoint["history"] | {"test_loss": None}
    model.load_state_dict(checkpoint["model"])
    ema.load_state_dict(checkpoint["ema"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    train_sums = checkpoint["sums"].to(device)
    del checkpoint
if use_compile:
    model.net.compile(dynamic=False)  # in place: names in the checkpoint stay those of the plain module
trained = model
if world > 1:
    trained = torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.startswith("cuda") else None, broadcast_buffers=False
    )
say(
    f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M weights on {world} x {device}, "
    f"{str(amp_dtype or torch.float32)[6:]}, {'compiled' if use_compile else 'eager'}; {n_train} training and {n_val} "
    f"validation pictures of {model.shape}, {model.K or 'no'} classes; steps {step} to {max_iters}, batch {batch_size}"
)


def lr_at(step):
    return learning_rate(step, max_iters, lr, min_lr, warmup_iters)


def mean(sums):
    """(4, 2) sums and counts as the mean loss."""
    return (sums[:, 0].sum() / sums[:, 1].sum()).item()


def quarters(sums):
    """(4, 2) sums and counts as the four mean losses; a quarter without a draw is nan."""
    return [s / n if n else float("nan") for s, n in sums.tolist()]


def add_by_quarter(sums, losses, t):
    sums.index_add_(0, t * 4 // model.T, torch.stack([losses, torch.ones_like(losses)], dim=1))


def eagerly():
    """Validation and grids come in shapes of their own, which would take longer to compile than they save."""
    return torch.compiler.set_stance("force_eager") if use_compile else contextlib.nullcontext()


@torch.no_grad()
def evaluate(images, labels, first=0):
    """Loss of the averaged weights with t and noise fixed, whole and by quarter of t; labels[first] is images[0]'s."""
    sums, size = torch.zeros(4, 2, device=device), min(batch_size, 250)
    generator = make_generator(seed, 2**32 - 1)
    with ema.applied(), evaluating(model), eagerly():
        for start in range(0, len(images), size):
            x0 = to_float(torch.tensor(images[start : start + size])).to(device)
            y = None if labels is None else torch.from_numpy(labels[first + start :][: len(x0)]).to(device)
            t, eps = (v.to(device) for v in model.draw(len(x0), generator))
            add_by_quarter(sums, model(x0, y, t, eps), t)
    return mean(sums), quarters(sums)


def steps_of(path):
    """How long the model in a checkpoint was trained; -1 where there is none that can be read."""
    with contextlib.suppress(DDPMError):
        return load_checkpoint(path)["step"]
    return -1


def save(step):
    content = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step)
    content |= dict(
        sums=train_sums, scaler=scaler.state_dict(), model_args=asdict(model.config), config=config, history=history
    )
    content["trained_on"] = trained_on
    if last_saved == "none" and os.path.exists(found := f"{out_dir}/ckpt.pt"):  # another run's
        if steps_of(found) >= steps_of(before := f"{out_dir}/ckpt_before.pt"):
            shutil.copyfile(found, before)
            say(f"the checkpoint of another run that was in {out_dir} is kept as {before}")
    save_checkpoint(f"{out_dir}/ckpt.pt", content)
    save_json(f"{out_dir}/log.json", history)


def draw_grid(step):
    """A class grid of the averaged weights, eight pictures a row, from the same noise every time."""
    y = torch.arange(min(10, model.K or 4)).repeat_interleave(8)
    with ema.applied(), eagerly():
        w = 1.8 if model.K and p_uncond > 0 else 0.0
        x = model.sample(y if model.K else None, w, seed, range(len(y)), sampler="dpm++", steps=min(20, model.T))
    titles = model.config.class_names if model.K else ()
    tile(to_uint8(x).cpu().numpy(), 8, titles[:10]).save(f"{out_dir}/samples_{step:06d}.png")


stopping = []


def stop(signum, frame):
    """The first Ctrl-C or SIGTERM ends the run at the next step, with a checkpoint; a second one at once."""
    stopping.append(signum)
    signal.signal(signum, signal.SIG_DFL)


for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, stop)

if rank == 0:
    os.makedirs(out_dir, exist_ok=True)
rows = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
micro = batch_size // world // grad_accum
log_sums = torch.zeros(4, 2, device=device)  # loss by quarter of t since the last log line
first_step, log_time, log_step, last_saved, stopped = step, time.time(), step, f"step {step}" if step else "none", False
model.train()
while step < max_iters and not stopped:
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step)
    x0, y = batches(step, rows)
    # Each rank draws for the whole batch and takes its rows, so that one process and many train on the same numbers.
    generator = make_generator(seed, 2**30 + step, device)
    t, eps = (v[rows] for v in model.draw(batch_size, generator, device))
    if y is not None:
        dropped = model.drop_labels(torch.zeros(batch_size, dtype=y.dtype, device=device), generator)[rows]
        y = torch.where(dropped == model.K, dropped, y)
    torch.manual_seed(make_generator(seed + rank + 1, step).initial_seed())  # dropout's
    for start in range(0, len(x0), micro):
        part = slice(start, start + micro)
        if world > 1:
            trained.require_backward_grad_sync = start + micro == len(x0)
        losses = trained(x0[part], None if y is None else y[part], t[part], eps[part])
        scaler.scale(losses.mean() / grad_accum).backward()
        add_by_quarter(log_sums, losses.detach(), t[part])
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    ema.update()
    step += 1

    if step == first_step + 1:
        say(f"step {step:7d}  loss {losses.mean().item():.4f}  (first step: {time.time() - log_time:.1f} s)")
        log_time, log_step = time.time(), step
    # Several processes agree on a stop at a log line, so that all of them leave at the same step.
    evaluates = step % eval_interval == 0 or step == max_iters
    due = evaluates or step % log_interval == 0
    stopped = bool(stopping) if world == 1 else stopped
    if due or stopped:
        if world > 1:
            dist.all_reduce(log_sums)
            dist.all_reduce(flag := torch.tensor(float(bool(stopping)), device=device))
            stopped = flag.item() > 0
        now, total = time.time(), mean(log_sums)
        if not math.isfinite(total) or not (scaler.is_enabled() or math.isfinite(norm.item())):
            raise ConfigError(
                f"loss is {total:.3g}, grad norm {norm.item():.3g} by step {step} at lr {lr_at(step - 1):.3g} "
                f"(last good checkpoint: {last_saved}): "
                "lower lr, lengthen warmup_iters, or use --dtype=float32"
            )
        ms = (now - log_time) / max(1, step - log_step) * 1e3
        say(
            f"step {step:7d}  loss {total:.4f}  lr {lr_at(step - 1):.2e}  grad norm {norm.item():7.3f}  {ms:8.1f} ms  "
            f"{batch_size / ms * 1e3:8.1f} images/s  {(max_iters - step) * ms / 6e4:7.1f} min left"
        )
        for key, value in zip(logged, (step, total, lr_at(step - 1), norm.item())):
            history[key].append(value)
        train_sums += log_sums
        log_sums.zero_()
        log_time, log_step = now, step
    if evaluates:
        if rank == 0:
            history["step"].append(step)
            history["epochs"].append(step * batch_size / n_train)
            history["train_loss"].append(mean(train_sums))
            history["train_quarters"].append(quarters(train_sums))
            if n_val:
                val_loss, val_quarters = evaluate(images[n_train:][:eval_pictures], labels, n_train)
                history["val_loss"].append(val_loss)
                history["val_quarters"].append(val_quarters)
                by_quarter = " ".join(f"{q:.4f}" for q in val_quarters)
                say(f"step {step:7d}  validation loss {val_loss:.4f} (by quarter of t: {by_quarter})")
            if step == max_iters and test_images is not None:
                history["test_loss"], _ = evaluate(test_images, test_labels)
                say(f"step {step:7d}  test loss {history['test_loss']:.4f} on {len(test_images)} pictures")
        train_sums.zero_()
        log_time = time.time()
    if rank == 0 and (evaluates or stopped):
        save(step)
        last_saved = f"step {step}"
    if rank == 0 and sample_interval and (step % sample_interval == 0 or step == max_iters) and not stopped:
        draw_grid(step)
        log_time = time.time()
if stopped:
    say(f"stopped by signal at step {step}; go on with --init_from=resume")
else:
    say(f"done: `python sample.py --out_dir={out_dir}` draws from {out_dir}/ckpt.pt")
if world > 1:
    dist.destroy_process_group()
