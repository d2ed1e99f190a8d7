"""Every data set as uint8 arrays, the shard format, and batches that are made on the device.

Pictures at rest are uint8 (N, H, W, C), labels uint8 (N,). A shard folder holds images_00000.npy, labels_00000.npy, … and
classes.json (a list of names), with train/ and test/ below it where it has both. Whatever was decoded or generated once
is kept in that form and memory-mapped from then on.
"""

import colorsys
import difflib
import glob
import hashlib
import json
import os
import shutil

import numpy as np
import torch
import torch.nn.functional as F

from ddpm import make_generator, to_float

TORCHVISION = {
    "cifar10": ("CIFAR10", 32, "cifar-10-batches-py, from https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "fashion_mnist": ("FashionMNIST", 28, "FashionMNIST/raw/*.gz, from github.com/zalandoresearch/fashion-mnist"),
    "flowers102": ("Flowers102", 64, "flowers-102/, from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")


class DataError(ValueError):
    """A data set that cannot be used: the text says where it was looked for and how to mend it."""

    one_line = True


# ---------------------------------------------------------------------------------------------------------------------
# shards


def save_array(path, array):
    """np.save, whole or not at all."""
    with open(f"{path}.tmp", "wb") as f:
        np.save(f, array)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def write_shards(folder, images, labels, class_names, shard_size=10000):
    """Writes images (N, H, W, C) and labels (N,), or None for pictures without classes, as uint8 shards."""
    os.makedirs(folder, exist_ok=True)
    for i, start in enumerate(range(0, len(images), shard_size)):
        if labels is not None:
            save_array(f"{folder}/labels_{i:05d}.npy", np.asarray(labels[start : start + shard_size], dtype=np.uint8))
        save_array(f"{folder}/images_{i:05d}.npy", np.asarray(images[start : start + shard_size], dtype=np.uint8))
    with open(f"{folder}/classes.json", "w", encoding="utf-8") as f:
        json.dump(list(class_names), f)


def has_shards(folder):
    return bool(glob.glob(f"{folder}/images_*.npy"))


def read_shards(folder):
    """Returns images (N, H, W, C) uint8 (memory-mapped if in one file), labels (N,) int64 or None, and class names.

    Raises DataError, naming the file, for one that is truncated, missing, of another shape, or badly labelled.
    """
    images, labels = [], []
    for path in sorted(glob.glob(f"{folder}/images_*.npy")):
        try:
            pictures = np.load(path, mmap_mode="r")
        except (ValueError, OSError, EOFError) as e:
            raise DataError(f"{path} is damaged or no .npy file ({e})") from None
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (images or [pictures])[0].shape[1:]:
            raise DataError(f"{path}: {pictures.dtype} {pictures.shape}, wanted uint8 (N, H, W, C), alike in all shards")
        images.append(pictures)
        beside = path.replace("images_", "labels_")
        if os.path.exists(beside):
            try:
                labels.append(np.load(beside).astype(np.int64))
            except (ValueError, OSError, EOFError) as e:
                raise DataError(f"{beside} is damaged or no .npy file ({e})") from None
            if labels[-1].shape != (len(pictures),):
                raise DataError(f"{beside}: labels {labels[-1].shape} for {len(pictures)} pictures")
    if not images:
        raise DataError(f"no images_*.npy in {folder}")
    if labels and len(labels) != len(images):
        raise DataError(f"{folder}: {len(images)} files of pictures, but {len(labels)} of labels")
    join = lambda arrays: arrays[0] if len(arrays) == 1 else np.concatenate(arrays)  # noqa: E731
    class_names = next((p for p in (f"{folder}/classes.json", f"{folder}/../classes.json") if os.path.exists(p)), None)
    y = join(labels) if labels else None
    if class_names:
        with open(class_names, encoding="utf-8") as f:
            class_names = json.load(f)
    else:
        class_names = [str(k) for k in range(int(y.max()) + 1)] if labels else []
    if y is not None and len(y) and y.max() >= len(class_names):
        raise DataError(f"{folder}: label {y.max()}, but classes.json names {len(class_names)} classes")
    return join(images), y, class_names


# ---------------------------------------------------------------------------------------------------------------------
# making the data sets


def draw_shapes(n, seed, size=32):
    """Ten classes of coloured shapes on dark grounds: (images (n, size, size, 3), labels (n,), names), uint8.

    Position, radius, hue (six, jittered), brightness and ground vary; a picture is one signed distance, antialiased.
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
        radius, box, diamond = np.hypot(x, y), np.maximum(abs(x), abs(y)), (abs(x) + abs(y)) / 2**0.5
        bar = 0.3 * r
        u, v = (x + y) / 2**0.5, (x - y) / 2**0.5  # the axes, turned by 45 degrees
        distances = [  # negative inside
            radius - r,
            abs(radius - 0.8 * r) - 0.24 * r,
            box - 0.85 * r,
            abs(box - 0.75 * r) - 0.22 * r,
            np.maximum((abs(x) * 2 - y - r) / 5**0.5, y - 0.75 * r),
            diamond - 0.72 * r,
            np.minimum(np.maximum(abs(x) - bar, abs(y) - r), np.maximum(abs(y) - bar, abs(x) - r)),
            np.minimum(np.maximum(abs(u) - bar, abs(v) - r), np.maximum(abs(v) - bar, abs(u) - r)),
            np.maximum(abs(abs(y) - 0.6 * r) - bar, abs(x) - 0.9 * r),
            np.maximum(abs(abs(x) - 0.6 * r) - bar, abs(y) - 0.9 * r),
        ]
        alpha = np.clip(0.5 - np.choose(k, [np.broadcast_to(d, (b, size, size)) for d in distances]), 0, 1)[..., None]
        colour = hues[rng.integers(6, size=b)] * rng.uniform(0.75, 1, (b, 1)) * rng.uniform(0.9, 1, (b, 3))
        ground = rng.uniform(0, 0.25, (b, 1, 1, 1)) * rng.uniform(0.8, 1, (b, 1, 1, 3))
        picture = alpha * colour[:, None, None] + (1 - alpha) * ground
        images[start : start + b] = np.round(255 * picture)
    return images, labels, names


def decode(path, size, channels=3):
    """A picture file as uint8 (size, size, channels): shorter side resized, centre cropped."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) if isinstance(path, str) else contextless(path) as picture:
            picture = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (size, size), Image.LANCZOS)
            return np.asarray(picture).reshape(size, size, channels)
    except (UnidentifiedImageError, OSError) as e:
        raise DataError(f"{path} is not a readable picture ({type(e).__name__})") from None
