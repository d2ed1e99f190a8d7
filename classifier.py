"""A multi-layer perceptron from scratch, and the question that it answers: do synthetic pictures help?

python classifier.py                               four arms, five seeds, on CIFAR-10 and out/synthetic
python classifier.py --arms=real --seeds=1         one classifier, without synthetic pictures
python classifier.py --n_real=1000                 the comparison where only 1,000 real pictures are at hand
python classifier.py --sweep=True                  accuracy by amount of real and of synthetic pictures
python classifier.py --bench=True                  training speed beside the same network in torch.nn

Layers, loss and optimisers are written out, forward and backward; torch serves as an array library, autograd is off,
and `import classifier` gives them. Every arm of the comparison gets the same initial weights (for a seed), the same
number of updates and the same validation pictures, which choose the update to stop at; the test pictures are used once.
"""

import argparse
import math
import os
import pickle
import statistics
import time

import numpy as np
import torch

from configurator import ConfigError, configure
from data import Batches, DataError, load, read_json, save_json
from ddpm import DDPMError, choose_device, learning_rate, make_generator, save_checkpoint, to_float

# ---------------------------------------------------------------------------------------------------------------------
# data
dataset = "cifar10"  # fashion_mnist, flowers102, shapes, or a folder with train/ and test/
data_dir = "data"
classes = ""  # "cat,frog" keeps a subset; default all
image_size = 0  # 0: the data set's own
val_fraction = 0.1  # share of the training split that chooses when to stop: the same pictures as in train.py
out_dir = "out"  # results go here
synthetic_dir = ""  # shards of augment.py; default out_dir/synthetic
n_real = 0  # real training pictures, the same number of each class; 0: all
n_synthetic = 0  # synthetic ones; 0: all
# the comparison
arms = "real,real+synthetic,synthetic,real+real"  # real+real: as many pictures an epoch as real+synthetic, none new
seeds = 5  # runs of each arm
seed = 0  # the first of them
sweep = False  # True: a table over sweep_real and sweep_ratio in place of the arms
sweep_real = (1000, 5000, 45000)  # numbers of real pictures
sweep_ratio = (0.1, 0.5, 1, 2, 5)  # synthetic pictures for each real one
bench = False  # True: time a training step beside torch.nn's, and do nothing else
# the network and its training
hidden = (2048, 1024)  # units of each hidden layer
gray = False  # True: one luminance in place of three colours (1024 inputs for 32x32 pictures)
dropout = 0.2  # of hidden units
hflip = True  # mirror half the pictures
shift = 2  # move each picture by up to so many pixels
optimizer = "adamw"  # sgd: with momentum 0.9
batch_size = 256
max_iters = 8000  # updates, the same for every arm
lr = 1e-3  # after warm-up; falls to min_lr along a cosine
min_lr = 0.0
warmup_iters = 200
weight_decay = 0.05  # decoupled: each update takes away lr x weight_decay of a weight
eval_interval = 400  # updates between validations
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # of the matrix products: float32, bfloat16
# ---------------------------------------------------------------------------------------------------------------------
# layers: forward keeps what backward needs; backward takes dloss/doutput and returns dloss/dinput


class Linear:
    """y = x W + b: x (B, n_in) -> y (B, n_out). backward adds nothing up: it overwrites dW and db.

    W (n_in, n_out), b (n_out) and their gradients may be views of larger tensors; the products are made in `dtype`.
    """

    def __init__(self, W, b, dW, db, dtype=torch.float32, first=False):
        self.W, self.b, self.dW, self.db, self.dtype, self.first = W, b, dW, db, dtype, first

    def forward(self, x, training=False):
        self.x, self.w = x.to(self.dtype), self.W.to(self.dtype)
        return torch.addmm(self.b.to(self.dtype), self.x, self.w)

    def backward(self, dy):
        """dW = x^T dy, db = sum over the batch of dy, dx = dy W^T; the first layer's dx is no one's, and is None."""
        if self.dW.dtype == self.dtype:
            torch.mm(self.x.T, dy, out=self.dW)
        else:
            self.dW.copy_(self.x.T @ dy)
        self.db.copy_(dy.sum(0))
        return None if self.first else dy @ self.w.T


class ReLU:
    """y = max(x, 0); its derivative at 0 is 0."""

    def forward(self, x, training=False):
        self.y = x.clamp(min=0)
        return self.y

    def backward(self, dy):
        return dy * (self.y > 0)


class Dropout:
    """While training, zeroes each value with probability p and scales the others by 1 / (1 - p); else nothing.

    A coin is one random byte, so p is rounded to a multiple of 1/256: a tenth of the time of a float for each value.
    """

    def __init__(self, p, generator=None):
        self.cut, self.generator, self.mask = round(256 * p), generator, None

    def forward(self, x, training=False):
        self.mask = None
        if not training or self.cut == 0:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        coins = words.random_(-(2**63), None, generator=self.generator).view(torch.uint8)[: x.numel()].view(x.shape)
        self.mask = (coins >= self.cut).to(x.dtype).mul_(256 / (256 - self.cut))
        return x * self.mask

    def backward(self, dy):
        return dy if self.mask is None else dy * self.mask


class SoftmaxCrossEntropy:
    """The mean over the batch of -log softmax(logits)[y]: logits (B, K) of any size without overflow, y (B,) labels."""

    def forward(self, logits, y):
        z = logits - logits.amax(dim=1, keepdim=True)
        self.log_p, self.y = z - z.exp().sum(dim=1, keepdim=True).log(), y[:, None]
        return -self.log_p.gather(1, self.y).mean()

    def backward(self):
        """dloss/dlogits = (softmax(logits) - onehot(y)) / B."""
        d = self.log_p.exp()
        d.scatter_add_(1, self.y, torch.full_like(d[:, :1], -1))
        return d / len(d)


class MLP:
    """Linear, ReLU, Dropout, …, Linear: x (B, sizes[0]) -> logits (B, sizes[-1]).

    All weights lie in one vector `params`, their gradients in `grads`, which the optimiser walks through and a copy of
    which is a checkpoint; the first `n_decayed` are matrices, the rest biases. W is drawn from N(0, 2 / n_in)
    (He et al. 2015, eq. 10) with the seed, alike on all devices; biases start at 0.
    """

    def __init__(self, sizes, dropout=0.0, seed=0, device="cpu", dtype=torch.float32, param_dtype=torch.float32):
        pairs = list(zip(sizes, sizes[1:]))
        self.n_decayed = sum(a * b for a, b in pairs)
        self.params = torch.zeros(self.n_decayed + sum(sizes[1:]), dtype=param_dtype)
        generator, at = make_generator(seed), 0
        for a, b in pairs:
            self.params[at : at + a * b].normal_(0, math.sqrt(2 / a), generator=generator)
            at += a * b
        self.params = self.params.to(device)
        self.grads = torch.zeros_like(self.params)
        matrices, biases = [a * b for a, b in pairs], list(sizes[1:])
        views = [v.split(matrices + biases) for v in (self.params, self.grads)]
        noise, self.layers = make_generator(seed, 1, device), []
        for i, pair in enumerate(pairs):
            W, dW = (v[i].view(pair) for v in views)
            b, db = (v[len(pairs) + i] for v in views)
            self.layers += [Linear(W, b, dW, db, dtype, first=i == 0), ReLU(), Dropout(dropout, noise)]
        del self.layers[-2:]  # the last layer puts out logits

    def forward(self, x, training=False):
        for layer in self.layers:
            x = layer.forward(x, training)
        return x.to(self.params.dtype)

    def backward(self, d):
        """Fills `grads` from dloss/dlogits (B, K)."""
        d = d.to(self.layers[0].dtype)
        for layer in reversed(self.layers):
            d = layer.backward(d)


# ---------------------------------------------------------------------------------------------------------------------
# optimisers, with decoupled weight decay (Loshchilov and Hutter 2019)


class SGD:
    """v = momentum v + g; w = w - lr v."""

    def __init__(self, model, weight_decay=0.0, momentum=0.9):
        self.v, self.momentum, self.weight_decay, self.model = (
            torch.zeros_like(model.grads),
            momentum,
            weight_decay,
            model,
        )
        self.blocks = in_blocks(model.params, model.grads, self.v)

    def step(self, lr):
        decay(self.model, lr * self.weight_decay)
        for w, g, v in self.blocks:
            v.mul_(self.momentum).add_(g)
            w.sub_(v, alpha=lr)


class AdamW:
    """Kingma and Ba 2015, algorithm 1: w = w - lr m_hat / (sqrt(v_hat) + eps), the hats undoing the start at zero."""

    def __init__(self, model, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8):
        self.m, self.v, self.updates = torch.zeros_like(model.grads), torch.zeros_like(model.grads), 0
        self.beta1, self.beta2, self.eps, self.weight_decay, self.model = beta1, beta2, eps, weight_decay, model
        self.blocks = in_blocks(model.params, model.grads, self.m, self.v)

    def step(self, lr):
        self.updates += 1
        decay(self.model, lr * self.weight_decay)
        c1, c2 = 1 - self.beta1**self.updates, math.sqrt(1 - self.beta2**self.updates)
        for w, g, m, v in self.blocks:
            m.lerp_(g, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            w.addcdiv_(m, v.sqrt().add_(self.eps * c2), value=-lr * c2 / c1)


def in_blocks(*vectors):
    """Vectors cut alike into pieces that a CPU's cache holds, so that all of an update's passes find them there."""
    return list(zip(*(v.split(2**18 if v.device.type == "cpu" else len(v)) for v in vectors)))


def decay(model, share):
    if share:
        model.params[: model.n_decayed].mul_(1 - share)


OPTIMIZERS = {"sgd": SGD, "adamw": AdamW}


# ---------------------------------------------------------------------------------------------------------------------
# training one classifier


def inputs(images, gray):
    """float (B, C, H, W) in [-1, 1] -> (B, n_in) of about unit variance; gray takes the luminance (ITU-R BT.601)."""
    if gray and images.shape[1] == 3:
        images = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    return 2 * images.movedim(1, -1).flatten(1)  # the memory order of pictures at rest: no copy


@torch.no_grad()
def predict(model, images, gray, device):
    """The most likely class of each picture: (N, H, W, C) uint8 -> (N,) on the CPU."""
    found = []
    for start in range(0, len(images), 1000):
        x = inputs(to_float(torch.tensor(images[start : start + 1000]).to(device)), gray)
        found.append(model.forward(x).argmax(1).cpu())
    return torch.cat(found)


@torch.no_grad()
def train(images, labels, val_images, val_labels, K, seed, settings):
    """Trains an MLP on uint8 pictures; returns it with the weights of its best validation, and {step, val, seconds}.

    settings: a dict of this script's keys from `hidden` to `dtype`, with device and dtype settled.
    """
    s, start = argparse.Namespace(**settings), time.time()
    n_in = math.prod(images.shape[1:3]) * (1 if s.gray else images.shape[3])
    model = MLP((n_in, *s.hidden, K), s.dropout, seed, s.device, s.dtype)
    loss, optimiser = SoftmaxCrossEntropy(), OPTIMIZERS[s.optimizer](model, s.weight_decay)
    batches = Batches(images, labels, s.batch_size, seed, s.hflip, 1.0, s.shift, s.device)
    best, params = {"val": -1.0}, model.params.clone()
    for step in range(s.max_iters):
        x0, y = batches(step)
        loss.forward(model.forward(inputs(x0, s.gray), training=True), y)
        model.backward(loss.backward())
        optimiser.step(learning_rate(step, s.max_iters, s.lr, s.min_lr, s.warmup_iters))
        if (step + 1) % s.eval_interval == 0 or step + 1 == s.max_iters:
            if not bool(model.params.isfinite().all()):
                raise ConfigError(f"the weights are not finite by update {step + 1}: lower lr={s.lr:g}")
            right = predict(model, val_images, s.gray, s.device) == torch.from_numpy(val_labels)
            if (val := right.float().mean().item()) > best["val"]:
                best = {"step": step + 1, "val": val}
                params.copy_(model.params)
    model.params.copy_(params)
    return model, best | {"seconds": time.time() - start}


def save_classifier(path, model, names, shape, gray):
    """Writes what load_classifier needs: the weights, their sizes, class names and the pictures' shape (C, H, W)."""
    sizes = [layer.W.shape[0] for layer in model.layers if isinstance(layer, Linear)] + [len(names)]
    save_checkpoint(path, dict(params=model.params.cpu(), sizes=sizes, names=list(names), shape=list(shape), gray=gray))


def load_classifier(path, names, shape, device="cpu"):
    """Returns a function of x0 (B, C, H, W) in [-1, 1] -> softmax probabilities (B, K), of a saved classifier.

    Raises DDPMError when there is none, or it is for other classes or pictures.
    """
    if not os.path.exists(path):
        raise DDPMError(f"no classifier {path}: make one with `python classifier.py --arms=real --seeds=1`")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        model = MLP(saved["sizes"], device=device)
        model.params.copy_(saved["params"])
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as e:
        raise DDPMError(f"classifier {path} is damaged ({type(e).__name__})") from None
    if saved["names"] != list(names) or saved["shape"] != list(shape):
        raise DDPMError(
            f"classifier {path} is for {saved['names']} at {saved['shape']}, not {list(names)} at {list(shape)}"
        )
    return lambda x0: model.forward(inputs(x0, saved["gray"])).softmax(1)


# ---------------------------------------------------------------------------------------------------------------------
# statistics


def t_quantile(df):
    """The 97.5% point of Student's t with df degrees of freedom: bisection over Simpson's rule for its integral."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    low, high, n = 0.0, 13.0, 1000  # df = 1 has 12.7
    for _ in range(40):
        t = (low + high) / 2
        density = [scale * (1 + (t * i / n) ** 2 / df) ** (-(df + 1) / 2) for i in range(n + 1)]
        area = (density[0] + density[-1] + 4 * sum(density[1::2]) + 2 * sum(density[2:-1:2])) * t / n / 3
        low, high = (t, high) if area < 0.475 else (low, t)
    return low


def interval(values):
    """Mean, standard error, and half the width of the mean's 95% interval (Student's t); nan from one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, error, error * t_quantile(len(values) - 1)


def balanced(labels, n, seed):
    """n places in labels (N,), as many of each class as there can be, drawn with the seed; 0 is all of them."""
    if n == 0 or n >= len(labels):
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # how many of its class came before, in this order
    for k in np.unique(labels):
        mine = order[labels[order] == k]
        turn[mine] = np.arange(len(mine))
    return order[np.argsort(turn[order], kind="stable")][:n]


# ---------------------------------------------------------------------------------------------------------------------
# the comparison


ARMS = ("real", "real+synthetic", "synthetic", "real+real")


def arm_pictures(arm, real, synthetic, n_real, n_synthetic, seed):
    """(images, labels) of an arm, from pairs of the same; real+real repeats real ones where others are synthetic."""
    mine, added = balanced(real[1], n_real, seed), balanced(synthetic[1], n_synthetic, seed)
    parts = {"real": [(real, mine)], "synthetic": [(synthetic, added)]}
    parts["real+synthetic"] = parts["real"] + parts["synthetic"]
    parts["real+real"] = [(real, mine), (real, np.resize(mine, len(added)))]
    return [np.concatenate([pair[i][places] for pair, places in parts[arm]]) for i in range(2)]


def percent(matrix):
    """Counts (K, K), a row per true class, as percents of the row."""
    return 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def confusion_text(matrix, names):
    """Percents (K, K) as a table: a row per true class, a column per predicted one."""
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{name[:5]:>6}" for name in names)]
    return "\n".join(
        lines + [f"{name:>{width}}" + "".join(f"{v:6.0f}" for v in row) for name, row in zip(names, matrix)]
    )


def confusion_picture(matrices, names, cell=28):
    """Percents (K, K) by title as one PIL picture, side by side: rows are true classes, columns predicted ones."""
    from PIL import Image, ImageDraw

    K, margin, top = len(names), 8 + 7 * max(map(len, names)), 44
    sheet = Image.new("RGB", (len(matrices) * (margin + K * cell + 12), top + K * cell + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for m, (title, matrix) in enumerate(matrices.items()):
        left = m * (margin + K * cell + 12) + margin
        draw.text((left, 6), title, fill="black")
        for i, name in enumerate(names):
            draw.text((left - 6, top + i * cell + cell // 2), name, fill="black", anchor="rm")
            draw.text((left + i * cell + cell // 2, top - 8), name[:4], fill="black", anchor="mm")
            for j, value in enumerate(matrix[i]):
                x, y, shade = left + j * cell, top + i * cell, (min(value, 100) / 100) ** 0.6
                colour = [round(255 + shade * (c - 255)) for c in ((31, 90, 160) if i == j else (190, 50, 30))]
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=tuple(colour))
                ink = "white" if shade > 0.55 else "black"
                draw.text((x + cell // 2 - 1, y + cell // 2), f"{value:.0f}", fill=ink, anchor="mm")
    return sheet


def difference(runs, base, of=lambda run: run["test"]):
    """interval() of the paired differences, in points of a percent."""
    return interval([100 * (of(a) - of(b)) for a, b in zip(runs, base)])


def span(mean, half):
    return f"{mean:+.2f} points" + (f", 95% interval [{mean - half:+.2f}, {mean + half:+.2f}]" if half == half else "")


def verdict(runs, names):
    """The closing paragraph, from the numbers of {arm: its runs, one per seed, in the same order}."""
    lines, base = [], runs["real"]
    recall = lambda k: lambda run: run["confusion"][k][k] / max(1, sum(run["confusion"][k]))  # noqa: E731
    if "real+synthetic" in runs:
        mine = runs["real+synthetic"]
        mean, _, half = difference(mine, base)
        if half != half:
            word = "one seed cannot tell whether that is chance"
        elif abs(mean) <= half:
            word = "the interval includes zero: no effect was shown"
        else:
            word = f"the interval excludes zero: the synthetic pictures {'helped' if mean > 0 else 'hurt'}"
        lines.append(f"With synthetic pictures the test accuracy changes by {span(mean, half)}; {word}.")
        changes = [(*difference(mine, base, recall(k)), name) for k, name in enumerate(names)]
        sure = sorted((m, name) for m, _, h, name in changes if abs(m) > h)
        for word, found in (("up", sure[::-1]), ("down", sure)):
            listed = [f"{name} {m:+.1f}" for m, name in found if (m > 0) == (word == "up")]
            lines.append(f"Classes surely {word} (interval of their own without zero): {', '.join(listed) or 'none'}.")
    if "real+real" in runs:
        mean, _, half = difference(runs["real+real"], base)
        lines.append(f"The control, as many pictures an epoch but none of them new: {span(mean, half)}.")
        if "real+synthetic" in runs:
            mean, _, half = difference(runs["real+synthetic"], runs["real+real"])
            lines.append(f"Synthetic pictures against that control: {span(mean, half)}.")
    if "synthetic" in runs:
        mean, _, half = difference(runs["synthetic"], base)
        lines.append(f"Synthetic pictures alone, in place of the real ones: {span(mean, half)}.")
    lines.append(
        f"{len(base)} seeds: the intervals cover initial weights, order, augmentation and choice of pictures, not the "
        "choice of test pictures, nor another training of the generator."
    )
    return " ".join(lines)


def compare(run, arms, seeds):
    """Runs every arm with every seed and prints what came out; returns {arm: runs}."""
    runs = {arm: [] for arm in arms}
    for k in range(seed, seed + seeds):
        for arm in arms:
            runs[arm].append(run(arm, k, n_real, n_synthetic))
    matrices = {arm: percent(np.sum([r["confusion"] for r in runs[arm]], axis=0)) for arm in arms}
    for arm in arms:
        print(f"\n{arm}: percent of each true class (row) that was taken for each class (column), {seeds} seeds")
        print(confusion_text(matrices[arm], names))
    print(f"\n{'arm':<16}{'pictures':>9}{'updates':>9}  test accuracy     minus real (paired)")
    titles = {}
    for arm in arms:
        mean, error, _ = interval([100 * r["test"] for r in runs[arm]])
        titles[f"{arm}: {mean:.2f} +- {error:.2f} %"] = matrices[arm]
        gap = span(*difference(runs[arm], runs["real"])[::2]) if arm != "real" and "real" in runs else ""
        print(f"{arm:<16}{runs[arm][0]['pictures']:>9}{max_iters:>9}  {mean:6.2f} ± {error:.2f} %  {gap}")
    picture = os.path.join(out_dir, "confusion.png")
    confusion_picture(titles, names).save(picture)
    print(f"wrote {picture}")
    return runs


def sweep_table(run, n_train, n_available):
    """Accuracy by number of real pictures and of synthetic ones for each of them; returns the runs."""
    every = []
    for n in sweep_real:
        n, base = min(n, n_train), None
        for ratio in (0, *sweep_ratio):
            if (count := round(ratio * n)) > n_available:
                print(
                    f"{n:6d} real + {count:6d} synthetic ({ratio:g}x): only {n_available} synthetic pictures are there"
                )
                continue
            arm = "real+synthetic" if ratio else "real"
            cell = [run(arm, k, n, count) for k in range(seed, seed + seeds)]
            every += cell
            base = base or cell
            mean, error, _ = interval([100 * r["test"] for r in cell])
            gap = f"; minus none: {span(*difference(cell, base)[::2])}" if ratio else ""
            print(f"{n:6d} real + {count:6d} synthetic ({ratio:g}x): {mean:6.2f} ± {error:.2f} %{gap}")
    return every


def bench_step(settings, n_in, K):
    """Prints the time of an update beside torch.nn's with autograd: the same network, batch and threads, by turns."""
    from torch import nn

    device, B = settings["device"], settings["batch_size"]
    model = MLP((n_in, *hidden, K), dropout, 0, device, settings["dtype"])
    loss, optimiser = SoftmaxCrossEntropy(), OPTIMIZERS[optimizer](model, weight_decay)
    x, y = torch.randn(B, n_in, device=device), torch.randint(K, (B,), device=device)

    @torch.no_grad()
    def ours():
        loss.forward(model.forward(x, training=True), y)
        model.backward(loss.backward())
        optimiser.step(lr)

    def peer(fused):
        layers = []
        for a, b in zip((n_in, *hidden), hidden):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
        net = nn.Sequential(*layers, nn.Linear(hidden[-1], K)).to(device)
        kind, how = (torch.optim.SGD, {"momentum": 0.9}) if optimizer == "sgd" else (torch.optim.AdamW, {})
        theirs = kind(net.parameters(), lr=lr, weight_decay=weight_decay, fused=fused or None, **how)

        def step():
            theirs.zero_grad()
            with torch.autocast(device.split(":")[0], settings["dtype"], settings["dtype"] != torch.float32):
                value = nn.functional.cross_entropy(net(x), y)
            value.backward()
            theirs.step()

        return step

    steps = {"classifier.py": ours, "torch.nn": peer(False), "torch.nn, fused optimiser": peer(True)}
    times = {name: [] for name in steps}
    for turn in range(33):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device != "cpu":
                torch.accelerator.synchronize()
            if turn >= 3:
                times[name].append(time.perf_counter() - start)
    mine = statistics.median(times["classifier.py"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:<26} {B / middle:9.0f} pictures/s, {middle / mine:.2f}x the time")


if __name__ == "__main__":
    config, given = configure(globals())
    for key, least in dict(
        seeds=1, batch_size=1, max_iters=1, eval_interval=1, n_real=0, n_synthetic=0, shift=0
    ).items():
        if config[key] < least:
            raise ConfigError(f"{key}: {config[key]} must be at least {least}")
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer: {optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
    if not (0 < val_fraction < 1 and 0 <= dropout < 1):
        raise ConfigError(f"val_fraction={val_fraction} must be in (0, 1) and dropout={dropout} in [0, 1)")
    arms = arms.split(",")
    for arm in arms:
        if arm not in ARMS:
            raise ConfigError(f"arms: {arm!r} is not one of {', '.join(ARMS)}")
    device, amp_dtype, _ = choose_device(device, dtype, False)
    settings = {key: config[key] for key in ("hidden", "gray", "dropout", "hflip", "shift", "optimizer", "batch_size")}
    settings |= {
        key: config[key] for key in ("max_iters", "lr", "min_lr", "warmup_iters", "weight_decay", "eval_interval")
    }
    settings |= {"device": device, "dtype": amp_dtype or torch.float32}

    images, labels, names = load(dataset, "train", data_dir, image_size, classes)
    test_images, test_labels, test_names = load(dataset, "test", data_dir, image_size, classes)
    if labels is None or test_labels is None or names != test_names:
        raise DataError(f"{dataset}: a classifier needs labels and a test split with the same classes")
    n_train = len(images) - int(len(images) * val_fraction)  # as in train.py: the last ones are for validation
    real = images[:n_train], labels[:n_train]
    synthetic, manifest = [a[:0] for a in real], None
    folder = synthetic_dir or os.path.join(out_dir, "synthetic")
    K, n_in = len(names), math.prod(images.shape[1:3]) * (1 if gray else images.shape[3])
    if bench:
        bench_step(settings, n_in, K)
        raise SystemExit
    if sweep or arms != ["real"]:
        if not os.path.isdir(folder):
            raise DataError(
                f"no synthetic pictures in {folder}: make them with `python augment.py`, or use --arms=real"
            )
        *synthetic, _ = load(folder, classes=",".join(names))
        if synthetic[1] is None or synthetic[0].shape[1:] != images.shape[1:]:
            raise DataError(f"{folder}: pictures {synthetic[0].shape[1:]}, wanted {images.shape[1:]}, with labels")
        if os.path.exists(f"{folder}/manifest.json"):
            manifest = read_json(f"{folder}/manifest.json")
            seen = manifest["trained_on"]
            apart = (seen.get("dataset"), seen.get("classes")) == (dataset, classes)
            if not (apart and seen["val_fraction"] >= val_fraction):
                print(f"note: the generator ({seen}) may have been trained on pictures that choose the update here")
    os.makedirs(out_dir, exist_ok=True)
    print(
        f"{n_train} real and {len(synthetic[0])} synthetic training pictures, {len(images) - n_train} for validation, "
        f"{len(test_images)} for the test; {n_in}-{'-'.join(map(str, hidden))}-{K} on {device}, "
        f"{max_iters} updates of {batch_size}"
    )

    def run(arm, k, n_real, n_synthetic):
        """Trains one classifier, and uses the test pictures once."""
        pictures = arm_pictures(arm, real, synthetic, n_real, n_synthetic, k)
        if len(pictures[0]) == 0:
            raise DataError(f"arm {arm}: no pictures")
        model, result = train(*pictures, images[n_train:], labels[n_train:], K, k, settings)
        guess = predict(model, test_images, gray, device).numpy()
        confusion = np.bincount(test_labels * K + guess, minlength=K * K).reshape(K, K)
        test = float((guess == test_labels).mean())
        print(
            f"seed {k} {arm:<15} {len(pictures[0]):6d} pictures: validation {result['val']:.2%} "
            f"at update {result['step']}, test {test:.2%}, {result['seconds']:.0f} s",
            flush=True,
        )
        if arm == "real" and k == seed and n_real == 0:
            save_classifier(os.path.join(out_dir, "classifier.pt"), model, names, model_shape, gray)
        about = dict(arm=arm, seed=k, n_real=n_real, n_synthetic=n_synthetic, pictures=len(pictures[0]), test=test)
        return about | result | {"confusion": confusion.tolist()}

    model_shape = (images.shape[3], *images.shape[1:3])
    content = {
        "config": config,
        "synthetic": manifest and {k: manifest[k] for k in ("settings", "trained_on", "counts")},
    }
    if sweep:
        content["runs"] = sweep_table(run, n_train, len(synthetic[0]))
        result = os.path.join(out_dir, "classifier_sweep.json")
    else:
        runs = compare(run, arms, seeds)
        content["runs"] = [r for arm in arms for r in runs[arm]]
        content["verdict"] = verdict(runs, names) if "real" in runs and len(arms) > 1 else ""
        print(f"\n{content['verdict']}")
        result = os.path.join(out_dir, "classifier.json")
    save_json(result, content)
    print(f"wrote {result}")
