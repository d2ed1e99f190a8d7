"""nanoDDPM: denoising diffusion with classifier-free guidance, in the order of the papers. Needs only torch.

    from ddpm import DDPM, DDPMConfig
    model = DDPM(DDPMConfig(num_classes=10))
    loss = model(x0, model.drop_labels(y)).mean()       # x0 (B, C, H, W) float in [-1, 1], y (B,) in 0..K-1
    x0 = model.sample(torch.tensor([3, 3, 5]), w=1.8)   # three images: two of class 3, one of class 5

Notation, as in the papers:
    x0, xt           a clean image and its noisy version at step t: xt = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
    eps              the noise, N(0, I)
    t                0..T-1, one per image, (B,)
    y                a label 0..K-1, or K, the null label ("no class")
    x0_hat, eps_hat  the network's predictions
    abar_t           alpha_bar_t, the product of (1 - beta_s) over s <= t
    sigma_t          sqrt(1 / abar_t - 1), the noise level of xt / sqrt(abar_t) = x0 + sigma_t eps

[1] Ho, Jain, Abbeel 2020, Denoising diffusion probabilistic models      [2] Nichol, Dhariwal 2021, Improved DDPM
[3] Ho, Salimans 2022, Classifier-free diffusion guidance                [4] Song, Meng, Ermon 2021, DDIM
[5] Salimans, Ho 2022, Progressive distillation (v)                      [6] Lu et al. 2022, DPM-Solver++
[7] Hang et al. 2023, Min-SNR weighting                                  [8] Karras et al. 2022, EDM
[9] Kynkäänniemi et al. 2024, Guidance in a limited interval
"""

import contextlib
import math
import os
import warnings
import zipfile
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

OBJECTIVES, LOSSES, WEIGHTINGS = ("eps", "v", "x0"), ("l2", "l1", "huber"), ("simple", "vlb", "min_snr")
SCHEDULES, SAMPLERS, ARCHS = ("linear", "cosine", "quadratic", "sigmoid"), ("ddpm", "ddim", "dpm++"), ("unet", "cnn")


class UserError(ValueError):
    """An error caused by the input. The scripts print it as one line."""


def check_choice(name, value, choices):
    """Raises UserError unless value is one of choices."""
    if value not in choices:
        raise UserError(f"{name}: {value!r} is not one of {', '.join(choices)}")


def check_range(name, value, interval):
    """Raises UserError unless value lies in an interval such as "[0, 1)". NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    inside = isinstance(value, (int, float)) and low <= value <= high
    if not inside or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
        raise UserError(f"{name}: {value} must be in {interval}")


# ---------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class DDPMConfig:
    """Everything needed to rebuild a model. The defaults are the default recipe, 38M parameters."""

    image_size: int = 32  # images are square
    channels: int = 3
    num_classes: int = 0  # K; 0: unconditional
    class_names: tuple = ()
    arch: str = "unet"  # or cnn, a baseline without skip connections
    patch: int = 1  # 2: pixel-unshuffle the input, so that the network works at half the resolution
    ch: int = 128  # width of the first level
    ch_mult: tuple = (1, 2, 2, 2)  # width of each level in units of ch; each level halves the resolution of the last
    num_res_blocks: int = 2  # per level
    attn_resolutions: tuple = (16,)  # sides of the feature maps that get attention
    dropout: float = 0.1
    timesteps: int = 500  # T
    schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.028
    objective: str = "eps"  # what the network predicts
    loss: str = "l2"
    weighting: str = "simple"
    p_uncond: float = 0.1  # probability of dropping a label in training

    def __post_init__(self):
        choices = dict(arch=ARCHS, schedule=SCHEDULES, objective=OBJECTIVES, loss=LOSSES, weighting=WEIGHTINGS)
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        for name in ("ch_mult", "attn_resolutions", "class_names"):
            setattr(self, name, tuple(getattr(self, name)))
        whole = dict(image_size=4096, channels=4096, patch=64, ch=4096, num_res_blocks=64, timesteps=100_000)
        for name, most in (whole | dict(num_classes=100_000)).items():
            check_range(name, getattr(self, name), f"[{0 if name == 'num_classes' else 1}, {most}]")
            if type(getattr(self, name)) is not int:
                raise UserError(f"{name}: {getattr(self, name)} must be a whole number")
        check_range("p_uncond", self.p_uncond, "[0, 1]")
        check_range("dropout", self.dropout, "[0, 1)")
        if self.class_names and len(self.class_names) != self.num_classes > 0:
            raise UserError(f"{len(self.class_names)} class_names for {self.num_classes} classes")
        if not all(type(name) is str for name in self.class_names):
            raise UserError(f"class_names: {self.class_names} must be text")
        if not self.ch_mult or not all(type(m) is int and 0 < m <= 64 for m in self.ch_mult) or self.ch % 2:
            raise UserError(
                f"ch_mult={self.ch_mult}, ch={self.ch}: multiples must be whole numbers from 1 to 64 and ch even"
            )
        halvings = len(self.ch_mult) - (self.arch == "unet")  # the U-Net's first level keeps the resolution
        if self.image_size % (unit := self.patch * 2**halvings):
            raise UserError(
                f"image_size: {self.image_size} is not divisible by {unit} (patch {self.patch}, {halvings} halvings): "
                f"use {max(1, self.image_size // unit) * unit} or fewer entries in ch_mult"
            )


# ---------------------------------------------------------------------------------------------------------------------
# noise schedules, in float64


def make_betas(schedule, T, beta_start, beta_end):
    """Returns beta_t for t = 0..T-1, (T,) float64. Raises UserError unless every beta is between 0 and 1.

    linear: [1]. quadratic: linear in sqrt(beta). sigmoid: a logistic curve over -6..6. cosine: [2] eq. 17 with
    s = 0.008 and betas clipped at 0.999; it ignores beta_start and beta_end.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_range("beta_start", beta_start, "[0, 1)")
    check_range("beta_end", beta_end, "[0, 1)")
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    elif schedule == "quadratic":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
    elif schedule == "sigmoid":
        x = torch.linspace(-6, 6, T, dtype=torch.float64)
        betas = beta_start + (beta_end - beta_start) * torch.sigmoid(x)
    else:
        u = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise UserError(
            f"schedule {schedule} with beta_start={beta_start:g} and beta_end={beta_end:g}: betas run from "
            f"{betas.min():.3g} to {betas.max():.3g} but must lie between 0 and 1"
        )
    return betas


def warn_if_signal_remains(T, beta_start, beta_end, abar_T):
    """Warns when sqrt(abar_T) > 0.1, and suggests a T or a beta_end that fixes it."""
    if abar_T**0.5 <= 0.1:
        return
    k = math.log(0.01) / math.log(abar_T)  # -log(abar_T) is about T times the mean beta: it has to grow k-fold
    steeper = 1.05 * k * (beta_start + beta_end)
    warnings.warn(
        f"timesteps={T} with beta_end={beta_end:g} leaves sqrt(abar_T) = {abar_T**0.5:.2f} of the image at the last "
        f"step, but sampling starts from pure noise: use timesteps={math.ceil(1.01 * k * T)}"
        + (f" or beta_end={steeper:.3g}" if steeper < 0.95 else ""),
        stacklevel=3,
    )


def loss_weights(weighting, objective, betas, abar):
    """Returns the weight of each t, (T,), for a squared error in the objective's own units.

    simple: 1 ([1] eq. 14 for eps). vlb: the bound of [1] eq. 12 with variance beta_t, in nats per dimension.
    min_snr: [7] with gamma = 5. One error has three sizes: |eps_err|^2 = snr |x0_err|^2 = abar |v_err|^2.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    if weighting == "simple":
        return torch.ones_like(betas)
    snr = abar / (1 - abar)
    if weighting == "vlb":
        eps_weight = betas / (2 * (1 - betas) * (1 - abar))
    else:
        eps_weight = snr.clamp(max=5) / snr
    return eps_weight * {"eps": 1.0, "x0": snr, "v": abar}[objective]


# ---------------------------------------------------------------------------------------------------------------------
# network


def zero_init(module):
    """Zeroes a module's weights. Residual branches and outputs that start at zero train better ([1], app. B)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(x, groups, weight, bias, eps):
    """F.group_norm in x's dtype: on a GPU autocast would run it, and the SiLU and dropout that follow, in float32."""
    if x.is_cpu:
        return F.group_norm(x, groups, weight, bias, eps)
    with torch.autocast(x.device.type, enabled=False):
        return F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)


class GroupNorm(nn.GroupNorm):
    """Normalisation with at most 32 groups of at least 4 channels, for any width."""

    def __init__(self, ch):
        super().__init__(next(g for g in range(max(1, min(32, ch // 4)), 0, -1) if ch % g == 0), ch)

    def forward(self, x):
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def sinusoidal_embedding(t, dim):
    """Embeds t (B,) as cosines and sines with periods of 2 pi to 20,000 pi steps: (B, dim)."""
    freqs = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000) / max(1, dim // 2 - 1)))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Condition(nn.Module):
    """Embeds t (B,) and, in a conditional model, y (B,) as one vector per image: (B, 4 ch)."""

    def __init__(self, c):
        super().__init__()
        self.ch, dim = c.ch, 4 * c.ch
        self.time = nn.Sequential(nn.Linear(c.ch, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(c.num_classes + 1, dim) if c.num_classes else None  # the last row is the null label

    def forward(self, t, y):
        emb = self.time(sinusoidal_embedding(t, self.ch).to(self.time[0].weight.dtype))
        if self.label is not None:
            emb = emb + self.label(y)
        return F.silu(emb)


class FiLM(nn.Module):
    """GroupNorm, then a scale and a shift that depend on the embedding ([2]'s scale-shift norm)."""

    def __init__(self, ch, dim):
        super().__init__()
        self.norm, self.affine = GroupNorm(ch), nn.Linear(dim, 2 * ch)

    def forward(self, h, emb):
        # self.norm(h) * (1 + scale) + shift, in one pass over h: the scale and shift are folded into the norm's own
        # weight and bias, which differ per image, so the batch is viewed as one image of B * C channels.
        B, C, H, W = h.shape
        norm = self.norm
        scale, shift = self.affine(emb).chunk(2, dim=1)  # (B, C)
        if B * norm.num_groups > 65535 and not h.is_cpu:  # more groups than CUDA's backward takes
            return self.norm(h) * (1 + scale)[..., None, None] + shift[..., None, None]
        weight = norm.weight * (1 + scale)
        bias = norm.bias * (1 + scale) + shift
        h = h.reshape(1, B * C, H, W)
        return group_norm(h, B * norm.num_groups, weight.flatten(), bias.flatten(), norm.eps).view(B, C, H, W)


class Upsample(nn.Conv2d):
    """Nearest-neighbour 2x upsampling and a 3x3 convolution."""

    def __init__(self, ch):
        super().__init__(ch, ch, 3, padding=1)

    def forward(self, x):
        # super().forward(F.interpolate(x, scale_factor=2)), fused into one 4x4 transposed convolution: its kernel is
        # the flipped 3x3 kernel convolved with a 2x2 square of ones.
        kernel = F.pad(self.weight.flip(2, 3), (1, 1, 1, 1))
        kernel = kernel[..., 1:] + kernel[..., :-1]
        kernel = kernel[..., 1:, :] + kernel[..., :-1, :]  # (out, in, 4, 4)
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


class Dropout(nn.Dropout):
    """nn.Dropout. On a CPU each mask value takes 16 random bits, which makes a training step up to 1.2x faster."""

    def forward(self, x):
        if not (self.training and self.p and x.is_cpu) or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = max(1, round((1 - self.p) * 2**16))  # of the 2**16 values
        mask = bits[: x.numel()].view_as(x) >= 2**15 - kept
        return x * mask.to(x.dtype).mul_(2**16 / kept)


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, in heads of 64 channels (one head for other widths)."""

    def __init__(self, ch):
        super().__init__()
        self.heads = ch // 64 if ch % 64 == 0 else 1
        self.norm, self.qkv, self.proj = GroupNorm(ch), nn.Conv2d(ch, 3 * ch, 1), zero_init(nn.Conv2d(ch, ch, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        q, k, v = qkv.unbind(1)  # (B, heads, H*W, C/heads) each
        if x.is_cpu:  # faster than the fused kernel there
            h = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v
        else:  # contiguous: the fused kernels ask for it
            h = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return x + self.proj(h.transpose(-1, -2).reshape(B, C, H, W))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a FiLM in between, then attention at some resolutions."""

    def __init__(self, cin, cout, dim, dropout, attention):
        super().__init__()
        self.norm, self.conv1 = GroupNorm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.film, self.dropout = FiLM(cout, dim), Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(cout, cout, 3, padding=1))
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.attention = Attention(cout) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm(x)))
        h = self.conv2(self.dropout(F.silu(self.film(h, emb))))
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """The U-Net of [1] with [2]'s conditioning: x (B, C, H, W), t (B,), y (B,) -> (B, C, H, W). Initially outputs 0."""

    def __init__(self, c):
        super().__init__()
        self.patch, self.condition = c.patch, Condition(c)
        res, width, widths = c.image_size // c.patch, c.ch, [c.ch]  # widths: of the skip connections

        def block(cin, cout):
            return ResBlock(cin, cout, 4 * c.ch, c.dropout, res in c.attn_resolutions)

        self.stem = nn.Conv2d(c.channels * c.patch**2, c.ch, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, mult in enumerate(c.ch_mult):
            if level:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                widths.append(width)
                res //= 2
            for _ in range(c.num_res_blocks):
                self.down.append(block(width, c.ch * mult))
                width = c.ch * mult
                widths.append(width)
        self.mid1 = ResBlock(width, width, 4 * c.ch, c.dropout, attention=True)
        self.mid2 = ResBlock(width, width, 4 * c.ch, c.dropout, attention=False)
        for level, mult in reversed(list(enumerate(c.ch_mult))):
            for _ in range(c.num_res_blocks + 1):
                self.up.append(block(width + widths.pop(), c.ch * mult))
                width = c.ch * mult
            if level:
                self.up.append(Upsample(width))
                res *= 2
        self.norm, self.out = GroupNorm(width), zero_init(nn.Conv2d(width, c.channels * c.patch**2, 3, padding=1))

    def forward(self, x, t, y):
        emb = self.condition(t, y)
        h = self.stem(F.pixel_unshuffle(x, self.patch))  # (B, ch, H/patch, W/patch)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        h = self.mid2(self.mid1(h, emb), emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb) if isinstance(layer, ResBlock) else layer(h)
        return F.pixel_shuffle(self.out(F.silu(self.norm(h))), self.patch)


class CNN(nn.Module):
    """Baseline: an encoder-decoder of strided convolutions without skip connections. Same signature as UNet."""

    def __init__(self, c):
        super().__init__()
        self.patch, self.condition = c.patch, Condition(c)
        widths = [c.ch] + [c.ch * mult for mult in c.ch_mult]
        self.stem = nn.Conv2d(c.channels * c.patch**2, c.ch, 3, padding=1)
        pairs = list(zip(widths, widths[1:]))
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairs])
        self.convs.extend([nn.ConvTranspose2d(b, a, 4, stride=2, padding=1) for a, b in reversed(pairs)])
        self.films = nn.ModuleList([FiLM(conv.out_channels, 4 * c.ch) for conv in self.convs])
        self.dropout, self.out = Dropout(c.dropout), zero_init(nn.Conv2d(c.ch, c.channels * c.patch**2, 3, padding=1))

    def forward(self, x, t, y):
        emb, h = self.condition(t, y), self.stem(F.pixel_unshuffle(x, self.patch))
        for conv, film in zip(self.convs, self.films):
            h = self.dropout(F.silu(film(conv(h), emb)))
        return F.pixel_shuffle(self.out(h), self.patch)


# ---------------------------------------------------------------------------------------------------------------------
# images and noise


def to_float(images):
    """uint8 (..., H, W, C) -> float32 (..., C, H, W) in [-1, 1]."""
    return images.movedim(-1, -3).contiguous().float() / 127.5 - 1  # contiguous: the network is faster on it


def to_uint8(x):
    """float (..., C, H, W) in [-1, 1] -> uint8 (..., H, W, C), rounded and clamped: to_uint8(to_float(i)) == i."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def seed_of(seed, k):
    """The seed of stream k of `seed`: distinct for every k below 2**32, far apart for different seeds.

    Streams in use: image k when sampling; epoch k and 2**31 + step in data.py; 2**30 + step and 2**32 - 1 in train.py.
    """
    return (seed * 2654435761 + k) % 2**32  # torch's CPU generator keeps 32 bits


def make_generator(seed, k=0, device="cpu"):
    """A random generator for stream k of `seed`."""
    return torch.Generator(device).manual_seed(seed_of(seed, k))


def image_noise(generators, shape, device="cpu"):
    """The next N(0, 1) noise of each generator, (B, *shape) float32, drawn on the CPU.

    Noise belongs to the image: image k of a seed draws from generator k, so it is the same in any batch, on any number
    of processes and in a resumed run.
    """
    on_cuda = torch.device(device).type == "cuda"
    noise = torch.empty((len(generators), *shape), pin_memory=on_cuda)  # pinned: the copy does not wait for the GPU
    for row, generator in zip(noise, generators):
        row.normal_(generator=generator)
    return noise.to(device, non_blocking=on_cuda)


@contextlib.contextmanager
def evaluating(module):
    """Temporarily puts a module into eval mode (dropout off)."""
    was_training = module.training
    module.eval()
    try:
        yield module
    finally:
        module.train(was_training)


# ---------------------------------------------------------------------------------------------------------------------
# diffusion


def posterior_coefficients(abar_t, abar_s):
    """Returns (c0, ct, var): q(x_s | xt, x0) = N(c0 x0 + ct xt, var I) for a step from t to an earlier s.

    [1] eq. 6-7 where s = t-1; any s < t for a sampler that skips steps. abar_s = 1 is the clean image, var is 0 there.
    """
    alpha = abar_t / abar_s
    c0 = abar_s**0.5 * (1 - alpha) / (1 - abar_t)
    ct = alpha**0.5 * (1 - abar_s) / (1 - abar_t)
    return c0, ct, (1 - alpha) * (1 - abar_s) / (1 - abar_t)


def sigma_of(abar):
    """sigma = sqrt(1 / abar - 1): noise over signal ([8]'s noise level)."""
    return (1 / abar - 1) ** 0.5


class DDPM(nn.Module):
    """A denoising diffusion model: network, schedule, loss, guidance and samplers."""

    def __init__(self, config):
        super().__init__()
        self.config, self.T, self.K = config, config.timesteps, config.num_classes
        self.shape = (config.channels, config.image_size, config.image_size)
        self.net = {"unet": UNet, "cnn": CNN}[config.arch](config)
        self.amp_dtype = None  # torch.bfloat16 or float16: run the network, and nothing else, under autocast
        self.compiled = False
        betas = make_betas(config.schedule, self.T, config.beta_start, config.beta_end)
        abar = torch.cumprod(1 - betas, dim=0)
        self.abar = abar.tolist()  # float64, for the samplers
        if self.abar[-1] < 1e-300:
            raise UserError(f"timesteps={self.T}: alpha_bar falls to zero in float64: lower timesteps or beta_end")
        warn_if_signal_remains(self.T, config.beta_start, config.beta_end, self.abar[-1])
        tables = dict(betas=betas, alphas_bar=abar)
        tables["q_var"] = 1 - abar  # computed in float64: in float32 it would lose digits at small t
        tables["loss_weight"] = loss_weights(config.weighting, config.objective, betas, abar)
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def signal_noise(self, t):
        """sqrt(abar_t) and sqrt(1 - abar_t), (B, 1, 1, 1) each: the coefficients of x0 and eps in xt."""
        return tuple(table[t].sqrt()[:, None, None, None] for table in (self.alphas_bar, self.q_var))

    def q_sample(self, x0, t, eps):
        """The noisy image xt ~ q(xt | x0) ([1] eq. 4), (B, C, H, W)."""
        a, s = self.signal_noise(t)
        return a * x0 + s * eps

    def target(self, x0, eps, t):
        """What the network should output: eps, x0, or v = sqrt(abar) eps - sqrt(1 - abar) x0 ([5])."""
        if self.config.objective == "v":
            a, s = self.signal_noise(t)
            return a * eps - s * x0
        return eps if self.config.objective == "eps" else x0

    def to_x0_eps(self, out, xt, t):
        """The network's output as (x0_hat, eps_hat), (B, C, H, W) each ([1] eq. 15, [5] app. D)."""
        a, s = self.signal_noise(t)
        if self.config.objective == "eps":
            return (xt - s * out) / a, out
        if self.config.objective == "v":
            return a * xt - s * out, s * xt + a * out
        return out, (xt - a * out) / s

    def compile_network(self, options=None):
        """Compiles the network for one batch shape: `sample_batches` fills up the last batch, `guided` calls it twice.

        options: of torch.compile.
        """
        self.net.compile(dynamic=False, options=options)  # in place: parameter names stay those of the plain module
        self.compiled = True

    def network(self, xt, t, y):
        """The network's output in xt's dtype, (B, C, H, W). y None: the null label for all."""
        if y is None:
            y = torch.full_like(t, self.K)
        with torch.autocast(xt.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.net(xt, t, y).to(xt.dtype)

    def random_t_eps(self, B, generator=None, device=None):
        """Draws t (B,), uniform over 0..T-1, and eps (B, C, H, W)."""
        t = torch.randint(self.T, (B,), generator=generator, device=device)
        return t, torch.randn((B, *self.shape), generator=generator, device=device)

    def drop_labels(self, y, u=None):
        """A copy of y with each label replaced by the null label with probability p_uncond ([3] alg. 1).

        u: (B,) uniform random numbers, default drawn here.
        """
        u = torch.rand(y.shape, device=y.device) if u is None else u
        return torch.where(u < self.config.p_uncond, self.K, y)

    def forward(self, x0, y=None, t=None, eps=None):
        """The loss of each image, (B,): its mean over the values of the image, times the weight of its t.

        x0 (B, C, H, W) in [-1, 1]; y (B,) labels, None for an unconditional model; t and eps: both, or drawn here.
        Labels are not dropped here: training calls `drop_labels` first. Raises UserError for a wrong image shape.
        """
        if tuple(x0.shape[1:]) != self.shape:
            raise UserError(f"images of shape {tuple(x0.shape[1:])}, but this model takes {self.shape} (C, H, W)")
        if t is None:
            t, eps = self.random_t_eps(len(x0), device=x0.device)
        out = self.network(self.q_sample(x0, t, eps), t, y)
        loss = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[self.config.loss]
        return self.loss_weight[t] * loss(out, self.target(x0, eps, t), reduction="none").mean(dim=(1, 2, 3))

    # -----------------------------------------------------------------------------------------------------------------
    # guidance

    def guided(self, xt, t, y, w):
        """(1 + w) net(y) - w net(null) ([3] eq. 6; x0 and v are affine in eps, so the same line serves them).

        w = 0 is the conditional and w = -1 the unconditional model, each one call; any other w is one call of 2B, or
        two of B when compiled.
        """
        if y is None or w == -1:
            return self.network(xt, t, None)
        if w == 0:
            return self.network(xt, t, y)
        if self.compiled:
            conditional, unconditional = self.network(xt, t, y), self.network(xt, t, None)
        else:
            out = self.network(xt.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, self.K)]))
            conditional, unconditional = out.chunk(2)
        return (1 + w) * conditional - w * unconditional

    def predict(self, xt, t, y, w, clip_x0=True):
        """(x0_hat, eps_hat) under guidance. Where x0_hat is clipped, eps_hat changes with it, so that both give xt."""
        x0_hat, eps_hat = self.to_x0_eps(self.guided(xt, t, y, w), xt, t)
        if clip_x0:
            a, s = self.signal_noise(t)
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - a * x0_hat) / s
        return x0_hat, eps_hat

    # -----------------------------------------------------------------------------------------------------------------
    # sampling

    def sampler_timesteps(self, steps=None):
        """The timesteps that a sampler visits, decreasing from T-1; all T by default.

        Evenly spaced in sigma^(1/7) ([8] eq. 5), from the schedule's last sigma (at most 80) down to 0.03; the last
        step jumps from there to x0_hat. Raises UserError unless 1 <= steps <= T.
        """
        steps = self.T if steps is None else steps
        check_range("steps", steps, f"[1, {self.T}]")
        sigma = torch.tensor([sigma_of(a) for a in self.abar], dtype=torch.float64)
        high, low = sigma[-1].clamp(max=80) ** (1 / 7), sigma[0].clamp(min=0.03) ** (1 / 7)
        wanted = (low + torch.linspace(1, 0, steps, dtype=torch.float64) * (high - low)) ** 7
        ts = (sigma.log() - wanted.log()[:, None]).abs().argmin(dim=1).tolist()
        ts[0] = self.T - 1
        # Rounding may repeat a t: make each lower than the one before, and leave room for those that follow.
        for i in range(1, steps):
            ts[i] = max(min(ts[i], ts[i - 1] - 1), steps - 1 - i)
        return ts

    def check_sampling(self, y, w, sampler, steps, eta, variance, interval, **others):
        """Raises UserError for what `sample` cannot do; returns the timesteps."""
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("variance", variance, ("posterior", "beta"))
        check_range("eta", eta, "[0, 1]")
        check_range("w", w, "(-inf, inf)")
        if (eta and sampler != "ddim") or (variance != "posterior" and sampler != "ddpm"):
            raise UserError(f"eta={eta:g} is for ddim and variance={variance} for ddpm, but the sampler is {sampler}")
        for end in interval:
            check_range("interval", end, "[0, inf)")
        if interval and not (len(interval) == 2 and interval[0] <= interval[1]):
            raise UserError(f"interval: {interval} must be low,high or empty")
        if y is not None and not bool(((y >= 0) & (y < self.K)).all()):
            raise UserError(f"labels {y.tolist()}, but this model has {self.K} classes")
        if w != 0 and not self.K:
            raise UserError(f"w={w:g}: an unconditional model cannot be guided")
        if self.K and self.config.p_uncond == 0 and (y is None or w != 0):
            raise UserError(f"w={w:g} needs a null label, but this model was trained at p_uncond=0: use w=0")
        return self.sampler_timesteps(steps)

    @torch.no_grad()
    def sample(self, y=None, w=0.0, seed=0, indices=None, sampler="ddpm", steps=None, eta=0.0, clip_x0=True,
               variance="posterior", interval=(), on_step=None):  # fmt: skip
        """Samples images (B, C, H, W), about in [-1, 1], on the model's device.

        y: (B,) labels; None: the null label. w: guidance ([3]: 0 is none). seed, indices: image i has noise
        indices[i] of the seed, default 0..B-1. sampler: `ddpm` ([1] alg. 2, with `posterior` or `beta` variance),
        `ddim` ([4]; eta = 0 adds no noise, eta = 1 equals ddpm) or `dpm++` ([6], second-order multistep).
        steps: how many of the T steps, default all. interval: (low, high), guide only while sigma_t is in between
        ([9]; for w > 0); the other steps cost half. on_step(i, xt, x0_hat) is called after each step.
        Raises UserError for labels or settings that do not fit the model.
        """
        if y is None and indices is None:
            raise UserError("how many images? Give y (labels), or indices=range(n) for unlabelled ones")
        if y is not None and indices is not None and len(y) != len(indices):
            raise UserError(f"{len(y)} labels, but {len(indices)} indices")
        timesteps = self.check_sampling(y, w, sampler, steps, eta, variance, interval)
        device = self.betas.device
        indices = range(len(y)) if indices is None else indices
        y = None if y is None else y.to(device)
        generators = [make_generator(seed, k) for k in indices]
        noise = partial(image_noise, generators, self.shape, device)
        xt, x0_prev, h_prev = noise(), None, None
        with evaluating(self):
            for i, t in enumerate(timesteps):
                last = i == len(timesteps) - 1
                abar_t, abar_s = self.abar[t], 1.0 if last else self.abar[timesteps[i + 1]]
                guide = w < 0 or not interval or interval[0] <= sigma_of(abar_t) <= interval[1]
                t_batch = torch.full((len(indices),), t, device=device)
                x0_hat, eps_hat = self.predict(xt, t_batch, y, w if guide else 0, clip_x0)
                if last:
                    xt = x0_hat  # every sampler ends at abar_s = 1
                elif sampler == "ddpm":
                    c0, ct, var = posterior_coefficients(abar_t, abar_s)
                    var = var if variance == "posterior" else 1 - abar_t / abar_s  # [1] sec. 3.2
                    xt = c0 * x0_hat + ct * xt + var**0.5 * noise()
                elif sampler == "ddim":
                    std = eta * posterior_coefficients(abar_t, abar_s)[2] ** 0.5  # [4] eq. 16
                    rest = max(0.0, 1 - abar_s - std**2)  # rounding may leave -1e-16
                    xt = abar_s**0.5 * x0_hat + rest**0.5 * eps_hat  # [4] eq. 12
                    xt = xt + std * noise() if eta else xt
                else:
                    # [6] alg. 2 with h the step in lambda = -log sigma and 1 / (2 r) = h / (2 h_prev)
                    h = math.log(sigma_of(abar_t) / sigma_of(abar_s))
                    D = x0_hat if x0_prev is None else x0_hat + h / (2 * h_prev) * (x0_hat - x0_prev)
                    xt = ((1 - abar_s) / (1 - abar_t)) ** 0.5 * xt - abar_s**0.5 * math.expm1(-h) * D
                    x0_prev, h_prev = x0_hat, h
                if on_step:
                    on_step(i, xt, x0_hat)
        return xt

    def sample_batches(self, y, indices, batch_size, **settings):
        """Yields the images `indices` in batches, uint8 (b, H, W, C) on the CPU. y (N,) labels or None.

        settings: keyword arguments of `sample`.
        """
        for part in torch.arange(len(indices)).split(batch_size):
            n = len(part)
            if self.compiled:  # for one shape: fill up the last batch
                part = part.repeat(-(-batch_size // n))[:batch_size]
            x = self.sample(None if y is None else y[part], indices=[indices[k] for k in part], **settings)
            yield to_uint8(x)[:n].cpu()


# ---------------------------------------------------------------------------------------------------------------------
# training: learning rate, optimiser and averaged weights


def learning_rate(step, max_iters, lr, min_lr, warmup_iters):
    """Linear warm-up to lr at step warmup_iters, then cosine decay to min_lr at the last step."""
    if step < warmup_iters:
        return lr * (step + 1) / (warmup_iters + 1)
    progress = (step - warmup_iters) / max(1, max_iters - 1 - warmup_iters)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def make_optimizer(model, lr, weight_decay):
    """AdamW, without weight decay on biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=matrices[0].device.type != "mps")


class EMA:
    """Exponential moving average of a module's parameters; update k has decay min(decay, (1 + k) / (10 + k))."""

    def __init__(self, model, decay=0.9999):
        self.params = dict(model.named_parameters())
        self.shadow = {name: p.detach().clone() for name, p in self.params.items()}
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.params.values()), 1 - decay)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self):
        """Temporarily swaps in the averaged weights (in place, so a compiled network sees them)."""
        raw = {name: p.detach().clone() for name, p in self.params.items()}
        self.copy(self.shadow, self.params)
        try:
            yield
        finally:
            self.copy(raw, self.params)

    def state_dict(self):
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state):
        for name, p in self.shadow.items():
            if state["shadow"][name].shape != p.shape:
                raise ValueError(f"{name} is {tuple(state['shadow'][name].shape)}, expected {tuple(p.shape)}")
        self.updates = state["updates"]
        self.copy(state["shadow"], self.shadow)

    @torch.no_grad()
    def copy(self, source, target):
        for name, p in target.items():
            p.copy_(source[name])


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary file for writing and renames it to `path` at the end: `path` is whole at any moment.

    Raises UserError if the disk is full, or the like.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save raises its own error from it
        if isinstance(cause, OSError):
            kept = "; the file that was there is unchanged" if os.path.exists(path) else ""
            raise UserError(f"cannot write {path}: {cause.strerror or cause}{kept}") from None
        raise


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong while a checkpoint is read or used is raised as a UserError of one line."""
    try:
        yield
    except PermissionError:
        raise UserError(f"cannot read checkpoint {path}: permission denied") from None
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        reason = " ".join(str(e).split())[:120]
        raise UserError(f"checkpoint {path} is damaged or not of this program ({type(e).__name__}: {reason})") from None


def load_checkpoint(path, keys=("model_args", "ema", "step")):
    """Reads a checkpoint onto the CPU without executing anything in it: a dict that has `keys`.

    Raises UserError if it is missing or damaged.
    """
    if not os.path.exists(path):
        raise UserError(f"no checkpoint {path}: train a model first, or give its folder with --out_dir")
    with reading(path):
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError(f"checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if missing := set(keys) - checkpoint.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
    return checkpoint


def load_model(path, ema=True, device="cpu", amp_dtype=None):
    """Returns (model, info): a checkpoint's DDPM in eval mode with averaged or raw weights, and what it is.

    info: dict(path, step, trained_on: what train.py says of the data, description: one line).
    """
    checkpoint = load_checkpoint(path)
    if not ema and "model" not in checkpoint:
        raise UserError(f"{path} holds only averaged weights: use --ema=True")
    with reading(path):
        model = DDPM(DDPMConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["ema"]["shadow"] if ema else checkpoint["model"])
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("weights that are not finite")
        if type(step := checkpoint["step"]) is not int:
            raise ValueError(f"step {step!r}")
    model.amp_dtype = amp_dtype
    description = f"{path}, step {step}, {'averaged' if ema else 'raw'} weights"
    info = dict(path=path, step=step, trained_on=checkpoint.get("trained_on", {}), description=description)
    return model.to(device).eval(), info
