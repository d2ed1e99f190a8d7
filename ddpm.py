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
[9] Kynkäänniemi et al. 2024, Guidance in a limited interval             [10] Jordan et al. 2024, Muon
[11] Liu et al. 2025, Muon is scalable for LLM training                  [12] Karras et al. 2024, Autoguidance
"""

import copy
import math
import os
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.1.0"
__all__ = ["DDPM", "DDPMConfig", "UserError", "load_model", "save_model", "to_float", "to_uint8", "make_generator"]
OBJECTIVES, LOSSES, WEIGHTINGS = ("eps", "v", "x0"), ("l2", "l1", "huber"), ("simple", "vlb", "min_snr", "v")
SCHEDULES = ("linear", "cosine", "quadratic", "sigmoid", "lognormal")
SAMPLERS, ARCHS = ("ddpm", "ddim", "dpm++"), ("unet", "cnn")


class UserError(ValueError):
    """An error caused by the input. The scripts print it as one line."""


def check(ok, message):
    """Raises UserError unless ok."""
    if not ok:
        raise UserError(message)


def check_choice(name, value, choices):
    check(value in choices, f"{name}: {value!r} is not one of {', '.join(choices)}")


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
    attn_resolutions: tuple = (16,)  # sides of the feature maps that get attention; the U-Net's middle always has it
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
        for f in fields(self):
            value = getattr(self, f.name)
            value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's numbers become Python's
            if isinstance(value, (list, tuple)):
                value = tuple(v.tolist() if hasattr(v, "tolist") else v for v in value)
            value = float(value) if (type(value), f.type) == (int, float) else value
            check(type(value) is f.type, f"{f.name}: {value!r} is not of type {f.type.__name__}")
            setattr(self, f.name, value)
        self.class_names = tuple(map(str, self.class_names))
        choices = dict(arch=ARCHS, schedule=SCHEDULES, objective=OBJECTIVES, loss=LOSSES, weighting=WEIGHTINGS)
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        most = dict(image_size=4096, channels=4096, patch=64, ch=4096, num_res_blocks=64, timesteps=100_000)
        for name, limit in (most | dict(num_classes=2**20)).items():
            value, least = getattr(self, name), 0 if name == "num_classes" else 1
            check(least <= value <= limit, f"{name}: {value} is not a whole number from {least} to {limit}")
        whole = self.ch_mult and all(type(m) is int and 0 < m <= 64 for m in self.ch_mult)
        check(whole, f"ch_mult: {self.ch_mult} must be whole numbers from 1 to 64")
        check(self.ch % 2 == 0, f"ch: {self.ch} must be even")
        for name in ("dropout", "p_uncond"):
            check(0 <= getattr(self, name) <= 1, f"{name}: {getattr(self, name)} must be between 0 and 1")
        names, K = len(self.class_names), self.num_classes
        check(not K or names in (0, K), f"class_names: {names} names for {K} classes")
        check(self.p_uncond < 1 or not self.num_classes, "p_uncond: 1 drops every label, so that none is learned")
        halvings = len(self.ch_mult) - (self.arch == "unet")  # the U-Net's first level keeps the resolution
        unit = self.patch * 2**halvings
        check(self.image_size % unit == 0, f"image_size: {self.image_size} is not divisible by {unit} (patch, levels)")
        sides = [self.image_size // self.patch // 2**k for k in range(halvings + 1)]
        missing = [side for side in self.attn_resolutions if side not in sides and self.arch == "unet"]
        check(not missing, f"attn_resolutions: {missing}, but the feature maps have sides {sides}")


# ---------------------------------------------------------------------------------------------------------------------
# noise schedules, in float64


def make_betas(schedule: str, T: int, beta_start: float, beta_end: float) -> Tensor:
    """Returns beta_t for t = 0..T-1, (T,) float64.

    linear: [1]. quadratic: linear in sqrt(beta). sigmoid: a logistic curve over -6..6. cosine: [2] eq. 17 with
    s = 0.008 and betas clipped at 0.999. lognormal: log sigma is normal over t, as in the training of [8], with mean
    -0.6 (there -1.2) and deviation 1.2. The last two ignore beta_start and beta_end.
    """
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    elif schedule == "quadratic":
        betas = torch.linspace(max(0, beta_start) ** 0.5, max(0, beta_end) ** 0.5, T, dtype=torch.float64) ** 2
    elif schedule == "sigmoid":
        x = torch.linspace(-6, 6, T, dtype=torch.float64)
        betas = beta_start + (beta_end - beta_start) * torch.sigmoid(x)
    elif schedule == "cosine":
        u = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif schedule == "lognormal":
        z = torch.special.ndtri((torch.arange(T, dtype=torch.float64) + 0.5) / T)
        abar = torch.sigmoid(-2 * (1.2 * z - 0.6))  # 1 / (1 + sigma^2)
        betas = 1 - abar / F.pad(abar[:-1], (1, 0), value=1)
    else:
        raise NotImplementedError(schedule)
    return betas


def loss_weights(weighting, objective, betas, abar):
    """Returns the weight of each t, (T,), for a squared error in the objective's own units.

    simple: 1 ([1] eq. 14 for eps). vlb: a term of [1] eq. 12 with variance beta_t: their sum is in nats per dimension.
    min_snr: [7] with gamma = 5. v: the error of v, but where snr is above 5 as if it were 5, like min_snr.
    One error has three sizes: |eps_err|^2 = snr |x0_err|^2 = abar |v_err|^2, and 1 / (1 - abar) = snr + 1.
    """
    if weighting == "simple":
        return torch.ones_like(betas)
    snr = abar / (1 - abar)
    if weighting == "vlb":
        eps_weight = betas / (2 * (1 - betas) * (1 - abar))
    elif weighting == "min_snr":
        eps_weight = snr.clamp(max=5) / snr
    elif weighting == "v":
        eps_weight = (snr.clamp(max=5) + 1) / snr
    else:
        raise NotImplementedError(weighting)
    return eps_weight * {"eps": 1.0, "x0": snr, "v": abar}[objective]


# ---------------------------------------------------------------------------------------------------------------------
# network


def zero_init(module):
    """Zeroes a module's weights, so that a residual branch starts as the identity and the network outputs 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(x, groups, weight, bias, eps):
    """F.group_norm in x's dtype, where autocast would take float32."""
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)


class GroupNorm(nn.GroupNorm):
    """At most 32 groups of at least 4 channels, for any width."""

    def __init__(self, ch):
        super().__init__(next(g for g in range(max(1, min(32, ch // 4)), 0, -1) if ch % g == 0), ch)

    def forward(self, x):
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Upsample(nn.Conv2d):
    """Nearest-neighbour 2x upsampling and a 3x3 convolution."""

    def __init__(self, ch):
        super().__init__(ch, ch, 3, padding=1)

    def forward(self, x):
        if torch.version.hip:  # AMD: transposed convolutions are up to 20 times slower there (ROCm/MIOpen issue 3952)
            return super().forward(F.interpolate(x, scale_factor=2))
        # Else fused into one 4x4 transposed convolution (a training step of cifar_small is 1.04 to 1.08x faster on a
        # CPU). Its kernel is the flipped 3x3 kernel spread over 2x2 pixels, and contiguous: on Apple's GPUs
        # convolutions ignore the strides of weights (pytorch issue 192212).
        kernel = F.pad(self.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))
        kernel = kernel[..., 1:] + kernel[..., :-1]
        kernel = kernel[..., 1:, :] + kernel[..., :-1, :]  # (in, out, 4, 4)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


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
        scale, shift = self.affine(emb).chunk(2, dim=1)  # (B, C) each
        if not h.is_cpu:
            return self.norm(h) * (1 + scale)[..., None, None] + shift[..., None, None]
        # In one pass over h (sampling is 1.03 to 1.07x faster): every image has a weight and a bias of its own, so the
        # batch is viewed as one image of B * C channels.
        B, C, H, W = h.shape
        weight, bias = self.norm.weight * (1 + scale), self.norm.bias * (1 + scale) + shift
        h = h.reshape(1, B * C, H, W)
        h = group_norm(h, B * self.norm.num_groups, weight.flatten(), bias.flatten(), self.norm.eps)
        return h.view(B, C, H, W)


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, in heads of 64 channels (one head for other widths)."""

    def __init__(self, ch):
        super().__init__()
        self.heads = ch // 64 if ch % 64 == 0 else 1
        self.norm, self.qkv, self.proj = GroupNorm(ch), nn.Conv2d(ch, 3 * ch, 1), zero_init(nn.Conv2d(ch, ch, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        q, k, v = qkv.contiguous().unbind(1)  # (B, heads, H*W, C/heads) each
        if x.is_cpu:  # 1.03 to 1.11x faster than the fused kernel there
            h = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(B, C, H, W))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a FiLM in between, then attention at some resolutions."""

    def __init__(self, cin, cout, dim, dropout, attention):
        super().__init__()
        self.norm, self.conv1 = GroupNorm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.film, self.dropout = FiLM(cout, dim), nn.Dropout(dropout)
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

        def block(cin, cout):  # with attention if the current `res` has it
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
        self.dropout = nn.Dropout(c.dropout)
        self.out = zero_init(nn.Conv2d(c.ch, c.channels * c.patch**2, 3, padding=1))

    def forward(self, x, t, y):
        emb, h = self.condition(t, y), self.stem(F.pixel_unshuffle(x, self.patch))
        for conv, film in zip(self.convs, self.films):
            h = self.dropout(F.silu(film(conv(h), emb)))
        return F.pixel_shuffle(self.out(h), self.patch)


# ---------------------------------------------------------------------------------------------------------------------
# images and noise


def to_float(images: Tensor) -> Tensor:
    """uint8 (..., H, W, C) -> float32 (..., C, H, W) in [-1, 1]."""
    return images.movedim(-1, -3).contiguous().float() / 127.5 - 1  # contiguous: the network is faster on it


def to_uint8(x: Tensor) -> Tensor:
    """float (..., C, H, W) in [-1, 1] -> uint8 (..., H, W, C), rounded and clamped: to_uint8(to_float(i)) == i.

    Raises UserError for NaN and infinities.
    """
    check(x.isfinite().all(), "the images are not finite: compute in float32 or bfloat16")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def seed_of(seed, k):
    """The seed of stream k of `seed`: distinct for every k below 2**32, far apart for different seeds.

    Streams: sampling: image k; data.py: epoch k, 2**31 + step; train.py: 2**28 + step, 2**29 + image, 2**30 + step;
    classifier.py: 0, 1.
    """
    return (int(seed) * 2654435761 + int(k)) % 2**32  # torch's CPU generator keeps 32 bits


def make_generator(seed: int, k: int = 0, device: str = "cpu") -> torch.Generator:
    """A random generator for stream k of `seed`."""
    return torch.Generator(device).manual_seed(seed_of(seed, k))


def image_noise(generators: list, shape: tuple, device: str = "cpu") -> Tensor:
    """The next N(0, 1) noise of each generator, (B, *shape), drawn on the CPU.

    Noise belongs to the image: image k of a seed draws from generator k, so it is the same in any batch, on any number
    of processes and in a resumed run.
    """
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


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
    """A denoising diffusion model: network, schedule, loss, guidance and samplers.

    net: a network of your own instead of config.arch, called as net(xt, t, y), with y the null label K where there is
    none. betas: a schedule of your own, (T,). Raises UserError unless every beta is between 0 and 1.
    """

    def __init__(self, config: DDPMConfig, net: nn.Module | None = None, betas=None):
        super().__init__()
        self.config, self.T, self.K = config, config.timesteps, config.num_classes
        self.shape = (config.channels, config.image_size, config.image_size)
        self.net = {"unet": UNet, "cnn": CNN}[config.arch](config) if net is None else net
        self.guide = None  # earlier weights of net, for guidance to lead away from ([12])
        self.amp_dtype = None  # torch.bfloat16 or float16: run the network, and nothing else, under autocast
        if betas is None:
            betas = make_betas(config.schedule, self.T, config.beta_start, config.beta_end)
        betas = torch.as_tensor(betas, dtype=torch.float64)
        check(betas.shape == (self.T,), f"betas: {tuple(betas.shape)}, expected one for each of {self.T} timesteps")
        inside = bool(((betas > 0) & (betas < 1)).all())
        check(inside, f"betas run from {betas.min():.3g} to {betas.max():.3g}, not between 0 and 1")
        self.betas, abar = betas.tolist(), torch.cumprod(1 - betas, dim=0)
        self.abar = abar.tolist()  # float64, for the samplers
        check(self.abar[-1] > 1e-300, f"timesteps: {self.T} steps of these betas leave alpha_bar 0 in float64")
        if self.abar[-1] > 0.01:
            left = f"timesteps={self.T}: the last step leaves sqrt(abar_T) = {self.abar[-1] ** 0.5:.2f} of the image"
            warnings.warn(f"{left}, but sampling starts from pure noise: raise timesteps or beta_end", stacklevel=2)
        tables = dict(abar_t=abar, q_var=1 - abar)  # 1 - abar in float64: float32 would lose digits at small t
        tables["loss_weight"] = loss_weights(config.weighting, config.objective, betas, abar)
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def signal_noise(self, t):
        """sqrt(abar_t) and sqrt(1 - abar_t), (B, 1, 1, 1) each: the coefficients of x0 and eps in xt."""
        return tuple(table[t].sqrt()[:, None, None, None] for table in (self.abar_t, self.q_var))

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The noisy image xt ~ q(xt | x0) ([1] eq. 4), (B, C, H, W)."""
        a, s = self.signal_noise(t)
        return a * x0 + s * eps

    def target(self, x0, eps, t):
        """What the network should output: eps, x0, or v = sqrt(abar) eps - sqrt(1 - abar) x0 ([5])."""
        a, s = self.signal_noise(t)
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0}[self.config.objective]

    def to_x0_eps(self, out, xt, t):
        """The network's output as (x0_hat, eps_hat), (B, C, H, W) each ([1] eq. 15, [5] app. D)."""
        a, s = self.signal_noise(t)
        if self.config.objective == "eps":
            return (xt - s * out) / a, out
        if self.config.objective == "v":
            return a * xt - s * out, s * xt + a * out
        if self.config.objective == "x0":
            return out, (xt - a * out) / s
        raise NotImplementedError(self.config.objective)

    def network(self, xt, t, y, net=None):
        """The output of net (default: self.net) in xt's dtype, (B, C, H, W). y None: the null label for all."""
        if y is None:
            y = torch.full_like(t, self.K)
        with torch.autocast(xt.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return (net or self.net)(xt, t, y).to(xt.dtype)

    def random_t_eps(self, B, generator=None, device=None):
        """Draws t (B,), uniform over 0..T-1, and eps (B, C, H, W)."""
        t = torch.randint(self.T, (B,), generator=generator, device=device)
        return t, torch.randn((B, *self.shape), generator=generator, device=device)

    def drop_labels(self, y: Tensor, u: Tensor | None = None) -> Tensor:
        """A copy of y with each label replaced by the null label with probability p_uncond ([3] alg. 1).

        u: (B,) uniform random numbers, default drawn here.
        """
        u = torch.rand(y.shape, device=y.device) if u is None else u
        return torch.where(u < self.config.p_uncond, self.K, y)

    def forward(self, x0: Tensor, y=None, t=None, eps=None) -> Tensor:
        """The loss of each image, (B,): its mean over the values of the image, times the weight of its t.

        x0 (B, C, H, W) in [-1, 1]; y (B,) labels, None for an unconditional model; t and eps: both, or drawn here.
        Labels are not dropped here: training calls `drop_labels` first. Raises UserError for what does not fit.
        """
        given = f"{x0.dtype} images of {tuple(x0.shape[1:])}"
        fits = x0.is_floating_point() and tuple(x0.shape[1:]) == self.shape
        check(fits, f"{given}, but this model takes floating point of {self.shape} in [-1, 1]")
        fits = y is not None and y.shape == x0.shape[:1] if self.K else y is None
        check(fits, f"y: expected {'a label for each image' if self.K else 'None, this model is unconditional'}")
        x0 = x0.to(self.loss_weight.dtype)
        shapes = [v if v is None else tuple(v.shape) for v in (t, eps)]
        fits = shapes in ([None, None], [(len(x0),), tuple(x0.shape)])
        check(fits, f"t and eps: {shapes}, expected both, one for each image, or neither")
        if t is None:
            t, eps = self.random_t_eps(len(x0), device=x0.device)
        out = self.network(self.q_sample(x0, t, eps), t, y)
        loss = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[self.config.loss]
        return self.loss_weight[t] * loss(out, self.target(x0, eps, t), reduction="none").mean(dim=(1, 2, 3))

    # -----------------------------------------------------------------------------------------------------------------
    # guidance and sampling

    def guided(self, xt, t, y, w):
        """(1 + w) net(y) - w net(null) ([3] eq. 6; x0 and v are affine in eps, so the same line serves them).

        w = 0 is the conditional and w = -1 the unconditional model. w > 0 takes net(null) from the guide, if any.
        """
        if y is None or w == -1:
            return self.network(xt, t, None)
        if w == 0:
            return self.network(xt, t, y)
        return (1 + w) * self.network(xt, t, y) - w * self.network(xt, t, None, self.guide if w > 0 else None)

    def predict(self, xt, t, y, w, clip_x0=True):
        """(x0_hat, eps_hat) under guidance. Where x0_hat is clipped, eps_hat changes with it, so that both give xt."""
        x0_hat, eps_hat = self.to_x0_eps(self.guided(xt, t, y, w), xt, t)
        if clip_x0:
            a, s = self.signal_noise(t)
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - a * x0_hat) / s
        return x0_hat, eps_hat

    def sampler_timesteps(self, steps: int, first: int | None = None) -> list:
        """The timesteps that a sampler visits, decreasing from `first`, by default T-1.

        Evenly spaced in sigma^(1/7) ([8] eq. 5), between 80 and 0.03 where the schedule reaches them; always `first`
        at first, and every t if steps = first + 1. The last step jumps to x0_hat.
        """
        first = self.T - 1 if first is None else first
        sigma = torch.tensor([sigma_of(a) for a in self.abar[: first + 1]], dtype=torch.float64)
        high, low = sigma[-1].clamp(max=80) ** (1 / 7), sigma[0].clamp(min=0.03) ** (1 / 7)
        wanted = (low + torch.linspace(1, 0, steps, dtype=torch.float64) * (high - low)) ** 7
        ts = (sigma.log() - wanted.log()[:, None]).abs().argmin(dim=1).tolist()
        ts[0] = first
        # Rounding may repeat a t: make each lower than the one before, and leave room for those that follow.
        for i in range(1, steps):
            ts[i] = max(min(ts[i], ts[i - 1] - 1), steps - 1 - i)
        return ts

    def check_sampling(self, y, w, sampler, steps, eta, interval):
        """Raises UserError for what `sample` cannot do. y (B,) or None."""
        check_choice("sampler", sampler, SAMPLERS)
        check(1 <= steps <= self.T, f"steps: {steps} must be between 1 and {self.T}")
        check(eta == 0 or (0 < eta <= 1 and sampler == "ddim"), f"eta: {eta} must be 0, or at most 1 with sampler=ddim")
        check(math.isfinite(w), f"w: {w} must be finite")
        check(len(interval) < 3 and interval[:1] <= interval[1:], f"interval: {interval} must be low,high or empty")
        if y is not None and len(y):
            check(0 <= y.min() and y.max() < self.K, f"labels {y.tolist()}, but this model has {self.K} classes")
        check(w == 0 or self.K, f"w={w:g}: an unconditional model cannot be guided")
        guidable = self.K == 0 or self.config.p_uncond > 0 or (w == 0 and y is not None)
        check(guidable, f"w={w:g} needs a null label, but this model was trained at p_uncond=0: use w=0")

    @torch.no_grad()
    def sample(self, y: Tensor | None = None, w=0.0, seed=0, indices=None, sampler="ddpm", steps=None, eta=0.0,
               interval=(), clip_x0=True, on_step=None, start=None) -> Tensor:  # fmt: skip
        """Samples images (B, C, H, W), about in [-1, 1], on the model's device. Leaves the model in eval mode.

        y: (B,) labels; None: the null label. w: guidance ([3]: 0 is none). seed, indices: image i has noise
        indices[i] of the seed, default 0..B-1. sampler: `ddpm` ([1] alg. 2), `ddim` ([4]; eta = 1 equals ddpm) or
        `dpm++` ([6], second-order multistep). steps: how many of the T steps, default all. interval: (low, high), guide
        only while sigma_t is in between ([9]; for w > 0). on_step(i, xt, x0_hat) is called after each step and may
        change xt in place. start: (t, xt), to go on from noisy images (B, C, H, W) at step t instead of pure noise.
        Raises UserError for labels or settings that do not fit the model.
        """
        y, interval = None if y is None else torch.as_tensor(y).long(), tuple(interval)
        first = self.T - 1 if start is None else start[0]
        steps, device = first + 1 if steps is None else steps, self.loss_weight.device
        self.check_sampling(y, w, sampler, steps, eta, interval)
        check(steps <= first + 1 <= self.T, f"start: {steps} steps from t={first} of 0..{self.T - 1}")
        check(y is not None or w in (0, -1), f"w={w:g}: guidance needs labels y")
        check(y is not None or indices is not None, "how many images? Give y (labels), or indices=range(n)")
        indices = range(len(y)) if indices is None else indices
        check(y is None or len(y) == len(indices), f"{len(indices)} indices, but another number of labels")
        y = None if y is None else y.to(device)
        generators = [make_generator(seed, k) for k in indices]
        xt, x0_prev, h_prev = image_noise(generators, self.shape, device), None, None
        if start is not None:
            fits = start[1].shape == xt.shape and start[1].is_floating_point()
            check(fits, f"start: {start[1].dtype} {tuple(start[1].shape)}, expected floating point {tuple(xt.shape)}")
            xt = start[1].to(xt)
        timesteps = self.sampler_timesteps(steps, first)
        self.eval()
        for i, t in enumerate(timesteps):
            abar_t = self.abar[t]
            inside = w < 0 or not interval or interval[0] <= sigma_of(abar_t) <= interval[1]
            t_batch = torch.full((len(indices),), t, device=device)
            x0_hat, eps_hat = self.predict(xt, t_batch, y, w if inside else 0, clip_x0)
            abar_s = 1.0 if i == steps - 1 else self.abar[timesteps[i + 1]]
            if abar_s == 1:  # every sampler ends at x0_hat
                xt = x0_hat
            elif sampler == "ddpm":
                c0, ct, var = posterior_coefficients(abar_t, abar_s)
                xt = c0 * x0_hat + ct * xt + var**0.5 * image_noise(generators, self.shape, device)
            elif sampler == "ddim":
                var = eta**2 * posterior_coefficients(abar_t, abar_s)[2]  # [4] eq. 16
                xt = abar_s**0.5 * x0_hat + max(0, 1 - abar_s - var) ** 0.5 * eps_hat  # [4] eq. 12; max: not -1e-16
                xt = xt + var**0.5 * image_noise(generators, self.shape, device) if eta else xt
            elif sampler == "dpm++":  # [6] alg. 2; h: the step in lambda = -log sigma, 1 / (2 r) = h / (2 h_prev)
                h = math.log(sigma_of(abar_t) / sigma_of(abar_s))
                D = x0_hat if x0_prev is None else x0_hat + h / (2 * h_prev) * (x0_hat - x0_prev)
                xt = ((1 - abar_s) / (1 - abar_t)) ** 0.5 * xt - abar_s**0.5 * math.expm1(-h) * D
                x0_prev, h_prev = x0_hat, h
            else:
                raise NotImplementedError(sampler)
            if on_step:
                on_step(i, xt, x0_hat)
        return xt

    def sample_batches(self, y, indices, batch_size, start=None, **settings):
        """Yields the images `indices` in batches, uint8 (b, H, W, C) on the CPU. y (N,) labels or None.

        start and settings: keyword arguments of `sample`, start for all N images.
        """
        for part in torch.arange(len(indices)).split(batch_size):
            settings["start"] = start and (start[0], start[1][part])
            x = self.sample(None if y is None else y[part], indices=[indices[k] for k in part], **settings)
            yield to_uint8(x).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# training: learning rate, optimiser and averaged weights


def learning_rate(step: int, max_iters: int, lr: float, min_lr: float, warmup_iters: int) -> float:
    """Linear warm-up to lr at step warmup_iters, then cosine decay to min_lr at the last step."""
    if step < warmup_iters:
        return lr * (step + 1) / (warmup_iters + 1)
    progress = (step - warmup_iters) / max(1, max_iters - 1 - warmup_iters)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


class Muon(torch.optim.AdamW):
    """AdamW, but [10] with the scale of [11] for the group `kernels`, as matrices (out, in * height * width).

    It steps along the momentum with all singular values set to about 1: small directions count like large ones.
    """

    @torch.no_grad()
    def step(self):
        for group in (group for group in self.param_groups if "kernels" in group):
            for p in group["params"]:
                if p not in self.state:  # AdamW reads the step of every state
                    self.state[p] = dict(step=torch.zeros(()), momentum=torch.zeros_like(p))
                momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                X = p.grad.lerp(momentum, 0.95).flatten(1)
                tall = X.shape[0] > X.shape[1]  # A is the smaller square
                X = (X.T if tall else X) / (X.norm() + 1e-7)
                for _ in range(5):  # of a Newton-Schulz iteration
                    A = X @ X.T
                    X = 3.4445 * X + (2.0315 * A @ A - 4.775 * A) @ X
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((X.T if tall else X).reshape(p.shape), alpha=0.2 * max(X.shape) ** 0.5 * group["lr"])
                p.grad = None  # AdamW passes over it
        super().step()


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, kind: str = "adamw") -> torch.optim.AdamW:
    """AdamW, or Muon for convolutions but the first and the last; without weight decay on biases and norms."""
    check_choice("optimizer", kind, ("adamw", "muon"))
    groups = {"kernels": [], "matrices": [], "vectors": []}
    for name, p in model.named_parameters():
        inner = kind == "muon" and p.ndim == 4 and not name.startswith(("net.stem", "net.out"))
        groups["kernels" if inner else "matrices" if p.ndim > 1 else "vectors"].append(p)
    decay = dict(kernels=weight_decay, matrices=weight_decay, vectors=0.0)
    groups = [{"params": params, "weight_decay": decay[name], name: True} for name, params in groups.items() if params]
    if kind == "muon":
        return Muon(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, fused=p.device.type != "mps")


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float):
    """Moves the averaged weights towards the model's, faster in the first steps: the random start is soon forgotten.

    Buffers, such as a BatchNorm's in a network of your own, are copied.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for averaged, buffer in zip(ema.buffers(), model.buffers()):
        averaged.copy_(buffer)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def save_model(path, model: DDPM, ema: DDPM | None = None, step: int = 0, **more):
    """Writes a checkpoint for load_model to a path or an open file: raw weights, averaged ones (default: the same).

    more: whatever else is to be kept, of plain values and tensors.
    """
    content = dict(model_args=asdict(model.config), betas=model.betas, step=step)
    content |= dict(model=model.state_dict(), ema=(ema or model).state_dict())
    torch.save(content | more, path)


def load_checkpoint(path: str) -> dict:
    """Reads a checkpoint of save_model onto the CPU without executing anything in it, as a dict.

    Raises UserError if it is missing or damaged, or something else.
    """
    check(os.path.exists(path), f"no checkpoint {path}: train a model first")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        checkpoint = {} if damaged else torch.load(path, map_location="cpu", weights_only=True)
        whole = {"model_args", "ema", "step"} <= checkpoint.keys()
    except (PermissionError, MemoryError):
        raise
    except Exception:  # a damaged file can raise anything
        whole = False
    check(whole, f"checkpoint {path} is damaged or not of save_model")
    return checkpoint


def load_model(path: str, ema: bool = True, device: str = "cpu", amp_dtype=None, net=None) -> tuple[DDPM, dict]:
    """Returns (model, checkpoint): the DDPM of a checkpoint in eval mode, with averaged or raw weights.

    net: a network of your own, if DDPM was given one.
    """
    checkpoint = load_checkpoint(path)
    check(ema or "model" in checkpoint, f"{path} holds only averaged weights: ema must be True")
    model = DDPM(DDPMConfig(**checkpoint["model_args"]), net, checkpoint.get("betas"))
    averaged = checkpoint["ema"].get("shadow", checkpoint["ema"])  # shadow: the layout of weights/cifar_small.pt
    guide = {name: p for name, p in averaged.items() if name.startswith("guide.")}
    weights = (averaged if ema else checkpoint["model"]) | guide
    if guide:
        model.guide = copy.deepcopy(model.net).requires_grad_(False)
    check(weights.keys() == model.state_dict().keys(), f"checkpoint {path} is of another version or another network")
    model.load_state_dict(weights)
    model.amp_dtype = amp_dtype
    return model.to(device).eval(), checkpoint
