"""A multi-layer perceptron from scratch, and the question it answers: does synthetic data help?

python classifier.py                               four arms, five seeds, on CIFAR-10 and out/synthetic
python classifier.py --arms=real --seeds=1         one classifier, without synthetic images
python classifier.py --n_real=1000                 the comparison with only 1,000 real images
python classifier.py --amounts=1000,5000,45000     accuracy by number of real and of synthetic images

Layers, loss and optimisers are written out, forward and backward; autograd is off, torch only multiplies matrices.
For each seed all arms have the same initial weights, number of updates and validation images. The validation images
decide when to stop (early stopping); each classifier sees the test images once.
"""

import contextlib
import math
import os
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch

from configurator import configure, dtype_name, setup_device
from data import (
    Batches,
    balanced,
    fingerprint,
    load_samples,
    load_splits,
    read_json,
    save_json,
    seen_indices,
    training_count,
)
from ddpm import UserError, check_choice, check_range, learning_rate, make_generator, to_float

# ---------------------------------------------------------------------------------------------------------------------
# data
dataset = "cifar10"  # fashion_mnist, flowers102, shapes, or a folder with train/ and test/
data_dir = "data"
classes = ""  # cat,frog keeps only these; default all
image_size = 0  # 0: the data set's own
val_fraction = 0.1  # share of the training split that chooses when to stop, the same images as in train.py
out_dir = "out"  # results go here
synthetic_dir = ""  # shards of augment.py; default out_dir/synthetic
n_real = 0  # real training images, the same number of each class, the same ones for every seed; 0: all
n_synthetic = 0  # synthetic ones; 0: all
# the comparison
arms = "real,real+synthetic,synthetic,real+real"  # real+real repeats real images: as many as real+synthetic, none new
seeds = 5  # runs of each arm
seed = 0  # the first of them
amounts = ()  # numbers of real images: a table over them and the ratios, instead of the arms
ratios = (0.1, 0.5, 1.0, 2.0, 5.0)  # of that table: synthetic images per real one
# the network and its training
hidden = (1024, 512)  # units of each hidden layer
gray = False  # True: luminance instead of three colours
dropout = 0.2  # of hidden units
hflip = True  # mirror half of the images
shift = 2  # move each image by up to so many pixels
optimizer = "adamw"  # sgd: with momentum 0.9
batch_size = 256
max_iters = 8000  # updates, the same for every arm
lr = 1e-3  # after warm-up; decays to min_lr along a cosine
min_lr = 0.0
warmup_iters = 200
weight_decay = 0.05  # decoupled: each update subtracts lr x weight_decay of a weight
eval_interval = 400  # updates between validations
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # of the matrix products: float32, bfloat16
# ---------------------------------------------------------------------------------------------------------------------
# layers: forward keeps what backward needs; backward takes dloss/doutput and returns dloss/dinput


class Linear:
    """y = x W + b: x (B, n_in) -> y (B, n_out). backward leaves the gradients in dW and db.

    W (n_in, n_out) ~ N(0, 2 / n_in) (He et al. 2015, eq. 10), b = 0. dtype: of the products; W and b stay float32.
    """

    def __init__(self, n_in, n_out, generator=None, device="cpu", dtype=None):
        self.W = (torch.randn(n_in, n_out, generator=generator) * math.sqrt(2 / n_in)).to(device)
        self.b = torch.zeros(n_out, device=device)
        self.dtype, self.needs_dx = dtype or self.W.dtype, True

    def forward(self, x, training=False):
        self.x, self.W_cast = x.to(self.dtype), self.W.to(self.dtype)  # no copy in float32
        return torch.addmm(self.b.to(self.dtype), self.x, self.W_cast)

    def backward(self, dy):
        """dW = x^T dy, db = dy summed over the batch; returns dx = dy W^T, or None for the first layer."""
        dy = dy.to(self.dtype)
        self.dW, self.db = (self.x.T @ dy).to(self.W.dtype), dy.sum(0).to(self.W.dtype)
        return dy @ self.W_cast.T if self.needs_dx else None


class ReLU:
    """y = max(x, 0); its derivative at 0 is 0."""

    def forward(self, x, training=False):
        self.y = x.clamp(min=0)
        return self.y

    def backward(self, dy):
        return dy * (self.y > 0)


class Dropout:
    """In training, zeroes each value with probability p (to 1/256) and scales the others so that the mean stays."""

    def __init__(self, p, generator=None):
        self.cut, self.generator, self.mask = min(round(256 * p), 255), generator, None

    def forward(self, x, training=False):
        self.mask = None
        if not training or self.cut == 0:
            return x
        # kept = torch.rand(x.shape) >= p, with one random byte per value: an update is up to 1.08x faster
        n, how = x.numel(), dict(generator=self.generator, device=x.device, dtype=torch.int32)
        random_bytes = torch.randint(-(2**31), 2**31, (-(-n // 4),), **how).view(torch.uint8)
        kept = random_bytes[:n].view(x.shape) >= self.cut
        self.mask = kept.to(x.dtype) * (256 / (256 - self.cut))
        return x * self.mask

    def backward(self, dy):
        return dy if self.mask is None else dy * self.mask


class SoftmaxCrossEntropy:
    """The mean over the batch of -log softmax(logits)[y]: logits (B, K) of any size without overflow, y (B,)."""

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

    The same weights for a seed on any device. dtype: of the matrix products, except those of the last layer.
    """

    def __init__(self, sizes, dropout=0.0, seed=0, device="cpu", dtype=None):
        generator, dropout_generator = make_generator(seed), make_generator(seed, 1, device)
        self.layers = []
        for n_in, n_out in zip(sizes, sizes[1:]):
            self.layers += [Linear(n_in, n_out, generator, device, dtype), ReLU(), Dropout(dropout, dropout_generator)]
        self.layers = self.layers[:-2]  # the last Linear gives the logits
        self.linears = [layer for layer in self.layers if isinstance(layer, Linear)]
        self.linears[0].needs_dx, self.linears[-1].dtype = False, torch.get_default_dtype()

    def forward(self, x, training=False):
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def backward(self, d):
        """Computes every dW and db from dloss/dlogits (B, K)."""
        for layer in reversed(self.layers):
            d = layer.backward(d)

    def weights(self):
        return [p for layer in self.linears for p in (layer.W, layer.b)]

    def gradients(self):
        return [g for layer in self.linears for g in (layer.dW, layer.db)]


# ---------------------------------------------------------------------------------------------------------------------
# optimisers, with decoupled weight decay (Loshchilov and Hutter 2019)


class SGD:
    """v = momentum v + g; w = w - lr v."""

    def __init__(self, model, weight_decay=0.0, momentum=0.9):
        self.model, self.weight_decay, self.momentum = model, weight_decay, momentum
        self.v = [torch.zeros_like(w) for w in model.weights()]

    def step(self, lr):
        for w, g, v in zip(self.model.weights(), self.model.gradients(), self.v):
            v.mul_(self.momentum).add_(g)
            w.mul_(1 - lr * self.weight_decay).sub_(v, alpha=lr)


class AdamW:
    """Kingma and Ba 2015, algorithm 1: w = w - lr m_hat / (sqrt(v_hat) + eps)."""

    def __init__(self, model, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8):
        self.model, self.weight_decay, self.updates = model, weight_decay, 0
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.m, self.v = ([torch.zeros_like(w) for w in model.weights()] for _ in range(2))

    def step(self, lr):
        self.updates += 1
        c1, c2 = 1 - self.beta1**self.updates, 1 - self.beta2**self.updates  # m_hat = m / c1, v_hat = v / c2
        for w, g, m, v in zip(self.model.weights(), self.model.gradients(), self.m, self.v):
            m.lerp_(g, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            w.mul_(1 - lr * self.weight_decay).addcdiv_(m, (v / c2).sqrt_().add_(self.eps), value=-lr / c1)


OPTIMIZERS = {"sgd": SGD, "adamw": AdamW}


# ---------------------------------------------------------------------------------------------------------------------
# training one classifier


def to_inputs(images, gray):
    """float (B, C, H, W) in [-1, 1] -> (B, n_in) of about unit variance. gray: luminance (ITU-R BT.601)."""
    if gray and images.shape[1] == 3:
        images = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    return 2 * images.movedim(1, -1).flatten(1)


@torch.no_grad()
def predict(model, images, gray, device):
    """The most likely class of each image: (N, H, W, C) uint8 -> (N,) on the CPU."""
    predicted = []
    for start in range(0, len(images), 1000):
        x = to_inputs(to_float(torch.tensor(images[start : start + 1000]).to(device)), gray)
        predicted.append(model.forward(x).argmax(1).cpu())
    return torch.cat(predicted)


@torch.no_grad()
def train(images, labels, val_images, val_labels, K, seed, settings):
    """Trains an MLP on uint8 images. Returns it with the weights of its best validation, and {step, val, seconds}.

    settings: a dict of this script's keys from `hidden` to `dtype`, with device and dtype resolved.
    Raises UserError when the weights do not stay finite.
    """
    s, start = SimpleNamespace(**settings), time.time()
    n_in = math.prod(images.shape[1:3]) * (1 if s.gray else images.shape[3])
    model = MLP((n_in, *s.hidden, K), s.dropout, seed, s.device, s.dtype)
    loss, optimizer = SoftmaxCrossEntropy(), OPTIMIZERS[s.optimizer](model, s.weight_decay)
    batches = Batches(images, labels, s.batch_size, seed, s.hflip, 1.0, s.shift, s.device)
    best, best_weights = {"val": -1.0}, []
    for step in range(s.max_iters):
        x0, y = batches(step)
        loss.forward(model.forward(to_inputs(x0, s.gray), training=True), y)
        model.backward(loss.backward())
        optimizer.step(learning_rate(step, s.max_iters, s.lr, s.min_lr, s.warmup_iters))
        if (step + 1) % s.eval_interval == 0 or step + 1 == s.max_iters:
            if not all(bool(w.isfinite().all()) for w in model.weights()):
                raise UserError(f"the weights are not finite at update {step + 1}: lower lr={s.lr:g}")
            correct = predict(model, val_images, s.gray, s.device) == torch.from_numpy(val_labels)
            if (val := correct.float().mean().item()) > best["val"]:
                best, best_weights = {"step": step + 1, "val": val}, [w.clone() for w in model.weights()]
    for w, best_w in zip(model.weights(), best_weights):
        w.copy_(best_w)
    return model, best | {"seconds": time.time() - start}


# ---------------------------------------------------------------------------------------------------------------------
# statistics of {arm: its runs}, one run per seed, in the same order

# the 97.5% points of Student's t for 1 to 30 degrees of freedom
T_97_5 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
T_97_5 += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]
T_97_5 += [2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def mean_and_error(values):
    """Mean, its standard error, and half the width of its 95% interval (Student's t). None for a single value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, None, None
    error = statistics.stdev(values) / math.sqrt(n)
    return mean, error, error * (T_97_5[n - 2] if n < 32 else 1.96)


def difference(runs, base, score=lambda run: run["test"]):
    """The mean paired difference of two arms in percentage points, and half the width of its 95% interval."""
    mean, _, half = mean_and_error([100 * (score(a) - score(b)) for a, b in zip(runs, base)])
    return mean, half


def recall(k):
    """Scores a run by its accuracy on class k."""
    return lambda run: run["confusion"][k][k] / max(1, sum(run["confusion"][k]))


def accuracy_text(runs):
    mean, error, _ = mean_and_error([100 * run["test"] for run in runs])
    return f"{mean:.2f}" + ("" if error is None else f" ± {error:.2f}") + " %"


def change_text(mean, half):
    return f"{mean:+.2f} points" + ("" if half is None else f", 95% interval [{mean - half:+.2f}, {mean + half:+.2f}]")


def verdict(runs, names):
    """Whether synthetic data helped: against the real images, and against the control if it was run."""
    base, arm = runs.get("real"), runs.get("real+synthetic")
    if not base or not arm:
        return ""
    changes = {"real": difference(arm, base)}
    if "real+real" in runs:
        changes["real+real"] = difference(arm, runs["real+real"])
    text = (
        "; ".join(f"real+synthetic minus {other}: {change_text(*change)}" for other, change in changes.items()) + ". "
    )
    if len(base) < 2:
        return text + "One seed cannot tell whether that is chance."
    if all(mean > half for mean, half in changes.values()):
        text += "Synthetic data helped."
    elif all(mean < -half for mean, half in changes.values()):
        text += "Synthetic data hurt."
    else:
        text += "No effect was shown" + (" in both comparisons." if len(changes) > 1 else ".")
    by_class = {name: difference(arm, base, recall(k)) for k, name in enumerate(names)}
    for word, sign in (("better", 1), ("worse", -1)):
        listed = [f"{name} {mean:+.1f}" for name, (mean, half) in by_class.items() if sign * mean > half]
        text += f" Classes that got {word} (95% each): {', '.join(listed) or 'none'}."
    other = ", other real images" * bool(base[0]["n_real"]) + " or other test images"
    return text + f" {len(base)} seeds; another generator{other} were not tried."


def confusion_text(runs, names):
    """The confusion matrices of some runs, summed, as a table in percent of each true class (row)."""
    matrix = np.sum([run["confusion"] for run in runs], axis=0)
    percent, width = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), max(map(len, names))
    lines = [" " * width + "".join(f"{name[:5]:>6}" for name in names)]
    lines += [f"{name:>{width}}" + "".join(f"{v:6.0f}" for v in row) for name, row in zip(names, percent)]
    return "\n".join(lines)


def report(runs, names):
    """Prints confusion matrices, accuracies, and changes by class."""
    for arm in runs:
        print(f"\n{arm}: true class (row) and predicted class (column), percent, {len(runs[arm])} seeds")
        print(confusion_text(runs[arm], names))
    others = [arm for arm in runs if arm != "real" and "real" in runs]
    print(f"\n{'arm':<16} test accuracy    minus real, paired by seed")
    for arm in runs:
        change = change_text(*difference(runs[arm], runs["real"])) if arm in others else ""
        print(f"{arm:<16} {accuracy_text(runs[arm]):<16} {change}")
    for arm in others:
        print(f"\n{arm} minus real by class")
        for k, name in enumerate(names):
            print(f"{name:>16} {change_text(*difference(runs[arm], runs['real'], recall(k)))}")


# ---------------------------------------------------------------------------------------------------------------------
# the comparison

ARMS = ("real", "real+synthetic", "synthetic", "real+real")


def arm_images(arm, real, synthetic, n_real, n_synthetic, seed):
    """(images, labels) of an arm. real+real repeats real images where real+synthetic has synthetic ones."""
    from_real, from_synthetic = balanced(real[1], n_real, 0), balanced(synthetic[1], n_synthetic, seed)
    parts = {"real": [(real, from_real)], "synthetic": [(synthetic, from_synthetic)]}
    parts["real+synthetic"] = parts["real"] + parts["synthetic"]
    parts["real+real"] = [(real, from_real), (real, np.resize(from_real, len(from_synthetic)))]
    return [np.concatenate([pair[i][index] for pair, index in parts[arm]]) for i in range(2)]


def load_synthetic(folder, names, real, val_images):
    """((images, labels), the manifest of augment.py or {}, a note or "") of a synthetic set.

    real: the training images and labels. The note says which real images the generator was trained on.
    """
    images, labels = load_samples(folder, real[0], names, data_dir)
    if labels is None or images.shape[1:] != real[0].shape[1:]:
        raise UserError(f"{folder}: images {images.shape[1:]}, expected {real[0].shape[1:]} with labels")
    if not os.path.exists(f"{folder}/manifest.json"):
        return (images, labels), {}, ""
    manifest = {key: value for key, value in read_json(f"{folder}/manifest.json").items() if key != "shards"}
    trained_on, note = manifest.get("trained_on", {}), f"the generator was trained on all {len(real[0])} real images"
    trainings = [trained_on]  # and those of the weights that it started from
    while "init_from" in trainings[-1]:
        trainings.append(trainings[-1]["init_from"])
    if any(t.get("validation") != fingerprint(val_images) for t in trainings):
        note = "note: the generator may have been trained on the validation images used here"
    elif n := trained_on.get("n_real"):
        same = len(seen_indices(trained_on, *real)) > 0
        note = f"the generator was trained on {n} real images, {'' if same else 'not '}those that n_real={n} takes here"
        note += ", and started from weights of an earlier training" * (len(trainings) > 1)
    return (images, labels), manifest, note


def amounts_table(run, n_train, n_synthetic):
    """Prints accuracy by number of real images and of synthetic images per real one."""
    for n in dict.fromkeys(min(n, n_train) for n in amounts):
        base = None
        for ratio in (0, *ratios):
            count = round(ratio * n)
            title = f"{n:6d} real + {count:6d} synthetic ({ratio:g}x)"
            if count > n_synthetic or (ratio and count == 0):
                print(f"{title}: not run, it takes 1 to {n_synthetic} synthetic images")
                continue
            cell = [run("real+synthetic" if ratio else "real", k, n, count) for k in range(seed, seed + seeds)]
            base = base or cell
            print(f"{title}: {accuracy_text(cell)}{f'; {change_text(*difference(cell, base))}' if ratio else ''}")


def main(config):
    """Runs the comparison, or the table of amounts."""
    chosen = arms.split(",")
    for arm in chosen:
        check_choice("arms", arm, ARMS)
    if len(set(chosen)) < len(chosen):
        raise UserError(f"arms: {arms} names one twice")
    for key in ("hidden", "amounts", "ratios"):
        for value in config[key]:
            check_range(key, value, "(0, inf)")
            if key != "ratios" and type(value) is not int:
                raise UserError(f"{key}: {value} must be a whole number")
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_choice("dtype", dtype, ("auto", "float32", "bfloat16"))
    on, amp_dtype, _ = setup_device(device, dtype, False)
    settings = config | {"device": on, "dtype": torch.bfloat16 if amp_dtype == torch.bfloat16 else torch.float32}

    (images, labels), (test_images, test_labels), names = load_splits(dataset, data_dir, image_size, classes)
    if labels is None or test_labels is None:
        raise UserError(f"{dataset}: a classifier needs labels and a test split")
    n_train, K, folder = training_count(len(images), val_fraction), len(names), synthetic_dir or f"{out_dir}/synthetic"
    real, val_images, val_labels = (images[:n_train], labels[:n_train]), images[n_train:], labels[n_train:]
    synthetic, manifest, note = [a[:0] for a in real], {}, ""
    if amounts or chosen != ["real"]:
        synthetic, manifest, note = load_synthetic(folder, names, real, val_images)
    content = dict(config=config, classes=names, device=on, torch=torch.__version__, synthetic=manifest, runs=[])
    suffix = "_amounts" if amounts else ""
    path = os.path.join(out_dir, f"classifier{suffix}.json")
    os.makedirs(out_dir, exist_ok=True)
    available = n_train, len(synthetic[0])
    used = available if amounts else [min(n or N, N) for n, N in zip((n_real, n_synthetic), available)]
    print(
        f"{used[0]} real and {used[1]} synthetic training images, {len(val_images)} for validation, "
        f"{len(test_images)} for the test; hidden layers {hidden}, {on}, {dtype_name(settings['dtype'])}, "
        f"{max_iters} updates of {batch_size}" + f"\n{note}" * bool(note)
    )

    def run(arm, k, n_real, n_synthetic):
        """Trains one classifier and tests it, once."""
        arm_data = arm_images(arm, real, synthetic, n_real, n_synthetic, k)
        if len(arm_data[0]) == 0:
            raise UserError(f"arm {arm}: no images")
        model, best = train(*arm_data, val_images, val_labels, K, k, settings)
        predicted = predict(model, test_images, gray, on).numpy()
        result = dict(arm=arm, seed=k, images=len(arm_data[0]), n_real=n_real, n_synthetic=n_synthetic) | best
        result["test"] = float((predicted == test_labels).mean())
        result["confusion"] = np.bincount(test_labels * K + predicted, minlength=K * K).reshape(K, K).tolist()
        content["runs"].append(result)
        save_json(path, content)
        print(
            f"seed {k} {arm:<15} {result['images']:6d} images: validation {best['val']:.2%} at update {best['step']}, "
            f"test {result['test']:.2%}, {best['seconds']:.0f} s",
            flush=True,
        )
        return result

    if amounts:
        amounts_table(run, n_train, len(synthetic[0]))
    else:
        runs = {arm: [] for arm in chosen}
        for k in range(seed, seed + seeds):
            for arm in chosen:
                runs[arm].append(run(arm, k, n_real, n_synthetic))
        report(runs, names)
        content["verdict"] = verdict(runs, names)
        save_json(path, content)
        print(f"\n{content['verdict']}")
    with contextlib.suppress(ImportError):  # matplotlib is optional
        from plot import plot_confusion

        image = f"{out_dir}/confusion{suffix}.png"
        plot_confusion(path).savefig(image, dpi=110, bbox_inches="tight")
        print(f"wrote {image}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(configure(globals(), dict(val_fraction="(0, 1)"))[0])
