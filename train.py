"""Trains a DDPM with classifier-free guidance.

python train.py config/cifar_linear.py                              one process: GPU, or CPU if there is none
torchrun --nproc_per_node=gpu train.py config/cifar_linear.py       all GPUs of this machine
python train.py --init_from=resume                                  continue after a stop (Ctrl-C saves first)
python train.py config/folder.py --init_from=weights/cifar_small.pt fine-tune a model on other images or classes
python train.py config/shapes.py                                    a laptop: minutes, no download
"""

import copy
import math
import os
import time
from dataclasses import asdict, fields

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import ddpm
import runtime
from configurator import configure
from ddpm import check

# ---------------------------------------------------------------------------------------------------------------------
# the run
out_dir = "out"  # checkpoint, log.json and class grids go here
init_from = "scratch"  # resume: continue from out_dir's checkpoint, with its settings; a path: fine-tune that model
seed = 0  # of weights, batches, t, noise and dropout
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # float32, bfloat16, float16
use_compile = "auto"  # torch.compile the network: True, False, channels_last
# data
dataset = "cifar10"  # cifar100, mnist, fashion_mnist, flowers102, shapes, or a folder of images or shards
data_dir = "data"  # where data sets are kept
classes = ""  # cat,frog keeps only these
image_size = 0  # 0: the data set's own
val_fraction = 0.1  # share of the training split used for validation; 0: none
n_real = 0  # training images, an equal share per class, the ones that classifier.py takes for the same n_real; 0: all
hflip = True  # mirror half of the images
crop = 1.0  # below 1: random resized crops of at least this share of the side
# model (see DDPMConfig in ddpm.py)
conditional = True  # False: ignore the labels
p_uncond = 0.1  # probability of dropping a label, below 1; 0: no guidance later
arch = "unet"  # or cnn
patch = 1  # 2: work at half the resolution (pixel unshuffle)
ch = 128  # width of the first level
ch_mult = (1, 2, 2, 2)  # width of each level in units of ch
num_res_blocks = 2  # per level
attn_resolutions = (16,)  # sides of the feature maps that get attention
dropout = 0.1
timesteps = 500  # T
schedule = "linear"  # cosine, quadratic, sigmoid, lognormal
beta_start = 1e-4
beta_end = 0.028
objective = "eps"  # v, x0
loss = "l2"  # l1, huber
weighting = "simple"  # vlb, min_snr, v
# optimisation
optimizer = "adamw"  # muon
batch_size = 128  # images per step, over all processes and micro-batches
grad_accum = 1  # micro-batches per step
max_iters = 200_000  # steps
epochs = 0.0  # above 0: the length of the run in epochs; give this or max_iters
lr = 2e-4  # after warm-up; decays to min_lr along a cosine
min_lr = 2e-5
warmup_iters = 1000
weight_decay = 0.0
grad_clip = 1.0  # maximal norm of the gradient; 0: any
ema_decay = 0.9999  # of the averaged weights, which validation and sampling use
guide_step = 0  # early in the run: guidance will lead away from the averaged weights of this step; 0: none
# reports
eval_interval = 5000  # steps between validations, each followed by a checkpoint
eval_images = 5000  # of the validation split, and of the test split at the end, at most
log_interval = 100
sample_interval = 10_000  # steps between class grids; 0: none
# ---------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())

# 1. Settings. Those that were not given come from the checkpoint to resume, or from the model to fine-tune.
checkpoint_path, checkpoint = os.path.join(out_dir, "ckpt.pt"), None
resume, fine_tune = init_from == "resume", init_from not in ("scratch", "resume")
if resume or fine_tune:
    source, checkpoint = ddpm.load_model(init_from) if fine_tune else (None, ddpm.load_checkpoint(checkpoint_path))
    whole = {"optimizer", "config", "history", "trained_on"} <= checkpoint.keys()
    check(fine_tune or whole, f"{checkpoint_path} has not all that a run goes on from: fine-tune with --init_from=PATH")
    saved = checkpoint["config"] if resume else checkpoint["model_args"]
    kept = saved.keys() & config.keys() - {"out_dir", "init_from", "device", "use_compile", *given}
    fixed = ("batch_size", "seed", "optimizer", "weight_decay", "guide_step") if resume else ()
    changed = [key for key in fixed if key in given and given[key] != saved.get(key)]
    check(not changed, f"resume: {', '.join(changed)} cannot change: start a new run, or fine-tune the checkpoint")
    config |= {key: saved[key] for key in kept}
    globals().update(config)
check(not epochs or "max_iters" not in given, "epochs and max_iters both say how long to train: give one of them")
earlier = f"{out_dir} holds an earlier run: --init_from=resume continues it; for a new run use another --out_dir"
check(resume or not os.path.exists(checkpoint_path), earlier)
check(not os.path.exists(os.path.join(out_dir, "gan.pt")), f"{out_dir} holds a run of lab.gan: use another --out_dir")

# 2. Device and processes: torchrun starts one process per GPU.
device, amp_dtype, use_compile = runtime.setup_device(device, dtype, use_compile)
rank, world = runtime.join_processes(device)
micro, rest = divmod(batch_size, world * grad_accum)  # images of a process in a micro-batch
check(rest == 0, f"batch_size: {batch_size} is not divisible by {world} processes x grad_accum {grad_accum}")
if rank == 0:
    runtime.lock_folder(out_dir)


def log(*words):
    if rank == 0:
        print(*words, flush=True)


# 3. Data: rank 0 downloads or decodes what is missing, then the others read it.
with runtime.rank_0_first(rank, world):
    (images, labels), (test_images, test_labels), names = data.load_splits(dataset, data_dir, image_size, classes)
(train_images, train_labels), (val_images, val_labels) = data.training_part(images, labels, names, val_fraction, n_real)
if not conditional or labels is None:
    train_labels = val_labels = test_labels = None
    names = names if len(names) == 1 else []  # augment.py labels the images of a one-class model
n_train = len(train_images)
batches = data.Batches(train_images, train_labels, batch_size, seed, hflip, crop, 0, device)
trained_on = dict(dataset=dataset, classes=classes, val_fraction=val_fraction, n_real=n_real)
trained_on |= dict(training=data.fingerprint(train_images), validation=data.fingerprint(val_images))
if epochs:
    max_iters = config["max_iters"] = math.ceil(epochs * n_train / batch_size)
    config["epochs"] = 0.0  # so that a resumed run may change max_iters
if warmup_iters >= max_iters:
    log(f"warning: warmup_iters={warmup_iters} does not end within max_iters={max_iters}: lr never reaches {lr:g}")

# 4. Model, and a copy with the averaged weights; optimiser, and a loss scaler for float16.
torch.manual_seed(ddpm.seed_of(seed, 2**28 + checkpoint["step"]) if fine_tune else seed)  # not the old embeddings
betas = (checkpoint or {}).get("betas")  # None: the schedule's
args = {f.name: config[f.name] for f in fields(ddpm.DDPMConfig) if f.name in config}
args |= dict(image_size=images.shape[1], channels=images.shape[3], class_names=names)
model = ddpm.DDPM(ddpm.DDPMConfig(**args, num_classes=0 if train_labels is None else len(names)), betas=betas)
model.to(device)
model.amp_dtype = amp_dtype
if checkpoint:
    old, new = asdict(ddpm.DDPMConfig(**checkpoint["model_args"])), asdict(model.config)
    free = {"dropout", "p_uncond", "loss", "weighting", "num_classes", "class_names"} if fine_tune else set()
    changed = [f"{k}: checkpoint {old[k]!r}, now {new[k]!r}" for k in new if old[k] != new[k] and k not in free]
    check(not changed, f"{init_from}: these cannot change: {'; '.join(changed)}")
if fine_tune:  # from the averaged weights; other classes get new embeddings
    weights, same = source.state_dict(), old["class_names"] == new["class_names"]
    model.load_state_dict({k: v for k, v in weights.items() if same or "condition.label" not in k}, strict=False)
    trained_on["init_from"] = checkpoint.get("trained_on", {})
ema = copy.deepcopy(model).eval().requires_grad_(False)
optimizer = ddpm.make_optimizer(model, lr, weight_decay, optimizer)
scaler = torch.amp.GradScaler(device.split(":")[0], enabled=amp_dtype == torch.float16)

# 5. State: what a resumed run continues with.
step = 0
history = dict(log_step=[], log_loss=[], lr=[], step=[], val_loss=[], val_quarters=[], test_loss=None)
if resume:
    same = all(trained_on[split] == checkpoint["trained_on"][split] for split in ("training", "validation"))
    check(same, "resume: these are not the images that the checkpoint was trained on")
    step, trained_on = checkpoint["step"], checkpoint["trained_on"]
    history = checkpoint["history"] | dict(test_loss=None)
    if 0 < guide_step <= step:
        ema.guide = copy.deepcopy(ema.net)
    for name, part in dict(model=model, ema=ema, optimizer=optimizer).items():
        part.load_state_dict(checkpoint[name])
    if checkpoint["scaler"]:  # empty unless that was float16
        scaler.load_state_dict(checkpoint["scaler"])
source = checkpoint = None  # their memory
if use_compile:
    model.net.compile(**use_compile)  # in place: parameter names stay those of the plain module
ddp_model = DistributedDataParallel(model, [device] if "cuda" in device else None) if world > 1 else model
log(
    f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {world} x {device}, "
    f"{amp_dtype or torch.float32}, {'compiled' if use_compile else 'eager'}; {n_train} training and "
    f"{len(val_images)} validation images of {model.shape}, {model.K or 'no'} classes; "
    f"steps {step} to {max_iters}, batch {batch_size}"
)
if rank == 0:  # after every refusal: the settings of an earlier run stay
    data.save_json(f"{out_dir}/config.json", dict(config=config, machine=runtime.machine(device)))


# 6. Reports: validation loss, class grids, checkpoints.
@torch.no_grad()
def evaluate(images, labels):
    """The loss of the averaged weights on at most eval_images, and its four parts by quarter of t.

    An image has the same t and noise every time, in every run.
    """
    sums, size = torch.zeros(4, 2, device=device), min(batch_size, 250)  # sum and count by quarter
    n = min(eval_images, len(images))
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        draws = [model.random_t_eps(1, ddpm.make_generator(0, 2**29 + k)) for k in range(start, part.stop)]
        t, eps = map(torch.cat, zip(*draws))
        x0, t, eps = ddpm.to_float(torch.tensor(images[part]).to(device)), t.to(device), eps.to(device)
        y = None if labels is None else torch.from_numpy(labels[part]).to(device)
        losses = ema(x0, y, t, eps)
        sums.index_add_(0, t * 4 // model.T, torch.stack([losses, torch.ones_like(losses)], dim=1))
    total = sums.sum(dim=0)
    return (total[0] / total[1]).item(), (sums[:, 0] / sums[:, 1]).tolist()


def save_grid():
    """Eight images per class from the averaged weights and the same noise every time."""
    y = torch.arange(min(10, model.K or 4)).repeat_interleave(8)
    w = runtime.resolve_guidance(None, None, 1.8, model)
    x = ema.sample(y if model.K else None, w, seed, range(len(y)), "dpm++", min(20, model.T), interval=(0.25, 4.0))
    titles = model.config.class_names[:10] if model.K else ()
    data.tile(ddpm.to_uint8(x).cpu().numpy(), 8, titles).save(f"{out_dir}/samples_{step:06d}.png")


def save():
    state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    with runtime.atomic_write(checkpoint_path) as f:
        ddpm.save_model(f, model, ema, step, **state, history=history, config=config, trained_on=trained_on)


# 7. The loop. The first Ctrl-C or SIGTERM ends it after the current step, with a checkpoint; a second one at once.
signals = runtime.catch_signals() if world == 1 else []
rows = slice(rank * batch_size // world, (rank + 1) * batch_size // world)  # of the batch, for this process
log_step, log_time, log_sums, saved_time = step, time.time(), torch.zeros(2, device=device), time.time()
last_saved, stopped = f"step {step}" if resume else "none", False
model.train()
while step < max_iters and not stopped:
    lr_now = ddpm.learning_rate(step, max_iters, lr, min_lr, warmup_iters)
    for group in optimizer.param_groups:
        group["lr"] = lr_now

    # Batch, t, noise and label dropout. Every process draws for the whole batch and takes its rows, so that the
    # numbers do not depend on how many processes there are. Only dropout has a seed per process.
    x0, y = batches(step, rows)
    generator = ddpm.make_generator(seed, 2**30 + step, device)
    t, eps = (v[rows] for v in model.random_t_eps(batch_size, generator, device))
    if y is not None:
        y = model.drop_labels(y, torch.rand(batch_size, generator=generator, device=device)[rows])
    torch.manual_seed(ddpm.seed_of(seed + rank + 1, step))

    # Forward and backward, one micro-batch at a time. Gradients are averaged over processes after the last one.
    for start in range(0, len(x0), micro):
        part = slice(start, start + micro)
        ddp_model.require_backward_grad_sync = part.stop == len(x0)
        losses = ddp_model(x0[part], None if y is None else y[part], t[part], eps[part])
        scaler.scale(losses.mean() / grad_accum).backward()
        losses = losses.detach()  # not finite in a step that the scaler skips
        log_sums += torch.stack([losses.nan_to_num(0, 0, 0).sum(), losses.isfinite().sum()])

    # Update the weights and their average.
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    ddpm.update_ema(ema.net, model.net, step, ema_decay)
    step += 1
    if step == guide_step:
        ema.guide = copy.deepcopy(ema.net)

    # Log. Nothing above waits for the device; this does.
    stopped = bool(signals)  # read once a step: a step after which the loop ends is always saved
    evaluates = step % eval_interval == 0 or step == max_iters
    waited = time.time() - saved_time
    if evaluates or stopped or step % log_interval == 0 or step == 1:
        if world > 1:
            dist.all_reduce(log_sums)
        loss, norm = (log_sums[0] / log_sums[1]).item(), norm.item()
        fine = scaler.get_scale() >= 1 if scaler.is_enabled() else math.isfinite(norm)  # float16: it skips and rescales
        advice = "lower lr, lengthen warmup_iters or use --dtype=float32 and --use_compile=False"
        at = f"step {step}, lr {lr_now:.3g} (last checkpoint: {last_saved})"
        check(fine and math.isfinite(loss), f"loss {loss:.3g}, grad norm {norm:.3g} at {at}: {advice}")
        speed = ""
        if step > 1:  # the first step also compiles, or sets up
            seconds = max(1e-9, time.time() - log_time) / (step - log_step)
            speed = f"{1e3 * seconds:8.1f} ms  {batch_size / seconds:8.1f} images/s  "
            speed += f"{runtime.duration((max_iters - step) * seconds)} left"
        log(f"step {step:7d}  loss {loss:.4f}  lr {lr_now:.2e}  grad norm {norm:7.3f}  {speed}")
        for key, value in dict(log_step=step, log_loss=loss, lr=lr_now).items():
            history[key].append(value)
        log_sums.zero_()
        log_step, log_time = step, time.time()

    # Validate, save, and draw a grid; none of it counts as time of the steps. A checkpoint follows every validation,
    # and every log line that is five minutes after the last one.
    paused = time.time()
    if evaluates:
        history["step"].append(step)
        if len(val_images):
            val_loss, quarters = evaluate(val_images, val_labels)
            history["val_loss"].append(val_loss)
            history["val_quarters"].append(quarters)
            by_quarter = " ".join(f"{q:.4f}" for q in quarters)
            log(f"step {step:7d}  validation loss {val_loss:.4f} (t from clean to noisy: {by_quarter})")
    if rank == 0 and log_step == step:
        data.save_json(f"{out_dir}/log.json", history)
    if rank == 0 and (evaluates or stopped or (log_step == step and waited > 300)):
        save()
        last_saved, saved_time = f"step {step}", time.time()
    if rank == 0 and sample_interval and not stopped and (step % sample_interval == 0 or step == max_iters):
        save_grid()
    log_time += time.time() - paused

if step == max_iters and test_images is not None:
    order = data.fixed_order(test_images, test_labels)  # in any part of it the classes have their share
    history["test_loss"], _ = evaluate(test_images[order], None if test_labels is None else test_labels[order])
    log(f"step {step:7d}  test loss {history['test_loss']:.4f} on {min(eval_images, len(test_images))} images")
    if rank == 0:
        data.save_json(f"{out_dir}/log.json", history)
        save()
if step < max_iters:
    log(f"stopped at step {step} of {max_iters}: `python train.py --init_from=resume --out_dir={out_dir}` continues")
else:
    log(f"done: `python sample.py --out_dir={out_dir}` samples from {checkpoint_path}")
runtime.leave_processes()
