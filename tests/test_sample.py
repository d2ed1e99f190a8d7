"""sample.py: grids, comparisons, the GIF, and which weights it takes."""

import numpy as np
import pytest
from conftest import flags, train_flags
from PIL import Image

TILE = 18  # an 8x8 image at twice its size, and a margin


@pytest.fixture
def sample(trained, run):  # sample(name, key=value, …): an image that sample.py writes, and what it prints
    def sample(name, **changes):
        text = run("sample", *flags(out_dir=trained, device="cpu", **dict(steps=4) | changes))
        return np.asarray(Image.open(f"{trained}/{name}.png").convert("RGB")).astype(int), text

    return sample


def test_an_image_depends_on_its_seed_and_not_on_the_batch_size(sample):
    default, text = sample("sample")
    assert "w=1.8 (guidance_scale=2.8), dpm++, 4 steps, seed 17" in text and default.shape[0] == 3 * TILE + 2
    for n in (1, 7, 64):
        assert np.abs(sample("sample", batch_size=n, guidance_scale=2.8)[0] - default).max() <= 1
    for name, changes in (("sample", dict(seed=18)), ("sample", dict(w=0)), ("noise", {})):
        assert np.abs(sample(name, **changes)[0] - default).max() > 10


def test_rows_of_classes_and_a_gif(sample, trained):
    grid, _ = sample("sample", classes="bird,bird,0", num_samples=2, gif=True, ema=False)
    gif = Image.open(f"{trained}/denoising.gif")
    assert grid.shape[0] == 3 * TILE + 2 and gif.n_frames == 4 and gif.size == grid.shape[1::-1]
    gif.seek(3)  # ends at what was sampled, in 256 colours
    assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - grid).mean() < 3


def test_two_keys_are_compared_from_the_same_noise(sample):
    top, gap, columns = TILE, 8, 6  # column titles; between columns; images of a cell: two of each class
    grid, _ = sample("compare", rows="seed=3,4,3", columns="ema=True,True,False", w=1, num_samples=2)
    left = grid.shape[1] - 3 * columns * TILE - 2 * gap - 2

    def cell(i, j):
        x = left + j * (columns * TILE + gap)
        return grid[top + 2 + i * TILE : top + (i + 1) * TILE, x + 2 : x + columns * TILE]

    assert grid.shape[0] == top + 3 * TILE + 2
    assert np.array_equal(cell(0, 0), cell(2, 0)) and np.array_equal(cell(0, 0), cell(0, 1))  # equal settings
    assert not np.array_equal(cell(0, 0), cell(1, 0)) and not np.array_equal(cell(0, 0), cell(0, 2))
    alone, _ = sample("compare", columns="ema=False", seed=3, w=1, num_samples=2)  # one cell by itself is the same
    assert np.array_equal(alone[top + 2 : top + TILE, 2 : columns * TILE], cell(0, 2))
    assert sample("compare", rows="sampler=ddpm,ddim,dpm++", steps=3)[0].shape[0] == 3 * TILE + 2
    assert sample("compare", rows="w=-1,0,2,6", columns="steps=2,3")[0].shape[0] == top + 4 * TILE + 2


def test_pretrained_weights_are_taken_only_in_place_of_out(tmp_path, run, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = dict(steps=1, num_samples=1, classes="cat", device="cpu")
    assert (
        "the pretrained weights are used" in run("sample", *flags(**small)) and (tmp_path / "out/sample.png").exists()
    )
    for other in ("other/out", "out/../other", "out-shapes"):
        assert "no checkpoint" in fails("sample", *flags(out_dir=other, **small)) and not (tmp_path / other).exists()
    assert "only averaged weights" in fails("sample", *flags(ema=False, **small))


def test_a_model_without_a_null_label_is_not_guided(shards, tmp_path, run, fails):
    run("train", *train_flags(shards, tmp_path, p_uncond=0.0, max_iters=1))
    assert "p_uncond=0" in fails("sample", *flags(out_dir=tmp_path, w=1.8, device="cpu"))
    assert "w=0 " in run("sample", *flags(out_dir=tmp_path, steps=2, device="cpu"))
