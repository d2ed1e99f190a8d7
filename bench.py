"""Speed, side by side in one run: medians of rounds that go A B A B …, and their ratios.

python bench.py                                         training step and sampling of the default recipe
python bench.py config/cifar_small.py                   of any other
python bench.py --peer=diffusers --batch_size=16        against the same layout in diffusers (extra `bench`)
python bench.py --peer=lucidrains --batch_size=16       against denoising-diffusion-pytorch, a small U-Net
python bench.py --what=profile                          where the time of a training step goes
python bench.py --what=gpu                              a report on this GPU to paste: ten minutes or so
python bench.py config/cifar_small.py --what=learn --peer=lucidrains   what each has learned after so many minutes

Peers are used as in their documentation. diffusers: UNet2DModel, AdamW, clipping, EMAModel, its schedulers' loop with
both branches of the guidance in one batch. lucidrains: GaussianDiffusion with Adam and EMA. All sides get the same
batch, dtype and compiler. `learn` trains each on the real data set with its own network, schedule and learning rate,
and samples all of them with our sampler, unguided. Networks that are in learn_dir already are not trained again, so
that sides can be trained one at a time and sampled with other settings.
"""

import gc
import os
import platform
import statistics
import sys
import time
import warnings
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from configurator import configure, defaults_of, dtype_name, progress, setup_device
from data import Batches, balanced, load, training_count, write_shards
from ddpm import DDPM, EMA, DDPMConfig, UserError, atomic_write, check_choice, learning_rate, make_optimizer

# ---------------------------------------------------------------------------------------------------------------------
peer = ""  # diffusers or lucidrains
what = "train,sample"  # also profile; or learn or gpu, alone
rounds = 5  # of each measurement, after one to warm up
samplers = "ddpm,ddim,dpm++"
steps = 10  # of each sampling
num_samples = 16  # images in one
w = 0.3  # guidance
interval = ()  # our guidance interval (see sample.py); peers guide at every step
minutes = 60.0  # of learning, each
learn_dir = "out-bench"  # for each side the network that it learned and a folder of its samples
# ---------------------------------------------------------------------------------------------------------------------
RECIPE = defaults_of("train.py")  # a recipe is whatever train.py could be given
settings = RECIPE | {key: globals()[key] for key in defaults_of("bench.py")} | {"__doc__": __doc__}
config, given = configure(settings)
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
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peak_memory():
    """Bytes: of the GPU's tensors since reset_peak_memory_stats, else of the process."""
    if s.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def host_waits(function):
    """How often a call makes the host wait for the GPU; None without one."""
    if not s.device.startswith("cuda"):
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught)


def autocast():
    return torch.autocast(s.device.split(":")[0], amp_dtype, enabled=amp_dtype is not None)


def make_batches():
    """(batches, class names, image size, channels): the training split for `learn`, else random images."""
    if s.what == "learn":
        images, labels, names = load(s.dataset, "train", s.data_dir, s.image_size, s.classes)
        if labels is None:
            raise UserError(f"learn: {s.dataset} has no labels")
        chosen = balanced(labels[: training_count(len(images), s.val_fraction)], s.n_real, 0)
        images, labels = images[chosen], labels[chosen]
    else:
        side = s.image_size or {"fashion_mnist": 28, "flowers102": 64}.get(s.dataset, 32)
        names = [str(k) for k in range(102 if s.dataset == "flowers102" else 10)]
        size = (1000, side, side, 1 if s.dataset == "fashion_mnist" else 3)
        images, labels = torch.randint(256, size, dtype=torch.uint8).numpy(), np.arange(1000) % len(names)
    return Batches(images, labels, s.batch_size, s.seed, s.hflip, s.crop, 0, s.device), names, *images.shape[2:]


# ---------------------------------------------------------------------------------------------------------------------
# the sides: train() is one step, sample() draws images; learn also asks for lr_at(), average() and sampler()


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
    """train.py's step (gathering, flips and label dropout included; no grad_accum), and our samplers.

    inductor: options of torch.compile; None: eager.
    """

    def __init__(self, inductor):
        super().__init__()
        args = {key: config[key] for key in DDPMConfig.__dataclass_fields__ if key in config}
        args |= dict(image_size=size, channels=channels, num_classes=K, class_names=names)
        self.model = DDPM(DDPMConfig(**args)).to(s.device)
        self.model.amp_dtype = amp_dtype
        self.optimizer, self.ema = make_optimizer(self.model, s.lr, s.weight_decay), EMA(self.model, s.ema_decay)
        if inductor is not None:
            self.model.compile_network(inductor)

    def train(self):
        self.model.train()
        x0, y = batches(self.step)
        self.update(self.model(x0, self.model.drop_labels(y)).mean(), s.grad_clip or float("inf"))
        self.ema.update()

    def sample(self, y, w, sampler):
        return self.model.sample(y, w, s.seed, None, sampler, s.steps, interval=s.interval)

    def lr_at(self, step, max_iters):
        return learning_rate(step, max_iters, s.lr, s.min_lr, s.warmup_iters)

    def average(self):
        self.model.load_state_dict(self.ema.shadow)

    def sampler(self):
        return self.model


def our_samplers(forward, **schedule):
    """A DDPM around a peer's network: forward(x, t, y)."""
    smallest = dict(ch=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())  # of the network that is replaced
    model = DDPM(DDPMConfig(size, channels, K, names, **smallest, **schedule)).to(s.device)
    model.net.forward, model.amp_dtype = forward, amp_dtype
    return model


class Diffusers(Side):
    """diffusers' UNet2DModel with the widths, blocks, attention and conditioning of our U-Net."""

    def __init__(self):
        super().__init__()
        try:
            import diffusers
            from diffusers.training_utils import EMAModel
        except ImportError:
            raise UserError("--peer=diffusers needs `pip install '.[bench]'`") from None
        self.lr, self.patch = s.lr, s.patch
        self.schedule = dict(timesteps=s.timesteps, beta_start=s.beta_start, beta_end=s.beta_end)
        self.model = diffusers.UNet2DModel(**self.layout()).to(s.device)
        self.net = torch.compile(self.model, dynamic=False) if use_compile else self.model
        betas = {key: self.schedule[key] for key in ("beta_start", "beta_end")}
        betas["num_train_timesteps"] = self.schedule["timesteps"]
        self.schedulers = {
            "ddpm": diffusers.DDPMScheduler(**betas),
            "ddim": diffusers.DDIMScheduler(**betas),
            "dpm++": diffusers.DPMSolverMultistepScheduler(**betas),
        }
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr)
        self.ema = EMAModel(self.model.parameters(), decay=s.ema_decay, use_ema_warmup=True)

    def layout(self):
        if s.arch != "unet" or s.ch % 128:
            raise UserError("diffusers has 32 groups in every norm and no cnn: use arch=unet and ch=128 or 256")
        side, inputs = size // s.patch, channels * s.patch**2  # the pixel unshuffle is done around it
        at = [side // 2**k in s.attn_resolutions for k in range(len(s.ch_mult))]
        return dict(
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
        )

    def predict(self, x, t, y):
        with autocast():
            out = self.net(F.pixel_unshuffle(x, self.patch), t, class_labels=y).sample
        return F.pixel_shuffle(out, self.patch).float()

    def train(self):
        self.model.train()
        x0, y = batches(self.step)
        y = torch.where(torch.rand(s.batch_size, device=s.device) < s.p_uncond, K, y)
        noise = torch.randn_like(x0)
        t = torch.randint(self.schedule["timesteps"], (s.batch_size,), device=s.device)
        xt = self.schedulers["ddpm"].add_noise(x0, noise, t)
        self.update(F.mse_loss(self.predict(xt, t, y), noise))
        self.ema.step(self.model.parameters())

    @torch.no_grad()
    def sample(self, y, w, sampler):
        self.model.eval()
        scheduler, y = self.schedulers[sampler], y.to(s.device)
        scheduler.set_timesteps(s.steps)
        x = torch.randn(len(y), *shape, device=s.device)
        for t in scheduler.timesteps:
            if w == 0:
                out = self.predict(x, t, y)
            else:
                both = self.predict(torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, K)])).chunk(2)
                out = (1 + w) * both[0] - w * both[1]
            x = scheduler.step(out, t, x).prev_sample
        return x


class DiffusersToLearn(Diffusers):
    """What a user would train: the layout of diffusers' ddpm-cifar10-32 with 40 channels instead of 128."""

    def layout(self):
        if size % 8:
            raise UserError(f"diffusers' U-Net halves images three times: {size}x{size} is not divisible by 8")
        self.lr, self.patch, self.schedule = 1e-4, 1, dict(timesteps=1000, beta_start=1e-4, beta_end=0.02)
        return dict(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            dropout=0.1,
            layers_per_block=2,
            block_out_channels=(40, 80, 80, 80),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            num_class_embeds=K + 1,
            freq_shift=1,
        )

    def lr_at(self, step, max_iters):
        return learning_rate(step, max_iters, self.lr, 0, 500)

    def average(self):
        self.ema.copy_to(self.model.parameters())

    def sampler(self):
        return our_samplers(self.predict, **self.schedule)


class Lucidrains(Side):
    """denoising-diffusion-pytorch's classifier-free-guidance U-Net, small: dim 32, multiples 1, 2, 4, our p_uncond."""

    def __init__(self):
        super().__init__()
        try:
            from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
            from ema_pytorch import EMA as TheirEMA
        except ImportError:
            raise UserError("--peer=lucidrains needs `pip install '.[bench]'`") from None
        self.model = Unet(dim=32, dim_mults=(1, 2, 4), num_classes=K, channels=channels, cond_drop_prob=s.p_uncond)
        self.diffusion = GaussianDiffusion(self.model, image_size=size).to(s.device)
        self.ddim = GaussianDiffusion(self.model, image_size=size, sampling_timesteps=s.steps).to(s.device)
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
        self.ema = TheirEMA(self.diffusion, beta=0.995, update_every=10)
        if use_compile:
            self.model.forward = torch.compile(self.model.forward, dynamic=False)

    def train(self):
        x0, y = batches(self.step)
        with autocast():
            loss = self.diffusion((x0 + 1) / 2, classes=y)
        self.update(loss)
        self.ema.update()

    def sample(self, y, w, sampler):
        with autocast():
            return self.ddim.sample(y.to(s.device), cond_scale=1 + w) * 2 - 1

    def lr_at(self, step, max_iters):
        return 1e-4

    def average(self):
        self.model.load_state_dict(self.ema.ema_model.model.state_dict())

    def sampler(self):
        return our_samplers(lambda x, t, y: self.model(x, t, y, cond_drop_prob=0.0), timesteps=1000, schedule="cosine")


# ---------------------------------------------------------------------------------------------------------------------
# what is measured


def print_rows(title, seconds, images):
    """A line per side: images/s, milliseconds, and its time over ours."""
    for name, t in seconds.items():
        ratio = "" if name == "nanoDDPM" else f"   {t / seconds['nanoDDPM']:.2f}x our time"
        print(f"{title:<34} {name:<10} {images / t:9.2f} images/s {1e3 * t:10.1f} ms{ratio}", flush=True)


def matmul_and_conv_rates():
    """FLOP/s of a large matrix product, and of 3x3 convolutions of this recipe's width, forward and backward."""
    dtype, side = amp_dtype or torch.float32, size // s.patch
    n = 8192 if s.device.startswith("cuda") else 2048
    a = torch.randn(n, n, device=s.device, dtype=dtype)
    x = torch.randn(s.batch_size, s.ch, side, side, device=s.device, dtype=dtype, requires_grad=True)
    weight = torch.randn(s.ch, s.ch, 3, 3, device=s.device, dtype=dtype, requires_grad=True)
    out = torch.randn_like(x)
    convolve = lambda: torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), out)  # noqa: E731
    seconds = medians({"matmul": lambda: a @ a, "conv": convolve})
    return 2 * n**3 / seconds["matmul"], 3 * 2 * 9 * x.numel() * s.ch / seconds["conv"]


def flops(model):
    """FLOPs of the network for one image, forward."""
    from torch.utils.flop_counter import FlopCounterMode

    zeros = torch.zeros(1, dtype=torch.long, device=s.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.net(torch.zeros(1, *shape, device=s.device), zeros, zeros)
    return counter.get_total_flops()


def bench_train(sides):
    seconds = medians({name: side.train for name, side in sides.items()})
    print_rows(f"training step, batch {s.batch_size}", seconds, s.batch_size)
    matmul, conv = matmul_and_conv_rates()
    rate = 3 * flops(sides["nanoDDPM"].model) * s.batch_size / seconds["nanoDDPM"]
    print(
        f"our step does {rate / 1e9:.0f} GFLOP/s: {rate / matmul:.0%} of the {matmul / 1e9:.0f} of a matrix product, "
        f"{rate / conv:.0%} of the {conv / 1e9:.0f} of 3x3 convolutions, forward and backward"
    )


def bench_sample(sides):
    y = torch.arange(s.num_samples) % K
    for sampler in s.samplers.split(","):
        for w in (0.0, s.w):
            able = {name: side for name, side in sides.items() if name != "lucidrains" or (sampler == "ddim" and w)}
            seconds = medians({name: (lambda side=side: side.sample(y, w, sampler)) for name, side in able.items()})
            print_rows(f"{sampler}, {s.steps} steps, w={w:g}", seconds, s.num_samples)


def bench_profile(sides):
    """Where the time of our training step goes, by operation."""
    from torch.profiler import ProfilerActivity, profile

    ours, on_gpu = sides["nanoDDPM"], s.device.startswith("cuda")
    ours.train()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        ours.train()
        synchronize()
    averages = profiler.key_averages()
    print(averages.table(sort_by=f"self_{'cuda' if on_gpu else 'cpu'}_time_total", row_limit=25))
    if on_gpu:
        print(f"the step makes the host wait for the GPU {host_waits(ours.train)} times")


def bench_learn(sides):
    """Trains each side for s.minutes, unless NAME.pt is there, and samples num_samples images from its average."""
    reports = ("out_dir", "init_from", "device", "data_dir", "max_iters", "epochs", "eval_interval", "eval_images")
    reports += ("log_interval", "sample_interval")  # do not change what is learned
    learned_with = {key: config[key] for key in (*RECIPE, "minutes") if key not in reports}
    os.makedirs(s.learn_dir, exist_ok=True)
    folders = {name: os.path.join(s.learn_dir, f"{name}-{s.steps}-steps") for name in sides}
    for name, side in sides.items():
        path = os.path.join(s.learn_dir, f"{name}.pt")
        if os.path.exists(path):
            kept = torch.load(path, map_location=s.device, weights_only=True)
            for key, value in learned_with.items():
                if (before := kept["settings"].get(key, RECIPE.get(key))) != value:
                    raise UserError(f"{path} was trained with {key}={before}, not {value}: use another --learn_dir")
            print(f"{path} is there and not trained again")
            side.model.load_state_dict(kept["model"])
        else:
            start, share = time.time(), 1e-9
            while share < 1:
                for group in side.optimizer.param_groups:
                    group["lr"] = side.lr_at(side.step, side.step / share)
                side.train()
                synchronize()
                share = (time.time() - start) / (60 * s.minutes)
                progress(name, min(share, 1), start)
            print(f"{name}: {side.step} steps, {side.step * s.batch_size} images in {s.minutes:g} minutes", flush=True)
            side.average()
            with atomic_write(path) as f:
                torch.save(dict(settings=learned_with, model=side.model.state_dict()), f)
        side.model.eval()  # a peer's network is not part of its sampler()
        y = torch.arange(s.num_samples) % K
        how = dict(seed=s.seed, sampler="dpm++", steps=s.steps)
        images = torch.cat(list(side.sampler().sample_batches(y, range(s.num_samples), 100, **how)))
        write_shards(folders[name], images.numpy(), y.numpy(), names, shard_size=s.num_samples)
    print(
        f"compare: python evaluate.py --dataset={s.dataset} with --samples={' and --samples='.join(folders.values())}"
    )


def describe_machine():
    lines = [f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    if s.device.startswith("cuda"):
        p = torch.cuda.get_device_properties(s.device)
        lines += [f"{p.name}, {p.total_memory / 1e9:.0f} GB, compute capability {p.major}.{p.minor}"]
        lines += [f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"]
    return "\n".join(lines)


def report_row(name, side, y, matmul):
    """What bench_gpu prints of a side."""
    start = time.time()
    side.train()
    synchronize()
    first, seconds = time.time() - start, medians({"": side.train})[""]
    share = 3 * flops(side.model) * s.batch_size / seconds / matmul if isinstance(side, Ours) else None
    row = [name, f"{first:.1f}", f"{1e3 * seconds:.2f}", f"{s.batch_size / seconds:.1f}"]
    row += [f"{share:.1%}" if share else "", f"{peak_memory() / 1e9:.2f}", host_waits(side.train)]
    for w in (0.0, 1.0):
        draw = partial(side.sample, y, w, "ddim")
        row += [f"{s.num_samples / medians({'': draw})['']:.1f}", host_waits(draw)][: 2 if w == 0 else 1]
    return row


def bench_gpu(sides):
    """A Markdown report: every side in turn, ours eager and compiled, diffusers if it is installed."""
    matmul, conv = matmul_and_conv_rates()
    print(describe_machine())
    rates = f"matrix product {matmul / 1e12:.4g}, 3x3 convolutions, forward and backward, {conv / 1e12:.4g}"
    print(f"TFLOP/s: {rates}\n")
    makers = {"nanoDDPM, eager": lambda: Ours(None)}
    if use_compile:
        makers["nanoDDPM, compiled"] = lambda: Ours({})
        makers["... channels last"] = lambda: Ours({"force_layout_optimization": True})
        makers["... combo kernels"] = lambda: Ours({"combo_kernels": True})
    if peer := s.peer or ("diffusers" if find_spec("diffusers") else ""):
        makers[peer] = PEERS[peer]
    y = torch.arange(s.num_samples) % K
    print(
        f"| training, batch {s.batch_size} | first step, s | ms | images/s | of matrix product | peak GB | host waits "
        f"| sampling {s.num_samples} images, ddim, {s.steps} steps: images/s | host waits | with guidance: images/s |"
    )
    print("| --- " * 10 + "|")
    for name, make in makers.items():
        gc.collect()
        if s.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        try:
            row = report_row(name, make(), y, matmul)
        except Exception as e:  # a side that fails, out of memory or not compiling, does not end the report
            row = [name, (str(e).strip() or type(e).__name__).splitlines()[0]]
        print(f"| {' | '.join(map(str, row))} |", flush=True)


PARTS = dict(train=bench_train, sample=bench_sample, profile=bench_profile, learn=bench_learn, gpu=bench_gpu)
PEERS = {"diffusers": DiffusersToLearn if s.what == "learn" else Diffusers, "lucidrains": Lucidrains}
check_choice("peer", s.peer, ("", *PEERS))
for part in s.what.split(","):
    check_choice("what", part, tuple(PARTS))
for alone in ("learn", "gpu"):
    if alone in s.what and s.what != alone:
        raise UserError(f"what={s.what}: {alone} stands alone")
if s.what == "gpu" and "num_samples" not in given:
    s.num_samples = 100
s.device, amp_dtype, use_compile = setup_device(s.device, s.dtype, s.use_compile)
torch.manual_seed(s.seed)
batches, names, size, channels = make_batches()
shape, K = (channels, size, size), len(names)
sides = {} if s.what == "gpu" else {"nanoDDPM": Ours({} if use_compile else None)}
if s.peer and sides:
    sides[s.peer] = PEERS[s.peer]()
counts = [f"{name} {sum(p.numel() for p in side.model.parameters()) / 1e6:.2f}M" for name, side in sides.items()]
how = f"{dtype_name(amp_dtype)}, {'compiled' if use_compile else 'eager'}, torch {torch.__version__}"
parameters = f"parameters: {', '.join(counts)}; " if counts else ""
print(f"{s.device}, {how}, {torch.get_num_threads()} threads; {parameters}medians of {s.rounds}", flush=True)
for part in s.what.split(","):
    PARTS[part](sides)
if s.what != "gpu":
    print(f"peak memory {peak_memory() / 1e6:.0f} MB")
