"""Trains a DDPM with classifier-free guidance.

python train.py config/cifar_linear.py                              one process: GPU, or CPU if there is none
torchrun --nproc_per_node=gpu train.py config/cifar_linear.py       all GPUs of this machine
python train.py config/cifar_linear.py --init_from=resume           continue after a stop (Ctrl-C saves first)
python train.py config/folder.py --init_from=weights/cifar_small.pt fine-tune a model on other images or classes
python train.py config/shapes.py                                    a laptop: minutes, no download
"""

import contextlib
import datetime
import math
import os
import time
import warnings
from dataclasses import asdict, fields

import numpy as np
import torch
import torch.distributed as dist

from configurator import (
    apply_saved,
    catch_signals,
    configure,
    dtype_name,
    duration,
    join_process_group,
    leave_process_group,
    lock_folder,
    process_rank,
    resolve_guidance,
    setup_device,
)
from data import Batches, balanced, fingerprint, load_splits, save_json, tile, training_count
from ddpm import (
    DDPM,
    EMA,
    DDPMConfig,
    UserError,
    atomic_write,
    evaluating,
    learning_rate,
    load_checkpoint,
    make_generator,
    make_optimizer,
    reading,
    seed_of,
    to_float,
    to_uint8,
)

# ---------------------------------------------------------------------------------------------------------------------
# the run
out_dir = "out"  # checkpoint, log.json and class grids go here
init_from = "scratch"  # resume: continue from out_dir's checkpoint, with its settings; a path: fine-tune that model
seed = 0  # of weights, batches, t, noise and dropout
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # float32, bfloat16, float16
use_compile = "auto"  # torch.compile the network: True, False
# data
dataset = "cifar10"  # fashion_mnist, flowers102, shapes, or a folder of images or shards
data_dir = "data"  # where data sets are kept
classes = ""  # cat,frog keeps only these
image_size = 0  # 0: the data set's own
val_fraction = 0.1  # share of the training split used for validation; 0: none
n_real = 0  # train on so many images, the same number of each class and the same as in classifier.py; 0: all
hflip = True  # mirror half of the images
crop = 1.0  # below 1: random resized crops of at least this share of the side
# model (see DDPMConfig in ddpm.py)
conditional = True  # False: ignore the labels
p_uncond = 0.1  # probability of dropping a label; 0: no guidance later
arch = "unet"  # or cnn
patch = 1  # 2: work at half the resolution (pixel unshuffle)
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
batch_size = 128  # images per step, over all processes and micro-batches
grad_accum = 1  # micro-batches per step
max_iters = 200_000  # steps
epochs = 0.0  # above 0: the length of the run in epochs, instead of max_iters
lr = 2e-4  # after warm-up; decays to min_lr along a cosine
min_lr = 2e-5
warmup_iters = 1000
weight_decay = 0.0
grad_clip = 1.0  # maximal norm of the gradient; 0: any
ema_decay = 0.9999  # of the averaged weights, which validation and sampling use
# reports
eval_interval = 5000  # steps between validations, each followed by a checkpoint
eval_images = 5000  # of the validation split, at most
log_interval = 100
sample_interval = 10_000  # steps between class grids; 0: none
# ---------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())

# 1. Processes: torchrun starts one per GPU and tells each its rank.
rank, world = process_rank()


def log(*words):
    if rank == 0:
        print(*words, flush=True)


# 2. Resume: settings come from the checkpoint unless they were given, and what defines the model cannot change.
# Settings are the globals above; config is the copy of them that is saved.
checkpoint_path, checkpoint, pretrained = os.path.join(out_dir, "ckpt.pt"), None, None
if rank == 0 and (init_from != "resume" or os.path.exists(checkpoint_path)):
    lock_folder(out_dir)
fixed = {f.name for f in fields(DDPMConfig)}
if init_from == "resume":
    checkpoint = load_checkpoint(checkpoint_path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{checkpoint_path} holds only averaged weights: use --init_from={checkpoint_path}")
    fixed |= {"conditional", "dataset", "classes"}
    with reading(checkpoint_path):
        apply_saved(checkpoint["config"], config, given, globals(), fixed, log)
elif init_from != "scratch":
    if not os.path.isfile(init_from):
        raise UserError(f"init_from: {init_from!r} is not scratch, resume or a checkpoint such as out/ckpt.pt")
    pretrained = load_checkpoint(init_from)
    fixed -= {"dropout", "p_uncond", "loss", "weighting"}
    with reading(init_from):
        apply_saved(pretrained["model_args"], config, given, globals(), fixed, log)
if batch_size % (world * grad_accum):
    raise UserError(f"batch_size: {batch_size} is not divisible by {world} processes x grad_accum {grad_accum}")
device, amp_dtype, use_compile = setup_device(device, dtype, use_compile)

# 3. Data: rank 0 downloads or decodes what is missing, then one process on each other host, then the rest.
if world > 1:
    nccl = "cuda" in device and dist.is_nccl_available()  # not on Windows
    gpu, hours = torch.device(device) if nccl else None, datetime.timedelta(hours=2)
    join_process_group("nccl" if nccl else "gloo", timeout=hours, device_id=gpu)
for turn in range(3):
    if turn == (0 if rank == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2):
        (images, labels), (test_images, test_labels), names = load_splits(dataset, data_dir, image_size, classes)
    if world > 1:
        dist.barrier()
n_train = training_count(len(images), val_fraction)
chosen = slice(n_train)  # a view: the images may be mapped from disk
if n_real:
    chosen = balanced(np.zeros(n_train) if labels is None else labels[:n_train], n_real, 0)
if not conditional or labels is None:
    labels = test_labels = None
    names = names if len(names) == 1 else []  # augment.py labels the images of a one-class model
train_images, train_labels = images[chosen], None if labels is None else labels[chosen]
val_images, val_labels = images[n_train:], None if labels is None else labels[n_train:]
n_train = len(train_images)
unseen = [] if labels is None else sorted(set(val_labels.tolist()) - set(train_labels.tolist()))
if unseen:
    missing = ", ".join(names[k] for k in unseen)
    log(f"warning: {missing}: no training images, only validation images, which are the last of the set")
trained_on = dict(dataset=dataset, classes=classes, val_fraction=val_fraction, validation=fingerprint(val_images))
if n_real:
    trained_on |= dict(n_real=n_real, training=fingerprint(train_images))
if pretrained:
    trained_on["init_from"] = pretrained.get("trained_on", {})
saved = checkpoint.get("trained_on", trained_on) if checkpoint else trained_on
with reading(checkpoint_path):
    trained_on |= {key: saved[key] for key in saved.keys() & {"init_from"}}
if saved != trained_on:
    raise UserError("resume: these are not the checkpoint's images: val_fraction, n_real or the data has changed")
batches = Batches(train_images, train_labels, batch_size, seed, hflip, crop, 0, device)
if world > 1:
    compared = config | trained_on | {"images": len(images), "step": checkpoint and checkpoint["step"]}
    for key in ("data_dir", "dataset", "out_dir", "device"):  # hosts may keep the same images in different places
        compared.pop(key)
    dist.all_gather_object(all_settings := [None] * world, compared)
    if differing := [key for key, value in all_settings[0].items() if any(s[key] != value for s in all_settings)]:
        raise UserError(f"the processes differ in {', '.join(differing)}")
if epochs > 0:
    max_iters = config["max_iters"] = math.ceil(epochs * n_train / batch_size)
    config["epochs"] = 0.0  # so that a resumed run may change max_iters

# 4. Model.
torch.manual_seed(seed)
model_args = {f.name: config[f.name] for f in fields(DDPMConfig) if f.name in config}
model_args |= dict(image_size=images.shape[1], channels=images.shape[3], class_names=names)
sides = [images.shape[1] // patch // 2**k for k in range(len(ch_mult))]
if init_from == "scratch" and arch == "unet" and not set(attn_resolutions) <= set(sides):
    raise UserError(f"attn_resolutions: {attn_resolutions}, but the levels are {', '.join(map(str, sides))} wide")
model = DDPM(DDPMConfig(**model_args, num_classes=0 if labels is None else len(names))).to(device)
model.amp_dtype = amp_dtype
if pretrained:  # other classes get new embeddings
    with reading(init_from):
        if pretrained["model_args"]["channels"] != images.shape[3]:
            raise UserError(f"init_from: a model of {pretrained['model_args']['channels']}-channel images")
        state, same_classes = pretrained["ema"]["shadow"], list(pretrained["model_args"]["class_names"]) == names
        state = {k: v for k, v in state.items() if same_classes or "condition.label" not in k}
        keys = model.load_state_dict(state, strict=False)
        if wrong := [k for k in (*keys.missing_keys, *keys.unexpected_keys) if "condition.label" not in k]:
            raise ValueError(f"weights {wrong[0]}")

# 5. Optimiser, loss scaler for float16, averaged weights.
optimizer = make_optimizer(model, lr, weight_decay)
scaler = torch.amp.GradScaler(device.split(":")[0], enabled=amp_dtype == torch.float16)
ema = EMA(model, ema_decay)

# 6. State: what a resumed run continues with.
step, train_sums = 0, torch.zeros(4, 2, device=device)  # sum and count of the loss by quarter of t since validation
keys = ("step", "epochs", "train_loss", "val_loss", "train_quarters", "val_quarters")
history = {key: [] for key in (*keys, "log_step", "log_loss", "lr", "grad_norm")}
if checkpoint:
    with reading(checkpoint_path):
        if type(checkpoint["step"]) is not int or checkpoint["history"].keys() != history.keys() | {"test_loss"}:
            raise ValueError("step or history")
        step, history = checkpoint["step"], checkpoint["history"]
        train_sums = checkpoint["sums"].to(device).view(4, 2)
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        if any(v.shape not in (p.shape, ()) for p, state in optimizer.state.items() for v in state.values()):
            raise ValueError("optimizer state of another shape")
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
    del checkpoint
history["test_loss"] = None
if use_compile:
    model.compile_network()
ddp_model = model
if world > 1:
    with warnings.catch_warnings():  # torch 2.14 renames broadcast_buffers; before 2.14 there is no other name
        warnings.simplefilter("ignore", FutureWarning)
        device_ids = [device] if "cuda" in device else None
        ddp_model = torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)
seed_dropout = torch.cuda.manual_seed if "cuda" in device else torch.manual_seed  # the latter seeds every GPU
log(
    f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {world} x {device}, "
    f"{dtype_name(amp_dtype)}, {'compiled' if use_compile else 'eager'}; {n_train} training and "
    f"{len(val_images)} validation images of {model.shape}, {model.K or 'no'} classes; "
    f"steps {step} to {max_iters}, batch {batch_size}"
)


# 7. Reports: validation loss, class grids, checkpoints.
def add_by_quarter(sums, losses, t, skip=False):
    """Adds the losses of a batch to the sums and counts (4, 2) of their quarter of 0..T-1; skip: only finite losses."""
    counted = losses.isfinite() if skip else torch.ones_like(losses, dtype=torch.bool)
    sums.index_add_(0, t * 4 // model.T, torch.stack([losses.where(counted, 0), counted.to(losses.dtype)], dim=1))


def mean(sums):
    return (sums[:, 0].sum() / sums[:, 1].sum()).item()


def quarters(sums):
    return [s / n if n else float("nan") for s, n in sums.tolist()]


@contextlib.contextmanager
def averaged_weights():
    """Eval mode with the averaged weights, uncompiled: shapes that are rare would take longer to compile."""
    eager = torch.compiler.set_stance("force_eager") if use_compile else contextlib.nullcontext()
    with torch.no_grad(), ema.applied(), evaluating(model), eager:
        yield


def evaluate(images, labels):
    """Sums and counts (4, 2) of the loss of the averaged weights, with the same t and noise every time.

    Every process calls it: they take the batches in turn.
    """
    sums, size = torch.zeros(4, 2, device=device), min(batch_size, 250)
    generator = make_generator(seed, 2**32 - 1)
    with averaged_weights():
        for i, start in enumerate(range(0, len(images), size)):
            part = slice(start, min(start + size, len(images)))
            t, eps = model.random_t_eps(part.stop - start, generator)
            if i % world == rank:
                x0, t, eps = to_float(torch.tensor(images[part]).to(device)), t.to(device), eps.to(device)
                y = None if labels is None else torch.from_numpy(labels[part]).to(device)
                add_by_quarter(sums, model(x0, y, t, eps), t)
    if world > 1:
        dist.all_reduce(sums)
    return sums


def save_grid():
    """Eight images per class from the averaged weights and the same noise every time."""
    y = torch.arange(min(10, model.K or 4)).repeat_interleave(8)
    w = resolve_guidance(None, None, 1.8, model)
    with averaged_weights():
        x = model.sample(y if model.K else None, w, seed, range(len(y)), sampler="dpm++", steps=min(20, model.T))
    titles = model.config.class_names[:10] if model.K else ()
    tile(to_uint8(x).cpu().numpy(), 8, titles).save(f"{out_dir}/samples_{step:06d}.png")


def save():
    content = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step)
    content |= dict(scaler=scaler.state_dict(), sums=train_sums, history=history, config=config)
    content |= dict(model_args=asdict(model.config), trained_on=trained_on)
    if saved_step is None and os.path.exists(checkpoint_path):  # of an earlier run
        kept = f"{out_dir}/ckpt_{time.strftime('%Y%m%d-%H%M%S', time.localtime(os.path.getmtime(checkpoint_path)))}.pt"
        os.replace(checkpoint_path, kept)
        log(f"{checkpoint_path} of an earlier run is now {kept}")
    with atomic_write(checkpoint_path) as f:
        torch.save(content, f)
    save_json(f"{out_dir}/log.json", history)


# 8. Signals: the first Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second one at once.
signals = catch_signals()

# 9. The loop.
rows = slice(rank * batch_size // world, (rank + 1) * batch_size // world)  # of the batch, for this process
micro = batch_size // world // grad_accum
log_sums = torch.zeros(4, 2, device=device)  # as train_sums, since the last log line, where they are added to them
first_step, saved_step, stopped = step, step or None, False  # saved_step: of this run's checkpoint
log_step, log_time = step, time.time()
model.train()
while step < max_iters and not stopped:
    lr_now = learning_rate(step, max_iters, lr, min_lr, warmup_iters)
    for group in optimizer.param_groups:
        group["lr"] = lr_now

    # Batch, t, noise and label dropout. Every process draws for the whole batch and takes its rows, so that the
    # numbers do not depend on how many processes there are. Only dropout has a seed per process.
    x0, y = batches(step, rows)
    generator = make_generator(seed, 2**30 + step, device)
    t, eps = (v[rows] for v in model.random_t_eps(batch_size, generator, device))
    if y is not None:
        y = model.drop_labels(y, torch.rand(batch_size, generator=generator, device=device)[rows])
    seed_dropout(seed_of(seed + rank + 1, step))

    # Forward and backward, one micro-batch at a time. Gradients are averaged over processes after the last one.
    for start in range(0, len(x0), micro):
        part = slice(start, start + micro)
        if world > 1:
            ddp_model.require_backward_grad_sync = start + micro == len(x0)
        losses = ddp_model(x0[part], None if y is None else y[part], t[part], eps[part])
        scaler.scale(losses.mean() / grad_accum).backward()
        add_by_quarter(log_sums, losses.detach(), t[part], skip=scaler.is_enabled())  # the scaler skips such steps

    # Update the weights and their average.
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    ema.update()
    step += 1

    # Log. Nothing above waits for the device; this does. Processes agree here on whether to stop.
    if step == first_step + 1:
        seconds = time.time() - log_time
        slow = device == "cpu" and not use_compile and seconds * (max_iters - step) > 2 * 86400
        advice = f"; about {duration(seconds * (max_iters - step))}: on a CPU try config/cifar_small.py" if slow else ""
        log(f"step {step:7d}  loss {losses.mean().item():.4f}  (first step: {seconds:.1f} s{advice})")
        log_step, log_time = step, time.time()
    evaluates = step % eval_interval == 0 or step == max_iters
    stopped = bool(signals) if world == 1 else stopped
    if evaluates or stopped or step % log_interval == 0:
        if world > 1:
            dist.all_reduce(log_sums)
            dist.all_reduce(flag := torch.tensor(float(bool(signals)), device=device))
            stopped = flag.item() > 0
        average, norm, now = mean(log_sums), norm.item(), time.time()
        # In float16 a step without finite gradients is skipped and halves the scale.
        diverged = scaler.get_scale() < 1 if scaler.is_enabled() else not math.isfinite(norm)
        if diverged or not math.isfinite(average):
            eager = "--use_compile=False or " if use_compile else ""
            raise UserError(
                f"loss {average:.3g}, grad norm {norm:.3g} at step {step}, lr {lr_now:.3g} (last checkpoint: step "
                f"{saved_step}): lower lr, lengthen warmup_iters, or use {eager}--dtype=float32"
            )
        seconds = (now - log_time) / max(1, step - log_step)
        log(
            f"step {step:7d}  loss {average:.4f}  lr {lr_now:.2e}  grad norm {norm:7.3f}  {1e3 * seconds:8.1f} ms  "
            f"{batch_size / max(seconds, 1e-9):8.1f} images/s  {duration((max_iters - step) * seconds)} left"
        )
        for key, value in dict(log_step=step, log_loss=average, lr=lr_now, grad_norm=norm).items():
            history[key].append(value)
        train_sums += log_sums
        log_sums.zero_()
        log_step, log_time = step, now

    # Validate; rank 0 saves.
    if evaluates:
        history["step"].append(step)
        history["epochs"].append(step * batch_size / n_train)
        history["train_loss"].append(mean(train_sums))
        history["train_quarters"].append(quarters(train_sums))
        if len(val_images):
            sums = evaluate(val_images[:eval_images], val_labels)
            history["val_loss"].append(mean(sums))
            history["val_quarters"].append(quarters(sums))
            by_quarter = " ".join(f"{q:.4f}" for q in quarters(sums))
            n = len(val_images[:eval_images])
            log(f"step {step:7d}  validation loss {mean(sums):.4f} on {n} images (t from clean to noisy: {by_quarter})")
        if step == max_iters and test_images is not None:
            history["test_loss"] = mean(evaluate(test_images, test_labels))
            log(f"step {step:7d}  test loss {history['test_loss']:.4f} on {len(test_images)} images")
    if evaluates:
        train_sums.zero_()
    if (evaluates or stopped) and rank == 0:
        save()
        saved_step = step
    if rank == 0 and sample_interval and not stopped and (step % sample_interval == 0 or step == max_iters):
        save_grid()
    if evaluates:
        log_time = time.time()

if stopped:
    log(f"stopped by a signal at step {step}: `python train.py --init_from=resume --out_dir={out_dir}` continues")
else:
    log(f"done: `python sample.py --out_dir={out_dir}` samples from {checkpoint_path}")
if world > 1:
    leave_process_group()
