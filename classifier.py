"""A multi-layer perceptron from scratch, and the question it answers: does synthetic data help?

python classifier.py                               four arms, five seeds, on CIFAR-10 and out/synthetic
python classifier.py --arms=real --seeds=1         one classifier, without synthetic images
python classifier.py --n_real=1000                 the comparison with only 1,000 real images

Layers, loss and optimisers are written out, forward and backward; autograd is off, torch only multiplies matrices.
For each seed all arms have the same initial weights, number of updates and validation images. The validation images
decide when to stop (early stopping); each classifier sees the test images once.
"""

import math
import os
import statistics
import time

import numpy as np
import torch

import data
from configurator import configure
from ddpm import check, check_choice, learning_rate, make_generator, to_float
from runtime import lock_folder, new_path, setup_device

# ---------------------------------------------------------------------------------------------------------------------
# data
dataset = "cifar10"  # cifar100, mnist, fashion_mnist, flowers102, shapes, or a folder with train/ and test/
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
# the network and its training
hidden = (1024, 512)  # units of each hidden layer
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
# ---------------------------------------------------------------------------------------------------------------------
# layers: forward keeps what backward needs; backward takes dloss/doutput and returns dloss/dinput


class Linear:
    """y = x W + b: x (B, n_in) -> y (B, n_out). W (n_in, n_out) ~ N(0, 2 / n_in) (He et al. 2015, eq. 10), b = 0."""

    def __init__(self, n_in, n_out, generator=None, device="cpu"):
        self.W = (torch.randn(n_in, n_out, generator=generator) * math.sqrt(2 / n_in)).to(device)
        self.b = torch.zeros(n_out, device=device)

    def forward(self, x, training=False):
        self.x = x
        return x @ self.W + self.b

    def backward(self, dy):
        """dW = x^T dy, db = dy summed over the batch; returns dx = dy W^T."""
        self.dW, self.db = self.x.T @ dy, dy.sum(0)
        return dy @ self.W.T


class ReLU:
    """y = max(x, 0); its derivative at 0 is 0."""

    def forward(self, x, training=False):
        self.y = x.clamp(min=0)
        return self.y

    def backward(self, dy):
        return dy * (self.y > 0)


class Dropout:
    """In training, zeroes each value with probability p and scales the others so that the mean stays."""

    def __init__(self, p, generator=None):
        self.p, self.generator = p, generator

    def forward(self, x, training=False):
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.p if training else 1
        self.mask = kept / (1 - self.p) if training else kept
        return x * self.mask

    def backward(self, dy):
        return dy * self.mask


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
    """Linear, ReLU, Dropout, …, Linear: x (B, sizes[0]) -> logits (B, sizes[-1]). Any device: the same weights."""

    def __init__(self, sizes, dropout=0.0, seed=0, device="cpu"):
        generator, dropout_generator = make_generator(seed), make_generator(seed, 1, device)
        self.layers = []
        for n_in, n_out in zip(sizes, sizes[1:]):
            self.layers += [Linear(n_in, n_out, generator, device), ReLU(), Dropout(dropout, dropout_generator)]
        self.layers = self.layers[:-2]  # the last Linear gives the logits
        self.linears = [layer for layer in self.layers if isinstance(layer, Linear)]

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


def to_inputs(x0):
    """float (B, C, H, W) in [-1, 1] -> (B, n_in) of about unit variance."""
    return 2 * x0.movedim(1, -1).flatten(1)


@torch.no_grad()
def predict(model, images, device):
    """The most likely class of each image: (N, H, W, C) uint8 -> (N,)."""
    parts = (to_float(torch.tensor(images[k : k + 1000]).to(device)) for k in range(0, len(images), 1000))
    return torch.cat([model.forward(to_inputs(x0)).argmax(1).cpu() for x0 in parts]).numpy()


@torch.no_grad()
def train(images, labels, val_images, val_labels, K, seed, device, network=MLP):
    """Trains a network on uint8 images. Returns it with the weights of its best validation, and {step, val, seconds}.

    Raises UserError when the weights do not stay finite.
    """
    start, best, best_weights = time.time(), {"val": -1.0}, []
    model = network((math.prod(images.shape[1:]), *hidden, K), dropout, seed, device)
    loss, optimiser = SoftmaxCrossEntropy(), OPTIMIZERS[optimizer](model, weight_decay)
    batches = data.Batches(images, labels, batch_size, seed, hflip, 1.0, shift, device)
    for step in range(max_iters):
        x0, y = batches(step)
        loss.forward(model.forward(to_inputs(x0), training=True), y)
        model.backward(loss.backward())
        optimiser.step(learning_rate(step, max_iters, lr, min_lr, warmup_iters))
        if (step + 1) % eval_interval == 0 or step + 1 == max_iters:
            finite = all(bool(w.isfinite().all()) for w in model.weights())
            check(finite, f"the weights are not finite at update {step + 1}: lower lr={lr:g}")
            if (val := float((predict(model, val_images, device) == val_labels).mean())) > best["val"]:
                best, best_weights = {"step": step + 1, "val": val}, [w.clone() for w in model.weights()]
    for w, best_w in zip(model.weights(), best_weights):
        w.copy_(best_w)
    return model, best | {"seconds": time.time() - start}


# ---------------------------------------------------------------------------------------------------------------------
# statistics of {arm: its runs}, one run per seed, in the same order

# the 97.5% points of Student's t for 1 to 19 degrees of freedom
T_97_5 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
T_97_5 += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093]


def mean_and_error(values):
    """Mean, its standard error, and half the width of its 95% interval (Student's t). None for a single value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, None, None
    error = statistics.stdev(values) / math.sqrt(n)
    return mean, error, error * T_97_5[n - 2]


def difference(runs, base, score=lambda run: run["test"]):
    """The mean paired difference of two arms in percentage points, and half the width of its 95% interval."""
    mean, _, half = mean_and_error([100 * (score(a) - score(b)) for a, b in zip(runs, base)])
    return mean, half


def recall(k):
    """Scores a run by its accuracy on class k."""
    return lambda run: run["confusion"][k][k] / max(1, sum(run["confusion"][k]))


def change_text(mean, half):
    return f"{mean:+.2f} points" + ("" if half is None else f", 95% interval [{mean - half:+.2f}, {mean + half:+.2f}]")


def verdict(runs):
    """Whether synthetic data helped: against the real images, and against the control if it was run."""
    arm, others = runs.get("real+synthetic"), [name for name in ("real", "real+real") if runs.get(name)]
    if not arm or "real" not in others:
        return ""
    changes = [difference(arm, runs[name]) for name in others]
    text = "".join(f"real+synthetic minus {o}: {change_text(*c)}. " for o, c in zip(others, changes))
    if any(half is None for _, half in changes):
        return text + "One seed cannot tell whether that is chance."
    helped, hurt = (all(sign * mean > half for mean, half in changes) for sign in (1, -1))
    return text + ("Synthetic data helped." if helped else "Synthetic data hurt." if hurt else "No effect was shown.")


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
        mean, error, _ = mean_and_error([100 * run["test"] for run in runs[arm]])
        accuracy = f"{mean:.2f}" + ("" if error is None else f" ± {error:.2f}") + " %"
        change = change_text(*difference(runs[arm], runs["real"])) if arm in others else ""
        print(f"{arm:<16} {accuracy:<16} {change}")
    for arm in others:
        print(f"\n{arm} minus real by class")
        for k, name in enumerate(names):
            print(f"{name:>16} {change_text(*difference(runs[arm], runs['real'], recall(k)))}")


# ---------------------------------------------------------------------------------------------------------------------
# the comparison

ARMS = ("real", "real+synthetic", "synthetic", "real+real")


def arm_images(arm, real, synthetic, seed):
    """(images, labels) of an arm. real+real repeats real images where real+synthetic has synthetic ones."""
    parts = [(real, np.arange(len(real[0])))] if "real" in arm.split("+") else []
    if "synthetic" in arm:
        parts.append((synthetic, data.balanced(*synthetic, n_synthetic, seed)))
    if arm == "real+real":
        parts.append((real, np.arange(n_synthetic or len(synthetic[0])) % len(real[0])))
    return [np.concatenate([pair[i][index] for pair, index in parts]) for i in range(2)]


def load_synthetic(folder, names, real, val_images):
    """((images, labels), the settings of augment.py or {}) of a synthetic set to add to real (images, labels)."""
    images, labels = data.load_samples(folder, real[0], names, data_dir)
    alike = labels is not None and images.shape[1:] == real[0].shape[1:]
    check(alike, f"{folder}: expected labels, and images like the real ones")
    manifest = data.manifest_of(folder)
    trained_on = manifest.get("trained_on") or {}
    trainings, validation = [trained_on], data.fingerprint(val_images)
    while trainings[-1]:
        trainings.append(trainings[-1].get("init_from"))
    if any(t.get("validation") != validation for t in trainings[:-1]):
        print("note: the generator may have been trained on the validation images used here")
    if n := trained_on.get("n_real"):
        after = ", after an earlier training" if "init_from" in trained_on else ""
        print(f"the generator was trained on {n} real images{after}")
    return (images, labels), manifest.get("settings", {}) | {"trained_on": trained_on}


def main(config, network=MLP):
    chosen = list(dict.fromkeys(arms.split(",")))
    for arm in chosen:
        check_choice("arms", arm, ARMS)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check(all(type(n) is int and n > 0 for n in hidden), f"hidden: {hidden} must be whole numbers above 0")
    check(seeds <= 20, f"seeds: {seeds} is more than the table of Student's t has, 20")
    check(val_fraction > 0, "val_fraction: validation images choose when to stop, so it must be above 0")
    on, _, _ = setup_device(device, "float32", "False")
    lock_folder(out_dir)
    made = synthetic_dir or f"{out_dir}/synthetic"
    size = image_size or (data.image_size_of(made) if chosen != ["real"] else 0)
    (images, labels), (test_images, test_labels), names = data.load_splits(dataset, data_dir, size, classes)
    check(labels is not None and test_labels is not None, f"{dataset}: a classifier needs labels and a test split")
    K = len(names)
    real, (val_images, val_labels) = data.training_part(images, labels, names, val_fraction, n_real)
    synthetic, made_with = (images[:0], labels[:0]), {}
    if chosen != ["real"]:
        synthetic, made_with = load_synthetic(made, names, real, val_images)
    available = len(synthetic[0])
    check(chosen == ["real"] or n_synthetic <= available, f"n_synthetic: {n_synthetic}, but there are {available}")
    sizes = f"{len(real[0])} real and {min(n_synthetic, available) or available} synthetic training images"
    sizes += f", {len(val_images)} for validation, {len(test_images)} for the test"
    print(f"{sizes}; {on}, {max_iters} updates of {batch_size}")
    path, runs = new_path(os.path.join(out_dir, "classifier.json")), {arm: [] for arm in chosen}
    for k in range(seed, seed + seeds):
        for arm in chosen:
            train_images, train_labels = arm_images(arm, real, synthetic, k)
            model, run = train(train_images, train_labels, val_images, val_labels, K, k, on, network)
            predicted = predict(model, test_images, on)  # once
            confusion = np.bincount(test_labels * K + predicted, minlength=K * K).reshape(K, K).tolist()
            run |= dict(arm=arm, seed=k, images=len(train_images), confusion=confusion)
            run |= dict(test=float((predicted == test_labels).mean()))
            runs[arm].append(run)
            content = dict(network=network.__name__, config=config, classes=names, synthetic=made_with)
            content |= dict(torch=torch.__version__, runs=sum(runs.values(), []), verdict=verdict(runs))
            data.save_json(path, content)
            scores = f"validation {run['val']:.2%} at update {run['step']}, test {run['test']:.2%}"
            print(f"seed {k} {arm:<15} {run['images']:6d} images: {scores}, {run['seconds']:.0f} s", flush=True)
    report(runs, names)
    print(f"\n{verdict(runs)}\nwrote {path}; python -m lab.plot confusion --results={path} draws it")


if __name__ == "__main__":
    main(configure(globals())[0])
