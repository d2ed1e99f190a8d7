"""Data sets as uint8 arrays, the shard format, and training batches that are made on the device.

Images at rest are uint8 (N, H, W, C), labels uint8 (N,). A shard folder holds images_00000.npy, labels_00000.npy, …
and classes.json (a list of names), in train/ and test/ where there are both splits. Whatever was downloaded, decoded
or generated is cached in that form and memory-mapped from then on.
"""

import collections
import colorsys
import difflib
import glob
import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F

from ddpm import UserError, atomic_write, make_generator, to_float

TORCHVISION = {  # class, image size, how to place the files by hand
    "cifar10": ("CIFAR10", 32, "cifar-10-batches-py, from https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "fashion_mnist": ("FashionMNIST", 28, "FashionMNIST/raw/*-ubyte (unpacked), from github.com/zalandoresearch"),
    "flowers102": ("Flowers102", 64, "flowers-102/, from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
}
IMAGE_TYPES = tuple(
    ".png .apng .jpg .jpeg .jpe .jfif .bmp .dib .webp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .tga .avif".split()
)
SPLITS = ("train", "test", "val", "valid", "validation")  # the last three are not used
DECODING = 2  # version of what decode_image makes of a file: raised when that changes, so that no cache is out of date


# ---------------------------------------------------------------------------------------------------------------------
# files


def save_json(path, content):
    """Writes JSON. NaN and infinities, which JSON does not have, become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    with atomic_write(path) as f:
        f.write(json.dumps(content, indent=1).encode())


def read_json(path, kind=dict):
    """json.load. Raises UserError for a damaged file, or if its content is not of the given kind."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged or not JSON ({e})") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


def load_array(path, mmap=False):
    """The array of an .npy file, memory-mapped or not. Raises UserError for a damaged file."""
    try:
        array = np.load(path, mmap_mode="r")
        if array.offset + array.nbytes != os.path.getsize(path):
            raise ValueError("its size does not fit its header")
    except Exception as e:  # of a damaged header: whatever Python's parser raises
        raise UserError(f"{path} is damaged or not an .npy file ({e})") from None
    return array if mmap else np.array(array)


def file_hash(path):
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def fingerprint(images):
    """SHA-256 of images (N, H, W, C), in hex: equal for the same images in the same order."""
    return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# shards


def write_shard(folder, i, images, labels):
    """Writes shard i, uint8. Labels come first, so that no images are without theirs. labels None: no classes."""
    if labels is not None and np.max(labels, initial=0) > 255:
        raise UserError(f"{folder}: label {np.max(labels)}, but a shard holds at most 256 classes: use --classes")
    for kind, array in (("labels", labels), ("images", images)):
        if array is not None:
            with atomic_write(f"{folder}/{kind}_{i:05d}.npy") as f:
                np.save(f, np.asarray(array, dtype=np.uint8))


def write_shards(folder, images, labels, class_names, shard_size=10000):
    """Writes images (N, H, W, C) and labels (N,) or None as a shard folder."""
    os.makedirs(folder, exist_ok=True)
    for i, start in enumerate(range(0, len(images), shard_size)):
        part = slice(start, start + shard_size)
        write_shard(folder, i, images[part], None if labels is None else labels[part])
    save_json(f"{folder}/classes.json", list(class_names))


def shard_files(folder, kind="*"):
    """The sorted paths of the images_*.npy and labels_*.npy of a folder, or of one kind."""
    paths = glob.glob(f"{glob.escape(folder)}/{kind}_*.npy")
    return sorted(p for p in paths if os.path.basename(p).startswith(("images_", "labels_")))


def check_manifest(folder, allow_missing=False):
    """Raises UserError unless the shards are those that augment.py listed in manifest.json."""
    manifest = read_json(f"{folder}/manifest.json")
    shards = manifest.get("shards")
    if not ({"complete", "settings"} <= manifest.keys() and isinstance(shards, dict)):
        raise UserError(f"{folder}/manifest.json was not written by augment.py")
    if manifest["complete"] is not True:
        raise UserError(f"{folder} is not complete: run augment.py again with the same settings to finish it")
    for name, digest in shards.items():
        path = f"{folder}/{os.path.basename(name)}"
        if not os.path.exists(path):
            if allow_missing:
                continue
            raise UserError(f"{path} is listed in manifest.json but missing: run augment.py again to restore it")
        if file_hash(path) != digest:
            raise UserError(f"{path} is not the file listed in manifest.json: it was truncated or changed")
    for path in shard_files(folder):
        if os.path.basename(path) not in shards:
            raise UserError(f"{path} is not listed in manifest.json")


def read_shards(folder):
    """Returns images (N, H, W, C) uint8 (memory-mapped if one file), labels (N,) int64 or None, and class names.

    Raises UserError, naming the file, if one is damaged, missing, of another shape or badly labelled.
    """
    if os.path.exists(f"{folder}/manifest.json"):
        check_manifest(folder)
    images, labels = [], []
    for path in shard_files(folder, "images"):
        images.append(load_array(path, mmap=True))
        shape, dtype = images[-1].shape, images[-1].dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or shape[1:] != images[0].shape[1:]:
            raise UserError(f"{path}: {dtype} {shape}, expected uint8 (N, H, W, 1 or 3), alike in all shards")
        label_path = os.path.join(folder, os.path.basename(path).replace("images_", "labels_"))
        if os.path.exists(label_path):
            labels.append(load_array(label_path))
            if labels[-1].shape != shape[:1] or labels[-1].dtype.kind not in "ui":
                raise UserError(
                    f"{label_path}: {labels[-1].dtype} {labels[-1].shape}, expected a whole number for each of "
                    f"{shape[0]} images"
                )
    if not sum(map(len, images)):
        raise UserError(f"no images in {folder}/images_*.npy")
    if labels and len(labels) != len(images):
        raise UserError(f"{folder}: {len(images)} files of images, but {len(labels)} of labels")
    images = np.concatenate(images) if len(images) > 1 else np.require(images[0], requirements="C")
    names_path = next((p for p in (f"{folder}/classes.json", f"{folder}/../classes.json") if os.path.exists(p)), None)
    names = read_json(names_path, list) if names_path else None
    if names is not None and (not all(type(name) is str for name in names) or len(set(names)) < len(names)):
        raise UserError(f"{names_path}: expected a list of names that differ")
    if not labels:
        return images, None, names or []
    labels = np.concatenate(labels)
    low, high = int(labels.min()), int(labels.max())
    names = [str(k) for k in range(high + 1)] if names is None else names
    if low < 0 or high >= len(names):
        raise UserError(f"{folder}: labels run from {low} to {high}, but there are {len(names)} classes")
    return images, labels.astype(np.int64), names


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


def decode_image(image, size):
    """A PIL image as uint8 (size, size, 3), as a viewer shows it on white; its shorter side is resized to `size`, and
    the centre is cropped.
    """
    from PIL import Image, ImageOps

    with suppress(Exception):  # damaged EXIF data
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # more than 8 bits for each pixel
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not (0 <= low and high <= (255 if image.mode == "F" else 65535)):
            raise ValueError(f"mode {image.mode}, values {low} to {high}: convert it to 8 or 16 bits")
        if high > 255 or image.mode.startswith("I;16"):
            values = values // 257
        image = Image.fromarray(values.astype(np.uint8))
    if "transparency" in image.info or image.mode[-1] in "Aa":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.LANCZOS))


def shuffled(items):
    """The items in a fixed random order, so that any slice of a set that is sorted by class has every class."""
    return [items[k] for k in np.random.default_rng(0).permutation(len(items))]


def visible(folder):
    """The entries of a folder, sorted by name, but for hidden ones."""
    return sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)


def files_below(folder, ancestors=()):
    """The sorted paths of all files in a folder and its sub-folders, but for hidden names and links that lead back."""
    ancestors, found = (*ancestors, os.path.realpath(folder)), []
    for entry in visible(folder):
        if not entry.is_dir():
            found.append(entry.path)
        elif not any(a == (real := os.path.realpath(entry)) or a.startswith(f"{real}{os.sep}") for a in ancestors):
            found += files_below(entry.path, ancestors)
    return found


def only_images(paths):
    return [p for p in paths if p.lower().endswith(IMAGE_TYPES)]


def list_images(folder):
    """The images of a folder, its sub-folders being the classes: ([(path, label or None)], names, what is not used).

    Sub-folders of a class belong to it. Without classes, all images are listed. Raises UserError if the classes seem
    to lie one level deeper.
    """
    files = files_below(folder)
    images = only_images(files)
    others = collections.Counter(f"*{os.path.splitext(p)[1].lower()}" for p in set(files) - set(images))
    unused = [f"{n} {kind}" for kind, n in sorted(others.items())]
    parts = {p: os.path.relpath(p, folder).split(os.sep) for p in images}
    listed = [p for p in images if len(parts[p]) > 1]
    names = sorted({parts[p][0] for p in listed})
    if len(names) == 1 and len({parts[p][1] for p in listed if len(parts[p]) > 2}) > 1:
        raise UserError(f"{folder} has one sub-folder with images, {names[0]}/, which has several: give {names[0]}")
    if not names:
        return [(p, None) for p in images], names, unused
    if len(images) > len(listed):
        unused.append(f"{len(images) - len(listed)} images beside the classes")
    unused += [f"{e.name}/ without images" for e in visible(folder) if e.is_dir() and e.name not in names]
    return [(p, names.index(parts[p][0])) for p in listed], names, unused


def decode_folder(folder, size):
    """Decodes the images of a folder: (images, labels or None, names). See list_images."""
    from PIL import Image

    listed, names, unused = list_images(folder)
    if not listed:
        raise UserError(f"no images ({' '.join(IMAGE_TYPES)}) in {folder} or its sub-folders, and no images_*.npy")
    if unused:
        print(f"{folder}: not used: {', '.join(unused)}", file=sys.stderr)
    listed = shuffled(listed)
    images = np.empty((len(listed), size, size, 3), dtype=np.uint8)
    for i, (path, _) in enumerate(listed):
        try:
            if not os.path.isfile(path):
                raise FileNotFoundError("no such file")
            with Image.open(path) as image:
                images[i] = decode_image(image, size)
        except Exception as e:  # Pillow raises many kinds
            raise UserError(f"{path} is not a readable image ({type(e).__name__}: {str(e)[:80]})") from None
    return images, np.array([k for _, k in listed]) if names else None, names


def download(dataset, data_dir, split, size):
    """One split of a torchvision data set, downloaded unless its files are there: (images, labels, names)."""
    import torchvision

    if dataset == "flowers102" and not find_spec("scipy"):
        raise UserError("flowers102 needs `pip install '.[flowers]'`")
    kind, _, by_hand = TORCHVISION[dataset]
    which = {"split": split} if dataset == "flowers102" else {"train": split == "train"}
    try:
        source = getattr(torchvision.datasets, kind)(data_dir, download=True, **which)
    except Exception as e:  # torchvision raises whatever its transport does
        raise UserError(
            f"{dataset} is not in {data_dir} and its download failed ({type(e).__name__}: {str(e)[:80]}). "
            f"By hand: put {by_hand} in {data_dir}. Without a download: `python train.py config/shapes.py`"
        ) from None
    if dataset == "flowers102":  # jpg files, sorted by class
        order = shuffled(range(len(source)))
        images = np.stack([decode_image(source[k][0], size) for k in order])
        labels = np.asarray(source._labels)[order]
    else:
        images, labels = np.asarray(source.data), np.asarray(source.targets)
        images = images if images.ndim == 4 else images[..., None]
    return images, labels, getattr(source, "classes", None) or [str(k) for k in range(int(labels.max()) + 1)]


def cache(folder, images, labels, names):
    """Writes one shard to a temporary folder, then renames it. If another process was faster, its copy is used."""
    partial = f"{folder}.{os.getpid()}"
    try:
        write_shards(partial, images, labels, names, shard_size=max(1, len(images)))
        os.replace(partial, folder)
    except OSError as e:
        if not shard_files(folder, "images"):
            raise UserError(f"cannot write {folder}: {e}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load(dataset, split="train", data_dir="data", image_size=0, classes=""):
    """Loads one split of a data set: (images (N, H, W, C) uint8, labels (N,) int64 or None, class names).

    dataset: cifar10, fashion_mnist, flowers102, shapes, or a folder of images or shards. image_size: side to which
    images of any size are resized (0: 64), or the data set's own. classes: 'cat,frog' keeps these, as labels 0, 1.
    A data set without a test split gives (None, None, []) for it.
    Raises UserError if the data cannot be found, downloaded or read, or a class is unknown.
    """
    if dataset in TORCHVISION or dataset == "shapes":
        folder = builtin_folder(dataset, split, data_dir, image_size)
    elif os.path.isdir(dataset):
        folder = user_folder(dataset, split, data_dir, image_size)
    else:
        near = difflib.get_close_matches(dataset, [*TORCHVISION, "shapes"], n=1)
        also = f"did you mean {near[0]!r}?" if near else f"use {', '.join(TORCHVISION)}, shapes or a folder"
        raise UserError(f"dataset {dataset!r} is neither a data set nor a folder: {also}")
    if folder is None:
        return None, None, []
    images, labels, names = read_shards(folder)
    if images.shape[1] != images.shape[2] or image_size not in (0, images.shape[1]):
        raise UserError(
            f"{folder}: images are {images.shape[1]}x{images.shape[2]}, expected squares of {image_size or 'any size'}"
        )
    return select(images, labels, names, classes)


def builtin_folder(dataset, split, data_dir, image_size):
    """The shard folder of a data set that has a name, made if it is not there."""
    own_size = 32 if dataset == "shapes" else TORCHVISION[dataset][1]
    size = image_size or own_size
    if size != own_size and dataset != "flowers102":
        raise UserError(f"{dataset} is {own_size}x{own_size}, but image_size, or the model of init_from, is {size}")
    root = os.path.join(data_dir, dataset if size == own_size else f"{dataset}-{size}")
    for name, n, seed in (("train", 50000, 0), ("test", 10000, 1)):
        if shard_files(f"{root}/{name}", "images"):
            continue
        content = make_shapes(n, seed) if dataset == "shapes" else download(dataset, data_dir, name, size)
        cache(f"{root}/{name}", *content)
    return f"{root}/{split}"


def user_folder(dataset, split, data_dir, image_size):
    """The shard folder of a user's folder of shards or images, or None if it has no such split."""
    entries = visible(dataset)
    folders = {e.name.lower(): e.name for e in entries if e.is_dir()}
    # `train` is a class if folders with other names have images too
    others = folders.keys() - set(SPLITS) if "train" in folders else ()
    classes = [k for k in sorted(others) if only_images(files_below(f"{dataset}/{folders[k]}"))]
    has_splits = "train" in folders and not classes
    if "test" in folders and classes:
        print(f"{dataset}: train and test are taken for classes, like {folders[classes[0]]}", file=sys.stderr)
    if split not in folders if has_splits else split == "test":
        return None
    source = f"{dataset}/{folders[split]}" if has_splits else dataset
    if shard_files(source, "images") or os.path.exists(f"{source}/manifest.json"):
        return source
    size, listing = image_size or 64, []
    for path in files_below(source):
        stat = os.stat(path, follow_symlinks=os.path.exists(path))
        listing.append((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    key = hashlib.sha256(repr((DECODING, os.path.abspath(source), size, listing)).encode()).hexdigest()[:12]
    folder = f"{data_dir}/{os.path.basename(os.path.abspath(source))}-{size}-{key}"
    if not shard_files(folder, "images"):
        beside = [e.name for e in entries if e.name.lower() not in ("train", "test", "classes.json")]
        if has_splits and beside:
            print(f"{dataset}: not used: {', '.join(beside[:9])}{', …' if beside[9:] else ''}", file=sys.stderr)
        cache(folder, *decode_folder(source, size))
    return folder


def load_splits(dataset, data_dir="data", image_size=0, classes=""):
    """Both splits: ((images, labels), (test images, test labels), names). See load. The test pair may be (None, None).

    Raises UserError if their classes differ.
    """
    *train, names = load(dataset, "train", data_dir, image_size, classes)
    *test, test_names = load(dataset, "test", data_dir, image_size, classes)
    if train[0] is None:
        raise UserError(f"{dataset} has no training split")
    if test[0] is not None and (names != test_names or (train[1] is None) != (test[1] is None)):
        raise UserError(f"{dataset}: the splits have different classes, {names} and {test_names}: use --classes")
    if train[1] is not None and (missing := missing_classes(train[1], names)):
        print(f"warning: no training images of {', '.join(missing)}", file=sys.stderr)
    return train, test, names


def missing_classes(labels, names):
    """The names of the classes that no label is of."""
    return [names[k] for k in sorted(set(range(len(names))) - set(labels.tolist()))]


def load_samples(folder, like, names, data_dir="data"):
    """Generated images of a folder, to compare with real images `like` (N, H, W, C): (images, labels or None).

    Labels are renumbered to fit names. Raises UserError if the size differs or a class has no images.
    """
    if not os.path.isdir(folder):
        raise UserError(f"no images in {folder}: make them with `python augment.py`, or name another folder")
    images, labels, own_names = load(os.path.abspath(folder), "train", data_dir, like.shape[1])
    if labels is not None and names:
        images, labels, _ = select(images, labels, own_names, names)
        if missing := missing_classes(labels, names):
            raise UserError(f"{folder}: no images of {', '.join(missing)}: use --classes")
    return images, labels


def class_ids(classes, names, unique=False):
    """'cat,frog' or '3,6' or a list of names -> a list of labels. Raises UserError for an unknown class.

    unique: also for a repeated one, or none.
    """
    ids = []
    for name in filter(None, map(str.strip, classes.split(","))) if isinstance(classes, str) else classes:
        if name in names:
            ids.append(list(names).index(name))
        elif name.isdigit() and int(name) < len(names):
            ids.append(int(name))
        else:
            near = difflib.get_close_matches(name, names, n=1)
            also = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'no classes'}"
            raise UserError(f"classes: unknown class {name!r}: {also}")
    if unique and (not ids or len(set(ids)) < len(ids)):
        raise UserError(f"classes={classes} names a class twice, or none")
    return ids


def select(images, labels, names, classes):
    """Keeps the given classes ('': all), renumbered 0, 1, … in that order."""
    if not classes:
        return images, labels, names
    ids = class_ids(classes, names, unique=True)
    if labels is None:
        raise UserError(f"classes={classes}: these images have no labels")
    new = np.full(len(names), -1, dtype=np.int64)
    new[ids] = np.arange(len(ids))
    kept = np.flatnonzero(new[labels] >= 0)
    return images[kept], new[labels[kept]], [names[k] for k in ids]


def training_count(n, val_fraction):
    """How many of n images are for training. The last ones are for validation, the same for every seed.

    Raises UserError if val_fraction leaves none for validation.
    """
    n_val = int(n * val_fraction)
    if n_val == 0 and val_fraction > 0:
        raise UserError(f"val_fraction={val_fraction} of {n} images leaves none for validation")
    return n - n_val


def balanced(labels, n, seed):
    """Indices of n random images, the same number of each class as far as possible; 0: all. labels (N,).

    Raises UserError if there are fewer than n.
    """
    if n > len(labels):
        raise UserError(f"{n} images requested, only {len(labels)} available")
    if n == 0:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)  # how many of its class come before, in this order
    for k in np.unique(labels):
        mine = order[labels[order] == k]
        rank[mine] = np.arange(len(mine))
    return order[np.argsort(rank[order], kind="stable")][:n]


def seen_indices(trained_on, images, labels):
    """Indices of the n_real images that train.py took, by their hash in trained_on; empty if it took others.

    images, labels: the training split without the validation images; labels may be None.
    """
    if trained_on["n_real"] > len(images):
        return np.arange(0)
    index = balanced(np.zeros(len(images)) if labels is None else labels, trained_on["n_real"], 0)
    return index if fingerprint(images[index]) == trained_on["training"] else np.arange(0)


class Batches:
    """Training batches from uint8 images that stay on the device. Batch `step` is a pure function of (seed, step).

    images (N, H, W, C) uint8; labels (N,) or None; batch_size: images per step over all processes. Each epoch is a new
    order of all N. Augmentation: hflip mirrors half of the images; shift moves each by up to so many pixels along both
    axes, repeating the border; crop < 1 takes a random square of at least that share of the side and resizes it.
    """

    def __init__(self, images, labels, batch_size, seed, hflip=True, crop=1.0, shift=0, device="cpu"):
        self.images = torch.tensor(np.asarray(images)).to(device)
        self.labels = None if labels is None else torch.from_numpy(labels).to(device)
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
        x0 = to_float(self.flip_and_shift(index, flip < 0.5, dx, dy))
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
        if not (self.hflip or self.shift):
            return self.images[index]

        def shifted(n, d):  # positions 0..n-1 in the source, (b, n)
            offset = (d * (2 * self.shift + 1)).long()[:, None] - self.shift
            return (torch.arange(n, device=index.device) + offset).clamp(0, n - 1)

        rows, columns = shifted(H, dy), shifted(W, dx)
        if self.hflip:
            columns = torch.where(flip[:, None], W - 1 - columns, columns)
        pixels = ((index * H)[:, None, None] + rows[:, :, None]) * W + columns[:, None, :]
        return self.images.view(N * H * W, C)[pixels]


# ---------------------------------------------------------------------------------------------------------------------
# images to look at


def tile(images, columns, titles=(), column_titles=(), zoom=2, pad=2):
    """(N, H, W, C) uint8 as one PIL image, row by row, with a title before each row and above equal parts of a row."""
    from PIL import Image, ImageDraw

    rows, (_, H, W, C) = -(-len(images) // columns), images.shape
    H, W, block = H * zoom, W * zoom, columns // max(1, len(column_titles))  # block: columns under one title
    left = max((7 * len(t) for t in titles), default=0) + (8 if titles else 0)
    top, gap = (18, 8) if column_titles else (0, 0)
    x = [left + pad + j * (W + pad) + j // block * gap for j in range(columns)]
    y = [top + pad + i * (H + pad) for i in range(rows)]
    sheet = Image.new("RGB", (x[-1] + W + pad, y[-1] + H + pad), "white")
    for k, image in enumerate(np.asarray(images)):
        image = Image.fromarray(image[..., 0] if C == 1 else image).convert("RGB").resize((W, H), Image.NEAREST)
        sheet.paste(image, (x[k % columns], y[k // columns]))
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        draw.text((6, y[i] + H // 2 - 6), title, fill="black")
    for j, title in enumerate(column_titles):
        draw.text((x[j * block], 3), title, fill="black")
    return sheet
