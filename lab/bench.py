"""Speed, side by side in one run: medians of rounds that go A B A B …, and their ratios.

python -m lab.bench                                         training step and sampling of the default recipe
python -m lab.bench config/cifar_small.py                   of any other
python -m lab.bench --peer=diffusers --batch_size=16        against the same layout in diffusers (extra `bench`)
python -m lab.bench --peer=lucidrains --batch_size=16       against denoising-diffusion-pytorch, a small U-Net

Peers are used as in their documentation. diffusers: UNet2DModel, AdamW, clipping, EMAModel, its schedulers' loop with
both branches of the guidance in one batch. lucidrains: GaussianDiffusion with Adam and EMA. All sides get the same
batch of random images, dtype and compiler. NHWC, on a GPU: ours, compiled to convolve channels-last. A recipe is
whatever train.py could be given.
"""

import copy
import math
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from configurator import configure
from data import Batches
from ddpm import DDPM, SAMPLERS, DDPMConfig, UserError, check, check_choice, make_optimizer, update_ema
from runtime import machine, setup_device

# ---------------------------------------------------------------------------------------------------------------------
peer = ""  # diffusers or lucidrains
what = "train,sample"  # or one of them
rounds = 5  # of each measurement, after one to warm up
samplers = "ddpm,ddim,dpm++"
steps = 10  # of each sampling
num_samples = 16  # images in one
w = 0.3  # guidance
interval = ()  # our guidance interval (see sample.py); peers guide at every step
# ---------------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), "train.py")
s = SimpleNamespace(**config)


def synchronize():
    if s.device.startswith("cuda"):
        torch.cuda.synchronize()
    elif s.device.startswith("mps"):
        torch.mps.synchronize()


def medians(functions):
    """Median seconds of each of {name: function}, taking turns, after one round to warm up."""
    calls = 10 if s.device.startswith("cuda") else 1  # at once, as in training: a GPU works while the host goes ahead
    times = {name: [] for name in functions}
    for _ in range(s.rounds + 1):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize()
            times[name].append(max(1e-9, time.perf_counter() - start) / calls)  # a clock may stand still
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def autocast():
    return torch.autocast(s.device.split(":")[0], amp_dtype, enabled=amp_dtype is not None)


# ---------------------------------------------------------------------------------------------------------------------
# the sides: train() is one step, sample() draws images


class Side:
    """What the sides have in common."""

    def __init__(self):
        self.step, self.scaler = 0, torch.amp.GradScaler(s.device.split(":")[0], enabled=amp_dtype == torch.float16)

    def update(self, loss, clip=1.0):
        """The part of a step after the loss, but for the averaged weights."""
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


class Ours(Side):
    """train.py's step (gathering, flips and label dropout included; no grad_accum), and our samplers."""

    def __init__(self, use_compile):
        super().__init__()
        args = {key: config[key] for key in DDPMConfig.__dataclass_fields__ if key in config}
        args |= dict(image_size=size, channels=channels, num_classes=K)
        self.model = DDPM(DDPMConfig(**args)).to(s.device)
        self.model.amp_dtype = amp_dtype
        self.optimizer = make_optimizer(self.model, s.lr, s.weight_decay, s.optimizer)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if use_compile:
            self.model.net.compile(**use_compile)

    def train(self):
        self.model.train()
        x0, y = batches(self.step)
        self.update(self.model(x0, self.model.drop_labels(y)).mean(), s.grad_clip or math.inf)
        update_ema(self.ema, self.model, self.step, s.ema_decay)

    def sample(self, y, w, sampler):
        return self.model.sample(y, w, s.seed, sampler=sampler, steps=s.steps, interval=s.interval)


class Diffusers(Side):
    """diffusers' UNet2DModel with the widths, blocks, attention and conditioning of our U-Net."""

    def __init__(self):
        super().__init__()
        try:
            import diffusers
            from diffusers.training_utils import EMAModel
        except ImportError:
            raise UserError("--peer=diffusers needs `pip install '.[bench]'`") from None
        check(s.arch == "unet" and s.ch % 128 == 0, "diffusers has 32 groups in every norm: use ch=128 or 256, no cnn")
        side, inputs = size // s.patch, channels * s.patch**2  # the pixel unshuffle is done around it
        at = [side // 2**k in s.attn_resolutions for k in range(len(s.ch_mult))]
        self.model = diffusers.UNet2DModel(
            sample_size=side,
            in_channels=inputs,
            out_channels=inputs,
            dropout=s.dropout,
            layers_per_block=s.num_res_blocks,
            block_out_channels=tuple(s.ch * m for m in s.ch_mult),
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in at],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(at)],
            attention_head_dim=64,
            attn_norm_num_groups=32,
            num_class_embeds=K + 1,
            resnet_time_scale_shift="scale_shift",
            freq_shift=1,
        ).to(s.device)
        self.net = torch.compile(self.model, **use_compile) if use_compile else self.model
        betas = dict(num_train_timesteps=s.timesteps, beta_start=s.beta_start, beta_end=s.beta_end)
        self.schedulers = {
            "ddpm": diffusers.DDPMScheduler(**betas),
            "ddim": diffusers.DDIMScheduler(**betas),
            "dpm++": diffusers.DPMSolverMultistepScheduler(**betas),
        }
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=s.lr)
        self.ema = EMAModel(self.model.parameters(), decay=s.ema_decay, use_ema_warmup=True)

    def predict(self, x, t, y):
        with autocast():
            out = self.net(F.pixel_unshuffle(x, s.patch), t, class_labels=y).sample
        return F.pixel_shuffle(out, s.patch).float()

    def train(self):
        self.model.train()
        x0, y = batches(self.step)
        y = torch.where(torch.rand(s.batch_size, device=s.device) < s.p_uncond, K, y)
        noise = torch.randn_like(x0)
        t = torch.randint(s.timesteps, (s.batch_size,), device=s.device)
        xt = self.schedulers["ddpm"].add_noise(x0, noise, t)
        self.update(F.mse_loss(self.predict(xt, t, y), noise))
        self.ema.step(self.model.parameters())

    @torch.no_grad()
    def sample(self, y, w, sampler):
        self.model.eval()
        scheduler, y = self.schedulers[sampler], y.to(s.device)
        scheduler.set_timesteps(s.steps)
        x = torch.randn(len(y), channels, size, size, device=s.device)
        for t in scheduler.timesteps:
            if w == 0:
                out = self.predict(x, t, y)
            else:
                both = self.predict(torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, K)])).chunk(2)
                out = (1 + w) * both[0] - w * both[1]
            x = scheduler.step(out, t, x).prev_sample
        return x


class Lucidrains(Side):
    """denoising-diffusion-pytorch's classifier-free-guidance U-Net, small: dim 32, multiples 1, 2, 4, our p_uncond."""

    def __init__(self):
        super().__init__()
        try:
            from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
            from ema_pytorch import EMA
        except ImportError:
            raise UserError("--peer=lucidrains needs `pip install '.[bench]'`") from None
        self.model = Unet(dim=32, dim_mults=(1, 2, 4), num_classes=K, channels=channels, cond_drop_prob=s.p_uncond)
        self.diffusion = GaussianDiffusion(self.model, image_size=size).to(s.device)
        self.ddim = GaussianDiffusion(self.model, image_size=size, sampling_timesteps=s.steps).to(s.device)
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10)
        if use_compile:
            self.model.forward = torch.compile(self.model.forward, **use_compile)

    def train(self):
        x0, y = batches(self.step)
        with autocast():
            loss = self.diffusion((x0 + 1) / 2, classes=y)
        self.update(loss)
        self.ema.update()

    def sample(self, y, w, sampler):
        with autocast():
            return self.ddim.sample(y.to(s.device), cond_scale=1 + w) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# what is measured


def print_rows(title, seconds, images):
    """A line per side: images/s, milliseconds, and its time over ours."""
    for name, t in seconds.items():
        ratio = "" if name == "nanoDDPM" else f"   {t / seconds['nanoDDPM']:.2f}x our time"
        print(f"{title:<34} {name:<10} {images / t:9.2f} images/s {1e3 * t:10.1f} ms{ratio}", flush=True)


def bench_train():
    seconds = medians({name: side.train for name, side in sides.items()})
    print_rows(f"training step, batch {s.batch_size}", seconds, s.batch_size)


def bench_sample():
    y = torch.arange(s.num_samples) % K
    for sampler in s.samplers.split(","):
        for w in (0.0, s.w):
            able = {name: side for name, side in sides.items() if name != "lucidrains" or (sampler == "ddim" and w)}
            seconds = medians({name: (lambda side=side: side.sample(y, w, sampler)) for name, side in able.items()})
            print_rows(f"{sampler}, {s.steps} steps, w={w:g}", seconds, s.num_samples)


# ---------------------------------------------------------------------------------------------------------------------
PARTS, PEERS = dict(train=bench_train, sample=bench_sample), dict(diffusers=Diffusers, lucidrains=Lucidrains)
check_choice("peer", s.peer, ("", *PEERS))
for part in s.what.split(","):
    check_choice("what", part, tuple(PARTS))
for sampler in s.samplers.split(","):
    check_choice("samplers", sampler, SAMPLERS)
check(s.steps and s.num_samples, "steps and num_samples must be above 0")
s.device, amp_dtype, use_compile = setup_device(s.device, s.dtype, s.use_compile)

# Random images of the size of the data set.
size = s.image_size or {"fashion_mnist": 28, "flowers102": 64}.get(s.dataset, 32)
channels, K = 1 if s.dataset == "fashion_mnist" else 3, 102 if s.dataset == "flowers102" else 10
torch.manual_seed(s.seed)
images, labels = torch.randint(256, (1000, size, size, channels), dtype=torch.uint8).numpy(), np.arange(1000) % K
batches = Batches(images, labels, s.batch_size, s.seed, s.hflip, s.crop, device=s.device)
sides = {"nanoDDPM": Ours(use_compile)}
if use_compile and s.device.startswith("cuda"):  # whether channels-last convolutions pay on this GPU
    sides["NHWC"] = Ours(setup_device(s.device, s.dtype, "channels_last")[2])
if s.peer:
    sides[s.peer] = PEERS[s.peer]()
sizes = [f"{name} {sum(p.numel() for p in side.model.parameters()) / 1e6:.2f}M" for name, side in sides.items()]
driver = f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if s.device.startswith("cuda") else ""
print(machine(s.device) + driver)
print(
    f"{s.device}, {amp_dtype or torch.float32}, {'compiled' if use_compile else 'eager'}; "
    f"parameters: {', '.join(sizes)}; medians of {s.rounds}",
    flush=True,
)
for part in s.what.split(","):
    PARTS[part]()
