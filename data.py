"""Data sets as uint8 arrays, the shard format, and training batches that are made on the device.

Images at rest are uint8 (N, H, W, C), labels uint8 (N,). A shard folder holds images_00000.npy, labels_00000.npy, …
and classes.json (a list of names), in train/ and test/ where there are both splits. Whatever was downloaded, decoded
or generated is cached in that form and memory-mapped from then on.
"""

import colorsys
import contextlib
import difflib
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import uuid

import numpy as np
import torch
import torch.nn.functional as F

from ddpm import UserError, check, make_generator, to_float
from runtime import atomic_write

TORCHVISION = {  # class, image size, how to place the files by hand
    "cifar10": ("CIFAR10", 32, "cifar-10-batches-py, from https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", 32, "cifar-100-python, from https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "mnist": ("MNIST", 28, "the four files of http://yann.lecun.com/exdb/mnist in MNIST/raw/"),
    "fashion_mnist": ("FashionMNIST", 28, "the four files of github.com/zalandoresearch in FashionMNIST/raw/"),
    "flowers102": ("Flowers102", 64, "flowers-102/, from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
}
IMAGE_TYPES = tuple(".png .jpg .jpeg .jfif .bmp .webp .gif .tif .tiff .ppm .pgm .pbm".split())
# names of splits: Training, test1, seg_val, PublicTest, trainA, …
SPLIT = re.compile(
    r"(.*[-_ .]|(?-i:.*[a-z\d](?=[TVDE])))?(train|test|val|valid|dev|eval|hold-?_?out)"
    r"(s|ing|idate|idation|uation|elopment)?(set|data|images|[ab]|val)?s?([-_ .(].*|\d*)",
    re.I,
)


# ---------------------------------------------------------------------------------------------------------------------
# files


def save_json(path, content):
    """Writes JSON. NaN and infinities, which JSON does not have, become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    with atomic_write(path) as f:
        f.write(json.dumps(content, indent=1).encode())


def read_json(path, kind=dict):
    """A JSON file's content. Raises UserError for a damaged file, or if its content is not of the given kind."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged or not JSON ({e})") from None
    check(isinstance(content, kind), f"{path} holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


def load_array(path):
    """The array of an .npy file, memory-mapped. Raises UserError for a missing or damaged file."""
    try:
        return np.lib.format.open_memmap(path, mode="r")  # np.load would open archives and pickles too
    except Exception as e:  # of a damaged header: whatever Python's parser raises
        raise UserError(f"{path} is missing, damaged or not an .npy file ({e!r:.100})") from None


def file_hash(path):
    """SHA-256 of a file, in hex."""
    return fingerprint(np.fromfile(path, np.uint8))


def fingerprint(images):
    """SHA-256 of images (N, H, W, C), in hex: equal for the same images in the same order."""
    return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# shards


def write_shard(folder, i, images, labels):
    """Writes shard i, uint8. Labels come first, so that no images are without theirs. labels None: no classes."""
    for kind, array in (("labels", labels), ("images", images)):
        if array is not None:
            uint8 = np.asarray(array).astype(np.uint8)
            check((uint8 == array).all(), f"{kind}: expected whole numbers from 0 to 255")
            with atomic_write(f"{folder}/{kind}_{i:05d}.npy") as f:
                np.save(f, uint8)


def write_shards(folder, images, labels, class_names):
    """Writes images (N, H, W, C) and labels (N,) or None as a folder of one shard."""
    os.makedirs(folder, exist_ok=True)
    write_shard(folder, 0, images, labels)
    save_json(f"{folder}/classes.json", list(class_names))


def shard_files(folder, kind="(images|labels)"):
    """The sorted paths of the images_00000.npy and labels_00000.npy, … of a folder, or of one kind."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(f"{folder}/{name}" for name in names if re.fullmatch(rf"{kind}_\d+\.npy", name))


def image_size_of(folder):
    """The side of the images in a folder's shards, 0 if it has none."""
    paths = shard_files(folder, "images")
    return (*load_array(paths[0]).shape, 0, 0)[1] if paths else 0


def manifest_of(folder):
    """manifest.json of augment.py, {} if there is none. Other programs have files of that name too."""
    path = f"{folder}/manifest.json"
    content = read_json(path, object) if os.path.exists(path) else {}
    ours = isinstance(content, dict) and "complete" in content and isinstance(content.get("settings", {}), dict)
    return content if ours else {}


def read_shards(folder):
    """Returns images (N, H, W, C) uint8 (memory-mapped if one file), labels (N,) int64 or None, and class names.

    Raises UserError, naming the file, if one is damaged, missing, of another shape or badly labelled.
    """
    if manifest := manifest_of(folder):  # the shards must be those that augment.py listed
        listed = manifest["complete"] and manifest.get("shards")
        check(isinstance(listed, dict), f"{folder} is not complete: run augment.py again with the same settings")
        odd = sorted(listed.keys() ^ map(os.path.basename, shard_files(folder)))
        check(not odd, f"{folder}: {', '.join(odd[:3])} missing, or not listed in manifest.json")
        for name, digest in listed.items():
            check(file_hash(f"{folder}/{name}") == digest, f"{folder}/{name} is not the file listed in manifest.json")
    paths = shard_files(folder, "images")
    check(paths, f"no images in {folder}/images_*.npy")
    images = list(map(load_array, paths))
    for path, part in zip(paths, images):
        ok = part.dtype == np.uint8 and part.ndim == 4 and part.shape[3] in (1, 3)
        ok = ok and part.size > 0 and part.shape[1:] == images[0].shape[1:]
        check(ok, f"{path}: {part.dtype} {part.shape}, expected uint8 (N, H, W, 1 or 3), alike in all shards")
    names_path = next((p for p in (f"{folder}/classes.json", f"{folder}/../classes.json") if os.path.exists(p)), None)
    names = list(map(str, read_json(names_path, list))) if names_path else []
    counts, images = list(map(len, images)), images[0] if len(images) == 1 else np.concatenate(images)
    if not shard_files(folder, "labels"):
        return images, None, names
    paths = [f"{folder}/labels_{os.path.basename(path)[7:]}" for path in paths]
    labels = list(map(load_array, paths))
    for path, part, n in zip(paths, labels, counts):
        ok = part.dtype.kind in "ui" and part.shape == (n,)
        check(ok, f"{path}: {part.dtype} {part.shape}, expected a whole number for each of {n} images")
    labels = np.concatenate(labels).astype(np.int64)
    names = names or [str(k) for k in range(min(256, labels.max() + 1))]
    ok = labels.min() >= 0 and labels.max() < len(names) == len(set(names)) <= 256
    check(ok, f"{folder}: labels {labels.min()} to {labels.max()} do not fit {len(names)} different names, at most 256")
    return images, labels, names


# ---------------------------------------------------------------------------------------------------------------------
# making the data sets


def make_shapes(n, seed, size=32):
    """Ten classes of coloured shapes on dark backgrounds: images (n, size, size, 3), labels (n,), names.

    Position, radius, hue (one of six), brightness and background vary. An image is an antialiased signed distance.
    """
    names = ["disc", "ring", "square", "frame", "triangle", "diamond", "plus", "cross", "hbars", "vbars"]
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % len(names)).astype(np.uint8)
    rng.shuffle(labels)
    images = np.empty((n, size, size, 3), dtype=np.uint8)
    hues = np.array([colorsys.hsv_to_rgb(h / 6, 0.85, 1.0) for h in range(6)])
    axis = np.arange(size) + 0.5
    for start in range(0, n, 2000):
        k = labels[start : start + 2000, None, None]
        b = len(k)
        r = rng.uniform(0.22, 0.34, (b, 1, 1)) * size  # "radius" of the shape
        cx, cy = (rng.uniform(r + 1, size - r - 1) for _ in range(2))
        x, y = axis[None, None, :] - cx, axis[None, :, None] - cy
        u, v = (x + y) / 2**0.5, (x - y) / 2**0.5  # the axes, turned by 45 degrees
        radius, box, bar = np.hypot(x, y), np.maximum(abs(x), abs(y)), 0.3 * r
        distances = [  # in the order of the names, negative inside
            radius - r,
            abs(radius - 0.8 * r) - 0.24 * r,
            box - 0.85 * r,
            abs(box - 0.75 * r) - 0.22 * r,
            np.maximum((abs(x) * 2 - y - r) / 5**0.5, y - 0.75 * r),
            (abs(x) + abs(y)) / 2**0.5 - 0.72 * r,
            np.minimum(np.maximum(abs(x) - bar, abs(y) - r), np.maximum(abs(y) - bar, abs(x) - r)),
            np.minimum(np.maximum(abs(u) - bar, abs(v) - r), np.maximum(abs(v) - bar, abs(u) - r)),
            np.maximum(abs(abs(y) - 0.6 * r) - bar, abs(x) - 0.9 * r),
            np.maximum(abs(abs(x) - 0.6 * r) - bar, abs(y) - 0.9 * r),
        ]
        alpha = np.clip(0.5 - np.choose(k, [np.broadcast_to(d, (b, size, size)) for d in distances]), 0, 1)[..., None]
        colour = hues[rng.integers(6, size=b)] * rng.uniform(0.75, 1, (b, 1)) * rng.uniform(0.9, 1, (b, 3))
        background = rng.uniform(0, 0.25, (b, 1, 1, 1)) * rng.uniform(0.8, 1, (b, 1, 1, 3))
        images[start : start + b] = np.round(255 * (alpha * colour[:, None, None] + (1 - alpha) * background))
    return images, labels, names


def decode_image(path, size):
    """An image file as uint8 (size, size, 3), as a viewer shows it on white; its shorter side is resized to `size`,
    and the centre is cropped. Raises UserError for one that cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        image = Image.open(path)
        with contextlib.suppress(Exception):  # damaged EXIF data
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        elif image.mode in "IF":
            raise ValueError(f"mode {image.mode}: convert it to 8 bits")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return np.asarray(ImageOps.fit(image, (size, size), Image.LANCZOS))
    except Exception as e:  # Pillow raises many kinds
        raise UserError(f"{path} is not a readable image ({e!r:.100})") from None


def image_paths(folder):
    """The sorted paths of all images in a folder and its sub-folders, except hidden ones and links to folders."""
    found = []
    for root, folders, names in os.walk(folder, onerror=lambda e: check(False, e)):
        folders[:] = [d for d in folders if not d.startswith(".")]
        found += [f"{root}/{n}" for n in names if not n.startswith(".") and n.lower().endswith(IMAGE_TYPES)]
    return sorted(found)


def ranks(labels, order):
    """For each image, how many of its class come before it in an order: (N,)."""
    rank = np.empty(len(labels), dtype=np.int64)
    for k in np.unique(labels):
        mine = order[labels[order] == k]
        rank[mine] = np.arange(len(mine))
    return rank


def fixed_order(images, labels=None):
    """A random order of images, the same wherever each stands, with every class spread evenly: (N,) indices.

    It is that of their hashes, so that a download and a copy in another order have the same validation images.
    """
    hashes = [hashlib.sha256(np.ascontiguousarray(image)).digest() for image in images]
    order = np.array(sorted(range(len(images)), key=hashes.__getitem__))
    labels = np.zeros(len(images), int) if labels is None else labels
    place = (ranks(labels, order) + 0.5) / np.bincount(labels)[labels]
    return order[np.argsort(place[order], kind="stable")]


def list_images(folder):
    """The images of a folder, its sub-folders or links to such being the classes: ([(path, label or None)], names)."""
    folders = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    here = os.path.join(os.path.realpath(folder), "")
    above = [name for name in folders if here.startswith(os.path.join(os.path.realpath(f"{folder}/{name}"), ""))]
    check(not above, f"{folder}/{', '.join(above)} leads back to this folder, or to one above")
    found = {name: image_paths(f"{folder}/{name}") for name in folders}
    names = [name for name in folders if found[name]]
    check(len(names) <= 256, f"{folder} has {len(names)} classes, but a shard holds at most 256")
    listed = [(path, k) for k, name in enumerate(names) for path in found[name]]
    parts = {part for path, _ in listed for part in os.path.relpath(path, folder).split(os.sep)[:-1]}
    kinds = {part: m[2].lower() for part in parts if (m := SPLIT.fullmatch(part))}
    fine = not kinds or (set(kinds.values()) == {"train"} and len(kinds) < len(names))  # a class may be called train
    advice = "call them train and test, and put the classes inside; rename a class of such a name"
    check(fine, f"{folder}: {', '.join(sorted(kinds))} look like splits, not like classes: {advice}")
    listed = listed or [(path, None) for path in image_paths(folder)]
    check(listed, f"no images ({' '.join(IMAGE_TYPES)}) in {folder} or its sub-folders, and no images_*.npy")
    for path, _ in listed:
        check(os.path.isfile(path), f"{path} is not a readable image (no file, or a link to none)")
    return listed, names


def download(dataset, data_dir, split, size):
    """One split of a torchvision data set, downloaded unless its files are there: (images, labels, names)."""
    import torchvision

    kind, _, by_hand = TORCHVISION[dataset]
    which = {"split": split} if dataset == "flowers102" else {"train": split == "train"}
    try:
        for path in glob.glob(f"{glob.escape(data_dir)}/{kind}/raw/*.gz"):
            with gzip.open(path) as packed, atomic_write(path[:-3]) as f:
                shutil.copyfileobj(packed, f)
        source = getattr(torchvision.datasets, kind)(data_dir, download=True, **which)
    except Exception as e:  # torchvision raises whatever its transport does
        cause = f"its files in {data_dir} are damaged, or missing and the download failed ({e!r:.100})"
        advice = f"By hand: put {by_hand} in {data_dir}. Without a download: `python train.py config/shapes.py`"
        raise UserError(f"{dataset}: {cause}. {advice}") from None
    if dataset == "flowers102":  # jpg files
        images = np.stack([decode_image(path, size) for path in source._image_files])
        labels = np.asarray(source._labels)
    else:
        images, labels = np.asarray(source.data), np.asarray(source.targets)
        images = images if images.ndim == 4 else images[..., None]
    return images, labels, getattr(source, "classes", None) or [str(k) for k in range(int(labels.max()) + 1)]


def cached(folder, make):
    """The folder, filled by make() with one shard if it is not there. If another process was faster, its copy stays."""
    if not shard_files(folder, "images"):
        partial = f"{folder}.{uuid.uuid4().hex}"
        try:
            write_shards(partial, *make())
            os.replace(partial, folder)
        except OSError:
            if not shard_files(folder, "images"):
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load(dataset, split="train", data_dir="data", image_size=0, classes=""):
    """Loads one split of a data set: (images (N, H, W, C) uint8, labels (N,) int64 or None, class names).

    dataset: cifar10, cifar100, mnist, fashion_mnist, flowers102, shapes, or a folder of images or shards. image_size:
    resizes a folder's images (0: to 64) and flowers102; else 0 or the set's own. classes: 'cat,frog' keeps these, as
    labels 0, 1. A data set without a test split gives (None, None, []) for it.
    Raises UserError if the data cannot be found, downloaded or read, or a class is unknown.
    """
    built_in = dataset in (*TORCHVISION, "shapes")
    if dataset == "shapes":
        n, seed = (50000, 0) if split == "train" else (10000, 1)
        folder = cached(f"{data_dir}/shapes/{split}", lambda: make_shapes(n, seed))
    elif built_in:
        size = image_size if dataset == "flowers102" and image_size else TORCHVISION[dataset][1]
        root = f"{data_dir}/{dataset}" if size == TORCHVISION[dataset][1] else f"{data_dir}/{dataset}-{size}"
        folder = cached(f"{root}/{split}", lambda: download(dataset, data_dir, split, size))
    else:
        near = difflib.get_close_matches(dataset, [*TORCHVISION, "shapes"], n=1)
        also = f"did you mean {near[0]!r}?" if near else f"use {', '.join(TORCHVISION)}, shapes or a folder"
        check(os.path.isdir(dataset), f"dataset {dataset!r} is neither a data set nor a folder: {also}")
        folder = user_folder(os.path.abspath(dataset), split, data_dir, image_size or 64)
        if folder is None:
            return None, None, []
    images, labels, names = read_shards(folder)
    H, W = images.shape[1:3]
    check(H == W and image_size in (0, H), f"{folder}: images {H}x{W}, expected squares of {image_size or 'any size'}")
    return select(images, labels, names, classes)


def user_folder(dataset, split, data_dir, size):
    """The shard folder of a user's folder of shards or images, or None if it has no such split."""
    splits = {e.name.lower(): e.path for e in sorted(os.scandir(dataset), key=lambda e: e.name) if e.is_dir()}
    check("train" in splits or "test" not in splits, f"{dataset} has test/, so the other images belong in train/")
    others = [name for name in splits if SPLIT.fullmatch(name) and name not in ("train", "test")]
    check("train" not in splits or not others, f"{dataset}: {', '.join(others)} beside train: only test may be there")
    source = dataset if split == "train" and "train" not in splits else splits.get(split)
    if not source or shard_files(source, "images") or manifest_of(source):
        return source
    listed, names = list_images(source)
    state = [(path, os.path.getsize(path), os.path.getmtime(path)) for path, _ in listed]
    key = hashlib.sha256(repr((size, state)).encode()).hexdigest()[:12]

    def decode():
        counts = np.bincount([k for _, k in listed]) if names else []
        counts = ", ".join(f"{name} {count}" for name, count in zip(names, counts)) or "no classes"
        used = {path for path, _ in listed}
        rest = [name for root, _, files in os.walk(source) for name in files if f"{root}/{name}" not in used]
        if source != dataset:
            rest += [name for name in os.listdir(dataset) if name.lower() not in ("train", "test")]
        rest = ", ".join(rest[:5]) + ", …" * (len(rest) > 5)
        print(f"{source}: {len(listed)} images; {counts}; not used: {rest or 'nothing'}")
        images = np.stack([decode_image(path, size) for path, _ in listed])
        return images, np.array([k for _, k in listed]) if names else None, names

    return cached(f"{data_dir}/{os.path.basename(source)}-{size}-{key}", decode)


def load_splits(dataset, data_dir="data", image_size=0, classes=""):
    """Both splits: ((images, labels), (test images, test labels), names). See load. The test pair may be (None, None).

    Raises UserError if their images or classes differ.
    """
    *train, names = load(dataset, "train", data_dir, image_size, classes)
    *test, test_names = load(dataset, "test", data_dir, image_size, classes)
    if test[0] is not None:
        ok = names == test_names and (train[1] is None) == (test[1] is None)
        check(ok, f"{dataset}: train and test have different classes, {names} and {test_names}: use --classes")
        shapes = train[0].shape[1:], test[0].shape[1:]
        check(shapes[0] == shapes[1], f"{dataset}: train and test have images of different shapes, {shapes}")
    return train, test, names


def load_samples(folder, like, names, data_dir="data"):
    """Generated images of a folder, to compare with real images `like` (N, H, W, C): (images, labels or None).

    Labels are renumbered to fit names. Raises UserError if the size differs or a class has no images.
    """
    check(os.path.isdir(folder), f"no images in {folder}: make them with `python augment.py`, or name another folder")
    images, labels, own_names = load(os.path.abspath(folder), "train", data_dir, like.shape[1])
    if labels is not None and names:
        images, labels, _ = select(images, labels, own_names, names)
        missing = [name for k, name in enumerate(names) if not (labels == k).any()]
        check(not missing, f"{folder}: no images of {', '.join(missing)}: use --classes")
    return images, labels


def class_ids(classes, names, unique=False):
    """'cat,frog' or '3,6' or a list of names -> a list of labels. Raises UserError for an unknown class.

    unique: also for a repeated one.
    """
    known = {str(k): k for k in range(len(names))} if isinstance(classes, str) else {}  # positions: in flags only
    known |= {name: k for k, name in enumerate(names)}
    ids = []
    for name in [c.strip() for c in classes.split(",")] if isinstance(classes, str) else classes:
        near = difflib.get_close_matches(name, names, n=1)
        also = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'no classes'}"
        check(name in known, f"classes: unknown class {name!r}: {also}")
        ids.append(known[name])
    check(not unique or len(set(ids)) == len(ids), f"classes={classes} names a class twice")
    return ids


def select(images, labels, names, classes):
    """Keeps the given classes ('': all), renumbered 0, 1, … in that order."""
    if not classes:
        return images, labels, names
    ids = class_ids(classes, names, unique=True)
    check(labels is not None, f"classes={classes}: these images have no labels")
    new = np.full(len(names), -1, dtype=np.int64)
    new[ids] = np.arange(len(ids))
    kept = np.flatnonzero(new[labels] >= 0)
    check(len(kept), f"classes={classes}: there are no images of these classes")
    return images[kept], new[labels[kept]], [names[k] for k in ids]


def training_part(images, labels, names, val_fraction, n_real=0):
    """Splits (images, labels or None) into those for training and those for validation, the last of the fixed order.

    n_real: keep so many for training, the same number of each class and the same for every seed; 0: all.
    Raises UserError if there are none for validation, or none of a class for training.
    """
    n_val = int(len(images) * val_fraction)
    check(n_val or not val_fraction, f"val_fraction={val_fraction} of {len(images)} images leaves none for validation")
    parts = np.split(fixed_order(images, labels), [len(images) - n_val])
    train, val = [(images[part], None if labels is None else labels[part]) for part in parts]
    if n_real:
        chosen = balanced(*train, n_real, 0)
        train = train[0][chosen], None if labels is None else train[1][chosen]
    missing = [] if labels is None else sorted(set(range(len(names))) - set(np.unique(train[1])))
    left_out = ", ".join(names[k] for k in missing)
    check(not missing, f"no training images of {left_out}: leave them out with --classes, or raise n_real")
    return train, val


def balanced(images, labels, n, seed):
    """Indices of n random images, the same number of each class as far as possible; 0: all. labels (N,) or None.

    Raises UserError if there are fewer than n.
    """
    check(n <= len(images), f"{n} images requested, only {len(images)} available")
    if n == 0:
        return np.arange(len(images))
    order = np.random.default_rng(seed).permutation(len(images))
    rank = ranks(np.zeros(len(images)) if labels is None else labels, order)
    return order[np.argsort(rank[order], kind="stable")][:n]


class Batches:
    """Training batches from uint8 images that stay on the device. Batch `step` is a pure function of (seed, step).

    images (N, H, W, C) uint8; labels (N,) or None; batch_size: images per step over all processes. Each epoch is a new
    order of all N. Augmentation: hflip mirrors half of the images; shift moves each by up to so many pixels along both
    axes, repeating the border; crop < 1 takes a random square of at least that share of the side and resizes it.
    """

    def __init__(self, images, labels, batch_size, seed, hflip=True, crop=1.0, shift=0, device="cpu"):
        check(0 < crop <= 1, f"crop: {crop} must be above 0 and at most 1")
        self.images = torch.tensor(np.ascontiguousarray(images)).to(device)
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64, device=device)
        self.batch_size, self.seed, self.hflip, self.crop = batch_size, seed, hflip, crop
        self.shift, self.device, self.epoch, self.order = shift, device, None, None

    def indices(self, step):
        """The images of a step, (batch_size,), on the CPU."""
        n, positions = len(self.images), np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = []
        for epoch in range(positions[0] // n, positions[-1] // n + 1):
            if epoch != self.epoch:
                self.epoch, self.order = epoch, torch.randperm(n, generator=make_generator(self.seed, epoch))
            chosen.append(self.order[positions[positions // n == epoch] % n])
        return torch.cat(chosen)

    def __call__(self, step, rows=slice(None)):
        """Rows of batch `step`: x0 (b, C, H, W) float32 in [-1, 1] and y (b,) int64 or None."""
        u = torch.rand((4, self.batch_size), generator=make_generator(self.seed, 2**31 + step))[:, rows]
        # non_blocking: on a GPU the copies do not wait for the work before them
        index, u = (v.to(self.device, non_blocking=self.images.is_cuda) for v in (self.indices(step)[rows], u))
        flip, scale, dx, dy = u
        x0 = to_float(self.flip_and_shift(index, flip < 0.5 * self.hflip, dx, dy))
        if self.crop < 1:
            scale = self.crop + (1 - self.crop) * scale
            offset_x, offset_y = ((2 * v - 1) * (1 - scale) for v in (dx, dy))
            zeros = torch.zeros_like(scale)
            theta = torch.stack([scale, zeros, offset_x, zeros, scale, offset_y], dim=1).reshape(-1, 2, 3)
            grid = F.affine_grid(theta, x0.shape, align_corners=False)
            edge = 1 - 1 / x0.shape[-1]  # repeats the border (padding_mode="border" is not on every device)
            x0 = F.grid_sample(x0, grid.clamp(-edge, edge), align_corners=False)
        return x0, None if self.labels is None else self.labels[index]

    def flip_and_shift(self, index, flip, dx, dy):
        """Images `index`, mirrored where flip is true and shifted by dx, dy in [0, 1): (b, H, W, C) uint8."""
        N, H, W, C = self.images.shape

        def shifted(n, d):  # positions 0..n-1 in the source, (b, n)
            offset = (d * (2 * self.shift + 1)).long()[:, None] - self.shift
            return (torch.arange(n, device=index.device) + offset).clamp(0, n - 1)

        rows, columns = shifted(H, dy), shifted(W, dx)
        columns = torch.where(flip[:, None], W - 1 - columns, columns)
        pixels = ((index * H)[:, None, None] + rows[:, :, None]) * W + columns[:, None, :]
        return self.images.view(N * H * W, C)[pixels]


# ---------------------------------------------------------------------------------------------------------------------
# images to look at


def tile(images, columns, titles=(), column_titles=(), zoom=2, pad=2):
    """(N, H, W, C) uint8 as one PIL image, row by row, with a title before each row and above equal parts of a row.

    Titles can be read where the image is shown 700 pixels wide, if those above the columns have the space.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows, (_, H, W, C) = -(-len(images) // columns), images.shape
    H, W, block = H * zoom, W * zoom, columns // max(1, len(column_titles))  # block: columns under one title
    size = max(12, columns * (W + pad) // 55)
    ends = [title.split("\n")[-1] for title in column_titles]
    longest = max([ImageFont.load_default(100).getlength(end) / 100 for end in ends], default=0)
    size = max(8, min(size, int(block * (W + pad) / longest))) if longest else size
    font = ImageFont.load_default(size)
    left = int(max(map(font.getlength, titles), default=0)) + (8 if titles else 0)
    lines = max((title.count("\n") + 1 for title in column_titles), default=0)
    top, gap = int(1.3 * size * lines), 8 if column_titles else 0
    x = [left + pad + j * (W + pad) + j // block * gap for j in range(columns)]
    y = [top + pad + i * (H + pad) for i in range(rows)]
    sheet = Image.new("RGB", (x[-1] + W + pad, y[-1] + H + pad), "white")
    for k, image in enumerate(np.asarray(images)):
        image = Image.fromarray(image[..., 0] if C == 1 else image).convert("RGB").resize((W, H), Image.NEAREST)
        sheet.paste(image, (x[k % columns], y[k // columns]))
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        draw.text((6, y[i] + (H - size) // 2), title, fill="black", font=font)
    for j, title in enumerate(column_titles):
        draw.text((x[j * block], 0), title, fill="black", font=font)
    return sheet
