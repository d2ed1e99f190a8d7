"""A multi-layer perceptron from scratch, and the question that it answers: do synthetic pictures help?

python classifier.py                               four arms, five seeds, on CIFAR-10 and out/synthetic
python classifier.py --arms=real --seeds=1         one classifier, without synthetic pictures
python classifier.py --n_real=1000                 the comparison where only 1,000 real pictures are at hand
python classifier.py --amounts=1000,5000,45000     accuracy by amount of real and of synthetic pictures
python classifier.py --bench=True                  training speed beside the same network in torch.nn

Layers, loss and optimisers are written out, forward and backward; torch serves as an array library, autograd is off,
and `import classifier` gives them. Every arm of the comparison gets the same initial weights (for a seed), the same
number of updates and the same validation pictures, which choose the update to stop at; the test pictures are used once.
"""

import math
import os
import statistics
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from configurator import ConfigError, configure
from data import Batches, DataError, balanced, fingerprint, load, read_json, save_json, training_count
from ddpm import DDPMError, choose_device, learning_rate, make_generator, one_of, save_checkpoint, to_float

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
amounts = ()  # numbers of real pictures: a table over them and the ratios, in place of the arms
ratios = (0.1, 0.5, 1.0, 2.0, 5.0)  # of that table: synthetic pictures for each real one
bench = False  # True: time a training step beside torch.nn's, and do nothing else
# the network and its training
hidden = (1024, 512)  # units of each hidden layer
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
    """y = x W + b: x (B, n_in) -> y (B, n_out). backward writes the gradients into dW and db.

    W (n_in, n_out) is drawn from N(0, 2 / n_in) (He et al. 2015, eq. 10), b starts at 0; `dtype` is the products'.
    """

    def __init__(self, n_in, n_out, generator=None, dtype=torch.float32):
        self.W = torch.randn(n_in, n_out, generator=generator) * math.sqrt(2 / n_in)
        self.b, self.dtype, self.needs_dx = torch.zeros(n_out), dtype, True
        self.dW, self.db = torch.zeros_like(self.W), torch.zeros_like(self.b)

    def forward(self, x, training=False):
        self.x, self.W_cast = x.to(self.dtype), self.W.to(self.dtype)  # neither is a copy in float32
        return torch.addmm(self.b.to(self.dtype), self.x, self.W_cast)

    def backward(self, dy):
        """dW = x^T dy; db = dy summed over the batch; dx = dy W^T, or None where nobody needs it."""
        dy = dy.to(self.dtype)
        if self.dW.dtype == self.dtype:
            torch.mm(self.x.T, dy, out=self.dW)
        else:
            self.dW.copy_(self.x.T @ dy)
        self.db.copy_(dy.sum(0))
        return dy @ self.W_cast.T if self.needs_dx else None


class ReLU:
    """y = max(x, 0); its derivative at 0 is 0."""

    def forward(self, x, training=False):
        self.y = x.clamp(min=0)
        return self.y

    def backward(self, dy):
        return dy * (self.y > 0)


class Dropout:
    """While training, zeroes each value with probability p and scales the others by 1 / (1 - p); else nothing.

    A coin is one random byte, a fraction of the time of a float for each value: p is rounded to a multiple of 1/256.
    """

    def __init__(self, p, generator=None):
        self.cut, self.generator, self.mask = min(round(256 * p), 255), generator, None

    def forward(self, x, training=False):
        self.mask = None
        if not training or self.cut == 0:
            return x
        n, how = x.numel(), {"generator": self.generator, "device": x.device, "dtype": torch.int32}
        coins = torch.randint(-(2**31), 2**31, (-(-n // 4),), **how).view(torch.uint8)[:n].view(x.shape)
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
    """Linear, ReLU, Dropout, …, Linear: x (B, sizes[0]) -> logits (B, sizes[-1]). Drawn from the seed, on any device.

    All weights lie in one vector `params`, their gradients in `grads`, which the optimiser walks through and a copy of
    which is a checkpoint. `dtype` is that of the matrix products, except the last layer's.
    """

    def __init__(self, sizes, dropout=0.0, seed=0, device="cpu", dtype=None):
        generator, noise = make_generator(seed), make_generator(seed, 1, device)
        linears = [Linear(a, b, generator, dtype or torch.get_default_dtype()) for a, b in zip(sizes, sizes[1:])]
        linears[0].needs_dx, linears[-1].dtype = False, torch.get_default_dtype()
        tensors = [layer.W for layer in linears] + [layer.b for layer in linears]
        self.params = torch.cat([p.flatten() for p in tensors]).to(device)
        self.grads = torch.zeros_like(self.params)
        counts = [p.numel() for p in tensors]
        views = [[v.view(p.shape) for v, p in zip(flat.split(counts), tensors)] for flat in (self.params, self.grads)]
        for i, layer in enumerate(linears):
            (layer.W, layer.dW), (layer.b, layer.db) = ([v[j] for v in views] for j in (i, len(linears) + i))
        self.layers = [part for layer in linears for part in (layer, ReLU(), Dropout(dropout, noise))][:-2]

    def forward(self, x, training=False):
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def backward(self, d):
        """Fills `grads` from dloss/dlogits (B, K)."""
        for layer in reversed(self.layers):
            d = layer.backward(d)


# ---------------------------------------------------------------------------------------------------------------------
# optimisers, with decoupled weight decay (Loshchilov and Hutter 2019)


class SGD:
    """v = momentum v + g; w = w - lr v."""

    def __init__(self, model, weight_decay=0.0, momentum=0.9):
        self.weight_decay, self.momentum = weight_decay, momentum
        self.blocks = in_blocks(model.params, model.grads, torch.zeros_like(model.grads))

    def step(self, lr):
        for w, g, v in self.blocks:
            v.mul_(self.momentum).add_(g)
            w.mul_(1 - lr * self.weight_decay).sub_(v, alpha=lr)


class AdamW:
    """Kingma and Ba 2015, algorithm 1: w = w - lr m_hat / (sqrt(v_hat) + eps), the hats undoing the start at zero."""

    def __init__(self, model, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8):
        self.weight_decay, self.updates = weight_decay, 0
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        m, v = torch.zeros_like(model.grads), torch.zeros_like(model.grads)
        self.blocks = in_blocks(model.params, model.grads, m, v)

    def step(self, lr):
        self.updates += 1
        c1, c2 = 1 - self.beta1**self.updates, math.sqrt(1 - self.beta2**self.updates)
        for w, g, m, v in self.blocks:
            m.lerp_(g, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            w.mul_(1 - lr * self.weight_decay).addcdiv_(m, v.sqrt().add_(self.eps * c2), value=-lr * c2 / c1)


def in_blocks(*vectors):
    """Vectors cut alike into pieces that a CPU's cache holds, so that all of an update's passes find them there."""
    return list(zip(*(v.split(2**18 if v.device.type == "cpu" else len(v)) for v in vectors)))


OPTIMIZERS = {"sgd": SGD, "adamw": AdamW}


# ---------------------------------------------------------------------------------------------------------------------
# training one classifier


def inputs(images, gray):
    """float (B, C, H, W) in [-1, 1] -> (B, n_in) of about unit variance; gray takes the luminance (ITU-R BT.601)."""
    if gray and images.shape[1] == 3:
        images = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    return 2 * images.movedim(1, -1).flatten(1)  # the memory order of pictures at rest


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

    settings: a dict of this script's keys from `hidden` to `dtype`, device and dtype settled. Raises ConfigError when
    the weights do not stay finite.
    """
    s, start = SimpleNamespace(**settings), time.time()
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
    except Exception as e:
        raise DDPMError(f"classifier {path} is damaged ({type(e).__name__})") from None
    if saved["names"] != list(names) or saved["shape"] != list(shape):
        raise DDPMError(
            f"classifier {path} is for {saved['shape']}, {saved['names']}, not {list(shape)}, {list(names)}"
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
    """Mean, standard error, and half the width of the mean's 95% interval (Student's t); None from a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, error, error * t_quantile(len(values) - 1)


def difference(runs, base, of=lambda run: run["test"]):
    """Mean of the paired differences in points of a percent, and half its 95% interval."""
    mean, _, half = interval([100 * (of(a) - of(b)) for a, b in zip(runs, base)])
    return mean, half


def accuracy_text(runs):
    mean, error, _ = interval([100 * run["test"] for run in runs])
    return f"{mean:.2f}" + ("" if error is None else f" ± {error:.2f}") + " %"


def change_text(mean, half):
    return f"{mean:+.2f} points" + ("" if half is None else f", 95% interval [{mean - half:+.2f}, {mean + half:+.2f}]")


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
    panel = margin + max(K * cell, 7 * max(map(len, matrices))) + 12
    sheet = Image.new("RGB", (len(matrices) * panel, top + K * cell + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for m, (title, matrix) in enumerate(matrices.items()):
        left = m * panel + margin
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


def recall(k):
    """What share of class k's test pictures a run got right."""
    return lambda run: run["confusion"][k][k] / max(1, sum(run["confusion"][k]))


def verdict(runs, names):
    """The closing paragraph, from the numbers of {arm: its runs, a seed each, in the same order}."""
    base, text = runs["real"], []
    sentences = {
        "real+synthetic": "With synthetic pictures the test accuracy changes by",
        "real+real": "In the control, as many pictures an epoch but none of them new, it changes by",
        "synthetic": "With synthetic pictures in place of the real ones it changes by",
    }
    for arm, sentence in sentences.items():
        if arm in runs:
            text.append(f"{sentence} {change_text(*difference(runs[arm], base))}.")
    if "real+synthetic" in runs:
        mine, changes = runs["real+synthetic"], [difference(runs["real+synthetic"], base)]
        if "real+real" in runs:
            changes.append(difference(mine, runs["real+real"]))
            text.append(f"Against that control synthetic pictures make {change_text(*changes[1])}.")
        zero, what = " in both comparisons" * (len(changes) > 1), {1: "helped", -1: "hurt"}
        if changes[0][1] is None:
            text.append("One seed cannot tell whether that is chance.")
        elif all(mean > half for mean, half in changes) or all(mean < -half for mean, half in changes):
            text.append(
                f"The interval excludes zero{zero}: the synthetic pictures {what[1 if changes[0][0] > 0 else -1]}."
            )
        else:
            text.append(f"Zero is not outside the interval{zero}: no effect was shown.")
        by_class = {name: difference(mine, base, recall(k)) for k, name in enumerate(names)}
        for word, sign in (("gain", 1), ("lose", -1)) if len(base) > 1 else ():
            apart = {name: mean for name, (mean, half) in by_class.items() if sign * mean > half}
            listed = ", ".join(f"{name} {apart[name]:+.1f}" for name in sorted(apart, key=lambda n: -abs(apart[n])))
            text.append(f"Classes that {word}, at 95% each: {listed or 'none'}.")
    if len(base) > 1:
        text.append(
            f"{len(base)} seeds: the intervals cover initial weights, order, augmentation and choice of pictures, not "
            "the choice of test pictures, nor another training of the generator."
        )
    return " ".join(text)


def report(runs, names, out_dir):
    """Prints confusion matrices, accuracies and changes by class of {arm: its runs}, and writes confusion.png."""
    matrices = {arm: percent(np.sum([r["confusion"] for r in mine], axis=0)) for arm, mine in runs.items()}
    for arm, matrix in matrices.items():
        print(f"\n{arm}: percent of each true class (row) taken for each class (column), {len(runs[arm])} seeds")
        print(confusion_text(matrix, names))
    others = [arm for arm in runs if arm != "real" and "real" in runs]
    print(f"\n{'arm':<16} test accuracy    minus real, paired by seed")
    for arm, mine in runs.items():
        change = change_text(*difference(mine, runs["real"])) if arm in others else ""
        print(f"{arm:<16} {accuracy_text(mine):<16} {change}")
    for arm in others:
        print(f"\n{arm} minus real by class")
        for k, name in enumerate(names):
            print(f"{name:>16} {change_text(*difference(runs[arm], runs['real'], recall(k)))}")
    titles = {f"{arm}  {accuracy_text(runs[arm])}": matrix for arm, matrix in matrices.items()}
    confusion_picture(titles, names).save(os.path.join(out_dir, "confusion.png"))


def amounts_table(run, n_train, n_synthetic):
    """Prints accuracy by number of real pictures and of synthetic ones for each of them."""
    for n in dict.fromkeys(min(n, n_train) for n in amounts):
        base = None
        for ratio in (0, *ratios):
            count = round(ratio * n)
            title = f"{n:6d} real + {count:6d} synthetic ({ratio:g}x)"
            if count > n_synthetic or (ratio and count == 0):
                print(f"{title}: not run, there are {n_synthetic} synthetic pictures")
                continue
            cell = [run("real+synthetic" if ratio else "real", k, n, count) for k in range(seed, seed + seeds)]
            base = base or cell
            print(f"{title}: {accuracy_text(cell)}{f'; {change_text(*difference(cell, base))}' if ratio else ''}")


def bench_step(settings, n_in, K):
    """Prints the time of an update beside torch.nn's with autograd: the same network, batch and threads, by turns."""
    from torch import nn

    s = SimpleNamespace(**settings)
    model, loss = MLP((n_in, *s.hidden, K), s.dropout, 0, s.device, s.dtype), SoftmaxCrossEntropy()
    optimiser = OPTIMIZERS[s.optimizer](model, s.weight_decay)
    x, y = torch.randn(s.batch_size, n_in, device=s.device), torch.randint(K, (s.batch_size,), device=s.device)

    @torch.no_grad()
    def ours():
        loss.forward(model.forward(x, training=True), y)
        model.backward(loss.backward())
        optimiser.step(s.lr)

    def peer(fused):
        layers, widths = [], (n_in, *s.hidden)
        for a, b in zip(widths, s.hidden):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(s.dropout)]
        net = nn.Sequential(*layers, nn.Linear(widths[-1], K)).to(s.device)
        kind = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}[s.optimizer]
        theirs = kind(net.parameters(), lr=s.lr, weight_decay=s.weight_decay, fused=fused or None)

        def step():
            theirs.zero_grad()
            with torch.autocast(s.device.split(":")[0], s.dtype, enabled=s.dtype != torch.float32):
                value = nn.functional.cross_entropy(net(x), y)
            value.backward()
            theirs.step()

        return step

    steps = {"classifier.py": ours, "torch.nn": peer(fused=False), "torch.nn, fused optimiser": peer(fused=True)}
    times = {name: [] for name in steps}
    for _ in range(33):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if s.device.startswith("cuda"):
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds[3:]) for name, seconds in times.items()}
    for name, seconds in medians.items():
        print(
            f"{name:<26} {s.batch_size / seconds:9.0f} pictures/s, {seconds / medians['classifier.py']:.2f}x the time"
        )


# ---------------------------------------------------------------------------------------------------------------------
# the script


def check(config):
    """Raises ConfigError for a setting that cannot be used."""
    least = dict(seeds=1, batch_size=1, max_iters=1, eval_interval=1, n_real=0, n_synthetic=0, shift=0)
    for key, value in least.items():
        if config[key] < value:
            raise ConfigError(f"{key}: {config[key]} must be at least {value}")
    for key, kind in (("hidden", int), ("amounts", int), ("ratios", (int, float))):
        if not all(isinstance(v, kind) and v > 0 for v in config[key]):
            raise ConfigError(f"{key}: {config[key]} must be positive {'' if key == 'ratios' else 'whole '}numbers")
    one_of("optimizer", config["optimizer"], OPTIMIZERS)
    one_of("dtype", config["dtype"], ("auto", "float32", "bfloat16"))
    if not (0 < config["val_fraction"] < 1 and 0 <= config["dropout"] < 1):
        raise ConfigError(f"val_fraction={val_fraction} must be in (0, 1) and dropout={dropout} in [0, 1)")


def main():
    """The comparison, as the settings at the head of this file ask for it."""
    check(config)
    chosen = arms.split(",")
    for arm in chosen:
        one_of("arms", arm, ARMS)
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"arms: {arms} names one twice")
    on, amp_dtype, _ = choose_device(device, dtype, False)
    precision = torch.bfloat16 if amp_dtype == torch.bfloat16 else torch.float32
    settings = config | {"device": on, "dtype": precision}

    images, labels, names = load(dataset, "train", data_dir, image_size, classes)
    test_images, test_labels, test_names = load(dataset, "test", data_dir, image_size, classes)
    if labels is None or test_labels is None or names != test_names:
        raise DataError(f"{dataset}: a classifier needs labels and a test split with the same classes")
    n_train = training_count(len(images), val_fraction)
    real, val_images, val_labels = (images[:n_train], labels[:n_train]), images[n_train:], labels[n_train:]
    K, shape, n_in = len(names), images.shape[1:], math.prod(images.shape[1:3]) * (1 if gray else images.shape[3])
    if bench:
        return bench_step(settings, n_in, K)
    synthetic, folder = [a[:0] for a in real], synthetic_dir or os.path.join(out_dir, "synthetic")
    content = {
        "config": config,
        "classes": names,
        "device": on,
        "torch": torch.__version__,
        "pictures": {"real": n_train},
        "runs": [],
    }
    if amounts or chosen != ["real"]:
        if not os.path.isdir(folder):
            raise DataError(
                f"no synthetic pictures in {folder}: make them with `python augment.py`, or use --arms=real"
            )
        *synthetic, _ = load(folder, classes=names)
        if synthetic[0].shape[1:] != shape:
            raise DataError(f"{folder}: pictures {synthetic[0].shape[1:]}, wanted {shape}")
        content["pictures"]["synthetic"] = len(synthetic[0])
        if os.path.exists(f"{folder}/manifest.json"):
            content["synthetic"] = read_json(f"{folder}/manifest.json")
            del content["synthetic"]["shards"]
            if content["synthetic"].get("trained_on", {}).get("validation") != fingerprint(val_images):
                content["note"] = "the generator may have been trained on the pictures that choose the update here"
                print(f"note: {content['note']} (other dataset, order, classes or val_fraction)")
    os.makedirs(out_dir, exist_ok=True)
    print(
        f"{n_train} real and {len(synthetic[0])} synthetic training pictures, {len(val_images)} for validation, "
        f"{len(test_images)} for the test; {n_in}-{'-'.join(map(str, hidden))}-{K} on {on}, {str(precision)[6:]}, "
        f"{max_iters} updates of {batch_size}"
    )
    result = os.path.join(out_dir, "classifier_amounts.json" if amounts else "classifier.json")

    def run(arm, k, n_real, n_synthetic):
        """Trains one classifier, uses the test pictures once, and keeps what came out."""
        pictures = arm_pictures(arm, real, synthetic, n_real, n_synthetic, k)
        if len(pictures[0]) == 0:
            raise DataError(f"arm {arm}: no pictures")
        model, best = train(*pictures, val_images, val_labels, K, k, settings)
        guess = predict(model, test_images, gray, on).numpy()
        confusion = np.bincount(test_labels * K + guess, minlength=K * K).reshape(K, K).tolist()
        test = float((guess == test_labels).mean())
        content["runs"].append(dict(arm=arm, seed=k, pictures=len(pictures[0]), n_real=n_real, n_synthetic=n_synthetic))
        content["runs"][-1] |= best | {"test": test, "confusion": confusion}
        save_json(result, content)
        print(
            f"seed {k} {arm:<15} {len(pictures[0]):6d} pictures: validation {best['val']:.2%} "
            f"at update {best['step']}, test {test:.2%}, {best['seconds']:.0f} s",
            flush=True,
        )
        if arm == "real" and k == seed and n_real == 0 and not amounts:
            path, size = os.path.join(out_dir, "classifier.pt"), (shape[2], *shape[:2])
            save_classifier(path, model, names, size, gray)
        return content["runs"][-1]

    if amounts:
        amounts_table(run, n_train, len(synthetic[0]))
    else:
        runs = {arm: [] for arm in chosen}
        for k in range(seed, seed + seeds):
            for arm in chosen:
                runs[arm].append(run(arm, k, n_real, n_synthetic))
        report(runs, names, out_dir)
        if "real" in runs and len(runs) > 1:
            content["verdict"] = verdict(runs, names)
            print(f"\n{content['verdict']}")
        save_json(result, content)
        print(f"wrote {os.path.join(out_dir, 'confusion.png')}")
    print(f"wrote {result}")


if __name__ == "__main__":
    config, given = configure(globals())
    main()
