"""Baseline: a DCGAN (Radford, Metz, Chintala 2016; Goodfellow et al. 2014), unconditional or conditional.

python gan.py --classes=cat --conditional=False            one class
python gan.py --classes=cat,frog                           conditional: labels as an extra channel of both networks
python gan.py --label_smoothing=0.1 --input_noise=0.1      two remedies against a discriminator that wins too early
python gan.py --init_from=resume --out_dir=out-gan         continue after a stop (Ctrl-C saves first)
python gan.py --per_class=5000 --init_from=resume          write a synthetic set, as augment.py does, at the end

Writes checkpoint gan.pt, log.json, grids from fixed noise, and training.gif of them. For square images whose side can
be halved to 4 or to an odd number, such as 32 and 28.
"""

import math
import os
import time

import torch
import torch.nn.functional as F
from torch import nn

from configurator import apply_saved, catch_signals, configure, duration, lock_folder, progress, setup_device
from data import (
    Batches,
    file_hash,
    fingerprint,
    load_splits,
    save_json,
    shard_files,
    tile,
    training_count,
    write_shards,
)
from ddpm import (
    UserError,
    atomic_write,
    check_choice,
    evaluating,
    image_noise,
    load_checkpoint,
    make_generator,
    reading,
    seed_of,
    to_uint8,
)

# ---------------------------------------------------------------------------------------------------------------------
# the run
out_dir = "out-gan"
init_from = "scratch"  # or resume: continue from out_dir's checkpoint, with its settings unless given
seed = 0  # of weights, batches and noise
device = "auto"  # cuda, mps, cpu
# data, as in train.py, which has more
dataset = "cifar10"
data_dir = "data"
classes = ""  # cat,frog keeps only these
image_size = 0  # 0: the data set's own
val_fraction = 0.1  # not trained on, so that classifier.py can validate on it
hflip = True
conditional = True  # False: ignore the labels
# networks
z_dim = 100  # of the noise
ch = 64  # channels at half resolution; doubles with each further halving
# optimisation
batch_size = 64
max_iters = 20_000  # steps, each of both networks
lr = 2e-4
beta1 = 0.5  # of Adam
label_smoothing = 0.0  # two-sided; 0.1: the discriminator's targets are 0.9 and 0.1
input_noise = 0.0  # instance noise: standard deviation on the discriminator's inputs, falling linearly to 0
# reports
log_interval = 100
sample_interval = 1000  # steps between grids, each followed by a checkpoint
per_class = 0  # above 0: at the end write so many images of each class to out_dir/synthetic
# ---------------------------------------------------------------------------------------------------------------------
# networks


def side_and_widths(size):
    """The side of the smallest feature map and the channels of all, the largest first: 32 -> 4, [ch, 2 ch, 4 ch]."""
    widths = []
    while size % 2 == 0 and size > 4:
        size //= 2
        widths.append(ch * 2 ** len(widths))
    return size, widths


def init_dcgan(module):
    """Weights of N(0, 0.02), of norms N(1, 0.02) (Radford et al., sec. 4)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class Generator(nn.Module):
    """z (B, z_dim), y (B,) or None -> images (B, C, H, W) in [-1, 1]."""

    def __init__(self, size, channels, K):
        super().__init__()
        side, widths = side_and_widths(size)
        self.project, self.shape = nn.Linear(z_dim, widths[-1] * side**2), (widths[-1], side, side)
        self.label = nn.Embedding(K, side**2) if K else None  # one more channel
        inputs = [widths[-1] + bool(K), *widths[-2::-1]]
        layers = [nn.BatchNorm2d(inputs[0]), nn.ReLU()]
        for a, b in zip(inputs, [*inputs[1:], channels]):
            layers += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-2])  # no norm at the output

    def forward(self, z, y):
        h = self.project(z).view(-1, *self.shape)
        if self.label is not None:
            h = torch.cat([h, self.label(y).view(-1, 1, *h.shape[2:])], dim=1)
        return torch.tanh(self.layers(h))


class Discriminator(nn.Module):
    """Images (B, C, H, W), y (B,) or None -> the logit of being real, (B,)."""

    def __init__(self, size, channels, K):
        super().__init__()
        side, widths = side_and_widths(size)
        self.label = nn.Embedding(K, size**2) if K else None
        layers = []
        for a, b in zip([channels + bool(K), *widths], widths):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        del layers[1]  # no norm at the input
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, 1))

    def forward(self, x, y):
        if self.label is not None:
            x = torch.cat([x, self.label(y).view(-1, 1, *x.shape[2:])], dim=1)
        return self.layers(x).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# settings, data, networks, state
config, given = configure(globals(), dict(sample_interval="[1, inf)", per_class="[0, inf)", ch="[1, 4096]"))
check_choice("init_from", init_from, ("scratch", "resume"))
checkpoint_path, checkpoint = os.path.join(out_dir, "gan.pt"), None
if os.path.exists(os.path.join(out_dir, "ckpt.pt")):
    raise UserError(f"{out_dir} holds a run of train.py: use another --out_dir")
if init_from == "scratch" and os.path.exists(checkpoint_path):
    raise UserError(f"{out_dir} holds an earlier run: continue it with --init_from=resume, or use another --out_dir")
if init_from == "resume":
    checkpoint = load_checkpoint(checkpoint_path, ("config", "trained_on", "step", "history"))
    with reading(checkpoint_path):
        fixed = {"dataset", "classes", "val_fraction", "conditional", "image_size", "ch", "z_dim", "lr", "beta1"}
        apply_saved(checkpoint["config"], config, given, globals(), fixed)
device, _, _ = setup_device(device, "float32", False)
lock_folder(out_dir)

(images, labels), _, names = load_splits(dataset, data_dir, image_size, classes)
n_train = training_count(len(images), val_fraction)
trained_on = dict(dataset=dataset, classes=classes, val_fraction=val_fraction, validation=fingerprint(images[n_train:]))
if checkpoint and checkpoint["trained_on"] != trained_on:
    raise UserError(f"{checkpoint_path} was trained on other images than {dataset} in {data_dir} has now")
if not conditional or labels is None:
    labels, names = None, names if len(names) == 1 else []
K, size, channels = 0 if labels is None else len(names), *images.shape[2:]
batches = Batches(images[:n_train], labels[:n_train] if K else None, batch_size, seed, hflip, device=device)
if not side_and_widths(size)[1]:
    raise UserError(f"image_size: {size} cannot be halved down to 4 or an odd number")

torch.manual_seed(seed)
G, D = (kind(size, channels, K).apply(init_dcgan).to(device) for kind in (Generator, Discriminator))
G_optimizer, D_optimizer = (torch.optim.Adam(net.parameters(), lr=lr, betas=(beta1, 0.999)) for net in (G, D))
parts = dict(generator=G, discriminator=D, G_optimizer=G_optimizer, D_optimizer=D_optimizer)
step, history = 0, {"step": [], "d_loss": [], "g_loss": [], "d_real": [], "d_fake": []}
if checkpoint:
    step, history = checkpoint["step"], checkpoint["history"]
    with reading(checkpoint_path):
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
G_size, D_size = (f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}M" for net in (G, D))
print(
    f"generator {G_size}, discriminator {D_size} parameters on {device}; {n_train} training images of "
    f"{(channels, size, size)}, {K or 'no'} classes; steps {step} to {max_iters}, batch {batch_size}",
    flush=True,
)


# ---------------------------------------------------------------------------------------------------------------------
# reports


@torch.no_grad()
def generate(y, indices):
    """Images (n, H, W, C) uint8 for labels y (n,); image k has noise indices[k] of the seed."""
    z = image_noise([make_generator(seed, k) for k in indices], (z_dim,), device)
    with evaluating(G):
        return to_uint8(G(z, y.to(device))).cpu()


def save():
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= dict(step=step, history=history, config=config, trained_on=trained_on, num_classes=K)
    with atomic_write(checkpoint_path) as f:
        torch.save(content, f)
    save_json(f"{out_dir}/log.json", history)


def grid_path(step):
    return f"{out_dir}/samples_{step:06d}.png"


def save_gif():
    """All grids of the run as training.gif."""
    from PIL import Image

    steps = sorted({*range(sample_interval, max_iters + 1, sample_interval), max_iters})
    frames = [Image.open(grid_path(k)) for k in steps if os.path.exists(grid_path(k))]
    if frames:
        frames[0].save(f"{out_dir}/training.gif", save_all=True, append_images=frames[1:], loop=0, duration=200)  # ms


def write_set():
    """per_class images of each class as shards with a manifest, in turn by class, as augment.py writes them."""
    folder, C, start = f"{out_dir}/synthetic", max(1, K), time.time()
    lock_folder(folder)
    save_json(f"{folder}/manifest.json", dict(complete=False, settings={}, shards={}))
    for path in shard_files(folder):
        os.remove(path)
    y, made = torch.arange(C).repeat(per_class), []
    for part in torch.arange(len(y)).split(500):
        if signals:
            raise UserError("stopped by a signal before the set was complete: --init_from=resume writes it again")
        made.append(generate(y[part], (part + 2**30).tolist()))  # not the noise of the grids
        progress("synthetic", (int(part[-1]) + 1) / len(y), start)
    write_shards(folder, torch.cat(made).numpy(), y.numpy() if names else None, names)
    hashes = {os.path.basename(p): file_hash(p) for p in (*shard_files(folder), f"{folder}/classes.json")}
    save_json(f"{folder}/manifest.json", dict(complete=True, settings=config, shards=hashes, trained_on=trained_on))
    print(f"{len(y)} images in {folder}")


# ---------------------------------------------------------------------------------------------------------------------
# the loop
signals, grid_labels = catch_signals(), torch.arange(min(10, max(1, K))).repeat_interleave(8)
start, first_step = time.time(), step
bce, ones = F.binary_cross_entropy_with_logits, torch.ones(batch_size, device=device)
while step < max_iters and not signals:
    x, y = batches(step)
    torch.manual_seed(seed_of(seed + 1, step))
    z = torch.randn(len(x), z_dim, device=device)
    noise = input_noise * (1 - step / max_iters)

    # Discriminator: 1 for real images and 0 for generated ones, or smoothed.
    fake = G(z, y)
    d_real, d_fake = (D(v + noise * torch.randn_like(v), y) for v in (x, fake.detach()))
    d_loss = bce(d_real, (1 - label_smoothing) * ones) + bce(d_fake, label_smoothing * ones)
    D_optimizer.zero_grad()
    d_loss.backward()
    D_optimizer.step()

    # Generator: 1 for generated images (the non-saturating loss of Goodfellow et al., sec. 3).
    g_loss = bce(D(fake + noise * torch.randn_like(fake), y), ones)
    G_optimizer.zero_grad()
    g_loss.backward()
    G_optimizer.step()
    step += 1

    if step % log_interval == 0 or step == max_iters:
        d, g, speed = d_loss.item(), g_loss.item(), (step - first_step) * batch_size / (time.time() - start)
        if not math.isfinite(d + g):
            raise UserError(f"the losses are {d:.3g} and {g:.3g} at step {step}: lower lr")
        shares = (d_real > 0).float().mean().item(), (d_fake > 0).float().mean().item()
        for key, value in zip(history, (step, d, g, *shares)):
            history[key].append(value)
        left = duration((max_iters - step) * batch_size / speed)
        print(
            f"step {step:7d}  D loss {d:.4f}  G loss {g:.4f}  taken for real: {shares[0]:4.0%} of real, "
            f"{shares[1]:4.0%} of generated  {speed:8.1f} images/s  {left} left",
            flush=True,
        )
    if step % sample_interval == 0 or step == max_iters:
        tile(generate(grid_labels, range(len(grid_labels))).numpy(), 8, names[:10] if K else ()).save(grid_path(step))
        save()

if signals:
    save()
    print(f"stopped by a signal at step {step}: `python gan.py --init_from=resume --out_dir={out_dir}` continues")
else:
    save_gif()
    if per_class:
        write_set()
    print(f"done: {out_dir}/training.gif shows the same noise over training")
