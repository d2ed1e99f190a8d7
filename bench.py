"""Speed, side by side in one run: medians of rounds that go A B A B …, and their ratios.

python bench.py                                         training step and sampling of the default recipe
python bench.py config/cifar_small.py                   of any other
python bench.py --peer=diffusers --batch_size=16        beside the same network in diffusers (extra `bench`)
python bench.py --peer=lucidrains --batch_size=16       beside denoising-diffusion-pytorch, a small U-Net
python bench.py --what=augment --peer=diffusers         augment.py end to end: start-up and disk included
python bench.py --what=scaling                          how time and memory grow with batch, pictures and steps
python bench.py --what=profile                          where the time of a training step goes
python bench.py config/cifar_small.py --what=learn --peer=lucidrains   what each has learned after so many minutes

Peers run as their documentation shows. diffusers: UNet2DModel with our weights copied into it, AdamW, clipping,
EMAModel; its schedulers' loop, both branches of the guidance in one batch. lucidrains: GaussianDiffusion with Adam and
EMA. All sides get the same batch, dtype and compiler. `learn` trains each on the real data set with its own network,
schedule and learning rate, and draws from all of them with our sampler, unguided: what differs is what was learned.
Networks that are in learn_dir are kept, so that sides can be run one at a time and drawn with other steps.
"""
# ruff: noqa: F821 (batch_size, ch, lr and so on are train.py's settings, taken over below)

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F

from configurator import HERE, ConfigError, configure, progress, settings_of
from data import Batches, load, training_count, write_shards
from ddpm import (
    DDPM,
    EMA,
    Attention,
    DDPMConfig,
    ResBlock,
    choose_device,
    evaluating,
    learning_rate,
    one_of,
    save_checkpoint,
    to_uint8,
)

globals().update(settings_of(os.path.join(HERE, "train.py")))  # so that any of its recipes can be timed
# ---------------------------------------------------------------------------------------------------------------------
peer = ""  # diffusers or lucidrains
what = "train,sample"  # also augment, scaling, profile; or learn, alone
rounds = 5  # of each measurement, after one to warm up
samplers = "ddpm,ddim,dpm++"
steps = 10  # of each sampling
num_samples = 16  # pictures in one
w = 0.3  # guidance
interval = ()  # our guidance interval (see sample.py); peers guide at every step
minutes = 60.0  # of learning, each
learn_dir = "out-bench"  # what was learned: for each side the network and a folder of what it draws
# ---------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())


def wait():
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device.startswith("mps"):
        torch.mps.synchronize()


def medians(functions):
    """Median seconds of each of {name: function}, by turns, after one round to warm up."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def autocast():
    return torch.autocast(device.split(":")[0], amp_dtype, enabled=amp_dtype is not None)


def make_batches():
    """(batches, class names, sides and channels of a picture): the training split where it is learned, else random."""
    if what == "learn":
        images, labels, names = load(dataset, "train", data_dir, image_size, classes)
        if labels is None:
            raise ConfigError(f"learn: {dataset} has no labels")
        n = training_count(len(images), val_fraction)
        images, labels = images[:n], labels[:n]
    else:
        side = image_size or {"fashion_mnist": 28, "flowers102": 64}.get(dataset, 32)
        names = [str(k) for k in range(102 if dataset == "flowers102" else 10)]
        pictures = (1000, side, side, 1 if dataset == "fashion_mnist" else 3)
        images, labels = torch.randint(256, pictures, dtype=torch.uint8).numpy(), np.arange(1000) % len(names)
    return Batches(images, labels, batch_size, seed, hflip, crop, 0, device), names, *images.shape[2:]


def drawn_by(forward, **schedule):
    """Our samplers around a peer's network: forward(x, t, y)."""
    least = dict(ch=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())  # of a network that is not used
    model = DDPM(DDPMConfig(size, channels, K, names, **least, **schedule)).to(device)
    model.net.forward, model.amp_dtype = forward, amp_dtype
    return model


class Ours:
    """train.py's step (gathering, flips and label dropout included) and DDPM's samplers."""

    def __init__(self):
        shared = {key: config[key] for key in DDPMConfig.__dataclass_fields__ if key in config}
        shared |= dict(image_size=size, channels=channels, num_classes=K, class_names=names)
        self.model = DDPM(DDPMConfig(**shared)).to(device)
        self.model.amp_dtype = amp_dtype
        how = dict(lr=lr, weight_decay=weight_decay, fused=not device.startswith("mps"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **how)
        self.ema, self.step = EMA(self.model, ema_decay), 0
        if compiles:
            self.model.net.compile(dynamic=False)

    def train(self):
        self.model.train()
        x0, y = batches(self.step)
        self.model(x0, self.model.drop_labels(y)).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1

    def sample(self, y, w, sampler, steps):
        return self.model.sample(y, w, seed, None, sampler, steps, interval=interval)

    def lr_at(self, step, max_iters):
        return learning_rate(step, max_iters, lr, min_lr, warmup_iters)

    def average(self):
        self.model.load_state_dict(self.ema.state_dict()["shadow"])

    def drawn(self):
        return self.model


class Diffusers:
    """diffusers' UNet2DModel with the widths, blocks, attention, conditioning and weights of our U-Net."""

    def __init__(self, ours):
        try:
            import diffusers
            from diffusers.training_utils import EMAModel
        except ImportError:
            raise ConfigError("--peer=diffusers needs `pip install '.[bench]'`") from None
        self.lr, self.patch, self.step = lr, patch, 0
        self.schedule = dict(timesteps=timesteps, beta_start=beta_start, beta_end=beta_end)
        self.model = self.build(diffusers.UNet2DModel, ours.model)
        self.net = torch.compile(self.model, dynamic=False) if compiles else self.model
        betas = dict(num_train_timesteps=self.schedule["timesteps"])
        betas |= {key: self.schedule[key] for key in ("beta_start", "beta_end")}
        self.schedulers = {
            "ddpm": diffusers.DDPMScheduler(**betas),
            "ddim": diffusers.DDIMScheduler(**betas),
            "dpm++": diffusers.DPMSolverMultistepScheduler(**betas),
        }
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr)
        self.ema = EMAModel(self.model.parameters(), decay=ema_decay, use_ema_warmup=True)

    def build(self, UNet2DModel, ours):
        if arch != "unet" or ch % 128:
            raise ConfigError(
                "diffusers' UNet2DModel has 32 groups everywhere and no cnn: use arch=unet, ch=128 or 256"
            )
        side = size // patch  # it has no pixel-unshuffle stem: this is done around it
        at = [side // 2**k in attn_resolutions for k in range(len(ch_mult))]
        model = UNet2DModel(
            sample_size=side, in_channels=channels * patch**2, out_channels=channels * patch**2, dropout=dropout,
            layers_per_block=num_res_blocks, block_out_channels=tuple(ch * m for m in ch_mult), freq_shift=1,
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in at],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(at)],
            attention_head_dim=64, attn_norm_num_groups=32, num_class_embeds=K + 1,
            resnet_time_scale_shift="scale_shift",
        ).to(device)  # fmt: skip
        for p in ours.parameters():  # those that start at zero as well, so that outputs can be compared
            torch.nn.init.normal_(p, std=0.02)
        copy_weights(ours.net, model)
        self.net, x, y = model, *batches(0)
        t = torch.randint(timesteps, (batch_size,), device=device)
        with torch.no_grad(), evaluating(ours), evaluating(model):
            mine, theirs = ours.network(x, t, y), self.predict(x, t, y)
        print(f"the same network: outputs differ by {((mine - theirs).norm() / mine.norm()).item():.1e} of their norm")
        return model

    def predict(self, x, t, y):
        with autocast():
            out = self.net(F.pixel_unshuffle(x, self.patch), t, class_labels=y).sample
        return F.pixel_shuffle(out, self.patch).float()

    def train(self):
        self.model.train()
        x0, y = batches(self.step)
        y = torch.where(torch.rand(batch_size, device=device) < p_uncond, K, y)
        noise, t = torch.randn_like(x0), torch.randint(self.schedule["timesteps"], (batch_size,), device=device)
        xt = self.schedulers["ddpm"].add_noise(x0, noise, t)
        F.mse_loss(self.predict(xt, t, y), noise).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        self.step += 1

    @torch.no_grad()
    def sample(self, y, w, sampler, steps):
        self.model.eval()
        scheduler, y = self.schedulers[sampler], y.to(device)
        scheduler.set_timesteps(steps)
        x = torch.randn(len(y), *shape, device=device)
        for t in scheduler.timesteps:
            if w == 0:
                out = self.predict(x, t, y)
            else:
                both = self.predict(torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, K)])).chunk(2)
                out = (1 + w) * both[0] - w * both[1]
            x = scheduler.step(out, t, x).prev_sample
        return x


class DiffusersOwn(Diffusers):
    """What a user would train: diffusers' layout for CIFAR-10 (ddpm-cifar10-32) with 40 channels in place of 128."""

    def build(self, UNet2DModel, ours):
        if size % 8:
            raise ConfigError(f"diffusers' U-Net halves pictures three times: {size}x{size} does not go")
        self.lr, self.patch, self.schedule = 1e-4, 1, dict(timesteps=1000, beta_start=1e-4, beta_end=0.02)
        return UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, num_class_embeds=K + 1, freq_shift=1,
            block_out_channels=(40, 80, 80, 80), norm_num_groups=8, layers_per_block=2, dropout=0.1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        ).to(device)  # fmt: skip

    def lr_at(self, step, max_iters):
        return learning_rate(step, max_iters, self.lr, 0, 500)

    def average(self):
        self.ema.copy_to(self.model.parameters())

    def drawn(self):
        return drawn_by(self.predict, **self.schedule)


def copy_weights(net, theirs):
    """Our UNet's weights into diffusers' UNet2DModel, layer by layer."""
    from diffusers.models.attention_processor import Attention as TheirAttention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    def of(kind, *roots):
        return [m for root in roots for m in root.modules() if isinstance(m, kind)]

    ours, peers = (net.down, net.up, net.mid1, net.mid2), (theirs.down_blocks, theirs.up_blocks, theirs.mid_block)
    pairs = [(net.stem, theirs.conv_in), (net.norm, theirs.conv_norm_out), (net.out, theirs.conv_out)]
    pairs += [(net.condition.time[0], theirs.time_embedding.linear_1)]
    pairs += [(net.condition.time[2], theirs.time_embedding.linear_2)]
    pairs += [(net.condition.label, theirs.class_embedding)]
    pairs += list(
        zip([m for m in net.down if isinstance(m, torch.nn.Conv2d)], [d.conv for d in of(Downsample2D, *peers)])
    )
    pairs += list(zip([m for m in net.up if not isinstance(m, ResBlock)], [u.conv for u in of(Upsample2D, *peers)]))
    for a, b in zip(of(ResBlock, *ours), of(ResnetBlock2D, *peers)):
        pairs += [(a.norm, b.norm1), (a.conv1, b.conv1), (a.film.norm, b.norm2), (a.film.affine, b.time_emb_proj)]
        pairs += [(a.conv2, b.conv2)] + [(a.skip, b.conv_shortcut)] * (b.conv_shortcut is not None)
    with torch.no_grad():
        for a, b in zip(of(Attention, *ours), of(TheirAttention, *peers)):
            pairs += [(a.norm, b.group_norm)]
            for name in ("weight", "bias"):
                parts = getattr(a.qkv, name).flatten(1) if name == "weight" else getattr(a.qkv, name)
                for layer, part in zip((b.to_q, b.to_k, b.to_v), parts.chunk(3)):
                    getattr(layer, name).copy_(part)
                getattr(b.to_out[0], name).copy_(getattr(a.proj, name).flatten(1) if name == "weight" else a.proj.bias)
    for a, b in pairs:
        b.load_state_dict(a.state_dict())


class Lucidrains:
    """denoising-diffusion-pytorch's classifier-free-guidance U-Net, small: dim 32, multiples 1, 2, 4, our p_uncond."""

    def __init__(self, ours):
        try:
            from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
            from ema_pytorch import EMA as TheirEMA
        except ImportError:
            raise ConfigError("--peer=lucidrains needs `pip install '.[bench]'`") from None
        self.model = Unet(dim=32, dim_mults=(1, 2, 4), num_classes=K, channels=channels, cond_drop_prob=p_uncond)
        self.diffusion = GaussianDiffusion(self.model, image_size=size).to(device)
        self.quick = GaussianDiffusion(self.model, image_size=size, sampling_timesteps=steps).to(device)
        self.optimizer, self.step = torch.optim.Adam(self.diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99)), 0
        self.ema = TheirEMA(self.diffusion, beta=0.995, update_every=10)
        if compiles:  # what is called in training and, by another method of the model's, in sampling
            self.model.forward = torch.compile(self.model.forward, dynamic=False)

    def train(self):
        x0, y = batches(self.step)
        with autocast():
            loss = self.diffusion((x0 + 1) / 2, classes=y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.step += 1

    def sample(self, y, w, sampler, steps):
        with autocast():
            return self.quick.sample(y.to(device), cond_scale=1 + w) * 2 - 1

    def lr_at(self, step, max_iters):
        return 1e-4

    def average(self):
        self.model.load_state_dict(self.ema.ema_model.model.state_dict())

    def drawn(self):
        return drawn_by(lambda x, t, y: self.model(x, t, y, cond_drop_prob=0.0), timesteps=1000, schedule="cosine")


def peak_rates():
    """FLOP/s of a large matrix product, and of 3x3 convolutions of this recipe's width, forward and backward."""
    kind, side = amp_dtype or torch.float32, size // patch
    a = torch.randn(2048, 2048, device=device, dtype=kind)
    x = torch.randn(batch_size, ch, side, side, device=device, dtype=kind, requires_grad=True)
    weight = torch.randn(ch, ch, 3, 3, device=device, dtype=kind, requires_grad=True)
    out = torch.randn_like(x)
    convolve = lambda: torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), out)  # noqa: E731
    seconds = medians({"matrix": lambda: a @ a, "conv": convolve})
    return 2 * 2048**3 / seconds["matrix"], 3 * 2 * 9 * x.numel() * ch / seconds["conv"]


def flops(model):
    """Of the network, one picture, forward."""
    from torch.utils.flop_counter import FlopCounterMode

    zeros = torch.zeros(1, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.net(torch.zeros(1, *shape, device=device), zeros, zeros)
    return counter.get_total_flops()


def memory():
    """Peak of tensors on the GPU, or of this process, in MB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def table(title, seconds, pictures):
    """A line for each side: pictures/s, milliseconds, and its time over ours."""
    for name, s in seconds.items():
        ratio = "" if name == "nanoDDPM" else f"   {s / seconds['nanoDDPM']:.2f}x our time"
        print(f"{title:<34} {name:<10} {pictures / s:9.2f} pictures/s {1e3 * s:10.1f} ms{ratio}", flush=True)


def bench_train(sides):
    seconds = medians({name: side.train for name, side in sides.items()})
    table(f"training step, batch {batch_size}", seconds, batch_size)
    matrix, conv = peak_rates()
    rate = 3 * flops(sides["nanoDDPM"].model) * batch_size / seconds["nanoDDPM"]
    print(
        f"our step does {rate / 1e9:.0f} GFLOP/s: {rate / matrix:.0%} of the {matrix / 1e9:.0f} that a matrix product "
        f"reaches here, {rate / conv:.0%} of the {conv / 1e9:.0f} of 3x3 convolutions, forward and backward"
    )


def bench_sample(sides):
    y = torch.arange(num_samples) % K
    for sampler in samplers.split(","):
        for weight in (0.0, w):
            able = {name: s for name, s in sides.items() if name != "lucidrains" or (sampler == "ddim" and weight)}
            seconds = medians({name: (lambda s=s: s.sample(y, weight, sampler, steps)) for name, s in able.items()})
            table(f"{sampler}, {steps} steps, w={weight:g}", seconds, num_samples)


def bench_augment(sides):
    """num_samples pictures of K classes as .npy: ours a process of its own with all that it does, theirs the loop."""
    if num_samples < K:
        raise ConfigError(f"num_samples: {num_samples} is less than a picture of each of {K} classes")
    with tempfile.TemporaryDirectory() as folder:
        model = sides["nanoDDPM"].model
        weights = {name: p.cpu() for name, p in model.state_dict().items()}
        save_checkpoint(f"{folder}/ckpt.pt", dict(model_args=asdict(model.config), ema=dict(shadow=weights), step=0))
        flags = dict(out_dir=folder, w=w, interval=",".join(map(str, interval)), steps=steps, overwrite=True)
        flags |= dict(per_class=num_samples // K, batch_size=batch_size, device=device, dtype=dtype)
        command = [sys.executable, os.path.join(HERE, "augment.py"), f"--use_compile={compiles}"]
        command += [f"--{key}={value}" for key, value in flags.items()]

        def loop(side):
            labels = torch.arange(num_samples // K * K) % K
            parts = [to_uint8(side.sample(y, w, "dpm++", steps)).cpu() for y in labels.split(batch_size)]
            np.save(f"{folder}/theirs.npy", torch.cat(parts).numpy())

        functions = {name: (lambda s=s: loop(s)) for name, s in sides.items()}
        functions["nanoDDPM"] = lambda: subprocess.run(command, check=True, capture_output=True)
        table(f"augment, dpm++, {steps} steps, w={w:g}", medians(functions), num_samples // K * K)


def bench_scaling(sides):
    """Time and memory of our step by batch, and of drawing by pictures (batch_size at once) and by steps."""
    ours, b = sides["nanoDDPM"], batch_size

    def measure(title, pictures, function):
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        table(title, medians({"nanoDDPM": function}), pictures)
        print(f"{'':<34} peak memory {memory():.0f} MB", flush=True)

    draw = ours.model.draw_pictures
    for n, k in ((b, steps), (4 * b, steps), (16 * b, steps), (b, 2 * steps), (b, 4 * steps)):
        how = dict(sampler="dpm++", steps=k)
        measure(f"{n} pictures, {k} steps", n, lambda n=n: list(draw(torch.arange(n) % K, range(n), b, **how)))
    for n in (max(1, b // 4), max(1, b // 2), b, 2 * b):
        batches.batch_size = n
        measure(f"training step, batch {n}", n, ours.train)
    batches.batch_size = b


def bench_profile(sides):
    """Where the time of our training step goes, by operation."""
    from torch.profiler import ProfilerActivity, profile

    ours, on_gpu = sides["nanoDDPM"], device.startswith("cuda")
    ours.train()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        ours.train()
        wait()
    averages = profiler.key_averages()
    print(averages.table(sort_by=f"self_{'cuda' if on_gpu else 'cpu'}_time_total", row_limit=25))
    if on_gpu:
        waits = sum(e.count for e in averages if e.key == "cudaStreamSynchronize")
        print(f"the step makes the host wait for the GPU {waits} times")


def bench_learn(sides):
    """Each side learns for so many minutes, unless its averages are there (NAME.pt), and draws num_samples pictures."""
    loose = ("out_dir", "init_from", "device", "data_dir", "max_iters", "epochs")  # do not matter here
    loose += ("eval_interval", "eval_pictures", "log_interval", "sample_interval")
    keys = (*settings_of(os.path.join(HERE, "train.py")), "minutes")
    settings = {key: config[key] for key in keys if key not in loose}
    os.makedirs(learn_dir, exist_ok=True)
    folders = {name: os.path.join(learn_dir, f"{name}-{steps}-steps") for name in sides}
    for name, side in sides.items():
        path = os.path.join(learn_dir, f"{name}.pt")
        if os.path.exists(path):
            kept = torch.load(path, map_location=device, weights_only=True)
            were = kept.get("settings", {})
            if other := [key for key in settings if were.get(key) != settings[key]]:
                change = f"{other[0]} was {were.get(other[0])}, not {settings[other[0]]}"
                raise ConfigError(f"{path}: {change}: remove it or give another --learn_dir")
            print(f"{path} is there and is kept")
            side.model.load_state_dict(kept["model"])
        else:
            side.step, start, share = 0, time.time(), 1e-9
            while share < 1:
                for group in side.optimizer.param_groups:
                    group["lr"] = side.lr_at(side.step, side.step / share)
                side.train()
                share = (time.time() - start) / (60 * minutes)
                progress(name, min(share, 1), start)
            print(f"{name}: {side.step} steps, {side.step * batch_size} pictures in {minutes:g} minutes", flush=True)
            side.average()
            torch.save(dict(settings=settings, model=side.model.state_dict()), path)
        side.model.eval()  # a peer's drawn() switches the network that is not used, not this one
        y = torch.arange(num_samples) % K
        pictures = side.drawn().draw_pictures(y, range(num_samples), 100, seed=seed, sampler="dpm++", steps=steps)
        write_shards(folders[name], torch.cat(list(pictures)).numpy(), y.numpy(), names, shard_size=num_samples)
    print(f"compare: python evaluate.py --dataset={dataset} with --samples={' and --samples='.join(folders.values())}")


PARTS = dict(
    train=bench_train,
    sample=bench_sample,
    augment=bench_augment,
    scaling=bench_scaling,
    profile=bench_profile,
    learn=bench_learn,
)
PEERS = {"diffusers": DiffusersOwn if what == "learn" else Diffusers, "lucidrains": Lucidrains}
one_of("peer", peer, ("", *PEERS))
for part in what.split(","):
    one_of("what", part, tuple(PARTS))
if "learn" in what and what != "learn":
    raise ConfigError(f"what: {what}: learn has peers of its own and stands alone, --what=learn")
if "augment" in what and peer == "lucidrains":
    raise ConfigError("augment: lucidrains has no loop of dpm++ to compare with, diffusers has")
device, amp_dtype, compiles = choose_device(device, dtype, use_compile)
torch.manual_seed(seed)
batches, names, size, channels = make_batches()
shape, K = (channels, size, size), len(names)
sides = {"nanoDDPM": Ours()}
if peer:
    sides[peer] = PEERS[peer](sides["nanoDDPM"])
counts = [f"{name} {sum(p.numel() for p in s.model.parameters()) / 1e6:.2f}M weights" for name, s in sides.items()]
how = f"{str(amp_dtype or torch.float32)[6:]}, {'compiled' if compiles else 'eager'}, torch {torch.__version__}"
print(f"{device}, {how}, {torch.get_num_threads()} threads; {', '.join(counts)}; medians of {rounds}", flush=True)
if compiles and what != "learn":
    for name, side in sides.items():
        start = time.perf_counter()
        side.train()
        wait()
        print(f"{name}: first step, compiler included, {time.perf_counter() - start:.1f} s")
for part in what.split(","):
    PARTS[part](sides)
print(f"peak memory {memory():.0f} MB")
