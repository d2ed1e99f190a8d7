"""nanoDDPM: denoising diffusion with classifier-free guidance, in the order of the papers. Needs torch, nothing else.

    from ddpm import DDPM, DDPMConfig
    model = DDPM(DDPMConfig(num_classes=10))
    loss = model(x0, y).mean()                        # x0 (B, C, H, W) float in [-1, 1], y (B,) in 0..K-1
    x0 = model.sample(torch.tensor([3, 3, 5]), w=1.8)   # three pictures: two of class 3, one of class 5

Notation, everywhere: x0 is a clean picture, xt the noisy one, eps ~ N(0, I) its noise, t = 0..T-1 (one per picture), y
a label 0..K-1 or the null label K, and xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. A hat marks what the
network believes.

[1] Ho, Jain, Abbeel 2020, Denoising diffusion probabilistic models      [2] Nichol, Dhariwal 2021, Improved DDPM
[3] Ho, Salimans 2022, Classifier-free diffusion guidance                [4] Song, Meng, Ermon 2021, DDIM
[5] Salimans, Ho 2022, Progressive distillation (v)                      [6] Lu et al. 2022, DPM-Solver++
[7] Hang et al. 2023, Min-SNR weighting                                  [8] Karras et al. 2022, EDM
[9] Kynkäänniemi et al. 2024, Guidance in a limited interval
"""

import contextlib
import ctypes
import math
import os
import shutil
import warnings
from dataclasses import dataclass, fields
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

OBJECTIVES, LOSSES, WEIGHTINGS = ("eps", "v", "x0"), ("l2", "l1", "huber"), ("simple", "vlb", "min_snr")
SCHEDULES, SAMPLERS, ARCHS = ("linear", "cosine", "quadratic", "sigmoid"), ("ddpm", "ddim", "dpm++"), ("unet", "cnn")


class DDPMError(ValueError):
    """Something the user can mend: its text says what is wrong and how. The scripts print it as one line."""

    one_line = True


def one_of(name, value, choices):
    """Raises DDPMError unless value is one of choices."""
    if value not in choices:
        raise DDPMError(f"{name}: {value!r} is not one of {', '.join(choices)}")


# ---------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class DDPMConfig:
    """All that a checkpoint needs to build its model again. Defaults: the published recipe (about 38M weights)."""

    image_size: int = 32  # pictures are square
    channels: int = 3
    num_classes: int = 0  # K; 0 is an unconditional model
    class_names: tuple = ()
    arch: str = "unet"  # unet, or cnn: an encoder-decoder without skips, to compare with
    patch: int = 1  # side of the pixel-unshuffle stem: 2 works at half the resolution
    ch: int = 128  # width of the first level
    ch_mult: tuple = (1, 2, 2, 2)  # width of each level, in units of ch; each but the last is followed by a halving
    num_res_blocks: int = 2
    attn_resolutions: tuple = (16,)  # sides of the feature maps that get attention
    dropout: float = 0.1
    timesteps: int = 500  # T
    schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.028
    objective: str = "eps"  # what the network puts out
    loss: str = "l2"
    weighting: str = "simple"
    p_uncond: float = 0.1  # probability that a training picture loses its label

    def __post_init__(self):
        one_of("arch", self.arch, ARCHS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("objective", self.objective, OBJECTIVES)
        one_of("loss", self.loss, LOSSES)
        one_of("weighting", self.weighting, WEIGHTINGS)
        for name in ("ch_mult", "attn_resolutions", "class_names"):
            setattr(self, name, tuple(getattr(self, name)))
        for name in ("image_size", "channels", "patch", "ch", "num_res_blocks", "timesteps"):
            if getattr(self, name) < 1:
                raise DDPMError(f"{name}: {getattr(self, name)} must be at least 1")
        if not self.ch_mult or min(self.ch_mult) < 1 or self.ch % 2:
            raise DDPMError(f"ch_mult={self.ch_mult}, ch={self.ch}: multiples must be at least 1 and ch even")
        if not (0 <= self.p_uncond <= 1 and 0 <= self.dropout < 1):
            raise DDPMError(f"p_uncond={self.p_uncond} must be in [0, 1], dropout={self.dropout} in [0, 1)")
        halvings = len(self.ch_mult) - (self.arch == "unet")
        if self.image_size % (unit := self.patch * 2**halvings):
            raise DDPMError(
                f"image_size: {self.image_size} is not divisible by {unit} (patch {self.patch}, {halvings} halvings): "
                f"use {max(1, self.image_size // unit) * unit} or fewer entries in ch_mult"
            )


# ---------------------------------------------------------------------------------------------------------------------
# noise schedules, in float64


def make_betas(schedule, T, beta_start, beta_end):
    """Returns beta_t, t = 0..T-1, of one of the four schedules, (T,) float64 on the CPU.

    linear is [1]'s; quadratic is linear in sqrt(beta); sigmoid follows a logistic curve over -6..6; cosine is [2] eq.
    17 with s=0.008 and betas clipped at 0.999 (it does not use beta_start and beta_end).
    Raises DDPMError unless every 0 < beta < 1.
    """
    one_of("schedule", schedule, SCHEDULES)
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
        raise DDPMError(
            f"schedule {schedule}: betas run from {betas.min():.3g} to {betas.max():.3g} and must stay between 0 and "
            f"1; mend beta_start={beta_start:g} and beta_end={beta_end:g}"
        )
    return betas


def warn_if_signal_remains(schedule, T, beta_start, beta_end):
    """Warns when sqrt(alpha_bar_T) > 0.1, and names the T or the beta_end that would mend it."""

    def signal(T, beta_end):  # sqrt(alpha_bar_T)
        return (1 - make_betas(schedule, T, beta_start, beta_end)).prod().sqrt().item()

    if (left := signal(T, beta_end)) <= 0.1:
        return
    longer = next((n for n in range(T + 1, 20 * T + 20) if signal(n, beta_end) <= 0.1), None)
    steeper = next((b for k in range(1, 200) if (b := beta_end * 1.05**k) < 1 and signal(T, b) <= 0.1), None)
    hints = [f"timesteps={longer}"] * (longer is not None) + [f"beta_end={steeper or 0:.3g}"] * (steeper is not None)
    mend = f"; {' or '.join(hints)} mends it" if hints else ""
    warnings.warn(
        f"schedule {schedule} with timesteps={T} leaves sqrt(alpha_bar_T) = {left:.2f} of the picture at the last "
        f"step, but sampling starts from pure noise{mend}",
        stacklevel=3,
    )


def posterior_coefficients(abar_t, abar_s):
    """Returns (c0, ct, var): q(x_s | xt, x0) = N(c0 x0 + ct xt, var I) for a step from t down to s < t.

    [1] eq. 6-7 where s = t-1; any s for a sampler that skips steps. abar_s = 1 is the clean picture, where var = 0.
    Takes floats or tensors.
    """
    alpha = abar_t / abar_s
    c0 = abar_s**0.5 * (1 - alpha) / (1 - abar_t)
    ct = alpha**0.5 * (1 - abar_s) / (1 - abar_t)
    return c0, ct, (1 - alpha) * (1 - abar_s) / (1 - abar_t)


def sigma_of(abar):
    """Standard deviation of the noise in units of the picture's: xt / sqrt(abar) = x0 + sigma eps ([8]'s sigma)."""
    return (1 / abar - 1) ** 0.5


def loss_weights(weighting, objective, betas, alphas_bar):
    """Returns the weight of each t, (T,), for a squared error in the objective's own units.

    simple: 1 ([1] eq. 14 for eps). vlb: the bound of [1] eq. 12 with sigma_t^2 = beta_t, in nats per dimension.
    min_snr: [7] with gamma = 5. The errors are proportional: |eps_err|^2 = snr |x0_err|^2 = abar |v_err|^2.
    """
    one_of("weighting", weighting, WEIGHTINGS)
    if weighting == "simple":
        return torch.ones_like(betas)
    snr = alphas_bar / (1 - alphas_bar)
    if weighting == "vlb":
        eps_weight = betas / (2 * (1 - betas) * (1 - alphas_bar))
    else:
        eps_weight = snr.clamp(max=5) / snr
    return eps_weight * {"eps": 1.0, "x0": snr, "v": alphas_bar}[objective]


# ---------------------------------------------------------------------------------------------------------------------
# network


def zero(module):
    """Zeroes a module's weights: residual branches and outputs that start at zero train better ([1], app. B)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(ch):
    """GroupNorm of at most 32 groups of at least 4 channels, whatever the width."""
    groups = next(g for g in range(max(1, min(32, ch // 4)), 0, -1) if ch % g == 0)
    return nn.GroupNorm(groups, ch)


def sinusoid(t, dim):
    """Embeds t = 0..T-1 (B,) as dim cosines and sines with periods of 2 pi to 20000 pi steps: (B, dim)."""
    freqs = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000) / max(1, dim // 2 - 1)))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Condition(nn.Module):
    """One vector (B, 4 ch) for the time t (B,) and, in a conditional model, the label y (B,), null at y = K."""

    def __init__(self, c):
        super().__init__()
        self.ch, dim = c.ch, 4 * c.ch
        self.time = nn.Sequential(nn.Linear(c.ch, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(c.num_classes + 1, dim) if c.num_classes else None

    def forward(self, t, y):
        emb = self.time(sinusoid(t, self.ch).to(self.time[0].weight.dtype))
        if self.label is not None:
            emb = emb + self.label(y)
        return F.silu(emb)


class FiLM(nn.Module):
    """GroupNorm, then scale and shift by the condition ([2]'s scale-shift norm)."""

    def __init__(self, ch, dim):
        super().__init__()
        self.norm, self.affine = group_norm(ch), nn.Linear(dim, 2 * ch)

    def forward(self, h, emb):
        (B, C, H, W), norm = h.shape, self.norm
        scale, shift = self.affine(emb).chunk(2, dim=1)  # (B, C)
        weight, bias = norm.weight * (1 + scale), norm.bias * (1 + scale) + shift
        # Every picture's channels have a weight of their own: as B * C channels of one picture it is one pass over h.
        h = h.reshape(1, B * C, H, W)
        return F.group_norm(h, B * norm.num_groups, weight.flatten(), bias.flatten(), norm.eps).view(B, C, H, W)


class Upsample(nn.Conv2d):
    """Doubles the sides (nearest) and convolves, 3x3, as one transposed convolution: 16 products in place of 36."""

    def __init__(self, ch):
        super().__init__(ch, ch, 3, padding=1)

    def forward(self, x):
        kernel = F.pad(self.weight.flip(2, 3), (1, 1, 1, 1))  # convolved with a 2x2 square of ones: (out, in, 4, 4)
        kernel = kernel[..., 1:] + kernel[..., :-1]
        kernel = kernel[..., 1:, :] + kernel[..., :-1, :]
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU with masks of 16 random bits a value, which it draws five times as fast."""

    def forward(self, x):
        if not (self.training and self.p and x.is_cpu):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = max(1, round((1 - self.p) * 2**16))  # of 2**16 values
        mask = bits[: x.numel()].view_as(x) >= 2**15 - kept
        return x * mask.to(x.dtype).mul_(2**16 / kept)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a FiLM, and attention after them where it is asked for."""

    def __init__(self, cin, cout, dim, dropout, attention):
        super().__init__()
        self.norm, self.conv1 = group_norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.film, self.dropout = FiLM(cout, dim), Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(cout, cout, 3, padding=1))
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.attention = Attention(cout) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm(x)))
        h = self.conv2(self.dropout(F.silu(self.film(h, emb))))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Self-attention over a feature map's positions: heads of 64 channels, or one; a fresh one returns its input."""

    def __init__(self, ch):
        super().__init__()
        self.heads = ch // 64 if ch % 64 == 0 else 1
        self.norm, self.qkv, self.proj = group_norm(ch), nn.Conv2d(ch, 3 * ch, 1), zero(nn.Conv2d(ch, ch, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        q, k, v = qkv.unbind(1)  # (B, heads, H*W, C/heads) each
        if x.is_cpu:  # faster there than the fused kernel, up to three times in bfloat16
            h = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(B, C, H, W))


class UNet(nn.Module):
    """The U-Net of [1] with [2]'s conditioning: x (B, C, H, W), t (B,), y (B,) -> (B, C, H, W); 0 when it is fresh."""

    def __init__(self, c):
        super().__init__()
        self.patch, self.condition = c.patch, Condition(c)
        dim, res, width, widths = 4 * c.ch, c.image_size // c.patch, c.ch, [c.ch]

        def block(cin, cout):
            return ResBlock(cin, cout, dim, c.dropout, res in c.attn_resolutions)

        self.stem = nn.Conv2d(c.channels * c.patch**2, c.ch, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, mult in enumerate(c.ch_mult):
            if level:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                widths, res = widths + [width], res // 2
            for _ in range(c.num_res_blocks):
                self.down.append(block(width, c.ch * mult))
                width = c.ch * mult
                widths.append(width)
        self.mid1 = ResBlock(width, width, dim, c.dropout, attention=True)
        self.mid2 = ResBlock(width, width, dim, c.dropout, attention=False)
        for level, mult in reversed(list(enumerate(c.ch_mult))):
            for _ in range(c.num_res_blocks + 1):
                self.up.append(block(width + widths.pop(), c.ch * mult))
                width = c.ch * mult
            if level:
                self.up.append(Upsample(width))
                res *= 2
        self.norm, self.out = group_norm(width), zero(nn.Conv2d(width, c.channels * c.patch**2, 3, padding=1))

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
    """What the U-Net is compared with: strided convolutions down, transposed ones up, no skips. Same signature."""

    def __init__(self, c):
        super().__init__()
        self.patch, self.condition = c.patch, Condition(c)
        widths = [c.ch] + [c.ch * mult for mult in c.ch_mult]
        self.stem = nn.Conv2d(c.channels * c.patch**2, c.ch, 3, padding=1)
        pairs = list(zip(widths, widths[1:]))
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairs])
        self.convs.extend([nn.ConvTranspose2d(b, a, 4, stride=2, padding=1) for a, b in reversed(pairs)])
        self.films = nn.ModuleList([FiLM(conv.out_channels, 4 * c.ch) for conv in self.convs])
        self.dropout, self.out = Dropout(c.dropout), zero(nn.Conv2d(c.ch, c.channels * c.patch**2, 3, padding=1))

    def forward(self, x, t, y):
        emb, h = self.condition(t, y), self.stem(F.pixel_unshuffle(x, self.patch))
        for conv, film in zip(self.convs, self.films):
            h = self.dropout(F.silu(film(conv(h), emb)))
        return F.pixel_shuffle(self.out(h), self.patch)


# ---------------------------------------------------------------------------------------------------------------------
# pictures, noise, modes


def to_float(images):
    """uint8 (..., H, W, C) -> float32 (..., C, H, W) in [-1, 1]."""
    return images.movedim(-1, -3).contiguous().float() / 127.5 - 1  # strides of (H, W, C) would slow the network down


def to_uint8(x):
    """float (..., C, H, W) in [-1, 1] -> uint8 (..., H, W, C), rounded and clamped: to_uint8(to_float(i)) == i."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def make_generator(seed, k=0, device="cpu"):
    """The k-th generator of a seed: distinct for every k below 2**32, far apart for different seeds."""
    return torch.Generator(device).manual_seed((seed * 2654435761 + k) % 2**32)  # torch's CPU generator keeps 32 bits


class PictureNoise:
    """Noise that belongs to the picture: picture k of a seed draws from its own generator, on the CPU.

    Calling it gives the next (B, *shape) float32 of N(0, 1) on `device`. So a picture comes out the same in any batch,
    on any number of processes and when a run is resumed.
    """

    def __init__(self, seed, indices, shape, device="cpu"):
        self.generators = [make_generator(seed, k) for k in indices]
        self.shape, self.device = shape, device

    def __call__(self):
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        return noise.to(self.device, non_blocking=torch.device(self.device).type == "cuda")  # does not wait for the GPU


@contextlib.contextmanager
def evaluating(module):
    """Switches dropout off, and leaves the module in the mode that it was in."""
    was_training = module.training
    module.eval()
    try:
        yield module
    finally:
        module.train(was_training)


# ---------------------------------------------------------------------------------------------------------------------
# diffusion


class DDPM(nn.Module):
    """A denoising diffusion model: network, schedule, loss, guidance, samplers. Raises DDPMError for a bad config."""

    def __init__(self, config):
        super().__init__()
        self.config, self.T, self.K = config, config.timesteps, config.num_classes
        self.shape = (config.channels, config.image_size, config.image_size)
        self.net = {"unet": UNet, "cnn": CNN}[config.arch](config)
        self.amp_dtype = None  # set to torch.bfloat16 or float16 to run the network, and it alone, under autocast
        warn_if_signal_remains(config.schedule, self.T, config.beta_start, config.beta_end)
        betas = make_betas(config.schedule, self.T, config.beta_start, config.beta_end)
        alphas_bar = torch.cumprod(1 - betas, dim=0)
        alphas_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_bar[:-1]])
        posterior_c0, posterior_ct, posterior_var = posterior_coefficients(alphas_bar, alphas_bar_prev)
        loss_weight = loss_weights(config.weighting, config.objective, betas, alphas_bar)
        tables = dict(betas=betas, alphas_bar=alphas_bar, alphas_bar_prev=alphas_bar_prev, loss_weight=loss_weight)
        tables["q_var"] = 1 - alphas_bar  # of q(xt | x0); in float32 the difference would lose digits at small t
        tables |= dict(posterior_c0=posterior_c0, posterior_ct=posterior_ct, posterior_var=posterior_var)
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)
        self.abar = alphas_bar.tolist()  # float64, for the samplers' scalar arithmetic

    def at(self, table, t):
        """Entries t (B,) of a table, shaped (B, 1, 1, 1)."""
        return table[t][:, None, None, None]

    def signal_noise(self, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), (B, 1, 1, 1) each: xt is signal * x0 + noise * eps."""
        return self.at(self.alphas_bar, t).sqrt(), self.at(self.q_var, t).sqrt()

    def q_mean_variance(self, x0, t):
        """Mean (B, C, H, W) and variance (B, 1, 1, 1) of q(xt | x0) ([1] eq. 4)."""
        return self.signal_noise(t)[0] * x0, self.at(self.q_var, t)

    def q_sample(self, x0, t, eps):
        """xt ~ q(xt | x0) made with the given noise ([1] eq. 4)."""
        a, s = self.signal_noise(t)
        return a * x0 + s * eps

    def posterior(self, x0, xt, t):
        """Mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | xt, x0) ([1] eq. 6-7); var is 0 at t=0."""
        mean = self.at(self.posterior_c0, t) * x0 + self.at(self.posterior_ct, t) * xt
        return mean, self.at(self.posterior_var, t)

    def predict_x0_eps(self, out, xt, t):
        """The network's output (B, C, H, W) as (x0_hat, eps_hat), whatever its objective ([1] eq. 15, [5] app. D)."""
        a, s = self.signal_noise(t)
        if self.config.objective == "eps":
            return (xt - s * out) / a, out
        if self.config.objective == "v":
            return a * xt - s * out, s * xt + a * out
        return out, (xt - a * out) / s

    def target(self, x0, eps, t):
        """What the network should put out: eps, x0, or v = sqrt(abar) eps - sqrt(1 - abar) x0 ([5])."""
        if self.config.objective == "v":
            a, s = self.signal_noise(t)
            return a * eps - s * x0
        return eps if self.config.objective == "eps" else x0

    def network(self, xt, t, y):
        """The network's output in xt's dtype; y None is the null label. Autocast, where it is on, covers this alone."""
        if y is None:
            y = torch.full_like(t, self.K)
        with torch.autocast(xt.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.net(xt, t, y).to(xt.dtype)

    def draw(self, B, generator=None, device=None):
        """Draws what a training step needs: t (B,), each 0..T-1 equally likely, and eps (B, C, H, W)."""
        t = torch.randint(self.T, (B,), generator=generator, device=device)
        return t, torch.randn((B, *self.shape), generator=generator, device=device)

    def drop_labels(self, y, generator=None):
        """A copy of y in which each label is, independently, the null label with probability p_uncond ([3] alg. 1)."""
        coins = torch.rand(y.shape, generator=generator, device=y.device)
        return torch.where(coins < self.config.p_uncond, self.K, y)

    def forward(self, x0, y=None, t=None, eps=None):
        """The loss of each picture, (B,) in float32 or better: the mean over its values, times the weight of its t.

        x0 (B, C, H, W) in [-1, 1]; y (B,) labels (`drop_labels` is the caller's, in training only), None for an
        unconditional model; t and eps are drawn where they are not given. Raises DDPMError for a wrong picture shape.
        """
        if tuple(x0.shape[1:]) != self.shape:
            raise DDPMError(f"pictures of shape {tuple(x0.shape[1:])}, but this model takes {self.shape} (C, H, W)")
        if t is None or eps is None:
            drawn = self.draw(len(x0), device=x0.device)
            t, eps = drawn[0] if t is None else t, drawn[1] if eps is None else eps
        out = self.network(self.q_sample(x0, t, eps), t, y)
        kind = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[self.config.loss]
        return self.loss_weight[t] * kind(out, self.target(x0, eps, t), reduction="none").mean(dim=(1, 2, 3))

    # -----------------------------------------------------------------------------------------------------------------
    # guidance

    def guided(self, xt, t, y, w):
        """(1 + w) net(y) - w net(null) ([3] eq. 6; x0 and v are affine in eps, so the same line serves them).

        w = 0 is the conditional model and w = -1 the unconditional one, each in one call; any other w is one of 2B.
        """
        if y is None or w == -1:
            return self.network(xt, t, None)
        if w == 0:
            return self.network(xt, t, y)
        out = self.network(xt.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, self.K)]))
        conditional, unconditional = out.chunk(2)
        return (1 + w) * conditional - w * unconditional

    def predict(self, xt, t, y, w, clip_x0=True):
        """(x0_hat, eps_hat) under guidance; a clipped x0_hat gets the eps_hat that belongs to it and to xt."""
        x0_hat, eps_hat = self.predict_x0_eps(self.guided(xt, t, y, w), xt, t)
        if clip_x0:
            a, s = self.signal_noise(t)
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - a * x0_hat) / s
        return x0_hat, eps_hat

    # -----------------------------------------------------------------------------------------------------------------
    # samplers

    def sampler_timesteps(self, steps):
        """The t visited, strictly falling from T-1; all T of them when steps is None.

        After T-1 evenly in sigma^(1/7) ([8] eq. 5), sigma = sqrt(1 / alpha_bar - 1), as from the schedule's last sigma
        or 80 down to 0.03, from where x0_hat is the picture. Raises DDPMError unless 1 <= steps <= T.
        """
        steps = self.T if steps is None else steps
        if not 1 <= steps <= self.T:
            raise DDPMError(f"steps: {steps} must be between 1 and the model's {self.T} timesteps")
        sigma = torch.tensor([sigma_of(a) for a in self.abar], dtype=torch.float64)
        high, low = sigma[-1].clamp(max=80) ** (1 / 7), sigma[0].clamp(min=0.03) ** (1 / 7)
        wanted = (low + torch.linspace(1, 0, steps, dtype=torch.float64) * (high - low)) ** 7
        ts = (sigma.log() - wanted.log()[:, None]).abs().argmin(dim=1).tolist()
        ts[0] = self.T - 1
        for i in range(1, steps):  # rounding may repeat a t: make each one lower than the last, with room for the rest
            ts[i] = max(min(ts[i], ts[i - 1] - 1), steps - 1 - i)
        return ts

    def check_sampling(self, y, w, sampler, steps, eta, variance, interval, **others):
        """Returns the timesteps that `sample` visits; raises DDPMError for what it cannot do, before it does any."""
        one_of("sampler", sampler, SAMPLERS)
        one_of("variance", variance, ("posterior", "beta"))
        if y is not None and not (self.K and bool(((y >= 0) & (y < self.K)).all())):
            raise DDPMError(f"labels {y.tolist()}: this model has classes 0..{self.K - 1}" if self.K else
                            "labels were given, but this model is unconditional")  # fmt: skip
        if (eta and sampler != "ddim") or (variance != "posterior" and sampler != "ddpm"):
            raise DDPMError(f"eta={eta:g} belongs to ddim, variance={variance} to ddpm, but the sampler is {sampler}")
        if not 0 <= eta <= 1:
            raise DDPMError(f"eta={eta:g} must be in [0, 1]")
        numbers = all(isinstance(end, (int, float)) for end in interval)
        if interval and not (numbers and len(interval) == 2 and 0 <= interval[0] <= interval[1]):
            raise DDPMError(f"interval: {interval} must be low,high with 0 <= low <= high, or empty for everywhere")
        if w != 0 and not self.K:
            raise DDPMError(f"w={w:g}: this model is unconditional, there is nothing to guide")
        if self.K and self.config.p_uncond == 0 and (y is None or w != 0):
            raise DDPMError(f"w={w:g} needs a model with a null label, but this one was trained at p_uncond=0: use w=0")
        return self.sampler_timesteps(steps)

    @torch.no_grad()
    def sample(self, y=None, w=0.0, seed=0, indices=None, sampler="ddpm", steps=None, eta=0.0, clip_x0=True,
               variance="posterior", interval=(), on_step=None):  # fmt: skip
        """Draws pictures (B, C, H, W), about in [-1, 1], on the model's device.

        y: (B,) labels, or None for the null label; w: guidance ([3]: 0 is none); seed and indices: picture indices[i]
        of the seed (default 0..B-1) has noise of its own; steps: how many of the T steps (default all).
        sampler: `ddpm` ([1] alg. 2; variance `posterior` or `beta`, the two of [1] sec. 3.2), `ddim` ([4] eq. 12;
        eta = 0 draws no noise, eta = 1 equals ddpm) or `dpm++` ([6] alg. 2, second order multistep).
        interval: (low, high), where a positive w is to act only while sigma = sqrt(1 / alpha_bar - 1) is in between
        ([9]); the other steps are w = 0 and half the work.
        on_step(i, xt, x0_hat) is called after each step with what was drawn and what was believed.
        Raises DDPMError for an unknown sampler, label, number of steps, or guidance of a model that cannot be guided.
        """
        if y is None and indices is None:
            raise DDPMError("say how many pictures: y (labels), or indices=range(n) for unconditional ones")
        timesteps = self.check_sampling(y, w, sampler, steps, eta, variance, interval)
        device = self.betas.device
        indices = range(len(y)) if indices is None else indices
        if y is not None:
            y = y.to(device)
        noise = PictureNoise(seed, indices, self.shape, device)
        xt, x0_prev, h_prev = noise(), None, None
        with evaluating(self):
            for i, t in enumerate(timesteps):
                last = i == len(timesteps) - 1
                abar_t, abar_s = self.abar[t], 1.0 if last else self.abar[timesteps[i + 1]]
                t_batch = torch.full((len(indices),), t, device=device)
                guides = w < 0 or not interval or interval[0] <= sigma_of(abar_t) <= interval[1]
                x0_hat, eps_hat = self.predict(xt, t_batch, y, w if guides else 0, clip_x0)
                if last:
                    xt = x0_hat  # alpha_bar is 1: every sampler ends here
                elif sampler == "ddpm":
                    c0, ct, var = posterior_coefficients(abar_t, abar_s)
                    var = var if variance == "posterior" else 1 - abar_t / abar_s
                    xt = c0 * x0_hat + ct * xt + var**0.5 * noise()
                elif sampler == "ddim":
                    sigma = eta * posterior_coefficients(abar_t, abar_s)[2] ** 0.5  # [4] eq. 16
                    xt = abar_s**0.5 * x0_hat + (1 - abar_s - sigma**2) ** 0.5 * eps_hat
                    xt = xt + sigma * noise() if eta else xt
                else:
                    h = math.log(sigma_of(abar_t) / sigma_of(abar_s))  # step in lambda = log-SNR / 2
                    D = x0_hat if x0_prev is None else x0_hat + h / (2 * h_prev) * (x0_hat - x0_prev)
                    xt = ((1 - abar_s) / (1 - abar_t)) ** 0.5 * xt - abar_s**0.5 * math.expm1(-h) * D
                    x0_prev, h_prev = x0_hat, h
                if on_step:
                    on_step(i, xt, x0_hat)
        return xt

    def draw_pictures(self, y, indices, batch_size, **how):
        """Yields the pictures `indices` in batches as uint8 (b, H, W, C) on the CPU; y (N,) labels or None.

        how: what `sample` takes, and what it raises is raised here.
        """
        for part in torch.arange(len(indices)).split(batch_size):
            n = len(part)
            if self.net._compiled_call_impl:  # for one shape: the last batch is filled up
                part = part.repeat(-(-batch_size // n))[:batch_size]
            labels = None if y is None else y[part]
            yield to_uint8(self.sample(labels, indices=[indices[k] for k in part], **how))[:n].cpu()


# ---------------------------------------------------------------------------------------------------------------------
# training: learning rate, exponential moving average of the weights


def learning_rate(step, max_iters, lr, min_lr, warmup_iters):
    """Linear warm-up to lr, which step warmup_iters has, then a cosine that reaches min_lr at the last step."""
    if step < warmup_iters:
        return lr * (step + 1) / (warmup_iters + 1)
    done = (step - warmup_iters) / max(1, max_iters - 1 - warmup_iters)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * done))


class EMA:
    """Averages a module's parameters (not its buffers): after update k, decay min(decay, (1 + k) / (10 + k))."""

    def __init__(self, model, decay=0.9999):
        self.params, self.decay, self.updates = list(model.parameters()), decay, 0
        self.names = [name for name, _ in model.named_parameters()]
        self.shadow = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, self.params, 1 - decay)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self):
        """Puts the averages into the module (in place, so that a compiled network sees them), and takes them out."""
        with torch.no_grad():
            raw = [p.detach().clone() for p in self.params]
            torch._foreach_copy_(self.params, self.shadow)
            try:
                yield
            finally:
                torch._foreach_copy_(self.params, raw)

    def state_dict(self):
        return {"updates": self.updates, "shadow": dict(zip(self.names, self.shadow))}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        for name, mine in zip(self.names, self.shadow):
            mine.copy_(state["shadow"][name])


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints and devices


def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors and plain types so that `path` is whole at any moment; keeps the last as `.prev`."""
    temporary, previous = f"{path}.tmp", f"{path}.prev"
    with open(temporary, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    if os.path.exists(path):
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{previous}.tmp")
        try:
            os.link(path, f"{previous}.tmp")
        except OSError:  # a file system without hard links
            shutil.copyfile(path, f"{previous}.tmp")
        os.replace(f"{previous}.tmp", previous)
    os.replace(temporary, path)


def load_checkpoint(path, device="cpu"):
    """Reads a checkpoint; executes nothing that is in it. Raises DDPMError when it is missing or damaged."""
    if not os.path.exists(path):
        raise DDPMError(f"no checkpoint {path}: make one with `python train.py`, or name its folder with --out_dir")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        checkpoint["model_args"], checkpoint["ema"]["shadow"]
        return checkpoint
    except PermissionError:
        raise DDPMError(f"checkpoint {path} may not be read: permission denied") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        previous = f"{path}.prev"
        hint = "there is no previous one"
        if not path.endswith(".prev") and os.path.exists(previous):
            try:
                step = load_checkpoint(previous)["step"]
                hint = f"the previous one, {previous} (step {step}), is good: copy it over {path}"
            except DDPMError:
                hint = "and so is the previous one"
        raise DDPMError(f"checkpoint {path} is damaged ({type(e).__name__}); {hint}") from None


def model_from_checkpoint(checkpoint, ema=True, device="cpu"):
    """Builds the DDPM of a loaded checkpoint, in eval mode, with its averaged (default) or raw weights."""
    known = {f.name for f in fields(DDPMConfig)}
    model = DDPM(DDPMConfig(**{k: v for k, v in checkpoint["model_args"].items() if k in known}))
    if not ema and "model" not in checkpoint:
        raise DDPMError("this checkpoint holds averaged weights alone: use --ema=True")
    weights = checkpoint["ema"]["shadow"] if ema else checkpoint["model"]
    model.load_state_dict(weights)
    return model.to(device).eval()


def guidance_weight(w, guidance_scale, default, model):
    """The w that two settings ask for, None where they are not given; default 0 for a model that cannot be guided."""
    if w is not None and guidance_scale is not None:
        raise DDPMError("give w or guidance_scale (= 1 + w), not both")
    if guidance_scale is not None:
        return round(guidance_scale - 1, 12)  # 1.3 - 1 is not 0.3 in binary
    return w if w is not None else default if model.K and model.config.p_uncond > 0 else 0.0


def how_drawn(w, interval, sampler, steps, seed):
    """What the scripts print of a sampling: guidance in both conventions, its interval where it has one, the rest."""
    middle = f"interval {tuple(interval)}, " if interval and w > 0 else ""
    return f"w={w:g} (guidance_scale={1 + w:g}), {middle}{sampler}, {steps} steps, seed {seed}"


def open_checkpoint(out_dir, pretrained, device="cpu"):
    """(path, checkpoint) of out_dir; where a folder named `out` has none, of the pretrained weights, and says so."""
    path = os.path.join(out_dir, "ckpt.pt")
    is_out = os.path.basename(os.path.normpath(out_dir)) == "out"
    if is_out and not os.path.exists(path) and os.path.isdir(pretrained):
        name = next((n for n in sorted(os.listdir(pretrained)) if n.endswith(".pt")), None)
        if name:
            path = os.path.join(pretrained, name)
            print(f"{out_dir} holds no checkpoint: using the pretrained weights/{name}")
    return path, load_checkpoint(path, device)


def export_weights(path, checkpoint):
    """Writes what sampling needs of a checkpoint, the averaged weights as float16: a few MB to hand on."""
    shadow = {name: p.half() for name, p in checkpoint["ema"]["shadow"].items()}
    kept = {key: checkpoint[key] for key in ("model_args", "step", "trained_on") if key in checkpoint}
    save_checkpoint(path, kept | {"ema": {"updates": checkpoint["ema"]["updates"], "shadow": shadow}})


def keep_freed_memory():
    """Tells glibc to keep what is freed: to give it back and take it again, page by page, is 4% of a CPU's step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def cpu_has_bfloat16():
    """Whether this CPU has bfloat16 in hardware, where it is nearly twice as fast as float32."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def choose_device(device="auto", dtype="auto", use_compile="auto"):
    """Turns the three settings into (device, amp dtype or None, compile or not); raises DDPMError for a missing device.

    auto: cuda, mps or cpu; bfloat16 where the GPU has it, float16 on an older one, no autocast on cpu and mps; compile
    on cuda alone, where there is triton and the GPU is new enough for it.
    """
    mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind = device.split(":")[0]
    one_of("device", kind, ("auto", "cuda", "mps", "cpu"))
    index = device.partition(":")[2] or "0"
    there = {"cuda": index.isdigit() and int(index) < torch.cuda.device_count(), "mps": mps}
    if not there.get(kind, True):
        raise DDPMError(f"device: {device!r} was asked for, but there is none here: use --device=cpu or auto")
    one_of("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    one_of("use_compile", str(use_compile), ("auto", "True", "False"))
    if dtype == "auto":
        dtype = "float32" if kind != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if kind == "cpu":
        keep_freed_memory()
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    amp = None if dtype == "float32" else getattr(torch, dtype)
    if use_compile == "auto":
        use_compile = (
            kind == "cuda" and bool(find_spec("triton")) and torch.cuda.get_device_capability(device) >= (7, 0)
        )
    return device, amp, str(use_compile) == "True"
