"""data.py: shards, batches, what people have in their folders, downloads, and the errors of each."""

import gzip
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from conftest import flags, train_flags
from PIL import Image

import data
from ddpm import UserError, to_uint8

IMAGES = np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), dtype=np.uint8)


def write_fashion_mnist(root, n):
    """n images of each split as the idx files that the real set comes in; returns their pixels."""
    (raw := root / "FashionMNIST" / "raw").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return pixels


def write_flowers102(root, monkeypatch):
    """Two small jpg images for each of 102 classes and split, and the .mat files that the real set comes with."""
    from scipy.io import savemat

    folder, ids = root / "flowers-102", np.arange(1, 409)
    for i in ids:
        save_image(folder / "jpg" / f"image_{i:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": (ids - 1) % 102 + 1})
    first = ids[:204][np.argsort((ids[:204] - 1) % 102, kind="stable")]  # class by class, as in the real set
    savemat(folder / "setid.mat", {"trnid": first, "valid": first, "tstid": ids[204:]})
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)


def save_image(path, array=None, **how):
    """Saves an array or a PIL image, by default 8x8 noise that depends on the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(list(path.name.encode())).integers(0, 256, (8, 8, 3)) if array is None else array
    image = array if isinstance(array, Image.Image) else Image.fromarray(array.astype(np.uint8))
    image.save(path, **how)


def refusal(action, *args, **kwargs):
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError, match=r"\A.+\Z") as e:
        action(*args, **kwargs)
    return str(e.value)


def test_shards_in_several_files(tmp_path):
    folder, sorted_labels = tmp_path / "my_images_[1]", np.repeat(np.arange(4), 50)
    data.write_shards(folder, IMAGES[sorted_labels[:120]], sorted_labels[:120], ["a", "b", "c, d", "e"])
    np.save(folder / "images_00001.npy", np.asfortranarray(IMAGES[sorted_labels[120:]]))
    np.save(folder / "labels_00001.npy", sorted_labels[120:].astype(">i2"))
    images, labels, names = data.load(str(folder))
    assert np.array_equal(labels, sorted_labels) and np.array_equal(images, IMAGES[labels])
    kept, got, names = data.load(str(folder), classes=["c, d", "a"])
    assert np.array_equal(kept, images[labels % 2 == 0]) and names == ["c, d", "a"]
    assert np.array_equal(got, 1 - labels[labels % 2 == 0] // 2)
    os.remove(folder / "classes.json")
    assert data.load(str(folder))[2] == ["0", "1", "2", "3"]
    for images, labels in ((IMAGES / 255, None), (IMAGES, np.full(25, 256)), (IMAGES, np.full(25, -1))):
        assert "whole numbers from 0 to 255" in refusal(data.write_shards, tmp_path, images, labels, ["a"])


@pytest.mark.parametrize(
    "files,said",
    (
        (dict(labels_0=[0, np.nan]), "labels_0.npy: float64 (2,), expected a whole number for each of 2 images"),
        (dict(labels_0=[0, 1, 1]), "labels_0.npy: int64 (3,), expected a whole number for each of 2 images"),
        (dict(labels_0=[-1, 1]), "labels -1 to 1 do not fit 2"),
        (dict(labels_0=[0, 300_000_000]), "labels 0 to 300000000 do not fit 256"),
        (dict(labels_0=[0, 2], classes=["a", "b"]), "labels 0 to 2 do not fit 2"),
        (dict(classes=[*map(str, range(257))]), "do not fit 257 different names, at most 256"),
        (dict(classes=["a", "a"]), "do not fit 2 different names"),
        (dict(classes={"0": "a"}), "classes.json holds a dict, expected a list"),
        (dict(images_0=IMAGES[:0]), "images_0.npy: uint8 (0, 8, 8, 3), expected uint8 (N, H, W, 1 or 3)"),
        (dict(images_0=IMAGES[:2, :, :, [0, 1, 2, 2]]), "uint8 (2, 8, 8, 4), expected uint8 (N, H, W, 1 or 3)"),
        (dict(images_0=IMAGES[:2] / 255), "float64 (2, 8, 8, 3), expected uint8"),
        (dict(images_0=IMAGES[:2, 1:]), "images 7x8, expected squares of any size"),
        (dict(images_0=[None, {}]), "images_0.npy is missing, damaged or not an .npy file"),
        (dict(images_0=b"PK\5\6" + bytes(18)), "images_0.npy is missing, damaged or not"),  # an .npz archive
        (dict(images_0=b"\x93NUMPY\1\0\xff\xff" + bytes(2**16)), "is missing, damaged or not an .npy"),  # a long header
        (dict(images_1=IMAGES), "labels_1.npy is missing"),
        (dict(images_1=IMAGES[:, 1:, 1:]), "images_1.npy: uint8 (25, 7, 7, 3), expected"),
    ),
)
def test_shards_that_are_refused(files, said, tmp_path):
    files = dict(images_0=IMAGES[:2], labels_0=[0, 1]) | files
    if "classes" in files:
        data.save_json(tmp_path / "classes.json", files.pop("classes"))
    for name, content in files.items():
        np.save(tmp_path / f"{name}.npy", content)
        if isinstance(content, bytes):
            (tmp_path / f"{name}.npy").write_bytes(content)
    assert said in refusal(data.load, str(tmp_path))


def test_a_manifest_lists_every_shard(tmp_path):
    """A set of augment.py is read in its own order, and only if it is the one that was written."""
    data.write_shards(tmp_path, IMAGES, np.zeros(25), ["a"])
    data.save_json(tmp_path / "manifest.json", [1, 2])  # of another program
    assert len(data.load(str(tmp_path))[0]) == 25
    shards = {os.path.basename(path): data.file_hash(path) for path in data.shard_files(tmp_path)}
    for complete, listed, said in (
        (False, shards, "is not complete"),
        (True, list(shards), "is not complete"),
        (True, {}, "images_00000.npy, labels_00000.npy missing, or not listed"),
        (True, shards | {"images_00000.npy": "0"}, "images_00000.npy is not the file listed"),
    ):
        data.save_json(tmp_path / "manifest.json", dict(complete=complete, shards=listed))
        assert said in refusal(data.load, str(tmp_path))
    data.save_json(tmp_path / "manifest.json", dict(complete=True, shards=shards))
    assert np.array_equal(data.load(str(tmp_path))[0], IMAGES)
    for name in shards:
        (tmp_path / name).rename(tmp_path / "preview.png")  # which is never taken for the data set
    assert "images_00000.npy, labels_00000.npy missing" in refusal(data.load, str(tmp_path))


@pytest.mark.filterwarnings("ignore")  # Pillow's
def test_damaged_files_are_one_line_or_load(tmp_path):
    """330 files with a changed, cut or added part, and each bit of a header flipped: shards, JSON, images."""
    rng, loaded = np.random.default_rng(0), []

    def attempt(path, content):
        path.write_bytes(content)
        try:
            x, y, names = data.load(str(path.parent), data_dir=f"{tmp_path}/kept/{len(loaded)}", image_size=8)
            assert x.dtype == np.uint8 and x.shape[1:3] == (8, 8) and (y is None or y.max() < len(names))
            loaded.append(True)
        except UserError as e:
            assert len(str(e).splitlines()) == 1, (path, str(e))
            loaded.append(False)

    data.write_shards(tmp_path / "shards", IMAGES[:6], np.arange(6) % 3, ["a", "b", "c"])
    files = [tmp_path / "shards" / name for name in ("images_00000.npy", "labels_00000.npy", "classes.json")]
    files += [tmp_path / s / f"0.{s}" for s in ("16.png", "png", "jpg", "gif", "bmp", "webp", "tif", "ppm")]
    for path in files[3:]:
        save_image(path, IMAGES[0])
    save_image(files[3], Image.new("I;16", (8, 8), 999))
    contents = [path.read_bytes() for path in files]
    for k in range(330):
        path, whole = files[k % 11], contents[k % 11]
        where, more = int(rng.integers(len(whole))), rng.bytes(int(rng.integers(1, 40)))
        changed, added = (whole[:where] + part for part in (more[:1] + whole[where + 1 :], more + whole[where:]))
        attempt(path, (changed, whole[:where], added)[k % 3])
        path.write_bytes(whole)
    assert 100 < sum(loaded) < 230
    assert not any(loaded[k] for k in range(1, 330, 3) if k % 11 < 3)  # the cut ones of a shard
    files[1].unlink()
    for bit in range(contents[0].index(b"}") * 8):
        changed = bytearray(contents[0])
        changed[bit // 8] ^= 1 << bit % 8
        attempt(files[0], changed)


def test_splits_of_different_images_are_refused_before_any_work(tmp_path, fails):
    for split, size in (("train", 8), ("test", 16)):
        data.write_shards(tmp_path / "tiny" / split, np.zeros((20, size, size, 3)), np.zeros(20), ["a"])
    line = fails("train", *train_flags(tmp_path, tmp_path / "out"))
    assert "different shapes, ((8, 8, 3), (16, 16, 3))" in line and os.listdir(tmp_path / "out") == []
    data.write_shards(tmp_path / "tiny" / "test", np.zeros((20, 8, 8, 3)), np.zeros(20), ["b"])
    assert "different classes, ['a'] and ['b']" in refusal(data.load_splits, str(tmp_path / "tiny"))


def test_classes_by_name_or_number():
    names = ("cat", "frog", "1", "c. d")
    assert data.class_ids("frog, cat,3,1,cat", names) == [1, 0, 3, 2, 0]  # a name comes before a number
    for classes in ("²", "", "cat,", "-1", "4", "9" * 5000, ["0"], ["cat", "2"]):  # no numbers among names
        assert "unknown class" in refusal(data.class_ids, classes, names)
    assert "did you mean 'frog'?" in refusal(data.class_ids, "frogs", names)
    assert "names a class twice" in refusal(data.class_ids, "cat,0", names, unique=True)
    assert "no images of these classes" in refusal(data.select, IMAGES, np.zeros(25, np.int64), names, "frog")


def test_balanced_subsets_take_from_each_class():
    labels = np.repeat([0, 1, 2], [4, 10, 10])
    for n, counts in ((9, [3, 3, 3]), (20, [4, 8, 8]), (0, [4, 10, 10])):
        assert np.bincount(labels[data.balanced(labels, labels, n, 0)]).tolist() == counts
    assert len({tuple(sorted(data.balanced(labels, None, 6, seed))) for seed in range(5)}) == 5
    assert "25 images requested, only 24 available" in refusal(data.balanced, labels, labels, 25, 0)


def test_batches_are_a_function_of_seed_and_step():
    images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1).repeat(4, 1).repeat(4, 2)
    a, b, other = (data.Batches(images, np.arange(20), 8, seed) for seed in (1, 1, 2))
    forward = [a(s) for s in range(10)]
    backward = [b(s) for s in reversed(range(10))][::-1]
    assert all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(forward, backward))
    seen = torch.cat([y for _, y in forward])
    assert not torch.equal(torch.cat([other(s)[1] for s in range(10)]), seen)
    epochs = seen.view(4, 20)  # each with every image once, in another order
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in epochs) and not torch.equal(*epochs[:2])
    x, y = a(3)
    assert torch.equal(to_uint8(x)[:, 0, 0, 0].long(), y)  # images keep their labels
    assert torch.equal(torch.cat([a(3, slice(k, k + 4))[0] for k in (0, 4)]), x)


@pytest.mark.parametrize("hflip", (False, True))
def test_shifts_move_an_image_and_repeat_its_border(hflip):
    wide = np.pad(IMAGES[0], ((2, 2), (2, 2), (0, 0)), mode="edge")
    moved = {(dy, dx): wide[dy : dy + 8, dx : dx + 8] for dy in range(5) for dx in range(5)}
    batches, seen = data.Batches(np.asfortranarray(IMAGES[:1]), None, 400, seed=0, hflip=hflip, shift=2), []
    for x in to_uint8(batches(0)[0]).numpy():
        seen += [(key, f) for key, m in moved.items() for f in (0, 1) if np.array_equal(x, m[:, :: 1 - 2 * f])]
    assert len(seen) == 400 and len(set(seen)) == 25 * (1 + hflip)  # every shift in -2..2 along both axes
    assert 160 * hflip <= sum(f for _, f in seen) <= 240 * hflip


def test_crops_are_squares_of_random_size_and_place():
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))[None, :, :, None].repeat(400, 0)
    x, _ = data.Batches(ramp, None, 400, 0, hflip=False, crop=0.5)(0)
    span = (x[:, 0, 0, -1] - x[:, 0, 0, 0]) * 127.5 / 8 + 1  # in pixels of the source
    assert x.shape == (400, 1, 32, 32) and 15 < span.min() < 20 and 29 < span.max() < 33
    left = (x[:, 0, 0, 0] + 1) * 127.5 / 8  # from one border to the other
    place = (left / (32 - span).clamp(min=1))[span < 28]
    assert place.min() < 0.1 and place.max() > 0.9 and 0.4 < place.mean() < 0.6 and x.abs().max() <= 1


def test_shapes_are_ten_balanced_seeded_classes():
    images, labels, names = data.make_shapes(500, 3)
    assert images.dtype == np.uint8 and images.shape == (500, 32, 32, 3) and len(names) == 10
    assert np.array_equal(images, data.make_shapes(500, 3)[0]) and (np.bincount(labels) == 50).all()
    assert len(np.unique(images.reshape(500, -1), axis=0)) == 500
    means = np.stack([images[labels == k].mean((0, 3)) for k in range(10)])  # the classes differ in form
    assert min(np.abs(means[a] - means[b]).max() for a in range(10) for b in range(a)) > 10


def test_images_are_decoded_as_a_viewer_shows_them(tmp_path):
    files = []  # name, image, how it is saved, what is seen
    for orientation, (y, x) in enumerate(((0, 0), (0, 4), (4, 4), (4, 0)) * 2, start=1):
        stored, seen, exif = np.zeros((8, 8, 3)), np.zeros((8, 8, 3)), Image.Exif()
        stored[:4, :4] = seen[y : y + 4, x : x + 4] = 255  # where the white upper left quarter belongs
        exif[0x0112] = orientation
        files += [(f"{orientation}.png", stored, dict(exif=exif), seen)]
        files += [(f"{orientation}.jpg", stored, dict(exif=exif, quality=100, subsampling=0), seen)]
    deep = Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16))
    steps = np.linspace(0, 255, 64).reshape(8, 8, 1)
    files += [
        ("alpha.png", Image.new("RGBA", (8, 8), (255, 0, 0, 0)), {}, 255),
        ("half.png", Image.new("RGBA", (8, 8), (255, 0, 0, 127)), {}, np.array([255, 128, 128])),
        ("palette.gif", Image.new("P", (8, 8), 0), dict(transparency=0), 255),
        ("key.png", Image.new("RGB", (8, 8), "red"), dict(transparency=(255, 0, 0)), 255),
        ("16_bits.png", deep, {}, steps),
        ("16_bits.tif", deep, {}, steps),
        ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 0)), {}, 255),
        ("1_bit.png", Image.new("1", (8, 8), 1), {}, 255),
    ]
    for name, image, how, seen in files:
        save_image(tmp_path / name, image, **how)
        difference = data.decode_image(tmp_path / name, 8).astype(int) - seen
        assert np.abs(difference).max() <= (8 if "quality" in how else 1), name


def test_unreadable_images_are_named_in_one_line(tmp_path):
    bad = {
        "dangling.png": lambda p: p.symlink_to("nowhere"),
        "fifo.png": lambda p: os.mkfifo(p),
        "float.tif": lambda p: save_image(p, Image.new("F", (8, 8), 0.5)),
        "32_bits.tif": lambda p: save_image(p, Image.new("I", (8, 8), 200)),
        "cut.jpg": lambda p: (save_image(p), p.write_bytes(p.read_bytes()[:300])),
        "huge.gif": lambda p: (save_image(p), p.write_bytes(b"GIF89a" + b"\xff" * 4 + p.read_bytes()[10:])),
    }
    for k, (name, make) in enumerate(bad.items()):
        save_image(tmp_path / str(k) / "0.png")
        make(tmp_path / str(k) / name)
        said = refusal(data.load, f"{tmp_path}/{k}", "train", f"{tmp_path}/kept", 8)
        assert f"{k}/{name} is not a readable image" in said
    assert "0.png is not a readable image" in refusal(data.decode_image, tmp_path / "0" / "0.png", 2**32 - 1)


def test_a_folder_of_images(tmp_path):
    """Sub-folders of a class belong to it, a class may be a link, hidden names are nothing."""
    p, load = tmp_path / "p", lambda folder: data.load(f"{folder}/", "train", str(tmp_path / "kept"), 8)
    for name in ("bus/b.tif", "bus/more/c.jfif", "bus/more/d.PPM", "car/e.jpg", "car/f.png.gif"):
        save_image(p / name, format="JPEG" if name.endswith("jfif") else None)
    for name in (".ipynb_checkpoints/g.png", "car/._e.png", "car/.hidden/h.png", "i.png"):
        save_image(p / name)
    save_image(tmp_path / "vans" / "j.png")
    (p / "none").mkdir()
    (p / "manifest.json").write_text('{"name": "mine", "shards": 3}')  # of another program, as is
    np.save(p / "images_mean.npy", np.zeros(3))
    (p / "car" / "back").symlink_to("..")
    (p / "van").symlink_to("../vans")
    images, labels, names = load(p)
    assert images.shape == (6, 8, 8, 3) and names == ["bus", "car", "van"] and sorted(labels) == [0, 0, 0, 1, 1, 2]
    assert np.array_equal(load(p)[0], images) and len(os.listdir(tmp_path / "kept")) == 1
    save_image(tmp_path / "vans" / "j.png", np.zeros((9, 9, 3)))  # decoded again
    assert (load(p)[0] == 0).all(axis=(1, 2, 3)).sum() == 1
    assert load(tmp_path / "vans")[1:] == (None, []) and data.load(str(p), "test")[0] is None
    for target in ("/", "..", "."):
        (p / "back").symlink_to(target)
        assert f"{p}/back leads back" in refusal(load, p)
        (p / "back").unlink()
    save_image(p / "test" / "bus" / "k.png")
    assert "has test/, so the other images belong in train/" in refusal(load, p)
    save_image(p / "Train" / "bus" / "l.png")
    assert load(p)[2] == ["bus"] and len(data.load(str(p), "test", str(tmp_path / "kept"), 8)[0]) == 1
    assert "no images" in refusal(load, p / "none") and "neither a data set nor a folder" in refusal(load, p / "no")


@pytest.mark.parametrize("layout", (
    "Training/a Testing/a", "train/a train2/a", "train1 test1", "train test1", "train/a val/a", "train/a test/a Dev/a",
    "seg_train/a seg_test/a", "images_train images_test", "set/train/a set/test/a", "a/train a/test b/train",
    "Train_set/a test-set/a", "trainset testset", "Training PublicTest", "trainA testA", "train1 holdout",
    "seg_train/a seg_test/a seg_pred", "validation training", "cat dog val",
    "train/a/test train/b/test",
))  # fmt: skip
def test_folders_of_splits_are_not_taken_for_classes(layout, tmp_path):
    for name in layout.split():
        save_image(tmp_path / name / "1.png")
    assert "splits" in (line := refusal(data.load, str(tmp_path), "train", "kept", 8)) or "beside train" in line


def test_a_folder_says_what_was_understood(tmp_path, capsys):
    """Names that only resemble those of splits are classes; what is not used is named."""
    for name in "train/testtube/a train/station_train/b train/station_train/c test/testtube/d".split():
        save_image(tmp_path / f"{name}.png")
    for name in ("masks/e.txt", "train/notes.txt", "train/f.png"):
        os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
        (tmp_path / name).write_text("x")
    save_image(tmp_path / "train" / "f.png")
    images, labels, names = data.load(str(tmp_path), "train", str(tmp_path / "kept"), 8)
    assert names == ["station_train", "testtube"] and len(images) == 3
    line = capsys.readouterr().out.strip()
    assert "train: 3 images; station_train 2, testtube 1; not used: " in line and "\n" not in line
    assert set(line.split("not used: ")[1].split(", ")) == {"f.png", "notes.txt", "masks"}


@pytest.mark.parametrize("labels", (np.repeat(np.arange(5), 40), np.repeat(np.arange(3), (2, 3, 195)), None))
def test_any_part_of_the_fixed_order_has_every_class_in_its_share(labels):
    """It is the same order of the images, wherever they stand."""
    images = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 1))
    order, moved = data.fixed_order(images, labels), np.random.default_rng(1).permutation(200)
    assert np.array_equal(np.sort(order), np.arange(200)) and not np.array_equal(order, np.arange(200))
    again = data.fixed_order(images[moved], None if labels is None else labels[moved])
    assert np.array_equal(images[moved][again], images[order])
    if labels is not None:
        for part in np.array_split(order, 4):
            assert (abs(np.bincount(labels[part], minlength=labels.max() + 1) - np.bincount(labels) / 4) <= 1).all()


def test_the_training_images_have_every_class_or_it_is_named(tmp_path, fails):
    labels, names = np.repeat([0, 2], 20), ["ant", "bee", "cow"]
    images = np.zeros((40, 8, 8, 3), np.uint8)
    assert "no training images of bee" in refusal(data.training_part, images, labels, names, 0.1)
    assert "no training images of cow" in refusal(data.training_part, images, labels // 2, ["ant", "cow"], 0.1, 1)
    assert "leaves none" in refusal(data.training_part, images, labels, names, 0.001)
    data.write_shards(f"{tmp_path}/set", images, labels, names)
    for script in ("train", "gan"):
        assert "no training images of bee" in fails(script, *flags(dataset=f"{tmp_path}/set", out_dir=tmp_path))
        assert not (tmp_path / "config.json").exists()


def test_raw_files_may_be_packed_and_damaged_ones_are_said_to_be(tmp_path):
    pixels, raw = write_fashion_mnist(tmp_path, 20), tmp_path / "FashionMNIST" / "raw"
    whole = {path.name: path.read_bytes() for path in raw.iterdir()}
    for name, content in whole.items():
        (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        (raw / name).unlink()
    images, _, names = data.load("fashion_mnist", data_dir=str(tmp_path))
    assert np.array_equal(images[..., 0], pixels) and names[0] == "T-shirt/top"
    for name, content in whole.items():
        (raw / f"{name}.gz").unlink()
        (raw / name).write_bytes(content[: len(content) // 2])
    assert "damaged" in refusal(data.load, "fashion_mnist", "test", str(tmp_path))


def test_a_set_that_another_process_made_first_stays(tmp_path):
    """Of one that is given up, or cannot be made, nothing remains."""

    def make():
        data.write_shards(tmp_path / "set", IMAGES, None, [])  # the other process
        return 255 - IMAGES, None, []

    assert np.array_equal(data.read_shards(data.cached(f"{tmp_path}/set", make))[0], IMAGES)
    with pytest.raises(UserError):
        data.cached(f"{tmp_path}/other", lambda: (IMAGES / 255, None, []))
    assert os.listdir(tmp_path) == ["set"]


def test_cifar10_is_checked_and_then_not_downloaded(tmp_path, monkeypatch):
    kind, folder = torchvision.datasets.CIFAR10, tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    (folder / "b").write_bytes(pickle.dumps({"data": pixels, "labels": list(range(9, -1, -1))}))
    (folder / "m").write_bytes(pickle.dumps({"names": list("abcdefghij")}))
    meta = {"filename": "m", "key": "names", "md5": None}
    for key, value in dict(train_list=[["b", None]], test_list=[], meta=meta, url="file:///nowhere.tar.gz").items():
        monkeypatch.setattr(kind, key, value)
    images, labels, names = data.load("cifar10", data_dir=str(tmp_path))
    assert np.array_equal(images, pixels.reshape(10, 3, 32, 32).transpose(0, 2, 3, 1))
    assert labels.tolist() == list(range(9, -1, -1)) and names == list("abcdefghij")
    monkeypatch.setattr(kind, "test_list", [["b", "0" * 32]])  # a wrong checksum
    line = refusal(data.load, "cifar10", "test", str(tmp_path))
    assert all(part in line for part in ("download failed", "By hand", "cs.toronto.edu", "config/shapes.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name,size,n", (("fashion_mnist", 28, 4), ("flowers102", 64, 1), ("folder", 16, 20)))
def test_every_set_goes_through_all_scripts(name, size, n, tmp_path, monkeypatch, run):
    """From the files that the real sets come in, by their configs. Evaluation decodes at the size of the samples."""
    monkeypatch.chdir(tmp_path)
    if name == "fashion_mnist":
        write_fashion_mnist(tmp_path / "data", 100)
    elif name == "flowers102":
        write_flowers102(tmp_path / "data", monkeypatch)
        images, labels, _ = data.load(name)
        ids = np.array([k + 102 * i + 1 for k in range(102) for i in range(2)])
        assert np.array_equal(labels, (ids - 1) % 102)
        assert np.array_equal(images[5], data.decode_image(f"data/flowers-102/jpg/image_{ids[5]:05d}.jpg", 64))
    else:
        for path in (f"{kind}/{i}.png" for kind in ("left", "right") for i in range(40)):
            save_image(tmp_path / "images" / path)
    of = flags(dataset="images" if name == "folder" else name, out_dir="x")
    tiny = flags(ch=8, ch_mult="1,2", attn_resolutions=14 if size == 28 else size // 4, timesteps=10, max_iters=2)
    tiny += flags(image_size=size, batch_size=8, eval_interval=2, sample_interval=2, eval_images=8)
    run("train", f"config/{name}.py", *of, *tiny)
    run("sample", *flags(out_dir="x", steps=2, num_samples=2))
    run("augment", *flags(out_dir="x", steps=2, per_class=n))
    scores = run("evaluate", *of, *flags(n=40, resize=32))
    assert ("other half" in scores) == (name == "folder")  # which has no test split
