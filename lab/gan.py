"""Baseline: a DCGAN (Radford, Metz, Chintala 2016; Goodfellow et al. 2014), unconditional or conditional.

python -m lab.gan --classes=cat --conditional=False            one class
python -m lab.gan --classes=cat,frog                           conditional: labels as a channel of both networks
python -m lab.gan --label_smoothing=0.1 --input_noise=0.1      two remedies against a discriminator that wins too early
python -m lab.gan --per_class=5000                             a larger synthetic set

Writes config.json, log.json, grids from fixed noise and training.gif of them, both networks as gan.pt, and a synthetic
set in out_dir/synthetic, as augment.py does. Stopped before its end, it starts again. For square images whose side can
be halved to 4 or to an odd number, such as 32 and 28.
"""

import math
import os
import time

import torch
import torch.nn.functional as F
from torch import nn

import data
import runtime
from configurator import configure
from ddpm import check, image_noise, make_generator, seed_of, to_uint8

# ---------------------------------------------------------------------------------------------------------------------
# the run
out_dir = "out-gan"
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
sample_interval = 1000  # steps between grids; 0: one at the end
per_class = 1000  # images of each class in the synthetic set
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
# settings, data, networks
config, given = configure(globals())
check(0 < ch <= 4096, f"ch: {ch} must be from 1 to 4096")
for name in ("ckpt.pt", "synthetic/classes.json"):  # the last is what this script writes last
    check(not os.path.exists(f"{out_dir}/{name}"), f"{out_dir} holds an earlier run: use another --out_dir")
device, _, _ = runtime.setup_device(device, "float32", "False")
runtime.lock_folder(out_dir)

(images, labels), _, names = data.load_splits(dataset, data_dir, image_size, classes)
(images, labels), _ = data.training_part(images, labels, names, val_fraction)
if not conditional or labels is None:
    labels, names = None, names if len(names) == 1 else []  # the set of one class is labelled
K, size, channels = 0 if labels is None else len(names), *images.shape[2:]
check(side_and_widths(size)[1], f"image_size: {size} cannot be halved down to 4 or an odd number")
batches = data.Batches(images, labels, batch_size, seed, hflip, device=device)
data.save_json(f"{out_dir}/config.json", dict(config=config, machine=runtime.machine(device)))

torch.manual_seed(seed)
G, D = (kind(size, channels, K).apply(init_dcgan).to(device) for kind in (Generator, Discriminator))
G_optimizer, D_optimizer = (torch.optim.Adam(net.parameters(), lr=lr, betas=(beta1, 0.999)) for net in (G, D))
G_size, D_size = (f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}M" for net in (G, D))
print(
    f"generator {G_size}, discriminator {D_size} parameters on {device}; {len(images)} training images of "
    f"{(channels, size, size)}, {K or 'no'} classes; {max_iters} steps, batch {batch_size}",
    flush=True,
)


@torch.no_grad()
def generate(y, indices):
    """Images (n, H, W, C) uint8 for labels y (n,); image k has noise indices[k] of the seed."""
    z = image_noise([make_generator(seed, k) for k in indices], (z_dim,), device)
    G.eval()
    x = G(z, y.to(device))
    G.train()
    return to_uint8(x).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# the loop
history, frames = {"step": [], "d_loss": [], "g_loss": [], "d_real": [], "d_fake": []}, []
grid_labels, start = torch.arange(min(10, max(1, K))).repeat_interleave(8), time.time()
bce, ones = F.binary_cross_entropy_with_logits, torch.ones(batch_size, device=device)
for step in range(1, max_iters + 1):
    x, y = batches(step - 1)
    torch.manual_seed(seed_of(seed + 1, step - 1))
    z = torch.randn(batch_size, z_dim, device=device)
    noise = input_noise * (1 - (step - 1) / max_iters)

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

    if step % log_interval == 0 or step == max_iters:
        d, g, seconds = d_loss.item(), g_loss.item(), max(1e-9, time.time() - start) / step  # a clock may stand still
        check(math.isfinite(d + g), f"the losses are {d:.3g} and {g:.3g} at step {step}: lower lr")
        shares = (d_real > 0).float().mean().item(), (d_fake > 0).float().mean().item()
        for key, value in zip(history, (step, d, g, *shares)):
            history[key].append(value)
        print(
            f"step {step:7d}  D loss {d:.4f}  G loss {g:.4f}  taken for real: {shares[0]:4.0%} of real, "
            f"{shares[1]:4.0%} of generated  {batch_size / seconds:8.1f} images/s  "
            f"{runtime.duration((max_iters - step) * seconds)} left",
            flush=True,
        )
        data.save_json(f"{out_dir}/log.json", history)
    if step == max_iters or sample_interval and step % sample_interval == 0:
        grid = generate(grid_labels, range(len(grid_labels))).numpy()
        frames.append(data.tile(grid, 8, names[:10] if K else ()))
        frames[-1].save(f"{out_dir}/samples_{step:06d}.png")

# The film of the grids, and the networks; at last the synthetic set, classes in turn, from other noise than the grids'.
frames[0].save(f"{out_dir}/training.gif", save_all=True, append_images=frames[1:], loop=0, duration=200)  # ms
with runtime.atomic_write(f"{out_dir}/gan.pt") as f:
    torch.save(dict(generator=G.state_dict(), discriminator=D.state_dict(), config=config), f)
y = torch.arange(max(1, K)).repeat(per_class)
made = [generate(y[part], (part + 2**30).tolist()) for part in torch.arange(len(y)).split(500)]
data.write_shards(f"{out_dir}/synthetic", torch.cat(made).numpy(), y.numpy() if names else None, names)
print(f"{len(y)} images in {out_dir}/synthetic; {out_dir}/training.gif shows the same noise over training")
