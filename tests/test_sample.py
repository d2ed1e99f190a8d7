"""sample.py: grids, comparisons, the GIF, and which weights it takes."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import flags, train_flags
from PIL import Image, ImageSequence

import ddpm

TILE = 18  # an 8x8 image at twice its size, and a margin


@pytest.fixture
def sample(trained, run):  # sample(file, key=value, …): an image that sample.py writes, and what it prints
    def sample(file, **changes):
        text = run("sample", *flags(out_dir=trained, device="cpu", **dict(steps=4) | changes))
        return np.asarray(Image.open(f"{trained}/{file}.png").convert("RGB")).astype(int), text

    return sample


def test_an_image_depends_on_its_seed_and_not_on_the_batch_size(sample):
    default, text = sample("sample")
    assert "w=1.8 (guidance_scale=2.8) for sigma in [0.25, 4.0], dpm++, 4 steps, seed 17" in text
    assert np.abs(sample("sample", batch_size=7, guidance_scale=2.8)[0] - default).max() <= 1
    others = [sample("sample", **changes)[0] for changes in (dict(seed=18), dict(w=0), dict(interval=""))]
    assert all(np.abs(other - default).max() > 10 for other in (*others, sample("noise")[0]))
    assert default.shape[0] == 3 * TILE + 2 and sample("sample", w=-1)[0].shape[1] < default.shape[1]  # no titles


def test_rows_are_images_of_their_classes_with_noise_by_position(sample, trained):
    """In batches of any size. And a GIF of them at their own size, which ends at what was sampled, in 256 colours."""
    for ema in (True, False):
        grid, _ = sample("sample", classes="bird,bird,0", num_samples=2, batch_size=4, gif=True, ema=ema)
        model, _ = ddpm.load_model(f"{trained}/ckpt.pt", ema=ema)
        y, how = torch.tensor([2, 2, 2, 2, 0, 0]), dict(sampler="dpm++", steps=4, interval=(0.25, 4.0))
        wanted = ddpm.to_uint8(model.sample(y, 1.8, 17, **how)).numpy().astype(int)
        for k, image in enumerate(wanted):
            top, left = k // 2 * TILE + 2, grid.shape[1] + (k % 2 - 2) * TILE
            assert abs(grid[top : top + 16 : 2, left : left + 16 : 2] - image).max() <= 1
    gif = Image.open(f"{trained}/denoising.gif")
    times = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]  # Pillow adds those of equal frames
    assert grid.shape[0] == 3 * TILE + 2 and sum(times) == 3 * 80 + 2000 and gif.size[1] == 3 * 10 + 2
    last = np.asarray(gif.convert("RGB")).astype(int)[2:10, -10:-2]
    assert np.abs(last - wanted[1]).mean() < 3


def test_checkpoint_name_single_images_and_the_settings_in_them(sample, trained, tmp_path):
    grid, text = sample("mine", name="mine", checkpoint=f"{trained}/ckpt.pt", num_samples=2, png=True, gif=True)
    assert json.loads(Image.open(f"{trained}/mine.png").text["settings"])["num_samples"] == 2
    assert os.path.exists(f"{trained}/mine.gif") and os.path.exists(f"{trained}/mine_noise.png") and " s\n" in text
    names = sorted(os.listdir(f"{trained}/mine"))
    assert names == [f"{k:04d}.png" for k in range(6)]
    single = np.asarray(Image.open(f"{trained}/mine/{names[0]}")).astype(int)
    assert single.shape == (8, 8, 3) and (single == grid[2 : 2 + 16 : 2, -2 * TILE : -TILE - 2 : 2]).all()


def test_two_keys_are_compared_from_the_same_noise(sample):
    gap, columns = 8, 6  # after two images of a class; images of a cell
    grid, _ = sample("compare", rows="seed=3,4,3", columns="ema=True,True,False", w=1, num_samples=2)
    width = columns * TILE + 3 * gap
    top, left = grid.shape[0] - 3 * TILE - 2, grid.shape[1] - 3 * width + gap - 2  # of the titles

    def cell(i, j):
        return grid[top + 2 + i * TILE : top + (i + 1) * TILE, left + j * width + 2 : left + (j + 1) * width - gap]

    assert top >= 20 and left > 20
    assert np.array_equal(cell(0, 0), cell(2, 0)) and np.array_equal(cell(0, 0), cell(0, 1))  # equal settings
    assert not np.array_equal(cell(0, 0), cell(1, 0)) and not np.array_equal(cell(0, 0), cell(0, 2))
    alone, _ = sample("compare", columns="ema=False", seed=3, w=1, num_samples=2)  # one cell by itself is the same
    assert np.array_equal(alone[-TILE:-2, 2 : width - gap], cell(0, 2))
    assert 3 * TILE + 10 < sample("compare", rows="sampler=ddpm,ddim,dpm++", steps=3)[0].shape[0] < 4 * TILE
    assert sample("compare", rows="w=-1,0,2,6", columns="steps=2,3")[0].shape[0] > 4 * TILE + 2


def test_pretrained_weights_are_taken_only_in_place_of_out(tmp_path, run, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = dict(steps=1, num_samples=1, classes="cat", device="cpu")
    assert "the pretrained weights are used" in run("sample", *flags(**small))
    assert (tmp_path / "out/sample.png").exists()
    for other in ("other/out", "out/../other", "out-shapes"):
        assert "no checkpoint" in fails("sample", *flags(out_dir=other, **small)) and not (tmp_path / other).exists()


def test_a_model_without_a_null_label_is_not_guided(shards, tmp_path, run, fails):
    run("train", *train_flags(shards, tmp_path, p_uncond=0.0, max_iters=1))
    assert "p_uncond=0" in fails("sample", *flags(out_dir=tmp_path, w=1.8, device="cpu"))
    assert "w=0 " in run("sample", *flags(out_dir=tmp_path, steps=2, device="cpu"))
