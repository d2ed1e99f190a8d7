"""Every data set as uint8 arrays, the shard format, and batches that are made on the device.

Pictures at rest are uint8 (N, H, W, C), labels uint8 (N,). A shard folder holds images_00000.npy, labels_00000.npy, …
and classes.json (a list of names), with train/ and test/ below it where it has both. Whatever was decoded or
generated once is kept in that form and memory-mapped from then on.
"""

import colorsys
import contextlib
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
    "fashion_mnist": ("FashionMNIST", 28, "FashionMNIST/raw/*-ubyte (unpacked), from github.com/zalandoresearch"),
    "flowers102": ("Flowers102", 64, "flowers-102/, from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")


class DataError(ValueError):
    """A data set that cannot be used: the text says where it was looked for and how to mend it."""

    one_line = True


# ---------------------------------------------------------------------------------------------------------------------
# shards


@contextlib.contextmanager
def whole_file(path):
    """A file to write in, which takes its place when it is whole, or not at all."""
    with open(f"{path}.tmp", "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def save_array(path, array):
    """np.save, whole or not at all."""
    with whole_file(path) as f:
        np.save(f, array)


def save_json(path, content):
    """json.dump, whole or not at all."""
    with whole_file(path) as f:
        f.write(json.dumps(content, indent=1).encode())


def read_json(path):
    """json.load; raises DataError, naming the file, for one that is damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise DataError(f"{path} is damaged or no JSON file ({e})") from None


def fingerprint(images):
    """SHA-256 of pictures (N, H, W, C), in hex: tells whether two programs hold the same ones in the same order."""
    return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()


def file_hash(path):
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def load_array(path, **how):
    """np.load; raises DataError, naming the file, for one that is truncated or no .npy file."""
    try:
        return np.load(path, **how)
    except (ValueError, OSError, EOFError) as e:
        raise DataError(f"{path} is damaged or no .npy file ({e})") from None


def write_shards(folder, images, labels, class_names, shard_size=10000):
    """Writes images (N, H, W, C) and labels (N,), or None for pictures without classes, as uint8 shards."""
    os.makedirs(folder, exist_ok=True)
    for i, start in enumerate(range(0, len(images), shard_size)):
        part = slice(start, start + shard_size)
        write_shard(folder, i, images[part], None if labels is None else labels[part])
    save_json(f"{folder}/classes.json", list(class_names))


def write_shard(folder, i, images, labels):
    """Writes shard i, the labels first: where there are pictures, their labels are there."""
    if labels is not None:
        if np.max(labels, initial=0) > 255:
            raise DataError(
                f"{folder}: label {np.max(labels)}, but shards hold at most 256 classes: keep fewer with classes="
            )
        save_array(f"{folder}/labels_{i:05d}.npy", np.asarray(labels, dtype=np.uint8))
    save_array(f"{folder}/images_{i:05d}.npy", np.asarray(images, dtype=np.uint8))


def shard_files(folder):
    """The paths of all pictures and labels in a shard folder."""
    return sorted(p for kind in ("images", "labels") for p in glob.glob(f"{glob.escape(folder)}/{kind}_*.npy"))


def check_manifest(folder):
    """Raises DataError, naming the file, unless the shards are the ones that augment.py's manifest.json lists."""
    manifest = read_json(f"{folder}/manifest.json")
    if not {"complete", "settings", "shards"} <= manifest.keys():
        raise DataError(f"{folder}/manifest.json is not of augment.py's making")
    if not manifest["complete"]:
        raise DataError(f"{folder} is not complete: run augment.py again with the same settings, it goes on")
    for name, digest in manifest["shards"].items():
        path = f"{folder}/{name}"
        if not os.path.exists(path):
            raise DataError(f"{path} is missing, but manifest.json lists it: run augment.py again to make it anew")
        if file_hash(path) != digest:
            raise DataError(f"{path} is not the file that manifest.json lists: truncated, changed or from elsewhere")
    for path in shard_files(folder):
        if os.path.basename(path) not in manifest["shards"]:
            raise DataError(f"{path} is not in manifest.json: it is from elsewhere")


def has_shards(folder):
    return bool(glob.glob(f"{glob.escape(folder)}/images_*.npy"))


def read_shards(folder):
    """Returns images (N, H, W, C) uint8 (memory-mapped if in one file), labels (N,) int64 or None, and class names.

    Raises DataError, naming the file, for one that is truncated, missing, of another shape, or badly labelled.
    """
    images, labels = [], []
    if os.path.exists(f"{folder}/manifest.json"):
        check_manifest(folder)
    for path in sorted(glob.glob(f"{glob.escape(folder)}/images_*.npy")):
        pictures = load_array(path, mmap_mode="r")
        alike = pictures.shape[1:] == (images or [pictures])[0].shape[1:]
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or not alike:
            raise DataError(
                f"{path}: {pictures.dtype} {pictures.shape}, wanted uint8 (N, H, W, C), alike in all shards"
            )
        images.append(pictures)
        beside = os.path.join(folder, os.path.basename(path).replace("images_", "labels_"))
        if os.path.exists(beside):
            labels.append(load_array(beside).astype(np.int64))
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
        class_names = read_json(class_names)
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


def fit(picture, size):
    """A PIL picture as uint8 (size, size, 3): shorter side resized, centre cropped."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(picture.convert("RGB"), (size, size), Image.LANCZOS))


def read_pictures(folder, size):
    """Decodes a folder of pictures: (images, labels or None, names); its sub-folders with pictures are the classes."""
    from PIL import Image

    def pictures_in(path):
        return sorted(e.path for e in os.scandir(path) if e.name.lower().endswith(PICTURES))

    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and pictures_in(e.path))
    paths = [(p, k) for k, name in enumerate(names) for p in pictures_in(f"{folder}/{name}")]
    paths = paths or [(p, 0) for p in pictures_in(folder)]
    if not paths:
        raise DataError(f"no pictures ({' '.join(PICTURES)}) in {folder} or its sub-folders, and no images_*.npy")
    paths = shuffled(paths)
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for i, (path, _) in enumerate(paths):
        try:
            with Image.open(path) as picture:
                images[i] = fit(picture, size)
        except (OSError, SyntaxError) as e:
            raise DataError(f"{path} is not a readable picture ({type(e).__name__})") from None
    return images, np.array([k for _, k in paths]) if names else None, names


def shuffled(items):
    """The items in an order that is always the same, so that any slice of what came class by class has every class."""
    return [items[k] for k in np.random.default_rng(0).permutation(len(items))]


def download(dataset, data_dir, size):
    """Makes one of torchvision's data sets into shards; yields (split, images, labels, names)."""
    import torchvision

    kind, _, by_hand = TORCHVISION[dataset]
    for split in ("train", "test"):
        which = {"split": split} if dataset == "flowers102" else {"train": split == "train"}
        try:
            source = getattr(torchvision.datasets, kind)(data_dir, download=True, **which)
        except Exception as e:  # torchvision raises whatever its transport does
            raise DataError(
                f"{dataset} is not in {data_dir} and its download failed ({type(e).__name__}: {str(e)[:80]}). "
                f"By hand: put {by_hand} in {data_dir}. Without any download: `python train.py config/shapes.py`"
            ) from None
        if hasattr(source, "data"):
            images, labels = np.asarray(source.data), np.asarray(source.targets)
            images = images if images.ndim == 4 else images[..., None]
        else:
            order = shuffled(range(len(source)))
            images = np.stack([fit(source[k][0], size) for k in order])
            labels = np.asarray(source._labels)[order]
        names = getattr(source, "classes", None) or [str(k) for k in range(int(labels.max()) + 1)]
        yield split, images, labels, names


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load(dataset, split="train", data_dir="data", image_size=0, classes=""):
    """Loads one split of a data set: (images (N, H, W, C) uint8, labels (N,) int64 or None, class names).

    dataset: cifar10, fashion_mnist, flowers102, shapes, or a folder of pictures or of shards. image_size resizes
    pictures that are decoded here (0: the data set's own size, 64 for pictures of any size). classes='cat,frog'
    keeps those, in that order, as labels 0, 1. split 'test' gives None for images and labels
    where a data set has no such split.
    Raises DataError when the data cannot be found, downloaded or read, or a class is unknown.
    """
    if dataset in TORCHVISION or dataset == "shapes":
        own = 32 if dataset == "shapes" else TORCHVISION[dataset][1]
        size = image_size or own
        if size != own and dataset != "flowers102":
            raise DataError(f"image_size: {dataset} is {own}x{own}, not {size}: leave image_size out")
        root = os.path.join(data_dir, dataset if size == own else f"{dataset}-{size}")
        if not (has_shards(f"{root}/train") and has_shards(f"{root}/test")):
            if dataset == "shapes":
                made = [(name, *draw_shapes(n, seed)) for name, n, seed in (("test", 10000, 1), ("train", 50000, 0))]
            else:
                made = download(dataset, data_dir, size)
            for name, *content in made:
                keep(f"{root}/{name}", *content)
        split_folder = f"{root}/{split}"
    else:
        if not os.path.isdir(dataset):
            near = difflib.get_close_matches(dataset, [*TORCHVISION, "shapes"], n=1)
            also = f"; did you mean {near[0]!r}?" if near else f": {', '.join(TORCHVISION)}, shapes or a folder"
            raise DataError(f"dataset {dataset!r} is no data set and no folder{also}")
        splits = os.path.isdir(f"{dataset}/train")
        source = f"{dataset}/{split}" if splits else dataset
        if not os.path.isdir(source) or (split == "test" and not splits):
            return None, None, []
        split_folder = source
        if not has_shards(source) and not os.path.exists(f"{source}/manifest.json"):
            size = image_size or 64
            listing = sorted(
                (str(p), os.stat(p).st_mtime_ns) for p in glob.glob(f"{glob.escape(source)}/**", recursive=True)
            )
            key = hashlib.sha256(repr((os.path.abspath(source), size, listing)).encode()).hexdigest()[:12]
            split_folder = f"{data_dir}/{os.path.basename(os.path.abspath(source))}-{size}-{key}"
            if not has_shards(split_folder):
                keep(split_folder, *read_pictures(source, size))
    images, labels, names = read_shards(split_folder)
    if images.shape[1] != images.shape[2] or image_size not in (0, images.shape[1]):
        raise DataError(f"{split_folder}: pictures are {images.shape[1]}x{images.shape[2]}, wanted {image_size} square")
    return select(images, labels, names, classes)


def keep(folder, images, labels, names):
    """Writes shards beside their place and moves them there when they are whole; what others wrote meanwhile stays."""
    partial = f"{folder}.{os.getpid()}"
    try:
        write_shards(partial, images, labels, names, shard_size=max(1, len(images)))
        os.replace(partial, folder)
    except OSError as e:
        if not has_shards(folder):
            raise DataError(f"cannot keep {folder}: {e}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def class_ids(classes, names):
    """'cat,frog' or '3,6' (or a mix), or a list of names, as a list of labels; raises DataError for an unknown one."""
    ids = []
    for name in filter(None, map(str.strip, classes.split(","))) if isinstance(classes, str) else classes:
        if name in names:
            ids.append(list(names).index(name))
        elif name.isdigit() and int(name) < len(names):
            ids.append(int(name))
        else:
            near = difflib.get_close_matches(name, names, n=1)
            also = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'no classes'}"
            raise DataError(f"classes: unknown class {name!r}; {also}")
    return ids


def select(images, labels, names, classes):
    """Keeps the named classes ('' is all of them) and numbers them 0, 1, … in the given order."""
    if not classes:
        return images, labels, names
    ids = class_ids(classes, names)
    if len(set(ids)) < len(ids):
        raise DataError(f"classes={classes} names a class twice")
    if labels is None:
        raise DataError(f"classes={classes}: these pictures have no labels")
    renumbered = np.full(len(names), -1, dtype=np.int64)
    renumbered[ids] = np.arange(len(ids))
    kept = np.flatnonzero(renumbered[labels] >= 0)
    return images[kept], renumbered[labels[kept]], [names[k] for k in ids]


def training_count(n, val_fraction):
    """How many of n pictures are for training; the rest, the last ones, are for validation: the same for every seed.

    Raises DataError where val_fraction leaves none for validation.
    """
    n_val = int(n * val_fraction)
    if n_val == 0 and val_fraction > 0:
        raise DataError(f"val_fraction={val_fraction} of {n} pictures leaves none for validation")
    return n - n_val


def balanced(labels, n, seed):
    """n places in labels (N,), as many of each class as there can be, drawn with the seed; 0 is all of them.

    Raises DataError where there are fewer than n.
    """
    if n > len(labels):
        raise DataError(f"{n} pictures were asked for, but there are {len(labels)}")
    if n == 0:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # how many of its class came before, in this order
    for k in np.unique(labels):
        mine = order[labels[order] == k]
        turn[mine] = np.arange(len(mine))
    return order[np.argsort(turn[order], kind="stable")][:n]


class Batches:
    """Training batches from uint8 pictures that stay on the device. Batch `step` is a pure function of (seed, step).

    images (N, H, W, C) uint8; labels (N,) or None; batch_size counts the pictures of one step over all ranks. Each
    epoch is a new order of all N. hflip mirrors half of them; shift moves each by up to so many pixels along both
    axes, repeating the border; crop < 1 takes a random square of at least that share of the side and resizes it.
    """

    def __init__(self, images, labels, batch_size, seed, hflip=True, crop=1.0, shift=0, device="cpu"):
        self.images = torch.tensor(np.asarray(images)).to(device)
        self.labels = None if labels is None else torch.from_numpy(labels).to(device)
        self.batch_size, self.seed, self.hflip, self.crop = batch_size, seed, hflip, crop
        self.shift, self.device, self.epoch, self.order = shift, device, None, None

    def indices(self, step):
        """The pictures of a step, (batch_size,), on the CPU."""
        n, places = len(self.images), np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = []
        for epoch in range(places[0] // n, places[-1] // n + 1):
            if epoch != self.epoch:
                self.epoch, self.order = epoch, torch.randperm(n, generator=make_generator(self.seed, epoch))
            chosen.append(self.order[places[places // n == epoch] % n])
        return torch.cat(chosen)

    def __call__(self, step, rows=slice(None)):
        """The given rows of batch `step`: x0 (b, C, H, W) float32 in [-1, 1] and y (b,) int64 or None."""
        coins = torch.rand((4, self.batch_size), generator=make_generator(self.seed, 2**31 + step))[:, rows]
        # On a GPU the copies do not wait for the work before them.
        index, coins = (v.to(self.device, non_blocking=self.images.is_cuda) for v in (self.indices(step)[rows], coins))
        flip, scale, dx, dy = coins
        x0 = to_float(self.moved(index, flip < 0.5, dx, dy))
        if self.crop < 1:
            scale = self.crop + (1 - self.crop) * scale
            shift = lambda u: (2 * u - 1) * (1 - scale)  # noqa: E731
            zeros = torch.zeros_like(scale)
            theta = torch.stack([scale, zeros, shift(dx), zeros, scale, shift(dy)], dim=1).reshape(-1, 2, 3)
            grid = F.affine_grid(theta, x0.shape, align_corners=False)
            edge = 1 - 1 / x0.shape[-1]  # the border is repeated outside (in a way that every device can)
            x0 = F.grid_sample(x0, grid.clamp(-edge, edge), align_corners=False)
        return x0, None if self.labels is None else self.labels[index]

    def moved(self, index, flip, dx, dy):
        """The pictures `index`, mirrored where flip says so and shifted by dx, dy in [0, 1): (b, H, W, C) uint8."""
        N, H, W, C = self.images.shape
        if not (self.hflip or self.shift):
            return self.images[index]
        offset = lambda u: (u * (2 * self.shift + 1)).long()[:, None] - self.shift  # noqa: E731
        rows = (torch.arange(H, device=index.device) + offset(dy)).clamp(0, H - 1)  # (b, H)
        columns = (torch.arange(W, device=index.device) + offset(dx)).clamp(0, W - 1)  # (b, W)
        if self.hflip:
            columns = torch.where(flip[:, None], W - 1 - columns, columns)
        places = (index * H)[:, None, None] + rows[:, :, None]
        return self.images.view(N * H * W, C)[places * W + columns[:, None, :]]


# ---------------------------------------------------------------------------------------------------------------------
# pictures to look at


def tile(images, columns, titles=(), zoom=2, pad=2):
    """One PIL picture of (N, H, W, C) uint8 pictures, row by row, with a title before each row."""
    from PIL import Image, ImageDraw

    rows, (_, H, W, C) = -(-len(images) // columns), images.shape
    margin = max((7 * len(t) for t in titles), default=0) + (8 if titles else 0)
    H, W = H * zoom, W * zoom
    sheet = Image.new("RGB", (margin + columns * (W + pad) + pad, rows * (H + pad) + pad), "white")
    for i, image in enumerate(np.asarray(images)):
        picture = Image.fromarray(image[..., 0] if C == 1 else image).convert("RGB").resize((W, H), Image.NEAREST)
        sheet.paste(picture, (margin + pad + i % columns * (W + pad), pad + i // columns * (H + pad)))
    for row, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((6, pad + row * (H + pad) + H // 2 - 6), title, fill="black")
    return sheet
