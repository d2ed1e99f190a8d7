"""augment.py: balanced shards, the same bytes however they came about, and what is refused."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import augment_flags, contents, cut_off, train_flags
from PIL import Image

import data
import ddpm

NAMES = ["airplane", "automobile", "bird"]


def test_a_set_is_balanced_and_says_how_it_was_made(trained, synthetic, tmp_path, run):
    """Image k has noise k of the seed, in batches of any size up to the rounding of sums."""
    images, labels, names = data.load(synthetic)
    assert images.shape == (21, 8, 8, 3) and images.dtype == np.uint8 and names == NAMES
    assert labels.tolist() == 7 * [0, 1, 2]
    assert len(contents(synthetic)) == 2 * 4 and len(np.unique(images, axis=0)) == 21
    manifest = data.read_json(f"{synthetic}/manifest.json")
    expected = dict(w=1.0, interval=[0.25, 4.0], sampler="dpm++", steps=3, seed=0, per_class=7, classes=NAMES)
    assert expected.items() <= manifest["settings"].items() and manifest["complete"] and manifest["step"] == 6
    assert manifest["trained_on"]["val_fraction"] == 0.1
    assert Image.open(f"{synthetic}/preview.png").height == 3 * 18 + 2  # a row for each class
    model, _ = ddpm.load_model(f"{trained}/ckpt.pt")
    y, ddim = torch.tensor(labels), dict(sampler="ddim", eta=0.5)
    run("augment", *augment_flags(trained, tmp_path, **ddim))
    for made, sampler in ((images, dict(sampler="dpm++")), (data.load(str(tmp_path))[0], ddim)):
        how = dict(indices=range(21), steps=3, interval=(0.25, 4.0)) | sampler
        guided, unguided = (ddpm.to_uint8(model.sample(y, w, 0, **how)).numpy() for w in (1.0, 0.0))
        difference = np.abs(made.astype(int) - guided)
        assert difference.max() <= 1 and difference.mean() < 1e-3 and not np.array_equal(guided, unguided)


def test_a_set_continues_and_grows_to_the_same_bytes(trained, synthetic, tmp_path, run):
    def augment(**changes):
        return run("augment", *augment_flags(trained, tmp_path, **changes))

    augment(per_class=3)
    assert "3 of 4 shards" in augment()  # the first was whole, the second was cut short
    assert contents(tmp_path) == contents(synthetic)
    for name in ("labels_00002.npy", "images_00003.npy"):
        os.remove(tmp_path / name)
        assert "1 of 4 shards" in augment() and contents(tmp_path) == contents(synthetic)
    assert "0 of 4 shards" in augment() and contents(tmp_path) == contents(synthetic)


@pytest.mark.parametrize("overwrite,cuts", ((False, 13), (True, 10)))
def test_a_set_cut_off_before_any_write_is_never_wrong(overwrite, cuts, trained, synthetic, tmp_path, run, capfd):
    """Run n is cut off before its n-th write or removal: what is there is right or refused, and a last run ends it."""
    folder, how = tmp_path / "cut", dict(per_class=4, steps=1, seed=5, overwrite=overwrite)
    run("augment", *augment_flags(trained, tmp_path / "whole", **how))
    before, after = contents(synthetic) if overwrite else {}, contents(tmp_path / "whole")
    if overwrite:
        shutil.copytree(synthetic, folder)
    for n in (*range(cuts), 99):
        status, _ = cut_off(n, capfd, "augment", *augment_flags(trained, folder, **how))
        there = contents(folder)
        assert all(there[name] in (before.get(name), after.get(name)) for name in there)
        try:
            data.load(str(folder))
            assert there == (before if status else after)
        except ddpm.UserError:
            assert status
        assert (status == 0) == (n == 99)


def test_images_of_some_classes_or_of_none(trained, shards, tmp_path, run):
    """At w = -1 the network sees no labels; below, it is pushed away from them."""
    for w in (-1, -2):
        run("augment", *augment_flags(trained, tmp_path / str(w), w=w))
        assert data.load(f"{tmp_path}/{w}")[1:] == (None, [])
    run("augment", *augment_flags(trained, tmp_path / "s", classes="bird,airplane"))
    images, labels, names = data.load(f"{tmp_path}/s")
    assert np.bincount(labels).tolist() == [7, 0, 7] and names == NAMES
    for classes, expected in (("", []), ("bird", ["bird"])):  # images of one class can be labelled
        out_dir = tmp_path / f"model-{classes}"
        run("train", *train_flags(shards, out_dir, conditional=False, max_iters=1, classes=classes))
        run("augment", *augment_flags(out_dir, ""))
        images, labels, names = data.load(f"{out_dir}/synthetic")
        assert images.shape == (7, 8, 8, 3) and names == expected
        assert labels.tolist() == [0] * 7 if classes else labels is None


def test_variations_of_the_training_images(shards, trained, tmp_path, run, fails, capfd):
    """Nearer to their images the less noise they start from; with those images' labels, the same bytes when resumed."""
    images, labels, _ = data.load(f"{shards}/tiny")
    (real, real_labels), _ = data.training_part(images, labels, NAMES, 0.1)
    means = []
    for vary in (0.2, 5):
        folder = tmp_path / str(vary)
        cut_off(9, capfd, "augment", *augment_flags(trained, folder, per_class=6, vary=vary, steps=2))
        run("augment", *augment_flags(trained, folder, per_class=6, vary=vary, steps=2))
        run("augment", *augment_flags(trained, tmp_path / "whole", per_class=6, vary=vary, steps=2, overwrite=True))
        assert contents(folder) == contents(tmp_path / "whole")
        made, made_labels, _ = data.load(str(folder))
        for k in range(3):  # in turn
            source, mine = real[real_labels == k][:6].astype(int), made[made_labels == k].astype(int)
            means.append(np.abs(source - mine).mean())
    assert max(means[:3]) < 0.7 * min(means[3:])
    assert "made with another vary" in fails("augment", *augment_flags(trained, folder, per_class=6, steps=2))
    data.write_shards(f"{tmp_path}/other", 255 - images, labels, NAMES)
    other = dict(vary=5, dataset=f"{tmp_path}/other", steps=2, overwrite=True)
    assert "trained on other images of" in run("augment", *augment_flags(trained, folder, **other))
    data.write_shards(f"{tmp_path}/other", images, labels, ["a", "b", "c"])
    assert "has classes ['a', 'b', 'c']" in fails("augment", *augment_flags(trained, folder, **other))


def test_other_sets_are_refused_and_kept(trained, synthetic, tmp_path, run, fails):
    shutil.copytree(synthetic, folder := tmp_path / "s")
    settings = dict(w=1.8, seed=1, dtype="bfloat16", steps=2, per_class=2, ema=False)
    for key, value in settings.items():
        line = fails("augment", *augment_flags(trained, folder, **{key: value}))
        assert f"made with another {'weights' if key == 'ema' else key}: use --overwrite=True" in line
    data.write_shards(f"{tmp_path}/mine", np.zeros((3, 8, 8, 3)), np.zeros(3), ["a"])
    mine = contents(tmp_path / "mine")
    assert "made with another w" in fails("augment", *augment_flags(trained, tmp_path / "mine"))
    data.save_json(f"{tmp_path}/mine/manifest.json", {"complete": False})  # of another program
    assert "made with another w" in fails("augment", *augment_flags(trained, tmp_path / "mine"))
    assert contents(folder) == contents(synthetic) and contents(tmp_path / "mine") == mine
    os.truncate(folder / "images_00001.npy", 300)
    assert "images_00001.npy is " in fails("augment", *augment_flags(trained, folder))  # damaged
    run("augment", *augment_flags(trained, folder, w=1.8, overwrite=True))
    assert contents(folder).keys() == contents(synthetic).keys() and contents(folder) != contents(synthetic)
